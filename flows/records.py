"""What is on record, as its tags tell: versions, checks, and moves of the champion.

Tags can be edited in MLflow's UI, so whatever stands in one is read with care.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from pydantic import TypeAdapter

from flows.times import read_moment

CHAMPION, CHALLENGER = "champion", "challenger"
ROLLBACK = "rollback"
"""What moved the champion, where that was a rollback."""


class RegistryError(RuntimeError):
    """The record does not allow what was asked; the message names the thing and the way out."""


class ArtifactError(RuntimeError):
    """A file of MLflow's that is there cannot be had now; the same again may work."""


class ChampionMovedError(RegistryError):
    """Somebody else moved the champion meanwhile, so that a verdict holds no more."""


@dataclass(frozen=True)
class Version:
    """A registered version, as its tags tell."""

    number: int
    run_id: str
    tags: Mapping[str, str]
    created: datetime

    @property
    def parent(self) -> int | None:
        """Number of the version it was tuned from; None for a first one."""
        return self.number_of("parent") or None

    @property
    def verdict(self) -> str | None:
        """What the gate said: promote, refuse, inconclusive, or first (nothing to compare with)."""
        return self.tags.get("verdict")

    @property
    def verdict_against(self) -> int | None:
        """The champion that the verdict was reached against."""
        return self.number_of("verdict_against") or None

    @property
    def adapted(self) -> bool:
        """Whether it is its parent with other batch-norm statistics, made without labels."""
        return "adapted" in self.tags

    @property
    def ours(self) -> bool:
        """Whether sustain wrote it: only that is ever loaded."""
        return "digest" in self.tags

    @property
    def rolled_back(self) -> bool:
        """Whether it lost the alias by a rollback, so that only a person may promote it again."""
        return self.tags.get("rolled_back_at", "") > self.tags.get("promoted_at", "")

    def number_of(self, tag: str, default: int = 0) -> int:
        """Read a number from a tag; raises RegistryError when that was edited to be none."""
        text = self.tags.get(tag)
        return number_in(text, f"{tag} of version {self.number}") if text else default


@dataclass(frozen=True)
class CheckKey:
    """What makes a check the same check."""

    champion: int
    batch_id: str
    digest: str


@dataclass(frozen=True)
class CheckRecord:
    """A check on record; `finished` is false for one that failed."""

    run_id: str
    key: CheckKey
    finished: bool
    stamp: str
    tags: Mapping[str, str]
    metrics: Mapping[str, float]
    started: datetime
    ended: datetime

    @property
    def number(self) -> int:
        """Its place among the checks against its champion, whatever clocks say; 0 if not told."""
        return number_in(self.tags.get("sustain.number", "0"), "sustain.number of a check")

    @property
    def alarm(self) -> bool:
        """Whether the batch differed from the champion's reference."""
        return self.metrics.get("drift.alarm", 0.0) > 0

    @property
    def saw_something(self) -> bool:
        """Whether it ended well, and something of the batch was news to the champion."""
        return self.finished and self.metrics.get("batch.samples", 0) > 0

    @property
    def settled(self) -> tuple[float, int] | None:
        """Accuracy on the labels that came, and how many; None without any, or withdrawn ones."""
        n = int(self.metrics.get("accuracy.settled_n", 0))
        return (self.metrics["accuracy.settled"], n) if n else None

    @property
    def action(self) -> str:
        """What was decided."""
        return self.tags.get("sustain.action", "")

    @property
    def reason(self) -> str:
        """Why, in words."""
        return self.tags.get("sustain.reason", "")


def of_batches_now(checks: Sequence[CheckRecord]) -> list[CheckRecord]:
    """Leave out, of checks in order, those of what a batch was before it grew."""
    last = {check.key.batch_id: place for place, check in enumerate(checks)}
    return [check for place, check in enumerate(checks) if last[check.key.batch_id] == place]


@dataclass(frozen=True)
class Move:
    """A change of champion.

    Attributes:
        before, after: versions; None before the first.
        by, who: what moved the alias, and the person who asked for it, if that is known.
        why: the reason.
        at: time, ISO 8601.
        promotes: false for a rollback, and for an alias moved by hand.
        seen: moved by hand; `at` is when it was seen.
    """

    before: int | None
    after: int
    by: str
    why: str
    at: str
    promotes: bool = False
    who: str = ""
    seen: bool = False


_MOVE_FORM = TypeAdapter(Move)


def number_in(text: str, tag: str) -> int:
    """Read a number from a tag; raises RegistryError."""
    try:
        return int(text)
    except ValueError as error:
        raise _edited(tag, text) from error


def time_in(text: str, tag: str) -> datetime:
    """Read a time from a tag; raises RegistryError."""
    try:
        return read_moment(text)
    except ValueError as error:
        raise _edited(tag, text) from error


def read_move(text: str, tag: str) -> Move:
    """Read a move from a tag; raises RegistryError."""
    try:
        move = _MOVE_FORM.validate_json(text)
    except ValueError as error:
        raise _edited(tag, text) from error
    return replace(move, at=time_in(move.at, tag).isoformat(timespec="microseconds"))


def _edited(tag: str, text: str) -> RegistryError:
    return RegistryError(
        f"the tag {tag} is not what sustain wrote ({text[:80]!r}): put it back in MLflow's UI, or"
        " delete it"
    )
