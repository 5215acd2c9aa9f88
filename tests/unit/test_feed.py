"""The feed: every form of a batch, every bad sample, late labels; the user's files stay as is."""

import hashlib
import io
import json
import os
import struct
import time
import uuid
import zlib
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

import flows.feed
from flows.feed import (
    BatchData,
    BatchNotReady,
    FeedError,
    FeedSettings,
    LabelTable,
    TooManyBad,
    describe_batch,
    list_batches,
    read_batch,
    read_label_file,
    read_labels,
    read_own_labels,
)
from sft.pictures import Preprocessing, decode

SEEN = Preprocessing(image_size=8)
LENIENT = FeedSettings(max_bad_share=0.9)


def picture(seed: int = 0, kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def bomb() -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", 40000, 40000, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(1000))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


def parquet(**columns: list[Any]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, row_group_size=3)
    return buffer.getvalue()


def write(root: Path, files: dict[str, bytes | str]) -> None:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def tree(root: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        digest.update(f"{path}|{status.st_mode}|{status.st_mtime_ns}".encode("utf-8", "replace"))
        if path.is_file() and not path.is_symlink():
            digest.update(path.read_bytes())
    return digest.hexdigest()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Give the folder of a project with an empty feed."""
    (tmp_path / "project" / "feed").mkdir(parents=True)
    return tmp_path / "project"


def read(root: Path, settings: FeedSettings = LENIENT, **options: Any) -> BatchData:
    """Read the only batch, and see that not one of the user's files was touched."""
    before = tree(root)
    (batch,) = list_batches(settings, root)
    try:
        return read_batch(batch, settings, root, SEEN, **options)
    finally:
        assert tree(root) == before


def labels(root: Path, settings: FeedSettings = LENIENT) -> LabelTable:
    before = tree(root)
    table = read_labels(settings, root)
    assert tree(root) == before
    return table


def as_dict(table: LabelTable) -> dict[str, str]:
    return dict(zip(table.labels["sample_id"], table.labels["label"], strict=True))


def reasons(data: BatchData) -> dict[str, str]:
    return {q.sample_id: q.reason for q in data.quarantined}


def names(data: BatchData) -> list[str]:
    return list(data.samples["sample_id"])


# --- listing


def test_a_missing_feed_is_named(root: Path) -> None:
    """A feed that does not exist fails with its place and the setting to correct."""
    with pytest.raises(FeedError, match=r"nowhere does not exist .* url='nowhere'"):
        list_batches(FeedSettings(url="nowhere"), root)
    with pytest.raises(FeedError, match="memory://no-such-feed does not exist"):
        list_batches(FeedSettings(url="memory://no-such-feed"), root)
    with pytest.raises(FeedError, match="warp://x cannot be opened"):
        list_batches(FeedSettings(url="warp://x"), root)


def test_a_feed_behind_a_link_is_read(root: Path) -> None:
    """The feed itself may be a link; only what lies in it may not lead out."""
    write(root, {"elsewhere/b/1.png": picture()})
    (root / "linked").symlink_to(root / "elsewhere")
    assert names(read(root, FeedSettings(url="linked"))) == ["b/1.png"]


def test_an_empty_feed_has_no_batches(root: Path) -> None:
    """Nothing arrived yet, which is no error."""
    assert list_batches(FeedSettings(), root) == []


def test_batches_are_listed_by_arrival(root: Path) -> None:
    """Oldest first, then by id; unfinished and hidden folders and stray files are no batches."""
    for name in ("b", "a", "c", ".hidden", "_work", "d.tmp", "e.partial", "f.part", "labels"):
        write(root / "feed", {f"{name}/1.png": picture()})
    write(root / "feed", {"stray.png": picture()})
    for name, moment in (("b", 100), ("a", 200), ("c", 100)):
        os.utime(root / "feed" / name / "1.png", (moment, moment))
    settings = FeedSettings(labels="feed/labels")
    batches = list_batches(settings, root)
    assert [batch.id for batch in batches] == ["b", "c", "a"]
    assert batches[0].arrived == datetime.fromtimestamp(100, UTC)
    assert batches[0].url == str(root / "feed" / "b")


def test_the_digest_is_of_names_and_sizes_and_the_stamp_of_times_too(root: Path) -> None:
    """Touching a file changes the stamp only; renaming it or ignoring another changes as told."""
    write(root / "feed", {"b/1.png": picture()})
    (first,) = list_batches(FeedSettings(), root)
    write(root / "feed", {"b/.DS_Store": b"x", "b/Thumbs.db": b"x", "b/_SUCCESS": b""})
    assert list_batches(FeedSettings(), root) == [first]
    os.utime(root / "feed/b/1.png", (5, 5))
    (touched,) = list_batches(FeedSettings(), root)
    assert touched.digest == first.digest
    assert touched.stamp != first.stamp
    (root / "feed/b/1.png").rename(root / "feed/b/2.png")
    (renamed,) = list_batches(FeedSettings(), root)
    assert renamed.digest != first.digest


def test_a_thousand_batches_are_listed_fast_and_unopened(root: Path) -> None:
    """1,000 batches of 10 files take well under two seconds; not one picture is opened."""
    for batch in range(1000):
        folder = root / "feed" / f"b{batch:04}"
        folder.mkdir()
        for file in range(10):
            (folder / f"{file}.png").touch()
    os.mkfifo(root / "feed/b0000/pipe.png")  # to open it would wait for ever
    start = time.perf_counter()
    assert len(list_batches(FeedSettings(), root)) == 1000
    assert time.perf_counter() - start < 2


# --- half-written batches


def test_a_batch_without_success_waits(root: Path) -> None:
    """With closed_by="success" a batch is listed only when it is closed."""
    settings = FeedSettings(closed_by="success")
    write(root / "feed", {"b/1.png": picture()})
    assert list_batches(settings, root) == []
    (batch,) = list_batches(FeedSettings(), root)
    with pytest.raises(BatchNotReady, match="batch b: it has no _SUCCESS yet"):
        read_batch(batch, settings, root, SEEN)
    write(root / "feed", {"b/_SUCCESS": b""})
    assert names(read(root, settings)) == ["b/1.png"]


@pytest.mark.parametrize("content", [{}, {"b/.DS_Store": b"x"}, {"b/notes.txt": "x"}])
def test_an_empty_batch_is_not_ready(root: Path, content: dict[str, bytes | str]) -> None:
    """A folder without a single picture is told to be empty."""
    (root / "feed/b").mkdir()
    write(root / "feed", content)
    with pytest.raises(BatchNotReady, match="batch b is empty: it holds no pictures"):
        read(root)


def test_a_batch_that_grows_while_it_is_read_is_not_ready(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that arrives during the reading puts the batch off, and the next time it is whole."""
    write(root / "feed", {"b/1.png": picture(1), "b/2.png": picture(2)})

    def decode_while_writing(*given: Any, **options: Any) -> Any:
        write(root / "feed", {"b/3.png": picture(3)})
        return decode(*given, **options)

    (batch,) = list_batches(FeedSettings(), root)
    with monkeypatch.context() as patched:
        patched.setattr(flows.feed, "decode", decode_while_writing)
        with pytest.raises(BatchNotReady, match="batch b: its folder changed while it was read"):
            read_batch(batch, FeedSettings(), root, SEEN)
    with pytest.raises(BatchNotReady, match="batch b: it changed since it was listed"):
        read_batch(batch, FeedSettings(), root, SEEN)
    assert names(read(root)) == ["b/1.png", "b/2.png", "b/3.png"]


def test_a_batch_that_is_gone_is_not_ready(root: Path) -> None:
    """A folder that was removed after the listing is named as gone."""
    write(root / "feed", {"b/1.png": picture()})
    (batch,) = list_batches(FeedSettings(), root)
    (root / "feed/b/1.png").unlink()
    (root / "feed/b").rmdir()
    with pytest.raises(BatchNotReady, match="batch b: it is no longer in the feed"):
        read_batch(batch, FeedSettings(), root, SEEN)


def test_too_few_samples_are_not_ready(root: Path) -> None:
    """Fewer usable pictures than min_samples put the batch off."""
    write(root / "feed", {"b/1.png": picture()})
    with pytest.raises(BatchNotReady, match="1 usable picture, fewer than min_samples=2"):
        read(root, FeedSettings(min_samples=2))


# --- pictures and class folders


def test_pictures_are_read_in_order(root: Path) -> None:
    """Ids, bytes, digests and tensors run parallel; labels are missing; other files are noted."""
    files = {f"b/{i}.png": picture(i) for i in range(3)}
    write(root / "feed", {**files, "b/notes.txt": "x", "b/readme.md": "y", "b/.hidden.png": "z"})
    data = read(root)
    assert names(data) == ["b/0.png", "b/1.png", "b/2.png"]
    assert list(data.samples["file_name"]) == ["0.png", "1.png", "2.png"]
    assert data.encoded == list(files.values())
    assert data.samples["label"].isna().all()
    assert data.samples["sha256"][0] == hashlib.sha256(picture(0)).hexdigest()
    assert (data.pictures[2].pixels == decode(picture(2), SEEN).pixels).all()
    assert data.quarantined == ()
    assert data.notes == ("2 files that are no pictures were passed over: notes.txt, readme.md",)


def test_class_folders_are_labels(root: Path) -> None:
    """The first sub-folder is the class, whatever characters its name has."""
    odd = ["<script>alert(1)", "Katze Ä 猫", "007", "NA"]
    write(root / "feed", {f"b/{name}/x[1].png": picture(i) for i, name in enumerate(odd)})
    write(root / "feed", {"b/loose.png": picture(9), "b/NA/deep/er.png": picture(8)})
    data = read(root)
    given = dict(zip(data.samples["sample_id"], data.samples["label"], strict=True))
    assert pd.isna(given.pop("b/loose.png"))
    assert given == {f"b/{name}/x[1].png": name for name in odd} | {"b/NA/deep/er.png": "NA"}
    (batch,) = list_batches(LENIENT, root)
    assert read_own_labels(batch, LENIENT, root) == given


def test_only_some_samples_are_read(root: Path) -> None:
    """Samples that were not asked for are neither read nor judged."""
    rows = parquet(image=[picture(i) for i in range(9)], file_name=[f"r{i}" for i in range(9)])
    write(root / "feed", {"b/1.png": picture(), "b/2.png": b"bad", "b/s.parquet": rows})
    strict = FeedSettings(max_bad_share=0.0, min_samples=5)
    data = read(root, strict, only={"b/1.png", "b/r4", "b/unknown"})
    assert names(data) == ["b/1.png", "b/r4"]
    assert data.encoded[1] == picture(4)
    assert data.quarantined == ()
    nothing = read(root, strict, only=set())
    assert len(nothing.samples) == 0
    assert list(nothing.samples.columns) == ["sample_id", "file_name", "label", "sha256"]


# --- bad samples


def test_bad_samples_are_quarantined_with_their_reason(root: Path) -> None:
    """Each kind of bad file gets a reason, and the good ones are still read."""
    write(
        root / "feed",
        {
            "b/good.png": picture(1),
            "b/cut.jpg": picture(2, "JPEG")[:400],
            "b/text.png": "no picture at all",
            "b/bomb.png": bomb(),
            "b/empty.gif": b"",
            "b/large.bmp": picture(3, "BMP") + bytes(5000),
        },
    )
    os.mkfifo(root / "feed/b/pipe.png")
    data = read(root, FeedSettings(max_bad_share=0.9, max_bytes=4000))
    assert names(data) == ["b/good.png"]
    assert reasons(data) == {
        "b/cut.jpg": "truncated",
        "b/text.png": "not a picture",
        "b/bomb.png": "decompression bomb: 40000x40000 > max_pixels=50000000",
        "b/empty.gif": "empty file",
        "b/large.bmp": f"too large: {len(picture(3, 'BMP')) + 5000} bytes > max_bytes=4000",
        "b/pipe.png": "not a regular file",
    }


def test_links_out_of_the_batch_are_not_followed(root: Path) -> None:
    """A link to a picture outside, a linked folder or shard is quarantined; inside is fine."""
    outside = root / "outside"
    shard = parquet(image=[picture(7)])
    write(outside, {"secret.png": picture(5), "more/secret.png": picture(6), "s.parquet": shard})
    write(root / "feed", {"b/good.png": picture(1), "b/second.png": picture(2)})
    batch = root / "feed/b"
    (batch / "secret.png").symlink_to(outside / "secret.png")
    (batch / "relative.png").symlink_to("../../outside/secret.png")
    (batch / "more").symlink_to(outside / "more")
    (batch / "s.parquet").symlink_to(outside / "s.parquet")
    (batch / "metadata.csv").symlink_to(outside / "secret.png")
    (batch / "gone.png").symlink_to("nothing.png")
    (batch / "loop").symlink_to(".")
    (batch / "inside.png").symlink_to("good.png")
    data = read(root, FeedSettings(max_bad_share=1.0))
    assert names(data) == ["b/good.png", "b/inside.png", "b/second.png"]
    leaves = "path leaves the batch: a link to a place outside of it"
    assert reasons(data) == {
        "b/secret.png": leaves,
        "b/relative.png": leaves,
        "b/more": leaves,
        "b/s.parquet": leaves,
        "b/gone.png": "a link to a missing file",
        "b/loop": "a link to a folder, which is not followed",
    }
    assert data.notes[0].startswith(f"metadata.csv: {leaves}; no labels")


def test_a_linked_batch_folder_is_not_followed(root: Path) -> None:
    """A batch that is a link itself is refused with the way out."""
    write(root / "outside", {"1.png": picture()})
    (root / "feed/b").symlink_to(root / "outside")
    with pytest.raises(BatchNotReady, match=r"batch b: it is a link, .* move the folder itself"):
        read(root)


def test_a_file_that_turns_into_a_link_is_not_followed(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was a file when it was listed is looked at again when it is opened."""
    write(root / "outside", {"secret.png": picture(5)})
    write(root / "feed", {"b/1.png": picture(1), "b/2.png": picture(2)})
    taken: list[bytes] = []

    def decode_while_linking(content: bytes, *given: Any, **options: Any) -> Any:
        taken.append(content)
        (root / "feed/b/2.png").unlink(missing_ok=True)
        (root / "feed/b/2.png").symlink_to(root / "outside/secret.png")
        return decode(content, *given, **options)

    (batch,) = list_batches(FeedSettings(), root)
    monkeypatch.setattr(flows.feed, "decode", decode_while_linking)
    with pytest.raises(BatchNotReady):
        read_batch(batch, FeedSettings(), root, SEEN)
    assert taken == [picture(1)]


def test_a_name_that_is_not_utf8_is_quarantined(root: Path) -> None:
    """A file name that no table can hold is named in escapes."""
    write(root / "feed", {"b/good.png": picture()})
    try:
        Path(os.fsdecode(os.fsencode(root / "feed/b") + b"/\xff.png")).write_bytes(picture())
    except OSError:
        pytest.skip("this file system has UTF-8 names only")
    assert reasons(read(root)) == {"b/\\udcff.png": "its file name is not UTF-8"}


def test_too_many_bad_samples_fail_loudly(root: Path) -> None:
    """More than max_bad_share fails with figures, the first reason and the setting's name."""
    write(root / "feed", {f"2026-11-21T10/z{i}.png": picture(i) for i in range(6)})
    cut = picture(0, "JPEG")[:400]
    write(root / "feed", {f"2026-11-21T10/{c}.jpg": cut for c in "abcdefghijklmn"})
    with pytest.raises(TooManyBad) as caught:
        read(root, FeedSettings())
    assert str(caught.value) == (
        "batch 2026-11-21T10: 14 of 20 pictures could not be read (first: a.jpg: truncated); "
        "more than max_bad_share=0.2, so the batch was not checked"
    )
    assert len(read(root, FeedSettings(max_bad_share=0.7)).samples) == 6


# --- metadata


def metadata(kind: str, rows: list[dict[str, Any]]) -> bytes:
    if kind == "csv":
        return pd.DataFrame(rows).to_csv(index=False).encode()
    if kind == "jsonl":
        return "\n".join(json.dumps(row) for row in rows).encode()
    return parquet(**{key: [row[key] for row in rows] for key in rows[0]})


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_metadata_gives_labels_and_columns(root: Path, kind: str) -> None:
    """Hugging Face metadata in its three forms; sub-folders are no classes beside it."""
    rows = [
        {"file_name": "images/0.png", "kind": "007", "weather": "fog <b>"},
        {"file_name": "./images/1.png", "kind": "NA", "weather": "None"},
        {"file_name": "missing.png", "kind": "1", "weather": ""},
        {"file_name": "../outside.png", "kind": "1", "weather": ""},
        {"file_name": "/etc/passwd", "kind": "1", "weather": ""},
        {"file_name": "s3://other/x.png", "kind": "1", "weather": ""},
    ]
    write(root / "feed", {f"b/images/{i}.png": picture(i) for i in range(3)})
    write(root / "feed", {f"b/metadata.{kind}": metadata(kind, rows)})
    write(root, {"outside.png": picture(9)})
    settings = FeedSettings(label_column="kind", max_bad_share=0.9)
    data = read(root, settings)
    assert names(data) == [f"b/images/{i}.png" for i in range(3)]
    assert list(data.samples["label"][:2]) == ["007", "NA"]
    assert pd.isna(data.samples["label"][2])
    assert list(data.samples["weather"][:2]) == ["fog <b>", "None"]
    assert "kind" not in data.samples
    assert reasons(data) == {
        "b/missing.png": f"named in metadata.{kind}, but not in the batch",
        "b/../outside.png": "path leaves the batch",
        "b//etc/passwd": "path leaves the batch",
        "b/s3://other/x.png": "path leaves the batch",
    }
    assert data.notes == (
        f"1 picture not named in metadata.{kind}, so without its columns: images/2.png",
    )
    (batch,) = list_batches(settings, root)
    own = read_own_labels(batch, settings, root)
    assert own == {"b/images/0.png": "007", "b/images/1.png": "NA"}


def test_duplicates_in_metadata_are_noted(root: Path) -> None:
    """One picture named twice is kept once; with two labels it counts as unlabelled."""
    table = "file_name,label\na.png,cat\na.png,cat\nc.png,cat\n./c.png,dog\nd.png,\nd.png,dog\n"
    files = {f"b/{name}.png": picture(i) for i, name in enumerate("acd")}
    write(root / "feed", {**files, "b/metadata.csv": table})
    data = read(root)
    assert names(data) == ["b/a.png", "b/c.png", "b/d.png"]
    assert data.samples["label"].fillna("-").tolist() == ["cat", "-", "dog"]
    repeated, disputed = data.notes
    assert repeated.startswith("3 samples came more than once with the same picture; one of each")
    assert repeated.endswith("was kept: a.png, c.png, d.png")
    assert disputed == "1 sample came with two different labels, of which none counts: c.png"


@pytest.mark.parametrize(
    ("file", "content", "note"),
    [
        (
            "metadata.csv",
            "name,label\n1.png,cat\n",
            "it has no column file_name (but: name, label)",
        ),
        ("metadata.csv", b"\xff\xfe\x00", "it is not UTF-8 text"),
        ("metadata.csv", "", "empty file"),
        ("metadata.csv", 'file_name,label\n1.png,"cat', "unreadable CSV: unexpected end of data"),
        ("metadata.parquet", b"PAR1 cut short", "unreadable Parquet"),
        ("metadata.jsonl", "{]\n", "line 1 is no JSON object and skipped"),
    ],
)
def test_unreadable_metadata_is_noted(
    root: Path, file: str, content: bytes | str, note: str
) -> None:
    """Metadata that cannot be used is told, and the pictures are read without it."""
    write(root / "feed", {"b/1.png": picture(), f"b/{file}": content})
    data = read(root)
    assert names(data) == ["b/1.png"]
    assert data.samples["label"].isna().all()
    assert any(text.startswith(file) and note in text for text in data.notes)


def test_columns_cannot_take_the_place_of_ours(root: Path) -> None:
    """A user's column called sha256 is passed over with a note, as is a second metadata file."""
    rows = {"b/metadata.csv": "file_name,sha256\n1.png,x\n", "b/metadata.jsonl": "{}"}
    write(root / "feed", {"b/1.png": picture(), **rows})
    data = read(root)
    assert data.samples["sha256"][0] == hashlib.sha256(picture()).hexdigest()
    assert "metadata.csv was used and metadata.jsonl passed over" in data.notes
    assert any(
        "1 column passed over, because sustain gives columns of that name itself: sha256" in note
        for note in data.notes
    )


# --- Parquet shards


@pytest.mark.parametrize("struct_column", [False, True])
def test_parquet_shards(root: Path, struct_column: bool) -> None:
    """Bytes or Hugging Face's struct; ids from file_name or shard and row; labels are text."""
    stored = [picture(i) for i in range(5)]
    images = [{"bytes": s, "path": "/abs/x.png"} for s in stored] if struct_column else stored
    named = parquet(image=images, file_name=[f"r{i}.png" for i in range(5)], label=[0, 1, 2, 3, 4])
    anonymous = parquet(image=images, label=["a", None, "NA", "", "e"], score=[0.5] * 5)
    write(root / "feed", {"b/a.parquet": named, "b/sub/z.parquet": anonymous})
    data = read(root)
    expected = [f"b/r{i}.png" for i in range(5)] + [f"b/sub/z-{i}" for i in range(5)]
    assert names(data) == expected
    assert data.encoded == stored * 2
    assert data.samples["label"].fillna("-").tolist() == [*"01234", "a", "-", "NA", "-", "e"]
    assert data.samples["score"].tolist()[5:] == [0.5] * 5
    (batch,) = list_batches(LENIENT, root)
    given = data.samples.dropna(subset="label")
    own = dict(zip(given["sample_id"], given["label"], strict=True))
    assert read_own_labels(batch, LENIENT, root) == own


def test_bad_rows_of_a_shard_are_quarantined(root: Path) -> None:
    """Escapes, missing bytes, bombs and duplicates with other bytes; equal duplicates are kept."""
    rows = {
        "../out.png": picture(1),
        "/abs.png": picture(1),
        "none.png": None,
        "bomb.png": bomb(),
        "cut.jpg": picture(2, "JPEG")[:400],
        "good.png": picture(3),
    }
    clash = {"twice.png": picture(4), "same.png": picture(5)}
    first, second = rows | clash, {"twice.png": picture(6), "same.png": picture(5)}
    write(
        root / "feed",
        {
            "b/1.parquet": parquet(image=list(first.values()), file_name=list(first)),
            "b/2.parquet": parquet(image=list(second.values()), file_name=list(second)),
            "b/3.parquet": parquet(file_name=["x"], labels=["y"]),
        },
    )
    data = read(root)
    assert names(data) == ["b/good.png", "b/same.png"]
    assert reasons(data) == {
        "b/../out.png": "path leaves the batch",
        "b//abs.png": "path leaves the batch",
        "b/none.png": "empty: its row has no image bytes",
        "b/bomb.png": "decompression bomb: 40000x40000 > max_pixels=50000000",
        "b/cut.jpg": "truncated",
        "b/twice.png": "duplicate id: other pictures have it too",
    }
    assert data.notes == (
        "3.parquet: it has no column image (but: file_name, labels); it was passed over",
        "1 sample came more than once with the same picture; one of each was kept: same.png",
    )


def test_a_truncated_shard_is_quarantined_by_its_share_of_bytes(root: Path) -> None:
    """A lost shard weighs as much as its bytes, not as one sample of many."""
    whole = parquet(image=[picture(i) for i in range(9)])
    write(root / "feed", {"b/1.parquet": whole, "b/2.parquet": whole[: len(whole) // 2]})
    with pytest.raises(TooManyBad, match=r"batch b: 1 Parquet shard with .* bytes could not be"):
        read(root, FeedSettings())
    data = read(root, FeedSettings(max_bad_share=0.4))
    assert len(data.samples) == 9
    assert reasons(data)["b/2.parquet"].startswith("unreadable: ")


# --- labels


def test_late_labels_keep_their_text(root: Path) -> None:
    """Labels such as 007, NA and None stay text; integers of Parquet become text."""
    table = '\ufeffsample_id,label\nb/1,007\nb/2,NA\nb/3,None\nb/4,1\nb/5,"<script>, Ä"\n\n'
    write(root / "labels", {"a.csv": table, ".hidden.csv": "x", "w.tmp/x.csv": "x"})
    write(root / "labels", {"b.parquet": parquet(sample_id=["b/6", "b/7"], label=[7, None])})
    read_table = labels(root)
    assert as_dict(read_table) == {
        "b/1": "007",
        "b/2": "NA",
        "b/3": "None",
        "b/4": "1",
        "b/5": "<script>, Ä",
        "b/6": "7",
    }
    assert read_table.problems == ("labels/b.parquet: row 2 has no label and was skipped",)
    assert str(read_table.labels["labelled_at"].dtype) == "datetime64[us, UTC]"


def test_no_labels_yet(root: Path) -> None:
    """A missing folder is told; an empty one is not worth a word."""
    (problem,) = labels(root).problems
    assert "labels does not exist" in problem
    (root / "labels").mkdir()
    table = labels(root)
    assert len(table.labels) == 0
    assert table.problems == ()


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"1": "x,cat,", "2": "x,dog,"}, "dog"),  # a later file corrects
        ({"1": "x,cat,2026-02-01", "2": "x,dog,2026-01-01"}, "cat"),  # the newer time counts
        ({"1": "x,cat,2026-01-01", "2": "x,dog,2026-01-01"}, "dog"),  # no newer one: the file
        ({"1": "x,cat,2026-02-01", "2": "x,dog,"}, "dog"),  # not comparable: the file
        ({"1": "x,cat,2026-01-01\nx,dog,2026-02-01"}, "dog"),
        ({"1": "x,cat,2026-01-01T10:00+02:00\nx,dog,2026-01-01 09:00"}, "dog"),
        ({"1": "x,cat,\nx,cat,"}, "cat"),
        ({"1": "x,cat,\nx,dog,"}, None),
        ({"1": "x,cat,2026-01-01\nx,dog,2026-01-01"}, None),
        ({"1": "x,cat,2026-01-01\nx,dog,"}, None),
        ({"1": "x,cat,\nx,dog,", "2": "x,cat,"}, "cat"),  # a later file ends a conflict
        ({"1": "x,cat,", "2": "x,cat,\nx,dog,"}, None),  # and may begin one
    ],
)
def test_which_label_is_in_force(root: Path, files: dict[str, str], expected: str | None) -> None:
    """Corrections by file and by time, and conflicts that are left out with a word."""
    header = "sample_id,label,labelled_at\n"
    write(root / "labels", {f"{name}.csv": header + rows for name, rows in files.items()})
    table = labels(root)
    assert as_dict(table).get("x") == expected
    if expected is None:
        assert len(table.problems) == 1
        assert "1 sample with conflicting labels" in table.problems[0]
        assert "left out: x ('cat' or 'dog')" in table.problems[0]
    else:
        assert table.problems == ()


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        ("1.csv", "id,label\nx,cat\n", "it has no column sample_id (but: id, label)"),
        ("1.csv", "sample_id;label\nx;cat\n", "it has no column sample_id (but: sample_id;label)"),
        ("1.csv", "", "empty file; the file was passed over"),
        ("1.csv", b"\xff\xfes\x00", "it is not UTF-8 text"),
        ("1.csv", 'sample_id,label\nx,"cat', "unreadable CSV"),
        ("1.csv", "sample_id,label,label\nx,a,b\n", "a column occurs twice in its first line"),
        ("1.csv", "sample_id,label\nx,cat\ny\n", "line 3 has not as many fields"),
        ("1.csv", "sample_id,label\nx,\ny, \n", "2 lines have no label and were skipped (first:"),
        ("1.csv", "sample_id,label\n,cat\n", "line 2 has no sample_id and was skipped"),
        ("1.csv", "sample_id,label,who\nx,cat,me\n", "1 unknown column passed over: who"),
        ("1.csv", "sample_id,label,labelled_at\nx,cat,soon\n", "line 2 has a labelled_at that is"),
        ("1.parquet", parquet(sample_id=["x"], label=["y"])[:80], "unreadable Parquet"),
        ("1.xlsx", "whatever", "neither CSV nor Parquet"),
    ],
)
def test_label_problems_are_told(root: Path, file: str, content: bytes | str, problem: str) -> None:
    """A file or row that cannot be used is told by name, and the rest is used."""
    write(root / "labels", {file: content, "2.csv": "sample_id,label\ngood,dog\n"})
    table = labels(root)
    assert as_dict(table)["good"] == "dog"
    assert len(table.problems) == 1
    assert table.problems[0].startswith(f"labels/{file}: {problem}")


