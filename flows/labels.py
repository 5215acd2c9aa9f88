"""Late labels: every file of them, and which label of a sample is in force."""

from __future__ import annotations

import posixpath
from collections import Counter
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias

import pandas as pd

from flows.feed import FeedSettings
from flows.storage import (
    Entry,
    FeedError,
    Place,
    Refused,
    follow,
    is_unfinished,
    look_up,
    missing_folder,
    open_place,
    read_unchanged,
    visible,
    walk,
)
from flows.tables import is_missing, label_text, no_column, parse_table
from flows.words import count, first_few, first_line, printable, shown_uri, tell_rows
from monitoring.labelling import COLUMNS as REQUESTED
from monitoring.labelling import read_id

_COLUMNS = ("sample_id", "label", "labelled_at")
_AHEAD = pd.Timedelta(days=1)
"""A time without a zone may be up to 14 hours off; what is farther ahead is a wrong clock."""


@dataclass(frozen=True, eq=False)  # a table has no single truth value to compare by
class LabelTable:
    """The labels in force: one row a sample (sample_id, label, labelled_at in UTC or NaT).

    `disputed` samples have several, none of which counts.
    """

    labels: pd.DataFrame
    problems: tuple[str, ...]
    disputed: frozenset[str] = frozenset()


@dataclass(frozen=True)
class LabelFiles:
    """Every file of labels as it was read, in the order in which they correct one another."""

    files: tuple[tuple[str, _Rows], ...]
    problems: tuple[str, ...] = ()

    def settled(self) -> LabelTable:
        """Settle which label of a sample is in force."""
        settled = _settle(list(self.files))
        return replace(settled, problems=(*self.problems, *settled.problems))

    @property
    def times(self) -> set[datetime]:
        """When labels came: at their `labelled_at`, else when their file was last written."""
        return {rows.time_of(answer) for _, rows in self.files for answer in rows.answers}

    def until(self, moment: datetime) -> LabelFiles:
        """Keep the labels that had come by then; nothing of the later ones is left."""
        kept = ((shown, rows.until(moment)) for shown, rows in self.files)
        return LabelFiles(tuple((shown, rows) for shown, rows in kept if rows is not None))


def read_labels(settings: FeedSettings, root: Path) -> LabelTable:
    """Read every CSV and Parquet file of the labels folder, and settle which label is in force.

    A file that was written later corrects an earlier one (of the same time, by name); between two
    labels that both have `labelled_at` the newer one counts, wherever it stands. Whatever cannot be
    used is told in `problems`.

    Raises:
        FeedError: the storage failed.
    """
    return read_all(settings, root).settled()


def read_all(settings: FeedSettings, root: Path) -> LabelFiles:
    """Read every file of the labels folder, and settle nothing.

    Raises:
        FeedError: the storage failed.
    """
    place = open_place(settings.labels, settings.storage_options, root)
    if problem := missing_folder(place):
        return LabelFiles((), (f"the labels folder {problem}: no labels yet",))
    unusable: list[str] = []
    files: list[tuple[str, _Rows]] = []
    for name, entry in visible(walk(place)).items():
        if is_unfinished(name):
            continue
        shown = f"{shown_uri(settings.labels).rstrip('/')}/{printable(name)}"
        try:
            files.append((shown, _read_rows(place, name, entry, settings.max_table_bytes)))
        except Refused as refused:
            unusable.append(f"{shown}: {refused}; the file was passed over")
    files.sort(key=lambda file: file[1].modified or datetime.min.replace(tzinfo=UTC))
    return LabelFiles(tuple(files), tuple(unusable))


def read_label_file(url: str, root: Path, settings: FeedSettings | None = None) -> LabelTable:
    """Read one file of labels by the rules of `read_labels`.

    Raises:
        FeedError: it does not exist, or it cannot be used at all.
    """
    settings = settings or FeedSettings()
    place = open_place(url, settings.storage_options, root)
    name = posixpath.basename(place.path)
    file = follow(place)
    try:
        entry = look_up(file)
    except Exception as error:
        raise FeedError(f"{place.shown} cannot be read: {first_line(error)}") from error
    try:
        folder = replace(file, path=posixpath.dirname(file.path))
        rows = _read_rows(folder, name, entry, settings.max_table_bytes)
    except Refused as refused:
        raise FeedError(f"{place.shown}: {refused}") from refused
    return _settle([(shown_uri(url), rows)])


# --- one file

# a sample, its label, and when that was given; plain, since there may be very many
_Answer: TypeAlias = tuple[str, str, pd.Timestamp | None]


@dataclass(frozen=True)
class _Rows:
    answers: list[_Answer]
    problems: list[str]
    modified: datetime | None = None

    def time_of(self, answer: _Answer) -> datetime:
        """Tell when an answer came: when it was given, else when its file was last written."""
        given = answer[2]
        known = self.modified if given is None else given.to_pydatetime()
        return known or datetime.max.replace(tzinfo=UTC)

    def until(self, moment: datetime) -> _Rows | None:
        """Keep what had come by then; None when nothing had."""
        kept = [answer for answer in self.answers if self.time_of(answer) <= moment]
        return replace(self, answers=kept, problems=[]) if kept else None


