"""Batches and labels from a folder or a bucket, read through fsspec and never written to."""

import csv
import hashlib
import io
import json
import os
import posixpath
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal

import fsspec
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from sft.pictures import MAX_PIXELS, BadPicture, Picture, Preprocessing, decode

PICTURE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
)
_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_UNFINISHED = (".tmp", ".partial", ".part")
_OWN_COLUMNS = ("sample_id", "file_name", "label", "sha256")
_LABEL_COLUMNS = ("sample_id", "label", "labelled_at")
# A bucket is read in requests that run together, and a shard row by row: so much is held beside
# the pictures that are returned anyway.
_CHUNK_FILES = 128
_CHUNK_BYTES = 32 * 2**20
_SHARD_ROWS = 64
_ATTEMPTS = 3
_LEAVES = "path leaves the batch"


class FeedError(Exception):
    """The feed, or a batch of it, could not be read; the message says what to do."""


class BatchNotReady(FeedError):  # noqa: N818 -- a state that passes, not a fault
    """The batch is empty, half-written or changed while it was read; try it again next time."""


class TooManyBad(FeedError):  # noqa: N818 -- reads as the verdict that it is
    """More samples of the batch are unreadable than `max_bad_share` allows."""


@dataclass(frozen=True)
class FeedSettings:
    """Where batches and labels arrive, and what is accepted.

    `url` and `labels` are folders (relative ones start at the folder of the settings file) or any
    fsspec URL; `storage_options` go to fsspec. A batch is closed by the renaming of its folder into
    the feed, or by an empty file `_SUCCESS` in it. `max_bad_share` is a share in 0..1, `max_pixels`
    and `max_bytes` are limits for one picture.
    """

    url: str = "feed"
    labels: str = "labels"
    label_column: str = "label"
    closed_by: Literal["rename", "success"] = "rename"
    max_bad_share: float = 0.2
    min_samples: int = 1
    max_pixels: int = MAX_PIXELS
    max_bytes: int = 64 * 2**20
    storage_options: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Batch:
    """A folder of the feed, as it was listed.

    `digest` is 32 hexadecimal digits over the sorted (path in the batch, size in bytes), `stamp`
    the same with modification times and etags; `arrived` is the newest modification time in UTC.
    """

    id: str
    url: str
    digest: str
    stamp: str
    arrived: datetime | None


@dataclass(frozen=True)
class Quarantined:
    """A sample (or a whole Parquet shard) that was left out, and why."""

    sample_id: str
    reason: str


