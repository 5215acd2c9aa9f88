"""Detection of drift in a whole batch: parts, correction, explanation."""

import re
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from monitoring.detectors import (
    DETECTORS,
    MMD,
    Detection,
    DetectionSettings,
    HotellingT2,
    Joint,
    PredictedClasses,
    ProbabilitiesKS,
    ScoresKS,
    Shift,
    _membership,
    detect_drift,
)
from monitoring.features import FeatureTable, Floats, concatenate
from monitoring.reference import Reference, Regime

CLASSES = ("cat", "7", "dog")


def table(
    rng: np.random.Generator, n: int, *, world: float = 0.0, move: float = 0.0, bright: float = 0.0
) -> FeatureTable:
    embedding = rng.standard_normal((n, 8)).astype(np.float32)
    embedding[:, 0] += world
    embedding[:, 1] += move
    logits = 3 * rng.standard_normal((n, 3))
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    brightness = 0.5 + 0.1 * (rng.standard_normal(n) + bright)
    statistics = pd.DataFrame({"brightness": brightness, "width": np.full(n, 28.0)})
    return FeatureTable(
        tuple(f"b/{i}" for i in range(n)), embedding, p.astype(np.float32), statistics
    )


def regime(name: str, rng: np.random.Generator, world: float = 0.0, n: int = 400) -> Regime:
    return Regime(name, table(rng, n, world=world), np.full(n, -1))


def worlds(rng: np.random.Generator) -> Reference:
    return Reference((regime("photo", rng), regime("sketch", rng, world=15.0)), CLASSES)


def check(reference: Reference, batch: FeatureTable, alpha: float = 0.01) -> Detection:
    return detect_drift(reference, batch, DetectionSettings(alpha=alpha))


def test_the_distance_grows_with_the_move_and_not_with_the_batch() -> None:
    """Near zero without a move, more with a larger one, and about as much for 50 and 400 rows."""
    rng = np.random.default_rng(0)
    reference = worlds(rng)

    def distance(n: int, move: float) -> float:
        found = check(reference, table(rng, n, move=move)).distance
        assert found is not None
        return found

    quiet, little, much = (distance(400, move) for move in (0.0, 1.0, 3.0))
    assert quiet < 0.1 < little < much < 1.414
    assert 0.5 < distance(50, 3.0) / much < 2
    half = concatenate([table(rng, 200, move=3.0), table(rng, 200, world=15.0)])
    assert quiet < check(reference, half).distance < much
    alone = DetectionSettings(detectors={"hotelling": 1.0})
    assert detect_drift(reference, half, alone).distance is None


def test_draws_are_of_different_rows_each_equally_often() -> None:
    """Each column has m rows, no two are alike by more than chance; of few rows there are all."""
    columns = _membership(30, 20, 999)
    assert columns.shape == (50, 1000)
    assert (columns.sum(axis=0) == 20).all()
    assert (columns[:, 0] == np.repeat([0, 1], [30, 20])).all()
    often = columns[:, 1:].mean(axis=1)
    assert np.abs(often - 0.4).max() < 4 * np.sqrt(0.4 * 0.6 / 999)
    every = _membership(3, 2, 999)
    assert every.shape == (5, 10)
    assert len(np.unique(every, axis=1).T) == 10


def test_hotelling_is_the_textbook_test() -> None:
    """T² and p are those of the textbook's formula, whitened by the half or all together."""
    rng = np.random.default_rng(0)
    batch = table(rng, 60, move=0.4)
    large = regime("r", rng, n=1200)
    x, y = large.compared, large.whitening.apply(batch.embedding)
    _require_textbook(HotellingT2().detect(large, batch), x, y)
    small = regime("r", rng)
    _require_textbook(HotellingT2().detect(small, batch), small.features.embedding, batch.embedding)


