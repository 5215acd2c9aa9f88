"""What moved, in words and figures, and which pictures are farthest from what the version knows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from monitoring.features import Kind
from monitoring.reference import (
    MIN_ROWS,
    ROWS_PER_DIMENSION,
    halves,
    portions,
    route,
    whiten,
)

if TYPE_CHECKING:
    from monitoring.features import FeatureTable, Floats, Integers
    from monitoring.reference import Portion, Reference, Regime, Whitening

MOVED_STANDARD_ERRORS = 3.0
MAX_COLUMNS_NAMED = 5
MAX_DIMENSIONS = 64
HALVINGS = 5


@dataclass(frozen=True)
class MovedDimension:
    """A whitened dimension whose mean moved; `move` is in the reference's standard deviations."""

    name: str
    index: int
    move: float


@dataclass(frozen=True)
class Stray:
    """A sample far from everything known.

    `distance` is Mahalanobis's, in the leading whitened dimensions of `regime`, the world that
    the sample is nearest to; `nearest_id` is that world's row that looks most alike in them.
    """

    sample_id: str
    distance: float
    regime: str
    nearest_id: str


def moved_dimensions(
    reference: Reference, batch: FeatureTable, k: int = 4
) -> tuple[MovedDimension, ...]:
    """Name the k leading whitened dimensions that moved most, the largest move first.

    Of the world that most of the batch belongs to, and its part of the batch; only those that
    moved by more than three standard errors. "dimension 1" has the largest variance.

    Raises:
        ValueError: if the batch cannot be compared with the reference, or a regime is too small.

    """
    portion = max(portions(reference, batch), key=lambda p: len(p.rows))
    axes, rows = _axes(portion.home)
    ours = axes.apply(portion.home.features.embedding[rows])
    theirs = axes.apply(batch.embedding[portion.rows])
    spread = ours.std(axis=0)
    scale = np.where(spread > 0, spread, 1.0)
    move = (theirs.mean(axis=0) - ours.mean(axis=0)) / scale
    limit = MOVED_STANDARD_ERRORS * np.sqrt(1 / len(ours) + 1 / len(theirs))
    order = [int(i) for i in np.argsort(-np.abs(move), kind="stable") if abs(move[i]) > limit]
    return tuple(MovedDimension(f"dimension {i + 1}", i, float(move[i])) for i in order[:k])


def farthest(reference: Reference, batch: FeatureTable, k: int = 12) -> tuple[Stray, ...]:
    """Find k samples far from the reference that differ from one another, the farthest first.

    From the farthest on, a sample is taken if it is as far from all that were taken as two ordinary
    reference rows are from one another; if that gives too few, half as far, and so on. So twelve
    copies of one picture are shown once. A sample is held against the world that it is nearest to.

    Raises:
        ValueError: if the batch cannot be compared with the reference, or a regime is too small.

    """
    nearest = route(reference, batch)
    distance = np.zeros(len(batch))
    alike = np.zeros(len(batch), dtype=np.int64)
    for world in np.unique(nearest):
        rows = np.flatnonzero(nearest == world)
        distance[rows], alike[rows] = _distances(reference.worlds[world], batch.embedding[rows])
    far = np.argsort(-distance, kind="stable")
    largest = reference.worlds[int(np.bincount(nearest).argmax())]
    chosen = far[_diverse(_axes(largest)[0].apply(batch.embedding[far]), k)]
    chosen = chosen[np.argsort(-distance[chosen], kind="stable")]
    return tuple(
        Stray(
            batch.sample_ids[i],
            float(distance[i]),
            reference.worlds[nearest[i]].name,
            reference.worlds[nearest[i]].features.sample_ids[alike[i]],
        )
        for i in chosen
    )


