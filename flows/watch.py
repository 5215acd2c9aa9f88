"""`sustain watch`: check every batch that has no finished check against the champion, and decide.

Gather (`make_plan`), measure (`check`), decide (`monitoring.policy`), act. A run that finds nothing
to do says so and leaves. Killed anywhere, the next run goes on: a check counts once its MLflow run
is finished, and a decision to retrain stands until a version with its key is judged.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import cast
from uuid import NAMESPACE_OID, uuid5

import numpy as np
import pandas as pd
import torch
from prefect import flow, get_client, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import FlowRun
from prefect.deployments import run_deployment
from prefect.events import emit_event
from prefect.exceptions import ObjectNotFound
from rich.progress import Progress

from flows.batches import read_batch
from flows.feed import Batch, BatchNotReady, list_batches
from flows.fresh import (
    FreshSet,
    Labels,
    fresh_set,
    gather_labels,
    labels_needed,
    retrain_key,
)
from flows.intake import TooManyBad
from flows.registry import CheckKey, CheckRecord, Move, Registry, RegistryError, Version
from flows.retrain import RetrainError, retrain
from flows.settings import Settings, load_settings, refuse_contradiction
from flows.storage import FeedError
from monitoring.accuracy import Estimate, estimate_accuracy, settle
from monitoring.detectors import Detection, detect_drift
from monitoring.features import FeatureTable, extract
from monitoring.policy import Action, Decision, Evidence, FreshLabels, History, decide
from monitoring.reference import Reference
from sft.dataset import Role
from sft.gate import Outcome
from sft.models import Network


@dataclass(frozen=True)
class Plan:
    """What a watch run has to do.

    Attributes:
        champion: the version that serves.
        moved: the alias moved since anybody looked.
        batches: all that the feed holds.
        pending: those without a finished check against the champion, oldest first.
        unsettled: checks whose batch has other labels than when they were last settled.
        standing: the newest check that found damage, if it stands to be decided again.
        labels, fresh: all labels, and those that the champion has not learned from.
        history: what happened before, as the policy wants it.
    """

    champion: Version
    moved: bool
    batches: tuple[Batch, ...]
    pending: tuple[Batch, ...]
    unsettled: tuple[CheckRecord, ...]
    standing: CheckRecord | None
    labels: Labels
    fresh: FreshSet
    history: History

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self.moved or self.pending or self.unsettled or self.standing)


@dataclass(frozen=True)
class Checked:
    """One check's result; the figures are NaN when it failed."""

    batch_id: str
    champion: int
    samples: int
    quarantined: int
    p_value: float
    alarm: bool
    estimated: float
    reference: float
    regime: str
    action: str
    reason: str
    run_id: str


