"""What the record says should be done: gathers what `monitoring.policy` decides on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from functools import cached_property

import pandas as pd

from flows.check import evidence_on_record, is_tested, suppressed_tags, that_rang
from flows.digest import digest
from flows.feed import Batch
from flows.fresh import FreshSet, labels_needed, last_labels
from flows.records import CheckRecord, Version, of_batches_now, time_in
from flows.registry import Registry
from flows.settings import Settings
from flows.shadow import shadow_of
from monitoring.accuracy import Pooled, pool
from monitoring.policy import (
    Action,
    Decision,
    Evidence,
    FreshFrom,
    FreshLabels,
    History,
    decide,
)
from sft.gate import Outcome

UNTRAINABLE = "sustain.untrainable"
"""Tag of a check: the attempt that a retraining refused, after it had read its pictures."""
POOLED_LABELS = 300
"""They tell accuracy to some 5 points; what older batches were like says less of the newest."""


@dataclass(frozen=True)
class Decider:
    """Decides on evidence, with all that is the same for every check of a run.

    `quiet` are the batches before the alarm, whose labels count or not as `fresh_from` says;
    `pooled` is what labels told of those that rang; `refused` are the attempts that a retraining
    refused.
    """

    settings: Settings
    fresh: FreshSet
    history: History
    now: datetime
    quiet: frozenset[str] = frozenset()
    pooled: Pooled | None = None
    refused: frozenset[str] = frozenset()

    @cached_property
    def name(self) -> str:
        """Names the fresh labels: with others, decisions are made again."""
        return name_of(self.fresh)

    def counted(self, *, alarm: bool) -> FreshSet:
        """Return the labels that count towards a retraining, which an alarm calls for or not."""
        only_new = alarm and self.settings.policy.fresh_from is FreshFrom.ALARM
        return self._of_alarm if only_new else self.fresh

    @cached_property
    def _would_be_refused(self) -> bool:
        return bool(self.refused) and attempt(self.fresh, self.settings) in self.refused

    @cached_property
    def _of_alarm(self) -> FreshSet:
        return self.fresh.outside(self.quiet) if self.quiet else self.fresh

    def decide(self, evidence: Evidence) -> Decision:
        """Turn what a check measured into one action."""
        counted = self.counted(alarm=evidence.alarm)
        of = "" if counted is self.fresh else ", of batches from the alarm on"
        known = replace(evidence, pooled=self.pooled)
        fall = known.reference - known.peers.accuracy if known.peers is not None else 0.0
        needed = labels_needed(self.fresh, self.settings, counted, fall)
        policy = replace(self.settings.policy, min_labels=needed)
        labels = FreshLabels(len(counted), counted.classes, of)
        decision = decide(known, labels, self.history, self.now, policy)
        if decision.action is Action.RETRAIN and self._would_be_refused:
            why = f"{decision.reason} But a retraining has refused these labels: others are needed."
            return Decision(Action.ASK_FOR_LABELS, why)
        return decision

    def on_record(self, record: CheckRecord) -> Decision:
        """Decide again on what a check put on record."""
        return self.decide(evidence_on_record(record, self.settings))

    def standing(self, finished: Sequence[CheckRecord]) -> CheckRecord | None:
        """Return the newest check that calls for a retraining, else the newest to decide anew.

        Those are the alarms, and the newest check of all, which a schedule or labels may make act.
        Of those that ask for labels only the newest is told anew when labels come.
        """
        tested = [record for record in finished if is_tested(record)]
        if not tested:
            return None
        newest = tested[-1]
        if not newest.alarm:
            decision = self.on_record(newest)
            changed = decision.action.value != newest.action
            if decision.action is Action.RETRAIN or (changed and not _quiet(newest, decision)):
                return newest
        alarms = [record for record in reversed(tested) if record.alarm]
        decided = [(record, self.on_record(record)) for record in alarms]
        for record, decision in decided:
            if decision.action is Action.RETRAIN:
                return record
        for record, decision in decided:
            if decision.action is not Action.WATCH or record.action != Action.WATCH.value:
                stale = record.tags.get("sustain.fresh") != self.name
                return record if stale or decision.action.value != record.action else None
        return None

    def asking(self, finished: Sequence[CheckRecord]) -> CheckRecord | None:
        """Return the newest check that asks for labels, if its list is not written yet."""
        asking = [r for r in finished if r.alarm and r.action == Action.ASK_FOR_LABELS.value]
        if not asking or asking[-1].tags.get("sustain.requested") == self.name:
            return None
        return asking[-1]


def name_of(fresh: FreshSet) -> str:
    """Name fresh labels, as checks have it that were decided by them."""
    return fresh.digest[:16]


def attempt(fresh: FreshSet, settings: Settings) -> str:
    """Name what a retraining would try: these labels, by the settings that may refuse them."""
    parts = (settings.noise, settings.policy, settings.gate, settings.feed)
    return digest([fresh.digest, [asdict(part) for part in parts]])[:16]


def refused_attempts(checks: Iterable[CheckRecord]) -> frozenset[str]:
    """Name the attempts that retrainings refused which these checks had called for."""
    return frozenset(c.tags[UNTRAINABLE] for c in checks if UNTRAINABLE in c.tags)


def record_decision(
    registry: Registry, run_id: str, decision: Decision, fresh: FreshSet, **tags: str
) -> None:
    """Put on a check's record what was decided, by which labels."""
    registry.log(
        run_id,
        tags={
            "sustain.action": decision.action.value,
            "sustain.reason": decision.reason,
            **suppressed_tags(decision),
            "sustain.fresh": name_of(fresh),
            "mlflow.note.content": decision.reason,
            **tags,
        },
    )


