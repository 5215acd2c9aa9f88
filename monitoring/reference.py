"""What "no drift" looks like to one version: held-out features, by regime.

A regime is one world that the version was judged on. A batch is compared with the regimes it came
from, sample by sample, because a pooled reference of photos and sketches rings on every batch of
pure photos (measured on PACS: 1.00 of them).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import scipy.linalg

from monitoring.features import FeatureTable, Floats, Integers, write_parquet

if TYPE_CHECKING:
    from pathlib import Path

MIN_ROWS = 20
"""Fewer rows than this have no two halves worth the name."""
MIN_PART = 8
MIN_PART_SHARE = 0.05
SMALLEST_EIGENVALUE = 1e-4
"""Relative to the largest; dead ReLU dimensions below it broke the test's level."""
ROWS_PER_DIMENSION = 10
DISCRIMINANT_DIMENSIONS = 64
NO_LABEL = -1


@dataclass(frozen=True, eq=False)
class Whitening:
    """Leading principal axes, scaled to unit variance: mean (d,), axes (d, k), both float64."""

    mean: Floats
    axes: Floats

    def apply(self, embedding: Floats) -> Floats:
        """Give (n, k) float64, the axis of the largest variance first."""
        return (embedding.astype(np.float64) - self.mean) @ self.axes


def whiten(rows: Floats, max_dimensions: int) -> Whitening:
    """Find the axes of the largest variance and their scale.

    Args:
        rows: (n, d), n at least 2.
        max_dimensions: never more axes than this.

    Returns:
        As many axes as have an eigenvalue of at least 1e-4 of the largest: none at all if the rows
        are constant. In float64 (a float32 SVD ruined the test), by the Gram matrix when there are
        fewer rows than dimensions.

    """
    rows = rows.astype(np.float64)
    n, d = rows.shape
    mean = rows.mean(axis=0)
    centred = rows - mean
    few_rows = n < d
    square = centred @ centred.T if few_rows else centred.T @ centred
    values, vectors = scipy.linalg.eigh(square / (n - 1))
    values, vectors = values[::-1], vectors[:, ::-1]
    # rounding leaves a constant table with eigenvalues of about (eps * size)^2, not zero
    noise = (np.finfo(np.float64).eps * max(1.0, float(np.abs(rows).max()))) ** 2 * n * d
    kept = int(np.sum(values >= max(SMALLEST_EIGENVALUE * values[0], noise)))
    k = min(kept, max_dimensions)
    values, vectors = values[:k], vectors[:, :k]
    if few_rows:
        vectors = centred.T @ vectors / np.sqrt(values * (n - 1))
    return Whitening(mean, vectors / np.sqrt(values))


