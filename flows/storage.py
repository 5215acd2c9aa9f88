"""A folder or a bucket as a place: it is listed, and single files of it are read, never written."""

import io
import os
import posixpath
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, Literal

import fsspec
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from flows.times import in_utc
from flows.words import first_line, printable, shown_uri

LEAVES = "path leaves the batch"
_UNFINISHED = (".tmp", ".partial", ".part")
# A bucket is read in requests that run together: so much is held beside what is returned anyway.
_CHUNK_FILES = 128
_CHUNK_BYTES = 32 * 2**20
_ATTEMPTS = 3
_RANGE_BUFFER = 2**16


class FeedError(RuntimeError):
    """The feed, or a batch of it, could not be read; the message says what to do."""


class Refused(Exception):  # noqa: N818 -- carries the reason to where it is reported
    """A file that is not used; the text is the reason."""


@dataclass(frozen=True)
class Place:
    """A folder: its file system, its path as that file system writes it, and as settings do."""

    fs: Any
    path: str
    url: str

    @property
    def shown(self) -> str:
        """Its address, for messages."""
        return shown_uri(self.url)

    @property
    def local(self) -> bool:
        """Whether it lies on this computer, where links are and user rights count."""
        return isinstance(self.fs, LocalFileSystem)

    def child(self, name: str) -> "Place":
        """Return the folder of that name in it."""
        return Place(self.fs, f"{self.path.rstrip('/')}/{name}", f"{self.url}/{name}")


@dataclass(frozen=True, slots=True)
class Entry:
    """What a listing says of a file: `size` in bytes, `modified` in UTC.

    `version` is a text that changes when the file does (its time and etag).
    """

    path: str
    size: int
    kind: Literal["file", "folder", "link", "other"]
    modified: datetime | None
    version: str


# --- listing


def open_place(url: str, storage_options: Mapping[str, Any], root: Path) -> Place:
    """Open a local path (a relative one starts at `root`) or any fsspec URL; nothing is read yet.

    Raises:
        FeedError: no file system is known for the URL, or it refuses the options.
    """
    if os.path.isabs(url) or ("://" not in url and "::" not in url):  # noqa: PTH117
        path = os.path.abspath(root / Path(url).expanduser())  # noqa: PTH100 -- resolve() follows links
        return Place(fsspec.filesystem("file"), path, path)
    try:
        fs, path = url_to_fs(url, **storage_options)
    except Exception as error:
        raise FeedError(f"{shown_uri(url)} cannot be opened: {first_line(error)}") from error
    return Place(fs, path, url.rstrip("/"))


def follow(place: Place) -> Place:
    """Return the place behind a local link: whoever names a link means what it leads to."""
    if not place.local:
        return place
    path = os.path.realpath(place.path)
    return Place(place.fs, path, path)


def missing_folder(place: Place) -> str | None:
    """Say why there is no folder to list, if so: "... does not exist", "... is a file, ...".

    Raises:
        FeedError: the storage fails, or this user has no right to list it.
    """
    try:
        place.fs.invalidate_cache()  # object stores remember their listings
        found = bool(place.fs.isdir(place.path))
        is_file = not found and bool(place.fs.exists(place.path))
    except FileNotFoundError:
        found = is_file = False
    except Exception as error:
        raise FeedError(f"{place.shown} cannot be listed: {first_line(error)}") from error
    if found and place.local and not os.access(place.path, os.R_OK | os.X_OK):
        raise FeedError(f"{place.shown} cannot be listed: this user has no right to read it")
    if found:
        return None
    return f"{place.shown} " + ("is a file, not a folder" if is_file else "does not exist")


def walk(place: Place) -> dict[str, Entry]:
    """List everything below a folder by its path in it; links are listed, never followed.

    Raises:
        FeedError: the storage fails; a folder that is not there is only empty.
    """
    try:
        place.fs.invalidate_cache()
        found = place.fs.find(place.path, detail=True, withdirs=True)
    except FileNotFoundError:
        return {}
    except Exception as error:
        raise FeedError(f"{place.shown} cannot be listed: {first_line(error)}") from error
    top = place.path.strip("/")
    entries = {}
    for key, info in found.items():
        path = key.strip("/")
        name = path[len(top) :].lstrip("/")
        if name and (not top or path.startswith(top + "/")):
            entries[name] = _entry(key, info)
    return entries


