"""Tables and shards of few bytes that stand for very many are refused before they are unpacked."""

from __future__ import annotations

import io
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from samples import SEEN, as_dict, names, parquet, picture, read, reasons, write

import flows.parquet
from flows.batches import read_batch, read_own_labels
from flows.feed import FeedSettings, list_batches
from flows.labels import read_labels
from flows.storage import Refused
from flows.tables import parse_table

BOUND = 2**24
STRICT = FeedSettings(max_bad_share=0.9, max_table_bytes=BOUND)
LONG = "x" * 60_000
ROWS = 20_000


def packed(table: pa.Table, **options: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", **options)
    return buffer.getvalue()


def shared(value: Any, rows: int = ROWS) -> pa.Array:
    """Give one value to many rows; the file has it once."""
    return pa.DictionaryArray.from_arrays(pa.repeat(pa.scalar(0, pa.int32()), rows), [value])


def ids(rows: int) -> list[str]:
    return [f"b/{i}" for i in range(rows)]


def with_label(label: Any, **options: Any) -> bytes:
    return packed(pa.table({"sample_id": ids(len(label)), "label": label}), **options)


BOMBS: dict[str, Callable[[], bytes]] = {
    "one text of many rows": lambda: with_label(shared(LONG)),
    "one text of many places in a list": lambda: with_label(
        pa.ListArray.from_arrays([0, ROWS], shared(LONG))
    ),
    "one text of fixed width": lambda: with_label(
        shared(pa.scalar(LONG.encode(), pa.binary(len(LONG))), 2000), store_schema=False
    ),
    "texts that differ by their ends": lambda: with_label(
        [f"{LONG}{i:06}" for i in range(2000)],
        use_dictionary=False,
        column_encoding={"sample_id": "PLAIN", "label": "DELTA_BYTE_ARRAY"},
    ),
    "compressed texts": lambda: with_label([LONG] * 1000, use_dictionary=False),
    "a list of many numbers": lambda: with_label(
        pa.ListArray.from_arrays([0, 10**7], pa.repeat(pa.scalar(0, pa.int64()), 10**7))
    ),
    "rows of nothing": lambda: packed(
        pa.table({name: pa.nulls(5 * 10**6, pa.string()) for name in ("sample_id", "label")})
    ),
}


_POOLS: list[pa.MemoryPool] = []  # what was allocated from one may outlive its test


@contextmanager
def within(megabytes: float) -> Iterator[None]:
    """See that Arrow and Python together never hold more."""
    pool, before = pa.proxy_memory_pool(pa.default_memory_pool()), pa.default_memory_pool()
    _POOLS.append(pool)
    pa.set_memory_pool(pool)
    tracemalloc.start()
    try:
        yield
        held = (pool.max_memory() + tracemalloc.get_traced_memory()[1]) / 2**20
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(before)
    assert held < megabytes


@pytest.mark.parametrize("kind", BOMBS)
def test_a_table_that_unpacks_to_too_much_is_passed_over(root: Path, kind: str) -> None:
    """Kilobytes of labels that stand for gigabytes are told, and the other file's count."""
    bomb = BOMBS[kind]()
    assert len(bomb) < 2**20
    write(root / "labels", {"bomb.parquet": bomb, "good.csv": "sample_id,label\nb/1.png,cat\n"})
    with within(4 * BOUND / 2**20):
        table = read_labels(STRICT, root)
    assert as_dict(table) == {"b/1.png": "cat"}
    (problem,) = table.problems
    assert problem == (
        "labels/bomb.parquet: too large: it unpacks to more than max_table_bytes=16777216; write"
        " several smaller ones, or raise max_table_bytes; the file was passed over"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.csv", "a," * 400_000 + "a\n"),
        ("t.csv", "a,b\n" + "1,2\n" * 60_000),
        ("t.csv", "a,b\n" + '"\n","\n",' * 100_000 + "1\n"),
        ("t.jsonl", '{"a": [' + "[]," * 200_000 + "[]]}\n"),
        ("t.jsonl", "{}\n" * 80_000),
    ],
)
def test_text_of_very_many_values_is_refused(name: str, content: str) -> None:
    """A cell of one letter takes a hundred bytes once it is read: that is what counts."""
    assert len(content) < BOUND / 10
    with within(3 * BOUND / 2**20), pytest.raises(Refused, match=r"unpacks to more than max_t"):
        parse_table(name, content.encode(), BOUND)


def test_a_very_long_line_or_field_is_refused() -> None:
    """Neither is taken for what somebody wrote."""
    with pytest.raises(Refused, match="its line 2 has 16777216 characters or more"):
        parse_table("t.jsonl", b'{"a": 1}\n{"a": "' + b"x" * 2**24 + b'"}', 2**30)
    with pytest.raises(Refused, match="unreadable CSV: field larger than field limit"):
        parse_table("t.csv", b'a\n"' + b"x" * 200_000 + b'"\n', 2**30)


def test_a_gigantic_file_is_not_read(root: Path) -> None:
    """A file with more bytes than a table may have is told by its size."""
    write(root, {"labels/huge.csv": "sample_id,label\n", "feed/b/metadata.csv": "file_name\n"})
    write(root / "feed", {"b/1.png": picture()})
    for path in (root / "labels/huge.csv", root / "feed/b/metadata.csv"):
        with path.open("r+b") as file:
            file.truncate(2**36)  # a hole: it takes no disk
    with within(2 * BOUND / 2**20):
        table = read_labels(STRICT, root)
        (batch,) = list_batches(STRICT, root)
        data = read_batch(batch, STRICT, root, SEEN)
    assert any("metadata.csv: too large: 68719476736 bytes" in note for note in data.notes)
    (problem,) = table.problems
    assert "too large: 68719476736 bytes > max_table_bytes=16777216; the file was pas" in problem


