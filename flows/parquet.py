"""Parquet files of strangers: what they unpack to is bounded before it is unpacked.

Repeated values are stored once, and a run of equal ones as a number, so that kilobytes may stand
for gigabytes. What there is of each column is read from the file's footer, by ourselves: pyarrow
ends the process when it is asked for the columns of a broken one.
"""

import io
import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from flows.storage import Refused

_ROW, _VALUE = 256, 64
"""Bytes that a row and a value take in Python, beside what is written in the value."""
_FOOTER = 2**22
"""Bytes of a footer: those of 4,000 row groups with seven columns each."""
_ROWS = 8192
"""Rows that are unpacked at once, where each of them is small."""
_BYTES, _FIXED = 6, 7
"""Of a column: BYTE_ARRAY and FIXED_LEN_BYTE_ARRAY, as footers have them."""
_SHARED = {6, 7}
"""DELTA_LENGTH_BYTE_ARRAY and DELTA_BYTE_ARRAY, encodings that Arrow cannot read as references; of
the second, a value may repeat what the last one has."""


class Room:
    """What is left of the `limit` in bytes that a table, or a shard's columns, may unpack to."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._left = limit

    def take(self, rows: int, values: int, size: int) -> None:
        """Take room for rows and values whose content has so many bytes.

        Raises:
            Refused: there is not as much left.
        """
        self._left -= rows * _ROW + values * _VALUE + size
        if self._left < 0:
            raise Refused(
                f"too large: it unpacks to more than max_table_bytes={self.limit}; write several"
                " smaller ones, or raise max_table_bytes"
            )


@dataclass(frozen=True)
class Chunk:
    """A column in a row group, as the footer tells: its type, values, and bytes without packing."""

    path: str
    kind: int
    encodings: frozenset[int]
    values: int
    size: int


@dataclass(frozen=True)
class Parquet:
    """An opened file; `chunks` are those of each row group, by column."""

    file: Any
    chunks: list[list[Chunk]]
    whole: Collection[str]

    @property
    def columns(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(self.file.schema_arrow.names)

    @property
    def groups(self) -> int:
        """How many row groups there are."""
        return len(self.chunks)

    def rows(self, group: int) -> int:
        """Tell how many rows a row group says that it has."""
        return int(self.file.metadata.row_group(group).num_rows)

    def size(self, group: int) -> int:
        """Tell how many bytes the columns of a row group have without packing."""
        return sum(chunk.size for chunk in self.chunks[group])


def open_parquet(file: IO[bytes], whole: Collection[str] = ()) -> Parquet:
    """Open a Parquet file in which a text that many rows share is held once.

    Args:
        file: to seek in.
        whole: paths of columns that are read as they are: a picture is seldom shared.

    Raises:
        Refused: its footer is too large, or broken.
        Exception: nearly any, of a broken file.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - 8, 0))  # the footer's length, and the four letters of the form
    length = int.from_bytes(file.read(4), "little")
    if _FOOTER < length < size:
        raise Refused(f"too large: its footer has {length} bytes > {_FOOTER}")
    file.seek(0)
    opened = pq.ParquetFile(file)
    file.seek(size - 8 - length)
    chunks = _chunks(file.read(length))
    paths = [opened.schema.column(i).path for i in range(len(opened.schema))]
    if any([one.path for one in group] != paths for group in chunks):
        raise Refused("unreadable: the columns of its row groups are not those of its schema")
    shared = {one.path for group in chunks for one in group if one.encodings & _SHARED}
    texts = {one.path for group in chunks for one in group if one.kind == _BYTES}
    by_reference = sorted(texts - shared - set(whole))
    opened = pq.ParquetFile(file, metadata=opened.metadata, read_dictionary=by_reference)
    return Parquet(opened, chunks, whole)


