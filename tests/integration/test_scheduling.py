"""The deployments of deployments/prefect.yaml on a real Prefect server.

A healthy server alone shows nothing: with SQLAlchemy 2.1 it is healthy, and schedules no run.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from deployed import FILE, ROOT, ask, deployments, wait_for

from flows.records import CHAMPION
from flows.registry import Registry
from flows.settings import load_settings
from flows.watch import watch

MODEL = "digits"
FLOWS = ("watch", "retrain", "adapt", "promote", "rollback", "prune", "reconcile")
SCHEDULED = ("watch", "prune", "reconcile")


def test_deployments_name_the_model_of_the_example_settings() -> None:
    """The two files agree, so `flows.watch` finds `retrain/<model>`."""
    written = yaml.safe_load(FILE.read_text())["deployments"]
    settings = load_settings(FILE.parent / "sustain.toml", environ={})
    assert {d["name"] for d in written} == {settings.model.name}
    assert [d["entrypoint"] for d in written] == [f"flows/{f}.py:{f}" for f in FLOWS]
    paths = {d["parameters"]["settings_path"] for d in written}
    assert {(ROOT / path).resolve() for path in paths} == {settings.path}


def test_deployments_are_scheduled_and_started_once(
    prefect_server: str, small_world: Callable[[str], Any], tmp_path: Path
) -> None:
    """A schedule makes runs, deploying again changes nothing, and drift starts one retraining."""
    world = small_world(MODEL)
    ours = deployments(prefect_server, tmp_path, MODEL, world.path)
    ours.make_pool()
    ours.deploy()
    first = ours.found()
    assert set(first) == set(FLOWS)
    assert {d["name"] for d in first.values()} == {MODEL}
    for name in FLOWS:
        strategy = "CANCEL_NEW" if name == "watch" else "ENQUEUE"
        assert first[name]["global_concurrency_limit"]["limit"] == 1
        assert first[name]["concurrency_options"]["collision_strategy"] == strategy

    scheduled = wait_for("scheduled run", lambda: ours.runs(first["watch"]["id"]))
    assert {run["state_type"] for run in scheduled} == {"SCHEDULED"}
    assert scheduled[0]["parameters"]["settings_path"] == str(world.path)
    assert not ours.runs(first["retrain"]["id"])

    ours.deploy()
    again = ours.found()
    assert {n: d["id"] for n, d in again.items()} == {n: d["id"] for n, d in first.items()}
    for name in FLOWS:
        schedules = [[s["id"] for s in d[name]["schedules"]] for d in (first, again)]
        assert schedules[0] == schedules[1]
        assert len(schedules[0]) == (name in SCHEDULED)

    world.arrive(0, 1, labelled=True)
    assert watch(str(world.path)).done.startswith(f"told the deployment retrain/{MODEL}")
    (run,) = wait_for("run of retrain", lambda: ours.runs(first["retrain"]["id"]))
    told = f"the deployment retrain/{MODEL} was started ({run['name']})"
    assert watch(str(world.path)).done == told  # the same run: it waits for a worker
    assert len(ours.runs(first["retrain"]["id"])) == 1
    assert run["parameters"]["cause"] == "drift in batch optical-02"
    event = wait_for("event", lambda: drift_events(prefect_server))[0]
    assert event["payload"]["window"] == "optical-02"
    assert event["payload"]["champion"] == 1

    # a worker runs what was deployed, from the folder that it was deployed from
    ours.work(first["retrain"]["id"])
    assert Registry(world.settings).alias(CHAMPION) == 2


def drift_events(server: str) -> list[dict[str, Any]]:
    """Return the events that say that this model's data drifted."""
    wanted = {"event": {"name": ["drift.detected"]}, "resource": {"id": [f"drift.model.{MODEL}"]}}
    found: list[dict[str, Any]] = ask(server, "/events/filter", {"filter": wanted})["events"]
    return found
