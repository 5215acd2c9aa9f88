"""Who was champion when, since when, moved by whom or what, why, and instead of which version."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from prefect.artifacts import create_markdown_artifact

from flows.records import CHAMPION, Move
from flows.registry import Registry
from flows.words import slug


@dataclass(frozen=True)
class Tenure:
    """The time in which one version was champion.

    Attributes:
        version: its number.
        since, until: from when, and to when; None for now.
        by: who or what moved the alias.
        why: the reason.
        before: the champion before; None for the first.
        seen: the alias was moved by hand, and `since` is when that was seen.
    """

    version: int
    since: datetime
    until: datetime | None
    by: str
    why: str
    before: int | None
    seen: bool = False

    @property
    def cells(self) -> tuple[str, ...]:
        """Version, since, until, by, instead of, why."""
        return (
            str(self.version),
            _minute(self.since) + (" (seen)" if self.seen else ""),
            _minute(self.until),
            self.by,
            str(self.before or ""),
            self.why,
        )

    @property
    def words(self) -> str:
        """One sentence."""
        seen = "at the latest " if self.seen else ""
        until = f" until {_minute(self.until)}" if self.until else ""
        before = f" instead of version {self.before}" if self.before else ""
        return (
            f"version {self.version} was champion, {seen}since {_minute(self.since)}{until}, by"
            f" {self.by}{before}: {self.why}"
        )


def read_history(registry: Registry) -> tuple[Tenure, ...]:
    """Read every tenure of the record, oldest first."""
    return tenures(registry.moves())


def tenures(moves: Sequence[Move]) -> tuple[Tenure, ...]:
    """Turn moves, oldest first, into tenures; a move to the champion of then is none."""
    found: list[Tenure] = []
    for move in moves:
        if found and found[-1].version == move.after:
            continue
        at = datetime.fromisoformat(move.at)
        if found:
            found[-1] = replace(found[-1], until=at)
        by = f"{move.by} ({move.who})" if move.who else move.by
        before = found[-1].version if found else move.before
        found.append(Tenure(move.after, at, None, by, move.why, before, move.seen))
    return tuple(found)


def champion_at(history: Sequence[Tenure], moment: datetime) -> Tenure | None:
    """Return the tenure in force at a moment; None before the first."""
    return next((tenure for tenure in reversed(history) if tenure.since <= moment), None)


def unrecorded(registry: Registry, history: Sequence[Tenure]) -> str:
    """Say how the alias differs from the record, as after a move by hand; empty if it does not."""
    now = registry.alias(CHAMPION)
    last = history[-1].version if history else None
    if now == last:
        return ""
    if now is None:
        return f"the alias {CHAMPION!r} is on no version now; version {last} was the last champion"
    return f"the alias {CHAMPION!r} is on version {now} now: the next check will record the move"


def show_in_prefect(registry: Registry) -> None:
    """Write the history as an artifact of the flow run, the newest tenure first."""
    if not registry.live:
        return
    rows = []
    for tenure in reversed(read_history(registry)):
        number, *others = (cell.replace("|", "/") for cell in tenure.cells)
        linked = f"[{number}]({registry.version_url(tenure.version)})"
        rows.append(f"| {' | '.join([linked, *others])} |")
    head = [
        "| champion | since (UTC) | until | by | instead of | why |",
        "|---|---|---|---|---|---|",
    ]
    create_markdown_artifact(
        key=f"champions-{slug(registry.name)}",
        description=f"The champions of {registry.name}",
        markdown="\n".join([f"## The champions of {registry.name}", "", *head, *rows, ""]),
    )


def _minute(time: datetime | None) -> str:
    return "" if time is None else f"{time.astimezone(UTC):%Y-%m-%d %H:%M}"
