"""Small pictures, shards and folders, and short words for what a test asks of them."""

import gzip
import hashlib
import importlib.util
import io
import struct
import zlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import nn

from flows.batches import read_batch
from flows.feed import FeedSettings, list_batches
from flows.intake import BatchData
from flows.labels import LabelTable
from sft.dataset import LabelledPictures
from sft.pictures import Preprocessing

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


def read(root: Path, settings: FeedSettings = LENIENT, **options: Any) -> BatchData:
    """Read the only batch, and see that not one of the user's files was touched."""
    before = tree(root)
    (batch,) = list_batches(settings, root)
    try:
        return read_batch(batch, settings, root, SEEN, **options)
    finally:
        assert tree(root) == before


def as_dict(table: LabelTable) -> dict[str, str]:
    return dict(zip(table.labels["sample_id"], table.labels["label"], strict=True))


def reasons(data: BatchData) -> dict[str, str]:
    return {q.sample_id: q.reason for q in data.quarantined}


def names(data: BatchData) -> list[str]:
    return list(data.samples["sample_id"])


def digests(encoded: Iterable[bytes]) -> list[str]:
    """The SHA-256 of encoded pictures, as a batch tells them."""
    return [hashlib.sha256(one).hexdigest() for one in encoded]


@cache
def optical_digits() -> LabelledPictures:
    """Read 1,797 optical digits that scikit-learn ships, 8 x 8, in one random order.

    From the file: importing scikit-learn takes seconds.
    """
    spec = importlib.util.find_spec("sklearn")
    if spec is None or spec.origin is None:
        pytest.skip("scikit-learn ships the optical digits")
    path = Path(spec.origin).parent / "datasets/data/digits.csv.gz"
    with gzip.open(path, "rt") as lines:
        rows = np.loadtxt(lines, delimiter=",", dtype=np.float32)
    table = torch.from_numpy(rows[np.random.default_rng(0).permutation(len(rows))])
    pixels = (table[:, :-1] * 255 / 16).to(torch.uint8).view(-1, 1, 8, 8)
    ids = tuple(f"optical/{i}" for i in range(len(table)))
    return LabelledPictures(ids, pixels, table[:, -1].long())


def batch_norm_net(num_classes: int) -> nn.Module:
    """Build two convolutions with batch norm, for grey pictures: a factory of the user's own."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, stride=2, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(512, num_classes),
    )  # fmt: skip
