"""Models of several labels and of values, as the monitoring sees them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from monitoring.accuracy import estimate_accuracy
from monitoring.columns import summary_columns
from monitoring.detectors import DetectionSettings, PredictedClasses, detect_drift
from monitoring.features import FeatureTable, Kind, concatenate
from monitoring.labelling import choose, write_requests
from monitoring.reference import RIGHT, WRONG, Reference, Regime
from monitoring.sequential import bets
from monitoring.slices import check_slices

CLASSES = ("cat", "dog", "fox")
KINDS = [Kind.MULTI_LABEL, Kind.REGRESSION]
WEIGHTS = np.random.default_rng(9).normal(size=(8, 3))


def world(
    kind: Kind, n: int, seed: int, *, move: float = 0.0, hard: float = 0.0
) -> tuple[FeatureTable, np.ndarray]:
    """Make pictures whose answers follow from the embedding; right as often as a sigmoid says.

    `move` adds to the first answer; `hard` pulls all answers towards nothing.
    """
    rng = np.random.default_rng(seed)
    embedding = rng.normal(size=(n, 8))
    outputs = (embedding @ WEIGHTS) * (1 - hard) + [move, 0, 0]
    p = 1 / (1 + np.exp(-outputs))
    truth = rng.random((n, 3)) < p
    answers = p if kind is Kind.MULTI_LABEL else 100 * outputs
    right = ((p >= 0.5) == truth).all(axis=1)
    features = FeatureTable(
        tuple(f"b{seed}/{i}" for i in range(n)),
        embedding.astype(np.float32),
        answers.astype(np.float32),
        pd.DataFrame({"brightness": rng.random(n)}),
        pd.DataFrame({"camera": np.where(np.arange(n) % 2, "a", "b")}),
        kind,
    )
    return features, np.where(right, RIGHT, WRONG)


def reference(kind: Kind, n: int = 600) -> Reference:
    features, labels = world(kind, n, 0)
    return Reference((Regime("first", features, labels.astype(np.int64)),), CLASSES)


@pytest.mark.parametrize("kind", KINDS)
def test_the_level_holds(kind: Kind) -> None:
    """Of 120 quiet batches, the tests on answers ring on no more than chance allows at 5 %."""
    settings = DetectionSettings(0.05, detectors={"scores": 1, "probabilities": 1, "predicted": 1})
    rang = [
        # each with a reference of its own: one for all would make its error common to them
        detect_drift(
            Reference((Regime("r", *world(kind, 200, 2 * seed)),), CLASSES),
            world(kind, 30, 2 * seed + 1)[0],
            settings,
        ).alarm
        for seed in range(120)
    ]
    assert sum(rang) <= 13  # 6 are expected at most; more than 13 have a chance of .3 %


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_that_moves_is_found_and_named(kind: Kind) -> None:
    """Though the embedding stays as it was."""
    batch, _ = world(kind, 100, 5, move=3.0)
    found = detect_drift(reference(kind), batch, DetectionSettings())
    assert found.alarm
    named = {Kind.MULTI_LABEL: "share of predicted class 'cat'", Kind.REGRESSION: "predicted cat +"}
    assert any(words.startswith(named[kind]) for words in found.top_columns)
    assert not any("dog" in words for words in found.top_columns)


def test_each_label_is_tested_by_itself() -> None:
    """Labels that come together instead of apart change no share; one that is gone does."""
    kind = Kind.MULTI_LABEL
    (regime,) = reference(kind).regimes
    batch, _ = world(kind, 100, 5)
    assert PredictedClasses().detect(regime, batch).p_value > 0.05
    answers = batch.probabilities.copy()
    answers[:, 1] *= 0.4
    gone = PredictedClasses().detect(regime, replace(batch, probabilities=answers))
    assert gone.p_value < 1e-4
    assert gone.statistic == pytest.approx(0.5, abs=0.1)


def test_bets_are_made_on_each_label_and_on_no_value() -> None:
    """A label that drops out wins its own bet; a model of values has the bet on novelty alone."""
    kind = Kind.MULTI_LABEL
    batch, _ = world(kind, 200, 5)
    answers = batch.probabilities.copy()
    answers[:, 1] *= 0.4
    won = bets(reference(kind), replace(batch, probabilities=answers))
    assert max(won, key=lambda name: won[name]) == "class 'dog' rarer"
    quiet = bets(reference(kind), batch)
    assert max(quiet.values()) < 1
    values, _ = world(Kind.REGRESSION, 200, 5)
    assert list(bets(reference(Kind.REGRESSION), values)) == ["novelty"]


def test_accuracy_of_several_labels_is_estimated() -> None:
    """By the confidence that all are right: on target where nothing changed, and a fall is seen."""
    kind = Kind.MULTI_LABEL
    known = reference(kind, 2000)
    quiet = [world(kind, 400, seed) for seed in range(1, 6)]
    errors = [estimate_accuracy(known, b).value - (right == RIGHT).mean() for b, right in quiet]
    assert abs(np.mean(errors)) < 0.04
    harder, right = world(kind, 400, 1, hard=0.6)
    found = estimate_accuracy(known, harder)
    assert (right == RIGHT).mean() < known.accuracy - 0.1
    assert found.value < known.accuracy - 0.1
    assert found.believable


def test_accuracy_of_values_is_not_estimated() -> None:
    """The reference's accuracy stands there, with the widest interval, and is not to be believed.

    In a slice, where nothing says so, it is left out.
    """
    known = reference(Kind.REGRESSION)
    batch, _ = world(Kind.REGRESSION, 100, 5)
    found = estimate_accuracy(known, batch)
    assert (found.value, found.low, found.high) == (known.accuracy, 0, 1)
    assert not found.believable
    slices = check_slices(known, batch, ["camera"], DetectionSettings())
    assert all(np.isfinite(row.p_value) and np.isnan(row.estimated) for row in slices)


def test_confidence_and_entropy_of_several_labels() -> None:
    """The product over the labels, and the sum of their entropies; values have neither."""
    answers = np.array([[0.9, 0.5, 0.0], [1, 1, 1]], dtype=np.float32)
    ids, embedding = ("a", "b"), np.zeros((2, 1), np.float32)
    table = FeatureTable(
        ids, embedding, answers, pd.DataFrame(index=range(2)), kind=Kind.MULTI_LABEL
    )
    assert table.confidence.tolist() == pytest.approx([0.45, 1])
    assert table.entropy.tolist() == pytest.approx([0.3251 + 0.6931, 0], abs=1e-4)
    assert table.words(CLASSES) == ["cat|dog", "cat|dog|fox"]
    values = replace(table, kind=Kind.REGRESSION)
    assert (values.confidence == 1).all()
    assert not values.entropy.any()
    assert values.words(CLASSES) == ["0.9|0.5|0", "1|1|1"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_kind_stays_with_a_table(kind: Kind, tmp_path: Path) -> None:
    """On disk, in a part of it, and in a reference; tables of two kinds are not mixed."""
    features, _ = world(kind, 30, 1)
    features.save(tmp_path / "features.parquet")
    assert FeatureTable.load(tmp_path / "features.parquet").kind is kind
    assert concatenate([features.take([1, 2]), features]).kind is kind
    with pytest.raises(ValueError, match="different kinds"):
        concatenate([features, replace(features, kind=Kind.SINGLE_LABEL)])
    known = reference(kind)
    known.save(tmp_path)
    back = Reference.load(tmp_path)
    assert back.kind is kind
    assert back.accuracy == known.accuracy


@pytest.mark.parametrize("kind", KINDS)
def test_a_list_of_wanted_labels_says_what_the_model_says(kind: Kind, tmp_path: Path) -> None:
    """Labels or values; values without a confidence."""
    batch, _ = world(kind, 60, 5, move=3.0)
    asked = choose(reference(kind), [batch], 10, holdout=lambda _: False, labelled=set())
    place = batch.sample_ids.index(asked[0].sample_id)
    assert asked[0].predicted == batch.words(CLASSES)[place]
    listed = pd.read_csv(write_requests(tmp_path, asked, {}))
    assert listed["confidence"].isna().all() == (kind is Kind.REGRESSION)
    assert ("nan" in (tmp_path / "label_requests.html").read_text()) is False


def test_the_summary_shows_sets_of_labels_and_values() -> None:
    """A category of at most 16 sets, or a column of numbers a target."""
    for kind, columns in (
        (Kind.MULTI_LABEL, ["predicted labels"]),
        (Kind.REGRESSION, ["predicted cat", "predicted dog", "predicted fox"]),
    ):
        known = reference(kind)
        shown = summary_columns(known, known.regimes[0], world(kind, 50, 5)[0])
        assert [name for name in shown.now if name.startswith("predicted")] == columns
        assert ("confidence" in shown.now) == (kind is Kind.MULTI_LABEL)