def _require_textbook(shift: Shift, x: Floats, y: Floats) -> None:
    x, y = x.astype(np.float64), y.astype(np.float64)
    n, m, k = len(x), len(y), x.shape[1]
    pooled = ((n - 1) * np.cov(x.T) + (m - 1) * np.cov(y.T)) / (n + m - 2)
    gap = x.mean(axis=0) - y.mean(axis=0)
    t2 = n * m / (n + m) * gap @ np.linalg.solve(pooled, gap)
    assert shift.statistic == pytest.approx(t2, rel=1e-6)
    f = t2 * (n + m - k - 1) / (k * (n + m - 2))
    assert shift.p_value == pytest.approx(stats.f.sf(f, k, n + m - k - 1), rel=1e-5)


def test_hotelling_tests_no_more_dimensions_than_told() -> None:
    """A shift in a direction beyond the leading ones is not seen with fewer of them."""
    rng = np.random.default_rng(1)
    features = table(rng, 400)
    features.embedding[:] *= np.array([9, 8, 7, 6, 5, 4, 3, 2], dtype=np.float32)
    batch = table(rng, 100)
    batch.embedding[:] *= np.array([9, 8, 7, 6, 5, 4, 3, 2], dtype=np.float32)
    batch.embedding[:, 7] += 6
    reference = Regime("r", features, np.full(400, -1))
    assert HotellingT2(max_dimensions=8).detect(reference, batch).p_value < 1e-6
    assert HotellingT2(max_dimensions=3).detect(reference, batch).p_value > 0.01


@pytest.mark.parametrize("n", [2, 10, 20])
def test_a_small_reference_has_an_answer(n: int) -> None:
    """So few rows of 1280 dimensions still give a defined answer."""
    rng = np.random.default_rng(2)
    rows = np.repeat(rng.standard_normal((60, 8)), 160, axis=1).astype(np.float32)
    p = np.full((60, 3), 1 / 3, dtype=np.float32)
    whole = FeatureTable(tuple(map(str, range(60))), rows, p, pd.DataFrame({"w": np.zeros(60)}))
    reference = Regime("r", whole.take(range(n)), np.full(n, -1))
    for m in (1, 2, 19, 40):
        for detector in (HotellingT2(), MMD(), ScoresKS()):
            shift = detector.detect(reference, whole.take(range(20, 20 + m)))
            assert 0 < shift.p_value <= 1


def test_mmd_is_the_textbook_statistic() -> None:
    """The statistic is Gretton's unbiased estimate with the kernel written out pair by pair."""
    rng = np.random.default_rng(11)
    reference, batch = regime("r", rng, n=1200), table(rng, 30, move=1.0)
    flat = np.array([0.5, 0.25, 0.25], dtype=np.float32)
    reference.features.probabilities[:] = flat
    batch.probabilities[:] = flat
    x, y = reference.compared, reference.whitening.apply(batch.embedding)
    apart = ((x[:, None] - x) ** 2).sum(axis=2)
    width = 2 * np.median(apart[np.triu_indices(len(x), 1)])

    def mean(a: Floats, b: Floats) -> float:
        k = np.exp(-((a[:, None] - b) ** 2).sum(axis=2) / width)
        same = a is b
        return float((k.sum() - same * len(a)) / (len(a) * (len(b) - same)))

    shift = MMD().detect(reference, batch)
    assert shift.statistic == pytest.approx(mean(x, x) + mean(y, y) - 2 * mean(x, y), rel=1e-3)
    assert shift.p_value <= 0.005


def test_mmd_sees_spread_and_doubt_that_the_mean_does_not() -> None:
    """Embeddings spread wider around the same mean ring, and so does doubt alone."""
    rng = np.random.default_rng(12)
    for n in (400, 1200):
        reference, wide, doubt = regime("r", rng, n=n), table(rng, 80), table(rng, 80)
        wide.embedding[:] = 2 * (wide.embedding - wide.embedding.mean(axis=0))
        doubt.probabilities[:] = 1 / 3
        assert HotellingT2().detect(reference, wide).p_value > 0.01
        assert MMD().detect(reference, wide).p_value <= 0.005
        assert MMD().detect(reference, doubt).p_value <= 0.005


def test_mmd_reads_on_below_its_permutations() -> None:
    """A batch far beyond all permutations has a far smaller p than their number allows."""
    rng = np.random.default_rng(13)
    for n in (400, 1200):
        near, far = table(rng, 80, move=0.3), table(rng, 80, move=3.0)
        assert MMD().detect(regime("r", rng, n=n), far).p_value < 1e-6
        assert 200 * MMD().detect(regime("r", rng, n=n), near).p_value >= 1e-3


