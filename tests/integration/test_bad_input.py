"""Bad input at the command line: a clear message that names the thing and the way out, in time."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner, Result

from flows.cli import main

if TYPE_CHECKING:
    from worlds import World

GIVES_UP = 15.0


def sustain(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments, catch_exceptions=False)


def said(result: Result) -> str:
    return " ".join(result.output.split())


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put back what a command exports."""
    for name in ("PREFECT_API_URL", "PREFECT_HOME", "MLFLOW_TRACKING_URI"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
        if not os.environ[name]:
            monkeypatch.delenv(name)


@contextmanager
def listener_that_never_answers() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def bare(folder: Path, extra: str = "") -> Path:
    (folder / "feed").mkdir(exist_ok=True)
    path = folder / "sustain.toml"
    path.write_text(f'[model]\nname = "m"\n{extra}')
    return path


def test_wrong_toml(tmp_path: Path) -> None:
    """An unknown key stops the command with its name and what is allowed."""
    path = bare(tmp_path, "[feed]\nurll = 1\n")
    result = sustain("watch", "-s", str(path))
    assert result.exit_code == 1
    assert "[feed] has no key 'urll' (did you mean 'url'?); allowed: url, labels" in said(result)


def test_an_architecture_that_there_is_not(tmp_path: Path) -> None:
    """It is told with its neighbours before there is a record."""
    path = bare(tmp_path, 'architecture = "resnet19"\n')
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "1.png").write_bytes(b"x")
    result = sustain("bootstrap", "-s", str(path), "--data", str(tmp_path / "data"))
    assert result.exit_code == 1
    assert "unknown architecture 'resnet19'" in said(result)
    assert not (tmp_path / "mlflow.db").exists()


def test_no_champion(tmp_path: Path) -> None:
    """Without a champion every verb says how to get one."""
    result = sustain("watch", "-s", str(bare(tmp_path)))
    assert result.exit_code == 1
    assert "model 'm' has no champion; make a first one with `sustain bootstrap`" in said(result)


def test_a_champion_that_sustain_did_not_write(tmp_path: Path) -> None:
    """A version of somebody else's is refused, and adopting it is named."""
    from mlflow import MlflowClient

    path = bare(tmp_path)
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db", f"sqlite:///{tmp_path}/mlflow.db")
    client.create_registered_model("m")
    client.create_model_version("m", source=f"{tmp_path}/theirs")
    client.set_registered_model_alias("m", "champion", "1")
    result = sustain("watch", "-s", str(path))
    assert result.exit_code == 1
    assert "sustain did not write it and will not load it" in said(result)
    assert "sustain bootstrap --adopt FILE" in said(result)


@pytest.mark.parametrize("how", ["nobody listens", "nobody answers"])
def test_mlflow_away(tmp_path: Path, free_port: int, how: str) -> None:
    """An MLflow that is not there, or that hangs, is named with what to check, in time."""
    with listener_that_never_answers() as silent:
        port = free_port if how == "nobody listens" else silent
        path = bare(tmp_path, f'[servers]\nmlflow = "http://127.0.0.1:{port}"\n')
        began = time.monotonic()
        result = sustain("watch", "-s", str(path))
        took = time.monotonic() - began
    assert result.exit_code == 1
    assert f"MLflow at http://127.0.0.1:{port} does not answer" in said(result)
    assert "[servers] mlflow (or MLFLOW_TRACKING_URI)" in said(result)
    assert took < GIVES_UP  # the limit is the promise itself


@pytest.mark.parametrize("how", ["nobody listens", "nobody answers"])
def test_prefect_away(tmp_path: Path, free_port: int, how: str) -> None:
    """A Prefect that is not there, or that hangs, is named with what to check, in time."""
    with listener_that_never_answers() as silent:
        port = free_port if how == "nobody listens" else silent
        path = bare(tmp_path, f'[servers]\nprefect = "http://127.0.0.1:{port}/api"\n')
        began = time.monotonic()
        result = sustain("retrain", "-s", str(path))
        took = time.monotonic() - began
    assert result.exit_code == 1
    assert f"Prefect at http://127.0.0.1:{port}/api does not answer" in said(result)
    assert "[servers] prefect (or PREFECT_API_URL)" in said(result)
    assert took < GIVES_UP


