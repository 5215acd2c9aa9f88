"""What is in a batch: pictures in class folders or beside Hugging Face metadata, Parquet shards."""

import posixpath
import re
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from flows.feed import Batch, BatchNotReady, FeedSettings, check_ready, describe
from flows.intake import BatchData, Intake, Sample
from flows.parquet import Parquet, Room, open_parquet, read_rows
from flows.storage import (
    LEAVES,
    Entry,
    FeedError,
    Place,
    Refused,
    is_linked_folder,
    open_file,
    open_place,
    open_ranges,
    read_file,
    read_files,
    unusable,
    visible,
    walk,
)
from flows.tables import Table, is_missing, label_text, no_column, parse_table
from flows.words import count, first_few, first_line, tell_rows
from sft.pictures import Preprocessing
from sft.pixels import IN_MEMORY_BYTES

PICTURE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
)
_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
# So much of a shard is unpacked at once, and a row group that has to be larger is not unpacked.
_SHARD_ROWS = 64
_SHARD_BYTES = 256 * 2**20
# where a shard's pictures lie: bytes, or the struct of bytes and path of Hugging Face
_PICTURE = ("image", "image.bytes")


def read_batch(
    batch: Batch,
    settings: FeedSettings,
    root: Path,
    preprocessing: Preprocessing,
    only: AbstractSet[str] | None = None,
    in_memory_bytes: int = IN_MEMORY_BYTES,
) -> BatchData:
    """Read and decode a batch; a bad sample is quarantined, and the rest goes on.

    A batch may mix pictures (a first sub-folder is their class, unless there is a metadata file)
    and Parquet shards; where it is split into train, val and test, so may each of these. Its folder
    is compared before and after: with what was listed, and with itself.

    Args:
        batch: from `list_batches`.
        settings: the same that it was listed with.
        root: the folder that relative paths in the settings start at.
        preprocessing: what the network wants to see.
        only: sample ids to read; others are neither read nor judged, and neither `max_bad_share`
            nor `min_samples` applies.
        in_memory_bytes: decoded pictures beyond it lie in a file.

    Raises:
        BatchNotReady: empty, half-written, gone, or changed since it was listed or while it was
            read.
        TooManyBad: more than `max_bad_share` of it is unreadable.
        FeedError: the storage failed.
    """
    with open_batch(batch, settings, root, preprocessing, only, in_memory_bytes) as opened:
        opened.contents.read(opened.place, settings, opened.intake)
    return opened.intake.finish()


@dataclass(frozen=True)
class Opened:
    """A batch that is being read: where it lies, what it holds, and what takes it in."""

    place: Place
    contents: "Contents"
    intake: Intake


@contextmanager
def open_batch(
    batch: Batch,
    settings: FeedSettings,
    root: Path,
    preprocessing: Preprocessing,
    only: AbstractSet[str] | None = None,
    in_memory_bytes: int = IN_MEMORY_BYTES,
) -> Iterator[Opened]:
    """List a batch and read its metadata; at the end, see that it is still what it was.

    Arguments and errors are those of `read_batch`.
    """
    place = open_place(batch.url, settings.storage_options, root)
    entries = walk(place)
    current = check_ready(batch, settings, root, place, entries)
    intake = Intake(current, settings, preprocessing, only, in_memory_bytes)
    yield Opened(place, _survey(place, _named(current, entries), settings, intake), intake)
    if describe(place, batch.id, walk(place)).stamp != current.stamp:
        raise BatchNotReady(
            f"batch {batch.id}: its folder changed while it was read; it is tried again next time "
            "(write a batch elsewhere and rename it into the feed, or close it with _SUCCESS)"
        )


