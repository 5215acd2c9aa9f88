"""Pictures and a model, turned into the one table that every later question is asked of."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from datetime import date, datetime
from enum import StrEnum
from functools import cached_property
from typing import TYPE_CHECKING, Protocol, TypeAlias, cast

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import scipy.special
import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

Floats: TypeAlias = np.ndarray[tuple[int, ...], np.dtype[np.floating]]
Integers: TypeAlias = np.ndarray[tuple[int, ...], np.dtype[np.int64]]

STATISTIC_PREFIX = "statistic:"
METADATA_PREFIX = "metadata:"
KIND = b"kind"
NOISE_PIXELS = 4096
"""Of a picture, spread evenly; a median of more costs time and is hardly closer."""
LAPLACIAN_OF_UNIT_NOISE = 0.6745 * (1 + 1 / 4) ** 0.5
"""Median absolute Laplacian of white noise with standard deviation 1."""
ROUNDING_ERROR = 3e-5
"""How far two numbers of the same picture may be apart, as a share of them.

Float32 sums differ with the pictures in a forward pass, the threads and the machine. Measured over
16 sizes and threads (small CNN, MLP; pale and sharp answers): up to 1e-5 of a probability, 2.5e-6
of an entropy or a whitened distance.
"""


class Kind(StrEnum):
    """What the columns of `probabilities` are."""

    SINGLE_LABEL = "single_label"
    """Shares of one: one class is answered."""
    MULTI_LABEL = "multi_label"
    """Each the probability of a label: any number of them is answered."""
    REGRESSION = "regression"
    """Values, in the units of the targets. They tell no confidence."""


class Embedder(Protocol):
    """A model that shows what it sees and what it says in one forward pass."""

    def embed(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Give embeddings (n, d) float32 and answers (n, classes) of uint8 (n, C, H, W).

        Answers are probabilities, or values: what `FeatureTable.kind` names.
        """
        ...