def record_refusal(
    registry: Registry, check: str, fresh: FreshSet, words: str, files: Mapping[str, str]
) -> None:
    """Have the check that called for a retraining ask for labels: these would be refused again.

    Args:
        registry: the record.
        check: its run.
        fresh: the labels that were refused.
        words: why.
        files: that show the suspicious ones, name to text.
    """
    for name, text in files.items():
        registry.log_text(check, text, name)
    why = f"{registry.check_record(check).reason} Nothing was trained: {words}"
    tag = {UNTRAINABLE: attempt(fresh, registry.settings)}
    record_decision(registry, check, Decision(Action.ASK_FOR_LABELS, why), fresh, **tag)


def before_alarm(checks: Sequence[CheckRecord]) -> frozenset[str]:
    """Name the batches that were checked before the first alarm; all of them if none rang."""
    rang = that_rang(checks)
    first = checks.index(rang[0]) if rang else len(checks)
    since = {check.key.batch_id for check in checks[first:]}
    return frozenset(check.key.batch_id for check in checks[:first]) - since


def rang_and_settled(checks: Sequence[CheckRecord]) -> Pooled | None:
    """Sum up what labels told of the newest batches that rang; None if they told nothing."""
    found: list[tuple[float, float, int]] = []
    for check in reversed(of_batches_now(checks)):
        error = check.metrics.get("accuracy.estimate_error", math.nan)
        if check.alarm and check.settled and math.isfinite(error):
            accuracy, n = check.settled
            found.append((accuracy, error, n))
        if sum(labels for _, _, labels in found) >= POOLED_LABELS:
            break
    return pool(found)


def gather_history(
    registry: Registry,
    settings: Settings,
    champion: Version,
    versions: Sequence[Version],
    fresh: FreshSet,
    batches: Sequence[Batch],
    finished: Sequence[CheckRecord],
) -> History:
    """Read what happened before, as the policy wants it.

    A batch counts as new when it arrived since the last training: a new champion checks old ones
    again.
    """
    made = [v for v in versions if not v.adapted]  # from labels
    children = [v for v in made if v.parent == champion.number]
    below = {champion.number}  # it, and what descends from it
    for version in made:
        below |= {version.number} if version.parent in below else set()
    undone = [v for v in made if v.number in below and v.parent in below and v.rolled_back]
    trained = [v for v in made if v.parent is not None]
    last = max((v.created for v in children), default=None)
    arrived = {batch.id: batch.arrived for batch in batches}
    since = max(v.created for v in (champion, *children))
    new = [
        record
        for record in of_batches_now(finished)
        if (when := arrived.get(record.key.batch_id)) is not None and when > since
    ]
    return History(
        last_promotion=_latest(champion.tags.get("promoted_at")),
        last_rollback=_latest(*(v.tags.get("rolled_back_at") for v in versions)),
        last_training=last,
        remade=_remade(registry, settings, children, undone, fresh),
        trainings=tuple(v.created for v in trained),
        last_training_seconds=registry.training_seconds(trained[-1]) if trained else None,
        batches_since_training=len(new),
        samples_since_training=int(sum(record.metrics["batch.samples"] for record in new)),
    )


def untried(fresh: FreshSet, tried: Iterable[pd.DataFrame], enough: int) -> int:
    """Count the fresh labels that no version learned from, as far as that matters.

    Args:
        fresh: the labels.
        tried: what each version learned from (`sample_id`, `label`), the newest first; a label that
            was corrected counts as it was tried last.
        enough: no older version is asked for once fewer are left.
    """
    left = dict(zip(fresh.table["sample_id"], fresh.table["label"], strict=True))
    corrected = 0
    for table in tried:
        last = last_labels(table)
        corrected += sum(last.get(name, label) != label for name, label in left.items())
        left = {name: label for name, label in left.items() if name not in last}
        if corrected + len(left) < enough:
            break
    return corrected + len(left)


def _quiet(record: CheckRecord, decision: Decision) -> bool:
    """Whether nothing is asked for, neither then nor now."""
    quiet = {Action.NONE.value, Action.WATCH.value}
    return {record.action, decision.action.value} <= quiet


def _remade(
    registry: Registry,
    settings: Settings,
    children: Sequence[Version],
    undone: Sequence[Version],
    fresh: FreshSet,
) -> str | None:
    """Say what became of the version that these labels made already, but for a few new ones.

    A version that was refused or rolled back is not made again for one more label: it takes
    `min_labels` new ones. None when there was no such version, or enough is new.

    Args:
        registry: the record.
        settings: of the model.
        children: of the champion, made from labels.
        undone: what was rolled back of all that descends from the champion.
        fresh: the labels.
    """
    version = shadow_of(registry)
    shadow = version.number if version is not None else None
    failed = [v for v in children if v.verdict is not None or v.number == shadow]
    by_itself = settings.gate.approval == "auto"  # else what the gate let through waits
    failed = [v for v in failed if v.verdict != Outcome.PROMOTE.value or not by_itself]
    failed = sorted({v.number: v for v in (*failed, *undone)}.values(), key=lambda v: v.number)
    if not failed:
        return None
    tried = (registry.learned(version) for version in reversed(failed))
    new = untried(fresh, tried, settings.policy.min_labels)
    if new >= settings.policy.min_labels:
        return None
    last = failed[-1]
    if last.number == shadow:
        return f"version {last.number}, which answers beside the champion before it is judged"
    became = "was rolled back" if last.rolled_back else f"got the verdict {last.verdict!r}"
    if last.verdict == Outcome.PROMOTE.value and not last.rolled_back:
        became = "waits for approval"
    return f"version {last.number}, which {became} ({new} labels are new since)"


def _latest(*times: str | None) -> datetime | None:
    known = [time_in(time, "promoted_at or rolled_back_at of a version") for time in times if time]
    return max(known) if known else None
