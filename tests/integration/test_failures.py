"""The failure matrix: after each fault, and the command again, the registry is as after none.

| fault | test |
|---|---|
| `kill -9` of a flow, at each write | test_kill.py, `test_killed_anywhere_and_run_again` |
| the same on PostgreSQL | here, `test_killed_on_postgres` |
| `kill -9` of MLflow's server, and back, now or later | here, `test_mlflow_is_killed` |
| `kill -9` of Prefect's server, and back | here, `test_prefect_is_killed` |
| a full disk | here, `test_faults_within_a_command`; with a limit on files, test_kill.py |
| PostgreSQL restarted | here, `test_faults_within_a_command` |
| the bucket refuses, then not | here, `test_the_bucket_goes_away` |
| a batch that grows while it is read | test_kill.py, `test_other_faults`; test_feed.py |
| a clock that jumps | here, `test_faults_within_a_command`; test_kill.py, test_registry.py |
| two watchers, or two retrainings, at once | test_kill.py, `test_two_at_once` |
| a label file replaced while it is read | test_kill.py, `test_other_faults`; test_storage.py |
| a command held up while another does its work | test_kill.py, `test_overtaken_at_any_write` |

What needs minutes is marked `nightly`; `make test-nightly` runs it.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from kills import Drivers, complaint, report
from stores import Bucket, Postgres
from worlds import free, make_world

from flows.registry import Registry
from flows.servers import start_prefect, stop, wait_until_healthy
from flows.storage import FeedError
from flows.watch import watch

ANYWHERE = bool(os.environ.get("KILL_ALL"))
SOME = 12
"""Boundaries of a command at which each fault is tried, spread evenly; all with KILL_ALL."""
WITHIN = ("the disk is full", "the clock goes back a day", "the clock goes on a day")
BACK = ("MLflow is killed", "MLflow is killed, and back")
root_only = pytest.mark.skipif(os.getuid() != 0, reason="only root may mount a small disk")


def spread(boundaries: list[str]) -> list[tuple[int, str]]:
    """Choose boundaries, the first and the last among them."""
    numbered = list(enumerate(boundaries))
    if ANYWHERE or len(numbered) <= SOME:
        return numbered
    return [numbered[round(i * (len(numbered) - 1) / (SOME - 1))] for i in range(SOME)]


@pytest.fixture(scope="module", params=["sqlite", "postgres"])
def drivers(
    tmp_path_factory: pytest.TempPathFactory, prefect_server: str, request: pytest.FixtureRequest
) -> Iterator[Drivers]:
    """Worlds on a small disk of their own, with MLflow's records in a file or in PostgreSQL."""
    folder = tmp_path_factory.mktemp(f"failures-{request.param}")
    more = {}
    if request.param == "postgres":
        server: Postgres = request.getfixturevalue("postgres_server")
        more["KILL_POSTGRES"] = f"{server.folder}:{server.port}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700m", "tmpfs", str(folder)], check=True)
    try:
        found = Drivers(folder, prefect_server, more)
        yield found
        found.close()
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def try_all(
    drivers: Drivers, scenario: str, faults: tuple[str, ...], case: str = "disturbed"
) -> None:
    """Let each fault happen at some boundaries of a command, and complain of all at once."""
    undisturbed = drivers.ask("undisturbed", scenario).result()
    assert "boundaries" in undisturbed, undisturbed
    asked: dict[str, Future[dict[str, Any]]] = {}
    for at, where in spread(undisturbed["boundaries"]):
        for fault in faults:
            more = {"fault": fault} if fault else {}
            asked[f"{fault} {where}"] = drivers.ask(case, scenario, at=at, **more)
    complaints = {what: complaint(one.result(), undisturbed) for what, one in asked.items()}
    assert not any(complaints.values()), report(complaints)


@root_only
@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_faults_within_a_command(drivers: Drivers, request: pytest.FixtureRequest) -> None:
    """The disk is full, the clock jumps, the database goes: all that was to be done is done."""
    on_postgres = "postgres" in request.node.name
    try_all(drivers, "chain", (*WITHIN, *(("PostgreSQL restarts",) if on_postgres else ())))


