"""`sustain rollback`: give the alias back to an earlier version."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from prefect import flow

from flows.history import show_in_prefect
from flows.logs import log
from flows.notify import tell
from flows.records import ROLLBACK, RegistryError, Version
from flows.registry import Registry
from flows.settings import load_settings


@dataclass(frozen=True)
class RolledBack:
    """A change of champion: from which version to which."""

    before: int | None
    after: int
    why: str

    @property
    def words(self) -> str:
        """One sentence."""
        lost = (
            f", and version {self.before} is never promoted again by itself" if self.before else ""
        )
        return f"version {self.after} is champion again{lost}: {self.why}"


@flow(name="rollback")
def rollback(
    settings_path: str, to: int | None = None, why: str = "no reason given", who: str = ""
) -> RolledBack:
    """Roll back: load-test the target, then move the alias.

    Args:
        settings_path: the model's TOML file.
        to: the version that shall serve; by default the one before the champion.
        why: the reason, for the record.
        who: the person who asks for it, for the record.

    Raises:
        RegistryError: there is no such version, it was never judged, or it does not load; the alias
            has not moved then.
    """
    settings = load_settings(Path(settings_path))
    registry = Registry(settings)
    done = roll_back(registry, to, why, who)
    tell(registry, settings, registry.now())
    return done


def roll_back(
    registry: Registry, to: int | None = None, why: str = "no reason given", who: str = ""
) -> RolledBack:
    """Do what `rollback` does, on a record."""
    settings, now = registry.settings, registry.now()
    move = registry.observe_moves(now)
    if to is None and move is not None and move.by == ROLLBACK:
        # this command was killed after the alias had moved: one more step back would be too far
        show_in_prefect(registry)
        return RolledBack(move.before, move.after, move.why)
    target = registry.version(to) if to is not None else _before(registry)
    if target.verdict is None:
        raise RegistryError(
            f"version {target.number} was never judged, so it cannot serve: judge it with"
            f" `sustain promote --version {target.number}`"
        )
    network = registry.network(target)
    size, channels = network.config.preprocessing.image_size, network.config.preprocessing.channels
    network.embed(torch.zeros(2, channels, size, size, dtype=torch.uint8))
    if registry.alias("champion") == target.number:
        return RolledBack(None, target.number, "it was champion already")
    move = registry.move_champion(target, by=ROLLBACK, why=why, now=now, who=who)
    show_in_prefect(registry)
    log(settings, "rolled_back", version=move.after, before=move.before, who=who, reason=why)
    return RolledBack(move.before, move.after, why)


def _before(registry: Registry) -> Version:
    champion = registry.champion()
    before = champion.tags.get("promoted_from") or champion.parent
    if before is None:
        raise RegistryError(
            f"version {champion.number} is the first champion: there is none to go back to"
        )
    return registry.version(int(before))