def _axes(regime: Regime) -> tuple[Whitening, Integers]:
    """Give a regime's leading axes and the rows that they were not fitted to, if it has enough."""
    n = len(regime.features)
    if regime.split is None and n < MIN_ROWS:
        return whiten(regime.features.embedding, max(1, n // ROWS_PER_DIMENSION)), np.arange(n)
    return regime.whitening.leading(MAX_DIMENSIONS), halves(regime)[1]


def _distances(regime: Regime, embedding: Floats) -> tuple[Floats, Integers]:
    """Give each row's distance from the regime's centre and the position of its nearest row."""
    axes, compared = _axes(regime)
    ours, theirs = axes.apply(regime.features.embedding), axes.apply(embedding)
    from_centre = np.linalg.norm(theirs - ours[compared].mean(axis=0), axis=1)
    # |a - b|^2 without the term that is the same for every reference row
    alike = ((ours**2).sum(axis=1) - 2 * theirs @ ours.T).argmin(axis=1)
    return from_centre, np.asarray(alike, dtype=np.int64)


def _diverse(points: Floats, k: int) -> Integers:
    """Choose k positions, the first ones first, that are not alike.

    At first as far apart as two ordinary reference rows are, sqrt(2 d) in d whitened dimensions;
    then half of that, and so on, until there are k. Copies come last.
    """
    chosen: list[int] = []
    apart = np.full(len(points), np.inf)
    radius = np.sqrt(2 * points.shape[1])
    for least in (*(radius / 2**i for i in range(HALVINGS)), 0.0):
        for i in range(len(points)):
            if len(chosen) < k and i not in chosen and apart[i] >= least:
                chosen.append(i)
                apart = np.minimum(apart, np.linalg.norm(points - points[i], axis=1))
    return np.array(chosen, dtype=np.int64)


def moved_columns(
    classes: tuple[str, ...], batch: FeatureTable, cut: tuple[Portion, ...]
) -> tuple[str, ...]:
    """Name what moved by more than three standard errors, the largest move first.

    The reference is mixed as the batch is, so a half-and-half batch of two known worlds is not
    said to have moved. Statistics that only one side has are left out.
    """
    common = [
        column
        for column in batch.statistics.columns
        if all(column in portion.home.features.statistics.columns for portion in cut)
    ]
    now, names = _columns(batch, common, classes)
    mean, variance, error = np.zeros((3, now.shape[1]))
    for portion in cut:
        share = len(portion.rows) / len(batch)
        columns, _ = _columns(portion.home.features, common, classes)
        # A class that the reference never predicted still has a spread: half a row's worth.
        floor = np.array([0.5 / len(columns) if name[0] == "'" else 0.0 for name in names])
        spread = np.maximum(columns.var(axis=0), floor)
        mean += share * columns.mean(axis=0)
        variance += share * spread
        error += share**2 * spread / len(columns)
    error = np.sqrt(error + variance / len(batch))
    change = now.mean(axis=0) - mean
    sd = np.sqrt(variance)
    # A share of m rows comes in steps of 1/m: half a step is no move (Yates).
    step = np.array([0.5 / len(batch) if name[0] == "'" else 0.0 for name in names])
    limit = MOVED_STANDARD_ERRORS * error + step + 1e-9 * (1 + np.abs(mean))
    moved = np.abs(change) > limit
    size = np.divide(np.abs(change), sd, out=np.full_like(sd, np.inf), where=sd > 0)
    order = [i for i in np.argsort(-size, kind="stable") if moved[i]][:MAX_COLUMNS_NAMED]
    words = []
    for i in order:
        was, is_now = _figure(mean[i]), _figure(mean[i] + change[i])
        if names[i][0] == "'":
            words.append(f"share of predicted class {names[i]} {was} -> {is_now}")
        elif sd[i] > 0:
            words.append(f"{names[i]} {'+' if change[i] > 0 else '-'}{_figure(size[i], 1)} sd")
        else:
            words.append(f"{names[i]} {was} -> {is_now}")
    return tuple(words)


def _columns(
    features: FeatureTable, common: list[str], classes: tuple[str, ...]
) -> tuple[Floats, list[str]]:
    """Lay picture statistics, confidence and one column a predicted class side by side.

    Of a model of values, the values.
    """
    statistics = features.statistics[common]
    is_value = features.kind is Kind.REGRESSION
    answers = features.probabilities if is_value else features.said
    values = np.column_stack(
        [statistics.to_numpy(dtype=np.float64), features.confidence, answers.astype(np.float64)]
    )
    names = [str(column) for column in statistics.columns]
    own = [f"predicted {name}" if is_value else f"'{name}'" for name in classes]
    return values, [*names, "confidence", *own]


def _figure(value: float, decimals: int = 2) -> str:
    text = f"{value:.{decimals}f}"
    return text[1:] if text.startswith("0.") else text
