"""The flows against a real MLflow server that keeps the artifacts itself, on every kind of store.

Once all is on disk: SQLite, and a folder. Once nothing is: MLflow's and Prefect's databases are
PostgreSQL's, and the feed, the labels and MLflow's artifacts lie in a bucket of an S3 server. The
last test has the parts of one model on machines of their own, which share nothing but these.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from deployed import ask
from samples import optical_digits
from stores import Bucket, Postgres
from worlds import World, free, make_world
from writers import write_at_once

from flows.deploy import deploy
from flows.records import CHAMPION
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
    write_at_once(registry, Registry(world.settings), registry.version(2))


SERVE = """
import io, json, sys, mlflow, numpy as np
pictures = np.load(io.BytesIO(sys.stdin.buffer.read()))
served = mlflow.pyfunc.load_model("models:/apart@champion")
print(json.dumps(list(served.predict(pictures)["class"])))
"""


@dataclass(frozen=True)
class Machine:
    """Processes with a file system and a process table of their own.

    What lies at `there` is hidden from them by the machine's own `disk`, so they see neither each
    other's files nor the servers'.
    """

    disk: Path
    there: Path

    def run(self, *words: str, given: bytes = b"") -> str:
        """Run a command to its end; what it says is returned."""
        home = str(self.there / "home")
        mounted = 'mount --bind "$1" "$2" && shift 2 && exec "$@"'
        done = subprocess.run(
            [
                *("unshare", "--mount", "--pid", "--ipc", "--fork", "--mount-proc"),
                *("sh", "-c", mounted, "sh", str(self.disk), str(self.there), *words),
            ],
            cwd="/",
            env={**os.environ, "HOME": home, "PREFECT_HOME": f"{home}/prefect", "TMPDIR": home},
            input=given,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=400,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout.decode()


def book(registry: Registry) -> list[dict[str, object]]:
    """What the registry says of each version, and of each check against the first."""
    tags = ("parent", "retrain_key", "verdict", "promoted_from", "cause")
    versions: list[dict[str, object]] = [
        {name: registry.version(number).tags.get(name) for name in tags} for number in (1, 2)
    ]
    checks = sorted(registry.checks(1), key=lambda one: one.key.batch_id)
    figures = ("drift.p_value", "accuracy.estimated", "accuracy.settled")
    return versions + [
        {"batch": c.key, "action": c.action, **{name: c.metrics.get(name) for name in figures}}
        for c in checks
    ]


@pytest.mark.nightly
def test_watching_retraining_and_serving_on_machines_of_their_own(
    elsewhere: Stores,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They share MLflow, Prefect and the bucket; the registry ends as that of one machine does."""
    if (
        not shutil.which("unshare")
        or subprocess.run(["unshare", "-m", "true"], check=False).returncode
    ):
        pytest.skip("this user may make no machines: unshare -m is refused")
    from prefect.settings import PREFECT_API_URL

    servers = f'\n[servers]\nmlflow = "{elsewhere.mlflow}"\n\n[schedule]\nwatch = 0\nprune = ""\n'
    worlds = {}
    for name in ("together", "apart"):
        stores = Stores(elsewhere.mlflow, f"s3://sustain/{name}")
        feed = f'\n[feed]\nurl = "{stores.feed}/feed"\nlabels = "{stores.feed}/labels"\n'
        worlds[name] = make_world(tmp_path / "shown" / name, name, servers + feed)
        worlds[name].arrive(0, 1, labelled=True)
        stores.bring(worlds[name])
    together, apart = worlds["together"], worlds["apart"]
    assert "version 2 was promoted" in watch(str(together.path)).done
    deploy([apart.settings], "apart")

    prefect = str(PREFECT_API_URL.value())
    monkeypatch.setenv("PREFECT_API_URL", prefect)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", elsewhere.mlflow)
    machines = {}
    for name in ("watches", "retrains", "serves"):
        disk = tmp_path_factory.mktemp(name)
        (disk / "home").mkdir()
        machines[name] = Machine(disk, tmp_path / "shown")
        if name != "serves":
            (disk / "apart").mkdir()
            shutil.copy(apart.path, disk / "apart")
    sustain = Path(sys.executable).parent / "sustain"
    told = machines["watches"].run(str(sustain), "watch", "-s", str(apart.path))
    assert "starts by itself" in " ".join(told.split())
    registry = Registry(apart.settings)
    assert registry.champion().number == 1
    worker = (sys.executable, "-m", "prefect", "worker", "start", "--pool", "apart", "--run-once")
    runs: dict[str, str] = {}
    for _ in range(10):  # it asks the server once, perhaps before the run is handed out
        said = machines["retrains"].run(*worker, "--install-policy", "never")
        found = ask(prefect, "/flow_runs/filter", {"flows": {"name": {"any_": ["retrain"]}}})
        runs = {run["name"]: run["state_name"] for run in found if run["deployment_id"]}
        if "Completed" in runs.values():
            break
    assert list(runs.values()) == ["Completed"], said

    registry, one = Registry(apart.settings), Registry(together.settings)
    assert registry.alias(CHAMPION) == one.alias(CHAMPION) == 2
    assert book(registry) == book(one)
    weights = [r.network(r.version(2)).state_dict() for r in (registry, one)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    some = optical_digits().take(range(40))
    pictures = tmp_path / "pictures.npy"
    np.save(pictures, some.pixels[:, 0].numpy())
    answers = machines["serves"].run(sys.executable, "-c", SERVE, given=pictures.read_bytes())
    right = [
        int(said) == label
        for said, label in zip(json.loads(answers.splitlines()[-1]), some.labels, strict=True)
    ]
    assert sum(right) > 20
    left = {name: sorted(p.name for p in m.disk.iterdir()) for name, m in machines.items()}
    assert left == {"watches": ["apart", "home"], "retrains": ["apart", "home"], "serves": ["home"]}
