"""`sustain up`: every server, a worker and the schedules of some models, until Ctrl-C.

`sustain ui` is the same with the servers only. Run both through `flows.guard`, so that nothing that
was started is left behind.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from flows.guard import SIGNALS
from flows.screen import print_line
from flows.servers import (
    LOOPBACK,
    MLFLOW_PASSWORD,
    MLFLOW_USER,
    POOL,
    START_SECONDS,
    WEBHOOK_SECRET,
    ServerError,
    authority,
    basic,
    start,
    start_mlflow,
    start_prefect,
    stop,
    wait_until_healthy,
)
from flows.settings import Settings
from flows.words import shown_uri

LOCK = "up.lock"
WORKER, RECEIVER = "the worker", "the webhook's receiver"
USERS, USERS_SETTINGS = "mlflow-users.db", "mlflow-users.ini"
PREFECT_AUTH = "PREFECT_API_AUTH_STRING"
MIN_PASSWORD = 12
"""Characters; MLflow refuses shorter ones."""
NAME = re.compile(r"(https?://)?([\w.-]+|\[[\da-f:]+\])(:\d+)?", re.IGNORECASE | re.ASCII)
"""What `--name` takes: a host, or a proxy's origin, the one with a port. No wildcard: MLflow and
Prefect would let everybody in."""


class UpError(RuntimeError):
    """The servers cannot run as asked; the message names the way out."""


@dataclass(frozen=True)
class Place:
    """Where the servers listen.

    Attributes:
        host: address that they bind; all but this machine's own needs credentials.
        mlflow, prefect, webhook: ports.
        names: further hosts by which they are called, and origins (`https://host[:port]`) at which
            a proxy serves them.
    """

    host: str = "127.0.0.1"
    mlflow: int = 5000
    prefect: int = 4200
    webhook: int = 4280
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse a name that is none."""
        for name in self.names:
            if not NAME.fullmatch(name) or ("://" not in name and ":" in name):
                raise UpError(
                    f"--name takes a host, or https://host[:port] of a proxy, got {name!r}"
                )

    @property
    def open(self) -> bool:
        """Whether others than this machine may call: at its address, or through a proxy."""
        return self.host not in LOOPBACK or bool(self.names)

    @property
    def near(self) -> str:
        """The host by which this machine calls them."""
        return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)  # noqa: S104

    @property
    def called(self) -> tuple[str, ...]:
        """Every host by which they are called without a proxy, the one for others first."""
        anywhere = self.near != self.host
        own = (socket.gethostname(), socket.getfqdn()) if anywhere else (self.host,)
        named = (name for name in self.names if "://" not in name)
        every = (*named, *own, self.near, "127.0.0.1", "localhost")
        return tuple(dict.fromkeys(name.lower() for name in every))

    @property
    def proxies(self) -> tuple[str, ...]:
        """The origins at which a proxy serves them, as browsers write them."""
        named = (name.lower() for name in self.names if "://" in name)
        return tuple(re.sub(r"^(https://.*):443$|^(http://.*):80$", r"\1\2", one) for one in named)

    def origins(self, port: int) -> tuple[str, ...]:
        """Every origin whose pages may call the server at a port."""
        return (*(f"http://{authority(name, port)}" for name in self.called), *self.proxies)

    def hosts(self, port: int) -> tuple[str, ...]:
        """Every host that a request to the server at a port may be for."""
        proxied = (origin.partition("://")[2] for origin in self.proxies)
        return (*(authority(name, port) for name in self.called), *self.called, *proxied)

    def url(self, port: int) -> str:
        """The address for this machine."""
        return f"http://{authority(self.near, port)}"

    def require_free(self, option: str, port: int) -> None:
        """Refuse a port on which somebody listens: another server would be taken for ours."""
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        try:
            socket.create_server((self.host, port), family=family).close()
        except OSError as error:
            raise UpError(
                f"cannot listen on {self.host}, port {port} ({error.strerror}): name another one"
                f" with --{option}-port"
            ) from None