@pytest.mark.parametrize(("n", "m"), [(60, 40), (1200, 300)])
def test_ks_is_scipys_on_every_column(n: int, m: int) -> None:
    """Statistic and p are those of scipy's test on each column, ties included."""
    rng = np.random.default_rng(14)
    features, batch = table(rng, n), table(rng, m)
    features.probabilities[:] = features.probabilities.round(1)
    batch.probabilities[:] = batch.probabilities.round(1)
    reference = Regime("r", features, np.full(n, -1))
    method = "exact" if n * m <= 10_000 else "asymp"
    each = [
        stats.ks_2samp(features.probabilities[:, i], batch.probabilities[:, i], method=method)
        for i in range(3)
    ]
    shift = ProbabilitiesKS().detect(reference, batch)
    assert shift.statistic == pytest.approx(max(one.statistic for one in each))
    assert shift.p_value == pytest.approx(min(1.0, 3 * min(one.pvalue for one in each)))


def test_predicted_classes_are_the_textbook_test() -> None:
    """With frequent classes it is Pearson's test of the two rows of counts."""
    rng = np.random.default_rng(15)
    reference, batch = regime("r", rng), table(rng, 90)
    counts = [np.bincount(t.predicted, minlength=3) for t in (reference.features, batch)]
    expected = stats.chi2_contingency(np.array(counts), correction=False)
    shift = PredictedClasses().detect(reference, batch)
    assert shift.statistic == pytest.approx(expected.statistic)
    assert shift.p_value == pytest.approx(expected.pvalue)


@pytest.mark.parametrize("m", [30, 80])
def test_rare_classes_together_still_count(m: int) -> None:
    """Two hundred classes with less than one expected row each: more of the rare ones rings."""
    rng = np.random.default_rng(16)

    def skewed(n: int, first: int) -> FeatureTable:
        features = table(rng, n)
        hot = np.eye(200, dtype=np.float32)[first + rng.integers(0, 200 - first, n)]
        return FeatureTable(features.sample_ids, features.embedding, hot, features.statistics)

    reference = Regime("r", skewed(500, 0), np.full(500, -1))
    assert PredictedClasses().detect(reference, skewed(m, 0)).p_value > 0.01
    reference = Regime("r", skewed(500, 150), np.full(500, -1))
    assert PredictedClasses().detect(reference, skewed(m, 0)).p_value <= 0.001


def test_joint_shares_the_error_rate() -> None:
    """The joint p is the smallest p over its weight, and never over 1."""
    joint = Joint(((HotellingT2(), 0.75), (ScoresKS(), 0.25)))
    assert joint.combine((Shift("a", 1, 0.3), Shift("b", 1, 0.01))).p_value == 0.04
    assert joint.combine((Shift("a", 1, 0.9), Shift("b", 1, 0.9))).p_value == 1
    with pytest.raises(ValueError, match="sum to one"):
        Joint(((HotellingT2(), 0.5), (ScoresKS(), 0.4)))
    with pytest.raises(ValueError, match="sum to one"):
        Joint(())


@pytest.mark.slow
def test_known_worlds_are_quiet_in_any_mixture() -> None:
    """Pure and mixed batches of known worlds ring no more often than stated."""
    rng = np.random.default_rng(3)
    reference = worlds(rng)
    for photos in (100, 50, 20, 0):
        rings = 0
        for _ in range(15):
            parts = [table(rng, photos), table(rng, 100 - photos, world=15.0)]
            rings += check(reference, concatenate(parts), alpha=0.05).alarm
        assert rings <= stats.binom.ppf(0.999, 15, 0.05)