@dataclass(frozen=True, eq=False)  # tables have no single truth value to compare by
class BatchData:
    """What a batch holds: n usable samples, and what was left out.

    `samples` has n rows: sample_id, file_name (path in the batch), label (str, or NA where none
    came with the batch), sha256 of the encoded picture, then the user's own columns. `encoded` and
    `pictures` are parallel to it.
    """

    batch: Batch
    samples: pd.DataFrame
    encoded: list[bytes]
    pictures: list[Picture]
    quarantined: tuple[Quarantined, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class LabelTable:
    """The labels in force: one row a sample (sample_id, label, labelled_at in UTC or NaT)."""

    labels: pd.DataFrame
    problems: tuple[str, ...]


def list_batches(settings: FeedSettings, root: Path) -> list[Batch]:
    """List the batches that are ready, oldest first, in one walk and without opening a file.

    Args:
        settings: where to look.
        root: the folder that relative paths in the settings start at.

    Raises:
        FeedError: the feed does not exist or cannot be listed.
    """
    place = _open_place(settings.url, settings, root)
    if not _is_folder(place):
        raise FeedError(
            f"the feed {place.shown} does not exist (or is no folder); "
            f"create it, or correct url={settings.url!r} in the settings"
        )
    labels = _labels_inside(place, settings, root)
    folders: dict[str, dict[str, _Entry]] = {}
    for name, entry in _walk(place).items():
        batch_id, _, inner = name.partition("/")
        if inner:
            folders.setdefault(batch_id, {})[inner] = entry
        elif entry.kind == "folder" or (entry.kind == "link" and os.path.isdir(entry.path)):  # noqa: PTH112
            folders.setdefault(batch_id, {})
    batches = [
        _describe(place.child(batch_id), batch_id, entries)
        for batch_id, entries in folders.items()
        if not batch_id.startswith((".", "_"))
        and not batch_id.endswith(_UNFINISHED)
        and batch_id != labels
        and (settings.closed_by == "rename" or "_SUCCESS" in entries)
    ]
    return sorted(batches, key=lambda b: (b.arrived or datetime.min.replace(tzinfo=UTC), b.id))


def read_batch(
    batch: Batch,
    settings: FeedSettings,
    root: Path,
    preprocessing: Preprocessing,
    only: AbstractSet[str] | None = None,
) -> BatchData:
    """Read and decode a batch; a bad sample is quarantined, and the rest goes on.

    A batch may mix pictures (a first sub-folder is their class, unless there is a metadata file)
    and Parquet shards. Its folder is compared before and after: with what was listed, and with
    itself.

    Args:
        batch: from `list_batches`.
        settings: the same that it was listed with.
        root: the folder that relative paths in the settings start at.
        preprocessing: what the network wants to see.
        only: sample ids to read; others are neither read nor judged, and neither `max_bad_share`
            nor `min_samples` applies.

    Raises:
        BatchNotReady: empty, half-written, gone, or changed since it was listed or while it was
            read.
        TooManyBad: more than `max_bad_share` of it is unreadable.
        FeedError: the storage failed.
    """
    place = _open_place(batch.url, settings, root)
    entries = _walk(place)
    current = _describe(place, batch.id, entries)
    feed = _open_place(settings.url, settings, root)
    closed_by = settings.closed_by if feed.child(batch.id).path == place.path else "rename"
    _check_ready(batch, current, place, entries, closed_by)
    intake = _Intake(current, settings, preprocessing, only)
    _read_contents(place, _visible(entries), settings, intake)
    if _describe(place, batch.id, _walk(place)).stamp != current.stamp:
        raise BatchNotReady(
            f"batch {batch.id}: its folder changed while it was read; it is tried again next time "
            "(write a batch elsewhere and rename it into the feed, or close it with _SUCCESS)"
        )
    return intake.finish()


def describe_batch(url: str, settings: FeedSettings, root: Path) -> Batch:
    """Describe one folder in the form of a batch that need not lie in the feed.

    Its id is the folder's name, and `read_batch` does not expect a _SUCCESS in it.

    Raises:
        FeedError: there is no such folder.
    """
    place = _open_place(url, settings, root)
    if not _is_folder(place):
        raise FeedError(f"{place.shown} does not exist (or is no folder)")
    batch_id = posixpath.basename(place.path.rstrip("/"))
    if place.local:  # whoever names a link means the folder behind it
        place = replace(place, path=os.path.realpath(place.path))
        place = replace(place, shown=place.path)
    return _describe(place, batch_id, _walk(place))


def read_own_labels(batch: Batch, settings: FeedSettings, root: Path) -> dict[str, str]:
    """Return sample id to label for the labels that came with a batch, without its pictures.

    The labels are those that `read_batch` gives, and also those of pictures that it would
    quarantine. Files that cannot be read are left to `read_batch` to report.

    Raises:
        FeedError: the storage failed.
    """
    place = _open_place(batch.url, settings, root)
    files = _visible(_walk(place))
    intake = _Intake(batch, settings, Preprocessing(image_size=1), only=None)  # decodes nothing
    contents = _sort_files(place, files, _read_metadata(place, files, settings, intake))
    samples = {name: sample for name, (sample, _) in contents.pictures.items()}
    for shard, entry in contents.shards.items():
        for name, label in _read_shard_labels(place, shard, entry, settings):
            samples[name] = intake.agree(samples.get(name) or _Sample(name, None, {}), label)
    return {
        f"{batch.id}/{name}": sample.label
        for name, sample in samples.items()
        if sample.label is not None and not intake.is_disputed(name)
    }


def read_label_file(url: str, root: Path, settings: FeedSettings | None = None) -> LabelTable:
    """Read one file of labels by the rules of `read_labels`.

    Raises:
        FeedError: it does not exist, or it cannot be used at all.
    """
    place = _open_place(url, settings or FeedSettings(), root)
    try:
        info = place.fs.info(place.path)
    except Exception as error:
        raise FeedError(f"{place.shown} cannot be read: {_told(error)}") from error
    name = posixpath.basename(place.path)
    if place.local:  # whoever names a link means the file behind it
        place = replace(place, path=os.path.realpath(place.path))
        info = place.fs.info(place.path)
    folder = replace(place, path=posixpath.dirname(place.path))
    try:
        rows = _read_label_rows(folder, name, _entry(place.path, info))
    except _Refused as refused:
        raise FeedError(f"{place.shown}: {refused}") from refused
    return _settle_files([(url, rows)])


def read_labels(settings: FeedSettings, root: Path) -> LabelTable:
    """Read every CSV and Parquet file of the labels folder, and settle which label is in force.

    A later file (by name) corrects an earlier one; between two labels that both have `labelled_at`
    the newer one counts, wherever it stands. Whatever cannot be used is told in `problems`.

    Raises:
        FeedError: the storage failed.
    """
    place = _open_place(settings.labels, settings, root)
    if not _is_folder(place):
        problem = f"the labels folder {place.shown} does not exist (or is no folder): no labels yet"
        return LabelTable(labels=_label_frame([]), problems=(problem,))
    unusable: list[str] = []
    files: list[tuple[str, _LabelRows]] = []
    for name, entry in _visible(_walk(place)).items():
        if any(part.endswith(_UNFINISHED) for part in name.split("/")):
            continue
        shown = f"{settings.labels.rstrip('/')}/{_printable(name)}"
        try:
            files.append((shown, _read_label_rows(place, name, entry)))
        except _Refused as refused:
            unusable.append(f"{shown}: {refused}; the file was passed over")
    settled = _settle_files(files)
    return replace(settled, problems=(*unusable, *settled.problems))


# --- places: one way to speak of a local folder and of a bucket


@dataclass(frozen=True)
class _Place:
    """A folder: its file system, its path as that file system writes it, and as a person does."""

    fs: Any
    path: str
    shown: str

    @property
    def local(self) -> bool:
        return isinstance(self.fs, LocalFileSystem)

    def child(self, name: str) -> "_Place":
        return _Place(self.fs, f"{self.path.rstrip('/')}/{name}", f"{self.shown}/{name}")


@dataclass(frozen=True, slots=True)
class _Entry:
    path: str
    size: int
    kind: Literal["file", "folder", "link", "other"]
    modified: datetime | None
    version: str


class _Refused(Exception):  # noqa: N818 -- carries the reason to where it is reported
    """A file that is not used; the text is the reason."""


def _open_place(url: str, settings: FeedSettings, root: Path) -> _Place:
    if os.path.isabs(url) or ("://" not in url and "::" not in url):  # noqa: PTH117
        path = os.path.abspath(root / Path(url).expanduser())  # noqa: PTH100 -- resolve() follows links
        return _Place(fsspec.filesystem("file"), path, path)
    try:
        fs, path = url_to_fs(url, **settings.storage_options)
    except Exception as error:
        raise FeedError(f"{url} cannot be opened: {_told(error)}") from error
    return _Place(fs, path, url.rstrip("/"))


def _is_folder(place: _Place) -> bool:
    try:
        place.fs.invalidate_cache()  # object stores remember their listings
        found = bool(place.fs.isdir(place.path))
    except Exception as error:
        raise FeedError(f"{place.shown} cannot be listed: {_told(error)}") from error
    if found and place.local and not os.access(place.path, os.R_OK | os.X_OK):
        raise FeedError(f"{place.shown} cannot be listed: this user has no right to read it")
    return found


def _labels_inside(feed: _Place, settings: FeedSettings, root: Path) -> str | None:
    """Name the folder of the feed that holds the labels, if they lie there."""
    try:
        labels = _open_place(settings.labels, settings, root)
    except FeedError:
        return None  # read_labels will say so
    prefix = feed.path.rstrip("/") + "/"
    if type(labels.fs) is not type(feed.fs) or not labels.path.startswith(prefix):
        return None
    return labels.path[len(prefix) :].split("/")[0]


def _walk(place: _Place) -> dict[str, _Entry]:
    """List everything below a folder by its path in it; links are listed, never followed."""
    place.fs.invalidate_cache()
    try:
        found = place.fs.find(place.path, detail=True, withdirs=True)
    except FileNotFoundError:
        return {}
    except Exception as error:
        raise FeedError(f"{place.shown} cannot be listed: {_told(error)}") from error
    top = place.path.strip("/")
    entries = {}
    for key, info in found.items():
        path = key.strip("/")
        name = path[len(top) :].lstrip("/")
        if name and (not top or path.startswith(top + "/")):
            entries[name] = _entry(key, info)
    return entries


def _entry(path: str, info: dict[str, Any]) -> _Entry:
    kind: Literal["file", "folder", "link", "other"] = "other"
    if info.get("islink"):
        kind = "link"
    elif info.get("type") == "directory":
        kind = "folder"
    elif info.get("type") == "file":
        kind = "file"
    # the names that local disks, S3, Azure, Google and fsspec's memory give to the same thing
    times = ("mtime", "LastModified", "last_modified", "updated", "modified", "created")
    time = next((info[key] for key in times if info.get(key) is not None), None)
    etag = next((info[key] for key in ("ETag", "etag", "generation") if info.get(key)), "")
    return _Entry(path, int(info.get("size") or 0), kind, _as_utc(time), f"{time}|{etag}")


def _as_utc(time: object) -> datetime | None:
    try:
        if isinstance(time, int | float):
            return datetime.fromtimestamp(time, UTC)
        if isinstance(time, str):
            time = datetime.fromisoformat(time)
    except (ValueError, OverflowError, OSError):
        return None
    if not isinstance(time, datetime):
        return None
    return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)