class Pictures(Protocol):
    """Uint8 pictures (n, C, H, W): a tensor, or whatever reads a slice of them into one."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: slice, /) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class FeatureTable:
    """What one version of the model saw in n pictures.

    Args:
        sample_ids: n ids, `<batch>/<path inside the batch>`.
        embedding: (n, d) float32, what the head is given.
        probabilities: (n, classes) float32, rows sum to one; of another kind, what it says.
        statistics: n rows, one column a statistic of the picture.
        metadata: n rows of the user's own columns, each float64 or text, as `tidy` makes them; no
            columns by default.
        kind: what `probabilities` are.

    Raises:
        ValueError: if the parts do not have the same number of rows.

    """

    sample_ids: tuple[str, ...]
    embedding: Floats
    probabilities: Floats
    statistics: pd.DataFrame
    metadata: pd.DataFrame = field(default_factory=pd.DataFrame)
    kind: Kind = Kind.SINGLE_LABEL

    def __post_init__(self) -> None:
        if not len(self.metadata.columns):
            object.__setattr__(
                self, "metadata", pd.DataFrame(index=pd.RangeIndex(len(self.sample_ids)))
            )
        rows = {
            "sample_ids": len(self.sample_ids),
            "embedding": len(self.embedding),
            "probabilities": len(self.probabilities),
            "statistics": len(self.statistics),
            "metadata": len(self.metadata),
        }
        if len(set(rows.values())) != 1:
            raise ValueError(f"a feature table's parts have different numbers of rows: {rows}")
        if self.embedding.ndim != 2 or self.probabilities.ndim != 2:  # noqa: PLR2004
            raise ValueError(
                "embedding and probabilities have two axes, not shapes "
                f"{self.embedding.shape} and {self.probabilities.shape}"
            )

    def __len__(self) -> int:
        return len(self.sample_ids)

    @cached_property
    def confidence(self) -> Floats:
        """The probability of the answer, (n,): of all labels together; 1 where there is none."""
        match self.kind:
            case Kind.SINGLE_LABEL:
                return np.asarray(self.probabilities.max(axis=1))
            case Kind.MULTI_LABEL:
                each = np.maximum(self.probabilities, 1 - self.probabilities)
                return np.asarray(each.prod(axis=1))
            case Kind.REGRESSION:
                return np.ones(len(self), dtype=self.probabilities.dtype)

    @cached_property
    def entropy(self) -> Floats:
        """The entropy of the answer in nats, (n,) float64; 0 where there are no probabilities."""
        exact = self.probabilities.astype(np.float64)
        if self.kind is Kind.REGRESSION:
            return np.zeros(len(self))
        total = scipy.special.entr(exact)
        if self.kind is Kind.MULTI_LABEL:
            total = total + scipy.special.entr(1 - exact)
        return np.asarray(total.sum(axis=1))

    @cached_property
    def predicted(self) -> Integers:
        """The index of the predicted class, (n,); 0 throughout where no single one is answered."""
        if self.kind is not Kind.SINGLE_LABEL:
            return np.zeros(len(self), dtype=np.int64)
        return np.asarray(self.probabilities.argmax(axis=1), dtype=np.int64)

    @cached_property
    def said(self) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
        """Which classes are answered, (n, classes); (n, 0) where there are none."""
        match self.kind:
            case Kind.SINGLE_LABEL:
                classes = np.arange(self.probabilities.shape[1])
                return np.asarray(self.predicted[:, None] == classes)
            case Kind.MULTI_LABEL:
                return np.asarray(self.probabilities >= 0.5)  # noqa: PLR2004 - a half
            case Kind.REGRESSION:
                return np.zeros((len(self), 0), dtype=np.bool_)

    def words(self, classes: Sequence[str]) -> list[str]:
        """Write each row's answer: a class, labels between "|", or values between them."""
        if self.kind is Kind.REGRESSION:
            return ["|".join(f"{value:.4g}" for value in row) for row in self.probabilities]
        return [
            "|".join(classes[i] for i in np.flatnonzero(row).tolist()) or "none"
            for row in self.said
        ]

    def take(self, index: Integers | Sequence[int]) -> FeatureTable:
        """Select rows by their positions, in the order given."""
        rows = np.asarray(index, dtype=np.int64)
        return FeatureTable(
            sample_ids=tuple(self.sample_ids[i] for i in rows),
            embedding=self.embedding[rows],
            probabilities=self.probabilities[rows],
            statistics=self.statistics.iloc[rows].reset_index(drop=True),
            metadata=self.metadata.iloc[rows].reset_index(drop=True),
            kind=self.kind,
        )

    def require_finite(self, name: str) -> None:
        """Refuse a table with rows that no test can read.

        Raises:
            ValueError: naming how many rows of `name` hold a NaN or an infinity.

        """
        good = np.isfinite(self.embedding).all(axis=1) & np.isfinite(self.probabilities).all(axis=1)
        bad = np.flatnonzero(~good)
        if bad.size:
            raise ValueError(
                f"{name}: {bad.size} of {len(self)} rows have embeddings or probabilities that are "
                f"not finite (first: {self.sample_ids[bad[0]]}); the model cannot read these "
                "pictures, so look at its weights and its normalisation"
            )

    def to_arrow(self) -> pa.Table:
        """Lay the table out as Arrow columns; `from_arrow` gives back the same bits."""
        columns: dict[str, pa.Array] = {
            "sample_id": pa.array(self.sample_ids, pa.string()),
            "embedding": _fixed_size_lists(self.embedding),
            "probabilities": _fixed_size_lists(self.probabilities),
        }
        for name, values in self.statistics.items():
            columns[f"{STATISTIC_PREFIX}{name}"] = pa.array(values.to_numpy())
        for name, values in self.metadata.items():
            kind = pa.float64() if values.dtype == np.float64 else pa.string()
            columns[f"{METADATA_PREFIX}{name}"] = pa.array(
                values.to_numpy(), kind, from_pandas=kind != pa.float64()
            )
        table = pa.table(columns)
        if self.kind is Kind.SINGLE_LABEL:
            return table
        return table.replace_schema_metadata({KIND: self.kind.value})

    @classmethod
    def from_arrow(cls, table: pa.Table) -> FeatureTable:
        """Read what `to_arrow` laid out; columns it does not know are left alone."""
        statistics = {
            name.removeprefix(STATISTIC_PREFIX): table[name].to_numpy()
            for name in table.column_names
            if name.startswith(STATISTIC_PREFIX)
        }
        metadata = {
            name.removeprefix(METADATA_PREFIX): table[name].to_numpy()
            if pa.types.is_floating(table[name].type)
            else pd.Series(table[name].to_pylist(), dtype="object")
            for name in table.column_names
            if name.startswith(METADATA_PREFIX)
        }
        return cls(
            sample_ids=tuple(table["sample_id"].to_pylist()),
            embedding=_matrix(table["embedding"]),
            probabilities=_matrix(table["probabilities"]),
            statistics=pd.DataFrame(statistics, index=pd.RangeIndex(table.num_rows)),
            metadata=pd.DataFrame(metadata, index=pd.RangeIndex(table.num_rows)),
            kind=Kind((table.schema.metadata or {}).get(KIND, Kind.SINGLE_LABEL.encode()).decode()),
        )

    def save(self, path: Path) -> None:
        """Write one Parquet file; a reader sees the whole file or none."""
        write_parquet(self.to_arrow(), path)

    @classmethod
    def load(cls, path: Path) -> FeatureTable:
        """Read what `save` wrote, bit for bit.

        Raises:
            FileNotFoundError: if there is no such file.
            pyarrow.ArrowInvalid: a ValueError, if the file is no Parquet file.

        """
        return cls.from_arrow(pq.read_table(path))


