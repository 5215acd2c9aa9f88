"""Which labels count towards a retraining follows from the checks on record."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pandas as pd
import pytest

from flows.check import POOLED, Past, that_rang
from flows.decisions import (
    POOLED_LABELS,
    Decider,
    attempt,
    before_alarm,
    gather_history,
    rang_and_settled,
    untried,
)
from flows.fresh import FreshSet
from flows.records import CheckKey, CheckRecord, Version
from flows.registry import Registry
from flows.settings import load_settings
from monitoring.policy import Action, Evidence, FreshFrom, History
from monitoring.sequential import StreamEvidence

NOW = datetime(2026, 1, 1, tzinfo=UTC)
POOL = {"sustain.action": POOLED}


def checked(batch: str, digest: str = "d", *, alarm: bool, **accuracy: float) -> CheckRecord:
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


def test_small_batches_ring_with_the_one_that_they_were_tested_with() -> None:
    """Those that waited for it, as they are now; not those that a quiet one was tested with."""
    waited = [replace(checked(name, alarm=False), tags=POOL) for name in "abcd"]
    quiet, rang = checked("q", alarm=False), checked("r", alarm=True)
    checks = [waited[0], quiet, *waited[1:3], rang, waited[3]]
    assert [check.key.batch_id for check in that_rang(checks)] == ["b", "c", "r"]
    assert before_alarm(checks) == {"a", "q"}


def test_a_batch_that_grew_counts_once(tmp_path: Path) -> None:
    """In the stream as it is now, not at all while it is checked; waiting, and by its labels."""
    path = tmp_path / "sustain.toml"
    path.write_text('[model]\nname = "m"\n')
    settings = load_settings(path, environ={})

    def seen(batch: str, digest: str, p_value: float, number: int) -> CheckRecord:
        evidence = StreamEvidence(p_value, {"novelty": 0.1}).to_json()
        tags = {"sustain.stream": evidence, "sustain.number": str(number)}
        return replace(checked(batch, alarm=False, digest=digest), tags=tags)

    a, small = seen("a", "1", 0.5, 1), seen("b", "1", 0.01, 2)
    larger, c = seen("b", "2", 0.02, 3), seen("c", "1", 0.3, 4)
    once = Past(settings, [a, larger, c]).running
    grown = Past(settings, [a, small])
    assert grown.before("b").running == Past(settings, [a]).running
    assert grown.before("c") is grown
    grown.append(larger)
    grown.append(c)
    assert grown.running == once == Past(settings, [a, small, larger, c]).running
    assert grown.before("b").number == grown.number == 5
    waiting = [replace(checked(*key, alarm=False), tags=POOL) for key in ("x1", "y1", "x2")]
    assert Past(settings, waiting).waiting == waiting[1:]
    assert Past(settings, waiting).before("x").waiting == waiting[1:2]
    labels = {"settled": 0.9, "estimate_error": -0.2}
    first = checked("x", alarm=True, **labels, settled_n=40.0)
    second = checked("x", alarm=True, digest="2", **labels, settled_n=50.0)
    pooled = rang_and_settled([first, second])
    assert pooled is not None
    assert pooled.n == 50


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


def decider_of(folder: Path, n: int, now: datetime = NOW) -> Decider:
    """Make one that has so many fresh labels of the 60 that it retrains by."""
    path = folder / "sustain.toml"
    path.write_text('[model]\nname = "m"\n[policy]\nmin_labels = 60\n[gate]\nmin_fresh = 1\n')
    ids = [f"a/{number}.png" for number in range(n)]
    table = pd.DataFrame({"sample_id": ids, "label": [str(number % 2) for number in range(n)]})
    return Decider(load_settings(path, environ={}), FreshSet(table), History(), now)


def decided(batch: str, action: Action, *, alarm: bool, fell: bool, **tags: str) -> CheckRecord:
    """Put on record a check with its decision."""
    accuracy = {"estimated": 0.7 if fell else 0.9, "reference": 0.9, "novelty": 0.0}
    record = checked(batch, alarm=alarm, believable=1.0, **accuracy)
    metrics = {**record.metrics, "drift.alpha": 0.01}
    return replace(record, metrics=metrics, tags={"sustain.action": action.value, **tags})


def test_which_check_stands(tmp_path: Path) -> None:
    """The newest that calls for a retraining, else the newest whose decision is another now."""
    few, many = decider_of(tmp_path, 10), decider_of(tmp_path, 120)
    told = {"sustain.fresh": few.name}
    ask, watch, none = Action.ASK_FOR_LABELS, Action.WATCH, Action.NONE
    fell = decided("a", ask, alarm=True, fell=True, **told)
    held = decided("b", watch, alarm=True, fell=False, **told)
    quiet = decided("c", none, alarm=False, fell=False, **told)
    assert [few.on_record(one).action for one in (fell, held, quiet)] == [ask, watch, none]
    assert few.standing([]) is None
    assert few.standing([fell, held, quiet]) is None  # it stands as it was told
    stale = replace(fell, tags={**fell.tags, "sustain.fresh": "of other labels"})
    assert few.standing([stale, held, quiet]) is stale
    other = replace(fell, tags={**fell.tags, "sustain.action": watch.value})
    assert few.standing([other, held, quiet]) is other
    assert many.standing([fell, held, quiet]) is fell
    assert many.on_record(fell).action is Action.RETRAIN
    # what was asked for at a quiet check, and is not any more, is told; what was watched is not
    assert few.standing([replace(quiet, tags={"sustain.action": ask.value})]) is not None
    assert few.standing([replace(quiet, tags={"sustain.action": watch.value})]) is None


def test_labels_are_asked_for_once(tmp_path: Path) -> None:
    """By the newest alarm that asks, and not again once the list for these labels is written."""
    decider = decider_of(tmp_path, 10)
    first, second = (
        decided(name, Action.ASK_FOR_LABELS, alarm=True, fell=True, **{"sustain.requested": by})
        for name, by in (("a", decider.name), ("b", ""))
    )
    quiet = replace(second, metrics={**second.metrics, "drift.alarm": 0.0})
    assert decider.asking([first, second, quiet]) is second
    assert decider.asking([second, first]) is None
    assert decider.asking([quiet]) is None


def test_labels_that_a_retraining_refused_are_asked_for_anew(tmp_path: Path) -> None:
    """They call for no retraining again; what calls for none stays as it is."""
    decider = decider_of(tmp_path, 120)
    refused = replace(decider, refused=frozenset({attempt(decider.fresh, decider.settings)}))
    fell = decided("a", Action.WATCH, alarm=True, fell=True)
    assert decider.on_record(fell).action is Action.RETRAIN
    assert refused.on_record(fell).action is Action.ASK_FOR_LABELS
    held = decided("b", Action.WATCH, alarm=True, fell=False)
    assert refused.on_record(held) == decider.on_record(held)


def test_what_was_rolled_back_is_not_made_again_from_further_back(tmp_path: Path) -> None:
    """1 made 2, 2 made 3, and the alias went from 3 to 1: the labels of both have been tried."""
    path = tmp_path / "sustain.toml"
    path.write_text('[model]\nname = "m"\n')
    back = {"digest": "x", "verdict": "promote", "rolled_back_at": NOW.isoformat()}
    one = Version(1, "r1", {"digest": "x", "verdict": "first"}, NOW)
    two = Version(2, "r2", {"parent": "1", "digest": "x", "verdict": "promote"}, NOW)
    three = Version(3, "r3", {"parent": "2", **back}, NOW)
    ids = [f"a/{number}.png" for number in range(800)]
    table = pd.DataFrame({"sample_id": ids, "label": "x"})
    learned = {2: table[:400], 3: table}
    settings = load_settings(path, environ={})
    record = SimpleNamespace(
        settings=settings,
        learned=lambda version: learned[version.number],
        alias=lambda _: None,
        training_seconds=lambda _: None,
    )

    def remade(fresh: pd.DataFrame, *versions: Version) -> str | None:
        made = [one, *versions]
        given = (cast("Registry", record), settings, one, made, FreshSet(fresh), [], [])
        return gather_history(*given).remade

    assert remade(table, two, three) == "version 3, which was rolled back (0 labels are new since)"
    more = pd.DataFrame({"sample_id": [f"b/{n}" for n in range(400)], "label": "x"})
    assert remade(pd.concat([table, more]), two, three) is None
    assert remade(table, two) is None  # nobody has rolled it back
    settings = replace(settings, gate=replace(settings.gate, approval="manual"))
    waits = "version 2, which waits for approval (0 labels are new since)"
    assert remade(table[:400], two) == waits


def test_older_versions_are_read_only_while_enough_labels_are_untried() -> None:
    """A label counts as it was tried last; few that are left end the reading."""

    def table(**labels: str) -> pd.DataFrame:
        return pd.DataFrame({"sample_id": list(labels), "label": list(labels.values())})

    fresh = FreshSet(table(a="0", b="1", c="2", d="3"))
    newest, older, oldest = table(a="0", b="9", x="1"), table(b="1", c="2"), table(d="3")
    unread = iter([newest, older, oldest])
    assert untried(fresh, unread, 3) == 2, "b was tried as 9 last, and d not yet"
    assert [*unread] == [oldest]
    assert untried(fresh, [newest, older, oldest], 1) == 1
    assert untried(fresh, [], 1) == 4
