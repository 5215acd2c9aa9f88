"""`sustain up`: one command serves, schedules and works, and leaves nothing behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from deployed import ask, in_session, marked
from worlds import World, free, lay_out

PATIENCE = 240.0
USER, PASSWORD, SECRET = "ada", "a long enough secret", "kitty:another secret"


@dataclass(frozen=True)
class Up:
    """A `sustain up` that runs; `mark` is in the environment of all that it started."""

    process: subprocess.Popen[str]
    command: list[str]
    mark: str
    log: Path
    host: str
    mlflow: int
    prefect: int
    webhook: int

    def url(self, port: int, path: str) -> str:
        return f"http://{self.host}:{port}{path}"

    def prefect_says(self, path: str, body: dict[str, Any]) -> Any:
        return ask(self.url(self.prefect, "/api"), path, body)

    def family(self) -> dict[int, str]:
        """Find the living processes with the mark, with their command lines."""
        return marked(self.mark)


def wait_for(what: str, look: Callable[[], Any], up: Up) -> Any:
    """Return the first answer that is not empty."""
    end = time.monotonic() + PATIENCE
    while not (seen := look()):
        assert up.process.poll() is None, up.log.read_text()
        assert time.monotonic() < end, f"no {what} within {PATIENCE:.0f} s"
        time.sleep(0.5)
    return seen


@contextmanager
def started(settings: Path, *options: str, host: str = "127.0.0.1", **more: str) -> Iterator[Up]:
    """Start it, wait until it says that it is there, and end it if the test does not."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_"))}
    mark, log, ports = (
        f"UP_TEST={settings.parent}",
        settings.parent / "up.txt",
        [free() for _ in "123"],
    )
    named = zip(("--mlflow-port", "--prefect-port", "--webhook-port"), map(str, ports), strict=True)
    command = [sys.executable, "-m", "flows.cli", "up", "-s", str(settings), "--host", host]
    command += [*options, *(word for option in named for word in option)]
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            env={**kept, **more, "UP_TEST": str(settings.parent), "COLUMNS": "200"},
            stdout=file,
            stderr=subprocess.STDOUT,
            text=True,
        )
    up = Up(process, command, mark, log, host, *ports)
    try:
        wait_for("addresses", lambda: "Ctrl-C stops" in log.read_text(), up)
        yield up
    finally:
        process.kill()
        process.wait()


def laid_out(folder: Path, name: str, extra: str = "") -> World:
    """Lay a model of digits out, whose Prefect lives in its own folder."""
    more = f'\n[servers]\nprefect_home = "prefect"\n{extra}'
    return World(lay_out(folder / name, name, more))


def bootstrap(up: Up, world: World, **more: str) -> None:
    """Make the first version, by the command, on the servers that run."""
    servers = {
        "SUSTAIN_SERVERS_MLFLOW": up.url(up.mlflow, ""),
        "SUSTAIN_SERVERS_PREFECT": up.url(up.prefect, "/api"),
    }
    settings, data = str(world.path), str(world.path.parent / "first")
    subprocess.run(
        [sys.executable, "-m", "flows.cli", "bootstrap", "-s", settings, "--data", data],
        env={**os.environ, **servers, **more},
        check=True,
        timeout=PATIENCE,
    )


def ended(up: Up) -> dict[int, str]:
    """Wait until no process is left, and return those that are."""
    end = time.monotonic() + 30
    while (left := up.family()) and time.monotonic() < end:
        time.sleep(0.2)
    return left