def tidy(columns: pd.DataFrame) -> pd.DataFrame:
    """Give metadata columns one of two types: float64 if every value is a number, else text.

    Missing values are NaN in the first and None in the second. A number among words is its text,
    and so is a boolean; times are ISO 8601, lists and the like JSON.
    """
    return pd.DataFrame(
        {str(name): _tidy_column(values) for name, values in columns.items()},
        index=pd.RangeIndex(len(columns)),
    )


def _tidy_column(values: pd.Series) -> pd.Series:
    missing = [not isinstance(value, list | dict) and pd.isna(value) for value in values]
    known = [value for value, gone in zip(values, missing, strict=True) if not gone]
    if known and all(map(_is_number, known)):
        numbers = [
            np.nan if gone else float(value) for value, gone in zip(values, missing, strict=True)
        ]
        return pd.Series(numbers, dtype="float64")
    texts = [None if gone else _text(value) for value, gone in zip(values, missing, strict=True)]
    return pd.Series(texts, dtype="object")


def number_text(value: float) -> str:
    """Write a number exactly, a whole one without a point."""
    return str(int(value)) if float(value).is_integer() else repr(float(value))


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        return False
    try:
        return math.isfinite(float(value))  # an integer may be too large for a float
    except OverflowError:
        return False


def _text(value: object) -> str:
    if _is_number(value):
        return number_text(cast("float", value))
    if isinstance(value, datetime | date):
        return value.isoformat()
    if isinstance(value, list | dict):
        return json.dumps(value, default=str, ensure_ascii=False)
    return str(value)


