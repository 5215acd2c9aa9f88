"""What nothing needs goes; what serves, or what that came from, never does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from flows import demo
from flows.cli import main
from flows.promote import promote
from flows.prune import prune
from flows.records import ArtifactError, RegistryError
from flows.registry import Registry
from flows.retrain import retrain
from flows.rollback import rollback
from flows.watch import watch
from sft.models import load

if TYPE_CHECKING:
    from worlds import World

EAGER = "\n[retention]\nkeep = 0\ndays = 0.0\nreport_days = 0.000001\narchive = 'archive'\n"


def label(world: World, number: int) -> None:
    """Let the labels of a batch come, with the batch if it is not there."""
    digits = demo._optical()
    feed = world.path.parent / "feed"
    ids = (
        [f"optical-{number + 1:02}"]
        if number == 0
        else demo._arrive(feed, "optical", digits, [number])
    )
    demo._label_late(world.path.parent / "labels" / f"{number}.csv", feed, digits, ids)


def test_prune_keeps_what_is_needed(
    small_world: Callable[[str], World], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of champion, the one before it and a branch that was given up, only the branch goes."""
    world = small_world("pruned")
    world.arrive(0)
    watch(str(world.path))
    label(world, 0)
    retrain(str(world.path))
    promote(str(world.path), version=2, why="for the test")
    label(world, 1)
    retrain(str(world.path))  # version 3, from 2
    rollback(str(world.path), to=1, why="for the test")
    label(world, 2)
    retrain(str(world.path))  # version 4, from 1
    promote(str(world.path), version=4, why="for the test")
    registry = Registry(world.settings)
    lost = registry.version(3)
    registry.tag(lost, pruned_at="2026-11-22")  # as if killed while it was deleted
    registry.delete_artifacts(lost.run_id, ("model",))
    with world.path.open("a") as file:
        file.write(EAGER)

    said = CliRunner().invoke(main, ["prune", "-s", str(world.path), "--dry-run"]).output
    assert "versions would be deleted after a copy to archive: 2, 3" in said
    assert len(registry.versions()) == 4
    archive = world.path.parent / "archive"
    assert not archive.exists()

    (check,) = registry.checks(1)
    with monkeypatch.context() as patch:
        patch.setitem(registry.__dict__, "_folder", Path("/dev/full"))
        with pytest.raises(ArtifactError, match="now"):  # so nobody takes it for gone
            registry.features(check)
    assert len(registry.features(check)) == 100
    pruned = prune(str(world.path))
    assert pruned.versions == (2, 3)
    assert [v.number for v in registry.versions()] == [1, 4]
    assert "go back" in pruned.kept[1]
    network = load(archive / "pruned" / "2" / "model" / "data" / "network")
    assert network.config.classes == registry.config(registry.champion()).classes
    (check,) = registry.checks(1)  # its figures and decision stay
    assert check.action
    assert pruned.reports == 1
    with pytest.raises(RegistryError, match="cannot be read"):
        registry.features(check)
    again = prune(str(world.path))
    assert (again.versions, again.reports) == ((), 0)
    assert rollback(str(world.path), to=1, why="it still loads").after == 1
