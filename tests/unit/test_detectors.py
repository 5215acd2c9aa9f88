"""Detection of drift in a whole batch: parts, correction, explanation."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from monitoring.detectors import (
    ConfidenceKS,
    Detection,
    DetectionSettings,
    HotellingT2,
    Joint,
    Shift,
    detect_drift,
)
from monitoring.features import FeatureTable, concatenate
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


def test_hotelling_is_the_textbook_test() -> None:
    """On data that need no whitening, T² and p are those of the textbook's formula."""
    rng = np.random.default_rng(0)
    reference, batch = regime("r", rng), table(rng, 60, move=0.4)
    shift = HotellingT2().detect(reference, batch)
    x, y = reference.compared, reference.whitening.apply(batch.embedding)
    n, m, k = len(x), len(y), x.shape[1]
    pooled = ((n - 1) * np.cov(x.T) + (m - 1) * np.cov(y.T)) / (n + m - 2)
    gap = x.mean(axis=0) - y.mean(axis=0)
    t2 = n * m / (n + m) * gap @ np.linalg.solve(pooled, gap)
    assert shift.statistic == pytest.approx(t2, rel=1e-6)
    f = t2 * (n + m - k - 1) / (k * (n + m - 2))
    assert shift.p_value == pytest.approx(stats.f.sf(f, k, n + m - k - 1), rel=1e-6)


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


def test_the_smallest_reference_has_an_answer() -> None:
    """Twenty rows are enough for a defined answer, with two dimensions of 1280."""
    rng = np.random.default_rng(2)
    rows = np.repeat(rng.standard_normal((60, 8)), 160, axis=1).astype(np.float32)
    p = np.full((60, 3), 1 / 3, dtype=np.float32)
    whole = FeatureTable(tuple(map(str, range(60))), rows, p, pd.DataFrame({"w": np.zeros(60)}))
    reference = Regime("r", whole.take(range(20)), np.full(20, -1))
    assert reference.compared.shape == (10, 2)
    for m in (1, 2, 19, 40):
        shift = HotellingT2().detect(reference, whole.take(range(20, 20 + m)))
        assert 0 < shift.p_value <= 1


def test_joint_shares_the_error_rate() -> None:
    """The joint p is the smallest p over its weight, and never over 1."""
    joint = Joint(((HotellingT2(), 0.75), (ConfidenceKS(), 0.25)))
    assert joint.combine((Shift("a", 1, 0.3), Shift("b", 1, 0.01))).p_value == 0.04
    assert joint.combine((Shift("a", 1, 0.9), Shift("b", 1, 0.9))).p_value == 1
    with pytest.raises(ValueError, match="sum to one"):
        Joint(((HotellingT2(), 0.5), (ConfidenceKS(), 0.4)))
    with pytest.raises(ValueError, match="sum to one"):
        Joint(())


def test_known_worlds_are_quiet_in_any_mixture() -> None:
    """Pure and mixed batches of known worlds ring no more often than stated."""
    rng = np.random.default_rng(3)
    reference = worlds(rng)
    for photos in (100, 50, 20, 0):
        rings = 0
        for _ in range(40):
            parts = [table(rng, photos), table(rng, 100 - photos, world=15.0)]
            rings += check(reference, concatenate(parts), alpha=0.05).alarm
        assert rings <= stats.binom.ppf(0.999, 40, 0.05)


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
    assert all(len(part.shifts) == 2 for part in detection.parts)


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
    "settings", [{"alpha": 0}, {"alpha": 1}, {"max_dimensions": 0}, {"min_part": 0}]
)
def test_settings_out_of_range_are_refused(settings: dict[str, float]) -> None:
    """A value that cannot be meant is an error that names it."""
    with pytest.raises(ValueError, match=next(iter(settings))):
        DetectionSettings(**settings)


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


@pytest.mark.parametrize("m", [50, 400])
@pytest.mark.parametrize("old_share", [1.0, 0.5])
def test_the_same_world_twice_stays_at_alpha(m: int, old_share: float) -> None:
    """A second regime of the same world, or half of it, makes no batch of known worlds ring."""
    rng, rings = np.random.default_rng(m), {"old": 0, "new": 0, "both": 0}
    for _ in range(40):
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
    assert max(rings.values()) <= stats.binom.ppf(0.999, 40, 0.05)


@pytest.mark.parametrize("few", [1, 2, 3, 5, 10])
def test_a_few_rows_of_another_known_world_are_quiet(few: int) -> None:
    """A handful of sketches among fifty pictures is known, whichever way it is tested."""
    rng, rings = np.random.default_rng(few), 0
    for _ in range(60):
        batch = concatenate([table(rng, 50 - few), table(rng, few, world=15.0)])
        rings += check(worlds(rng), batch, alpha=0.05).alarm
    assert rings <= stats.binom.ppf(0.999, 60, 0.05)
