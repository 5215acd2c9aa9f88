"""`sustain backtest` on a model's own record, and its policy deployed: does it do as replayed?"""

from __future__ import annotations

import os
import re
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner
from worlds import World, make_world

from flows.backtest import backtest as flow
from flows.cli import main
from flows.registry import Registry
from flows.settings import load_settings
from flows.watch import watch

POLICIES = """\
[policy]
min_drop = [0.05, 0.5]
"""
HOUR = timedelta(hours=1)


def dated(folder: Path, at: datetime) -> None:
    """Let the files of a folder have arrived at a time."""
    for file in folder.iterdir() if folder.is_dir() else [folder]:
        os.utime(file, (at.timestamp(), at.timestamp()))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, prefect_server: str) -> World:
    """Give a model with a day's history in its feed: six batches, labels after the third."""
    del prefect_server  # only has to be there
    world = make_world(
        tmp_path_factory.mktemp("world") / "replayed",
        "replayed",
        change=("epochs = 40", "epochs = 20"),
    )
    feed, labels = world.path.parent / "feed", world.path.parent / "labels"
    begin = datetime.now(UTC) - 20 * HOUR
    world.arrive(0, 1, 2, labelled=True)
    world.arrive(3, 4, 5, labelled=True)
    (world.path.parent / "try.toml").write_text(POLICIES)
    for place, batch in enumerate(sorted(feed.iterdir())):
        dated(batch, begin + place * HOUR)
    for place, file in enumerate(sorted(labels.iterdir())):
        dated(file, begin + (3 + 3 * place) * HOUR - HOUR / 2)
    return world


def test_a_grid_of_ten_thousand_says_what_it_would_cost(world: World, tmp_path: Path) -> None:
    """It is not begun without --yes, and the message has the figures."""
    ten = ", ".join(f"{0.01 * (i + 1):.2f}" for i in range(100))
    many = ", ".join(str(100 + i) for i in range(100))
    path = tmp_path / "grid.toml"
    path.write_text(f"[policy]\nmin_drop = [{ten}]\n\n[stream]\nrun_length = [{many}]\n".replace(
        "1.00", "0.99"))  # fmt: skip
    done = CliRunner().invoke(main, ["backtest", "-s", str(world.path), "--policy", str(path)])
    assert done.exit_code == 0, done.output
    assert "10,000 policies over 6 batches" in done.output
    assert "hours" in done.output
    assert "--yes" in done.output


def test_the_flow_replays_too(world: World) -> None:
    """Deployed, it gives a sentence a policy."""
    told = flow(str(world.path), [str(world.path.parent / "try.toml")], times=0)
    assert [one.split(": accuracy")[0] for one in told] == [
        "try: min_drop=0.05",
        "try: min_drop=0.5",
    ]


def test_each_policy_is_told_of_when_it_is_done(world: World) -> None:
    """By a plain line each, which a log of a machine without a terminal shows as well."""
    policy = str(world.path.parent / "try.toml")
    command = ["backtest", "-s", str(world.path), "--policy", policy, "--oracle-times", "0"]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    lines = [line for line in done.output.splitlines() if line.startswith("replayed ")]
    assert [re.sub(r"after \d+ s: |: accuracy 0\.\d+", "", line) for line in lines] == [
        "replayed 1 of 2 policies try: min_drop=0.05",
        "replayed 2 of 2 policies try: min_drop=0.5",
    ]


@pytest.mark.nightly
def test_an_emitted_policy_behaves_as_replayed(world: World) -> None:
    """The command replays, emits; live flows with its settings retrain at the same batch."""
    root = world.path.parent
    command = ["backtest", "-s", str(world.path), "--policy", str(root / "try.toml")]
    asked = [*command, "--emit", str(root / "best.toml"), "--choose", "try: min_drop=0.05"]
    done = CliRunner().invoke(
        main, [*asked, "--floor", "0.6", "--oracle-times", "0"], env={"COLUMNS": "200"}
    )
    assert done.exit_code == 0, done.output
    assert "try: min_drop=0.5" in done.output
    registry = Registry(load_settings(root / "best.toml", environ={}))
    assert [v.number for v in registry.versions()] == [1]  # a replay makes none on record
    replayed = next(run for run in _runs(registry) if run["chosen"] == "true")
    assert replayed["retrainings"] >= 1

    lived = _live(world, root / "best.toml")
    evidence = (root / "best.toml").read_text()
    for cause, promoted in lived:
        assert f"at {cause}: {'promoted' if promoted else 'not promoted'}." in evidence
    assert len(lived) == replayed["retrainings"]


def _runs(registry: Registry) -> list[dict[str, float | str]]:
    """Read what replays put on record, the newest first."""
    name = f"sustain/{registry.name}/backtest"
    experiment = registry.client.get_experiment_by_name(name)
    return [
        {**run.data.metrics, "chosen": run.data.tags.get("sustain.chosen", "")}
        for run in registry.client.search_runs([experiment.experiment_id])
    ]


def _live(world: World, settings: Path) -> list[tuple[str, bool]]:
    """Let the same batches and labels arrive one after another, and watch after each.

    Returns:
        The batch that caused each retraining, and whether its version was promoted.
    """
    root = world.path.parent
    feed, labels, aside = root / "feed", root / "labels", root / "aside"
    history = sorted([*feed.iterdir(), *labels.iterdir()], key=_time)
    aside.mkdir()
    places = [(shutil.move(item, aside / item.name), item) for item in history]
    for kept, item in places:
        Path(kept).rename(item)
        dated(item, datetime.now(UTC))
        watch(str(settings))
    registry = Registry(load_settings(settings, environ={}))
    return [
        (registry.check_record(v.tags["cause_check"]).key.batch_id, "promoted_at" in v.tags)
        for v in registry.versions()
        if v.parent is not None
    ]


def _time(item: Path) -> float:
    return max(f.stat().st_mtime for f in item.iterdir()) if item.is_dir() else item.stat().st_mtime
