"""Each slice is checked by itself, and all of them together keep the level."""

import numpy as np
import pandas as pd
import pytest

from monitoring.detectors import DetectionSettings, detect_drift
from monitoring.features import FeatureTable, tidy
from monitoring.reference import Reference, Regime
from monitoring.slices import check_slices, joined, values_of

SETTINGS = DetectionSettings(alpha=0.05)


def table(rng: np.random.Generator, cameras: list[object], moved: str = "") -> FeatureTable:
    """Embeddings of 4 dimensions; those of the camera `moved` are two standard deviations off."""
    n = len(cameras)
    shift = np.array([2.0 if camera == moved else 0.0 for camera in cameras])
    embedding = (rng.standard_normal((n, 4)) + shift[:, None]).astype(np.float32)
    first = 1 / (1 + np.exp(-np.abs(rng.standard_normal(n)) - 0.1))
    return FeatureTable(
        tuple(f"b/{i}" for i in range(n)),
        embedding,
        np.stack([first, 1 - first], axis=1).astype(np.float32),
        pd.DataFrame(index=range(n)),
        tidy(pd.DataFrame({"camera": cameras})),
    )


def reference(rng: np.random.Generator, cameras: list[object]) -> Reference:
    features = table(rng, cameras)
    labels = (rng.random(len(features)) > features.confidence).astype(np.int64)
    return Reference((Regime("first", features, labels),), ("cat", "dog"))


def test_a_drift_in_one_slice_is_found_there() -> None:
    """A camera with 15 of 300 pictures that moved rings; the others are quiet."""
    rng = np.random.default_rng(0)
    known = reference(rng, ["a", "b"] * 300 + ["c"] * 100)
    batch = table(rng, ["a"] * 150 + ["b"] * 135 + ["c"] * 15, moved="c")
    found = {row.value: row for row in check_slices(known, batch, ["camera"], SETTINGS)}
    assert [found[value].alarm for value in "abc"] == [False, False, True]
    assert found["c"].n == 15
    assert found["a"].estimated == pytest.approx(found["a"].reference, abs=0.15)
    whole = detect_drift(known, batch, SETTINGS).p_value
    assert joined(whole, list(found.values())) < 0.01


@pytest.mark.slow
def test_all_slices_together_ring_no_more_often_than_stated() -> None:
    """Three quiet cameras and the whole batch: at most the stated share of 100 trials."""
    rng = np.random.default_rng(1)
    known = reference(rng, ["a", "b", "c"] * 200)
    rang = 0
    for _ in range(100):
        batch = table(rng, ["a"] * 40 + ["b"] * 20 + ["c"] * 5)
        slices = check_slices(known, batch, ["camera"], SETTINGS)
        rang += joined(detect_drift(known, batch, SETTINGS).p_value, slices) <= SETTINGS.alpha
    assert rang <= 0.05 * 100 + 2 * np.sqrt(0.05 * 0.95 * 100)


def test_what_cannot_be_compared_says_why() -> None:
    """A new value, a rare one, and a column that is not there have a note and no figures."""
    rng = np.random.default_rng(2)
    known = reference(rng, ["a"] * 100 + ["rare"] * 19)
    batch = table(rng, ["a"] * 30 + ["rare"] * 3 + ["new"] * 2 + [None] * 5)
    rows = check_slices(known, batch, ["camera", "site"], SETTINGS)
    notes = {(row.column, row.value): row.note for row in rows}
    assert notes == {
        ("camera", "a"): "",
        ("camera", "rare"): "fewer than 20 reference rows have this value",
        ("camera", "new"): "fewer than 20 reference rows have this value",
        ("site", ""): "the batch has no such column",
    }
    assert joined(0.3, [row for row in rows if row.note]) == 0.3


def test_a_slice_of_one_picture_says_why_it_is_not_tested() -> None:
    """It cannot reach the level, and does not keep the others from being tested."""
    rng = np.random.default_rng(5)
    known = reference(rng, ["a", "b"] * 60)
    batch = table(rng, ["a"] * 40 + ["b"])
    rows = check_slices(known, batch, ["camera"], DetectionSettings(alpha=0.001))
    found = {row.value: row for row in rows}
    assert not found["a"].note
    assert "too few for alpha=0.0005" in found["b"].note
    assert np.isnan(found["b"].p_value)


def test_many_values_are_bounded() -> None:
    """Of a column with a value a sample, the 20 commonest are looked at."""
    rng = np.random.default_rng(3)
    known = reference(rng, [f"id {i}" for i in range(100)])
    rows = check_slices(known, table(rng, [f"id {i}" for i in range(50)]), ["camera"], SETTINGS)
    assert len(rows) == 50
    assert sum(row.note.startswith("only the 20") for row in rows) == 30


def test_numbers_are_slices_by_their_value() -> None:
    """A column of numbers names its slices without needless zeros; a gap belongs to none."""
    told = values_of(table(np.random.default_rng(4), [1234567, 2.5, None]), "camera")
    assert [value if isinstance(value, str) else None for value in told] == ["1234567", "2.5", None]