def test_label_links_do_not_lead_out(root: Path) -> None:
    """A link out of the labels folder is told, not followed."""
    write(root, {"secret.csv": "sample_id,label\nx,y\n", "labels/keep.csv": "sample_id,label\n"})
    (root / "labels/link.csv").symlink_to(root / "secret.csv")
    assert "labels/link.csv: path leaves" in labels(root).problems[0]


def test_one_file_of_labels(root: Path) -> None:
    """A single file is read by the same rules, and fails loudly where it cannot be used."""
    write(root, {"l.csv": "sample_id,label\nx,007\n", "bad.csv": "a,b\n"})
    assert as_dict(read_label_file("l.csv", root)) == {"x": "007"}
    with pytest.raises(FeedError, match=r"bad.csv: it has no column sample_id"):
        read_label_file("bad.csv", root)
    with pytest.raises(FeedError, match=r"none.csv cannot be read"):
        read_label_file("none.csv", root)


def test_a_folder_outside_of_the_feed(root: Path) -> None:
    """Any folder can be described and read as a batch; it needs no _SUCCESS."""
    write(root, {"data/train/cat/1.png": picture()})
    settings = FeedSettings(closed_by="success")
    batch = describe_batch("data/train", settings, root)
    assert names(read_batch(batch, settings, root, SEEN)) == ["train/cat/1.png"]
    with pytest.raises(FeedError, match="data/test does not exist"):
        describe_batch("data/test", settings, root)


