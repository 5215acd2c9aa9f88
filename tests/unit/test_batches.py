"""What is in a batch: class folders, metadata and shards; the user's files stay as they are."""

import hashlib
import io
import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from samples import LENIENT, SEEN, bomb, digests, names, parquet, picture, read, reasons, write

import flows.batches
import flows.intake
from flows.batches import read_batch, read_own_labels
from flows.feed import FeedSettings, list_batches
from sft.dataset import role_of
from sft.pictures import decode

# --- pictures and class folders


def test_pictures_are_read_in_order(root: Path) -> None:
    """Ids, bytes, digests and tensors run parallel; labels are missing; other files are noted."""
    files = {f"b/{i}.png": picture(i) for i in range(3)}
    write(root / "feed", {**files, "b/notes.txt": "x", "b/readme.md": "y", "b/.hidden.png": "z"})
    data = read(root)
    assert names(data) == ["b/0.png", "b/1.png", "b/2.png"]
    assert list(data.samples["file_name"]) == ["0.png", "1.png", "2.png"]
    assert data.samples["sha256"].tolist() == digests(files.values())
    assert data.samples["label"].isna().all()
    assert (data.pixels[2] == decode(picture(2), SEEN).pixels).all()
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


def test_splits_hold_class_folders(root: Path) -> None:
    """In a batch that its owner has split, classes lie one level deeper, and ids name the split."""
    splits = ["train/cat", "train/train", "val/cat", "test/dog"]
    write(root / "feed", {f"b/{name}/1.png": picture(i) for i, name in enumerate(splits)})
    write(root / "feed", {"b/test/loose.png": picture(9), "b/outside.png": picture(8)})
    data = read(root)
    given = dict(zip(data.samples["sample_id"], data.samples["label"], strict=True))
    roles = {name: role_of(name) for name in given if "//" in name}
    for name in ("b/test//loose.png", "b/outside.png"):
        assert pd.isna(given.pop(name))
    assert given == {
        "b/train//cat/1.png": "cat",
        "b/train//train/1.png": "train",
        "b/val//cat/1.png": "cat",
        "b/test//dog/1.png": "dog",
    }
    assert [role.value for role in roles.values()] == [
        "holdout", "holdout", "train", "train", "validation"
    ]  # fmt: skip
    (batch,) = list_batches(LENIENT, root)
    assert read_own_labels(batch, LENIENT, root) == given
    assert names(read(root, only={"b/val//cat/1.png"})) == ["b/val//cat/1.png"]


def test_a_class_called_train_is_a_class(root: Path) -> None:
    """Beside a folder that is no split, `train` is a class, and its samples keep their ids."""
    write(root / "feed", {f"b/{name}/deep/1.png": picture() for name in ("train", "plane")})
    data = read(root)
    assert dict(zip(names(data), data.samples["label"], strict=True)) == {
        "b/plane/deep/1.png": "plane",
        "b/train/deep/1.png": "train",
    }


def test_splits_hold_metadata_and_shards(root: Path) -> None:
    """A split may have a table or shards of its own; equal names in two splits are two samples."""
    rows = parquet(image=[picture(5)], file_name=["1.png"], label=["eel"])
    write(
        root / "feed",
        {
            "b/train/metadata.csv": "file_name,label,camera\nx/1.png,cat,left\n",
            "b/train/x/1.png": picture(1),
            "b/train/x/2.png": picture(2),
            "b/val/s.parquet": rows,
            "b/test/s.parquet": rows,
            "b/test/dog/1.png": picture(4),
        },
    )
    data = read(root)
    expected = {
        "b/train//x/1.png": "cat",
        "b/val//1.png": "eel",
        "b/test//1.png": "eel",
        "b/test//dog/1.png": "dog",
    }
    given = data.samples.set_index("sample_id")["label"]
    assert given.dropna().to_dict() == expected
    assert list(given[given.isna()].index) == ["b/train//x/2.png"]
    assert data.metadata["camera"].dropna().tolist() == ["left"]
    assert any("1 picture not named in train//metadata.csv" in note for note in data.notes)
    (batch,) = list_batches(LENIENT, root)
    assert read_own_labels(batch, LENIENT, root) == expected


