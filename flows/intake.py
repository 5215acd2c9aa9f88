"""Sorts the good samples of a batch from the bad ones, and judges whether enough are good."""

import hashlib
import json
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import torch

from flows.feed import Batch, BatchEmpty, BatchNotReady, FeedSettings
from flows.storage import FeedError
from flows.words import count, first_few, printable
from monitoring.features import tidy
from sft.pictures import BadPicture, Preprocessing, decode
from sft.pixels import CHUNK, IN_MEMORY_BYTES, Pixels, PixelSink, map_pixels, take

About: TypeAlias = dict[str, dict[str, Any]]
"""Sample id to what came with it: its `size` (width, height, channels), its `metadata`."""

_OWN_COLUMNS = ("sample_id", "file_name", "label", "sha256")
_SAMPLES, _PIXELS, _REST = "samples.parquet", "pixels", "rest.json"
_CHANNELS = {"1": 1, "L": 1, "F": 1, "LA": 2, "RGBA": 4, "CMYK": 4}


class TooManyBad(FeedError):  # noqa: N818 -- reads as the verdict that it is
    """More samples of the batch are unreadable than `max_bad_share` allows."""


@dataclass(frozen=True)
class Quarantined:
    """A sample (or a whole Parquet shard) that was left out, and why."""

    sample_id: str
    reason: str


@dataclass(frozen=True, eq=False)  # tables have no single truth value to compare by
class BatchData:
    """What a batch holds: n usable samples, and what was left out.

    `samples` has n rows: sample_id, file_name (path in the batch), label (str, or NA where none
    came with the batch), sha256 of the encoded picture, then the user's own columns. Parallel to it
    are `pixels`, uint8 (n, C, H, W), and `sizes`: width, height and channels of each picture as it
    arrived.
    """

    batch: Batch
    samples: pd.DataFrame
    pixels: Pixels
    sizes: list[tuple[int, int, int]]
    quarantined: tuple[Quarantined, ...]
    notes: tuple[str, ...]

    @property
    def metadata(self) -> pd.DataFrame:
        """The user's own columns, n rows."""
        return tidy(self.samples.drop(columns=list(_OWN_COLUMNS)))

    def of(self, sample_ids: AbstractSet[str]) -> "BatchData":
        """Keep some of the samples; what was left out and noted stays."""
        rows = np.flatnonzero(self.samples["sample_id"].isin(list(sample_ids)))
        return replace(
            self,
            samples=self.samples.iloc[rows].reset_index(drop=True),
            pixels=take(self.pixels, torch.from_numpy(rows)),
            sizes=[self.sizes[i] for i in rows],
        )

    def save(self, folder: Path) -> None:
        """Write it, metadata as `tidy` gives it; pictures as they are, without compression."""
        folder.mkdir(parents=True)
        own = self.samples[list(_OWN_COLUMNS)]
        pd.concat([own, self.metadata], axis=1).to_parquet(folder / _SAMPLES, index=False)
        with (folder / _PIXELS).open("wb") as file:
            for part in self.pixels.split(CHUNK):
                file.write(part.numpy().tobytes())
        rest = {
            "shape": self.pixels.shape[1:],
            "sizes": self.sizes,
            "quarantined": [[one.sample_id, one.reason] for one in self.quarantined],
            "notes": self.notes,
        }
        (folder / _REST).write_text(json.dumps(rest))

    @classmethod
    def load(cls, folder: Path, batch: Batch) -> "BatchData":
        """Read what `save` wrote of a batch; pictures stay in the file until they are used."""
        rest = json.loads((folder / _REST).read_text())
        samples = pd.read_parquet(folder / _SAMPLES)
        return cls(
            batch=batch,
            samples=samples,
            pixels=map_pixels(folder / _PIXELS, len(samples), rest["shape"]),
            sizes=[(width, height, channels) for width, height, channels in rest["sizes"]],
            quarantined=tuple(Quarantined(*one) for one in rest["quarantined"]),
            notes=tuple(rest["notes"]),
        )

    @property
    def about(self) -> About:
        """What came with each sample; missing values are left out."""
        columns = {str(name): values.tolist() for name, values in self.metadata.items()}
        return {
            name: {
                "size": size,
                "metadata": {k: v[row] for k, v in columns.items() if not pd.isna(v[row])},
            }
            for row, (name, size) in enumerate(
                zip(self.samples["sample_id"], self.sizes, strict=True)
            )
        }


