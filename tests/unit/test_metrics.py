"""The sums that are carried from one scrape to the next."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import pytest

from flows.metrics import _Totals
from flows.records import CheckKey, CheckRecord

NOW = datetime.now(UTC)


def ended(run: str, at: datetime) -> CheckRecord:
    key = CheckKey(1, run, "d")
    return CheckRecord(run, key, True, "s", {}, {"drift.alarm": 1.0}, at - timedelta(seconds=2), at)


@dataclass
class Record:
    """Gives checks by when they ended, as the registry does, and fails after some of them."""

    checks: list[CheckRecord] = field(default_factory=list)
    fails_after: int = 1000

    def finished_since(self, since: datetime | None) -> Iterator[CheckRecord]:
        found = [c for c in self.checks if since is None or c.ended > since]
        yield from found[: self.fails_after]
        if len(found) > self.fails_after:
            raise ConnectionError("MLflow restarts")


def look(totals: _Totals, record: Record) -> tuple[int, int, float]:
    totals.look(cast("Any", record))
    return totals.checks, totals.alarms, totals.seconds


def test_a_look_that_fails_half_way_counts_nothing() -> None:
    """What it had not seen would be too old for the next one."""
    old = [ended(f"old-{i}", NOW - timedelta(days=i)) for i in range(5)]
    record, totals = Record([ended("new", NOW), *old], fails_after=3), _Totals()
    with pytest.raises(ConnectionError):
        look(totals, record)
    record.fails_after = 1000
    assert look(totals, record) == (6, 6, 12)


def test_a_clock_that_was_ahead_hides_nothing() -> None:
    """One check ended tomorrow by its worker's clock; those of today still count, each once."""
    record, totals = Record([ended("ahead", NOW + timedelta(days=1))]), _Totals()
    assert look(totals, record) == (1, 1, 2)
    record.checks.append(ended("today", NOW))
    assert look(totals, record) == look(totals, record) == (2, 2, 4)