def test_one_table_may_name_pictures_of_all_splits(root: Path) -> None:
    """Metadata beside the splits names pictures by their paths."""
    table = "file_name,label\ntrain/1.png,cat\ntest/1.png,dog\n"
    files = {f"b/{name}/1.png": picture(i) for i, name in enumerate(["train", "test"])}
    write(root / "feed", {"b/metadata.csv": table, **files})
    data = read(root)
    assert dict(zip(names(data), data.samples["label"], strict=True)) == {
        "b/train+val//1.png": "cat",
        "b/test//1.png": "dog",
    }


def test_only_some_samples_are_read(root: Path) -> None:
    """Samples that were not asked for are neither read nor judged."""
    rows = parquet(image=[picture(i) for i in range(9)], file_name=[f"r{i}" for i in range(9)])
    write(root / "feed", {"b/1.png": picture(), "b/2.png": b"bad", "b/s.parquet": rows})
    strict = FeedSettings(max_bad_share=0.0, min_samples=5)
    data = read(root, strict, only={"b/1.png", "b/r4", "b/unknown"})
    assert names(data) == ["b/1.png", "b/r4"]
    assert data.samples["sha256"][1] == digests([picture(4)])[0]
    assert data.quarantined == ()
    nothing = read(root, strict, only=set())
    assert len(nothing.samples) == 0
    assert list(nothing.samples.columns) == ["sample_id", "file_name", "label", "sha256"]


def test_a_thousand_pictures_are_decoded_once_each(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1,000 small JPEGs take 1,000 decodings, however often the folder is looked at."""
    decoded: list[bytes] = []

    def counted(encoded: bytes, *arguments: object, **named: object) -> object:
        decoded.append(encoded)
        return decode(encoded, *arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr("flows.intake.decode", counted)
    stored = picture(0, "JPEG")
    (root / "feed/b").mkdir()
    for i in range(1000):
        (root / f"feed/b/{i:04}.jpg").write_bytes(stored)
    (batch,) = list_batches(FeedSettings(), root)
    assert len(read_batch(batch, FeedSettings(), root, SEEN).pixels) == 1000
    assert len(decoded) == 1000


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
    assert data.samples["sha256"].tolist() == digests(stored * 2)
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


def packed(images: list[bytes], rows: int, *, shared: bool) -> bytes:
    buffer = io.BytesIO()
    table = pa.table({"image": images})
    pq.write_table(table, buffer, row_group_size=rows, compression="zstd", use_dictionary=shared)
    return buffer.getvalue()


@pytest.mark.parametrize("shared", [False, True])
def test_a_shard_that_unpacks_to_too_much_is_quarantined(
    root: Path, monkeypatch: pytest.MonkeyPatch, *, shared: bool
) -> None:
    """A few bytes that unpack to many are seen in the file's metadata and never unpacked."""
    monkeypatch.setattr(flows.batches, "_SHARD_BYTES", 2**16)
    small = packed([picture(i) for i in range(4)], 2, shared=shared)
    huge = packed([picture(4), picture(5), bytes(2**22), picture(6)], 2, shared=shared)
    assert len(huge) < len(small) + 1000
    write(root / "feed", {"b/bomb.parquet": huge, "b/small.parquet": small})
    data = read(root, FeedSettings(max_bad_share=0.9, max_bytes=2**17))
    assert names(data) == [f"b/small-{i}" for i in range(4)]
    reason = reasons(data)["b/bomb.parquet"]
    assert re.fullmatch(
        r"too large: its row group 2 unpacks to 419\d{4} bytes > 262144; "
        r"write smaller row groups, or raise max_bytes",
        reason,
    )
    assert names(read(root, FeedSettings(max_bad_share=0.9, max_bytes=2**22)))[:2] == [
        "b/bomb-0",
        "b/bomb-1",
    ]


def test_a_picture_that_many_rows_share_is_unpacked_for_a_few_at_a_time(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parquet stores equal pictures once; they do not all come into memory together."""
    large = picture(0) + bytes(2**18)
    write(root / "feed", {"b/s.parquet": packed([large] * 100, 100, shared=True)})
    monkeypatch.setattr(flows.batches, "_SHARD_BYTES", 2**20)
    held = pa.total_allocated_bytes()
    peak = 0

    def decode_and_weigh(*given: Any, **options: Any) -> Any:
        nonlocal peak
        peak = max(peak, pa.total_allocated_bytes() - held)
        return decode(*given, **options)

    monkeypatch.setattr(flows.intake, "decode", decode_and_weigh)
    assert len(read(root).pixels) == 100
    assert 0 < peak < 2**22