@pytest.mark.parametrize("kind", BOMBS)
def test_metadata_that_unpacks_to_too_much_is_noted(root: Path, kind: str) -> None:
    """The pictures are read without it."""
    write(root / "feed", {"b/1.png": picture(), "b/metadata.parquet": BOMBS[kind]()})
    with within(4 * BOUND / 2**20):
        data = read(root, STRICT)
    assert names(data) == ["b/1.png"]
    assert any("metadata.parquet: too large: it unpacks to" in note for note in data.notes)


@pytest.mark.parametrize("column", ["file_name", "caption"])
def test_a_shard_whose_columns_unpack_to_too_much_is_quarantined(root: Path, column: str) -> None:
    """Names and metadata beside pictures are bounded as tables are; the other shard is read."""
    images = pa.array([picture(0)] * ROWS)
    bomb = packed(pa.table({"image": images, "label": ["cat"] * ROWS, column: shared(LONG)}))
    write(root / "feed", {"b/bomb.parquet": bomb, "b/good.parquet": parquet(image=[picture(1)])})
    with within(6 * BOUND / 2**20):
        data = read(root, STRICT)
    assert names(data)[-1] == "b/good-0"
    assert len(names(data)) < BOUND / len(LONG)
    assert "unpacks to more than max_table_bytes" in reasons(data)["b/bomb.parquet"]
    (batch,) = list_batches(STRICT, root)
    with within(4 * BOUND / 2**20):
        labels = read_own_labels(batch, STRICT, root)
    assert len(labels) == (0 if column == "file_name" else ROWS)  # captions are not read for these


def zigzag(number: int) -> bytes:
    """Write an integer as the footer of a Parquet file has it."""
    rest, out = number << 1, bytearray()
    while rest > 0x7F:
        out.append(rest & 0x7F | 0x80)
        rest >>= 7
    return bytes([*out, rest])


def test_a_footer_that_claims_very_many_rows_is_refused(root: Path) -> None:
    """A file of 12,345 rows that says it has a million million is passed over, in no time."""
    good = packed(pa.table({"sample_id": ids(12_345), "label": ["cat"] * 12_345}))
    length = int.from_bytes(good[-8:-4], "little")
    footer = good[-8 - length : -8]
    assert footer.count(zigzag(12_345)) >= 4  # of the file, its row group, and its columns
    more = footer.replace(zigzag(12_345), zigzag(10**12))
    lying = good[: -8 - length] + more + len(more).to_bytes(4, "little") + b"PAR1"
    assert pq.read_metadata(io.BytesIO(lying)).num_rows == 10**12
    write(root, {"labels/a.parquet": lying, "labels/b.csv": "sample_id,label\nb/1.png,cat\n"})
    with within(BOUND / 2**20):
        table = read_labels(STRICT, root)
    assert as_dict(table) == {"b/1.png": "cat"}
    assert "labels/a.parquet: too large: it unpacks to more than" in table.problems[0]


def test_a_footer_that_is_too_large_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a footer says takes many times its size, so that it has a bound of its own."""
    good = packed(pa.table({f"column {i}": [1] for i in range(50)}))
    monkeypatch.setattr(flows.parquet, "_FOOTER", 1000)
    with pytest.raises(Refused, match=r"its footer has \d+ bytes > 1000"):
        parse_table("t.parquet", good, BOUND)


def test_a_shard_of_very_many_empty_rows_is_quarantined(root: Path) -> None:
    """A shard of kilobytes may have millions of rows, of which each would be told by name."""
    bomb = packed(pa.table({"image": pa.nulls(5 * 10**6, pa.binary())}))
    assert len(bomb) < 2**17
    write(root / "feed", {"b/bomb.parquet": bomb, "b/good.parquet": parquet(image=[picture(1)])})
    with within(2 * BOUND / 2**20):
        data = read(root, STRICT)
    assert list(reasons(data)) == ["b/bomb.parquet"]


def test_a_footer_that_tells_of_less_than_no_rows_is_refused() -> None:
    """It would make room for what follows; each byte that may be the number is changed."""
    content = packed(pa.table({"label": ["a"] * 36}))  # 36 is written as 0x48, -36 as 0x47
    negative = 0
    for place in [i for i, byte in enumerate(content) if byte == 0x48]:
        changed = content[:place] + b"\x47" + content[place + 1 :]
        try:
            told = pq.ParquetFile(io.BytesIO(changed)).metadata.row_group(0).num_rows
        except (pa.ArrowException, OSError):
            continue
        if told < 0:
            negative += 1
            with pytest.raises(Refused, match="its footer is broken"):
                flows.parquet.open_parquet(io.BytesIO(changed))
    assert negative == 1


def test_lists_of_narrow_numbers_are_read() -> None:
    """2,000 rows of 512 half floats are 2 MB, however they are counted."""
    values = pa.array(np.zeros(2000 * 512, np.float16))
    lists = pa.FixedSizeListArray.from_arrays(values, 512).cast(pa.list_(pa.float16()))
    content = packed(pa.table({"file_name": ids(2000), "embedding": lists}))
    assert len(parse_table("metadata.parquet", content, 2**30).rows) == 2000
