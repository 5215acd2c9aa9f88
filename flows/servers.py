"""Prefect's and MLflow's servers: is one there, and start, wait for and stop one."""

from __future__ import annotations

import base64
import http.client
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

from flows.settings import Settings
from flows.words import shown_uri

LOOPBACK = ("127.0.0.1", "::1", "localhost")
MLFLOW_USER, MLFLOW_PASSWORD = "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"
WEBHOOK_SECRET = "WEBHOOK_SECRET"  # noqa: S105 - the variable's name
POOL = "sustain"
"""Prefect's work pool."""
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
            f"Prefect at {shown_uri(url)} {problem}: is the server running, and is [servers]"
            " prefect (or PREFECT_API_URL) right? Leave it empty to run without a server"
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
    except (OSError, ValueError, http.client.HTTPException) as error:
        return f"does not answer within {timeout:.0f} s ({error})"


def basic(login: str) -> str:
    """Write `user:password` as the value of the header Authorization."""
    return "Basic " + base64.b64encode(login.encode()).decode()


def authority(host: str, port: int) -> str:
    """Write a host and a port as an address has them: an IPv6 host stands in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def start_mlflow(
    settings: Settings,
    port: int,
    logs: Path,
    *,
    host: str = LOOPBACK[0],
    environment: Mapping[str, str] | None = None,
    options: Sequence[str] = (),
    hands_out: bool = False,
) -> subprocess.Popen[bytes]:
    """Start MLflow's server on the settings' own database, small: one worker, no job runner.

    Args:
        settings: whose database and artifacts it serves.
        port: to listen on.
        logs: folder for its log.
        host: address to listen on.
        environment: of the server; this process's by default.
        options: more of its options.
        hands_out: it hands artifacts out and takes them in itself, for clients that do not see this
            machine's files.
    """
    own = {**(os.environ if environment is None else environment)}
    own["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
    own["MLFLOW_BACKEND_STORE_URI"] = settings.mlflow_uri  # no option: it may hold a password
    root = "--artifacts-destination" if hands_out else "--default-artifact-root"
    command = [
        *(sys.executable, "-m", "mlflow", "server", "--workers", "1"),
        *("--host", host, "--port", str(port)),
        *(root, settings.artifacts_uri),
        *options,
    ]
    return start(command, own, logs / "mlflow.log")


def start_prefect(
    port: int,
    logs: Path,
    *,
    host: str = LOOPBACK[0],
    environment: Mapping[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """Start Prefect's server on the database of the environment's PREFECT_HOME."""
    address = f"http://{authority(host, port)}/api"
    own = {**(os.environ if environment is None else environment), "PREFECT_API_URL": address}
    own.setdefault("PREFECT_UI_API_URL", "/api")  # of whatever address the page came from
    command = [
        *(sys.executable, "-m", "prefect", "server", "start"),
        *("--host", host, "--port", str(port)),
    ]
    return start(command, own, logs / "prefect.log")


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
    """Ask servers, and what they started in their groups, to stop; see that the servers do."""
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
    for process in started:
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def start(command: list[str], environment: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
    """Start a process in a group of its own, which writes into a log."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as file:
        return subprocess.Popen(  # noqa: S603 - our own command line
            command,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
