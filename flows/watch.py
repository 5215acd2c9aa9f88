"""`sustain watch`: check every batch that has no finished check against the champion, and decide.

Gather (`make_plan`), measure (`check`), decide (`monitoring.policy`), act. A run that finds nothing
to do says so and leaves. Killed anywhere, the next run goes on: a check counts once its MLflow run
is finished, and a decision to retrain stands until a version with its key is judged.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import cast
from uuid import NAMESPACE_OID, uuid5

import pandas as pd
from prefect import flow, get_client
from prefect.client.schemas.objects import FlowRun
from prefect.deployments import run_deployment
from prefect.events import emit_event
from prefect.exceptions import ObjectNotFound
from rich.progress import Progress

from flows.ask import write_list
from flows.check import (
    FAILED,
    POOLED,
    Checked,
    Past,
    check,
    evidence_on_record,
    labels_digest,
    load_champion,
    settle_check,
)
from flows.feed import Batch, list_batches
from flows.fresh import (
    FreshSet,
    Labels,
    fresh_set,
    gather_labels,
    labels_needed,
    retrain_key,
)
from flows.probation import answer_with_before, compare, version_before
from flows.registry import CheckRecord, Move, Registry, RegistryError, Version
from flows.retrain import RetrainError, retrain
from flows.rollback import rollback
from flows.settings import Settings, load_settings, refuse_contradiction
from flows.storage import FeedError
from monitoring.policy import (
    Action,
    Decision,
    Evidence,
    FreshLabels,
    History,
    decide,
    decide_rollback,
    on_probation,
)
from sft.gate import Outcome


@dataclass(frozen=True)
class Plan:
    """What a watch run has to do.

    Attributes:
        champion: the version that serves.
        moved: the alias moved since anybody looked.
        batches: all that the feed holds.
        pending: those without a finished check against the champion, oldest first.
        unsettled: checks whose batch has other labels than when they were last settled.
        finished: the checks against the champion, oldest first.
        asking: the newest check that asks for labels, if its list is not written yet.
        standing: the newest check that found damage, if it stands to be decided again.
        labels, fresh: all labels, and those that the champion has not learned from.
        history: what happened before, as the policy wants it.
    """

    champion: Version
    moved: bool
    batches: tuple[Batch, ...]
    pending: tuple[Batch, ...]
    unsettled: tuple[CheckRecord, ...]
    finished: tuple[CheckRecord, ...]
    asking: CheckRecord | None
    standing: CheckRecord | None
    labels: Labels
    fresh: FreshSet
    history: History

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        to_do = (self.moved, self.pending, self.unsettled, self.standing, self.asking)
        return not any(to_do)


@dataclass(frozen=True)
class Watched:
    """What a watch run did.

    Attributes:
        champion: the version that the checks were made against.
        move: a change of champion that this run was the first to see.
        checked: one entry a batch.
        settled: batch to true accuracy on the labels that came.
        decision: the last decision.
        done: what came of it, in words: a retraining, a rollback, or a list of labels wanted.
        problems: labels that could not be used, and batches that the storage did not give.
    """

    champion: int
    move: Move | None
    checked: tuple[Checked, ...]
    settled: Mapping[str, float]
    decision: Decision
    done: str
    problems: tuple[str, ...]


def make_plan(registry: Registry, settings: Settings, now: datetime) -> Plan:
    """Find out what there is to do, without a forward pass and without Prefect."""
    champion = registry.champion()
    config = registry.config(champion)
    refuse_contradiction(settings, config)
    batches = list_batches(settings.feed, settings.root)
    checks = registry.checks(champion.number)
    done = {(c.key.batch_id, c.key.digest) for c in checks if c.finished}
    failed = {(c.key.batch_id, c.stamp) for c in checks if not c.finished}
    labels = gather_labels(settings, batches, config.classes)
    fresh = fresh_set(labels, registry.learned(champion))
    here = {(batch.id, batch.digest) for batch in batches}
    finished = [c for c in checks if c.finished and c.metrics.get("batch.samples", 0) > 0]
    present = [c for c in finished if (c.key.batch_id, c.key.digest) in here]
    history = _history(registry, settings, champion, fresh, finished)
    return Plan(
        champion=champion,
        moved=registry.unobserved_move(),
        batches=tuple(batches),
        pending=tuple(
            b for b in batches if (b.id, b.digest) not in done and (b.id, b.stamp) not in failed
        ),
        unsettled=tuple(
            c
            for c in present
            if labels_digest(labels.of_batch(c.key.batch_id)) != c.tags.get("sustain.settled", "")
        ),
        finished=tuple(finished),
        asking=_asking(present, fresh),
        standing=_standing(settings, present, fresh, history, now),
        labels=labels,
        fresh=fresh,
        history=history,
    )


@flow(name="watch")
def watch(settings_path: str) -> Watched:
    """Check what is new, settle what has labels, decide, and start a retraining if it is due."""
    settings = load_settings(Path(settings_path))
    registry = Registry(settings)
    now = datetime.now(UTC)
    move = registry.observe_moves(now)
    plan = make_plan(registry, settings, now)
    champion = plan.champion
    checked, unread = check_all(registry, settings, plan, now) if plan.pending else ((), ())

    if checked:  # labels that came with their batch, and new damage, count from here on
        plan = make_plan(registry, settings, now)
    settled = settle_all(registry, settings, plan, now)
    if settled:  # the truth may call for another decision
        plan = make_plan(registry, settings, now)
    decision, done = _act(registry, settings, plan, _last_decision(checked), now)
    if decision.action is Action.ASK_FOR_LABELS:
        plan = make_plan(registry, settings, now)
        if plan.asking is not None:
            done = list_wanted_labels(registry, settings, plan, plan.asking)
    return Watched(
        champion=champion.number,
        move=move,
        checked=checked,
        settled=settled,
        decision=decision,
        done=done,
        problems=(*unread, *plan.labels.problems),
    )


def _act(
    registry: Registry, settings: Settings, plan: Plan, decision: Decision, now: datetime
) -> tuple[Decision, str]:
    """Roll back or retrain if it is due; return the decision in force and what was done."""
    if (given_up := _end_probation(registry, settings, plan, now)) is not None:
        return given_up
    standing = plan.standing
    if standing is None:
        return (decision if plan.asking is None else _on_record(plan.asking)), ""
    evidence = evidence_on_record(standing, settings)
    decision = _decide(settings, evidence, plan.fresh, plan.history, now)
    _record_decision(registry, standing.run_id, decision, plan.fresh)
    if decision.action is not Action.RETRAIN:
        return decision, ""
    try:
        return decision, start_retraining(settings, plan.champion, plan.fresh, standing, decision)
    except RetrainError as error:
        return decision, f"nothing was retrained: {error}"


def list_wanted_labels(
    registry: Registry, settings: Settings, plan: Plan, asking: CheckRecord
) -> str:
    """Put the list of samples that are worth labelling beside the check that asks for them."""
    with tempfile.TemporaryDirectory(prefix="sustain-") as name:
        folder = Path(name)
        wanted = write_list(
            registry,
            settings,
            plan.champion,
            plan.batches,
            plan.finished,
            plan.labels,
            plan.fresh,
            folder,
        )
        for path in sorted(folder.iterdir()):
            registry.log_file(asking.run_id, path)
    registry.log(asking.run_id, tags={"sustain.requested": plan.fresh.digest[:16]})
    if not wanted:
        return ""
    return (
        f"{len(wanted)} samples are worth labelling: label_requests.csv beside the check of"
        f" {asking.key.batch_id} in MLflow, or `sustain ask`"
    )


def check_all(
    registry: Registry, settings: Settings, plan: Plan, now: datetime
) -> tuple[tuple[Checked, ...], tuple[str, ...]]:
    """Check every pending batch, oldest first, with the champion loaded once.

    Returns:
        What was checked, and what the storage did not give: that is tried again by the next run,
        and does not keep the other batches waiting.
    """
    against = load_champion(registry, plan.champion)
    past = Past(settings, list(plan.finished))
    checked, unread = [], []

    def decided(evidence: Evidence) -> Decision:
        return _decide(settings, evidence, plan.fresh, plan.history, now)

    with Progress(transient=True) as progress:
        for batch in progress.track(plan.pending, description="checking"):
            one = check.with_options(task_run_name=f"check {batch.id}")
            try:
                done = one(
                    registry, settings, against, batch, past, decided, plan.fresh.digest[:16]
                )
            except FeedError as error:
                unread.append(f"batch {batch.id} was not checked: {error}")
                continue
            checked.append(done)
            if done.samples:
                past.append(registry.check_record(done.run_id))
    return tuple(checked), tuple(unread)


def settle_all(
    registry: Registry, settings: Settings, plan: Plan, now: datetime
) -> dict[str, float]:
    """Hold what labels tell against the estimates, and in probation against the version before.

    Returns:
        True accuracy by batch, for those that have labels now.
    """
    settled = {}
    before = None
    if plan.unsettled and on_probation(plan.history, now, settings.policy):
        before = version_before(registry, plan.champion)
    by_id = {batch.id: batch for batch in plan.batches}
    for record in plan.unsettled:
        if before is not None:  # first: a check counts as settled by what follows
            batch = by_id[record.key.batch_id]
            answer_with_before(
                registry, settings, plan.champion, before, batch, record, plan.labels
            )
        accuracy = settle_check(registry, record, plan.labels)
        if accuracy is not None:
            settled[record.key.batch_id] = accuracy
    return settled


def _end_probation(
    registry: Registry, settings: Settings, plan: Plan, now: datetime
) -> tuple[Decision, str] | None:
    """Roll back if labels show that the version before is better; return why, and what was done."""
    if not on_probation(plan.history, now, settings.policy):
        return None
    before = version_before(registry, plan.champion)
    compared = None if before is None else compare(before, plan.finished)
    if before is None or compared is None:
        return None
    decision = decide_rollback(compared, plan.history, now, settings.policy)
    if decision is None:
        return None
    return decision, rollback(str(settings.path), to=before.number, why=decision.reason).words


def start_retraining(
    settings: Settings,
    champion: Version,
    fresh: FreshSet,
    cause: CheckRecord,
    decision: Decision,
) -> str:
    """Tell the world of the drift and start the retrain flow; say what came of it.

    A deployment `retrain/<model>` is started with an idempotency key, so that the same labels start
    it once; without one the flow runs here and now.
    """
    name = settings.model.name
    key = retrain_key(champion.number, fresh, settings)
    emit_event(
        event="drift.detected",
        resource={"prefect.resource.id": f"drift.model.{name}", "prefect.resource.name": name},
        payload={
            "window": cause.key.batch_id,
            "champion": champion.number,
            "check": cause.run_id,
            "reason": decision.reason,
        },
        id=uuid5(NAMESPACE_OID, key),  # told again, it is still the same event
    )
    batch = cause.key.batch_id
    why = f"drift in batch {batch}" if cause.alarm else f"due at batch {batch}: {decision.reason}"
    parameters = {"settings_path": str(settings.path), "cause": why}
    deployment = f"retrain/{name}"
    if not _deployed(deployment):
        return retrain(**parameters).words
    for attempt in range(1, 100):
        run = cast(
            "FlowRun",  # typed as a coroutine too, for flows that are async
            run_deployment(
                deployment, parameters=parameters, timeout=0, idempotency_key=f"{key}-{attempt}"
            ),
        )
        state = run.state
        # a run that crashed or was cancelled keeps its key: the next attempt has one of its own
        if state is None or not state.is_final() or state.is_completed():
            return f"started the deployment {deployment} ({run.name})"
    raise RegistryError(f"the deployment {deployment} failed 99 times for these labels")


def _deployed(name: str) -> bool:
    with get_client(sync_client=True) as client:
        try:
            client.read_deployment_by_name(name)
        except ObjectNotFound:
            return False
        return True


def _standing(
    settings: Settings,
    finished: list[CheckRecord],
    fresh: FreshSet,
    history: History,
    now: datetime,
) -> CheckRecord | None:
    """Return the newest check that calls for a retraining, else the newest to be decided anew.

    Those are the alarms, and the newest check of all, which a schedule or labels may make act. Of
    those that ask for labels only the newest is told anew when labels come.
    """
    if finished and not finished[-1].alarm:
        newest = finished[-1]
        decision = _decide(settings, evidence_on_record(newest, settings), fresh, history, now)
        changed = decision.action.value != newest.action
        if decision.action is Action.RETRAIN or (changed and not _quiet(newest, decision)):
            return newest
    alarms = [record for record in reversed(finished) if record.alarm]
    decisions = [
        _decide(settings, evidence_on_record(record, settings), fresh, history, now)
        for record in alarms
    ]
    for record, decision in zip(alarms, decisions, strict=True):
        if decision.action is Action.RETRAIN:
            return record
    for record, decision in zip(alarms, decisions, strict=True):
        if decision.action is not Action.WATCH or record.action != Action.WATCH.value:
            stale = record.tags.get("sustain.fresh") != fresh.digest[:16]
            return record if stale or decision.action.value != record.action else None
    return None


def _asking(finished: list[CheckRecord], fresh: FreshSet) -> CheckRecord | None:
    asking = [r for r in finished if r.alarm and r.action == Action.ASK_FOR_LABELS.value]
    if not asking or asking[-1].tags.get("sustain.requested") == fresh.digest[:16]:
        return None
    return asking[-1]


def _on_record(record: CheckRecord) -> Decision:
    return Decision(Action(record.action), record.reason)


def _quiet(record: CheckRecord, decision: Decision) -> bool:
    """Whether nothing is asked for, neither then nor now."""
    quiet = {Action.NONE.value, Action.WATCH.value}
    return {record.action, decision.action.value} <= quiet


def _decide(
    settings: Settings, evidence: Evidence, fresh: FreshSet, history: History, now: datetime
) -> Decision:
    policy = replace(settings.policy, min_labels=labels_needed(fresh, settings))
    return decide(evidence, FreshLabels(n=len(fresh), classes=fresh.classes), history, now, policy)


def _history(
    registry: Registry,
    settings: Settings,
    champion: Version,
    fresh: FreshSet,
    finished: Sequence[CheckRecord],
) -> History:
    versions = registry.versions()
    children = [v for v in versions if v.parent == champion.number]
    trained = [v for v in versions if v.parent is not None]
    last = max((v.created for v in children), default=None)
    since = [c for c in finished if last is None or c.started > last]
    return History(
        last_promotion=_latest(champion.tags.get("promoted_at")),
        last_rollback=_latest(*(v.tags.get("rolled_back_at") for v in versions)),
        last_training=last,
        remade=_remade(registry, settings, children, fresh),
        trainings=tuple(v.created for v in trained),
        last_training_seconds=registry.training_seconds(trained[-1]) if trained else None,
        batches_since_training=len(since),
        samples_since_training=int(sum(c.metrics["batch.samples"] for c in since)),
    )


def _remade(
    registry: Registry, settings: Settings, children: Sequence[Version], fresh: FreshSet
) -> str | None:
    """Say what became of the version that these labels made already, but for a few new ones.

    A version that was refused or rolled back is not made again for one more label: it takes
    `min_labels` new ones. None when there was no such version, or enough is new.
    """
    failed = [v for v in children if v.verdict is not None]
    failed = [v for v in failed if v.rolled_back or v.verdict != Outcome.PROMOTE.value]
    if not failed:
        return None
    tried = pd.concat([registry.learned(version) for version in failed])
    new = len(fresh_set(Labels(fresh.table, ()), tried))
    if new >= settings.policy.min_labels:
        return None
    last = failed[-1]
    became = "was rolled back" if last.rolled_back else f"got the verdict {last.verdict!r}"
    return f"version {last.number}, which {became} ({new} labels are new since)"


def _latest(*times: str | None) -> datetime | None:
    known = [datetime.fromisoformat(time) for time in times if time]
    return max(known) if known else None


def _record_decision(registry: Registry, run_id: str, decision: Decision, fresh: FreshSet) -> None:
    registry.log(
        run_id,
        tags={
            "sustain.action": decision.action.value,
            "sustain.reason": decision.reason,
            "sustain.fresh": fresh.digest[:16],
            "mlflow.note.content": decision.reason,
        },
    )


def _last_decision(checked: tuple[Checked, ...]) -> Decision:
    done = [c for c in checked if c.action not in (FAILED, POOLED)]
    if not done:
        return Decision(Action.NONE, "Nothing new.")
    worst = max(done, key=lambda c: list(Action).index(Action(c.action)))
    return Decision(Action(worst.action), worst.reason)