def test_feeds_that_hold_nothing(small_world: Callable[[str], World]) -> None:
    """An empty feed is nothing to do; one that is missing is named, and the record shown.

    A batch that could not be checked is shown until it is gone; what is said is said once.
    """
    world = small_world("empty")
    assert "version 1 has no check yet" in said(sustain("status", "-s", str(world.path)))
    result = sustain("watch", "-s", str(world.path))
    assert result.exit_code == 0
    assert "nothing to do: the feed is empty" in said(result)
    feed = world.path.parent / "feed"
    (batch,) = world.arrive(0)
    (feed / "broken").mkdir()
    (feed / "broken" / "1.png").write_text("no picture")
    told = said(sustain("watch", "-s", str(world.path)))
    assert told.count("accuracy probably fell by") == 1
    assert f"decision: ask_for_labels ({batch})" in told
    told = said(sustain("status", "-s", str(world.path)))
    assert "broken: batch broken: 1 of 1 pictures could not be read" in told
    shutil.rmtree(feed / "broken")
    assert "broken" not in said(sustain("status", "-s", str(world.path)))
    shutil.rmtree(feed)
    result = sustain("watch", "-s", str(world.path))
    assert result.exit_code == 1
    assert f"the feed {feed} does not exist" in said(result)
    result = sustain("status", "-s", str(world.path))
    assert result.exit_code == 0
    for words in ("1 ← champion", batch, f"the feed {feed} does not exist"):
        assert words in said(result)


def test_labels_that_do_not_suffice(small_world: Callable[[str], World]) -> None:
    """Labels for nothing, too few, or of one class: no retraining, and what is missing is said."""
    from flows.demo import _optical
    from flows.watch import watch

    world = small_world("labels")
    (batch,) = world.arrive(0)
    digits, folder = _optical(), world.path.parent / "labels"
    labels = {f"{batch}/{i:05d}.png": str(digits.labels[i]) for i in range(100)}

    def write(rows: dict[str, str]) -> None:
        lines = [f"{name},{label}" for name, label in rows.items()]
        (folder / "1.csv").write_text("\n".join(["sample_id,label", *lines, ""]))

    write({"nowhere/1.png": "3"})
    watched = watch(str(world.path))
    assert watched.decision.action == "ask_for_labels"
    assert "34 labels are missing: 0 of 34 are here" in watched.decision.reason
    assert any("samples that the feed does not hold" in problem for problem in watched.problems)

    write(dict(list(labels.items())[:10]))
    watched = watch(str(world.path))
    assert "30 labels are missing: 10 of 40" in watched.decision.reason
    result = sustain("retrain", "-s", str(world.path))
    assert result.exit_code == 1
    assert "10 fresh labels, and 40 are needed" in said(result)

    write(dict.fromkeys(list(labels)[:40], "3"))
    watched = watch(str(world.path))
    assert watched.decision.action == "ask_for_labels"
    assert "cover 1 class and at least 2 are needed" in watched.decision.reason
    from flows.registry import Registry

    assert [v.number for v in Registry(world.settings).versions()] == [1]


@pytest.mark.nightly
@pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("unshare") is None or os.geteuid() != 0,
    reason="a small disk is mounted for this test, which takes Linux and root",
)
def test_a_disk_that_is_full_in_the_middle_of_a_check(
    small_world: Callable[[str], World], prefect_server: str
) -> None:
    """The check says so, nothing counts as done, and with room the same command finishes it."""
    world = small_world("full")
    world.arrive(0)
    artifacts = world.path.parent / "mlartifacts"
    script = f"""
        set -e
        mount -t tmpfs -o size=6m tmpfs /mnt
        cp -a {artifacts}/. /mnt/
        mount --bind /mnt {artifacts}
        head -c 100m /dev/zero > {artifacts}/filler 2>/dev/null || true
        exec {sys.executable} -m flows.cli watch -s {world.path}
    """
    environment = {**os.environ, "PREFECT_API_URL": prefect_server}
    run = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
        check=False,
    )
    assert run.returncode == 1, run.stdout + run.stderr
    assert "No space left on device" in run.stderr
    assert "run the same command again" in run.stderr
    from flows.registry import Registry

    registry = Registry(world.settings)
    assert [c for c in registry.checks(1) if c.finished] == []
    again = subprocess.run(
        [sys.executable, "-m", "flows.cli", "watch", "-s", str(world.path)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
        check=False,
    )
    assert again.returncode == 0, again.stderr
    (check,) = registry.checks(1)
    assert check.finished
    assert check.action == "ask_for_labels"