def test_a_shifted_part_rings_at_the_corrected_level() -> None:
    """One shifted half is found; p is twice the smaller part's; the largest part names it."""
    rng = np.random.default_rng(4)
    batch = concatenate([table(rng, 60), table(rng, 40, world=15.0, move=2.0)])
    detection = check(worlds(rng), batch)
    assert detection.alarm
    assert [(part.regime, part.n, part.share) for part in detection.parts] == [
        ("photo", 60, 0.6),
        ("sketch", 40, 0.4),
    ]
    assert detection.p_value == pytest.approx(2 * min(part.p_value for part in detection.parts))
    assert detection.parts[1].p_value < 1e-6 < detection.parts[0].p_value
    assert detection.regime == "photo"
    assert all(len(part.shifts) == len(DETECTORS) for part in detection.parts)


def test_every_part_that_is_tested_costs() -> None:
    """The batch's p is the smallest of its parts' times their number, and never over 1."""
    rng = np.random.default_rng(9)
    reference = worlds(rng)
    for move in (0.0, 0.3, 0.4):
        batch = concatenate([table(rng, 60, move=move), table(rng, 40, world=15.0)])
        detection = check(reference, batch)
        smallest = min(part.p_value for part in detection.parts)
        assert smallest > 1e-6
        assert detection.p_value == pytest.approx(min(1.0, 2 * smallest), rel=1e-12)


def test_the_alarm_is_p_at_most_alpha() -> None:
    """The alarm is on exactly from alpha = p upwards."""
    rng = np.random.default_rng(5)
    reference, batch = worlds(rng), table(rng, 50, move=0.4)
    p = check(reference, batch).p_value
    assert 0 < p < 1
    assert check(reference, batch, alpha=p).alarm
    assert not check(reference, batch, alpha=p * 0.999).alarm


def test_columns_that_moved_are_named_with_figures() -> None:
    """Brightness in standard deviations, classes by their shares, constants by their values."""
    rng = np.random.default_rng(6)
    batch = table(rng, 100, bright=2.1)
    batch.probabilities[:60] = [0.05, 0.9, 0.05]
    batch.statistics["width"] = 64.0
    words = check(worlds(rng), batch).top_columns
    assert words[0] == "width 28.00 -> 64.00"
    assert words[1].startswith("brightness +2.")
    assert words[1].endswith(" sd")
    assert any(w.startswith("share of predicted class '7' .3") and "-> .7" in w for w in words)
    assert len(words) <= 5


@pytest.mark.slow
def test_nothing_is_named_when_nothing_moved() -> None:
    """Quiet batches, mixtures of known worlds and single pictures name next to nothing."""
    rng = np.random.default_rng(7)
    reference = worlds(rng)
    reference.regimes[1].features.statistics["brightness"] += 1
    named = 0
    for _ in range(20):
        sketches = table(rng, 50, world=15.0)
        sketches.statistics["brightness"] += 1
        named += len(check(reference, concatenate([table(rng, 50), sketches])).top_columns)
        named += len(check(reference, table(rng, 1)).top_columns)
    assert named <= 1