def look_up(place: Place) -> Entry:
    """Ask the storage what it says of one path; raises whatever the storage raises."""
    return _entry(place.path, place.fs.info(place.path))


def _entry(path: str, info: dict[str, Any]) -> Entry:
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
    return Entry(path, int(info.get("size") or 0), kind, _as_utc(time), f"{time}|{etag}")


def _as_utc(time: object) -> datetime | None:
    try:
        if isinstance(time, int | float):
            return datetime.fromtimestamp(time, UTC)
        if isinstance(time, str):
            time = datetime.fromisoformat(time)
        return in_utc(time) if isinstance(time, datetime) else None
    except (ValueError, OverflowError, OSError):
        return None


def visible(entries: dict[str, Entry]) -> dict[str, Entry]:
    """Leave out folders, hidden files and what operating systems and writers leave behind."""
    return {
        name: entry
        for name, entry in sorted(entries.items())
        if entry.kind != "folder"
        and posixpath.basename(name) not in ("_SUCCESS", "Thumbs.db")
        and not any(part.startswith(".") and part != ".." for part in name.split("/"))
    }


def is_unfinished(name: str) -> bool:
    """Tell whether a name, or a folder in it, says that somebody is still writing there."""
    return any(part.endswith(_UNFINISHED) for part in name.split("/"))


def is_linked_folder(entry: Entry) -> bool:
    """Tell whether it is a link to a folder, wherever that lies."""
    return entry.kind == "link" and os.path.isdir(entry.path)  # noqa: PTH112


# --- reading


def unusable(place: Place, name: str, entry: Entry) -> str | None:
    """Say why a file of a batch is not worth opening, by what the listing says of it."""
    problem = None
    if ".." in name.split("/"):
        problem = LEAVES
    elif printable(name) != name:
        problem = "its file name is not UTF-8"
    elif entry.kind == "other":
        problem = "not a regular file"
    elif entry.kind == "link":
        problem = _link_problem(place.path, entry.path)
    return problem or ("empty file" if entry.size == 0 else None)


def read_file(place: Place, entry: Entry, max_bytes: int) -> bytes:
    """Read a whole file.

    Raises:
        Refused: it is gone, no regular file, a link out of the place, or larger than `max_bytes`.
        FeedError: the storage failed.
    """
    if entry.size > max_bytes:
        raise Refused(f"too large: {entry.size} bytes > max_table_bytes={max_bytes}")
    with _told_failures(place, entry.path):
        if not place.local:
            content = _read_object(place, entry, max_bytes)
        else:
            with _open_local(place.path, entry.path) as file:
                content = _read_at_most(file, max_bytes)
    if len(content) > max_bytes:  # it is behind a link, or has grown
        raise Refused(f"too large: more than max_table_bytes={max_bytes} bytes")
    return content


def _read_object(place: Place, entry: Entry, max_bytes: int) -> bytes:
    """Read an object, or one byte more than it may have: it may be another than was listed."""
    if entry.size:
        return bytes(place.fs.cat_file(entry.path, start=0, end=max_bytes + 1))
    with place.fs.open(entry.path, "rb") as file:  # empty, or untold
        return bytes(file.read(max_bytes + 1))


def _read_at_most(file: IO[bytes], max_bytes: int) -> bytes:
    """Read a file, or one byte more than it may have; what is asked for is set aside at once."""
    return file.read(min(os.fstat(file.fileno()).st_size, max_bytes) + 1)


def open_file(place: Place, entry: Entry) -> IO[bytes]:
    """Open a file to seek in; the caller closes it. Raises as `read_file`."""
    with _told_failures(place, entry.path):
        if place.local:
            return _open_local(place.path, entry.path)
        # copied first, so that a storage that fails is not taken for a broken file
        copy = tempfile.SpooledTemporaryFile(max_size=_CHUNK_BYTES)  # noqa: SIM115 -- the caller closes
        with place.fs.open(entry.path, "rb") as file:
            shutil.copyfileobj(file, copy)
    copy.seek(0)
    return copy


def open_ranges(place: Place, entry: Entry) -> IO[bytes]:
    """Open a file of which only parts are wanted: of a bucket's object, only those are fetched.

    Raises as `read_file`, and so do the reads of a bucket's object.
    """
    if place.local:
        return open_file(place, entry)
    return io.BufferedReader(_Ranges(place, entry), _RANGE_BUFFER)


