"""`sustain deploy`: the scheduled and the startable flows of some models on a Prefect server.

What is deployed says by its version what it was made from, so that deploying again touches nothing,
not even a schedule that somebody paused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from prefect import Flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterTags,
)
from prefect.client.schemas.objects import (
    ConcurrencyLimitConfig,
    ConcurrencyLimitStrategy,
    StateType,
    VersionInfo,
)
from prefect.client.schemas.responses import DeploymentResponse
from prefect.deployments.runner import RunnerDeployment
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.events.schemas.deployment_triggers import DeploymentEventTrigger
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from prefect.schedules import Cron, Interval, Schedule
from prefect.settings import get_current_settings
from prefect.types.entrypoint import EntrypointType
from prefect.workers.process import ProcessWorker

from flows.adapt import adapt
from flows.promote import promote
from flows.prune import prune
from flows.reconcile import HEARTBEAT_SECONDS, SILENT_SECONDS, TAG, model_tag, reconcile
from flows.retrain import retrain
from flows.rollback import rollback
from flows.servers import POOL
from flows.settings import Settings
from flows.watch import DRIFT, watch

START_SECONDS = 120
"""How long a run may take to begin before its deployment's only slot is given on. Prefect's default
is 300; a process that imports torch takes a minute on a busy machine."""
GUARD = "sustain: runs of dead workers"
POOL_TAG = "pool:"
"""Begins the tag that says with which work pool one was deployed that runs in another."""
PAGE = 200
"""Most deployments that the server tells at once."""


class DeployError(RuntimeError):
    """The deployments cannot be registered; the message names the way out."""


@dataclass(frozen=True)
class Deployed:
    """What was registered, by name `flow/model`."""

    made: tuple[str, ...]
    changed: tuple[str, ...]
    same: tuple[str, ...]
    removed: tuple[str, ...]

    @property
    def words(self) -> str:
        """A sentence."""
        parts = {"new": self.made, "changed": self.changed, "removed": self.removed}
        told = [f"{what}: {', '.join(names)}" for what, names in parts.items() if names]
        return "; ".join([*told, f"unchanged: {len(self.same)}"])


@dataclass(frozen=True)
class _Spec:
    """One deployment, as the settings have it."""

    flow: Flow[..., Any]
    model: str
    parameters: dict[str, str]
    when: float | str = ""
    timezone: str = "UTC"
    strategy: str = "ENQUEUE"
    trigger: dict[str, str] | None = None
    pool: str = ""

    @property
    def name(self) -> str:
        return f"{self.flow.name}/{self.model}"

    @property
    def automation(self) -> str:
        """The name of the automation that its trigger becomes."""
        return f"{self.name} on drift"

    def version(self, pool: str) -> str:
        """Give a digest of all that follows from the settings."""
        made_from = [self.name, self.flow.description, self.parameters, self.when, self.timezone]
        made_from += [self.strategy, self.trigger, pool, HEARTBEAT_SECONDS, START_SECONDS]
        made_from += [self.pool] if self.pool else []
        return hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:12]

    def is_as_made(self, client: SyncPrefectClient, there: DeploymentResponse, pool: str) -> bool:
        """Whether nothing is left to do: the deployment is stored before its automation is made."""
        if there.version != self.version(pool):
            return False
        if self.trigger is None:
            return True
        automations = client.read_resource_related_automations(f"prefect.deployment.{there.id}")
        return any(one.name == self.automation for one in automations)

    def made(self, pool: str) -> RunnerDeployment:
        """Give it in Prefect's terms."""
        return RunnerDeployment.from_flow(
            self.flow,
            name=self.model,
            description=self.flow.description,
            schedule=_schedule(self.flow.name, self.when, self.timezone),
            concurrency_limit=ConcurrencyLimitConfig(
                limit=1,
                collision_strategy=ConcurrencyLimitStrategy(self.strategy),
                grace_period_seconds=START_SECONDS,
            ),
            parameters=self.parameters,
            triggers=None if self.trigger is None else [self._trigger(self.trigger)],
            tags=[TAG, model_tag(self.model), *([POOL_TAG + pool] if self.pool else [])],
            version=self.version(pool),
            work_pool_name=self.pool or pool,
            job_variables={"env": {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_SECONDS)}},
            entrypoint_type=EntrypointType.MODULE_PATH,
        )

    def _trigger(self, parameters: dict[str, str]) -> DeploymentEventTrigger:
        return DeploymentEventTrigger(
            name=self.automation,
            expect={DRIFT},
            match={"prefect.resource.id": f"drift.model.{self.model}"},
            posture=Posture.Reactive,
            parameters=dict(parameters),
        )


