"""The failure matrix: after each fault, and the command again, the registry is as after none.

Each fault is tried with MLflow's records (and Prefect's, where its server takes part) in SQLite and
in PostgreSQL; where it is not, the table says so.

| fault | test |
|---|---|
| `kill -9` of a flow, at each write | test_kill.py, `test_killed_anywhere_and_run_again` (SQLite) |
| the same on PostgreSQL | here, `test_killed_on_postgres` |
| `kill -9` of a flow, its worker, or both | here, `test_killed_under_a_worker` |
| a run left RUNNING by a dead worker | the same test, and tests/e2e/test_up.py |
| `kill -9` of MLflow's server, and back, now or later | here, `test_mlflow_is_killed` |
| `kill -9` of Prefect's server, and back | here, `test_prefect_is_killed` |
| a full disk | here, `test_faults_within_a_command` |
| PostgreSQL restarted | here, `test_faults_within_a_command` (PostgreSQL) |
| the bucket refuses, then not | here, `test_the_bucket_goes_away` |
| a batch that grows while it is read | here, `test_the_data_changes`; test_feed.py |
| a clock that jumps | here, `test_faults_within_a_command`; test_registry.py |
| two watchers, or two retrainings, at once | test_kill.py; here, `test_two_at_once_on_postgres` |
| a label file replaced while it is read | here, `test_the_data_changes`; test_storage.py |
| a command held up while another works | test_kill.py, `test_overtaken_at_any_write` (SQLite) |

What needs minutes is marked `nightly`; `make test-nightly` runs it, and writes the table of faults.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from deployed import ask, marked
from faults import count, counted, kept
from kills import DRIVERS, Drivers, complaint, lost, report
from stores import POSTGRES, STORES, Bucket, Postgres
from worlds import World, free, make_world

from flows.deploy import deploy
from flows.registry import Registry
from flows.servers import start_prefect, stop, wait_until_healthy
from flows.storage import FeedError
from flows.watch import make_plan, watch

ANYWHERE = bool(os.environ.get("KILL_ALL"))
SOME = int(os.environ.get("KILL_SOME", "12"))
"""Boundaries of a command at which each fault is tried, spread evenly; all with KILL_ALL."""
WITHIN = ("the disk is full", "the clock goes back a day", "the clock goes on a day")
DISK_MB = 500
"""Of each world; PostgreSQL's programs and records are on it too."""
PATIENCE = 600.0
FREED_WITHIN = 180.0
"""Seconds after which a run that a dead worker left RUNNING must be over."""
root_only = pytest.mark.skipif(os.getuid() != 0, reason="only root may mount a small disk")


def spread(boundaries: list[str]) -> list[tuple[int, str]]:
    """Choose boundaries, the first and the last among them."""
    numbered = list(enumerate(boundaries))
    if ANYWHERE or len(numbered) <= SOME:
        return numbered
    return [numbered[round(i * (len(numbered) - 1) / (SOME - 1))] for i in range(SOME)]


@pytest.fixture(scope="module", params=STORES)
def drivers(prefect_server: str, request: pytest.FixtureRequest) -> Iterator[Drivers]:
    """Worlds that each have a small disk of their own, PostgreSQL's records on it too."""
    folder = Path(tempfile.mkdtemp(prefix="sustain-failures-"))
    folder.chmod(0o755)  # PostgreSQL does not run as root
    disks = [folder / f"world-{number}" for number in range(DRIVERS)]
    for disk in disks:
        disk.mkdir()
        small = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", str(disk)]
        subprocess.run(small, check=True)
    try:
        found = Drivers(folder, prefect_server, request.param)
        yield found
        found.close()
    finally:
        for disk in disks:
            subprocess.run(["umount", "--lazy", str(disk)], check=True)
        shutil.rmtree(folder, ignore_errors=True)


def try_all(
    drivers: Drivers,
    node: pytest.Item,
    scenario: str,
    fault: str,
    *,
    case: str = "disturbed",
) -> None:
    """Let a fault (with "" the case's own) happen at some boundaries; complain of all at once."""
    undisturbed = drivers.ask("undisturbed", scenario).result()
    assert "boundaries" in undisturbed, undisturbed
    more = {"fault": fault} if fault else {}
    asked: dict[str, Future[dict[str, Any]]] = {
        where: drivers.ask(case, scenario, at=at, **more)
        for at, where in spread(undisturbed["boundaries"])
    }
    complaints, outcomes = {}, []
    for where, future in asked.items():
        complaints[where] = complaint(answer := future.result(), undisturbed)
        outcomes.append((not complaints[where], lost(answer, undisturbed)))
    count(node, fault or "a flow is killed at a write", drivers.store, outcomes)
    assert not any(complaints.values()), report(complaints)