def read_rows(
    parquet: Parquet,
    group: int,
    room: Room,
    columns: Sequence[str] | None = None,
    at_once: int = _ROWS,
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a row group, as long as there is room for them.

    Args:
        parquet: from `open_parquet`.
        group: its number.
        room: for what the rows unpack to, but for the columns that are read as they are.
        columns: names of those that are wanted; None for all.
        at_once: rows that are unpacked together, at most.

    Raises:
        Refused: there is no room for them.
    """
    held, most = _sizes(parquet, group)
    if (claimed := max(held, most, parquet.rows(group) * _ROW)) > room.limit:
        room.take(0, 0, claimed)
    at_once = max(1, min(at_once, room.limit // (8 * most + 1)))  # Arrow grows by doubling
    for rows in parquet.file.iter_batches(batch_size=at_once, row_groups=[group], columns=columns):
        room.take(len(rows), 0, 0)
        for name, values in zip(rows.schema.names, rows.columns, strict=True):
            room.take(0, *_unpacked(name, values, parquet.whole))
        names = rows.schema.names
        plain = [
            c.dictionary_decode() if pa.types.is_dictionary(c.type) else c for c in rows.columns
        ]
        yield from pa.RecordBatch.from_arrays(plain, names).to_pylist()


def _sizes(parquet: Parquet, group: int) -> tuple[int, int]:
    """Bound the bytes that a row group, and one row beyond it, take in Arrow, by the footer."""
    held = most = 0
    for i, chunk in enumerate(parquet.chunks[group]):
        if chunk.path in parquet.whole:
            continue
        column = parquet.file.schema.column(i)
        values = chunk.values if column.max_repetition_level else 1
        width = 12  # bytes of INT96, the widest of what has no length
        if chunk.kind == _FIXED:
            width, values = column.length, max(1024, values)  # Arrow makes room for so many
        elif chunk.encodings & _SHARED:
            width = chunk.size
        held += chunk.size
        most += width * values
    return held, most


def _unpacked(name: str, values: Any, whole: Collection[str]) -> tuple[int, int]:
    """Count the values of a column, those in lists too, and the bytes of them all."""
    kind = values.type
    if pa.types.is_struct(kind):
        parts = [
            _unpacked(f"{name}.{field.name}", part, whole)
            for field, part in zip(kind, values.flatten(), strict=True)
        ]
        return len(values) + sum(n for n, _ in parts), sum(size for _, size in parts)
    if pa.types.is_map(kind):
        values = values.cast(pa.list_(pa.struct([kind.key_field, kind.item_field])))
    if pa.types.is_nested(values.type):
        count, size = _unpacked(f"{name}.", values.flatten(), whole)
        return len(values) + count, size
    if name in whole:
        return len(values), 0
    if not pa.types.is_dictionary(kind) or not _is_text(kind.value_type):
        return len(values), values.nbytes
    lengths = pc.binary_length(values.dictionary).cast(pa.int64())
    return len(values), pc.sum(lengths.take(values.indices)).as_py() or 0


def _is_text(kind: Any) -> bool:
    return any(
        test(kind)
        for test in (
            pa.types.is_string,
            pa.types.is_binary,
            pa.types.is_large_string,
            pa.types.is_large_binary,
        )
    )


# --- the footer


def _chunks(footer: bytes) -> list[list[Chunk]]:
    """Read what a footer tells of each row group's columns; numbers as in parquet.thrift."""
    try:
        groups = _Compact(footer).struct().get(4, [])
        if any(group[3] < 0 for group in groups):
            raise ValueError("it has less than no rows")  # noqa: TRY301
        return [[_chunk(column[3]) for column in group[1]] for group in groups]
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise Refused("unreadable: its footer is broken") from error


def _chunk(told: dict[int, Any]) -> Chunk:
    values, size = told[5], told[6]
    if values < 0 or size < 0:
        raise ValueError("it has less than nothing")
    path = b".".join(told[3]).decode()
    return Chunk(path, int(told[1]), frozenset(told[2]), values, size)


class _Compact:
    """Reads Thrift's compact protocol: a structure is its fields by their numbers."""

    def __init__(self, content: bytes) -> None:
        self._content = io.BytesIO(content)

    def struct(self) -> dict[int, Any]:
        fields: dict[int, Any] = {}
        number = 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._integer()
            # a boolean field is its type
            fields[number] = head & 15 == 1 if head & 15 in (1, 2) else self._value(head & 15)
        return fields

    def _value(self, kind: int) -> Any:
        if kind in (1, 2, 3):
            return self._byte()
        if kind in (4, 5, 6):
            return self._integer()
        if kind == 7:  # noqa: PLR2004
            return self._bytes(8)
        if kind == 8:  # noqa: PLR2004
            return self._bytes(self._natural())
        if kind in (9, 10):
            head = self._byte()
            count = head >> 4 if head >> 4 < 15 else self._natural()  # noqa: PLR2004
            return [self._value(head & 15) for _ in range(count)]
        if kind == 12:  # noqa: PLR2004
            return self.struct()
        raise ValueError(f"a footer has no values of type {kind}")  # maps, which Parquet has not

    def _natural(self) -> int:
        value = shift = 0
        while (byte := self._byte()) & 0x80:
            value |= (byte & 0x7F) << shift
            shift += 7
            if shift > 63:  # noqa: PLR2004
                raise ValueError("a number of more than 64 bits")
        return value | byte << shift

    def _integer(self) -> int:
        value = self._natural()
        return value >> 1 ^ -(value & 1)

    def _byte(self) -> int:
        return self._bytes(1)[0]

    def _bytes(self, count: int) -> bytes:
        found = self._content.read(count)
        if len(found) < count:
            raise ValueError("it is cut short")
        return found