@dataclass
class Running:
    """What was started, and what those that are started later have to know.

    Attributes:
        place: where.
        logs: folder of their logs.
        environment: for each of them.
        asks: they ask for credentials.
        processes: by name.
    """

    place: Place
    logs: Path
    environment: dict[str, str]
    asks: bool
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def add(self, name: str, process: subprocess.Popen[bytes]) -> None:
        """Take note of a process."""
        self.processes[name] = process

    def wait(self, url: str, name: str) -> None:
        """Wait until an address answers."""
        wait_until_healthy(url, name, list(self.processes.values()), self.logs)

    def stay(self) -> NoReturn:
        """Stay until a signal comes; raises ServerError when one of them ends by itself."""
        while True:
            for name, process in self.processes.items():
                if process.poll() is not None:
                    raise ServerError(
                        f"{name} ended by itself (exit code {process.returncode}), so all were"
                        f" stopped; its log is in {self.logs}"
                    )
            time.sleep(0.3)


def up(models: Sequence[Settings], place: Place) -> None:
    """Serve and schedule some models, until Ctrl-C or SIGTERM.

    Raises:
        UpError: it runs already, credentials are missing, or the models have several databases.
        ServerError: something did not start, or ended by itself.
    """
    console = Console()
    _named(models)  # refuses, before anything is touched
    with ExitStack() as stack:
        for folder in sorted({one.root for one in models}):
            stack.enter_context(only_one(folder))
        secret = os.environ.get(WEBHOOK_SECRET) or secrets.token_hex(32)
        running = stack.enter_context(servers(models, place, {WEBHOOK_SECRET: secret}))
        place.require_free("webhook", place.webhook)
        with console.status("starting MLflow and Prefect"):
            mlflow, prefect = _begin(running, models)
        files = [word for one in models for word in ("-s", str(one.path))]
        with console.status("registering the deployments"):
            _deploy(running, files)
        with console.status("starting the worker and the webhook's receiver"):
            worker = f"up-{socket.gethostname()}-{os.getpid()}"
            _start_worker(running, worker)
            _start_receiver(running, files)
            running.wait(f"{place.url(place.webhook)}/health", RECEIVER)
            _wait_for_worker(running, prefect, worker)
        for line in _addresses(models, place, mlflow, prefect):
            print_line(console, line)
        console.print("Ctrl-C stops all of it")
        running.stay()