def _read_rows(place: Place, name: str, entry: Entry, max_bytes: int) -> _Rows:
    suffix = PurePosixPath(name).suffix.lower()
    if suffix not in (".csv", ".parquet"):
        raise Refused("neither CSV nor Parquet")
    if entry.kind == "other":
        raise Refused("not a regular file")
    table = parse_table(name, read_unchanged(place, entry, max_bytes), max_bytes)
    for column in _COLUMNS[:2]:
        if column not in table.columns:
            raise Refused(no_column(column, table.columns))
    problems = list(table.problems)
    known = (*_COLUMNS, *REQUESTED)  # a list that `sustain ask` wrote comes back as it is
    if unknown := [column for column in table.columns if column not in known]:
        problems.append(f"{count(unknown, 'unknown column')} passed over: {first_few(unknown)}")
    times, misread, ahead = _read_times([row.get("labelled_at") for _, row in table.rows])
    answers: list[_Answer] = []
    nameless, unlabelled = [], []
    for (number, row), time in zip(table.rows, times, strict=True):
        label = label_text(row["label"])
        if is_missing(row["sample_id"]):
            nameless.append(number)
        elif label is None:
            unlabelled.append(number)
        else:
            answers.append((read_id(str(row["sample_id"])), label, time))
    noun = "line" if suffix == ".csv" else "row"
    timeless = [table.rows[index][0] for index in misread]
    no_time = "a labelled_at that is no ISO 8601 time; it counts as missing"
    problems += tell_rows(nameless, noun, "has", "no sample_id", skipped=True)
    problems += tell_rows(unlabelled, noun, "has", "no label", skipped=True)
    problems += tell_rows(timeless, noun, "has", no_time)
    in_future = "a labelled_at in the future (whose clock is wrong?); it counts as missing"
    problems += tell_rows([table.rows[i][0] for i in ahead], noun, "has", in_future)
    return _Rows(answers, problems, entry.modified)


def _read_times(
    values: list[Any],
) -> tuple[list[pd.Timestamp | None], list[int], list[int]]:
    """Read times as UTC (those without a zone count as UTC).

    The places of those that are no time, and of those that lie in the future, are named beside.
    """
    texts = [
        str(value) if isinstance(value, str | date) and not is_missing(value) else None
        for value in values
    ]
    parsed = pd.to_datetime(
        pd.Series(texts, dtype="object"), format="ISO8601", utc=True, errors="coerce"
    )
    known = parsed.notna().tolist()
    times = [time if is_known else None for time, is_known in zip(parsed, known, strict=True)]
    bad = [i for i, time in enumerate(times) if time is None and not is_missing(values[i])]
    limit = pd.Timestamp.now(tz="UTC") + _AHEAD
    ahead = [i for i, time in enumerate(times) if time is not None and time > limit]
    for i in ahead:
        times[i] = None
    return times, bad, ahead


# --- which label is in force


@dataclass(frozen=True)
class _Statement:
    """What one file says of one sample; several labels mean that it contradicts itself."""

    labels: tuple[str, ...]
    labelled_at: pd.Timestamp | None
    order: int
    file: str


def _settle(files: list[tuple[str, _Rows]]) -> LabelTable:
    """Settle what all files together say; they come in the order in which they correct."""
    problems: list[str] = []
    told = Counter(sample_id for _, rows in files for sample_id, _, _ in rows.answers)
    settled: list[_Answer] = []
    statements: dict[str, list[_Statement]] = {}
    for order, (shown, rows) in enumerate(files):
        problems += [f"{shown}: {problem}" for problem in rows.problems]
        often: dict[str, list[_Answer]] = {}
        for answer in rows.answers:
            if told[answer[0]] == 1:  # nearly always
                settled.append(answer)
            else:
                often.setdefault(answer[0], []).append(answer)
        for sample_id, answers in often.items():
            said = _settle_within(answers, order, shown)
            statements.setdefault(sample_id, []).append(said)
    in_force = {sample_id: _in_force(said) for sample_id, said in sorted(statements.items())}
    problems += _describe_conflicts(in_force)
    settled += [(i, s.labels[0], s.labelled_at) for i, s in in_force.items() if len(s.labels) == 1]
    return LabelTable(
        _frame(sorted(settled, key=lambda answer: answer[0])),
        tuple(problems),
        frozenset(i for i, s in in_force.items() if len(s.labels) > 1),
    )


def _settle_within(answers: list[_Answer], order: int, file: str) -> _Statement:
    """Reduce what one file says of a sample: its newest label, if that contradicts nothing."""
    newest = max((time for *_, time in answers if time is not None), default=None)
    labels = sorted({label for _, label, time in answers if time in (None, newest)})
    return _Statement(tuple(labels), newest, order, file)


def _in_force(said: list[_Statement]) -> _Statement:
    """Choose between files: of those with a time the newest, and then the later file."""
    timed = [(s.labelled_at, s.order, s) for s in said if s.labelled_at is not None]
    untimed = [s for s in said if s.labelled_at is None]
    # A time and no time can't be compared: between those two the later file counts.
    candidates = [*(s for _, _, s in sorted(timed, key=lambda t: t[:2])[-1:]), *untimed[-1:]]
    return max(candidates, key=lambda statement: statement.order)


def _describe_conflicts(in_force: dict[str, _Statement]) -> list[str]:
    conflicts: dict[str, list[str]] = {}
    for sample_id, said in in_force.items():
        if len(said.labels) > 1:
            labels = " or ".join(map(repr, said.labels))
            conflicts.setdefault(said.file, []).append(f"{sample_id} ({labels})")
    return [
        f"{file}: {count(samples, 'sample')} with conflicting labels and no labelled_at that "
        f"decides, left out: {first_few(samples)}"
        for file, samples in conflicts.items()
    ]


def _frame(rows: list[_Answer]) -> pd.DataFrame:
    times = [time for _, _, time in rows]
    return pd.DataFrame(
        {
            "sample_id": pd.Series([sample_id for sample_id, _, _ in rows], dtype="str"),
            "label": pd.Series([label for _, label, _ in rows], dtype="str"),
            "labelled_at": pd.Series(times, dtype="datetime64[us, UTC]"),
        }
    )