@dataclass(frozen=True)
class Sample:
    """What the files of a batch say of one picture; `name` is its path in the batch."""

    name: str
    label: str | None
    columns: dict[str, Any]


@dataclass(frozen=True)
class _Kept:
    """A sample whose picture was decoded as the `place`-th."""

    sample: Sample
    size: tuple[int, int, int]
    place: int


def _channels(mode: str) -> int:
    """Count the channels of a Pillow mode; a palette holds colours."""
    return 1 if mode.startswith("I") else _CHANNELS.get(mode, 3)


class Intake:
    """Takes what a batch holds, sample by sample; names are paths in the batch.

    `notes` and `shard_bytes` are filled by whoever reads the files: what people should know, and
    the size of all Parquet shards together.
    """

    def __init__(
        self,
        batch: Batch,
        settings: FeedSettings,
        preprocessing: Preprocessing,
        only: AbstractSet[str] | None,
        in_memory_bytes: int = IN_MEMORY_BYTES,
    ) -> None:
        self.batch = batch
        self.notes: list[str] = []
        self.shard_bytes = 0
        self._settings = settings
        self._preprocessing = preprocessing
        self._only = only
        self._in_memory_bytes = in_memory_bytes
        size = preprocessing.image_size
        self._pixels = PixelSink((preprocessing.channels, size, size), in_memory_bytes)
        self._kept: dict[str, _Kept] = {}
        self._digests: dict[str, str] = {}
        self._bad: dict[tuple[str, str], None] = {}
        self._lost_shards: dict[str, int] = {}
        self._repeated: dict[str, None] = {}
        self._clashing: dict[str, None] = {}
        self._disputed: dict[str, None] = {}

    def wants(self, name: str) -> bool:
        """Tell whether a sample was asked for."""
        return self._only is None or f"{self.batch.id}/{name}" in self._only

    def reject(self, name: str, reason: str) -> None:
        """Put a sample aside."""
        if self.wants(name):
            self._bad[name, reason] = None

    def lose_shard(self, name: str, size: int, reason: str) -> None:
        """Put a whole shard aside; which samples were in it is not known, so `only` can't tell."""
        self._bad[name, reason] = None
        self._lost_shards[name] = size

    def take(self, sample: Sample, encoded: bytes) -> None:
        """Decode and keep a sample, or put it aside."""
        if problem := self.too_large(len(encoded)):
            self.reject(sample.name, problem)
            return
        digest = hashlib.sha256(encoded).hexdigest()
        if self._digests.setdefault(sample.name, digest) != digest:
            self._clashing[sample.name] = None
            return
        if sample.name in self._kept:
            kept = self._kept[sample.name]
            self.repeat(sample.name)
            agreed = self.agree(kept.sample, sample.label)
            self._kept[sample.name] = replace(kept, sample=agreed)
            return
        try:
            picture = decode(encoded, self._preprocessing, max_pixels=self._settings.max_pixels)
        except BadPicture as bad:
            self.reject(sample.name, bad.reason)
        else:
            size = (picture.width, picture.height, _channels(picture.mode))
            self._kept[sample.name] = _Kept(sample, size, len(self._pixels))
            self._pixels.add(picture.pixels)

    def beside(self, in_memory_bytes: int | None = None) -> "Intake":
        """Give one that takes another part of the same batch."""
        bound = self._in_memory_bytes if in_memory_bytes is None else in_memory_bytes
        return Intake(self.batch, self._settings, self._preprocessing, self._only, bound)

    def settle(self) -> tuple[list[str], list[tuple[int, int, int]], Pixels]:
        """Hand the pictures over, with the names and the sizes of the kept ones among them.

        Nothing can be taken after it, and what is left is small enough to be sent elsewhere.
        """
        kept, pixels = self._kept, self._pixels.finish()
        self._pixels = PixelSink(pixels.shape[1:])
        return list(kept), [one.size for one in kept.values()], pixels

    def add(self, other: "Intake") -> None:
        """Take what another one took of a later part, as if it had come here; but not its pictures.

        What both have is told as it is within one.
        """
        digests, kept = other._digests, other._kept  # noqa: SLF001 - of the same class
        for name, digest in digests.items():
            if self._digests.setdefault(name, digest) != digest:
                self._clashing[name] = None
            elif name in kept and name in self._kept:
                self.repeat(name)
                agreed = self.agree(self._kept[name].sample, kept[name].sample.label)
                self._kept[name] = replace(self._kept[name], sample=agreed)
            elif name in kept:
                self._kept[name] = kept[name]
        self.notes += other.notes
        self.shard_bytes += other.shard_bytes
        for known in ("_bad", "_lost_shards", "_repeated", "_clashing", "_disputed"):
            getattr(self, known).update(getattr(other, known))

    def too_large(self, size: int) -> str | None:
        """Say why an encoded picture of so many bytes is not taken."""
        limit = self._settings.max_bytes
        return f"too large: {size} bytes > max_bytes={limit}" if size > limit else None

    def agree(self, sample: Sample, label: str | None) -> Sample:
        """Hear another label for a sample; if it is a different one, none of the two counts."""
        if sample.label is None:
            return replace(sample, label=label)
        if label not in (None, sample.label):
            self._disputed[sample.name] = None
        return sample

    def is_disputed(self, name: str) -> bool:
        """Tell whether a sample came with different labels."""
        return name in self._disputed

    def repeat(self, name: str) -> None:
        """Remember that a sample came once more with the same picture."""
        self._repeated[name] = None

    def finish(self) -> BatchData:
        """Return what was taken; after `settle` or `add`, without pictures.

        Raises:
            BatchNotReady: it holds nothing, or fewer than `min_samples` usable pictures.
            TooManyBad: more than `max_bad_share` of it is unreadable.
        """
        bad = [(name, reason) for name, reason in self._bad if name not in self._clashing]
        for name in self._clashing:
            self._kept.pop(name, None)
            bad.append((name, "duplicate id: other pictures have it too"))
        self._note_duplicates()
        if self._only is None:
            self._judge(bad)
        kept = list(self._kept.values())
        samples = self._frame([one.sample for one in kept])
        pixels, places = self._pixels.finish(), [one.place for one in kept]
        if len(pixels) and places != list(range(len(pixels))):
            pixels = take(pixels, torch.tensor(places, dtype=torch.int64))
        return BatchData(
            batch=self.batch,
            samples=samples,
            pixels=pixels,
            sizes=[one.size for one in kept],
            quarantined=tuple(
                Quarantined(printable(f"{self.batch.id}/{name}"), reason) for name, reason in bad
            ),
            notes=tuple(self.notes),
        )

    def _note_duplicates(self) -> None:
        if repeated := list(self._repeated):
            self.notes.append(
                f"{count(repeated, 'sample')} came more than once with the same picture; "
                f"one of each was kept: {first_few(repeated)}"
            )
        if disputed := [name for name in self._disputed if name in self._kept]:
            self.notes.append(
                f"{count(disputed, 'sample')} came with two different labels, of which none "
                f"counts: {first_few(disputed)}"
            )

    def _judge(self, bad: list[tuple[str, str]]) -> None:
        batch, limit = f"batch {self.batch.id}", self._settings.max_bad_share
        refusal = f"more than max_bad_share={limit:g}, so the batch was not checked"
        said = "; ".join(["", *self.notes])
        total = len(self._kept) + len(bad)
        if total == 0:
            raise BatchEmpty(f"{batch} is empty: it holds no pictures{said}")
        if (lost := sum(self._lost_shards.values())) > limit * self.shard_bytes:
            name, reason = next(entry for entry in bad if entry[0] in self._lost_shards)
            raise TooManyBad(
                f"{batch}: {count(self._lost_shards, 'Parquet shard')} with {lost} of "
                f"{self.shard_bytes} bytes could not be read "
                f"(first: {printable(name)}: {reason}); {refusal}"
            )
        if len(bad) > limit * total:
            name, reason = bad[0]
            raise TooManyBad(
                f"{batch}: {len(bad)} of {total} pictures could not be read "
                f"(first: {printable(name)}: {reason}); {refusal}"
            )
        if len(self._kept) < self._settings.min_samples:
            raise BatchNotReady(
                f"{batch} has {count(self._kept, 'usable picture')}, fewer than "
                f"min_samples={self._settings.min_samples}, so it was not checked{said}"
            )

    def _frame(self, samples: list[Sample]) -> pd.DataFrame:
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
        expected = "file_name", self._settings.label_column
        if taken := [c for c in columns if c in _OWN_COLUMNS and c not in expected]:
            self.notes.append(
                f"{count(taken, 'column')} passed over, because sustain gives columns of that "
                f"name itself: {', '.join(taken)}"
            )
        for column in columns:
            if column not in (*_OWN_COLUMNS, *expected):
                frame[column] = pd.Series([sample.columns.get(column) for sample in samples])
        return frame
