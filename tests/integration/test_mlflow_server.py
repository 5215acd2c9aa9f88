"""The flows against a real MLflow server that keeps the artifacts itself, on every kind of store.

Once all is on disk: SQLite, and a folder. Once nothing is: MLflow's and Prefect's databases are
PostgreSQL's, and the feed, the labels and MLflow's artifacts lie in a bucket of an S3 server.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from stores import Bucket, Postgres
from worlds import World, free, make_world

from flows.registry import Registry
from flows.rollback import rollback
from flows.servers import start_prefect, stop, wait_until_healthy
from flows.watch import watch


@dataclass(frozen=True)
class Stores:
    """Where everything is kept, and how a finished batch or file of labels gets there."""

    mlflow: str
    feed: str = ""

    def bring(self, world: World) -> None:
        """Copy to the bucket what arrived in the folders, and empty them."""
        if not self.feed:
            return
        import fsspec

        for name in ("feed", "labels"):
            folder = world.path.parent / name
            there = fsspec.filesystem("s3")
            there.put(f"{folder}/", f"{self.feed}/{name}/", recursive=True)


def start_mlflow(
    folder: Path, database: str, artifacts: str
) -> tuple[str, subprocess.Popen[bytes]]:
    """Start MLflow with a database and an artifact store that only it knows."""
    folder.mkdir()
    address = f"http://127.0.0.1:{(port := free())}"
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "mlflow", "server", "--workers", "1", "--port", str(port)),
            *("--backend-store-uri", database, "--artifacts-destination", artifacts),
        ],
        cwd=folder,
        env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    wait_until_healthy(f"{address}/health", "MLflow", [process], folder)
    return address, process


@pytest.fixture
def on_disk(tmp_path: Path, prefect_server: str) -> Iterator[Stores]:
    """SQLite and a folder."""
    del prefect_server  # only has to be there
    folder = tmp_path / "server"
    address, process = start_mlflow(folder, f"sqlite:///{folder}/mlflow.db", f"{folder}/artifacts")
    yield Stores(address)
    stop([process])


@pytest.fixture
def elsewhere(
    tmp_path: Path,
    postgres_server: Postgres,
    bucket_server: Bucket,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Stores]:
    """PostgreSQL and S3, for MLflow, Prefect and the feed."""
    from prefect.settings import PREFECT_API_URL, temporary_settings

    for name, value in bucket_server.environment.items():
        monkeypatch.setenv(name, value)
    for database in ("mlflow", "prefect"):
        postgres_server.run(f"CREATE DATABASE {database}")
    prefect = postgres_server.url("prefect", driver="+asyncpg")
    home, port = tmp_path / "prefect", free()
    started: list[subprocess.Popen[bytes]] = []
    try:
        with monkeypatch.context() as patch:
            patch.setenv("PREFECT_SERVER_DATABASE_CONNECTION_URL", prefect)
            patch.setenv("PREFECT_HOME", str(home))
            started.append(start_prefect(port, home))
        artifacts = "s3://sustain/mlflow"
        mlflow = postgres_server.url("mlflow")
        address, process = start_mlflow(tmp_path / "server", mlflow, artifacts)
        started.append(process)
        url = f"http://127.0.0.1:{port}/api"
        wait_until_healthy(f"{url}/health", "Prefect", started, home)
        with temporary_settings({PREFECT_API_URL: url}):
            yield Stores(address, "s3://sustain/model")
    finally:
        stop(started)
        for database in ("mlflow", "prefect"):
            postgres_server.run(f"DROP DATABASE {database} WITH (FORCE)")


@pytest.mark.parametrize("kind", [pytest.param("on_disk", marks=pytest.mark.nightly), "elsewhere"])
def test_the_loop_over_http(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Bootstrap, check, retrain, promote and roll back, with nothing shared but addresses."""
    stores: Stores = request.getfixturevalue(kind)
    root = tmp_path / "model"
    servers = f'\n[servers]\nmlflow = "{stores.mlflow}"\n'
    feed = f'\n[feed]\nurl = "{stores.feed}/feed"\nlabels = "{stores.feed}/labels"\n'
    world = make_world(root, "remote", servers + (feed if stores.feed else ""))
    path = world.path
    world.arrive(0, 1, labelled=True)
    stores.bring(world)
    watched = watch(str(path))
    assert watched.problems == ()
    assert [c.batch_id for c in watched.checked] == ["optical-01", "optical-02"]
    assert all(c.alarm for c in watched.checked)
    assert "version 2 was promoted" in watched.done
    assert rollback(str(path), why="a test").after == 1
    registry = Registry(world.settings)
    assert registry.version(2).rolled_back
    assert registry.memory(registry.version(2)).regimes
    assert not (root / "mlflow.db").exists()
    assert not (root / "mlartifacts").exists()
    link = registry.run_url(registry.checks(1)[0].run_id)
    assert link.startswith(f"{stores.mlflow}/#/experiments/")