@root_only
@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("drivers", "fault"),
    [*product(STORES, WITHIN), (POSTGRES, "PostgreSQL restarts")],
    indirect=["drivers"],
)
def test_faults_within_a_command(
    fault: str, drivers: Drivers, request: pytest.FixtureRequest
) -> None:
    """The disk is full, the clock jumps, the database goes: all that was to be done is done."""
    try_all(drivers, request.node, "chain", fault)


@root_only
@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("fault", ["MLflow is killed", "MLflow is killed, and back"])
def test_mlflow_is_killed(fault: str, drivers: Drivers, request: pytest.FixtureRequest) -> None:
    """MLflow's server dies at a write, and is back at once, or when the command has given up."""
    try_all(drivers, request.node, "served", fault)


@root_only
@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("drivers", [POSTGRES], indirect=True)
@pytest.mark.parametrize("scenario", ["chain", "moved"])
def test_killed_on_postgres(
    scenario: str, drivers: Drivers, request: pytest.FixtureRequest
) -> None:
    """As test_kill.py has it on SQLite, with MLflow's records in PostgreSQL."""
    try_all(drivers, request.node, scenario, "", case="killed")


@root_only
@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("drivers", [POSTGRES], indirect=True)
@pytest.mark.parametrize(("scenario", "seconds"), [("chain", 0.0), ("retrain", 0.7)])
def test_two_at_once_on_postgres(
    scenario: str, seconds: float, drivers: Drivers, request: pytest.FixtureRequest
) -> None:
    """As test_kill.py has it on SQLite: one champion, and one version for the key."""
    undisturbed = drivers.ask("undisturbed", scenario).result()
    answer = drivers.ask("together", scenario, seconds=seconds).result()
    wrong = complaint(answer, undisturbed, leave=("ended runs",))
    missing = lost(answer, undisturbed)
    count(request.node, "two commands at once", drivers.store, [(not wrong, missing)])
    assert not wrong, wrong


@root_only
@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("fault", "scenario", "within", "as_if"),
    [
        ("the batch grows", "check", "(create_run", "grown"),
        ("labels are replaced", "chain", "", "chain"),
        ("no file grows", "chain", "(log_artifacts model", "chain"),
    ],
)
def test_the_data_changes(
    fault: str,
    scenario: str,
    within: str,
    as_if: str,
    drivers: Drivers,
    request: pytest.FixtureRequest,
) -> None:
    """A batch or a file of labels changes while it is read, or no file can grow: as if it had not.

    The check of what a batch was before it grew is on record, as failed.
    """
    boundaries = drivers.ask("undisturbed", scenario).result()["boundaries"]
    at = next(n for n, where in enumerate(boundaries) if within in where) if within else None
    answer = drivers.ask("disturbed", scenario, fault=fault, at=at).result()
    undisturbed = drivers.ask("undisturbed", as_if).result()
    if fault == "the batch grows":
        finished = [check for check in answer["book"]["checks"] if check[3]]
        assert len(finished) == len(answer["book"]["checks"]) - 1
        answer["book"]["checks"] = finished
    wrong = complaint(answer, undisturbed)
    count(request.node, fault, drivers.store, [(not wrong, lost(answer, undisturbed))])
    assert not wrong, wrong


def facts(registry: Registry) -> dict[str, Any]:
    """Say what is on record: every check with its decision, every version with its verdict."""
    return {
        "checks": [
            (c.key, c.finished, c.action, {k: round(v, 6) for k, v in sorted(c.metrics.items())})
            for c in registry.checks(None)
        ],
        "versions": [(v.number, v.parent, v.verdict, v.tags["cause"]) for v in registry.versions()],
        "moves": [(m.before, m.after, m.by) for m in registry.moves()],
        "champion": registry.alias("champion"),
    }


@dataclass(frozen=True)
class Calm:
    """What an undisturbed watch leaves on record, and what of its batches and labels."""

    facts: dict[str, Any]
    kept: set[str]


def watch_to_the_end(world: World) -> None:
    """Check with the champion, and again with the one that it made."""
    for _ in range(2):
        watch(str(world.path))
    assert make_plan(Registry(world.settings), world.settings, datetime.now(UTC)).idle