class _Ranges(io.RawIOBase):
    """An object of a bucket, each read of which is a request."""

    def __init__(self, place: Place, entry: Entry) -> None:
        super().__init__()
        self._place = place
        self._entry = entry
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._entry.size}[whence]
        self._at = max(start + offset, 0)
        return self._at

    def readinto(self, buffer: Any) -> int:
        path, start = self._entry.path, self._at
        end = min(start + len(buffer), self._entry.size)
        if start >= end:
            return 0
        with _told_failures(self._place, path):
            content = self._place.fs.cat_file(path, start=start, end=end)
            if len(content) != end - start:
                raise OSError(f"{len(content)} bytes came, and not {end - start}")
        buffer[: len(content)] = content
        self._at = end
        return len(content)


def read_files(
    place: Place, wanted: Sequence[tuple[str, Entry]], max_bytes: int
) -> Iterator[tuple[str, bytes | Refused]]:
    """Yield (name, content, or why there is none), a bounded part of a bucket at a time.

    A local file is cut off after `max_bytes + 1` bytes. Raises FeedError where a bucket failed.
    """
    if place.local:
        for name, entry in wanted:
            try:
                with _open_local(place.path, entry.path) as file:
                    yield name, _read_at_most(file, max_bytes)
            except (Refused, OSError) as error:
                yield name, error if isinstance(error, Refused) else Refused(first_line(error))
        return
    for chunk in _chunks(wanted):
        # not cat(), which takes the [1] of "a[1].jpg" for a pattern
        contents = place.fs.cat_ranges(
            [entry.path for _, entry in chunk], 0, [e.size for _, e in chunk], on_error="return"
        )
        for (name, entry), content in zip(chunk, contents, strict=True):
            try:
                with _told_failures(place, entry.path):
                    if isinstance(content, Exception):
                        raise content
                yield name, bytes(content)
            except Refused as refused:
                yield name, refused


def read_unchanged(place: Place, entry: Entry, max_bytes: int) -> bytes:
    """Read a file that somebody may be replacing, until it was the same before and after.

    Raises:
        Refused: as `read_file`, or it changed each time.
        FeedError: the storage failed.
    """
    before = entry
    for _ in range(_ATTEMPTS):
        content = read_file(place, before, max_bytes)
        with _told_failures(place, entry.path):
            place.fs.invalidate_cache()
            after = _entry(entry.path, place.fs.info(entry.path))
        # a link's own time is listed, its target's is looked at: so links are read twice
        if (after.size, after.version) == (before.size, before.version):
            return content
        before = after
    raise Refused(f"it changed each of the {_ATTEMPTS} times that it was read")


@contextmanager
def _told_failures(place: Place, path: str) -> Iterator[None]:
    try:
        yield
    except (Refused, MemoryError):
        raise
    except FileNotFoundError as error:
        raise Refused("it disappeared while it was read") from error
    except Exception as error:
        raise FeedError(f"{place.shown}: {path} could not be read: {first_line(error)}") from error


def _link_problem(folder: str, path: str) -> str | None:
    """Say why a link may not be used: nothing is read from outside of the folder."""
    real, inside = os.path.realpath(path), os.path.realpath(folder)
    if os.path.commonpath([real, inside]) != inside:
        return f"{LEAVES}: a link to a place outside of it"
    if os.path.isdir(real):  # noqa: PTH112
        return "a link to a folder, which is not followed"
    return None if os.path.exists(real) else "a link to a missing file"  # noqa: PTH110


def _open_local(folder: str, path: str) -> IO[bytes]:
    # Looked at again when it is opened: since the listing, a link may have taken the file's place.
    if problem := _link_problem(folder, path):
        raise Refused(problem)
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        descriptor = os.open(os.path.realpath(path), flags)
    except OSError as error:
        raise Refused(f"could not be read: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise Refused("not a regular file")
    return os.fdopen(descriptor, "rb")


def _chunks(wanted: Sequence[tuple[str, Entry]]) -> Iterator[list[tuple[str, Entry]]]:
    chunk: list[tuple[str, Entry]] = []
    total = 0
    for name, entry in wanted:
        if chunk and (len(chunk) == _CHUNK_FILES or total + entry.size > _CHUNK_BYTES):
            yield chunk
            chunk, total = [], 0
        chunk.append((name, entry))
        total += entry.size
    if chunk:
        yield chunk