def read_own_labels(batch: Batch, settings: FeedSettings, root: Path) -> dict[str, str]:
    """Return sample id to label for the labels that came with a batch, without its pictures.

    The labels are those that `read_batch` gives, and also those of pictures that it would
    quarantine. Files that cannot be read are left to `read_batch` to report.

    Raises:
        FeedError: the storage failed.
    """
    if batch.files is not None and not any("/" in n or n in _METADATA for n in batch.files):
        return {}  # neither class folders nor metadata nor shards: the listing says it
    place = open_place(batch.url, settings.storage_options, root)
    files = _named(batch, walk(place))
    intake = Intake(batch, settings, Preprocessing(image_size=1), only=None)  # decodes nothing
    contents = _sort_files(batch, files, _read_metadata(place, files, settings, intake))
    samples = {name: sample for name, (sample, _) in contents.pictures.items()}
    for shard, entry in contents.shards.items():
        for name, label in _read_shard_labels(place, shard, entry, settings, batch):
            samples[name] = intake.agree(samples.get(name) or Sample(name, None, {}), label)
    return {
        f"{batch.id}/{name}": sample.label
        for name, sample in samples.items()
        if sample.label is not None and not intake.is_disputed(name)
    }


def _named(batch: Batch, entries: dict[str, Entry]) -> dict[str, Entry]:
    return {batch.name_of(path): entry for path, entry in visible(entries).items()}


# --- pictures


@dataclass(frozen=True)
class Contents:
    """The files of a batch, or of a part of it, by what they are."""

    pictures: dict[str, tuple[Sample, Entry]]
    shards: dict[str, Entry]
    others: list[str]

    def parts(self, size: int) -> "list[Contents]":
        """Split what is large, in its order: so many picture files, or one Parquet shard, in each.

        What has no more pictures, and no more in its Parquet shards than is unpacked at once, stays
        whole.
        """
        if len(self.pictures) <= size and sum(e.size for e in self.shards.values()) <= _SHARD_BYTES:
            return [self]
        names = list(self.pictures)
        several = [names[start : start + size] for start in range(0, len(names), size)]
        return [
            *(Contents({name: self.pictures[name] for name in some}, {}, []) for some in several),
            *(Contents({}, {name: entry}, []) for name, entry in self.shards.items()),
        ]

    def read(self, place: Place, settings: FeedSettings, intake: Intake) -> None:
        """Let the intake take all samples."""
        wanted = [(name, entry) for name, (_, entry) in self.pictures.items()]
        for name, content in read_files(place, wanted, settings.max_bytes):
            if isinstance(content, Refused):
                intake.reject(name, str(content))
            else:
                intake.take(self.pictures[name][0], content)
        for name, entry in self.shards.items():
            _read_shard(place, name, entry, settings, intake)


def _survey(
    place: Place, files: dict[str, Entry], settings: FeedSettings, intake: Intake
) -> Contents:
    """Tell what of a batch is worth reading; put aside what is not, by what the listing says."""
    metadata = _read_metadata(place, files, settings, intake)
    contents = _sort_files(intake.batch, files, metadata)
    for split, table in metadata.items():
        here = [name for name in contents.pictures if name.startswith(split)]
        unnamed = [name for name in here if name not in table.samples]
        if table.samples and unnamed:
            intake.notes.append(
                f"{count(unnamed, 'picture')} not named in {table.file}, so without its columns: "
                f"{first_few(unnamed)}"
            )
    wanted = {}
    for name, (sample, entry) in contents.pictures.items():
        if intake.wants(name):
            if problem := unusable(place, name, entry) or intake.too_large(entry.size):
                intake.reject(name, problem)
            else:
                wanted[name] = sample, entry
    if others := contents.others:
        verb = "is no picture was" if len(others) == 1 else "are no pictures were"
        intake.notes.append(f"{count(others, 'file')} that {verb} passed over: {first_few(others)}")
    return replace(contents, pictures=wanted)


def _sort_files(
    batch: Batch, files: dict[str, Entry], metadata: "dict[str, _Metadata]"
) -> Contents:
    contents = Contents({}, {}, [])
    named = {name: sample for table in metadata.values() for name, sample in table.samples.items()}
    tables = {table.file for table in metadata.values()}
    for name, entry in files.items():
        split = batch.split_of(name)
        suffix = PurePosixPath(name).suffix.lower()
        if name in named:
            contents.pictures[name] = (named[name], entry)
        elif name in _METADATA or name in tables:
            continue
        elif suffix == ".parquet":
            contents.shards[name] = entry
        elif suffix in PICTURE_SUFFIXES or is_linked_folder(entry):
            folder, _, inner = name.removeprefix(split).partition("/")
            label = folder if inner and not metadata.keys() & {"", split} else None
            contents.pictures[name] = (Sample(name, label, {}), entry)
        else:
            contents.others.append(name)
    return contents


