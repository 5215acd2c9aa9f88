"""Behaviour that every detector must show, whatever it tests."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from monitoring.detectors import (
    MMD,
    DetectionSettings,
    DriftDetector,
    HotellingT2,
    PredictedClasses,
    ProbabilitiesKS,
    ScoresKS,
    StatisticsKS,
)
from monitoring.features import FeatureTable
from monitoring.reference import Regime

TRIALS = 250
DETECTORS = [
    pytest.param(MMD(), id="mmd"),
    pytest.param(HotellingT2(), id="hotelling"),
    pytest.param(ScoresKS(), id="scores"),
    pytest.param(ProbabilitiesKS(), id="probabilities"),
    pytest.param(PredictedClasses(), id="predicted"),
    pytest.param(StatisticsKS(), id="statistics"),
    pytest.param(DetectionSettings().joint, id="joint"),
]


def table(
    rng: np.random.Generator, n: int, shift: float = 0.0, heavy: bool = False
) -> FeatureTable:
    """Embeddings of 12 correlated dimensions, one of them dead; three classes depend on them."""
    mix = np.random.default_rng(99).standard_normal((12, 12))
    values = rng.standard_t(3, (n, 12)) if heavy else rng.standard_normal((n, 12))
    embedding = (values @ mix + shift).astype(np.float32)
    embedding[:, 3] = 0
    logits = 2 * values[:, :3] + shift * np.array([0.5, 0, 0])
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p = (p / p.sum(axis=1, keepdims=True)).astype(np.float32)
    ids = tuple(f"b/{i}" for i in range(n))
    return FeatureTable(ids, embedding, p, pd.DataFrame({"brightness": p[:, 0]}))


def regime(features: FeatureTable) -> Regime:
    return Regime("only", features, np.zeros(len(features), dtype=np.int64))


@pytest.mark.parametrize("detector", DETECTORS)
@pytest.mark.parametrize(
    ("n", "m", "heavy"),
    [
        pytest.param(100, 60, False, marks=pytest.mark.slow),
        (100, 2, True),
        pytest.param(10, 10, False, marks=pytest.mark.nightly),
        pytest.param(1002, 30, False, marks=pytest.mark.nightly),
    ],
)
def test_rings_no_more_often_than_stated(
    detector: DriftDetector, n: int, m: int, heavy: bool
) -> None:
    """The same distribution rings in at most the stated share of 250 seeded trials."""
    rng = np.random.default_rng(2)
    p = []
    for trial in range(TRIALS):
        if trial % (20 if n > 1000 else 1) == 0:
            reference = regime(table(rng, n, heavy=heavy))
        p.append(detector.detect(reference, table(rng, m, heavy=heavy)).p_value)
    for alpha in (0.01, 0.05):
        assert (np.array(p) <= alpha).sum() <= stats.binom.ppf(0.999, TRIALS, alpha)


@pytest.mark.parametrize("detector", DETECTORS)
@pytest.mark.parametrize(("n", "m"), [(300, 5), (300, 19), (300, 20), (10, 80), (1002, 80)])
def test_disjoint_always_rings(detector: DriftDetector, n: int, m: int) -> None:
    """A batch that shares no ground with the reference rings every time."""
    rng = np.random.default_rng(3)
    reference = table(rng, n)
    for _ in range(5):
        shift = detector.detect(regime(reference), table(rng, m, shift=25.0))
        assert shift.p_value <= 0.01
        assert shift.p_value > 0


@pytest.mark.parametrize("detector", DETECTORS)
@pytest.mark.parametrize(("n", "m"), [(200, 7), (200, 50), (1002, 50)])
def test_order_of_rows_does_not_matter(detector: DriftDetector, n: int, m: int) -> None:
    """The same rows in another order, or asked a second time, give the same answer."""
    rng = np.random.default_rng(4)
    reference, batch = regime(table(rng, n)), table(rng, m)
    one = detector.detect(reference, batch)
    assert detector.detect(reference, batch) == one
    assert detector.detect(regime(reference.features), batch) == one
    other = detector.detect(reference, batch.take(rng.permutation(m)))
    assert other.p_value == pytest.approx(one.p_value, rel=1e-9)
    assert other.statistic == pytest.approx(one.statistic, rel=1e-9)


def recurring(rng: np.random.Generator, n: int, error: float) -> FeatureTable:
    """Three in ten rows are one and the same picture, whose numbers are a little off each time."""
    features, same = table(rng, n), table(np.random.default_rng(98), 1)
    rows = range(3 * n // 10)
    off = 1 + error * rng.uniform(0.5, 1, (len(rows), 1))
    features.embedding[rows] = same.embedding * off
    features.probabilities[rows] = same.probabilities * off
    features.statistics["brightness"] = features.probabilities[:, 0]
    return features


@pytest.mark.parametrize("detector", DETECTORS)
@pytest.mark.parametrize(("n", "m"), [(100, 60), (1002, 80)])
def test_rounding_does_not_tell_a_picture_from_itself(
    detector: DriftDetector, n: int, m: int
) -> None:
    """A picture that recurs on both sides, never with the same bits, is as if the bits were."""
    exact, rounded = (
        [
            detector.detect(regime(recurring(rng, n, -error)), recurring(rng, m, error))
            for rng in map(np.random.default_rng, range(5))
        ]
        for error in (0, 3e-6)
    )
    for one, other in zip(exact, rounded, strict=True):
        assert other.p_value >= 0.7 * one.p_value  # other permutations are drawn


def constant(n: int, value: float) -> FeatureTable:
    ids = tuple(f"c/{i}" for i in range(n))
    probabilities = np.full((n, 3), 1 / 3, dtype=np.float32)
    embedding = np.full((n, 12), value, dtype=np.float32)
    return FeatureTable(ids, embedding, probabilities, pd.DataFrame({"brightness": np.zeros(n)}))


@pytest.mark.parametrize("detector", DETECTORS)
@pytest.mark.parametrize(("n", "m"), [(100, 1), (100, 30), (1002, 30), (10, 10)])
def test_constant_embeddings_do_not_crash(detector: DriftDetector, n: int, m: int) -> None:
    """A reference, a batch or both without any variance have a defined answer."""
    rng = np.random.default_rng(5)
    same = detector.detect(regime(constant(n, 0.3)), constant(m, 0.3))
    assert same.p_value == 1
    for reference, batch in [
        (regime(constant(n, 0.3)), table(rng, m)),
        (regime(table(rng, n)), constant(m, 0.3)),
    ]:
        assert 0 < detector.detect(reference, batch).p_value <= 1


@pytest.mark.parametrize(
    "detector", [p for p in DETECTORS if p.id in {"mmd", "hotelling", "joint"}]
)
@pytest.mark.parametrize("n", [100, 1002])
def test_another_constant_rings(detector: DriftDetector, n: int) -> None:
    """Embeddings that never varied and now have another value are a change."""
    assert detector.detect(regime(constant(n, 0.3)), constant(30, 0.7)).p_value <= 0.01


@pytest.mark.parametrize("detector", DETECTORS)
def test_a_class_that_was_never_predicted_is_no_error(detector: DriftDetector) -> None:
    """A class that neither side predicts, or the batch alone, has a defined answer."""
    rng = np.random.default_rng(8)
    for n, m in ((200, 60), (200, 10), (1002, 60)):
        features, batch = table(rng, n), table(rng, m)
        features.probabilities[:] = [0.6, 0.4, 0]
        batch.probabilities[:] = [0.6, 0.4, 0]
        assert 0 < detector.detect(regime(features), batch).p_value <= 1
        batch.probabilities[: m // 2] = [0, 0.1, 0.9]
        assert 0 < detector.detect(regime(features), batch).p_value <= 1


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
    with pytest.raises(ValueError, match=r"'only' has 1 reference rows.* at least 2"):
        detector.detect(regime(table(rng, 1)), batch)
