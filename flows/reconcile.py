"""`sustain reconcile`: what dead processes left running, in Prefect and in MLflow, is ended."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from prefect import flow, get_client
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
    FlowRunFilterTags,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.events.filters import (
    EventFilter,
    EventNameFilter,
    EventOccurredFilter,
    EventResourceFilter,
)
from prefect.runtime import flow_run
from prefect.states import Crashed

from flows.notify import tell_of_failure
from flows.registry import Registry
from flows.settings import load_settings

TAG = "sustain"
"""Of every deployment of this package's, and so of its runs."""
HEARTBEAT_SECONDS = 30
"""Between two signs of life of a run; the least that Prefect takes."""
SILENT_SECONDS = 100
"""After which a run is taken for dead: three signs of life that did not come."""
STARTING_SECONDS = 900
"""After which a run that was handed out and did not begin is taken for dead."""


@dataclass(frozen=True)
class Reconciled:
    """What was ended: Prefect's flow runs, by name, and MLflow's runs, by id."""

    crashed: tuple[str, ...]
    ended: tuple[str, ...]

    @property
    def words(self) -> str:
        """A sentence."""
        runs = ", ".join(self.crashed) or "none"
        return f"marked as crashed: {runs}; runs ended in MLflow: {len(self.ended)}"


@flow(name="reconcile", on_failure=[tell_of_failure], on_crashed=[tell_of_failure])
def reconcile(settings_path: str, silent_seconds: float = SILENT_SECONDS) -> Reconciled:
    """Mark this model's flow runs that died as crashed, and end what they left open in MLflow.

    A run of MLflow's that began before every flow run which still lives belongs to none of them.

    Args:
        settings_path: the model's TOML file.
        silent_seconds: a running flow run without a sign of life for so long is dead.
    """
    settings = load_settings(Path(settings_path))
    now = datetime.now(UTC)
    crashed, alive = [], [now]
    with get_client(sync_client=True) as client:
        for run in list(_open_runs(client, settings.model.name)):
            if _is_dead(client, run, now, silent_seconds):
                state: State[None] = Crashed(message="Its worker died: reconciled.")
                client.set_flow_run_state(run.id, state)
                crashed.append(run.name)
            else:
                alive.append(run.start_time or now)
    ended = Registry(settings).end_abandoned(min(alive))
    return Reconciled(tuple(crashed), tuple(ended))


def model_tag(model: str) -> str:
    """Return the tag of one model's deployments."""
    return f"model:{model}"


def _open_runs(client: SyncPrefectClient, model: str) -> Iterator[FlowRun]:
    open_states = [StateType.RUNNING, StateType.PENDING, StateType.CANCELLING]
    found = client.read_flow_runs(
        flow_run_filter=FlowRunFilter(
            tags=FlowRunFilterTags(all_=[TAG, model_tag(model)]),
            state=FlowRunFilterState(type=FlowRunFilterStateType(any_=open_states)),
        ),
        limit=200,
    )
    yield from (run for run in found if str(run.id) != flow_run.id)


def _is_dead(client: SyncPrefectClient, run: FlowRun, now: datetime, silent_seconds: float) -> bool:
    if run.state is None:
        return False
    patience = silent_seconds if run.state.is_running() else max(silent_seconds, STARTING_SECONDS)
    since = now - timedelta(seconds=patience)
    if run.state.timestamp > since:
        return False
    heard = client.read_events(
        EventFilter(
            occurred=EventOccurredFilter.model_validate({"since": since}),
            event=EventNameFilter(name=["prefect.flow-run.heartbeat"]),
            resource=EventResourceFilter(id=[f"prefect.flow-run.{run.id}"]),
        ),
        limit=1,
    )
    return not heard.events