@dataclass(frozen=True)
class Watched:
    """What a watch run did.

    Attributes:
        champion: the version that the checks were made against.
        move: a change of champion that this run was the first to see.
        checked: one entry a batch.
        settled: batch to true accuracy on the labels that came.
        decision: the last decision.
        retrained: what the retraining did, in words; "" when there was none.
        problems: labels that could not be used, and batches that the storage did not give.
    """

    champion: int
    move: Move | None
    checked: tuple[Checked, ...]
    settled: Mapping[str, float]
    decision: Decision
    retrained: str
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
    finished = [
        c
        for c in checks
        if c.finished
        and c.metrics.get("batch.samples", 0) > 0
        and (c.key.batch_id, c.key.digest) in here
    ]
    history = _history(registry, settings, champion, fresh)
    return Plan(
        champion=champion,
        moved=registry.unobserved_move(),
        batches=tuple(batches),
        pending=tuple(
            b for b in batches if (b.id, b.digest) not in done and (b.id, b.stamp) not in failed
        ),
        unsettled=tuple(
            c
            for c in finished
            if _labels_digest(labels.of_batch(c.key.batch_id)) != c.tags.get("sustain.settled", "")
        ),
        standing=_standing(settings, finished, fresh, history, now),
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
    settled = {
        record.key.batch_id: accuracy
        for record in plan.unsettled
        if (accuracy := settle_check(registry, record, plan.labels)) is not None
    }
    if settled:  # the truth may call for another decision
        plan = make_plan(registry, settings, now)
    decision = _last_decision(checked)
    retrained = ""
    if (standing := plan.standing) is not None:
        decision = _decide(settings, _evidence(standing), plan.fresh, plan.history, now)
        _record_decision(registry, standing.run_id, decision, plan.fresh)
        if decision.action is Action.RETRAIN:
            try:
                retrained = start_retraining(settings, champion, plan.fresh, standing, decision)
            except RetrainError as error:
                retrained = f"nothing was retrained: {error}"
    return Watched(
        champion=champion.number,
        move=move,
        checked=checked,
        settled=settled,
        decision=decision,
        retrained=retrained,
        problems=(*unread, *plan.labels.problems),
    )


def check_all(
    registry: Registry, settings: Settings, plan: Plan, now: datetime
) -> tuple[tuple[Checked, ...], tuple[str, ...]]:
    """Check every pending batch with one loaded network.

    Returns:
        What was checked, and what the storage did not give: that is tried again by the next run,
        and does not keep the other batches waiting.
    """
    champion = plan.champion
    network, reference = registry.network(champion), registry.reference(champion)
    learned = registry.learned(champion)
    # the champion is overconfident on what it learned from, and its reference is no news to itself
    used = frozenset(learned[learned["role"] != Role.HOLDOUT.value]["sample_id"]).union(
        *(regime.features.sample_ids for regime in reference.regimes)
    )
    checked, unread = [], []
    with Progress(transient=True) as progress:
        for batch in progress.track(plan.pending, description="checking"):
            one = check.with_options(task_run_name=f"check {batch.id}")
            try:
                checked.append(
                    one(registry, settings, champion, network, reference, batch, used, plan, now)
                )
            except FeedError as error:
                unread.append(f"batch {batch.id} was not checked: {error}")
    return tuple(checked), tuple(unread)


@task(name="check", cache_policy=NO_CACHE)
def check(
    registry: Registry,
    settings: Settings,
    champion: Version,
    network: Network,
    reference: Reference,
    batch: Batch,
    known: frozenset[str],
    plan: Plan,
    now: datetime,
) -> Checked:
    """Check one batch and put it on record: features in one pass, detection, estimate, decision.

    Samples in `known` (learned from, or part of the reference) are left out. A batch that cannot be
    read is recorded as failed and tried again when it changes.
    """
    key = CheckKey(champion.number, batch.id, batch.digest)
    run_id = registry.begin_check(key, batch.stamp)
    try:
        read = read_batch(batch, settings.feed, settings.root, network.config.preprocessing)
    except (BatchNotReady, TooManyBad) as error:  # other errors are the storage's: try again
        registry.log(run_id, tags={"sustain.action": "failed", "sustain.reason": str(error)})
        registry.end_run(run_id, failed=True)
        return _unmeasured(batch, champion, run_id, "failed", str(error))
    places = [i for i, name in enumerate(read.samples["sample_id"]) if name not in known]
    if not places:
        reason = "The champion learned from every sample of the batch, or has it in its reference."
        registry.log(
            run_id,
            metrics={"batch.samples": 0.0},
            tags={"sustain.action": Action.NONE.value, "sustain.reason": reason},
        )
        registry.end_run(run_id)
        return _unmeasured(batch, champion, run_id, Action.NONE.value, reason)

    pictures = [read.pictures[i] for i in places]
    features = extract(
        network,
        tuple(read.samples["sample_id"].iloc[places]),
        torch.stack([picture.pixels for picture in pictures]),
    )
    detection = detect_drift(reference, features, settings.detection)
    estimate = estimate_accuracy(reference, features)
    evidence = Evidence(
        batch_id=batch.id,
        alarm=detection.alarm,
        p_value=detection.p_value,
        alpha=detection.alpha,
        estimated=estimate.value,
        reference=estimate.reference,
        novelty=estimate.novelty,
        believable=estimate.believable,
    )
    decision = _decide(settings, evidence, plan.fresh, plan.history, now)
    with tempfile.TemporaryDirectory(prefix="sustain-") as name:
        folder = Path(name)
        _write_files(folder, batch, champion, features, reference, detection, estimate, decision)
        if read.quarantined:
            rows = [(q.sample_id, q.reason) for q in read.quarantined]
            pd.DataFrame(rows, columns=["sample_id", "reason"]).to_csv(
                folder / "quarantine.csv", index=False
            )
        for path in sorted(folder.iterdir()):
            registry.log_file(run_id, path)
    registry.log(
        run_id,
        metrics=_metrics(detection, estimate, len(features), len(read.quarantined)),
        tags={
            "sustain.action": decision.action.value,
            "sustain.reason": decision.reason,
            "sustain.regime": detection.regime,
            "sustain.fresh": plan.fresh.digest[:16],
            "mlflow.note.content": decision.reason,
        },
    )
    registry.end_run(run_id)
    checked = Checked(
        batch_id=batch.id,
        champion=champion.number,
        samples=len(features),
        quarantined=len(read.quarantined),
        p_value=detection.p_value,
        alarm=detection.alarm,
        estimated=estimate.value,
        reference=estimate.reference,
        regime=detection.regime,
        action=decision.action.value,
        reason=decision.reason,
        run_id=run_id,
    )
    _show_in_prefect(registry, checked)
    return checked


def settle_check(registry: Registry, record: CheckRecord, labels: Labels) -> float | None:
    """Compare a check's predictions with the labels that came; return the true accuracy."""
    features = registry.features(record)
    batch_labels = labels.of_batch(record.key.batch_id)
    classes = registry.config(registry.version(record.key.champion)).classes
    index = {name: place for place, name in enumerate(classes)}
    rows = [i for i, name in enumerate(features.sample_ids) if name in batch_labels]
    # a class that the champion does not know is answered wrongly, whatever the answer
    truth = [index.get(batch_labels[features.sample_ids[i]], len(classes)) for i in rows]
    accuracy = None
    if rows:
        result = settle(
            record.metrics["accuracy.estimated"],
            features.predicted[rows],
            np.asarray(truth, dtype=np.int64),
        )
        accuracy = result.accuracy
        registry.log(
            record.run_id,
            metrics={
                "accuracy.settled": result.accuracy,
                "accuracy.settled_low": result.low,
                "accuracy.settled_high": result.high,
                "accuracy.settled_n": float(result.n),
                "accuracy.estimate_error": result.error,
            },
        )
    registry.log(record.run_id, tags={"sustain.settled": _labels_digest(batch_labels)})
    return accuracy


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
    why = f"drift in batch {cause.key.batch_id}"
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
    """Return the newest alarm that calls for a retraining, else the newest to be decided anew.

    Of those that ask for labels only the newest is told anew when labels come.
    """
    alarms = [record for record in reversed(finished) if record.alarm]
    decisions = [_decide(settings, _evidence(record), fresh, history, now) for record in alarms]
    for record, decision in zip(alarms, decisions, strict=True):
        if decision.action is Action.RETRAIN:
            return record
    for record, decision in zip(alarms, decisions, strict=True):
        if decision.action is not Action.WATCH or record.action != Action.WATCH.value:
            stale = record.tags.get("sustain.fresh") != fresh.digest[:16]
            return record if stale or decision.action.value != record.action else None
    return None


def _decide(
    settings: Settings, evidence: Evidence, fresh: FreshSet, history: History, now: datetime
) -> Decision:
    policy = replace(settings.policy, min_labels=labels_needed(fresh, settings))
    return decide(evidence, FreshLabels(n=len(fresh), classes=fresh.classes), history, now, policy)


def _history(registry: Registry, settings: Settings, champion: Version, fresh: FreshSet) -> History:
    versions = registry.versions()
    children = [v for v in versions if v.parent == champion.number]
    return History(
        last_promotion=_latest(champion.tags.get("promoted_at")),
        last_rollback=_latest(*(v.tags.get("rolled_back_at") for v in versions)),
        last_training=max((v.created for v in children), default=None),
        remade=_remade(registry, settings, children, fresh),
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


def _evidence(record: CheckRecord) -> Evidence:
    metrics = record.metrics
    return Evidence(
        batch_id=record.key.batch_id,
        alarm=record.alarm,
        p_value=metrics["drift.p_value"],
        alpha=metrics["drift.alpha"],
        estimated=metrics["accuracy.estimated"],
        reference=metrics["accuracy.reference"],
        settled=metrics.get("accuracy.settled"),
        settled_n=int(metrics.get("accuracy.settled_n", 0)),
        settled_high=metrics.get("accuracy.settled_high"),
        novelty=metrics["accuracy.novelty"],
        believable=metrics["accuracy.believable"] > 0,
    )


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
    done = [c for c in checked if c.action != "failed"]
    if not done:
        return Decision(Action.NONE, "Nothing new.")
    worst = max(done, key=lambda c: list(Action).index(Action(c.action)))
    return Decision(Action(worst.action), worst.reason)


def _labels_digest(labels: Mapping[str, str]) -> str:
    encoded = json.dumps(sorted(labels.items())).encode()
    return hashlib.sha256(encoded).hexdigest()[:16] if labels else ""


def _metrics(
    detection: Detection, estimate: Estimate, samples: int, quarantined: int
) -> dict[str, float]:
    return {
        "drift.p_value": float(detection.p_value),
        "drift.alarm": float(detection.alarm),
        "drift.alpha": float(detection.alpha),
        "drift.parts": float(len(detection.parts)),
        "accuracy.estimated": float(estimate.value),
        "accuracy.estimated_low": float(estimate.low),
        "accuracy.estimated_high": float(estimate.high),
        "accuracy.reference": float(estimate.reference),
        "accuracy.novelty": float(estimate.novelty),
        "accuracy.believable": float(estimate.believable),
        "batch.samples": float(samples),
        "batch.quarantined": float(quarantined),
    }


def _write_files(
    folder: Path,
    batch: Batch,
    champion: Version,
    features: FeatureTable,
    reference: Reference,
    detection: Detection,
    estimate: Estimate,
    decision: Decision,
) -> None:
    from monitoring.report import write_report  # Evidently takes seconds to import

    features.save(folder / "features.parquet")
    write_report(
        folder / "report.html",
        reference=reference,
        batch=features,
        detection=detection,
        estimate=estimate,
        decision=decision,
        title=f"Batch {batch.id} against version {champion.number}",
    )


def _show_in_prefect(registry: Registry, checked: Checked) -> None:
    run = registry.run_url(checked.run_id)
    report = registry.run_url(checked.run_id, artifact="report.html")
    create_markdown_artifact(
        key=f"check-{_slug(registry.name)}",
        description=f"{checked.batch_id}: {checked.action}",
        markdown=(
            f"## {checked.action}: `{checked.batch_id}` against version {checked.champion}\n\n"
            f"{checked.reason}\n\n"
            "| | |\n|---|---|\n"
            f"| samples | {checked.samples} ({checked.quarantined} quarantined) |\n"
            f"| p-value | {checked.p_value:.3g} |\n"
            f"| accuracy, estimated | {checked.estimated:.3f} |\n"
            f"| accuracy, reference | {checked.reference:.3f} |\n"
            f"| nearest regime | {checked.regime} |\n\n"
            f"[Drift report]({report}) · [check in MLflow]({run}) ·"
            f" [version {checked.champion}]({registry.version_url(checked.champion)})\n"
        ),
    )


def _slug(name: str) -> str:
    return "".join(c if c.isascii() and c.isalnum() else "-" for c in name.lower()).strip("-")


def _unmeasured(batch: Batch, champion: Version, run_id: str, action: str, reason: str) -> Checked:
    """Describe a check without figures."""
    nan = float("nan")
    return Checked(
        batch_id=batch.id,
        champion=champion.number,
        samples=0,
        quarantined=0,
        p_value=nan,
        alarm=False,
        estimated=nan,
        reference=nan,
        regime="",
        action=action,
        reason=reason,
        run_id=run_id,
    )