def show(settings: Settings, place: Place) -> None:
    """Show what is on record in both UIs, until Ctrl-C or SIGTERM.

    A server that the settings name is not started again: its address is printed.
    """
    console = Console()
    with servers([settings], place, {}) as running:
        with console.status("starting MLflow's and Prefect's UIs"):
            mlflow, prefect = _begin(running, [settings])
        for line in (
            f"MLflow   {mlflow}/#/models/{settings.model.name}  (versions, roll back here)",
            f"         {mlflow}/#/experiments  (checks and drift reports)",
            f"Prefect  {prefect}/runs  (flow runs)",
            f"         {prefect}/artifacts  (a summary of each check)",
        ):
            print_line(console, line)
        console.print("Ctrl-C stops both")
        running.stay()


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which the kernel releases however its holder ends.

    Raises:
        UpError: somebody holds it; the message says which process.
    """
    import fcntl

    path = folder / LOCK
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            file.seek(0)
            raise UpError(
                f"`sustain up` runs already for {folder} (process {file.read().strip() or '?'}):"
                " stop it with Ctrl-C there, or see `sustain status`"
            ) from None
        file.truncate(0)
        file.write(f"{os.getppid()}\n")  # the process that a person sees
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


@contextmanager
def servers(models: Sequence[Settings], place: Place, more: Mapping[str, str]) -> Iterator[Running]:
    """Give the environment in which things are started; stop all of them at the end."""
    credentials = _credentials(models[0], place)
    environment = {**os.environ, **_environment(models[0], place), **more, **credentials}
    running = Running(place, models[0].root / "logs", environment, asks=bool(credentials))
    try:
        yield running
    except KeyboardInterrupt:
        Console().print("stopping")
    finally:
        for number in SIGNALS:  # once is enough
            signal.signal(number, signal.SIG_IGN)
        stop(list(running.processes.values()))


def _begin(running: Running, models: Sequence[Settings]) -> tuple[str, str]:
    """Start MLflow and Prefect where the settings name none; return their addresses."""
    place, environment = running.place, running.environment
    mlflow, prefect = _named(models)
    if not mlflow.startswith("http"):
        if running.asks and find_spec("flask_wtf") is None:
            raise UpError("for MLflow to ask for credentials: pip install 'sustain[auth]'")
        place.require_free("mlflow", place.mlflow)
        mlflow = place.url(place.mlflow)
        process = start_mlflow(
            models[0],
            place.mlflow,
            running.logs,
            host=place.host,
            environment=environment,
            options=_mlflow_options(place, asks=running.asks),
            hands_out=place.open,
        )
        running.add("MLflow", process)
    if not prefect:
        place.require_free("prefect", place.prefect)
        prefect = place.url(place.prefect)
        process = start_prefect(
            place.prefect, running.logs, host=place.host, environment=environment
        )
        running.add("Prefect", process)
    running.wait(f"{mlflow}/health", "MLflow")
    running.wait(f"{prefect}/api/health", "Prefect")
    # these come before what the TOML files say
    environment["SUSTAIN_SERVERS_MLFLOW"] = environment["MLFLOW_TRACKING_URI"] = mlflow
    environment["SUSTAIN_SERVERS_PREFECT"] = environment["PREFECT_API_URL"] = f"{prefect}/api"
    if running.asks and "MLflow" in running.processes:
        _try_credentials(mlflow, environment)
    return mlflow, prefect


def _named(models: Sequence[Settings]) -> tuple[str, str]:
    """Return MLflow's database or address, and Prefect's address, as all models name them."""
    uris = sorted({one.mlflow_uri.rstrip("/") for one in models})
    apis = sorted({one.servers.prefect.rstrip("/").removesuffix("/api") for one in models})
    if len(uris) > 1 or len(apis) > 1:
        shown = ", ".join(shown_uri(one) for one in (*uris, *apis) if one)
        raise UpError(
            f"these models are on several servers ({shown}): name the same ones under [servers] of"
            ' each, such as mlflow = "sqlite:////ABSOLUTE/mlflow.db", or run one `sustain up` for'
            " each, on ports of its own"
        )
    return uris[0], apis[0]


def _environment(first: Settings, place: Place) -> dict[str, str]:
    """Give what the servers and the worker are told, wherever they listen."""
    told = {
        # the receiver is on this machine
        "MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "http,https",
        "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS": "true",
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": ",".join(place.origins(place.prefect)),
        "PREFECT_WORKER_HEARTBEAT_SECONDS": "10",
    }
    told = {name: os.environ.get(name, value) for name, value in told.items()}
    if home := first.servers.prefect_home:
        told["PREFECT_HOME"] = str((first.root / home).resolve())
    return told


def _credentials(first: Settings, place: Place) -> dict[str, str]:
    """Give what makes the servers ask for the credentials in this environment.

    On loopback, where they need not, nothing unless all are there.

    Raises:
        UpError: they are missing, or too short.
    """
    missing = [n for n in (MLFLOW_USER, MLFLOW_PASSWORD, PREFECT_AUTH) if not os.environ.get(n)]
    if missing and not place.open:
        return {}
    if missing:
        raise UpError(
            f"to be called by others ({', '.join(place.names) or place.host}), these environment"
            f" variables are needed: {', '.join(missing)} ({PREFECT_AUTH} is user:password)."
            " Clients need the same ones; they stand in no file and on no command line"
        )
    user, password = os.environ[MLFLOW_USER], os.environ[MLFLOW_PASSWORD]
    if not all(os.environ[PREFECT_AUTH].partition(":")):
        raise UpError(f"{PREFECT_AUTH} must be user:password")
    told = {"PREFECT_SERVER_API_AUTH_STRING": os.environ[PREFECT_AUTH]}
    if _named([first])[0].startswith("http"):  # it asks for what it likes
        return told
    if len(password) < MIN_PASSWORD:
        raise UpError(f"{MLFLOW_PASSWORD} needs at least {MIN_PASSWORD} characters")
    path = first.root / USERS_SETTINGS
    path.write_text(
        f"[mlflow]\ndatabase_uri = sqlite:///{first.root / USERS}\n"
        "default_permission = NO_PERMISSIONS\n"
        "auth_cache_ttl_seconds = 60\n"  # else each request hashes the password: seconds when busy
    )
    return told | {
        "MLFLOW_AUTH_CONFIG_PATH": str(path),
        "MLFLOW_AUTH_ADMIN_USERNAME": user,
        "MLFLOW_AUTH_ADMIN_PASSWORD": password,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": os.environ.get("MLFLOW_FLASK_SERVER_SECRET_KEY")
        or secrets.token_hex(32),
    }


def _mlflow_options(place: Place, *, asks: bool) -> list[str]:
    """Give MLflow's own options where it asks for credentials, or others can call."""
    options = ["--app-name", "basic-auth"] if asks else []
    if place.open:  # MLflow's defaults let loopback in
        options += ["--allowed-hosts", ",".join(place.hosts(place.mlflow))]
        options += ["--cors-allowed-origins", ",".join(place.origins(place.mlflow))]
    return options


