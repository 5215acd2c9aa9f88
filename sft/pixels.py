"""Decoded pictures: a tensor in memory or, beyond a bound, rows of a file read as they are needed.

Both are indexed, split and iterated over alike, and give the same bytes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, TypeAlias

import torch
from torch import Tensor

IN_MEMORY_BYTES = 4096 * 2**20
"""For instance 28,000 colour pictures of 224 pixels."""
CHUNK = 256


@dataclass(frozen=True, eq=False)  # tensors have no single truth value to compare by
class StoredPixels:
    """Uint8 pictures (n, C, H, W) in a mapped file, of which the system keeps what it has room for.

    Attributes:
        mapped: uint8 (m, C, H, W), the whole file; several sets may share it.
        rows: int64 (n,), the rows of this set, in its order.
    """

    mapped: Tensor
    rows: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> Tensor:
        return self.mapped[self.rows[index]]

    def __iter__(self) -> Iterator[Tensor]:
        for row in self.rows.tolist():
            yield self.mapped[row]

    @property
    def shape(self) -> torch.Size:
        """Number of pictures, channels, height and width."""
        return torch.Size((len(self.rows), *self.mapped.shape[1:]))

    def split(self, size: int) -> Iterator[Tensor]:
        """Read so many pictures at a time."""
        for rows in self.rows.split(size):
            yield self.mapped[rows]

    def take(self, places: Tensor) -> StoredPixels:
        """Choose rows, int64 (k,), without reading them."""
        return StoredPixels(self.mapped, self.rows[places])


Pixels: TypeAlias = Tensor | StoredPixels


def in_memory(pixels: Pixels) -> Tensor:
    """Read all of a set that is known to be small enough."""
    return pixels if isinstance(pixels, Tensor) else pixels[torch.arange(len(pixels))]


class PixelSink:
    """Takes pictures one by one; beyond the bound they go to a file.

    The file lies in the system's folder for temporary files (TMPDIR) and has no name once it is
    finished: it goes with the last set that uses it, whatever kills the process.

    Args:
        shape: of a picture, (C, H, W).
        in_memory_bytes: how much is kept in memory.
    """

    def __init__(self, shape: Sequence[int], in_memory_bytes: int = IN_MEMORY_BYTES) -> None:
        self._shape = tuple(shape)
        self._most = in_memory_bytes
        self._kept: list[Tensor] = []
        self._file: IO[bytes] | None = None
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, pixels: Tensor) -> None:
        """Copy one picture, uint8 (C, H, W); raises OSError where the disk is full."""
        self._count += 1
        if self._file is None:
            self._kept.append(pixels.clone())
            if self._count * prod(self._shape) <= self._most:
                return
            self._file = tempfile.NamedTemporaryFile(prefix="sustain-pixels-")  # noqa: SIM115 - closed by finish
            for kept in self._kept:
                self._file.write(kept.numpy().tobytes())
            self._kept.clear()
        else:
            self._file.write(pixels.numpy().tobytes())

    def finish(self) -> Pixels:
        """Give what was taken; nothing can be added after it."""
        if self._file is None:
            empty = torch.empty(0, *self._shape, dtype=torch.uint8)
            return torch.stack(self._kept) if self._kept else empty
        with self._file as file:
            file.flush()
            return map_pixels(Path(file.name), self._count, self._shape)


def map_pixels(path: Path, n: int, shape: Sequence[int]) -> StoredPixels:
    """Map a file that holds n pictures (C, H, W) of uint8, one behind the other."""
    mapped = torch.from_file(str(path), shared=False, size=n * prod(shape), dtype=torch.uint8)
    return StoredPixels(mapped.view(-1, *shape), torch.arange(n))


def take(pixels: Pixels, places: Tensor) -> Pixels:
    """Choose pictures by their places, int64 (k,); those in a file are not read."""
    return pixels.take(places) if isinstance(pixels, StoredPixels) else pixels[places]


def concatenate(parts: Sequence[Pixels]) -> Pixels:
    """Put pictures behind one another: in memory if all are, else in a file."""
    tensors = [part for part in parts if isinstance(part, Tensor)]
    if len(tensors) == len(parts):
        return torch.cat(tensors)
    filled = [part for part in parts if len(part)]
    if len(filled) == 1:
        return filled[0]
    sink = PixelSink(parts[0].shape[1:], in_memory_bytes=0)
    for part in filled:
        for one in part:
            sink.add(one)
    return sink.finish()


def channel_statistics(pixels: Pixels) -> tuple[list[float], list[float]]:
    """Give mean and standard deviation of each channel, of pixels scaled to [0, 1]; n ≥ 1."""
    channels = pixels.shape[1]
    counts = torch.zeros(channels, 256, dtype=torch.float64)
    for chunk in pixels.split(CHUNK):
        for channel in range(channels):
            counts[channel] += torch.bincount(chunk[:, channel].flatten(), minlength=256)
    values = torch.arange(256, dtype=torch.float64) / 255
    n = counts.sum(dim=1)
    mean = (counts @ values) / n
    variance = (counts * (values - mean[:, None]) ** 2).sum(dim=1) / (n - 1)
    return mean.tolist(), variance.sqrt().tolist()