@pytest.mark.parametrize(
    "settings",
    [
        {"alpha": 0},
        {"alpha": 1},
        {"max_dimensions": 0},
        {"min_part": 0},
        {"detectors": {}},
        {"detectors": {"mmd": 0.0}},
        {"detectors": {"mmd": float("nan")}},
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    """A value that cannot be meant is an error that names it."""
    with pytest.raises(ValueError, match=next(iter(settings))):
        DetectionSettings(**settings)


def test_an_unknown_detector_is_named_with_the_known_ones() -> None:
    """A misspelt test is an error that lists those there are."""
    with pytest.raises(ValueError, match="'mdd' is none of mmd, hotelling, scores, prob"):
        DetectionSettings(detectors={"mdd": 1.0})


def test_the_settings_choose_the_tests_and_their_shares() -> None:
    """Shares are divided by their sum, and only the named tests run."""
    joint = DetectionSettings(detectors={"predicted": 1, "mmd": 3}).joint
    assert joint.members == ((MMD(), 0.75), (PredictedClasses(), 0.25))
    weights = [weight for _, weight in DetectionSettings().joint.members]
    assert weights == pytest.approx([0.5, *[0.1] * 5])


def test_a_reference_too_small_for_the_level_says_how_many_rows_it_needs() -> None:
    """One picture cannot ring against ten, but does against as many as the error asks for."""
    rng = np.random.default_rng(17)
    settings, odd = DetectionSettings(alpha=0.05), table(rng, 1, move=30.0)
    with pytest.raises(
        ValueError, match=r"'r' has 10 reference rows.* at least (\d+) samples"
    ) as e:
        detect_drift(Reference((regime("r", rng, n=10),), CLASSES), odd, settings)
    needed = int(re.findall(r"at least (\d+)", str(e.value))[0])
    enough = Reference((regime("r", rng, n=needed),), CLASSES)
    assert detect_drift(enough, odd, settings).alarm
    few = DetectionSettings(alpha=1e-4, detectors={"predicted": 1})
    with pytest.raises(ValueError, match="however large the reference is"):
        detect_drift(enough, table(rng, 30), few)


def test_ten_rows_are_compared_with_ten() -> None:
    """A reference under 20 rows, of a single world, holds its level and finds a clear shift."""
    rng, rings = np.random.default_rng(18), 0
    for _ in range(40):
        reference = Reference((regime("r", rng, n=10),), CLASSES)
        rings += check(reference, table(rng, 10), alpha=0.05).alarm
        assert check(reference, table(rng, 10, move=30.0), alpha=0.05).alarm
    assert rings <= stats.binom.ppf(0.999, 40, 0.05)


def test_batches_that_cannot_be_read_are_named() -> None:
    """NaN and no rows are errors in words."""
    rng = np.random.default_rng(8)
    reference, batch = worlds(rng), table(rng, 30)
    with pytest.raises(ValueError, match="no rows"):
        check(reference, batch.take([]))
    batch.probabilities[3] = np.nan
    with pytest.raises(ValueError, match="batch: 1 of 30 rows"):
        check(reference, batch)


@pytest.mark.parametrize("columns", [["brightness", "height"], ["height", "w"]])
def test_statistics_that_both_have_are_compared(columns: list[str]) -> None:
    """A batch with other statistics than the reference is compared on the common ones."""
    rng = np.random.default_rng(10)
    batch = table(rng, 60, bright=3)
    batch.statistics.columns = columns
    words = check(worlds(rng), batch).top_columns
    assert any("brightness +" in word for word in words) == ("brightness" in columns)
    assert not any("height" in word or "width" in word for word in words)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old_share", "m"),
    [
        (1.0, 50),
        pytest.param(1.0, 400, marks=pytest.mark.nightly),
        pytest.param(0.5, 50, marks=pytest.mark.nightly),
        (0.5, 400),
    ],
)
def test_the_same_world_twice_stays_at_alpha(m: int, old_share: float) -> None:
    """A second regime of the same world, or half of it, makes no batch of known worlds ring."""
    rng, rings = np.random.default_rng(m), {"old": 0, "new": 0, "both": 0}
    for _ in range(12):
        again = round(400 * old_share)
        second = concatenate([table(rng, again), table(rng, 400 - again, world=15.0)])
        second = second.take(rng.permutation(400))
        reference = Reference(
            (regime("first", rng), Regime("since v1", second, np.full(400, -1))), CLASSES
        )
        assert len(reference.worlds) == (1 if old_share == 1 else 2)
        new = 15.0 if old_share < 1 else 0.0
        half = concatenate([table(rng, m // 2), table(rng, m // 2, world=new)])
        for name, batch in (
            ("old", table(rng, m)), ("new", table(rng, m, world=new)), ("both", half),
        ):  # fmt: skip
            rings[name] += check(reference, batch, alpha=0.05).alarm
        third = table(rng, m, move=2.0)
        assert check(reference, third).alarm
    assert max(rings.values()) <= stats.binom.ppf(0.999, 12, 0.05)


@pytest.mark.parametrize("few", [1, pytest.param(3, marks=pytest.mark.nightly), 10])
def test_a_few_rows_of_another_known_world_are_quiet(few: int) -> None:
    """A handful of sketches among fifty pictures is known, whichever way it is tested."""
    rng, rings = np.random.default_rng(few), 0
    reference = worlds(rng)
    for _ in range(40):
        batch = concatenate([table(rng, 50 - few), table(rng, few, world=15.0)])
        rings += check(reference, batch, alpha=0.05).alarm
    assert rings <= stats.binom.ppf(0.999, 40, 0.05)
