"""What the integration tests share: a real Prefect server, free ports, and small worlds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from stores import Bucket, Postgres, bucket, postgres
from worlds import World, free, make_world


def pytest_configure() -> None:
    """Set what Prefect and MLflow read when they are imported, as the command line does."""
    from flows.settings import Settings, export_to_environment

    export_to_environment(Settings(Path("none.toml")))


@pytest.fixture
def free_port() -> int:
    """Return a port on which nobody listens."""
    return free()


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start Prefect's server for the session; flows run in tests report to it. Gives its API URL.

    It has a PREFECT_HOME of its own. Processes that a test starts need PREFECT_API_URL set to this.
    """
    from prefect.events.worker import EventsWorker
    from prefect.settings import (
        PREFECT_API_URL,
        PREFECT_HOME,
        PREFECT_LOGGING_TO_API_ENABLED,
        temporary_settings,
    )

    from flows.servers import start_prefect, stop, wait_until_healthy

    home, port = tmp_path_factory.mktemp("prefect"), free()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_HOME", str(home))
        started = [start_prefect(port, home)]
    try:
        wait_until_healthy(f"http://127.0.0.1:{port}/api/health", "Prefect", started, home)
        url = f"http://127.0.0.1:{port}/api"
        with temporary_settings(
            # logs and events that are still on their way when the server stops take minutes to die
            {PREFECT_API_URL: url, PREFECT_HOME: home, PREFECT_LOGGING_TO_API_ENABLED: False}
        ):
            yield url
            EventsWorker.drain_all()
    finally:
        stop(started)


@pytest.fixture
def small_world(tmp_path: Path, prefect_server: str) -> Callable[[str], World]:
    """Return a function that makes a model folder by the real `bootstrap` flow, in seconds."""
    del prefect_server  # only has to be there

    return lambda name: make_world(tmp_path / name, name)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Postgres]:
    """Serve a real PostgreSQL for the session."""
    with postgres() as server:
        yield server


@pytest.fixture(scope="session")
def bucket_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bucket]:
    """Serve a real S3 bucket, `sustain`, for the session."""
    with bucket(tmp_path_factory.mktemp("s3") / "data") as server:
        yield server
