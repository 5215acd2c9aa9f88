"""Times as people, tags and storages write them, in UTC."""

from __future__ import annotations

from datetime import UTC, datetime


def in_utc(time: datetime) -> datetime:
    """Give a time in UTC, which one without a zone is taken for; raises OverflowError."""
    return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)


def read_moment(text: str) -> datetime:
    """Read an ISO 8601 date or time, UTC without an offset; raises ValueError for anything else."""
    try:
        return in_utc(datetime.fromisoformat(text))
    except (ValueError, OverflowError) as error:
        raise ValueError(
            f"{text!r} is no ISO date or time: write 2026-11-22 or 2026-11-22T14:30+01:00"
        ) from error
