"""The feed: which batches there are, and which are ready."""

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.local import LocalFileSystem
from samples import SEEN, names, picture, read, write

import flows.intake
from flows.batches import read_batch
from flows.feed import BatchNotReady, FeedSettings, describe_batch, list_batches
from flows.storage import FeedError
from sft.pictures import decode

# --- listing


def test_a_missing_feed_is_named(root: Path) -> None:
    """A feed that does not exist fails with its place and the setting to correct."""
    with pytest.raises(FeedError, match=r"nowhere does not exist .* url='nowhere'"):
        list_batches(FeedSettings(url="nowhere"), root)
    with pytest.raises(FeedError, match="memory://no-such-feed does not exist"):
        list_batches(FeedSettings(url="memory://no-such-feed"), root)
    with pytest.raises(FeedError, match="warp://x cannot be opened"):
        list_batches(FeedSettings(url="warp://x"), root)


def test_a_feed_that_is_a_file_is_named(root: Path) -> None:
    """A file where a folder should be is told as such, by its place and the setting to correct."""
    write(root, {"one.png": picture()})
    told = r"one.png is a file, not a folder"
    with pytest.raises(FeedError, match=rf"the feed .*{told} .* url='one.png'"):
        list_batches(FeedSettings(url="one.png"), root)
    with pytest.raises(FeedError, match=r"the feed .*one.png/deeper does not exist"):
        list_batches(FeedSettings(url="one.png/deeper"), root)
    with pytest.raises(FeedError, match=told):
        describe_batch("one.png", FeedSettings(), root)


def test_a_feed_that_is_an_object_of_a_bucket_is_named(bucket: tuple[str, Any], root: Path) -> None:
    """A bucket tells an object from a folder as a disk does."""
    url, fs = bucket
    fs.pipe_file(f"{url}/one.png", picture())
    with pytest.raises(FeedError, match=r"the feed memory://.*/one.png is a file, not a folder"):
        list_batches(FeedSettings(url=f"{url}/one.png"), root)


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


def test_a_thousand_batches_are_listed_in_one_walk_and_unopened(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1,000 batches of 10 files take one listing of the feed; not one picture is opened."""
    walks: list[str] = []
    find = LocalFileSystem.find

    def counted(self: LocalFileSystem, path: str, **named: object) -> object:
        walks.append(path)
        return find(self, path, **named)

    monkeypatch.setattr(LocalFileSystem, "find", counted)
    for batch in range(1000):
        folder = root / "feed" / f"b{batch:04}"
        folder.mkdir()
        for file in range(10):
            (folder / f"{file}.png").touch(exist_ok=False)
    os.mkfifo(root / "feed/b0000/pipe.png")  # to open it would wait for ever
    assert len(list_batches(FeedSettings(), root)) == 1000
    assert len(walks) == 1


def test_a_folder_outside_of_the_feed(root: Path) -> None:
    """Any folder can be described and read as a batch; it needs no _SUCCESS."""
    write(root, {"data/train/cat/1.png": picture()})
    settings = FeedSettings(closed_by="success")
    batch = describe_batch("data/train", settings, root)
    assert names(read_batch(batch, settings, root, SEEN)) == ["train/cat/1.png"]
    with pytest.raises(FeedError, match="data/test does not exist"):
        describe_batch("data/test", settings, root)


# --- half-written batches


@pytest.mark.parametrize(
    ("folders", "splits"),
    [
        ("train val test", {"train": "train//", "val": "val//", "test": "test//"}),
        ("train valid", {"train": "train//", "valid": "valid+test//"}),
        ("train test", {"train": "train+val//", "test": "test//"}),
        ("train plane", {}),
        ("train test plane", {}),
        ("train", {}),
        ("val test", {}),
        ("Train Test", {}),
    ],
)
def test_an_owners_split_is_known_by_all_folders(
    root: Path, folders: str, splits: dict[str, str]
) -> None:
    """Only `train` with others of its kind is a split; what lacks is taken from the nearest."""
    first, *_ = folders.split()
    files = {f"b/{name}/cat/{i}.png": picture() for name in folders.split() for i in range(2)}
    write(root / "feed", {**files, "b/README.txt": "about", "b/.git/config": "hidden"})
    (batch,) = list_batches(FeedSettings(), root)
    assert batch.splits == splits
    heads = {splits.get(name, f"{name}/") for name in folders.split()}
    assert batch.files == {"README.txt"} | {f"{h}cat/{i}.png" for h in heads for i in range(2)}
    sample_id = batch.id_of(f"b/{first}/cat/0.png")
    assert batch.holds(sample_id)
    assert batch.id_of(sample_id) == sample_id
    assert not batch.holds(batch.id_of(f"b/{first}/cat/9.png"))
    assert batch.id_of("elsewhere/train/cat/0.png") == "elsewhere/train/cat/0.png"


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
        patched.setattr(flows.intake, "decode", decode_while_writing)
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


def test_a_linked_batch_folder_is_not_followed(root: Path) -> None:
    """A batch that is a link itself is refused with the way out."""
    write(root / "outside", {"1.png": picture()})
    (root / "feed/b").symlink_to(root / "outside")
    with pytest.raises(BatchNotReady, match=r"batch b: it is a link, .* move the folder itself"):
        read(root)
