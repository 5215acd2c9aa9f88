"""Which labels count towards a retraining follows from the checks on record."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
import pytest

from flows.decisions import POOLED_LABELS, Decider, before_alarm, rang_and_settled
from flows.fresh import FreshSet
from flows.registry import CheckKey, CheckRecord
from flows.settings import load_settings
from monitoring.policy import Evidence, FreshFrom, History

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def checked(batch: str, *, alarm: bool, digest: str = "d", **accuracy: float) -> CheckRecord:
    metrics = {"drift.p_value": 0.1, "drift.alarm": float(alarm)}
    metrics |= {f"accuracy.{name}": value for name, value in accuracy.items()}
    return CheckRecord("r", CheckKey(1, batch, digest), True, "s", {}, metrics, NOW, NOW)


def test_what_was_checked_before_the_first_alarm_is_quiet() -> None:
    """Quiet batches after it are not; a batch that was checked twice and rang then is not."""
    quiet, grew, rang = (checked(name, alarm=name == "c") for name in "abc")
    later = (checked("d", alarm=False), checked("b", alarm=True, digest="e"))
    assert before_alarm([quiet, grew, rang, *later]) == {"a"}
    assert before_alarm([quiet, grew]) == {"a", "b"}
    assert before_alarm([]) == frozenset()


def test_labels_of_the_newest_batches_that_rang_are_pooled() -> None:
    """Not those of quiet ones, not withdrawn ones, none without an estimate, not too many."""
    right = {"settled": 0.9, "estimate_error": -0.2, "settled_n": POOLED_LABELS / 3}
    wrong = {"settled": 0.1, "estimate_error": 0.5, "settled_n": POOLED_LABELS}
    kept = [checked(name, alarm=True, **right) for name in "xyz"]
    left = [
        checked("quiet", alarm=False, **wrong),
        checked("withdrawn", alarm=True, **{**wrong, "settled_n": 0.0}),
        checked("regression", alarm=True, **{**wrong, "estimate_error": float("nan")}),
        checked("unlabelled", alarm=True),
    ]
    found = rang_and_settled([checked("old", alarm=True, **wrong), *kept, *left])
    assert found is not None
    assert (found.n, found.accuracy) == (POOLED_LABELS, pytest.approx(0.9))
    assert found.estimated == pytest.approx(0.7)
    assert rang_and_settled(left) is None


@pytest.mark.parametrize(
    ("fresh_from", "alarm", "words"),
    [
        ("all", True, "There are 120 fresh labels"),
        ("alarm", False, "There are 120 fresh labels"),
        ("alarm", True, "40 labels are missing: 20 of 60 are here, of batches from the alarm on"),
    ],
)
def test_an_alarm_may_call_for_labels_of_its_own(
    tmp_path: Path, fresh_from: str, words: str, *, alarm: bool
) -> None:
    """100 labels of a quiet batch and 20 of one that rang: the setting says which ones count."""
    path = tmp_path / "sustain.toml"
    path.write_text(
        '[model]\nname = "m"\n[policy]\nretrain_when = "always"\nmin_labels = 60\n'
        "[gate]\nmin_fresh = 1\n"
    )
    settings = load_settings(path, environ={})
    policy = replace(settings.policy, fresh_from=FreshFrom(fresh_from))
    ids = [f"{'a' if i < 100 else 'b'}/{i}.png" for i in range(120)]
    labels = [str(i % 2) for i in range(120)]
    fresh = FreshSet(pd.DataFrame({"sample_id": ids, "label": labels}))
    quiet = before_alarm([checked("a", alarm=False), checked("b", alarm=True)])
    decider = Decider(replace(settings, policy=policy), fresh, History(), NOW, quiet)
    evidence = Evidence("b", alarm, p_value=0.1, alpha=0.01, estimated=0.7, reference=0.9)
    assert words in decider.decide(evidence).reason
