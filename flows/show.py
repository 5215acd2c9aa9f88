"""What a terminal shows of a model: its versions, its checks, and what a watch did."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from rich.console import Console

from flows.check import Checked, estimate_track
from flows.records import CheckRecord, Version
from flows.registry import Registry
from flows.screen import print_line, print_table
from flows.story import new_labels
from flows.watch import Plan, Watched
from monitoring.policy import describe


def show_versions(console: Console, registry: Registry) -> None:
    """Lay the versions out, oldest first; below, why each was made and what it cost."""
    champion, versions = registry.alias("champion"), registry.versions()
    print_table(
        console,
        f"versions of {registry.name}",
        ("version", "parent", "verdict", "champion since", "rolled back"),
        [
            (
                f"{version.number}{' ← champion' if version.number == champion else ''}",
                str(version.parent or ""),
                version.verdict or "not judged",
                _moment(version.tags.get("promoted_at", "")),
                _moment(version.tags.get("rolled_back_at", "")) if version.rolled_back else "",
            )
            for version in versions
        ],
        whole=("version", "champion since", "rolled back"),
    )
    for version in versions:
        told = [version.tags.get("cause", ""), _cost(registry, version)]
        if version.rolled_back:
            told.append(f"rolled back: {version.tags.get('reason', '')}")
        if words := "; ".join(filter(None, told)):
            print_line(console, f"version {version.number}: {words}")


def show_status(console: Console, registry: Registry, plan: Plan) -> None:
    """Print what is on record, and what waits to be done."""
    show_versions(console, registry)
    # one that could not be checked, and has gone from the feed since, is nobody's concern any more
    here = {batch.id for batch in plan.batches}
    checks = registry.newest_checks(plan.champion.number)
    show_checks(
        console, plan.champion.number, [c for c in checks if c.finished or c.key.batch_id in here]
    )
    console.print(
        f"{len(plan.batches)} batches in the feed, {len(plan.pending)} to check;"
        f" {len(plan.fresh)} fresh labels"
    )
    console.print(describe(registry.settings.policy), markup=False)
    if words := _saved(registry):
        console.print(words, markup=False, soft_wrap=True)
    if words := estimate_track(plan.finished).words:
        console.print(words, markup=False)
    for problem in plan.labels.problems:
        console.print(f"not used: {problem}", markup=False)


def show_checks(console: Console, champion: int, checks: Sequence[CheckRecord]) -> None:
    """Lay out the newest checks; below, why a batch was not measured."""
    if not checks:
        console.print(f"version {champion} has no check yet: `sustain watch` makes them")
        return
    shown = checks[-10:]
    print_table(
        console,
        f"newest checks against version {champion}",
        ("batch", "p", "evidence", "accuracy, estimated", "true (labels)", "decision"),
        [
            (
                check.key.batch_id,
                _figure(check.metrics.get("drift.p_value"), ".2g") or "not tested",
                _evidence(check.metrics),
                _figure(check.metrics.get("accuracy.estimated"), ".3f"),
                "{:.3f} ({})".format(*check.settled) if check.settled else "",
                check.action,
            )
            for check in shown
        ],
        whole=("batch", "p"),
    )
    for check in shown:
        if "drift.p_value" not in check.metrics and check.reason:
            print_line(console, f"{check.key.batch_id}: {check.reason}")


def show_watched(console: Console, watched: Watched) -> None:
    """Print what a watch run did."""
    if watched.move is not None:
        move = watched.move
        console.print(
            f"champion moved from version {move.before} to {move.after} by {move.by}: {move.why}",
            markup=False,
        )
    said = [checked for checked in watched.checked if checked.action != "none"]
    if watched.checked:
        print_table(
            console,
            f"checks against version {watched.champion}",
            ("batch", "samples", "p-value", "accuracy, estimated", "regime", "decision"),
            [_row(checked) for checked in watched.checked],
            whole=("batch",),
        )
        for checked in said:
            console.print(f"{checked.batch_id}: {checked.reason}", markup=False)
    for batch, accuracy in watched.settled.items():
        console.print(f"{batch}: true accuracy {accuracy:.3f} on its labels", markup=False)
    for problem in watched.problems:
        console.print(f"not used: {problem}", markup=False)
    decision, about = watched.decision, f" ({watched.batch})" if watched.batch else ""
    # what was said of the batch need not be said twice
    why = "" if decision.reason in [one.reason for one in said] else f": {decision.reason}"
    console.print(f"decision: {decision.action}{about}{why}", markup=False)
    if watched.done:
        console.print(watched.done, markup=False)


def idle(plan: Plan) -> str:
    """Say that there is nothing to do, and of how many batches."""
    batches = f"{len(plan.batches)} batches are checked" if plan.batches else "the feed is empty"
    if plan.failed:
        batches += f" ({plan.failed} of them failed: see `sustain status`)"
    return (
        f"nothing to do: {batches} against version {plan.champion.number}, and no labels came"
        f" ({len(plan.fresh)} are fresh)"
    )


def _row(checked: Checked) -> list[str]:
    return [
        checked.batch_id,
        f"{checked.samples}" + (f" ({checked.quarantined} bad)" if checked.quarantined else ""),
        _figure(checked.p_value, ".2g"),
        _figure(checked.estimated, ".3f"),
        checked.regime,
        checked.action,
    ]


def _saved(registry: Registry) -> str:
    """Say what was not spent because a change was not answered by a retraining."""
    checks = registry.checks(None, "tags.`sustain.suppressed` != ''")
    if not checks:
        return ""
    last = max(checks, key=lambda check: check.ended)
    return (
        f"{len(checks)} changes were not answered by a retraining; the last one"
        f" ({last.key.batch_id}): {last.tags['sustain.suppressed']}, so"
        f" {last.tags['sustain.saved']}"
    )


def _evidence(metrics: Mapping[str, float]) -> str:
    """Write the evidence of the stream, of what it takes to ring."""
    if "drift.stream" not in metrics:
        return ""
    return f"{metrics['drift.stream']:.1f} of {metrics['drift.stream_threshold']:.1f}"


def _cost(registry: Registry, version: Version) -> str:
    """Say what a version cost, for each point of accuracy that it regained."""
    spent, points = registry.cost(version), float(version.tags.get("gain", "0")) * 100
    if spent is None or version.parent is None:
        return ""
    try:
        labels = len(new_labels(registry, version)[0])
    except RuntimeError:  # its files are gone
        return spent.words
    each = f", {labels / points:.1f} a point regained" if points > 0 else ""
    return f"{spent.words}, {labels} labels{each}"


def _moment(time: str) -> str:
    """Shorten an ISO time (UTC) to the minute."""
    return time[:16].replace("T", " ")


def _figure(value: float | None, form: str) -> str:
    return "" if value is None or math.isnan(value) else format(value, form)