def write_parquet(table: pa.Table, path: Path) -> None:
    """Write beside the target and rename, so that a killed process leaves no half file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    pq.write_table(table, partial, compression="zstd")
    partial.replace(path)


def _fixed_size_lists(matrix: Floats) -> pa.Array:
    flat = pa.array(np.ascontiguousarray(matrix).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, matrix.shape[1])


def _matrix(column: pa.ChunkedArray) -> Floats:
    if not pa.types.is_fixed_size_list(column.type):
        raise ValueError(f"rows of one length are needed, got {column.type}")
    width = column.type.list_size
    chunks = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks]
    flat = (
        np.concatenate(chunks) if chunks else np.empty(0, column.type.value_type.to_pandas_dtype())
    )
    return np.asarray(flat.reshape(len(column), width))


def concatenate(tables: Sequence[FeatureTable]) -> FeatureTable:
    """Put tables of the same version below one another, with the statistics that all have.

    Metadata columns of any of them are kept, with missing values where a table lacks one.

    Raises:
        ValueError: if there are none, or if they differ in width or kind.

    """
    if not tables:
        raise ValueError("there is no feature table to concatenate")
    if len({table.kind for table in tables}) > 1:
        raise ValueError("feature tables of different kinds do not belong together")
    common = [
        column
        for column in tables[0].statistics.columns
        if all(column in table.statistics.columns for table in tables)
    ]
    return FeatureTable(
        sample_ids=tuple(sample_id for table in tables for sample_id in table.sample_ids),
        embedding=np.concatenate([table.embedding for table in tables]),
        probabilities=np.concatenate([table.probabilities for table in tables]),
        statistics=pd.concat([table.statistics[common] for table in tables], ignore_index=True),
        metadata=_stack([table.metadata for table in tables]),
        kind=tables[0].kind,
    )


def _stack(frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    if not any(len(frame.columns) for frame in frames):
        return pd.DataFrame()
    return tidy(pd.concat([frame.astype("object") for frame in frames], ignore_index=True))


def picture_statistics(pixels: Tensor) -> pd.DataFrame:
    """Describe pictures in numbers that a person knows.

    Args:
        pixels: uint8 (n, C, H, W), C is 1 or 3 (RGB).

    Returns:
        n rows of float64: brightness (mean luma, 0 to 1), contrast (standard deviation of luma,
        0 to .5), sharpness (mean absolute Laplacian of luma over four neighbours, 0 to 1), noise
        (standard deviation of white noise in luma, by the median absolute Laplacian, 0 to 1; the
        median passes over edges, so faint noise shows whatever the picture shows: Donoho and
        Johnstone 1994), saturation (mean of HSV's S, 0 to 1; 0 for one channel).

    Raises:
        ValueError: if the shape or the type is another.

    """
    if pixels.ndim != 4 or pixels.shape[1] not in {1, 3} or pixels.dtype != torch.uint8:  # noqa: PLR2004
        raise ValueError(
            "pictures are uint8 (n, C, H, W) with one or three channels, "
            f"not {pixels.dtype} {tuple(pixels.shape)}"
        )
    scaled = pixels.to(torch.float32) / 255
    if pixels.shape[1] == 1:
        luma = scaled[:, 0]
        saturation = luma.new_zeros(len(luma))
    else:
        # ITU-R BT.601, what PIL's convert("L") uses
        luma = 0.299 * scaled[:, 0] + 0.587 * scaled[:, 1] + 0.114 * scaled[:, 2]
        brightest, darkest = scaled.amax(dim=1), scaled.amin(dim=1)
        saturation = ((brightest - darkest) / brightest.clamp_min(1e-6)).mean(dim=(1, 2))
    laplacian = _laplacian(luma)
    return pd.DataFrame(
        {
            "brightness": _column(luma.mean(dim=(1, 2))),
            "contrast": _column(luma.std(dim=(1, 2), correction=0)),
            "sharpness": _column(laplacian.mean(dim=1)),
            "noise": _column(_noise(laplacian)),
            "saturation": _column(saturation),
        }
    )


def _column(values: Tensor) -> Floats:
    return np.asarray(values.cpu().numpy(), dtype=np.float64)


def _laplacian(luma: Tensor) -> Tensor:
    """Give the absolute difference of each inner pixel and its four neighbours' mean, (n, p)."""
    if min(luma.shape[1:]) < 3:  # noqa: PLR2004  it needs a pixel on either side
        return luma.new_zeros(len(luma), 1)
    neighbours = (
        luma[:, :-2, 1:-1] + luma[:, 2:, 1:-1] + luma[:, 1:-1, :-2] + luma[:, 1:-1, 2:]
    ) / 4
    return (luma[:, 1:-1, 1:-1] - neighbours).abs().flatten(1)


def _noise(laplacian: Tensor) -> Tensor:
    every = -(-laplacian.shape[1] // NOISE_PIXELS)
    return torch.median(laplacian[:, ::every], dim=1)[0] / LAPLACIAN_OF_UNIT_NOISE


def extract(
    model: Embedder,
    sample_ids: Sequence[str],
    pixels: Pictures,
    sizes: Sequence[tuple[int, int, int]] | None = None,
    metadata: pd.DataFrame | None = None,
    batch_size: int = 256,
    kind: Kind = Kind.SINGLE_LABEL,
) -> FeatureTable:
    """See every picture once.

    Args:
        model: embeds and answers.
        sample_ids: n ids.
        pixels: uint8 (n, C, H, W).
        sizes: n times (width, height, channels) of the picture as it arrived, in pixels; None
            where they are not known.
        metadata: n rows of the user's own columns.
        batch_size: pictures in one forward pass.
        kind: what its answers are.

    Returns:
        The table; with sizes, `width`, `height`, `aspect` (width / height) and `channels` join the
        picture statistics.

    Raises:
        ValueError: if there are no pictures, or not as many ids and sizes as pictures.

    """
    n = len(pixels)
    if n == 0:
        raise ValueError("there are no pictures to extract features from")
    if len(sample_ids) != n or (sizes is not None and len(sizes) != n):
        given = f"{len(sample_ids)} and {n if sizes is None else len(sizes)}"
        raise ValueError(f"{n} pictures need as many ids and sizes, not {given}")
    embeddings, probabilities, statistics = [], [], []
    with torch.inference_mode():
        for start in range(0, n, batch_size):
            some = pixels[start : start + batch_size]
            # channels_last: 1.4 to 2.7 times faster forward on the CPU
            embedding, probability = model.embed(some.contiguous(memory_format=torch.channels_last))
            embeddings.append(embedding.float().cpu().numpy())
            probabilities.append(probability.float().cpu().numpy())
            statistics.append(picture_statistics(some))
    table = FeatureTable(
        sample_ids=tuple(sample_ids),
        embedding=np.concatenate(embeddings),
        probabilities=np.concatenate(probabilities),
        statistics=pd.concat(statistics, ignore_index=True),
        metadata=pd.DataFrame() if metadata is None else tidy(metadata),
        kind=kind,
    )
    if sizes is None:
        return table
    width, height, channels = np.asarray(sizes, dtype=np.float64).T
    return dataclasses.replace(
        table,
        statistics=table.statistics.assign(
            width=width, height=height, aspect=width / height, channels=channels
        ),
    )
