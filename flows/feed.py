"""The feed: which batches there are, and which of them are ready. Nothing is opened for this."""

import hashlib
import os
import posixpath
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from flows.storage import (
    Entry,
    FeedError,
    Place,
    follow,
    is_linked_folder,
    is_unfinished,
    missing_folder,
    open_place,
    visible,
    walk,
)
from flows.words import printable, shown_uri
from sft.dataset import SPLIT_MARK, SPLITS, Role
from sft.pictures import MAX_PIXELS


class BatchNotReady(FeedError):  # noqa: N818 -- a state that passes, not a fault
    """The batch is empty, half-written or changed while it was read; try it again next time."""


class BatchEmpty(BatchNotReady):
    """The batch holds no pictures."""


@dataclass(frozen=True)
class FeedSettings:
    """Where batches and labels arrive, and what is accepted.

    `url` and `labels` are folders (relative ones start at the folder of the settings file) or any
    fsspec URL; `storage_options` go to fsspec. A batch is closed by the renaming of its folder into
    the feed, or by an empty file `_SUCCESS` in it. `max_bad_share` is a share in 0..1, `max_pixels`
    and `max_bytes` are limits for one picture, and `max_table_bytes` is one for a file of labels or
    metadata: for its size, and for what it takes in memory; of a Parquet shard, for all that is
    beside the pictures.
    """

    url: str = "feed"
    labels: str = "labels"
    label_column: str = "label"
    closed_by: Literal["rename", "success"] = "rename"
    max_bad_share: float = 0.2
    min_samples: int = 1
    max_pixels: int = MAX_PIXELS
    max_bytes: int = 64 * 2**20
    max_table_bytes: int = 2**30
    storage_options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse values outside their range, by name."""
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError(f"max_bad_share must lie between 0 and 1, got {self.max_bad_share}")
        for name in ("min_samples", "max_pixels", "max_bytes", "max_table_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Batch:
    """A folder of the feed, as it was listed.

    `digest` is 32 hexadecimal digits over the sorted (path in the batch, size in bytes), `stamp`
    the same with modification times and etags; `arrived` is the newest modification time in UTC.
    `files` are the names of its files, as sample ids have them; None when there are Parquet shards,
    whose samples only reading them tells. `splits` is empty, or tells what each folder of a batch
    stands for that its owner has split into train, val and test: `{"test": "test//", ...}`.
    """

    id: str
    url: str
    digest: str
    stamp: str
    arrived: datetime | None
    files: frozenset[str] | None = field(default=None, repr=False, compare=False)
    splits: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)

    def holds(self, sample_id: str) -> bool:
        """Whether the batch has such a sample, as far as a listing can tell.

        A batch with Parquet shards holds any sample of its name: a label for one that is not in
        them counts as fresh until `read_batch`, asked for it, does not give it.
        """
        batch_id, _, name = sample_id.partition("/")
        return batch_id == self.id and (self.files is None or name in self.files)

    def name_of(self, path: str) -> str:
        """Name a file as sample ids have it: by its path, which a split's mark may divide."""
        folder, _, inner = path.partition("/")
        is_path = inner and not inner.startswith("/")  # not a name already
        return self.splits[folder] + inner if is_path and folder in self.splits else path

    def id_of(self, sample_id: str) -> str:
        """Give the id of a sample that may have been called by its path in this batch."""
        batch_id, slash, path = sample_id.partition("/")
        return f"{self.id}/{self.name_of(path)}" if slash and batch_id == self.id else sample_id

    def split_of(self, name: str) -> str:
        """Return what a file's name begins with because it lies in a split; "" elsewhere."""
        return next((head for head in self.splits.values() if name.startswith(head)), "")


def list_batches(settings: FeedSettings, root: Path) -> list[Batch]:
    """List the batches that are ready, oldest first, in one walk and without opening a file.

    Args:
        settings: where to look.
        root: the folder that relative paths in the settings start at.

    Raises:
        FeedError: the feed does not exist or cannot be listed.
    """
    place = open_place(settings.url, settings.storage_options, root)
    if problem := missing_folder(place):
        raise FeedError(
            f"the feed {problem} "
            f"(create the folder, or correct url={shown_uri(settings.url)!r} in the settings)"
        )
    labels = _labels_inside(place, settings, root)
    folders: dict[str, dict[str, Entry]] = {}
    for name, entry in walk(place).items():
        batch_id, _, inner = name.partition("/")
        if inner:
            folders.setdefault(batch_id, {})[inner] = entry
        elif entry.kind == "folder" or is_linked_folder(entry):
            folders.setdefault(batch_id, {})
    batches = [
        # a name that is not UTF-8 could be written nowhere: its escapes name the batch
        describe(place.child(batch_id), printable(batch_id), entries)
        for batch_id, entries in folders.items()
        if not batch_id.startswith((".", "_"))
        and not is_unfinished(batch_id)
        and batch_id != labels
        and (settings.closed_by == "rename" or "_SUCCESS" in entries)
    ]
    return sorted(batches, key=lambda b: (b.arrived or datetime.min.replace(tzinfo=UTC), b.id))