def _visible(entries: dict[str, _Entry]) -> dict[str, _Entry]:
    """Leave out folders, hidden files and what operating systems and writers leave behind."""
    return {
        name: entry
        for name, entry in sorted(entries.items())
        if entry.kind != "folder"
        and posixpath.basename(name) not in ("_SUCCESS", "Thumbs.db")
        and not any(part.startswith(".") and part != ".." for part in name.split("/"))
    }


def _describe(place: _Place, batch_id: str, entries: dict[str, _Entry]) -> Batch:
    digest, stamp = hashlib.sha256(), hashlib.sha256()
    visible = _visible(entries)
    for name, entry in visible.items():
        line = f"{name}\0{entry.size}\0".encode(errors="surrogateescape")
        digest.update(line)
        stamp.update(line + f"{entry.version}\0".encode())
    arrived = max((e.modified for e in visible.values() if e.modified), default=None)
    return Batch(batch_id, place.shown, digest.hexdigest()[:32], stamp.hexdigest()[:32], arrived)


def _check_ready(
    batch: Batch, current: Batch, place: _Place, entries: dict[str, _Entry], closed_by: str
) -> None:
    problem = None
    if place.local and os.path.islink(place.path):  # noqa: PTH114
        problem = "it is a link, and links out of the feed are not followed; move the folder itself"
    elif not entries and not _is_folder(place):
        problem = "it is no longer in the feed"
    elif closed_by == "success" and "_SUCCESS" not in entries:
        problem = "it has no _SUCCESS yet (closed_by='success'), so it is still being written"
    elif current.digest != batch.digest:
        problem = "it changed since it was listed; it is tried again next time"
    elif place.local:
        closed = [
            name
            for name, entry in entries.items()
            if entry.kind == "folder" and not os.access(entry.path, os.R_OK | os.X_OK)
        ]
        if closed:
            problem = f"this user has no right to read its folder {closed[0]}"
    if problem:
        raise BatchNotReady(f"batch {batch.id}: {problem}")


# --- reading single files


def _link_problem(folder: str, path: str) -> str | None:
    """Say why a link may not be used: nothing is read from outside of the folder."""
    real = os.path.realpath(path)
    if os.path.commonpath([real, os.path.realpath(folder)]) != os.path.realpath(folder):
        return f"{_LEAVES}: a link to a place outside of it"
    if os.path.isdir(real):  # noqa: PTH112
        return "a link to a folder, which is not followed"
    return None if os.path.exists(real) else "a link to a missing file"  # noqa: PTH110


