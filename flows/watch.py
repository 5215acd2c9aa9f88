"""`sustain watch`: check every batch that has no finished check against the champion, and decide.

Gather (`make_plan`), measure (`check`), decide (`monitoring.policy`), act. A run that finds nothing
to do says so and leaves. Killed anywhere, the next run goes on: a check counts once its MLflow run
is finished, and a decision to retrain stands until a version with its key is judged.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, cast
from uuid import NAMESPACE_OID, UUID, uuid5

from prefect import flow, get_client
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterDeploymentId
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.sorting import FlowRunSort
from prefect.deployments import run_deployment
from prefect.events import emit_event
from prefect.exceptions import ObjectNotFound
from prefect.utilities.annotations import quote

from flows.adapt import adapt_to, drift_to_adapt_to, judgeable
from flows.ask import was_listed, write_list
from flows.check import (
    FAILED,
    POOLED,
    Checked,
    Past,
    check,
    labels_digest,
    load_champion,
    settle_check,
    stamps_of,
)
from flows.decisions import (
    Decider,
    before_alarm,
    gather_history,
    rang_and_settled,
    record_decision,
    refused_attempts,
)
from flows.feed import Batch
from flows.fresh import (
    FreshSet,
    Labels,
    fresh_set,
    retrain_key,
)
from flows.history import show_in_prefect
from flows.logs import log
from flows.notify import tell, tell_of_failure, untold
from flows.probation import answer_with_before, compare, version_before
from flows.progress import CheckBar
from flows.promote import promote, promote_on
from flows.records import CheckRecord, Move, RegistryError, Version
from flows.registry import Registry
from flows.retrain import LabelsRefusedError, RetrainError, retrain, retrain_on
from flows.rollback import roll_back, rollback
from flows.settings import Settings, load_settings, refuse_contradiction
from flows.shadow import load_shadow, out_of_shadow
from flows.storage import FeedError
from monitoring.policy import (
    Action,
    Decision,
    decide_rollback,
    on_probation,
)

DRIFT = "drift.detected"
"""The event that says that a model's data drifted and that it shall be trained."""
MAX_ATTEMPTS = 20
"""Runs of the deployment for the same labels; all of them failed or were killed."""


@dataclass(frozen=True)
class Plan:
    """What a watch run has to do.

    Attributes:
        champion: the version that serves.
        moved: the alias moved since anybody looked.
        batches: all that the feed holds.
        pending: those without a finished check against the champion, oldest first.
        unsettled: checks whose batch has other labels than when they were last settled.
        finished: the newest checks against the champion, those of the feed among them, in order.
        failed: how many batches could not be checked, and have not changed since.
        asking: the newest check that asks for labels, if its list is not written yet.
        untold: there is something that people should have been told of.
        standing: the newest check that found damage, if it stands to be decided again.
        adapting: the newest check that asks for labels, if a challenger without labels is due.
        waiting: such a challenger that can be judged now, since its labels came, or one that has
            answered its batches in the shadow.
        labels: all labels.
        decider: decides, by the fresh labels and by what happened before.
    """

    champion: Version
    moved: bool
    batches: tuple[Batch, ...]
    pending: tuple[Batch, ...]
    unsettled: tuple[CheckRecord, ...]
    finished: tuple[CheckRecord, ...]
    failed: int
    asking: CheckRecord | None
    standing: CheckRecord | None
    adapting: CheckRecord | None
    waiting: Version | None
    untold: bool
    labels: Labels
    decider: Decider

    @property
    def fresh(self) -> FreshSet:
        """The labels that the champion has not learned from."""
        return self.decider.fresh

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        to_do = (self.moved, self.pending, self.unsettled, self.standing, self.asking, self.untold)
        return not any((*to_do, self.adapting, self.waiting))


