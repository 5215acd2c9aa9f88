"""What happens when something happens at the wrong moment: two moves at once, MLflow away."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest
from worlds import free

from flows.cli import main
from flows.promote import promote
from flows.records import ROLLBACK
from flows.registry import Registry
from flows.retrain import retrain
from flows.servers import start_mlflow, stop, wait_until_healthy
from flows.settings import load_settings

if TYPE_CHECKING:
    from pathlib import Path

    from worlds import World


def test_two_moves_at_once_end_with_one_champion(small_world: Callable[[str], World]) -> None:
    """A rollback and a promotion race: one of them serves, and the record says the same.

    MLflow keeps one announcement: the mover whose own was overwritten counts as somebody by hand.
    """
    world = small_world("race")
    world.arrive(0, labelled=True)
    retrain(str(world.path))
    world.arrive(1, labelled=True)
    retrain(str(world.path))
    promote(str(world.path), version=2, why="for the test")
    start = threading.Barrier(2)

    def move(number: int, by: str) -> None:
        registry = Registry(world.settings)
        after = registry.version(number)
        start.wait()
        registry.move_champion(after, by=by, why=f"to {number}", now=datetime.now(UTC))

    both = [threading.Thread(target=move, args=one) for one in ((1, ROLLBACK), (3, "a person"))]
    for one in both:
        one.start()
    for one in both:
        one.join()
    registry = Registry(world.settings)
    registry.observe_moves(datetime.now(UTC))
    champion = registry.champion()
    assert champion.number in (1, 3)
    assert not champion.rolled_back
    why = champion.tags["promoted_why"]
    assert why == f"to {champion.number}" or "moved by hand" in why
    assert not registry.unobserved_move()
    assert registry.observe_moves(datetime.now(UTC)) is None


@pytest.mark.nightly
def test_mlflow_goes_away_between_verdict_and_alias(
    small_world: Callable[[str], World], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command fails with what to do; run again, it finds the verdict and moves the alias."""
    world = small_world("away")
    world.arrive(0, 1, 2, labelled=True)
    port, logs = free(), tmp_path / "logs"
    address = f"http://127.0.0.1:{port}"
    servers = [start_mlflow(world.settings, port, logs)]
    wait_until_healthy(f"{address}/health", "MLflow", servers, logs)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    move = Registry.move_champion

    def away(*args: object, **kwargs: object) -> object:
        stop(servers)
        return move(*args, **kwargs)  # type: ignore[arg-type]  # handed on as it came

    try:
        with monkeypatch.context() as patch:
            patch.setattr(Registry, "move_champion", away)
            with pytest.raises(Exception, match=r"Max retries exceeded|refused|failed"):
                retrain(str(world.path))
        servers[:] = [start_mlflow(world.settings, port, logs)]
        wait_until_healthy(f"{address}/health", "MLflow", servers, logs)
        registry = Registry(load_settings(world.path))
        assert registry.alias("champion") == 1
        assert registry.version(2).verdict == "promote"
        again = retrain(str(world.path))
        assert again.promoted
        assert not again.made_now
        assert registry.alias("champion") == 2
        assert [v.number for v in registry.versions()] == [1, 2]
    finally:
        stop(servers)


def test_a_deleted_alias_stops_the_flows_with_the_way_out(
    small_world: Callable[[str], World],
) -> None:
    """Every command says which version was the last champion, and how it comes back."""
    from click.testing import CliRunner

    world = small_world("gone")
    registry = Registry(world.settings)
    registry.client.delete_registered_model_alias("gone", "champion")
    for command in (["watch"], ["retrain"], ["promote"], ["status"], ["ask"]):
        result = CliRunner().invoke(main, [*command, "-s", str(world.path)])
        said = " ".join(result.output.split())
        assert result.exit_code == 1, said
        assert "version 1 was the last: give it back with `sustain rollback --to 1`" in said
    back = CliRunner().invoke(main, ["rollback", "-s", str(world.path), "--to", "1"])
    assert back.exit_code == 0, back.output
    assert registry.alias("champion") == 1