def _open_local(folder: str, path: str) -> IO[bytes]:
    # Looked at again when it is opened: since the listing, a link may have taken the file's place.
    if problem := _link_problem(folder, path):
        raise _Refused(problem)
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        descriptor = os.open(os.path.realpath(path), flags)
    except OSError as error:
        raise _Refused(f"could not be read: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _Refused("not a regular file")
    return os.fdopen(descriptor, "rb")


def _read_one(place: _Place, entry: _Entry) -> bytes:
    try:
        if place.local:
            with _open_local(place.path, entry.path) as file:
                return file.read()
        return bytes(place.fs.cat_file(entry.path))
    except FileNotFoundError as error:
        raise _Refused("it disappeared while it was read") from error
    except OSError as error:
        raise FeedError(f"{place.shown}: {entry.path} could not be read: {_told(error)}") from error


def _read_pictures(
    place: _Place, wanted: Sequence[tuple[str, _Entry]], max_bytes: int
) -> Iterator[tuple[str, bytes | _Refused]]:
    """Yield (name, content, or why there is none), a bounded part of a bucket at a time."""
    if place.local:
        for name, entry in wanted:
            try:
                with _open_local(place.path, entry.path) as file:
                    yield name, file.read(max_bytes + 1)
            except (_Refused, OSError) as error:
                yield name, error if isinstance(error, _Refused) else _Refused(_told(error))
        return
    for chunk in _chunks(wanted):
        # not cat(), which takes the [1] of "a[1].jpg" for a pattern
        contents = place.fs.cat_ranges(
            [entry.path for _, entry in chunk], 0, [e.size for _, e in chunk], on_error="return"
        )
        for (name, _), content in zip(chunk, contents, strict=True):
            if isinstance(content, FileNotFoundError):
                yield name, _Refused("it disappeared while it was read")
            elif isinstance(content, Exception):
                raise FeedError(
                    f"{place.shown}: {name} could not be read: {_told(content)}"
                ) from content
            else:
                yield name, bytes(content)


def _chunks(wanted: Sequence[tuple[str, _Entry]]) -> Iterator[list[tuple[str, _Entry]]]:
    chunk: list[tuple[str, _Entry]] = []
    total = 0
    for name, entry in wanted:
        if chunk and (len(chunk) == _CHUNK_FILES or total + entry.size > _CHUNK_BYTES):
            yield chunk
            chunk, total = [], 0
        chunk.append((name, entry))
        total += entry.size
    if chunk:
        yield chunk


# --- tables: CSV, JSON lines, Parquet


@dataclass(frozen=True)
class _Table:
    """Rows with the number under which a person finds them, and what was wrong with others."""

    columns: tuple[str, ...]
    rows: list[tuple[int, dict[str, Any]]]
    problems: tuple[str, ...] = ()


def _parse_table(name: str, content: bytes) -> _Table:
    if not content:
        raise _Refused("empty file")
    try:
        match PurePosixPath(name).suffix.lower():
            case ".csv":
                return _parse_csv(content.decode("utf-8-sig"))
            case ".jsonl":
                return _parse_jsonl(content.decode("utf-8-sig"))
            case _:
                table = pq.read_table(io.BytesIO(content))
                rows = list(enumerate(table.to_pylist(), start=1))
                return _Table(tuple(table.column_names), rows)
    except UnicodeDecodeError as error:
        raise _Refused("it is not UTF-8 text") from error
    except csv.Error as error:
        raise _Refused(f"unreadable CSV: {error}") from error
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _Refused(f"unreadable Parquet: {_told(error)}") from error


def _parse_csv(text: str) -> _Table:
    # The csv module keeps "007", "NA" and "" as they stand, and tells rows that were cut short.
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    columns = tuple(next(reader, []))
    if len(set(columns)) != len(columns):
        raise _Refused("a column occurs twice in its first line")
    rows, ragged = [], []
    for row in reader:
        if len(row) == len(columns):
            rows.append((reader.line_num, dict(zip(columns, row, strict=True))))
        elif row:
            ragged.append(reader.line_num)
    problem = "not as many fields as the first line and were skipped"
    return _Table(columns, rows, _told_rows(ragged, "line", f"has {problem}", f"have {problem}"))


def _parse_jsonl(text: str) -> _Table:
    columns: dict[str, None] = {}
    rows, broken = [], []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair is no text
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append((number, row))
            columns |= dict.fromkeys(row)
        else:
            broken.append(number)
    problem = "no JSON object and skipped"
    return _Table(
        tuple(columns), rows, _told_rows(broken, "line", f"is {problem}", f"are {problem}")
    )


def _is_missing(value: object) -> bool:
    if isinstance(value, str):
        return not value.strip()
    return value is None or value is pd.NaT or (isinstance(value, float) and value != value)  # noqa: PLR0124 -- NaN


def _label_text(value: object) -> str | None:
    """Write a label as text: strings as they stand, 7 and 7.0 as "7", nothing and lists as None."""
    if _is_missing(value) or isinstance(value, list | tuple | dict | bytes):
        return None
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


# --- a batch: what its files say


@dataclass(frozen=True)
class _Sample:
    name: str
    label: str | None
    columns: dict[str, Any]


class _Intake:
    """Takes what a batch holds, sample by sample, and sorts good from bad."""

    def __init__(
        self,
        batch: Batch,
        settings: FeedSettings,
        preprocessing: Preprocessing,
        only: AbstractSet[str] | None,
    ) -> None:
        self.batch = batch
        self.notes: list[str] = []
        self.shard_bytes = 0
        self.lost_shards: dict[str, int] = {}
        self._settings = settings
        self._preprocessing = preprocessing
        self._only = only
        self._kept: dict[str, tuple[_Sample, bytes, Picture]] = {}
        self._digests: dict[str, str] = {}
        self._bad: list[tuple[str, str]] = []
        self._repeated: list[str] = []
        self._clashing: dict[str, None] = {}
        self._disputed: dict[str, None] = {}

    def wants(self, name: str) -> bool:
        return self._only is None or f"{self.batch.id}/{name}" in self._only

    def reject(self, name: str, reason: str) -> None:
        if self.wants(name):
            self._bad.append((name, reason))

    def lose_shard(self, name: str, size: int, reason: str) -> None:
        """Put a whole shard aside; which samples were in it is not known, so `only` can't tell."""
        self._bad.append((name, reason))
        self.lost_shards[name] = size

    def take(self, sample: _Sample, encoded: bytes) -> None:
        if len(encoded) > self._settings.max_bytes:
            self.reject(sample.name, _too_large(len(encoded), self._settings))
            return
        digest = hashlib.sha256(encoded).hexdigest()
        earlier = self._digests.setdefault(sample.name, digest)
        if earlier != digest:
            self._clashing[sample.name] = None
            return
        if sample.name in self._kept:
            kept, _, picture = self._kept[sample.name]
            self.repeat(sample.name)
            self._kept[sample.name] = (self.agree(kept, sample.label), encoded, picture)
            return
        try:
            picture = decode(encoded, self._preprocessing, max_pixels=self._settings.max_pixels)
        except BadPicture as bad:
            self.reject(sample.name, bad.reason)
        else:
            self._kept[sample.name] = (sample, encoded, picture)

    def agree(self, sample: _Sample, label: str | None) -> _Sample:
        """Hear another label for a sample; if it is a different one, none of the two counts."""
        if sample.label is None:
            return replace(sample, label=label)
        if label not in (None, sample.label):
            self._disputed[sample.name] = None
        return sample

    def is_disputed(self, name: str) -> bool:
        return name in self._disputed

    def repeat(self, name: str) -> None:
        self._repeated.append(name)

    def finish(self) -> BatchData:
        for name in self._clashing:
            self._kept.pop(name, None)
        bad = [(name, reason) for name, reason in self._bad if name not in self._clashing]
        bad += [(name, "duplicate id: other pictures have it too") for name in self._clashing]
        bad = list(dict.fromkeys(bad))
        self._note_duplicates()
        self._judge(bad)
        kept = list(self._kept.values())
        return BatchData(
            batch=self.batch,
            samples=self._frame([sample for sample, _, _ in kept]),
            encoded=[encoded for _, encoded, _ in kept],
            pictures=[picture for _, _, picture in kept],
            quarantined=tuple(
                Quarantined(_printable(f"{self.batch.id}/{name}"), reason) for name, reason in bad
            ),
            notes=tuple(self.notes),
        )

    def _note_duplicates(self) -> None:
        if repeated := list(dict.fromkeys(self._repeated)):
            self.notes.append(
                f"{_count(repeated, 'sample')} came more than once with the same picture; "
                f"one of each was kept: {_first_few(repeated)}"
            )
        if disputed := [name for name in self._disputed if name in self._kept]:
            self.notes.append(
                f"{_count(disputed, 'sample')} came with two different labels, of which none "
                f"counts: {_first_few(disputed)}"
            )

    def _judge(self, bad: list[tuple[str, str]]) -> None:
        if self._only is not None:
            return
        batch, limit = f"batch {self.batch.id}", self._settings.max_bad_share
        refusal = f"more than max_bad_share={limit:g}, so the batch was not checked"
        said = "; ".join(["", *self.notes])
        total = len(self._kept) + len(bad)
        if total == 0:
            raise BatchNotReady(f"{batch} is empty: it holds no pictures{said}")
        if self.lost_shards and sum(self.lost_shards.values()) > limit * self.shard_bytes:
            name, reason = next(entry for entry in bad if entry[0] in self.lost_shards)
            raise TooManyBad(
                f"{batch}: {_count(self.lost_shards, 'Parquet shard')} with "
                f"{sum(self.lost_shards.values())} of {self.shard_bytes} bytes could not be read "
                f"(first: {name}: {reason}); {refusal}"
            )
        if len(bad) > limit * total:
            name, reason = bad[0]
            raise TooManyBad(
                f"{batch}: {len(bad)} of {total} pictures could not be read "
                f"(first: {_printable(name)}: {reason}); {refusal}"
            )
        if len(self._kept) < self._settings.min_samples:
            raise BatchNotReady(
                f"{batch} has {_count(self._kept, 'usable picture')}, fewer than "
                f"min_samples={self._settings.min_samples}, so it was not checked{said}"
            )

    def _frame(self, samples: list[_Sample]) -> pd.DataFrame:
        settings = self._settings
        labels = [None if s.name in self._disputed else s.label for s in samples]
        frame = pd.DataFrame(
            {
                "sample_id": pd.Series([f"{self.batch.id}/{s.name}" for s in samples], dtype="str"),
                "file_name": pd.Series([s.name for s in samples], dtype="str"),
                "label": pd.Series(labels, dtype="str"),
                "sha256": pd.Series([self._digests[s.name] for s in samples], dtype="str"),
            }
        )
        columns = dict.fromkeys(column for sample in samples for column in sample.columns)
        taken = [c for c in columns if c in _OWN_COLUMNS and c != settings.label_column]
        taken = [column for column in taken if column != "file_name"]
        if taken:
            self.notes.append(
                f"{_count(taken, 'column')} passed over, because sustain gives columns of that "
                f"name itself: {', '.join(taken)}"
            )
        for column in columns:
            if column not in (*_OWN_COLUMNS, settings.label_column):
                frame[column] = pd.Series([sample.columns.get(column) for sample in samples])
        return frame


@dataclass(frozen=True)
class _Contents:
    """The files of a batch by what they are."""

    pictures: dict[str, tuple[_Sample, _Entry]]
    shards: dict[str, _Entry]
    others: list[str]


def _read_contents(
    place: _Place, files: dict[str, _Entry], settings: FeedSettings, intake: _Intake
) -> None:
    metadata = _read_metadata(place, files, settings, intake)
    contents = _sort_files(place, files, metadata)
    if metadata is not None:
        _note_unnamed(metadata, contents.pictures, intake)
    usable = []
    for name, (_, entry) in contents.pictures.items():
        if intake.wants(name):
            if problem := _problem_before_reading(place, name, entry, settings):
                intake.reject(name, problem)
            else:
                usable.append((name, entry))
    for name, content in _read_pictures(place, usable, settings.max_bytes):
        if isinstance(content, _Refused):
            intake.reject(name, str(content))
        else:
            intake.take(contents.pictures[name][0], content)
    for name, entry in contents.shards.items():
        _read_shard(place, name, entry, settings, intake)
    if others := contents.others:
        verb = "is no picture was" if len(others) == 1 else "are no pictures were"
        intake.notes.append(
            f"{_count(others, 'file')} that {verb} passed over: {_first_few(others)}"
        )


def _sort_files(place: _Place, files: dict[str, _Entry], metadata: "_Metadata | None") -> _Contents:
    contents = _Contents({}, {}, [])
    named = {} if metadata is None else metadata.samples
    for name, entry in files.items():
        suffix = PurePosixPath(name).suffix.lower()
        if name in named:
            contents.pictures[name] = (named[name], entry)
        elif name in _METADATA:
            continue
        elif suffix == ".parquet":
            contents.shards[name] = entry
        elif suffix in PICTURE_SUFFIXES or _is_linked_folder(place, entry):
            folder, _, inner = name.partition("/")
            label = folder if inner and metadata is None else None
            contents.pictures[name] = (_Sample(name, label, {}), entry)
        else:
            contents.others.append(name)
    return contents


def _problem_before_reading(
    place: _Place, name: str, entry: _Entry, settings: FeedSettings
) -> str | None:
    problem = None
    if ".." in name.split("/"):
        problem = _LEAVES
    elif _printable(name) != name:
        problem = "its file name is not UTF-8"
    elif entry.kind == "other":
        problem = "not a regular file"
    elif entry.kind == "link":
        problem = _link_problem(place.path, entry.path)
    if problem is None and entry.size == 0:
        problem = "empty file"
    if problem is None and entry.size > settings.max_bytes:
        problem = _too_large(entry.size, settings)
    return problem


def _is_linked_folder(place: _Place, entry: _Entry) -> bool:
    return place.local and entry.kind == "link" and os.path.isdir(entry.path)  # noqa: PTH112


def _too_large(size: int, settings: FeedSettings) -> str:
    return f"too large: {size} bytes > max_bytes={settings.max_bytes}"


# --- a batch: Hugging Face metadata


@dataclass(frozen=True)
class _Metadata:
    file: str
    samples: dict[str, _Sample]


def _read_metadata(
    place: _Place, files: dict[str, _Entry], settings: FeedSettings, intake: _Intake
) -> _Metadata | None:
    present = [name for name in _METADATA if name in files]
    if not present:
        return None
    file, *unused = present
    if unused:
        intake.notes.append(f"{file} was used and {', '.join(unused)} passed over")
    try:
        table = _parse_table(file, _read_one(place, files[file]))
        intake.notes += [f"{file}: {problem}" for problem in table.problems]
        if "file_name" not in table.columns:
            raise _Refused(_no_column("file_name", table))  # noqa: TRY301
    except _Refused as refused:
        intake.notes.append(f"{file}: {refused}; no labels or columns were taken from it")
        return _Metadata(file, {})
    return _Metadata(file, _match_metadata(file, table, files, settings, intake))


def _match_metadata(
    file: str, table: _Table, files: dict[str, _Entry], settings: FeedSettings, intake: _Intake
) -> dict[str, _Sample]:
    samples: dict[str, _Sample] = {}
    nameless, odd_labels = [], []
    for number, row in table.rows:
        if _is_missing(row.get("file_name")):
            nameless.append(number)
            continue
        name = _find_named(str(row["file_name"]), file, files, intake)
        if name is None:
            continue
        raw = row.get(settings.label_column)
        label = _label_text(raw)
        if label is None and not _is_missing(raw):
            odd_labels.append(number)
        if name in samples:
            intake.repeat(name)
            samples[name] = intake.agree(samples[name], label)
        else:
            samples[name] = _Sample(name, label, row)
    for rows, problem in (
        (nameless, "no file_name"),
        (odd_labels, f"a {settings.label_column} that is no single value"),
    ):
        told = _told_rows(rows, "row", f"has {problem}", f"have {problem}")
        intake.notes += [f"{file}: {text}" for text in told]
    return samples


def _find_named(given: str, file: str, files: dict[str, _Entry], intake: _Intake) -> str | None:
    """Find the file that a row of metadata means; the name is only looked up, never opened."""
    if _leaves(given):
        intake.reject(given, _LEAVES)
        return None
    names = posixpath.normpath(given), posixpath.normpath(given.replace("\\", "/"))
    for name in names:
        if name in files:
            return name
    intake.reject(names[0], f"named in {file}, but not in the batch")
    return None


def _note_unnamed(
    metadata: _Metadata, wanted: dict[str, tuple[_Sample, _Entry]], intake: _Intake
) -> None:
    unnamed = [name for name in wanted if name not in metadata.samples]
    if unnamed and metadata.samples:
        intake.notes.append(
            f"{_count(unnamed, 'picture')} not named in {metadata.file}, so without its columns: "
            f"{_first_few(unnamed)}"
        )


def _leaves(name: str) -> bool:
    """Tell whether a file name that somebody wrote down points out of the batch."""
    posix = name.replace("\\", "/")
    normal = posixpath.normpath(posix)
    absolute = posix.startswith("/") or re.match(r"[A-Za-z]:/|[A-Za-z0-9+.-]+://", posix)
    return bool(absolute) or normal == ".." or normal.startswith("../")


# --- a batch: Parquet shards


def _read_shard(
    place: _Place, name: str, entry: _Entry, settings: FeedSettings, intake: _Intake
) -> None:
    intake.shard_bytes += entry.size
    try:
        if problem := _problem_of_shard(place, name, entry):
            raise _Refused(problem)  # noqa: TRY301
        with _open_shard(place, entry) as file:
            _read_rows(name, file, settings, intake)
    except (FeedError, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001 -- a broken Parquet file can raise nearly everything
        reason = str(error) if isinstance(error, _Refused) else f"unreadable: {_told(error)}"
        intake.lose_shard(name, entry.size, reason)


def _problem_of_shard(place: _Place, name: str, entry: _Entry) -> str | None:
    if ".." in name.split("/"):
        return _LEAVES
    if entry.kind == "link" and (problem := _link_problem(place.path, entry.path)):
        return problem
    return "empty file" if entry.size == 0 else None


def _open_shard(place: _Place, entry: _Entry) -> IO[bytes]:
    if place.local:
        return _open_local(place.path, entry.path)
    # Copied first, so that a storage that fails is not taken for a broken file.
    copy = tempfile.SpooledTemporaryFile(max_size=_CHUNK_BYTES)  # noqa: SIM115 -- the caller closes
    try:
        with place.fs.open(entry.path, "rb") as file:
            shutil.copyfileobj(file, copy)
    except FileNotFoundError as error:
        raise _Refused("it disappeared while it was read") from error
    except Exception as error:
        raise FeedError(f"{place.shown}: {entry.path} could not be read: {_told(error)}") from error
    copy.seek(0)
    return copy


def _read_rows(shard: str, file: IO[bytes], settings: FeedSettings, intake: _Intake) -> None:
    parquet = pq.ParquetFile(file)
    schema = parquet.schema_arrow
    if "image" not in schema.names:
        columns = _Table(tuple(schema.names), [])
        intake.notes.append(f"{shard}: {_no_column('image', columns)}; it was passed over")
        return
    stem = str(PurePosixPath(shard).with_suffix(""))
    first = 0
    for group in range(parquet.num_row_groups):
        names = _row_names(parquet, group, stem, first)
        first += len(names)
        if not any(intake.wants(name) for name in names):
            continue
        unread = iter(names)
        for rows in parquet.iter_batches(batch_size=_SHARD_ROWS, row_groups=[group]):
            for row in rows.to_pylist():
                _take_row(next(unread), row, settings, intake)


def _read_shard_labels(
    place: _Place, shard: str, entry: _Entry, settings: FeedSettings
) -> list[tuple[str, str | None]]:
    column = settings.label_column
    try:
        if _problem_of_shard(place, shard, entry):
            return []
        with _open_shard(place, entry) as file:
            parquet = pq.ParquetFile(file)
            if not {"image", column} <= set(parquet.schema_arrow.names):
                return []
            stem = str(PurePosixPath(shard).with_suffix(""))
            names: list[str] = []
            for group in range(parquet.num_row_groups):
                names += _row_names(parquet, group, stem, len(names))
            labels = parquet.read(columns=[column]).column(0).to_pylist()
            return [(n, _label_text(v)) for n, v in zip(names, labels, strict=True)]
    except (FeedError, MemoryError):
        raise
    except Exception:  # noqa: BLE001 -- a broken Parquet file can raise nearly everything
        return []


def _row_names(parquet: Any, group: int, stem: str, first: int) -> list[str]:
    count = parquet.metadata.row_group(group).num_rows
    names: list[Any] = [None] * count
    if "file_name" in parquet.schema_arrow.names:
        names = parquet.read_row_group(group, columns=["file_name"]).column(0).to_pylist()
    return [
        f"{stem}-{first + i}"
        if _is_missing(name)
        else (str(name) if _leaves(str(name)) else posixpath.normpath(str(name)))
        for i, name in enumerate(names)
    ]


def _take_row(name: str, row: dict[str, Any], settings: FeedSettings, intake: _Intake) -> None:
    if not intake.wants(name):
        return
    image = row.pop("image")
    if isinstance(image, dict):
        image = image.get("bytes")
    if _leaves(name):
        intake.reject(name, _LEAVES)
    elif not image:
        intake.reject(name, "empty: its row has no image bytes")
    elif not isinstance(image, bytes):
        intake.reject(name, f"its image is {type(image).__name__}, not bytes")
    else:
        intake.take(_Sample(name, _label_text(row.get(settings.label_column)), row), image)


# --- labels


@dataclass(frozen=True)
class _LabelRows:
    answers: dict[str, list[tuple[str, pd.Timestamp | None]]]
    problems: list[str]


@dataclass(frozen=True)
class _Statement:
    """What one file says of one sample; several labels mean that it contradicts itself."""

    labels: tuple[str, ...]
    labelled_at: pd.Timestamp | None
    order: int
    file: str


class _Statements:
    """What all files say of one sample, read in their order."""

    def __init__(self) -> None:
        self._timed: _Statement | None = None
        self._untimed: _Statement | None = None

    def add(self, new: _Statement) -> None:
        if new.labelled_at is None:
            self._untimed = new
        elif (
            self._timed is None
            or self._timed.labelled_at is None
            or new.labelled_at >= self._timed.labelled_at
        ):
            self._timed = new

    def in_force(self) -> _Statement:
        # A time and no time can't be compared: between those two the later file counts.
        said = [statement for statement in (self._timed, self._untimed) if statement is not None]
        return max(said, key=lambda statement: statement.order)


def _settle_files(files: list[tuple[str, _LabelRows]]) -> LabelTable:
    """Settle what all files together say; they come in the order in which they correct."""
    problems: list[str] = []
    statements: dict[str, _Statements] = {}
    for order, (shown, rows) in enumerate(files):
        problems += [f"{shown}: {problem}" for problem in rows.problems]
        for sample_id, answers in rows.answers.items():
            said = _settle_within(answers, order, shown)
            statements.setdefault(sample_id, _Statements()).add(said)
    in_force = {sample_id: said.in_force() for sample_id, said in sorted(statements.items())}
    problems += _describe_conflicts(in_force)
    rows_out = [(i, s.labels[0], s.labelled_at) for i, s in in_force.items() if len(s.labels) == 1]
    return LabelTable(labels=_label_frame(rows_out), problems=tuple(problems))


def _read_label_rows(place: _Place, name: str, entry: _Entry) -> _LabelRows:
    if PurePosixPath(name).suffix.lower() not in (".csv", ".parquet"):
        raise _Refused("neither CSV nor Parquet")
    if entry.kind == "other":
        raise _Refused("not a regular file")
    table = _parse_table(name, _read_unchanged(place, entry))
    for column in _LABEL_COLUMNS[:2]:
        if column not in table.columns:
            raise _Refused(_no_column(column, table))
    problems = list(table.problems)
    if unknown := [column for column in table.columns if column not in _LABEL_COLUMNS]:
        problems.append(f"{_count(unknown, 'unknown column')} passed over: {_first_few(unknown)}")
    times, bad_times = _label_times([row.get("labelled_at") for _, row in table.rows])
    answers: dict[str, list[tuple[str, pd.Timestamp | None]]] = {}
    nameless, unlabelled = [], []
    for (number, row), time in zip(table.rows, times, strict=True):
        label = _label_text(row["label"])
        if _is_missing(row["sample_id"]):
            nameless.append(number)
        elif label is None:
            unlabelled.append(number)
        else:
            answers.setdefault(str(row["sample_id"]), []).append((label, time))
    word = "line" if name.lower().endswith(".csv") else "row"
    skipped = "sample_id and was skipped", "sample_id and were skipped"
    problems += _told_rows(nameless, word, f"has no {skipped[0]}", f"have no {skipped[1]}")
    problems += _told_rows(
        unlabelled, word, "has no label and was skipped", "have no label and were skipped"
    )
    unread = [table.rows[index][0] for index in bad_times]
    reading = "labelled_at that is no ISO 8601 time; it counts as missing"
    problems += _told_rows(unread, word, f"has a {reading}", f"have a {reading}")
    return _LabelRows(answers, problems)


def _read_unchanged(place: _Place, entry: _Entry) -> bytes:
    """Read a file that somebody may be replacing, until it was the same before and after."""
    before = entry
    for _ in range(_ATTEMPTS):
        content = _read_one(place, before)
        try:
            place.fs.invalidate_cache()
            info = place.fs.info(entry.path)
        except FileNotFoundError as error:
            raise _Refused("it disappeared while it was read") from error
        except Exception as error:
            raise FeedError(f"{entry.path} could not be looked at: {_told(error)}") from error
        after = _entry(entry.path, info)
        # a link's own time is listed, its target's is looked at: so links are read twice
        if (after.size, after.version) == (before.size, before.version):
            return content
        before = after
    raise _Refused(f"it changed each of the {_ATTEMPTS} times that it was read")


def _label_times(values: list[Any]) -> tuple[list[pd.Timestamp | None], list[int]]:
    """Read times as UTC (those without a zone count as UTC), and name the places of bad ones."""
    texts = [
        str(value) if isinstance(value, str | date) and not _is_missing(value) else None
        for value in values
    ]
    parsed = pd.to_datetime(
        pd.Series(texts, dtype="object"), format="ISO8601", utc=True, errors="coerce"
    )
    known = parsed.notna().tolist()
    times = [time if is_known else None for time, is_known in zip(parsed, known, strict=True)]
    bad = [i for i, time in enumerate(times) if time is None and not _is_missing(values[i])]
    return times, bad


def _settle_within(
    answers: list[tuple[str, pd.Timestamp | None]], order: int, file: str
) -> _Statement:
    """Reduce what one file says of a sample: its newest label, if that contradicts nothing."""
    if len(answers) == 1:  # nearly always
        return _Statement((answers[0][0],), answers[0][1], order, file)
    newest = max((time for _, time in answers if time is not None), default=None)
    labels = sorted({label for label, time in answers if time in (None, newest)})
    return _Statement(tuple(labels), newest, order, file)


def _describe_conflicts(in_force: dict[str, _Statement]) -> list[str]:
    conflicts: dict[str, list[str]] = {}
    for sample_id, said in in_force.items():
        if len(said.labels) > 1:
            labels = " or ".join(map(repr, said.labels))
            conflicts.setdefault(said.file, []).append(f"{sample_id} ({labels})")
    return [
        f"{file}: {_count(samples, 'sample')} with conflicting labels and no labelled_at that "
        f"decides, left out: {_first_few(samples)}"
        for file, samples in conflicts.items()
    ]


def _label_frame(rows: list[tuple[str, str, pd.Timestamp | None]]) -> pd.DataFrame:
    times = [time for _, _, time in rows]
    return pd.DataFrame(
        {
            "sample_id": pd.Series([sample_id for sample_id, _, _ in rows], dtype="str"),
            "label": pd.Series([label for _, label, _ in rows], dtype="str"),
            "labelled_at": pd.Series(times, dtype="datetime64[us, UTC]"),
        }
    )


# --- words


def _told(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0] or type(error).__name__


def _told_rows(numbers: list[int], noun: str, one: str, many: str) -> tuple[str, ...]:
    if not numbers:
        return ()
    if len(numbers) == 1:
        return (f"{noun} {numbers[0]} {one}",)
    return (f"{len(numbers)} {noun}s {many} (first: {noun} {numbers[0]})",)


def _no_column(column: str, table: _Table) -> str:
    return f"it has no column {column} (but: {_first_few(table.columns) or 'none'})"


def _count(things: Sequence[object] | dict[str, Any], noun: str) -> str:
    return f"{len(things)} {noun}" + ("" if len(things) == 1 else "s")


def _first_few(names: Sequence[str]) -> str:
    shown = 3
    return ", ".join([*map(_printable, names[:shown]), *(["..."] if len(names) > shown else [])])


def _printable(name: str) -> str:
    return name.encode(errors="backslashreplace").decode()
