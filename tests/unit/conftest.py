"""Fixtures that several tests of the feed share."""

import resource
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from hypothesis import HealthCheck, settings

# `pytest --hypothesis-profile=night` looks for more; in between, each run tries the same
settings.register_profile(
    "day",
    max_examples=25,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
    database=None,
)
settings.register_profile(
    "night", settings.get_profile("day"), max_examples=2000, derandomize=False
)
settings.load_profile("day")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Give the folder of a project with an empty feed."""
    (tmp_path / "project" / "feed").mkdir(parents=True)
    return tmp_path / "project"


@pytest.fixture
def a_gigabyte() -> Iterator[None]:
    """Let this process have so much more memory, and no more, where Linux can see to it."""
    status = Path("/proc/self/status")
    if not status.exists():
        yield
        return
    words = status.read_text().split()
    used = int(words[words.index("VmData:") + 1]) * 1024
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (used + 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_DATA, before)


@pytest.fixture
def bucket() -> Iterator[tuple[str, Any]]:
    url = f"memory://{uuid.uuid4().hex}"
    fs = fsspec.filesystem("memory")
    yield url, fs
    if fs.exists(url):
        fs.rm(url, recursive=True)