def calm_world(folder: Path, *batches: int) -> Calm:
    """Watch some labelled batches to the end, and let nothing happen to it."""
    world = make_world(folder, "calm")
    world.arrive(*batches, labelled=True)
    watch_to_the_end(world)
    return Calm(facts(Registry(world.settings)), kept(world.settings))


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory, prefect_server: str) -> Calm:
    """Watch two labelled batches, undisturbed, with the records in SQLite."""
    assert prefect_server
    return calm_world(tmp_path_factory.mktemp("calm") / "world", 0, 1)


def world_in(
    store: str, request: pytest.FixtureRequest, folder: Path, name: str, extra: str = ""
) -> World:
    """Make a world whose MLflow has its records in a store."""
    if store == POSTGRES:
        server: Postgres = request.getfixturevalue("postgres_server")
        server.run(f"CREATE DATABASE {name}")
        extra += f'\n[servers]\nmlflow = "{server.url(name)}"\n'
    return make_world(folder, name, extra)


@pytest.mark.nightly
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("store", STORES)
def test_the_bucket_goes_away(
    store: str,
    tmp_path: Path,
    bucket_server: Bucket,
    prefect_server: str,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    """It is gone while the second of three batches is read, and comes back: no batch is lost."""
    import fsspec

    import flows.check

    assert prefect_server
    for name, value in bucket_server.environment.items():
        monkeypatch.setenv(name, value)
    calm = calm_world(tmp_path / "calm", 0, 1, 2)
    place = f"s3://sustain/{store}"
    feed = f'\n[feed]\nurl = "{place}/feed"\nlabels = "{place}/labels"\n'
    world = world_in(store, request, tmp_path / "away", f"away_{store.lower()}", feed)
    world.arrive(0, 1, 2, labelled=True)
    there = fsspec.filesystem("s3")
    root = world.path.parent
    for folder in (*sorted((root / "feed").iterdir()), root / "labels"):  # one after the other
        there.put(f"{folder}/", f"{place}/{folder.relative_to(root)}/", recursive=True)
    see = flows.check.see_batch
    times = 0

    def refused(*args: Any, **kwargs: Any) -> Any:
        nonlocal times
        times += 1
        if times == 2:
            bucket_server.stop()
        return see(*args, **kwargs)

    fault = "the bucket refuses"
    with counted(request.node, fault, store, world.settings, calm.kept):
        with monkeypatch.context() as patch:
            patch.setattr(flows.check, "see_batch", refused)
            try:
                with pytest.raises(FeedError, match="cannot be listed"):
                    watch(str(world.path))
            finally:
                bucket_server.start()
        checked = [c.key.batch_id for c in Registry(world.settings).checks(1)]
        assert checked == ["optical-01"]
        watch_to_the_end(world)
        assert facts(Registry(world.settings)) == calm.facts


@dataclass
class Mortal:
    """A Prefect server on a store, to be killed and started again, and workers of it."""

    store: str
    home: Path
    environment: dict[str, str]
    port: int
    process: subprocess.Popen[bytes] | None = None

    @property
    def api(self) -> str:
        return f"http://127.0.0.1:{self.port}/api"

    def begin(self) -> None:
        """Start it, unless it lives."""
        if self.process is None:
            self.process = start_prefect(self.port, self.home, environment=self.environment)
            wait_until_healthy(f"{self.api}/health", "Prefect", [self.process], self.home)

    def kill(self) -> None:
        """Kill it, and all that it started, as kill -9 does."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    @contextmanager
    def asked(self) -> Iterator[None]:
        """Let flows and clients in this process ask this server."""
        from prefect.settings import (
            PREFECT_API_URL,
            PREFECT_CLIENT_MAX_RETRIES,
            PREFECT_HOME,
            temporary_settings,
        )

        settings = {PREFECT_API_URL: self.api, PREFECT_HOME: self.home}
        with temporary_settings({**settings, PREFECT_CLIENT_MAX_RETRIES: 2}):  # gives up sooner
            yield

    def worker(self, pool: str) -> subprocess.Popen[bytes]:
        """Start a worker; it and its flows carry a mark, WORKER_TEST=pool."""
        command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", pool]
        with (self.home / f"{pool}.log").open("ab") as log:
            return subprocess.Popen(
                [*command, "--type", "process", "--install-policy", "never"],
                env={**self.environment, "PREFECT_API_URL": self.api, "WORKER_TEST": pool},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )


@pytest.fixture(scope="module", params=STORES)
def mortal(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Mortal]:
    """Serve Prefect, with its records in each store."""
    home = tmp_path_factory.mktemp("mortal")
    environment = {**os.environ, "PREFECT_HOME": str(home)}
    if request.param == POSTGRES:
        server: Postgres = request.getfixturevalue("postgres_server")
        server.run("CREATE DATABASE mortal")
        url = server.url("mortal", driver="+asyncpg")
        environment["PREFECT_SERVER_DATABASE_CONNECTION_URL"] = url
    found = Mortal(request.param, home, environment, free())
    try:
        yield found
    finally:
        if found.process is not None:
            stop([found.process])


@pytest.mark.nightly
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("step", ["begin_check", "end_run", "register", "move_champion"])
def test_prefect_is_killed(
    step: str,
    mortal: Mortal,
    calm: Calm,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Prefect's server dies at a step, comes back when the flow has ended: the next run goes on."""
    mortal.begin()
    with mortal.asked():
        world = world_in(mortal.store, request, tmp_path / "killed", f"killed_{step}")
        world.arrive(0, 1, labelled=True)
        method = getattr(Registry, step)

        def killed(*args: Any, **kwargs: Any) -> Any:
            mortal.kill()
            return method(*args, **kwargs)

        fault = "Prefect is killed, and back"
        with counted(request.node, fault, mortal.store, world.settings, calm.kept):
            with monkeypatch.context() as patch:
                patch.setattr(Registry, step, killed)
                with suppress(Exception):  # it may go on without the server
                    watch(str(world.path))
            assert mortal.process is None
            mortal.begin()
            watch_to_the_end(world)
            assert facts(Registry(world.settings)) == calm.facts


def wait_for(what: str, look: Callable[[], Any], seconds: float = PATIENCE) -> Any:
    """Return the first answer that is not empty."""
    end = time.monotonic() + seconds
    while not (seen := look()):
        assert time.monotonic() < end, f"no {what} within {seconds:.0f} s"
        time.sleep(0.2)
    return seen


@pytest.mark.nightly
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("victim", "kind"),
    [
        ("a scheduled run is", "check"),
        ("a worker is", "training"),
        ("a worker and its run are", "check"),
        ("a worker and its run are", "training"),
    ],
)
def test_killed_under_a_worker(
    victim: str,
    kind: str,
    mortal: Mortal,
    calm: Calm,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    """In under 3 minutes no run is left RUNNING, and the schedule alone ends as undisturbed.

    The server is that of the tests before: other models with the same data and settings.
    """
    mortal.begin()
    name = f"{victim}_{kind}".replace(" ", "_")
    extra = "\n[schedule]\nwatch = 10\nprune = ''\nreconcile = ''\n"
    with mortal.asked():
        world = world_in(mortal.store, request, tmp_path / "world", name, extra)
        world.arrive(0, 1, labelled=True)
        deploy([world.settings], name)
    registry = Registry(world.settings)

    def runs(*states: str) -> list[str]:
        body = {
            "flow_runs": {"state": {"type": {"any_": states}}, "tags": {"all_": [f"model:{name}"]}}
        }
        return [one["id"] for one in ask(mortal.api, "/flow_runs/filter", body)]

    def flows() -> list[int]:
        return [p for p, line in marked(f"WORKER_TEST={name}").items() if "engine" in line]

    with counted(request.node, f"{victim} killed", mortal.store, world.settings, calm.kept):
        workers = [mortal.worker(name)]
        try:
            wait_for(kind, lambda: list(registry._open_runs(kind)))
            struck, running = flows(), runs("RUNNING")
            assert struck
            assert running
            if "worker" in victim:
                os.kill(workers[0].pid, signal.SIGKILL)
            if "run" in victim:
                for process in struck:
                    os.kill(process, signal.SIGKILL)
            if "worker" in victim:
                workers.append(mortal.worker(name))
            wait_for("end", lambda: not {*running} & {*runs("RUNNING")}, FREED_WITHIN)
            with suppress(AssertionError):  # then the last line tells what is not as it was
                wait_for("rest", lambda: facts(registry) == calm.facts)
        finally:
            stop(workers)
            for process in marked(f"WORKER_TEST={name}"):
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            with mortal.asked():
                deploy([], name)
        assert facts(registry) == calm.facts