# --- buckets, by fsspec's memory file system


class Restless(MemoryFileSystem):
    """A bucket in which somebody writes while it is read."""

    protocol = "restless"
    root_marker = "/"
    store: dict[str, Any] = {}  # noqa: RUF012 -- MemoryFileSystem keeps its files on the class
    pseudo_dirs = [""]  # noqa: RUF012
    writes: list[tuple[str, bytes]] = []  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.replace("restless://", "/")))

    def cat_file(self, path: str, *given: Any, **options: Any) -> bytes:
        content = super().cat_file(path, *given, **options)
        if self.writes:
            self.pipe_file(*self.writes.pop(0))
        return bytes(content)


@pytest.fixture
def bucket() -> Iterator[tuple[str, Any]]:
    url = f"memory://{uuid.uuid4().hex}"
    fs = fsspec.filesystem("memory")
    yield url, fs
    if fs.exists(url):
        fs.rm(url, recursive=True)


def test_a_bucket_reads_like_a_folder(
    bucket: tuple[str, Any], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every form of a batch and the labels are read over a bucket, a few files at a time."""
    url, fs = bucket
    monkeypatch.setattr(flows.feed, "_CHUNK_FILES", 2)
    files = {f"b/cat/{i}[1].png": picture(i) for i in range(5)}
    files |= {"b/s.parquet": parquet(image=[picture(8)]), "b/bad.png": b"bad", "b/e.png": b""}
    files |= {"b/../x.png": picture(), "m/1.png": picture(), "b/_SUCCESS": b"", "b/n.txt": b"x"}
    files |= {
        "m/metadata.csv": b"file_name,label\n1.png,dog\n",
        "m/_SUCCESS": b"",
        "open/1.png": b"",
    }
    for name, content in files.items():
        fs.pipe_file(f"{url}/feed/{name}", content)
    fs.pipe_file(f"{url}/labels/1.csv", b"sample_id,label\nx,NA\n")
    before = {path: fs.cat_file(path) for path in fs.find(url)}
    settings = FeedSettings(f"{url}/feed", f"{url}/labels", closed_by="success", max_bad_share=0.5)
    first, second = sorted(list_batches(settings, root), key=lambda batch: batch.id)
    assert (first.id, first.url) == ("b", f"{url}/feed/b")
    assert first.arrived is not None
    data = read_batch(first, settings, root, SEEN)
    assert names(data) == [*(f"b/cat/{i}[1].png" for i in range(5)), "b/s-0"]
    assert data.encoded[3] == picture(3)
    assert reasons(data) == {
        "b/bad.png": "not a picture",
        "b/e.png": "empty file",
        "b/../x.png": "path leaves the batch",
    }
    assert read_batch(second, settings, root, SEEN).samples["label"].tolist() == ["dog"]
    assert read_own_labels(second, settings, root) == {"m/1.png": "dog"}
    assert as_dict(read_labels(settings, root)) == {"x": "NA"}
    assert {path: fs.cat_file(path) for path in fs.find(url)} == before


def test_a_bucket_that_changes_while_it_is_read(root: Path) -> None:
    """A batch that grows is put off; a label file that is replaced is read again, or told."""
    fsspec.register_implementation("restless", Restless, clobber=True)
    fs = fsspec.filesystem("restless")
    settings = FeedSettings("restless://feed", "restless://labels")
    fs.pipe_file("/feed/b/1.png", picture(1))
    (batch,) = list_batches(settings, root)
    fs.writes[:] = [("/feed/b/2.png", picture(2))]
    with pytest.raises(BatchNotReady, match="changed while it was read"):
        read_batch(batch, settings, root, SEEN)
    (batch,) = list_batches(settings, root)
    assert names(read_batch(batch, settings, root, SEEN)) == ["b/1.png", "b/2.png"]

    fs.pipe_file("/labels/1.csv", b"sample_id,label\nx,old\n")
    fs.writes[:] = [("/labels/1.csv", b"sample_id,label\nx,new\ny,new\n")]
    assert as_dict(read_labels(settings, root)) == {"x": "new", "y": "new"}
    fs.writes[:] = [("/labels/1.csv", b"sample_id,label\n" + b"x,y\n" * n) for n in range(3, 6)]
    (problem,) = read_labels(settings, root).problems
    assert problem == (
        "restless://labels/1.csv: it changed each of the 3 times that it was read; "
        "the file was passed over"
    )


def test_a_thousand_pictures_are_read_in_a_few_seconds(root: Path) -> None:
    """1,000 small JPEGs, read and decoded once."""
    stored = picture(0, "JPEG")
    (root / "feed/b").mkdir()
    for i in range(1000):
        (root / f"feed/b/{i:04}.jpg").write_bytes(stored)
    (batch,) = list_batches(FeedSettings(), root)
    start = time.perf_counter()
    assert len(read_batch(batch, FeedSettings(), root, SEEN).pictures) == 1000
    assert time.perf_counter() - start < 4