def deploy(models: Sequence[Settings], pool: str = POOL) -> Deployed:
    """Register the flows of these models, and remove those of models that are not among them.

    Only what carries the tag `sustain` and was deployed to this work pool is ever removed.

    Raises:
        DeployError: two models have one name, they name several servers, or none.
    """
    if not get_current_settings().api.url or len({one.servers.prefect for one in models}) > 1:
        raise DeployError(
            "schedules need one Prefect server that stays: name it under [servers] prefect of every"
            " model, or in PREFECT_API_URL; or let `sustain up` start one"
        )
    names = [settings.model.name for settings in models]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DeployError(
            f"two of the settings are of a model called {twice[0]!r}: a model has one TOML file"
        )
    specs = [spec for settings in models for spec in _specs(settings)]
    with get_client(sync_client=True) as client:
        for needed in sorted({pool, *(one.pool for one in specs if one.pool)}):
            _ensure_pool(client, needed)
        known = {one.name: one for one in specs}
        there = dict(_there(client, pool))
        made: list[str] = []
        changed: list[str] = []
        same: list[str] = []
        for name, spec in known.items():
            version, before = spec.version(pool), there.get(name)
            if before is not None and spec.is_as_made(client, before, pool):
                same.append(name)
                continue
            if before is not None and not spec.when:  # Prefect would keep them
                for schedule in before.schedules:
                    client.delete_deployment_schedule(before.id, schedule.id)
            spec.made(pool).apply(version_info=VersionInfo(type="prefect:simple", version=version))
            (made if before is None else changed).append(name)
        removed = sorted(set(there) - set(known))
        for name in removed:
            client.delete_resource_owned_automations(f"prefect.deployment.{there[name].id}")
            client.delete_deployment(there[name].id)
        _guard(client)
    return Deployed(tuple(made), tuple(changed), tuple(same), tuple(removed))


def _specs(settings: Settings) -> Iterator[_Spec]:
    model, when = settings.model.name, settings.schedule
    parameters = {"settings_path": str(settings.path)}
    # the next one on schedule sees all that one which comes too soon, or late, would have seen
    yield _Spec(watch, model, parameters, when.watch, when.timezone, strategy="CANCEL_NEW")
    told = {name: f"{{{{ event.payload.{name} }}}}" for name in ("cause", "check", "key")}
    yield _Spec(retrain, model, parameters, trigger=told, pool=when.retrain_pool)
    yield from (_Spec(flow, model, parameters) for flow in (adapt, promote, rollback))
    yield _Spec(prune, model, parameters, when.prune, when.timezone)
    yield _Spec(reconcile, model, parameters, when.reconcile, when.timezone)


def _schedule(slug: str, when: float | str, timezone: str) -> Schedule | None:
    if not when:
        return None
    if isinstance(when, str):
        return Cron(when, timezone=timezone, slug=slug)
    return Interval(timedelta(seconds=when), slug=slug)


def _ensure_pool(client: SyncPrefectClient, pool: str) -> None:
    try:
        client.read_work_pool(pool)
    except ObjectNotFound:
        template = ProcessWorker.get_default_base_job_template()
        with suppress(ObjectAlreadyExists):  # another one was faster
            client.create_work_pool(
                WorkPoolCreate(name=pool, type="process", base_job_template=template)
            )


def _there(client: SyncPrefectClient, pool: str) -> Iterator[tuple[str, DeploymentResponse]]:
    flows = {}
    offset = 0
    while True:
        page = client.read_deployments(
            deployment_filter=DeploymentFilter(tags=DeploymentFilterTags(all_=[TAG])),
            limit=PAGE,
            offset=offset,
        )
        for one in page:
            tagged = [tag for tag in one.tags if tag.startswith(POOL_TAG)]
            if (tagged or [f"{POOL_TAG}{one.work_pool_name}"]) != [POOL_TAG + pool]:
                continue
            if one.flow_id not in flows:
                flows[one.flow_id] = client.read_flow(one.flow_id).name
            yield f"{flows[one.flow_id]}/{one.name}", one
        if len(page) < PAGE:
            return
        offset += PAGE


def _guard(client: SyncPrefectClient) -> None:
    """Let the server mark a run as crashed that gave no sign of life, which frees its slot."""
    heartbeat = "prefect.flow-run.heartbeat"
    ends = ("Completed", "Failed", "Cancelled", "Crashed")
    words = f"Its worker died: no sign of life in {SILENT_SECONDS} s."
    there = client.read_automations_by_name(GUARD)
    if [one.description for one in there] == [words]:
        return
    for one in there:
        client.delete_automation(one.id)
    client.create_automation(
        AutomationCore(
            name=GUARD,
            description=words,
            trigger=EventTrigger(
                match={"prefect.resource.id": "prefect.flow-run.*"},
                match_related={
                    "prefect.resource.role": "tag",
                    "prefect.resource.id": f"prefect.tag.{TAG}",
                },
                after={heartbeat, "prefect.flow-run.Running"},
                expect={heartbeat, *(f"prefect.flow-run.{end}" for end in ends)},
                for_each={"prefect.resource.id"},
                posture=Posture.Proactive,
                threshold=1,
                within=timedelta(seconds=SILENT_SECONDS),
            ),
            actions=[
                ChangeFlowRunState(
                    name="Crashed", state=StateType.CRASHED, message=words, force=False
                )
            ],
        )
    )
