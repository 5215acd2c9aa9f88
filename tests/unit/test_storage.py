"""Folders and buckets: links do not lead out, and what changes while it is read is noticed."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from samples import SEEN, as_dict, digests, names, parquet, picture, read, reasons, write

import flows.batches
import flows.intake
import flows.storage
from flows.batches import read_batch, read_own_labels
from flows.feed import BatchNotReady, FeedSettings, list_batches
from flows.labels import read_labels
from flows.storage import FeedError, Refused, look_up, open_place, open_ranges, read_file, walk
from sft.pictures import decode

# --- links and names


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
    monkeypatch.setattr(flows.intake, "decode", decode_while_linking)
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


def test_a_bucket_reads_like_a_folder(
    bucket: tuple[str, Any], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every form of a batch and the labels are read over a bucket, a few files at a time."""
    url, fs = bucket
    monkeypatch.setattr(flows.storage, "_CHUNK_FILES", 2)
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
    assert data.samples["sha256"][3] == digests([picture(3)])[0]
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


def test_of_a_shard_in_a_bucket_only_the_labels_are_fetched(
    bucket: tuple[str, Any], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard of pictures is not copied for its labels, and hardly touched if it has none."""
    url, fs = bucket
    large = [bytes(np.random.default_rng(i).bytes(100_000)) for i in range(12)]
    rows = {"image": large, "file_name": [f"{i}.png" for i in range(12)]}
    fs.pipe_file(f"{url}/labelled/s.parquet", parquet(**rows, label=list("abcdefghijkl")))
    fs.pipe_file(f"{url}/unlabelled/S.PARQUET", parquet(**rows))
    fs.pipe_file(f"{url}/broken/s.parquet", b"PAR1" + bytes(300_000) + b"PAR1")
    settings = FeedSettings(url)
    batches = {batch.id: batch for batch in list_batches(settings, root)}
    fetched: list[int] = []
    plain = MemoryFileSystem.cat_file

    def cat_file(self: Any, path: str, start: int | None = None, end: int | None = None) -> bytes:
        content = bytes(plain(self, path, start, end))
        fetched.append(len(content))
        return content

    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)
    monkeypatch.setattr(MemoryFileSystem, "_open", None)
    labels = {f"labelled/{i}.png": label for i, label in enumerate("abcdefghijkl")}
    assert read_own_labels(batches["labelled"], settings, root) == labels
    assert sum(fetched) < 700_000  # of 1,200,000, and 64 kB at a time
    fetched.clear()
    assert read_own_labels(batches["unlabelled"], settings, root) == {}
    assert sum(fetched) < 140_000
    assert read_own_labels(batches["broken"], settings, root) == {}


@pytest.mark.parametrize("at", [0, 1, 2, 3])
@pytest.mark.parametrize("how", ["raises", "stops short"])
def test_a_bucket_that_fails_is_not_taken_for_a_broken_shard(
    bucket: tuple[str, Any], root: Path, monkeypatch: pytest.MonkeyPatch, at: int, how: str
) -> None:
    """Whichever request fails, the storage is named; labels are never passed over for it."""
    url, fs = bucket
    large = [bytes(np.random.default_rng(i).bytes(100_000)) for i in range(12)]
    fs.pipe_file(f"{url}/b/s.parquet", parquet(image=large, label=list("abcdefghijkl")))
    (batch,) = list_batches(FeedSettings(url), root)
    answers = iter([True] * at)
    plain = MemoryFileSystem.cat_file

    def cat_file(self: Any, path: str, start: int | None = None, end: int | None = None) -> bytes:
        if next(answers, False):
            return bytes(plain(self, path, start, end))
        if how == "raises":
            raise ConnectionError("the line is dead")
        return bytes(plain(self, path, start, end))[:-1]

    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)
    with pytest.raises(FeedError, match=r"s\.parquet could not be read: .*(dead|bytes came, and)"):
        read_own_labels(batch, FeedSettings(url), root)


def test_a_shard_that_disappears_has_no_labels(bucket: tuple[str, Any], root: Path) -> None:
    """It is left to `read_batch`, which says so."""
    url, fs = bucket
    fs.pipe_file(f"{url}/b/s.parquet", parquet(image=[picture()], label=["a"]))
    (batch,) = list_batches(FeedSettings(url), root)
    entries = walk(open_place(batch.url, {}, root))
    fs.rm(f"{url}/b/s.parquet")
    with pytest.raises(Refused, match="disappeared while it was read"):
        open_ranges(open_place(batch.url, {}, root), entries["s.parquet"]).read(4)
    assert read_own_labels(batch, FeedSettings(url), root) == {}


def test_a_batch_that_can_have_no_labels_is_not_listed_again(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files are known: pictures without class folders, metadata or shards."""
    write(root / "feed", {"plain/1.png": picture(), "plain/.hidden/2.png": picture()})
    write(root / "feed", {"folders/cat/1.png": picture(), "shard/S.PARQUET": b"broken"})
    batches = {batch.id: batch for batch in list_batches(FeedSettings(), root)}
    listed: list[str] = []

    def listing(place: Any) -> Any:
        listed.append(place.path.rsplit("/", 1)[1])
        return walk(place)

    monkeypatch.setattr(flows.batches, "walk", listing)
    own = {name: read_own_labels(batch, FeedSettings(), root) for name, batch in batches.items()}
    assert own == {"plain": {}, "folders": {"folders/cat/1.png": "cat"}, "shard": {}}
    assert sorted(listed) == ["folders", "shard"]
    assert batches["plain"].holds("plain/1.png")
    assert not batches["plain"].holds("plain/2.png")
    assert batches["shard"].holds("shard/anything")


@pytest.mark.parametrize("listed", [3, 0])
def test_an_object_that_is_larger_than_its_listing_is_not_read_whole(
    bucket: tuple[str, Any], root: Path, listed: int
) -> None:
    """It was replaced since, or the storage tells no sizes."""
    url, fs = bucket
    fs.pipe_file(f"{url}/labels.csv", b"x" * 1000)
    place = open_place(url, {}, root)
    entry = replace(look_up(place.child("labels.csv")), size=listed)
    with pytest.raises(Refused, match="more than max_table_bytes=100"):
        read_file(place, entry, 100)
    assert read_file(place, entry, 1000) == b"x" * 1000