def _try_credentials(mlflow: str, environment: Mapping[str, str]) -> None:
    """See that MLflow takes the credentials: it remembers those of its first start."""
    request = urllib.request.Request(  # noqa: S310 - our own server
        f"{mlflow}/api/2.0/mlflow/experiments/search?max_results=1",
        headers={
            "Authorization": basic(f"{environment[MLFLOW_USER]}:{environment[MLFLOW_PASSWORD]}")
        },
    )
    try:
        with urllib.request.urlopen(request, timeout=30):  # noqa: S310
            return
    except urllib.error.HTTPError as error:
        raise UpError(
            f"MLflow does not take the user of {MLFLOW_USER} with the password of"
            f" {MLFLOW_PASSWORD} ({error}): it keeps those of its first start, in {USERS}"
            " beside the settings. Change the password through its API"
            " (/api/2.0/mlflow/users/update-password), or delete that file to start anew"
        ) from None


def _deploy(running: Running, files: list[str]) -> None:
    """Register the deployments: in a process of its own, for it loads torch."""
    command = [sys.executable, "-m", "flows.cli", "deploy", *files, "--pool", POOL]
    done = subprocess.run(  # noqa: S603 - our own command line
        command, env=running.environment, check=False, capture_output=True, text=True
    )
    if done.returncode:
        raise ServerError(f"the deployments were not registered: {done.stderr.strip()[-2000:]}")


def _start_worker(running: Running, name: str) -> None:
    command = [
        *(sys.executable, "-m", "prefect", "worker", "start", "--type", "process"),
        *("--pool", POOL, "--name", name, "--install-policy", "never"),
    ]
    process = start(command, running.environment, running.logs / "worker.log")
    running.add(WORKER, process)


def _start_receiver(running: Running, files: list[str]) -> None:
    place = running.place
    command = [
        *(sys.executable, "-m", "flows.cli", "webhook", *files, "--port", str(place.webhook)),
        *("--host", place.host, "--register", place.url(place.webhook)),
        *(["--ask"] if running.asks else []),
    ]
    process = start(command, running.environment, running.logs / "webhook.log")
    running.add(RECEIVER, process)


def _wait_for_worker(running: Running, prefect: str, name: str) -> None:
    """Wait until Prefect heard of the worker."""
    headers = {"Content-Type": "application/json"}
    if login := running.environment.get(PREFECT_AUTH):
        headers["Authorization"] = basic(login)
    request = urllib.request.Request(  # noqa: S310 - our own server
        f"{prefect}/api/work_pools/{POOL}/workers/filter",
        data=b"{}",
        headers=headers,
        method="POST",
    )
    end, why = time.monotonic() + START_SECONDS, ""
    while running.processes[WORKER].poll() is None and time.monotonic() < end:
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310
                if any(one["name"] == name for one in json.load(answer)):
                    return
        except OSError as error:  # it is busy
            why = f" ({error})"
        time.sleep(0.3)
    raise ServerError(f"Prefect knows of no worker{why}; its log is in {running.logs}")


def _addresses(
    models: Sequence[Settings], place: Place, mlflow: str, prefect: str
) -> Iterator[str]:
    """Write what is where, each address whole on a line."""
    receiver = place.url(place.webhook)
    yield f"serving {', '.join(one.model.name for one in models)}"
    for one in models:
        yield f"MLflow   {mlflow}/#/models/{one.model.name}  (versions: roll back here)"
    yield f"         {mlflow}/#/experiments  (checks and drift reports)"
    yield f"Prefect  {prefect}/deployments  (schedules; promote, roll back by a click)"
    yield f"         {prefect}/runs  (what ran)"
    yield f"webhook  {receiver}/mlflow  (MLflow tells of moved aliases)"
    yield f"metrics  {receiver}/metrics  (for Prometheus)"
    yield f"logs     {models[0].root / 'logs'}"