@pytest.mark.nightly
def test_up_is_alone_asks_for_credentials_and_leaves_nothing(tmp_path: Path) -> None:
    """Nothing answers without credentials, no log holds them, Ctrl-C ends every process.

    The address is loopback's, and not this machine's usual one: so others might call.
    """
    small = laid_out(tmp_path, "open", "\n[schedule]\nwatch = 0\n")
    credentials = {
        "MLFLOW_TRACKING_USERNAME": USER,
        "MLFLOW_TRACKING_PASSWORD": PASSWORD,
        "PREFECT_API_AUTH_STRING": SECRET,
    }
    proxy = "https://models.example.org"
    with started(small.path, "--name", proxy, host="127.0.0.2", **credentials) as up:
        second = subprocess.run(
            up.command,
            env={**os.environ, **credentials},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        said = " ".join(second.stderr.split())
        assert second.returncode == 1
        assert f"`sustain up` runs already for {small.path.parent}" in said
        assert f"(process {up.process.pid})" in said

        mlflow = up.url(up.mlflow, "/api/2.0/mlflow/experiments/search?max_results=5")
        prefect = up.url(up.prefect, "/api/deployments/filter")
        metrics = up.url(up.webhook, "/metrics")
        login, kitty = (USER, PASSWORD), ("kitty", "another secret")
        for wrong in (None, (USER, "wrong"), ("", "")):
            assert httpx.get(mlflow, auth=wrong).status_code == 401
            assert httpx.post(prefect, json={}, auth=wrong).status_code == 401
            assert httpx.get(metrics, auth=wrong).status_code == 401
        assert httpx.get(mlflow, auth=login).json()["experiments"]
        deployed = httpx.post(prefect, json={}, auth=kitty)
        assert {one["name"] for one in deployed.json()} == {"open"}
        workers = up.url(up.prefect, "/api/work_pools/sustain/workers/filter")
        assert [w["status"] for w in httpx.post(workers, json={}, auth=kitty).json()] == ["ONLINE"]
        bootstrap(up, small, **credentials)
        serves = 'sustain_champion_version{model="open"} 1.0'
        wait_for("champion", lambda: serves in httpx.get(metrics, auth=login, timeout=60).text, up)
        # a page of somebody else's is not let in, nor a name that is not ours
        stranger = {"Origin": "https://evil.example"}
        answer = httpx.post(prefect, json={}, auth=kitty, headers=stranger)
        assert "access-control-allow-origin" not in answer.headers
        rebound = httpx.get(mlflow, auth=login, headers={"Host": "evil.example"})
        assert rebound.status_code == 403
        # through the proxy that was named a page may move an alias, and finds Prefect's API
        page = {"Origin": proxy, "Host": "models.example.org"}
        alias = up.url(up.mlflow, "/api/2.0/mlflow/registered-models/alias")
        move = {"name": "open", "alias": "tried", "version": "1"}
        assert httpx.post(alias, json=move, auth=login, headers=page).status_code == 200
        assert httpx.post(alias, json=move, auth=login, headers=stranger).status_code == 403
        answer = httpx.post(prefect, json={}, auth=kitty, headers=page)
        assert answer.headers["access-control-allow-origin"] == proxy
        assert httpx.get(up.url(up.prefect, "/ui-settings")).json()["api_url"] == "/api"

        for file in (*(small.path.parent / "logs").iterdir(), up.log):
            text = file.read_text(errors="replace")
            assert PASSWORD not in text
            assert "another secret" not in text
        family = up.family()
        assert len(family) >= 6  # the command's two, MLflow, Prefect, the worker, the receiver
        (server,) = (pid for pid, line in family.items() if "-m mlflow server" in line)
        assert len(in_session(server)) == 2  # itself and one worker
        assert not [line for line in family.values() if PASSWORD in line or "another sec" in line]
        up.process.send_signal(signal.SIGINT)
        assert up.process.wait(timeout=60) == 0
        assert not ended(up)


@pytest.mark.nightly
def test_a_feed_that_drifts_gets_a_new_champion_by_itself(tmp_path: Path) -> None:
    """Scheduled runs find the drift, the event starts a retraining, version 2 serves."""
    small = laid_out(tmp_path, "growing", "\n[schedule]\nwatch = 15\n[logs]\nformat = 'json'\n")
    with started(small.path) as up:
        registered = up.url(up.mlflow, "/api/2.0/mlflow/registered-models/alias")

        def champion() -> str:
            answer = httpx.get(registered, params={"name": "growing", "alias": "champion"})
            return str(answer.json()["model_version"]["version"])

        def checks() -> list[str]:
            search = up.url(up.mlflow, "/api/2.0/mlflow/runs/search")
            experiments = up.url(up.mlflow, "/api/2.0/mlflow/experiments/get-by-name")
            found = httpx.get(experiments, params={"experiment_name": "sustain/growing"}).json()
            body = {
                "experiment_ids": [found["experiment"]["experiment_id"]],
                "filter": "tags.`sustain.kind` = 'check' and attributes.status = 'FINISHED'",
            }
            runs = httpx.post(search, json=body).json().get("runs", [])
            tags = [{t["key"]: t["value"] for t in run["data"]["tags"]} for run in runs]
            return [one["sustain.batch"] for one in tags if one["sustain.champion"] == "1"]

        bootstrap(up, small)
        assert champion() == "1"
        small.arrive(0)
        wait_for("check", lambda: checks() == ["optical-01"], up)
        small.arrive(1, 2, labelled=True)
        wait_for("champion", lambda: champion() == "2", up)
        assert sorted(checks()) == ["optical-01", "optical-02", "optical-03"]  # each once

        runs = up.prefect_says("/flow_runs/filter", {"limit": 200})
        flows = {one["id"]: one["name"] for one in up.prefect_says("/flows/filter", {})}
        deployed = [one for one in runs if one["deployment_id"]]
        (trained,) = (one for one in deployed if flows[one["flow_id"]] == "retrain")
        assert trained["created_by"]["type"] == "AUTOMATION"
        watched = [one for one in deployed if flows[one["flow_id"]] == "watch"]
        assert {one["created_by"]["type"] for one in watched} == {"SCHEDULE"}
        failed = [one for one in runs if one["state_type"] in ("FAILED", "CRASHED")]
        assert all("has no champion" in one["state"]["message"] for one in failed)  # too early
        log = small.path.parent / "logs/worker.log"
        promoted = re.compile(r'\{"time".*"event": "promoted".*"version": 2.*\}')
        wait_for("line of it", lambda: promoted.search(log.read_text()), up)
        os.kill(up.process.pid, signal.SIGKILL)
        up.process.wait()
        assert not ended(up)


@pytest.mark.nightly
def test_a_silent_run_is_marked_and_its_slot_freed(tmp_path: Path) -> None:
    """A flow that gives no sign of life: in under 3 minutes it is crashed, and another goes."""
    small = laid_out(tmp_path, "orphan", "\n[schedule]\nwatch = 0\n")
    small.arrive(0)
    with started(small.path) as up:
        bootstrap(up, small)
        (watch,) = (
            one
            for one in up.prefect_says("/deployments/filter", {})
            if one["entrypoint"] == "flows.watch.watch"
        )

        def create() -> str:
            path = f"/deployments/{watch['id']}/create_flow_run"
            return str(up.prefect_says(path, {})["id"])

        def state(run: str) -> str:
            (one,) = up.prefect_says("/flow_runs/filter", {"flow_runs": {"id": {"any_": [run]}}})
            return str(one["state_type"])

        run = create()
        wait_for("run", lambda: state(run) == "RUNNING", up)
        flow = next(p for p, line in up.family().items() if "engine" in line)
        os.kill(flow, signal.SIGSTOP)  # dead to the world, while its worker sees it alive
        start = time.monotonic()
        wait_for("crash", lambda: state(run) == "CRASHED", up)
        another = create()
        wait_for("another run", lambda: state(another) == "COMPLETED", up)
        assert time.monotonic() - start < 180
