"""CSV, JSON lines and Parquet as rows, with what was wrong; text stays as it was written."""

import csv
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from flows.storage import Refused
from flows.words import first_few, first_line, tell_rows


@dataclass(frozen=True)
class Table:
    """Rows with the number under which a person finds them, and what was wrong with others."""

    columns: tuple[str, ...]
    rows: list[tuple[int, dict[str, Any]]]
    problems: tuple[str, ...] = ()


def parse_table(name: str, content: bytes) -> Table:
    """Read a table by the suffix of its name (.csv, .jsonl, otherwise Parquet).

    Raises:
        Refused: it is empty or unreadable.
    """
    if not content:
        raise Refused("empty file")
    parse = _PARSERS.get(PurePosixPath(name).suffix.lower(), _parse_parquet)
    try:
        return parse(content)
    except UnicodeDecodeError as error:
        raise Refused("it is not UTF-8 text") from error
    except csv.Error as error:
        raise Refused(f"unreadable CSV: {error}") from error
    except (pa.ArrowException, OSError, ValueError) as error:
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


def _parse_csv(content: bytes) -> Table:
    # The csv module keeps "007", "NA" and "" as they stand, and tells rows that were cut short.
    reader = csv.reader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True)
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


def _parse_jsonl(content: bytes) -> Table:
    columns: dict[str, None] = {}
    rows, broken = [], []
    for number, line in enumerate(content.decode("utf-8-sig").split("\n"), start=1):
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


def _parse_parquet(content: bytes) -> Table:
    table = pq.read_table(io.BytesIO(content))
    return Table(tuple(table.column_names), list(enumerate(table.to_pylist(), start=1)))


_PARSERS: dict[str, Callable[[bytes], Table]] = {".csv": _parse_csv, ".jsonl": _parse_jsonl}
