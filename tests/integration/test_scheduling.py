"""The deployments of deployments/prefect.yaml on a real Prefect server.

A healthy server alone shows nothing: with SQLAlchemy 2.1 it is healthy, and schedules no run.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import yaml

from flows.registry import CHAMPION, Registry
from flows.settings import load_settings
from flows.watch import watch

ROOT = Path(__file__).parents[2]
FILE = ROOT / "deployments" / "prefect.yaml"
MODEL, POOL = "digits", "scheduling-test"
FLOWS = ("watch", "retrain", "adapt", "promote", "rollback", "prune", "reconcile")
SCHEDULED = ("watch", "prune", "reconcile")
PATIENCE = 120.0


def ask(server: str, path: str, body: dict[str, Any]) -> Any:
    """Post a query to Prefect's API."""
    answer = httpx.post(f"{server}{path}", json=body, timeout=30)
    answer.raise_for_status()
    return answer.json()


def prefect(server: str, home: Path, *words: str) -> str:
    """Run Prefect's command line at the repository's root, as the header of the file has it."""
    environment = {**os.environ, "PREFECT_API_URL": server, "PREFECT_HOME": str(home)}
    done = subprocess.run(
        [sys.executable, "-m", "prefect", "--no-prompt", *words],
        cwd=ROOT,
        env=environment,
        check=False,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def deployed(server: str) -> dict[str, dict[str, Any]]:
    """Return every deployment of the test's pool, by flow."""
    found = ask(
        server,
        "/deployments/filter",
        {"work_pools": {"name": {"any_": [POOL]}}},
    )
    names = {f["id"]: f["name"] for f in ask(server, "/flows/filter", {})}
    return {names[d["flow_id"]]: d for d in found}


def runs(server: str, deployment_id: str) -> list[dict[str, Any]]:
    """Return a deployment's flow runs."""
    body = {"flow_runs": {"deployment_id": {"any_": [deployment_id]}}}
    found: list[dict[str, Any]] = ask(server, "/flow_runs/filter", body)
    return found


def wait_for(what: str, look: Callable[[], Any]) -> Any:
    """Return the first answer that is not empty."""
    end = time.monotonic() + PATIENCE
    while not (seen := look()):
        assert time.monotonic() < end, f"no {what} within {PATIENCE:.0f} s"
        time.sleep(0.5)
    return seen


def edited(tmp_path: Path, settings_path: Path) -> Path:
    """Write the file for the test's model, by changing each thing in the one place where it is."""
    text = FILE.read_text()
    changes = {
        "&model parts ": f"&model {MODEL} ",
        "model:parts": f"model:{MODEL}",
        "drift.model.parts": f"drift.model.{MODEL}",
        "settings_path: deployments/sustain.toml": f"settings_path: {settings_path}",
        "name: sustain\n": f"name: {POOL}\n",
        "interval: 600 ": "interval: 15 ",
    }
    for old, new in changes.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path = tmp_path / "prefect.yaml"
    path.write_text(text)
    return path


def test_deployments_name_the_model_of_the_example_settings() -> None:
    """The two files agree, so `flows.watch` finds `retrain/<model>`."""
    deployments = yaml.safe_load(FILE.read_text())["deployments"]
    settings = load_settings(FILE.parent / "sustain.toml", environ={})
    assert {d["name"] for d in deployments} == {settings.model.name}
    assert [d["entrypoint"] for d in deployments] == [f"flows/{f}.py:{f}" for f in FLOWS]
    paths = {d["parameters"]["settings_path"] for d in deployments}
    assert {(ROOT / path).resolve() for path in paths} == {settings.path}


def test_deployments_are_scheduled_and_started_once(
    prefect_server: str, small_world: Callable[[str], Any], tmp_path: Path
) -> None:
    """A schedule makes runs, deploying again changes nothing, and drift starts one retraining."""
    world = small_world(MODEL)
    home = tmp_path / "home"
    deploy = ("deploy", "--all", "--prefect-file", str(edited(tmp_path, world.path)))
    prefect(prefect_server, home, "work-pool", "create", "--type", "process", POOL)
    prefect(prefect_server, home, *deploy)
    first = deployed(prefect_server)
    assert set(first) == set(FLOWS)
    assert {d["name"] for d in first.values()} == {MODEL}
    for name in FLOWS:
        strategy = "CANCEL_NEW" if name == "watch" else "ENQUEUE"
        assert first[name]["global_concurrency_limit"]["limit"] == 1
        assert first[name]["concurrency_options"]["collision_strategy"] == strategy

    scheduled = wait_for("scheduled run", lambda: runs(prefect_server, first["watch"]["id"]))
    assert {run["state_type"] for run in scheduled} == {"SCHEDULED"}
    assert scheduled[0]["parameters"]["settings_path"] == str(world.path)
    assert not runs(prefect_server, first["retrain"]["id"])

    prefect(prefect_server, home, *deploy)
    again = deployed(prefect_server)
    assert {n: d["id"] for n, d in again.items()} == {n: d["id"] for n, d in first.items()}
    for name in FLOWS:
        schedules = [[s["id"] for s in d[name]["schedules"]] for d in (first, again)]
        assert schedules[0] == schedules[1]
        assert len(schedules[0]) == (name in SCHEDULED)

    world.arrive(0, 1, labelled=True)
    assert watch(str(world.path)).done.startswith(f"told the deployment retrain/{MODEL}")
    (run,) = wait_for("run of retrain", lambda: runs(prefect_server, first["retrain"]["id"]))
    told = f"the deployment retrain/{MODEL} was started ({run['name']})"
    assert watch(str(world.path)).done == told  # the same run: it waits for a worker
    assert len(runs(prefect_server, first["retrain"]["id"])) == 1
    assert run["parameters"]["cause"] == "drift in batch optical-02"
    event = wait_for("event", lambda: drift_events(prefect_server))[0]
    assert event["payload"]["window"] == "optical-02"
    assert event["payload"]["champion"] == 1

    # a worker runs what was deployed, from the folder that it was deployed from
    once = ("--run-once", "--limit", "1", "--install-policy", "never")
    for _ in range(5):  # it asks the server once: on a busy machine before the run is handed out
        ran = prefect(prefect_server, home, "worker", "start", "--pool", POOL, *once)
        (run,) = runs(prefect_server, first["retrain"]["id"])
        if run["state_type"] == "COMPLETED":
            break
    assert run["state_type"] == "COMPLETED", ran
    assert Registry(world.settings).alias(CHAMPION) == 2


def drift_events(server: str) -> list[dict[str, Any]]:
    """Return the events that say that this model's data drifted."""
    wanted = {"event": {"name": ["drift.detected"]}, "resource": {"id": [f"drift.model.{MODEL}"]}}
    found: list[dict[str, Any]] = ask(server, "/events/filter", {"filter": wanted})["events"]
    return found
