"""Fixtures that several tests of the feed share."""

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Give the folder of a project with an empty feed."""
    (tmp_path / "project" / "feed").mkdir(parents=True)
    return tmp_path / "project"


@pytest.fixture
def bucket() -> Iterator[tuple[str, Any]]:
    url = f"memory://{uuid.uuid4().hex}"
    fs = fsspec.filesystem("memory")
    yield url, fs
    if fs.exists(url):
        fs.rm(url, recursive=True)
