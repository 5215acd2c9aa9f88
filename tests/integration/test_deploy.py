"""`sustain deploy` on a real Prefect server: once is as good as twice, and nothing is repeated."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from deployed import ask
from prefect import get_client
from prefect.events.actions import RunDeployment
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.states import Pending, Running, Scheduled

from flows.deploy import GUARD, DeployError, deploy
from flows.reconcile import reconcile
from flows.records import CheckKey
from flows.registry import Registry
from flows.settings import load_settings

if TYPE_CHECKING:
    from worlds import World

POOL = "deploy-test"
FLOWS = ("watch", "retrain", "adapt", "promote", "rollback", "prune", "reconcile")


def written(folder: Path, name: str, more: str = "") -> Any:
    """Write settings, and read them."""
    path = folder / f"{name}.toml"
    path.write_text(f'[model]\nname = "{name}"\n{more}')
    return load_settings(path, environ={})


def state_of(server: str) -> dict[str, Any]:
    """Everything that a deployment leaves on the server, as the API tells it."""
    found = ask(server, "/deployments/filter", {"work_pools": {"name": {"any_": [POOL]}}})
    flows = {one["id"]: one["name"] for one in ask(server, "/flows/filter", {})}
    automations = ask(server, "/automations/filter", {})
    ours = [a for a in automations if a["name"] == GUARD or "on drift" in a["name"]]
    return {
        "deployments": {f"{flows[one['flow_id']]}/{one['name']}": one for one in found},
        "automations": {one["name"]: one["id"] for one in ours},
        "count": len(ours),
    }


def frozen(state: dict[str, Any]) -> dict[str, Any]:
    """What must not change when nothing was edited: ids, versions, schedules, times of update."""
    kept = ("id", "version", "version_id", "updated", "schedules", "tags", "parameters")
    deployments = {
        name: {key: one.get(key) for key in kept} for name, one in state["deployments"].items()
    }
    return {**state, "deployments": deployments}


def test_deploying_again_changes_nothing_and_without_a_model_removes_it(
    prefect_server: str, tmp_path: Path
) -> None:
    """Ids, versions, schedules and automations stay; an edit changes what it is about alone."""
    a = written(tmp_path, "a", '[schedule]\nwatch = "*/7 6-20 * * *"\ntimezone = "Europe/Berlin"\n')
    b = written(tmp_path, "b", "[schedule]\nwatch = 45\nprune = ''\n")
    first = deploy([a, b], POOL)
    assert len(first.made) == 2 * len(FLOWS)
    state = state_of(prefect_server)
    there = state["deployments"]
    assert set(there) == {f"{flow}/{model}" for flow in FLOWS for model in "ab"}
    (schedule,) = there["watch/a"]["schedules"]
    assert (schedule["schedule"]["cron"], schedule["schedule"]["timezone"]) == (
        "*/7 6-20 * * *",
        "Europe/Berlin",
    )
    (schedule,) = there["watch/b"]["schedules"]
    assert schedule["schedule"]["interval"] == 45
    assert not there["prune/b"]["schedules"]
    assert len(there["reconcile/b"]["schedules"]) == 1
    assert there["retrain/a"]["concurrency_options"]["collision_strategy"] == "ENQUEUE"
    assert there["retrain/a"]["global_concurrency_limit"]["limit"] == 1
    assert set(state["automations"]) == {GUARD, "retrain/a on drift", "retrain/b on drift"}

    again = deploy([b, a], POOL)
    assert (again.made, again.changed, again.removed) == ((), (), ())
    assert len(again.same) == 2 * len(FLOWS)
    assert frozen(state_of(prefect_server)) == frozen(state)

    edited = written(tmp_path, "b", "[schedule]\nwatch = 0\nprune = '0 5 * * *'\n")
    assert set(deploy([a, edited], POOL).changed) == {"watch/b", "prune/b"}
    after = state_of(prefect_server)
    assert not after["deployments"]["watch/b"]["schedules"]
    assert len(after["deployments"]["prune/b"]["schedules"]) == 1
    ids = {name: one["id"] for name, one in after["deployments"].items()}
    assert ids == {name: one["id"] for name, one in there.items()}
    assert after["automations"] == state["automations"]

    elsewhere = "deploy-test-elsewhere"
    deploy([b], elsewhere)  # moves it there
    left = deploy([a], POOL)
    assert left.removed == ()
    gone = deploy([written(tmp_path, "c")], elsewhere)
    assert set(gone.removed) == {f"{flow}/b" for flow in FLOWS}
    final = state_of(prefect_server)
    assert set(final["deployments"]) == {f"{flow}/a" for flow in FLOWS}
    assert "retrain/b on drift" not in final["automations"]
    with pytest.raises(DeployError, match="two of the settings are of a model called 'a'"):
        deploy([a, a], POOL)


def test_a_trigger_that_went_is_made_again(prefect_server: str, tmp_path: Path) -> None:
    """Deleted by hand, or never made by a deploy that was killed: deploying brings it back, once.

    The deployment itself is as it should be, and another automation about it does not count.
    """
    pool = "trigger-test"
    model = written(tmp_path, "t")
    deploy([model], pool)
    with get_client(sync_client=True) as client:
        deployment = client.read_deployment_by_name("retrain/t")
        (automation,) = client.read_automations_by_name("retrain/t on drift")
        client.create_automation(
            AutomationCore(
                name="another's",
                trigger=EventTrigger(expect={"another"}, posture=Posture.Reactive, threshold=1),
                actions=[RunDeployment(source="selected", deployment_id=deployment.id)],
            )
        )
        client.delete_automation(automation.id)
        assert deploy([model], pool).changed == ("retrain/t",)
        (again,) = client.read_automations_by_name("retrain/t on drift")
        assert deploy([model], pool).changed == ()
        assert client.read_automations_by_name("retrain/t on drift") == [again]
        assert client.read_deployment(deployment.id).name == "t"
    assert prefect_server


def test_retrainings_may_run_in_another_work_pool(prefect_server: str, tmp_path: Path) -> None:
    """They alone go there; they are found there again, and removed with their model."""
    pool, gpus = "main-test", "gpu-test"
    model = written(tmp_path, "g", f'[schedule]\nretrain_pool = "{gpus}"\n')
    assert len(deploy([model], pool).made) == len(FLOWS)

    def where() -> dict[str, str]:
        found = ask(
            prefect_server, "/deployments/filter", {"deployments": {"name": {"any_": ["g"]}}}
        )
        return {one["entrypoint"].rpartition(".")[2]: one["work_pool_name"] for one in found}

    assert where() == {flow: gpus if flow == "retrain" else pool for flow in FLOWS}
    assert len(deploy([model], pool).same) == len(FLOWS)
    assert deploy([written(tmp_path, "h")], gpus).removed == ()  # these are not its own
    assert len(deploy([written(tmp_path, "i")], pool).removed) == len(FLOWS)
    assert where() == {}


@pytest.mark.nightly
def test_a_worker_that_was_away_catches_up_once(
    small_world: Callable[[str], World], prefect_server: str, tmp_path: Path
) -> None:
    """Of a day of late runs one checks each batch, once; the others are let go, and none fails."""
    world = small_world("late")
    world.arrive(0, 1)
    pool = "late-test"
    deploy([world.settings], pool)
    yesterday = datetime.now(UTC) - timedelta(days=1)
    with get_client(sync_client=True) as client:
        deployment = client.read_deployment_by_name("watch/late")
        for hour in range(24):
            late = Scheduled(scheduled_time=yesterday + timedelta(hours=hour))
            client.create_flow_run_from_deployment(deployment.id, state=late)
    worker = [sys.executable, "-m", "prefect", "worker", "start", "--pool", pool, "--run-once"]
    environment = {
        **os.environ,
        "PREFECT_API_URL": prefect_server,
        "PREFECT_HOME": str(tmp_path / "home"),
    }
    states: Counter[str] = Counter()
    for _ in range(5):  # it asks the server once, perhaps before the runs are handed out
        subprocess.run(
            [*worker, "--install-policy", "never"], env=environment, check=True, timeout=300
        )
        body = {"flow_runs": {"deployment_id": {"any_": [str(deployment.id)]}}, "limit": 200}
        runs = ask(prefect_server, "/flow_runs/filter", body)
        states = Counter(one["state_type"] for one in runs if not one["auto_scheduled"])
        if set(states) <= {"COMPLETED", "CANCELLED"}:
            break
    assert set(states) == {"COMPLETED", "CANCELLED"}
    assert states.total() == 24
    assert states["COMPLETED"] <= 3
    registry = Registry(world.settings)
    kinds = Counter(run.data.tags["sustain.batch"] for run in registry._runs("check", {}))
    assert kinds == {"optical-01": 1, "optical-02": 1}


@pytest.mark.nightly
def test_what_a_dead_worker_left_is_ended_and_its_slot_freed(
    small_world: Callable[[str], World], prefect_server: str
) -> None:
    """A run without a sign of life crashes, one with it stays; so do young runs of MLflow's."""
    world = small_world("dead")
    deploy([world.settings], "dead-test")
    registry = Registry(world.settings)
    with get_client(sync_client=True) as client:
        deployment = client.read_deployment_by_name("retrain/dead")
        dead = client.create_flow_run_from_deployment(deployment.id)
        waiting = client.create_flow_run_from_deployment(deployment.id)
        for state in (Pending(), Running()):
            client.set_flow_run_state(dead.id, state)
        assert client.set_flow_run_state(waiting.id, Pending()).status.value != "ACCEPT"
        check = registry.begin_check(CheckKey(1, "b", "digest"), "stamp")
        training = registry.begin_training("killed", {})

        spared = reconcile(str(world.path), silent_seconds=3600)
        assert spared.crashed == ()
        assert spared.ended == ()  # they may belong to the run that may be alive

        done = reconcile(str(world.path), silent_seconds=0)
        assert done.crashed == (dead.name,)
        assert set(done.ended) == {check, training}
        assert client.read_flow_run(dead.id).state.name == "Crashed"
        assert client.set_flow_run_state(waiting.id, Pending()).status.value == "ACCEPT"
    assert {registry.client.get_run(one).info.status for one in done.ended} == {"KILLED"}
    assert reconcile(str(world.path), silent_seconds=3600).ended == ()
    assert prefect_server