@root_only
@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_mlflow_is_killed(drivers: Drivers) -> None:
    """MLflow's server dies at a write, and is back at once, or when the command has given up."""
    try_all(drivers, "served", BACK)


@root_only
@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("scenario", ["chain", "moved"])
def test_killed_on_postgres(
    scenario: str, drivers: Drivers, request: pytest.FixtureRequest
) -> None:
    """As test_kill.py has it on SQLite, with MLflow's records in PostgreSQL."""
    if "postgres" in request.node.name:
        try_all(drivers, scenario, ("",), case="killed")


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


@pytest.mark.nightly
def test_the_bucket_goes_away(
    tmp_path: Path,
    bucket_server: Bucket,
    prefect_server: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is gone while the second of three batches is read, and comes back: no batch is lost."""
    import fsspec

    import flows.check

    assert prefect_server
    for name, value in bucket_server.environment.items():
        monkeypatch.setenv(name, value)
    calm = make_world(tmp_path / "calm", "bucket")
    feed = '\n[feed]\nurl = "s3://sustain/away/feed"\nlabels = "s3://sustain/away/labels"\n'
    world = make_world(tmp_path / "away", "bucket", feed)
    for one in (calm, world):
        one.arrive(0, 1, 2, labelled=True)
    there = fsspec.filesystem("s3")
    for name in ("feed", "labels"):
        there.put(f"{world.path.parent / name}/", f"sustain/away/{name}/", recursive=True)
    watch(str(calm.path))
    read = flows.check.read_batch
    count = 0

    def refused(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == 2:
            bucket_server.stop()
        return read(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(flows.check, "read_batch", refused)
        with pytest.raises(FeedError, match="cannot be listed"):
            watch(str(world.path))
    assert [c.key.batch_id for c in Registry(world.settings).checks(1)] == ["optical-01"]
    bucket_server.start()
    watch(str(world.path))
    assert facts(Registry(world.settings)) == facts(Registry(calm.settings))


@pytest.mark.nightly
@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
@pytest.mark.parametrize("step", ["begin_check", "end_run", "register", "move_champion"])
def test_prefect_is_killed(
    step: str,
    kind: str,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Prefect's server dies at a step, comes back when the flow has ended: the next run goes on."""
    from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings

    home, port = tmp_path / "prefect", free()
    monkeypatch.setenv("PREFECT_HOME", str(home))
    if kind == "postgres":
        server: Postgres = request.getfixturevalue("postgres_server")
        server.run(f"CREATE DATABASE killed_{step}")
        url = server.url(f"killed_{step}", driver="+asyncpg")
        monkeypatch.setenv("PREFECT_SERVER_DATABASE_CONNECTION_URL", url)
    api = f"http://127.0.0.1:{port}/api"

    def begin() -> subprocess.Popen[bytes]:
        process = start_prefect(port, home)
        wait_until_healthy(f"{api}/health", "Prefect", [process], home)
        return process

    running = begin()
    try:
        with temporary_settings({PREFECT_API_URL: api, PREFECT_HOME: home}):
            calm, world = (make_world(tmp_path / name, "killed") for name in ("calm", "killed"))
            for one in (calm, world):
                one.arrive(0, 1, labelled=True)
            watch(str(calm.path))
            method = getattr(Registry, step)

            def killed(*args: Any, **kwargs: Any) -> Any:
                if running.poll() is None:
                    os.killpg(running.pid, signal.SIGKILL)
                    running.wait()
                return method(*args, **kwargs)

            with monkeypatch.context() as patch:
                patch.setattr(Registry, step, killed)
                with suppress(Exception):  # it may go on without the server
                    watch(str(world.path))
            assert running.poll() is not None
            running = begin()
            watch(str(world.path))
            assert facts(Registry(world.settings)) == facts(Registry(calm.settings))
    finally:
        stop([running])