@dataclass(frozen=True)
class Watched:
    """What a watch run did.

    Attributes:
        champion: the version that the checks were made against.
        move: a change of champion that this run was the first to see.
        checked: one entry a batch.
        settled: batch to true accuracy on the labels that came.
        decision: the last decision.
        batch: the batch that it is about; empty where it is about none.
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
    batch: str = ""


def make_plan(registry: Registry, settings: Settings, now: datetime) -> Plan:
    """Find out what there is to do, without a forward pass and without Prefect."""
    champion, versions = registry.champion(), registry.versions()
    config = registry.config(champion)
    refuse_contradiction(settings, config)
    batches = registry.view.batches()
    checks = registry.newest_checks(champion.number, {b.id: b.arrived for b in batches})
    done = {(c.key.batch_id, c.key.digest) for c in checks if c.finished}
    failed = {(c.key.batch_id, c.stamp) for c in checks if not c.finished}
    stamps = dict(zip((b.id for b in batches), stamps_of(batches, settings), strict=True))
    labels = registry.view.labels(batches, config.classes, config.task)
    fresh = fresh_set(labels, registry.learned(champion))
    here = {(batch.id, batch.digest) for batch in batches}
    finished = [c for c in checks if c.saw_something]
    present = [c for c in finished if (c.key.batch_id, c.key.digest) in here]
    history = gather_history(registry, settings, champion, versions, fresh, batches, finished)
    decider = Decider(
        settings,
        fresh,
        history,
        now,
        before_alarm(finished),
        rang_and_settled(finished),
        refused_attempts(finished),
    )
    return Plan(
        champion=champion,
        moved=registry.unobserved_move(),
        batches=tuple(batches),
        pending=tuple(
            b
            for b in batches
            if (b.id, b.digest) not in done and (b.id, stamps[b.id]) not in failed
        ),
        unsettled=tuple(
            c
            for c in present
            if labels_digest(labels.of_batch(c.key.batch_id)) != c.tags.get("sustain.settled", "")
        ),
        finished=tuple(finished),
        failed=sum((b.id, stamps[b.id]) in failed for b in batches),
        asking=decider.asking(present),
        standing=decider.standing(present),
        adapting=drift_to_adapt_to(settings, champion, versions, present),
        waiting=judgeable(registry, champion, versions, labels) or out_of_shadow(registry),
        untold=bool(settings.notify.to and untold(registry, settings, now)),
        labels=labels,
        decider=decider,
    )


@flow(name="watch", on_failure=[tell_of_failure], on_crashed=[tell_of_failure])
def watch(settings_path: str) -> Watched:
    """Check what is new, settle what has labels, decide, and start a retraining if it is due."""
    return watch_on(Registry(load_settings(Path(settings_path))))


def watch_on(registry: Registry) -> Watched:
    """Do what `watch` does, on a record."""
    settings, now = registry.settings, registry.now()
    move = registry.observe_moves(now)
    if move is not None:
        show_in_prefect(registry)
        log(settings, "champion.moved", version=move.after, before=move.before, by=move.by)
    plan = make_plan(registry, settings, now)
    champion = plan.champion
    checked, unread = check_all(registry, settings, plan) if plan.pending else ((), ())

    if checked:  # labels that came with their batch, and new damage, count from here on
        plan = make_plan(registry, settings, now)
    settled = settle_all(registry, settings, plan, now)
    if settled:  # the truth may call for another decision
        plan = make_plan(registry, settings, now)
    decision, done, about = _act(registry, settings, plan, *_last_decision(checked), now)
    if decision.action is Action.ASK_FOR_LABELS:
        plan = make_plan(registry, settings, now)
        if plan.asking is not None:
            done = list_wanted_labels(registry, settings, plan, plan.asking)
        if plan.adapting is not None:
            done = "; ".join(filter(None, (done, adapt_to(registry, settings, plan.adapting))))
    action, reason = decision.action.value, decision.reason
    log(settings, "decided", version=champion.number, action=action, reason=reason, done=done)
    return Watched(
        champion=champion.number,
        move=move,
        checked=checked,
        settled=settled,
        decision=decision,
        done=done,
        problems=(*unread, *plan.labels.problems, *tell(registry, settings, now)),
        batch=about,
    )


def _act(
    registry: Registry,
    settings: Settings,
    plan: Plan,
    decision: Decision,
    about: str,
    now: datetime,
) -> tuple[Decision, str, str]:
    """Roll back or retrain if it is due.

    Returns:
        The decision in force, what was done, and the batch that it is about, if it is about one;
        without anything due, the decision `about` a batch that was given.
    """
    moved = _end_probation(registry, settings, plan, now) or _judge_waiting(registry, plan)
    if moved is not None:
        return *moved, ""
    standing, asking = plan.standing, plan.asking
    if standing is None:
        if asking is None:
            return decision, "", about
        return _on_record(asking), "", asking.key.batch_id
    about = standing.key.batch_id
    decision = plan.decider.on_record(standing)
    record_decision(registry, standing.run_id, decision, plan.fresh)
    if decision.action is not Action.RETRAIN:
        return decision, "", about
    try:
        done = start_retraining(registry, plan.champion, plan.fresh, standing, decision)
    except LabelsRefusedError:  # others are needed, as it has put on record
        return _on_record(registry.check_record(standing.run_id)), "", about
    except RetrainError as error:  # another watcher was faster, or labels went away
        done = f"nothing was retrained: {error}"
    return decision, done, about


def list_wanted_labels(
    registry: Registry, settings: Settings, plan: Plan, asking: CheckRecord
) -> str:
    """Put the list of samples that are worth labelling beside the check that asks for them."""
    if not registry.live:  # the labels are those that came
        registry.log(asking.run_id, tags={"sustain.requested": plan.decider.name})
        return ""
    with tempfile.TemporaryDirectory(prefix="sustain-") as name:
        folder = Path(name)
        wanted = write_list(
            registry,
            settings,
            plan.champion,
            plan.batches,
            plan.finished,
            plan.labels,
            plan.decider.counted(alarm=True),
            folder,
        )
        for path in sorted(folder.iterdir()):
            registry.log_file(asking.run_id, path)
    registry.log(asking.run_id, tags={"sustain.requested": plan.decider.name})
    if not wanted:
        return ""
    return (
        f"{len(wanted)} samples are worth labelling: label_requests.csv beside the check of"
        f" {asking.key.batch_id} in MLflow, or `sustain ask`"
    )


def check_all(
    registry: Registry, settings: Settings, plan: Plan
) -> tuple[tuple[Checked, ...], tuple[str, ...]]:
    """Check every pending batch, oldest first, with the champion loaded once.

    Returns:
        What was checked, and what the storage did not give: that is tried again by the next run,
        and does not keep the other batches waiting.
    """
    against = load_champion(registry, plan.champion, load_shadow(registry))
    past = Past(settings, list(plan.finished))
    checked, unread = [], []
    as_task: Any = check
    bar = CheckBar(len(plan.pending), shown=registry.live)
    with bar:
        for batch in plan.pending:
            given = (registry, settings, against, batch, past, plan.decider)
            try:
                # unquoted, Prefect would walk through every value of every check on record
                done = as_task(*map(quote, given)) if registry.live else check.fn(*given)
            except FeedError as error:
                bar.on_check(0)
                unread.append(f"batch {batch.id} was not checked: {error}")
                continue
            bar.on_check(done.samples)
            checked.append(done)
            log_check(settings, done)
            if done.samples:
                past.append(registry.check_record(done.run_id))
    return tuple(checked), tuple(unread)


def log_check(settings: Settings, checked: Checked) -> None:
    """Write what a check said, for machines."""
    log(
        settings,
        "batch.checked",
        version=checked.champion,
        batch=checked.batch_id,
        samples=checked.samples,
        quarantined=checked.quarantined,
        p_value=checked.p_value,
        alarm=bool(checked.alarm),
        accuracy=checked.estimated,
        action=checked.action,
        run=checked.run_id,
    )


def settle_all(
    registry: Registry, settings: Settings, plan: Plan, now: datetime
) -> dict[str, float]:
    """Hold what labels tell against the estimates, and in probation against the version before.

    Returns:
        True accuracy by batch, for those that have labels now.
    """
    settled = {}
    before = None
    if plan.unsettled and on_probation(plan.decider.history, now, settings.policy):
        before = version_before(registry, plan.champion)
    by_id = {batch.id: batch for batch in plan.batches}
    requested = "tags.`sustain.requested` != ''"
    of_champion = bool(plan.unsettled) and registry.has_check(plan.champion.number, requested)
    for record in plan.unsettled:
        asked = of_champion or was_listed(registry, record.key.batch_id)
        if before is not None:  # first: a check counts as settled by what follows
            batch = by_id[record.key.batch_id]
            try:
                answer_with_before(
                    registry,
                    plan.champion,
                    before,
                    batch,
                    record,
                    plan.labels,
                    asked=asked,
                )
            except FeedError:  # the storage failed: settled by the next run
                continue
        accuracy = settle_check(registry, record, plan.labels, asked=asked)
        if accuracy is not None:
            batch_id, version = record.key.batch_id, record.key.champion
            settled[batch_id] = accuracy
            log(settings, "batch.settled", version=version, batch=batch_id, accuracy=accuracy)
    return settled


def _end_probation(
    registry: Registry, settings: Settings, plan: Plan, now: datetime
) -> tuple[Decision, str] | None:
    """Roll back if labels show that the version before is better; return why, and what was done."""
    if not on_probation(plan.decider.history, now, settings.policy):
        return None
    before = version_before(registry, plan.champion)
    answered = (plan.champion.number, "metrics.`before.n` > 0")
    compared = None if before is None else compare(before, registry.checks(*answered))
    if before is None or compared is None:
        return None
    decision = decide_rollback(compared, plan.decider.history, now, settings.policy)
    if decision is None:
        return None
    try:
        if not registry.live:
            return decision, roll_back(registry, before.number, decision.reason).words
        return decision, rollback(str(settings.path), to=before.number, why=decision.reason).words
    except RegistryError as error:
        return decision, f"version {before.number} did not come back: {error}"


def _judge_waiting(registry: Registry, plan: Plan) -> tuple[Decision, str] | None:
    """Judge a challenger that waited; return why and what was done if it was promoted."""
    if plan.waiting is None:
        return None
    number = plan.waiting.number
    if registry.live:
        judged = promote(str(registry.settings.path), version=number)
    else:
        judged = promote_on(registry, number)
    return (Decision(Action.NONE, judged.words), judged.words) if judged.promoted else None


def start_retraining(
    registry: Registry,
    champion: Version,
    fresh: FreshSet,
    cause: CheckRecord,
    decision: Decision,
) -> str:
    """Tell the world of the drift and start the retrain flow; say what came of it.

    A deployment `retrain/<model>` that an event starts is left to it; one that no event starts is
    started here, with an idempotency key. Either way the same labels start it once, or once more
    after each run that failed. Without a deployment the flow runs here and now.
    """
    settings = registry.settings
    batch = cause.key.batch_id
    why = f"drift in batch {batch}" if cause.alarm else f"due at batch {batch}: {decision.reason}"
    name = settings.model.name
    key = retrain_key(champion.number, fresh, settings)
    told = {"cause": why, "check": cause.run_id, "key": key}
    if not registry.live:
        return retrain_on(registry, **told).words
    full_name = f"retrain/{name}"
    with get_client(sync_client=True) as client:
        deployment = _deployment(client, full_name)
        runs = [] if deployment is None else _runs_for(client, deployment.id, key)
        by_event = deployment is not None and _starts_by_event(client, deployment.id)
    # one that is over and made nothing found another version serving
    made = bool(runs) and registry.find_version(key) is not None
    under_way = next((run for run in runs if _is_under_way(run) or (made and _is_done(run))), None)
    if under_way is not None:
        return f"the deployment {full_name} was started ({under_way.name})"
    if len(runs) >= MAX_ATTEMPTS:
        return (
            f"nothing was retrained: the deployment {full_name} failed {len(runs)} times for these"
            " labels; see its runs in Prefect"
        )
    # told again, it is still the same event; another model may have the same labels and settings
    attempt = f"{name}-{key}-{len(runs) + 1}"
    emit_event(
        event=DRIFT,
        resource={"prefect.resource.id": f"drift.model.{name}", "prefect.resource.name": name},
        payload={
            "window": batch,
            "champion": champion.number,
            "reason": decision.reason,
            **told,
        },
        id=uuid5(NAMESPACE_OID, attempt),
    )
    parameters = {"settings_path": str(settings.path), **told}
    if deployment is None:
        return retrain(**parameters).words
    if by_event:
        return f"told the deployment {full_name} of the drift: it starts by itself"
    run = cast(
        "FlowRun",  # typed as a coroutine too, for flows that are async
        run_deployment(full_name, parameters=parameters, timeout=0, idempotency_key=attempt),
    )
    return f"the deployment {full_name} was started ({run.name})"


def _deployment(client: SyncPrefectClient, name: str) -> DeploymentResponse | None:
    try:
        return client.read_deployment_by_name(name)
    except ObjectNotFound:
        return None


def _runs_for(client: SyncPrefectClient, deployment: UUID, key: str) -> list[FlowRun]:
    """List a deployment's newest runs for the retraining with this key."""
    of_it = FlowRunFilter(deployment_id=FlowRunFilterDeploymentId(any_=[deployment]))
    newest = FlowRunSort.EXPECTED_START_TIME_DESC
    found = client.read_flow_runs(flow_run_filter=of_it, sort=newest, limit=200)
    return [run for run in found if run.parameters.get("key") == key]


def _starts_by_event(client: SyncPrefectClient, deployment: UUID) -> bool:
    found = client.read_resource_related_automations(f"prefect.deployment.{deployment}")
    return any(DRIFT in getattr(one.trigger, "expect", ()) for one in found)


def _is_under_way(run: FlowRun) -> bool:
    return run.state is None or not run.state.is_final()


def _is_done(run: FlowRun) -> bool:
    return run.state is not None and run.state.is_completed()


def _on_record(record: CheckRecord) -> Decision:
    return Decision(Action(record.action), record.reason)


def _last_decision(checked: tuple[Checked, ...]) -> tuple[Decision, str]:
    """Give the decision that asks for most, and the batch that it is about."""
    done = [c for c in checked if c.action not in (FAILED, POOLED)]
    if not done:
        return Decision(Action.NONE, "Nothing new."), ""
    worst = max(done, key=lambda c: list(Action).index(Action(c.action)))
    return Decision(Action(worst.action), worst.reason), worst.batch_id
