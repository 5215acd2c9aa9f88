"""Prefect's and MLflow's servers: is one there, and show what is on record."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from rich.console import Console

from flows.settings import Settings

CONNECT_SECONDS = 5.0
START_SECONDS = 120.0


class ServerError(RuntimeError):
    """A server does not answer; the message says which address and what to check."""


def require_prefect(settings: Settings) -> None:
    """Make sure that the Prefect server that is named answers.

    With none named, Prefect starts one for the time of the command, and there is nothing to check.

    Raises:
        ServerError: within seconds, rather than after Prefect's own long wait.
    """
    url = settings.servers.prefect or os.environ.get("PREFECT_API_URL", "")
    if url and (problem := unreachable(f"{url.rstrip('/')}/health")):
        raise ServerError(
            f"Prefect at {url} {problem}: is the server running, and is [servers] prefect (or"
            " PREFECT_API_URL) right? Leave it empty to run without a server"
        )


def unreachable(url: str, timeout: float = CONNECT_SECONDS) -> str | None:
    """Say why an address is of no use, if so: "does not answer within ...", "answers with ..."."""
    try:
        with urllib.request.urlopen(url, timeout=timeout):  # noqa: S310 - the user's own address
            return None
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):  # it is there; the client's own credentials decide
            return None
        return f"answers with an error ({error})"
    except (urllib.error.URLError, OSError, ValueError) as error:
        return f"does not answer within {timeout:.0f} s ({error})"


def show(settings: Settings, *, mlflow_port: int, prefect_port: int) -> None:
    """Start both UIs on what is on record, on loopback, until Ctrl-C.

    A server that the settings name is not started again: its address is printed.
    """
    console = Console()
    logs = settings.root / "logs"
    started: list[subprocess.Popen[bytes]] = []
    # a shell that starts a command in the background lets it ignore Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    mlflow, prefect = settings.mlflow_uri, settings.servers.prefect.removesuffix("/api")
    try:
        with console.status("starting MLflow's and Prefect's UIs"):
            if not mlflow.startswith("http"):
                mlflow = f"http://127.0.0.1:{mlflow_port}"
                started.append(start_mlflow(settings, mlflow_port, logs))
            if not prefect:
                prefect = f"http://127.0.0.1:{prefect_port}"
                started.append(start_prefect(prefect_port, logs))
            wait_until_healthy(f"{mlflow}/health", "MLflow", started, logs)
            wait_until_healthy(f"{prefect}/api/health", "Prefect", started, logs)
        console.print(
            f"MLflow   {mlflow}/#/models/{settings.model.name}  (versions, roll back here)"
        )
        console.print(f"         {mlflow}/#/experiments  (checks and drift reports)")
        console.print(f"Prefect  {prefect}/runs  (flow runs; artifacts under {prefect}/artifacts)")
        console.print("Ctrl-C stops both")
        while all(process.poll() is None for process in started):
            time.sleep(0.5)
        raise ServerError(f"a server stopped by itself; its log is in {logs}")
    except KeyboardInterrupt:
        console.print("stopping")
    finally:
        stop(started)


def start_mlflow(settings: Settings, port: int, logs: Path) -> subprocess.Popen[bytes]:
    """Start MLflow's server on the settings' own database, small: one worker, no job runner."""
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    command = [
        *(sys.executable, "-m", "mlflow", "server", "--workers", "1"),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--backend-store-uri", settings.mlflow_uri),
        *("--default-artifact-root", (settings.root / "mlartifacts").resolve().as_uri()),
    ]
    return _start(command, environment, logs / "mlflow.log")


def start_prefect(port: int, logs: Path) -> subprocess.Popen[bytes]:
    """Start Prefect's server on the database of this environment's PREFECT_HOME."""
    address = f"http://127.0.0.1:{port}/api"
    environment = {**os.environ, "PREFECT_API_URL": address, "PREFECT_UI_API_URL": address}
    command = [
        *(sys.executable, "-m", "prefect", "server", "start"),
        *("--host", "127.0.0.1", "--port", str(port)),
    ]
    return _start(command, environment, logs / "prefect.log")


def wait_until_healthy(
    url: str, name: str, started: list[subprocess.Popen[bytes]], logs: Path
) -> None:
    """Wait until an address answers; raises ServerError when it does not, or when a server ends."""
    end = time.monotonic() + START_SECONDS
    while unreachable(url, timeout=1.0):
        if any(process.poll() is not None for process in started):
            raise ServerError(f"{name} did not start (is the port taken?); its log is in {logs}")
        if time.monotonic() > end:
            raise ServerError(f"{name} did not answer at {url} within {START_SECONDS:.0f} s")
        time.sleep(0.3)


def stop(started: list[subprocess.Popen[bytes]]) -> None:
    """Stop servers and all that they started."""
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
    for process in started:
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _start(command: list[str], environment: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as file:
        return subprocess.Popen(  # noqa: S603 - our own command line
            command,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