# --- Hugging Face metadata


@dataclass(frozen=True)
class _Metadata:
    file: str
    samples: dict[str, Sample]


def _read_metadata(
    place: Place, files: dict[str, Entry], settings: FeedSettings, intake: Intake
) -> dict[str, _Metadata]:
    """Read the metadata of a batch (under "") and of each of its splits, where there are any."""
    found = {
        split: _read_table(place, split, files, settings, intake)
        for split in ("", *intake.batch.splits.values())
    }
    return {split: metadata for split, metadata in found.items() if metadata is not None}


def _read_table(
    place: Place, split: str, files: dict[str, Entry], settings: FeedSettings, intake: Intake
) -> _Metadata | None:
    present = [split + name for name in _METADATA if split + name in files]
    if not present:
        return None
    file, *unused = present
    if unused:
        intake.notes.append(f"{file} was used and {', '.join(unused)} passed over")
    try:
        content = read_file(place, files[file], settings.max_table_bytes)
        table = parse_table(file, content, settings.max_table_bytes)
        intake.notes += [f"{file}: {problem}" for problem in table.problems]
        if "file_name" not in table.columns:
            raise Refused(no_column("file_name", table.columns))  # noqa: TRY301
    except Refused as refused:
        intake.notes.append(f"{file}: {refused}; no labels or columns were taken from it")
        return _Metadata(file, {})
    return _Metadata(file, _match_metadata(file, table, files, settings, intake))


def _match_metadata(
    file: str, table: Table, files: dict[str, Entry], settings: FeedSettings, intake: Intake
) -> dict[str, Sample]:
    column = settings.label_column
    samples: dict[str, Sample] = {}
    nameless, odd_labels = [], []
    for number, row in table.rows:
        if is_missing(row.get("file_name")):
            nameless.append(number)
            continue
        name = _find_named(str(row["file_name"]), file, files, intake)
        if name is None:
            continue
        label = label_text(row.get(column))
        if label is None and not is_missing(row.get(column)):
            odd_labels.append(number)
        if name in samples:
            intake.repeat(name)
            samples[name] = intake.agree(samples[name], label)
        else:
            samples[name] = Sample(name, label, row)
    problems = [
        *tell_rows(nameless, "row", "has", "no file_name"),
        *tell_rows(odd_labels, "row", "has", f"a {column} that is no single value"),
    ]
    intake.notes += [f"{file}: {problem}" for problem in problems]
    return samples


def _find_named(given: str, file: str, files: dict[str, Entry], intake: Intake) -> str | None:
    """Find the file that a row of metadata means; the name is only looked up, never opened."""
    if _leaves(given):
        intake.reject(given, LEAVES)
        return None
    paths = posixpath.normpath(given), posixpath.normpath(given.replace("\\", "/"))
    split = intake.batch.split_of(file)
    names = [split + path if split else intake.batch.name_of(path) for path in paths]
    for name in names:
        if name in files:
            return name
    intake.reject(names[0], f"named in {file}, but not in the batch")
    return None


def _leaves(name: str) -> bool:
    """Tell whether a file name that somebody wrote down points out of the batch."""
    posix = name.replace("\\", "/")
    normal = posixpath.normpath(posix)
    absolute = posix.startswith("/") or re.match(r"[A-Za-z]:/|[A-Za-z0-9+.-]+://", posix)
    return bool(absolute) or normal == ".." or normal.startswith("../")


# --- Parquet shards


