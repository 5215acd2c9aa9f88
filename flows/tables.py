"""CSV, JSON lines and Parquet as rows, with what was wrong; text stays as it was written.

Whoever writes a table may not be trusted, and a few bytes may stand for very many. So what a table
unpacks to is counted before it is unpacked, a line or some rows at a time.
"""

import csv
import io
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import pandas as pd
import pyarrow as pa

from flows.parquet import Room, open_parquet, read_rows
from flows.storage import Refused
from flows.words import first_few, first_line, tell_rows

_LINE = 2**24
"""Characters of a line of text: outlines of objects take many, but not as many."""


@dataclass(frozen=True)
class Table:
    """Rows with the number under which a person finds them, and what was wrong with others."""

    columns: tuple[str, ...]
    rows: list[tuple[int, dict[str, Any]]]
    problems: tuple[str, ...] = ()


def parse_table(name: str, content: bytes, max_bytes: int) -> Table:
    """Read a table by the suffix of its name (.csv, .jsonl, otherwise Parquet).

    Raises:
        Refused: it is empty or unreadable, or unpacks to more than `max_bytes`.
    """
    if not content:
        raise Refused("empty file")
    parse = _PARSERS.get(PurePosixPath(name).suffix.lower(), _parse_parquet)
    try:
        return parse(content, Room(max_bytes))
    except UnicodeDecodeError as error:
        raise Refused("it is not UTF-8 text") from error
    except csv.Error as error:
        raise Refused(f"unreadable CSV: {error}") from error
    except (pa.ArrowException, OSError, ValueError, OverflowError, LookupError) as error:
        raise Refused(f"unreadable Parquet: {first_line(error)}") from error


def no_column(column: str, columns: tuple[str, ...]) -> str:
    """Say that a table lacks a column, and which it has."""
    return f"it has no column {column} (but: {first_few(columns) or 'none'})"


def is_missing(value: object) -> bool:
    """Tell whether a cell holds nothing: None, NaN, NaT or white space."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or value is pd.NaT or (isinstance(value, float) and value != value)  # noqa: PLR0124 -- NaN


def label_text(value: object) -> str | None:
    """Write a label as text: strings as they stand, 7 and 7.0 as "7", nothing and lists as None."""
    if is_missing(value) or isinstance(value, list | tuple | dict | bytes):
        return None
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


# --- text


def _lines(content: bytes, newline: str, room: Room) -> Iterator[str]:
    """Yield lines with their ends; `newline` as `open` has it."""
    text = io.TextIOWrapper(io.BytesIO(content), encoding="utf-8-sig", newline=newline)
    for number, line in enumerate(iter(lambda: text.readline(_LINE), ""), start=1):
        if len(line) == _LINE:
            raise Refused(f"its line {number} has {_LINE} characters or more")
        room.take(1, 1 + line.count(",") + line.count("["), sys.getsizeof(line))
        yield line


def _parse_csv(content: bytes, room: Room) -> Table:
    # The csv module keeps "007", "NA" and "" as they stand, and tells rows that were cut short.
    reader = csv.reader(_lines(content, "", room), strict=True)
    columns = tuple(next(reader, []))
    if len(set(columns)) != len(columns):
        raise Refused("a column occurs twice in its first line")
    rows, ragged = [], []
    for row in reader:
        if len(row) == len(columns):
            rows.append((reader.line_num, dict(zip(columns, row, strict=True))))
        elif row:
            ragged.append(reader.line_num)
    problem = "not as many fields as the first line"
    return Table(columns, rows, tell_rows(ragged, "line", "has", problem, skipped=True))


def _parse_jsonl(content: bytes, room: Room) -> Table:
    columns: dict[str, None] = {}
    rows, broken = [], []
    for number, line in enumerate(_lines(content, "\n", room), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair is no text
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            rows.append((number, row))
            columns |= dict.fromkeys(row)
        else:
            broken.append(number)
    return Table(
        tuple(columns), rows, tell_rows(broken, "line", "is", "no JSON object and skipped")
    )


def _parse_parquet(content: bytes, room: Room) -> Table:
    parquet = open_parquet(io.BytesIO(content))
    rows = [row for number in range(parquet.groups) for row in read_rows(parquet, number, room)]
    return Table(parquet.columns, list(enumerate(rows, start=1)))


_PARSERS: dict[str, Callable[[bytes, Room], Table]] = {".csv": _parse_csv, ".jsonl": _parse_jsonl}
