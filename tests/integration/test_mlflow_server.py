"""The flows against a real MLflow server that keeps the artifacts itself."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from worlds import free, make_world

from flows.registry import Registry
from flows.rollback import rollback
from flows.servers import stop, wait_until_healthy
from flows.watch import watch


@pytest.fixture
def mlflow_server(tmp_path: Path) -> Iterator[str]:
    """Start MLflow with its own database and artifact store, in a folder nobody else knows."""
    folder, port = tmp_path / "server", free()
    folder.mkdir()
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "mlflow", "server", "--workers", "1", "--port", str(port)),
            *("--backend-store-uri", f"sqlite:///{folder}/mlflow.db"),
            *("--artifacts-destination", str(folder / "artifacts")),
        ],
        cwd=folder,
        env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_until_healthy(f"http://127.0.0.1:{port}/health", "MLflow", [process], folder)
        yield f"http://127.0.0.1:{port}"
    finally:
        stop([process])


def test_the_loop_over_http(tmp_path: Path, mlflow_server: str, prefect_server: str) -> None:
    """Bootstrap, check, retrain, promote and roll back, with nothing shared but the address."""
    assert prefect_server
    root = tmp_path / "model"
    world = make_world(root, "remote", f'\n[servers]\nmlflow = "{mlflow_server}"\n')
    path = world.path
    world.arrive(0, 1, labelled=True)
    watched = watch(str(path))
    assert "version 2 was promoted" in watched.done
    assert rollback(str(path), why="a test").after == 1
    registry = Registry(world.settings)
    assert registry.version(2).rolled_back
    assert not (root / "mlflow.db").exists()
    assert not (root / "mlartifacts").exists()
    link = registry.run_url(registry.checks(1)[0].run_id)
    assert link.startswith(f"{mlflow_server}/#/experiments/")