@dataclass(frozen=True, eq=False)
class Regime:
    """One world that a version was judged on.

    Args:
        name: unique among the version's regimes.
        features: n held-out samples; never training samples, which the model is overconfident on.
        labels: (n,) int64, the index of the class, -1 without a label.

    Raises:
        ValueError: if labels and features differ in number, or features are not finite.

    """

    name: str
    features: FeatureTable
    labels: Integers

    def __post_init__(self) -> None:
        if self.labels.shape != (len(self.features),):
            raise ValueError(
                f"regime {self.name!r}: {len(self.features)} rows and labels of shape "
                f"{self.labels.shape}"
            )
        self.features.require_finite(f"regime {self.name!r}")

    @property
    def labelled(self) -> Integers:
        """The positions of the rows that have a label."""
        return np.flatnonzero(self.labels != NO_LABEL)

    @property
    def correct(self) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
        """Whether the model was right, for each labelled row."""
        rows = self.labelled
        return np.asarray(self.features.predicted[rows] == self.labels[rows])

    @cached_property
    def whitening(self) -> Whitening:
        """The leading axes of the fitting half, at most one for ten rows of the regime."""
        fit, _ = halves(self)
        return whiten(self.features.embedding[fit], len(self.features) // ROWS_PER_DIMENSION)

    @cached_property
    def compared(self) -> Floats:
        """The compare half in the whitened axes, float64."""
        _, compare = halves(self)
        return self.whitening.apply(self.features.embedding[compare])


def halves(regime: Regime) -> tuple[Integers, Integers]:
    """Split a regime's rows for good: one half fits the whitening, the other is compared.

    Without the split the test rings on .08 to .80 of quiet batches.

    Raises:
        ValueError: if the regime has fewer than 20 rows.

    """
    n = len(regime.features)
    if n < MIN_ROWS:
        raise ValueError(
            f"regime {regime.name!r} has {n} reference rows, but a check needs at least {MIN_ROWS} "
            "(better ten times a batch): hold out more labelled samples"
        )
    order = np.random.default_rng(0).permutation(n)
    return np.sort(order[: n // 2]), np.sort(order[n // 2 :])


@dataclass(frozen=True, eq=False)
class Reference:
    """Everything that a version is compared with.

    Args:
        regimes: one or more, of the same widths.
        classes: names of the classes, in the order of the probabilities.

    Raises:
        ValueError: if there is no regime, a name comes twice, or widths differ.

    """

    regimes: tuple[Regime, ...]
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.regimes:
            raise ValueError("a reference has at least one regime")
        names = [regime.name for regime in self.regimes]
        if len(set(names)) < len(names):
            raise ValueError(f"regimes of a reference have names of their own: {names}")
        width = self.regimes[0].features.embedding.shape[1]
        for regime in self.regimes:
            shapes = (
                regime.features.embedding.shape[1],
                regime.features.probabilities.shape[1],
            )
            if shapes != (width, len(self.classes)):
                raise ValueError(
                    f"regime {regime.name!r} has {shapes[0]} embedding dimensions and {shapes[1]} "
                    f"probabilities, not {width} and {len(self.classes)}"
                )

    @property
    def n(self) -> int:
        """Rows in all regimes."""
        return sum(len(regime.features) for regime in self.regimes)

    @property
    def accuracy(self) -> float:
        """Share of labelled rows that the model got right.

        Raises:
            ValueError: if no row has a label.

        """
        correct = np.concatenate([regime.correct for regime in self.regimes])
        if not correct.size:
            raise ValueError(
                "no row of the reference has a label, so its accuracy is not known: "
                "build the reference from labelled held-out samples"
            )
        return float(correct.mean())

    @cached_property
    def discriminant(self) -> Discriminant:
        """The linear discriminant between the regimes, fitted on their fitting halves."""
        return _discriminant([r.features.embedding[halves(r)[0]] for r in self.regimes])

    def require_readable(self, features: FeatureTable) -> None:
        """Refuse a batch that this reference cannot be compared with.

        Raises:
            ValueError: if it is empty, not finite, or of other widths.

        """
        if not len(features):
            raise ValueError("the batch has no rows to compare with the reference")
        ours, theirs = self.regimes[0].features, features
        widths = [(t.embedding.shape[1], t.probabilities.shape[1]) for t in (ours, theirs)]
        if widths[0] != widths[1]:
            raise ValueError(
                f"the batch has embeddings and probabilities of widths {widths[1]}, the reference "
                f"{widths[0]}: they come from different versions, so extract the batch again"
            )
        features.require_finite("batch")

    def save(self, folder: Path) -> None:
        """Write `regime-<i>.parquet` for each regime, then `reference.json`."""
        folder.mkdir(parents=True, exist_ok=True)
        for i, regime in enumerate(self.regimes):
            table = regime.features.to_arrow().append_column(
                "label", pa.array(regime.labels, pa.int64())
            )
            write_parquet(table, folder / f"regime-{i}.parquet")
        content = {
            "format": 1,
            "classes": list(self.classes),
            "regimes": [regime.name for regime in self.regimes],
        }
        (folder / "reference.json").write_text(
            json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )

    @classmethod
    def load(cls, folder: Path) -> Reference:
        """Read what `save` wrote, bit for bit.

        Raises:
            FileNotFoundError: if a file is missing.
            ValueError: if a file is damaged or of a format that this release does not know.

        """
        content = json.loads((folder / "reference.json").read_text(encoding="utf-8"))
        if content.get("format") != 1:
            raise ValueError(
                f"{folder / 'reference.json'} has format {content.get('format')!r}, this release "
                "reads format 1: use the release that wrote it"
            )
        regimes = []
        for i, name in enumerate(content["regimes"]):
            table = pq.read_table(folder / f"regime-{i}.parquet")
            labels = table["label"].to_numpy().astype(np.int64)
            regimes.append(Regime(name, FeatureTable.from_arrow(table), labels))
        return cls(tuple(regimes), tuple(content["classes"]))


@dataclass(frozen=True, eq=False)
class Discriminant:
    """Axes (d, k) in which every regime has unit covariance, and the regimes' centres (r, k)."""

    mean: Floats
    axes: Floats
    centres: Floats

    def nearest(self, embedding: Floats) -> Integers:
        """Give the position of the nearest centre for each row, (n,)."""
        points = (embedding.astype(np.float64) - self.mean) @ self.axes
        # |p - c|^2 without the term that is the same for every centre
        distance = (self.centres**2).sum(axis=1) - 2 * points @ self.centres.T
        return np.asarray(distance.argmin(axis=1), dtype=np.int64)


def _discriminant(groups: list[Floats]) -> Discriminant:
    rows = np.concatenate(groups)
    # The total variance chooses the space, so that the directions between regimes are in it.
    total = whiten(rows, min(DISCRIMINANT_DIMENSIONS, max(1, len(rows) // ROWS_PER_DIMENSION)))
    points = [total.apply(group) for group in groups]
    centres = np.stack([p.mean(axis=0) for p in points])
    within = sum(
        ((p - c).T @ (p - c) for p, c in zip(points, centres, strict=True)),
        start=np.zeros((total.axes.shape[1],) * 2),
    )
    # In the total whitening every variance is at most 1; the ridge only keeps a constant one apart.
    values, vectors = scipy.linalg.eigh(within / len(rows) + 1e-6 * np.eye(len(within)))
    scale = vectors / np.sqrt(values)
    return Discriminant(total.mean, total.axes @ scale, centres @ scale)


def route(reference: Reference, features: FeatureTable) -> Integers:
    """Give, for each row, the position of the regime that it is nearest to, (n,) int64.

    By the linear discriminant between the regimes; zeros if there is only one.

    Raises:
        ValueError: if the batch cannot be compared with the reference, or a regime is too small.

    """
    reference.require_readable(features)
    if len(reference.regimes) == 1:
        return np.zeros(len(features), dtype=np.int64)
    return reference.discriminant.nearest(features.embedding)


def assign(reference: Reference, features: FeatureTable, min_part: int = MIN_PART) -> Integers:
    """Route, then put parts too small to be a world of their own back with the largest part.

    A part stays if it has at least `min_part` rows and 5 % of the batch: fewer are misrouted
    samples, which are extreme by selection and would ring.
    """
    regime = route(reference, features)
    counts = np.bincount(regime, minlength=len(reference.regimes))
    needed = max(min_part, MIN_PART_SHARE * len(features))
    largest = int(counts.argmax())
    small = (counts < needed) & (np.arange(len(counts)) != largest)
    return np.where(small[regime], largest, regime)
