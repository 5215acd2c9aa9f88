"""The deployments of deployments/prefect.yaml for a test's own model and work pool."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).parents[1]
FILE = ROOT / "deployments" / "prefect.yaml"
PATIENCE = 120.0


@dataclass(frozen=True)
class Deployments:
    """Those of one model on a real server, whose API's address is `server`.

    `home` is a PREFECT_HOME of the test's own, `file` the edited prefect.yaml.
    """

    server: str
    home: Path
    file: Path
    pool: str

    def prefect(self, *words: str) -> str:
        """Run Prefect's command line at the repository's root, as the file's header has it."""
        environment = {
            **os.environ,
            "PREFECT_API_URL": self.server,
            "PREFECT_HOME": str(self.home),
        }
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

    def make_pool(self) -> None:
        """Make the work pool."""
        self.prefect("work-pool", "create", "--type", "process", self.pool)

    def deploy(self, *which: str) -> None:
        """Deploy all of the file, or what `which` selects."""
        self.prefect("deploy", *(which or ("--all",)), "--prefect-file", str(self.file))

    def found(self) -> dict[str, dict[str, Any]]:
        """Return every deployment of the pool, by flow."""
        wanted = {"work_pools": {"name": {"any_": [self.pool]}}}
        found = ask(self.server, "/deployments/filter", wanted)
        names = {flow["id"]: flow["name"] for flow in ask(self.server, "/flows/filter", {})}
        return {names[one["flow_id"]]: one for one in found}

    def runs(self, deployment_id: str) -> list[dict[str, Any]]:
        """Return a deployment's flow runs."""
        body = {"flow_runs": {"deployment_id": {"any_": [deployment_id]}}}
        found: list[dict[str, Any]] = ask(self.server, "/flow_runs/filter", body)
        return found

    def work(self, deployment_id: str) -> dict[str, Any]:
        """Let a worker do the deployment's one run; return that, completed."""
        once = ("--run-once", "--limit", "1", "--install-policy", "never")
        for _ in range(5):  # it asks once: on a busy machine before the run is handed out
            said = self.prefect("worker", "start", "--pool", self.pool, *once)
            (run,) = self.runs(deployment_id)
            if run["state_type"] not in ("SCHEDULED", "PENDING"):
                break
        assert run["state_type"] == "COMPLETED", (run["state"], said)
        return run


def deployments(server: str, folder: Path, model: str, settings_path: Path) -> Deployments:
    """Write the file for a model, by changing each thing in the one place where it is."""
    text, pool = FILE.read_text(), f"{model}-test"
    changes = {
        "&model parts ": f"&model {model} ",
        "model:parts": f"model:{model}",
        "drift.model.parts": f"drift.model.{model}",
        "settings_path: deployments/sustain.toml": f"settings_path: {settings_path}",
        "name: sustain\n": f"name: {pool}\n",
        "interval: 600 ": "interval: 15 ",
    }
    for old, new in changes.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path = folder / "prefect.yaml"
    path.write_text(text)
    return Deployments(server, folder / "home", path, pool)


def marked(mark: str) -> dict[int, str]:
    """Find the living processes with `NAME=value` in their environment, with command lines."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (folder / "environ").read_text(errors="replace").split("\0"):
                found[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
        except OSError:
            continue
    return found


def in_session(leader: int) -> list[int]:
    """Find the living processes of a session: all that was started by what leads it."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if os.getsid(int(folder.name)) == leader:
                found.append(int(folder.name))
    return found


def ask(server: str, path: str, body: dict[str, Any]) -> Any:
    """Post a query to Prefect's API, again while its database is locked, as its own client does."""
    end = time.monotonic() + PATIENCE
    while (answer := httpx.post(f"{server}{path}", json=body, timeout=60)).status_code == 503:
        assert time.monotonic() < end, answer.text
        time.sleep(1)
    answer.raise_for_status()
    return answer.json()


def wait_for(what: str, look: Callable[[], Any]) -> Any:
    """Return the first answer that is not empty."""
    end = time.monotonic() + PATIENCE
    while not (seen := look()):
        assert time.monotonic() < end, f"no {what} within {PATIENCE:.0f} s"
        time.sleep(0.5)
    return seen
