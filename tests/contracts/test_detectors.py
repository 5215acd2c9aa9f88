"""Behaviour that every detector must show, whatever it tests."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from monitoring.detectors import ConfidenceKS, DriftDetector, HotellingT2, Joint
from monitoring.features import FeatureTable
from monitoring.reference import Regime

TRIALS = 400
DETECTORS = [
    pytest.param(HotellingT2(), id="hotelling"),
    pytest.param(ConfidenceKS(), id="confidence-ks"),
    pytest.param(Joint(((HotellingT2(), 0.5), (ConfidenceKS(), 0.5))), id="joint"),
]


def table(
    rng: np.random.Generator, n: int, shift: float = 0.0, heavy: bool = False
) -> FeatureTable:
    """Embeddings of 12 correlated dimensions, of which one is dead; confidence depends on them."""
    mix = np.random.default_rng(99).standard_normal((12, 12))
    values = rng.standard_t(3, (n, 12)) if heavy else rng.standard_normal((n, 12))
    embedding = (values @ mix + shift).astype(np.float32)
    embedding[:, 3] = 0
    first = 1 / (1 + np.exp(-np.abs(values[:, 0] + shift) - 0.1))
    probabilities = np.stack([first, 1 - first], axis=1).astype(np.float32)
    ids = tuple(f"b/{i}" for i in range(n))
    return FeatureTable(ids, embedding, probabilities, pd.DataFrame({"brightness": first}))


def regime(features: FeatureTable) -> Regime:
    return Regime("only", features, np.zeros(len(features), dtype=np.int64))


@pytest.mark.parametrize("detector", DETECTORS)
@pytest.mark.parametrize(("m", "heavy"), [(60, False), (2, True)])
def test_rings_no_more_often_than_stated(detector: DriftDetector, m: int, heavy: bool) -> None:
    """The same distribution rings in at most the stated share of 400 seeded trials."""
    rng = np.random.default_rng(2)
    p = np.array(
        [
            detector.detect(
                regime(table(rng, 300, heavy=heavy)), table(rng, m, heavy=heavy)
            ).p_value
            for _ in range(TRIALS)
        ]
    )
    for alpha in (0.01, 0.05):
        assert (p <= alpha).sum() <= stats.binom.ppf(0.999, TRIALS, alpha)


@pytest.mark.parametrize("detector", DETECTORS)
@pytest.mark.parametrize("m", [5, 19, 20, 80])
def test_disjoint_always_rings(detector: DriftDetector, m: int) -> None:
    """A batch that shares no ground with the reference rings every time."""
    rng = np.random.default_rng(3)
    for _ in range(10):
        shift = detector.detect(regime(table(rng, 300)), table(rng, m, shift=25.0))
        assert shift.p_value <= 0.01


@pytest.mark.parametrize("detector", DETECTORS)
@pytest.mark.parametrize("m", [7, 50])
def test_order_of_rows_does_not_matter(detector: DriftDetector, m: int) -> None:
    """The same rows in another order give the same answer."""
    rng = np.random.default_rng(4)
    reference, batch = regime(table(rng, 200)), table(rng, m)
    one = detector.detect(reference, batch)
    other = detector.detect(reference, batch.take(rng.permutation(m)))
    assert other.p_value == pytest.approx(one.p_value, rel=1e-9)
    assert other.statistic == pytest.approx(one.statistic, rel=1e-9)


def constant(n: int, value: float) -> FeatureTable:
    ids = tuple(f"c/{i}" for i in range(n))
    probabilities = np.full((n, 2), 0.5, dtype=np.float32)
    embedding = np.full((n, 12), value, dtype=np.float32)
    return FeatureTable(ids, embedding, probabilities, pd.DataFrame({"brightness": np.zeros(n)}))


@pytest.mark.parametrize("detector", DETECTORS)
@pytest.mark.parametrize("m", [1, 30])
def test_constant_embeddings_do_not_crash(detector: DriftDetector, m: int) -> None:
    """A reference, a batch or both without any variance have a defined answer."""
    rng = np.random.default_rng(5)
    same = detector.detect(regime(constant(100, 0.3)), constant(m, 0.3))
    assert same.p_value == 1
    for reference, batch in [
        (regime(constant(100, 0.3)), table(rng, m)),
        (regime(table(rng, 100)), constant(m, 0.3)),
    ]:
        assert 0 <= detector.detect(reference, batch).p_value <= 1


@pytest.mark.parametrize("detector", DETECTORS)
@pytest.mark.parametrize("m", [1, 2])
def test_a_batch_of_one_or_two_has_an_answer(detector: DriftDetector, m: int) -> None:
    """One or two pictures give a finite statistic, and stay quiet if they are ordinary."""
    rng = np.random.default_rng(6)
    features = table(rng, 300)
    ordinary = features.take(np.argsort(np.abs(features.confidence - 0.7))[:m])
    shift = detector.detect(regime(features), ordinary)
    assert np.isfinite(shift.statistic)
    assert 0.01 < shift.p_value <= 1
    assert shift.detector == detector.name


@pytest.mark.parametrize("detector", DETECTORS)
def test_refuses_what_it_cannot_read(detector: DriftDetector) -> None:
    """An empty batch, one that is not finite and a tiny reference are named errors."""
    rng = np.random.default_rng(7)
    reference, batch = regime(table(rng, 50)), table(rng, 10)
    with pytest.raises(ValueError, match="no rows"):
        detector.detect(reference, batch.take([]))
    broken = batch.take(range(10))
    broken.embedding[[2, 5]] = np.nan
    with pytest.raises(ValueError, match=r"2 of 10 rows .* not finite \(first: b/2\)"):
        detector.detect(reference, broken)
    with pytest.raises(ValueError, match=r"'only' has 19 reference rows.* at least 20"):
        detector.detect(regime(table(rng, 19)), batch)
