"""Moves become tenures, and slices come from what the memories tell."""

from datetime import UTC, datetime

import pytest
import torch

from flows.history import champion_at, tenures
from flows.promote import _values
from flows.records import ROLLBACK, Move
from flows.times import read_moment
from sft.dataset import LabelledPictures


def at(hour: int) -> str:
    return datetime(2026, 11, 22, hour, tzinfo=UTC).isoformat()


MOVES = (
    Move(None, 1, "bootstrap", "the first version", at(1)),
    Move(1, 2, "the gate", "better", at(3), promotes=True),
    Move(1, 2, "the gate", "better", at(4), promotes=True),
    Move(2, 1, ROLLBACK, "worse", at(6), who="ada"),
)


def test_each_moment_has_one_champion() -> None:
    """The borders belong to the new one; a move that was told twice is one."""
    history = tenures(MOVES)
    then = [champion_at(history, datetime(2026, 11, 22, hour, tzinfo=UTC)) for hour in range(8)]
    assert [tenure and tenure.version for tenure in then] == [None, 1, 1, 2, 2, 2, 1, 1]
    assert history[1].words == (
        "version 2 was champion, since 2026-11-22 03:00 until 2026-11-22 06:00, by the gate instead"
        " of version 1: better"
    )
    assert history[2].by == "rollback (ada)"
    assert history[2].until is None


def test_two_that_moved_the_alias_at_once_leave_one_line() -> None:
    """Both took it from version 1; the later one has it from the other."""
    raced = (*MOVES[:2], Move(1, 3, "the gate", "better", at(5), promotes=True))
    assert [(t.before, t.version) for t in tenures(raced)] == [(None, 1), (1, 2), (2, 3)]


@pytest.mark.parametrize(
    ("text", "hour"),
    [("2026-11-22", 0), ("2026-11-22T14:30+01:00", 13), ("2026-11-22 14:00", 14)],
)
def test_a_moment_without_an_offset_is_utc(text: str, hour: int) -> None:
    """As everything on record is."""
    assert read_moment(text).hour == hour
    with pytest.raises(ValueError, match="'yesterday' is no ISO date or time: write"):
        read_moment("yesterday")


def test_slices_are_the_values_that_came_with_the_samples() -> None:
    """Numbers are written as a check writes them; what is missing stays missing."""
    names = ("b/1.png", "b/2.png", "b/3.png")
    data = LabelledPictures(
        names, torch.zeros(3, 1, 2, 2, dtype=torch.uint8), torch.zeros(3).long()
    )
    told = {names[0]: {"site": 7.0}, names[1]: {"site": "north", "x": 1.5}, names[2]: {}}
    assert _values(data, told, "site") == ("7", "north", None)
    assert _values(data, told, "x") == (None, "1.5", None)
