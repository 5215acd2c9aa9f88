"""What the integration tests share: a real Prefect server, free ports, and small worlds."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from flows.settings import Settings

SETTINGS = """\
[model]
name = "{name}"
architecture = "small_cnn"
channels = 1

[bootstrap]
epochs = 40

[training]
epochs = 40

[policy]
min_labels = 30

[gate]  # some 80 old and 40 fresh held-out digits cannot carry the strict limits
min_fresh = 10
max_drop = 0.2
max_drop_bound = 0.4
max_class_drop = 0.9
"""


def pytest_configure() -> None:
    """Set what Prefect and MLflow read when they are imported, as the command line does."""
    from flows.settings import Settings, export_to_environment

    export_to_environment(Settings(Path("none.toml")))


@dataclass(frozen=True)
class World:
    """A model folder whose version 1 learned 400 MNIST digits.

    `sustain.toml` is at `path`; batches of optical digits, which it does not know, arrive in feed/.
    """

    path: Path

    @property
    def settings(self) -> Settings:
        """Read the settings."""
        from flows.settings import load_settings

        return load_settings(self.path, environ={})

    def arrive(self, *numbers: int, labelled: bool = False) -> list[str]:
        """Let batches of 100 optical digits arrive, with labels if wanted; return their ids."""
        from flows import demo

        digits = demo._optical()
        feed = self.path.parent / "feed"
        ids = demo._arrive(feed, "optical", digits, numbers)
        if labelled:
            path = self.path.parent / "labels" / f"{'-'.join(ids)}.csv"
            demo._label_late(path, feed, digits, ids)
        return ids


@pytest.fixture
def free_port() -> int:
    """Return a port on which nobody listens."""
    return _free_port()


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

    home, port = tmp_path_factory.mktemp("prefect"), _free_port()
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

    def make(name: str) -> World:
        from flows import demo
        from flows.bootstrap import bootstrap

        root = tmp_path / name
        (root / "feed").mkdir(parents=True)
        (root / "labels").mkdir()
        path = root / "sustain.toml"
        path.write_text(SETTINGS.format(name=name))
        demo._write_class_folders(root / "first", demo._mnist()[:400])
        bootstrap(str(path), data=str(root / "first"))
        return World(path)

    return make


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