def _read_shard(
    place: Place, name: str, entry: Entry, settings: FeedSettings, intake: Intake
) -> None:
    intake.shard_bytes += entry.size
    try:
        with _open_shard(place, name, entry) as parquet:
            columns = parquet.columns
            if "image" in columns:
                _read_rows(parquet, name, settings, intake)
            else:
                problem = no_column("image", columns)
                intake.notes.append(f"{name}: {problem}; it was passed over")
    except Refused as refused:
        intake.lose_shard(name, entry.size, str(refused))


def _read_shard_labels(
    place: Place, shard: str, entry: Entry, settings: FeedSettings, batch: Batch
) -> list[tuple[str, str | None]]:
    column = settings.label_column
    try:
        with _open_shard(place, shard, entry, whole=False) as parquet:
            if not {"image", column} <= set(parquet.columns):
                return []
            room = Room(settings.max_table_bytes)
            return [
                (name, label_text(row[column]))
                for number, names in _row_names(parquet, shard, batch, room)
                for name, row in zip(names, read_rows(parquet, number, room, [column]), strict=True)
            ]
    except Refused:
        return []


@contextmanager
def _open_shard(place: Place, name: str, entry: Entry, *, whole: bool = True) -> Iterator[Parquet]:
    """Open a shard; nearly everything that a broken one can raise is refused.

    With `whole` a bucket's object is copied first; without it, only what is read is fetched.
    """
    if problem := unusable(place, name, entry):
        raise Refused(problem)
    with (open_file if whole else open_ranges)(place, entry) as file:
        try:
            yield open_parquet(file, _PICTURE)
        except (FeedError, Refused, MemoryError):
            raise
        except Exception as error:
            raise Refused(f"unreadable: {first_line(error)}") from error


def _read_rows(parquet: Parquet, shard: str, settings: FeedSettings, intake: Intake) -> None:
    for number in range(parquet.groups):
        size = parquet.size(number)
        limit = max(_SHARD_BYTES, min(_SHARD_ROWS, parquet.rows(number)) * settings.max_bytes)
        if size > limit:
            raise Refused(
                f"too large: its row group {number + 1} unpacks to {size} bytes > {limit}; "
                "write smaller row groups, or raise max_bytes"
            )
    room = Room(settings.max_table_bytes)
    for number, names in _row_names(parquet, shard, intake.batch, room):
        if not any(intake.wants(name) for name in names):
            continue
        # A value that many rows share is stored once (and counted once), but unpacked for each row.
        share = _SHARD_BYTES // max(parquet.size(number), 1)
        at_once = min(max(share, 1), _SHARD_ROWS)
        rows = read_rows(parquet, number, room, at_once=at_once)
        for name, row in zip(names, rows, strict=True):
            _take_row(name, row, settings, intake)


def _row_names(
    parquet: Parquet, shard: str, batch: Batch, room: Room
) -> Iterator[tuple[int, list[str]]]:
    """Yield each row group's number and the names of its samples, as long as there is room."""
    stem, split = shard[: -len(".parquet")], batch.split_of(shard)
    first = 0
    for group in range(parquet.groups):
        rows = parquet.rows(group)
        room.take(rows, 0, 0)
        given: list[Any] = [None] * rows
        if "file_name" in parquet.columns:
            given = [row["file_name"] for row in read_rows(parquet, group, room, ["file_name"])]
        yield (
            group,
            [_row_name(name, split, f"{stem}-{i}") for i, name in enumerate(given, start=first)],
        )
        first += len(given)


def _row_name(given: Any, split: str, otherwise: str) -> str:
    if is_missing(given):
        return otherwise
    return str(given) if _leaves(str(given)) else split + posixpath.normpath(str(given))


def _take_row(name: str, row: dict[str, Any], settings: FeedSettings, intake: Intake) -> None:
    if not intake.wants(name):
        return
    image = row.pop("image")
    if isinstance(image, dict):
        image = image.get("bytes")
    if _leaves(name):
        intake.reject(name, LEAVES)
    elif not image:
        intake.reject(name, "empty: its row has no image bytes")
    elif not isinstance(image, bytes):
        intake.reject(name, f"its image is {type(image).__name__}, not bytes")
    else:
        intake.take(Sample(name, label_text(row.get(settings.label_column)), row), image)