def describe_batch(url: str, settings: FeedSettings, root: Path) -> Batch:
    """Describe one folder in the form of a batch that need not lie in the feed.

    Its id is the folder's name, and `read_batch` does not expect a _SUCCESS in it.

    Raises:
        FeedError: there is no such folder.
    """
    place = open_place(url, settings.storage_options, root)
    if problem := missing_folder(place):
        raise FeedError(problem)
    folder = follow(place)
    return describe(folder, posixpath.basename(place.path.rstrip("/")), walk(folder))


def describe(place: Place, batch_id: str, entries: dict[str, Entry]) -> Batch:
    """Sum up what a walk through the folder of a batch found."""
    digest, stamp = hashlib.sha256(), hashlib.sha256()
    files = visible(entries)
    for name, entry in files.items():
        line = f"{name}\0{entry.size}\0".encode(errors="surrogateescape")
        digest.update(line)
        stamp.update(line + f"{entry.version}\0".encode())
    arrived = max((e.modified for e in files.values() if e.modified), default=None)
    shards = any(name.lower().endswith(".parquet") and name != "metadata.parquet" for name in files)
    batch = Batch(
        id=batch_id,
        url=place.url,
        digest=digest.hexdigest()[:32],
        stamp=stamp.hexdigest()[:32],
        arrived=arrived,
        splits=_splits(files),
    )
    return batch if shards else replace(batch, files=frozenset(map(batch.name_of, files)))


def _splits(paths: Iterable[str]) -> dict[str, str]:
    """Tell what the folders of a batch stand for that its owner has split; {} for any other.

    All its folders must be splits, `train` and one more among them: class folders may be called
    `train` and `plane`. Without one for validation, `train` stands for it too, and without `test`
    the one for validation does, since early stopping and the gate need samples of their own.
    """
    folders = {path.partition("/")[0] for path in paths if "/" in path}
    if "train" not in folders or len(folders) == 1 or not folders <= SPLITS.keys():
        return {}
    roles = {SPLITS[folder] for folder in folders}
    lacking = {}
    if Role.VALIDATION not in roles:
        lacking[Role.TRAIN] = "+val"
    if Role.HOLDOUT not in roles:
        lacking[Role.VALIDATION] = "+test"
    return {name: name + lacking.get(SPLITS[name], "") + SPLIT_MARK for name in sorted(folders)}


def check_ready(
    listed: Batch, settings: FeedSettings, root: Path, place: Place, entries: dict[str, Entry]
) -> Batch:
    """Compare the folder of a batch with what was listed, and return it as it is now.

    Raises:
        BatchNotReady: it is gone, a link, half-written, changed, or closed to this user.
    """
    now = describe(place, listed.id, entries)
    feed = open_place(settings.url, settings.storage_options, root)
    in_feed = feed.child(listed.id).path == place.path
    problem = None
    if place.local and os.path.islink(place.path):  # noqa: PTH114
        problem = "it is a link, and links out of the feed are not followed; move the folder itself"
    elif not entries and missing_folder(place):
        problem = "it is no longer in the feed"
    elif in_feed and settings.closed_by == "success" and "_SUCCESS" not in entries:
        problem = "it has no _SUCCESS yet (closed_by='success'), so it is still being written"
    elif now.digest != listed.digest:
        problem = "it changed since it was listed; it is tried again next time"
    elif place.local:
        folders = {name: entry for name, entry in entries.items() if entry.kind == "folder"}
        for name, entry in folders.items():
            if not os.access(entry.path, os.R_OK | os.X_OK):
                problem = f"this user has no right to read its folder {name}"
    if problem:
        raise BatchNotReady(f"batch {listed.id}: {problem}")
    return now


def _labels_inside(feed: Place, settings: FeedSettings, root: Path) -> str | None:
    """Name the folder of the feed that holds the labels, if they lie there."""
    try:
        labels = open_place(settings.labels, settings.storage_options, root)
    except FeedError:
        return None  # read_labels will say so
    prefix = feed.path.rstrip("/") + "/"
    if type(labels.fs) is not type(feed.fs) or not labels.path.startswith(prefix):
        return None
    return labels.path[len(prefix) :].split("/")[0]
