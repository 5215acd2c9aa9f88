"""Has the data changed? Two-sample tests of a batch against the reference of a version."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

import numpy as np
from scipy import stats

from monitoring.explain import moved_columns
from monitoring.features import ROUNDING_ERROR, Kind
from monitoring.kept import kept_with
from monitoring.reference import (
    MIN_PART,
    Portion,
    Reference,
    Regime,
    halves,
    portions,
    scores,
    squared_distances,
    whiten,
)

if TYPE_CHECKING:
    from monitoring.features import FeatureTable, Floats, Integers

SMALL = 50
"""Below so many rows on either side the F distribution is too hopeful on real embeddings: of quiet
batches of 20, at 5 % it rang on .10 in 64 dimensions, and at .6 % on .02 in 32 (400 each)."""
TAIL_FROM = 20
"""Rows of a batch whose permutations are smooth enough to read a tail from."""
POOLED_UP_TO = 1000
"""Reference rows up to which whitening is fitted to reference and batch together, at each check.

What is fitted to all rows alike favours neither side, so none need be held back: permutation MMD
with it had power .20, .31 and .54 at 20, 100 and 500 rows a side, with halves .10, .26 and .48
(MNIST, 27 shifts).
Above it the saving counts: a fit of 2,000 rows of 512 dimensions costs 40 ms.
"""
ROWS_PER_POOLED_DIMENSION = 5
"""Permutations of rows whitened together are exact with any number of dimensions, so this is a
choice of power: one for 10 rows lost .04 of power at 50 rows a side on MNIST."""
PERMUTATIONS = 199
"""Of the kernel's statistic: its p is at least .005, which is half of alpha = .01."""
MEAN_PERMUTATIONS = 999
COUNT_PERMUTATIONS = 1999
"""A test with an eighth of alpha = .01 needs a p of .00125."""
UNCERTAINTY_WEIGHT = 3.0
"""The model's uncertainty counts as much as so many whitened dimensions in the kernel.

Measured on MNIST, mean over the shifts of Rabanser et al. 2019: .14 without and .23 with it at 10
rows a side, .56 and .74 at 100 against 2,000; no loss on PACS.
"""
SMALLEST_UNCERTAINTY = 1e-6
FARTHEST = 60.0
"""exp(-60) is next to nothing, and a normal float32: subnormal ones are 50 times slower."""
MEDIAN_ROWS = 500
EXACT_PAIRS = 10_000
"""Up to so many pairs of rows the distance's distribution is exact, not asymptotic."""
EXPECTED = 5.0
"""Cochran's rule: no cell of a chi-squared test expects fewer rows."""
COUNTED = 50
"""A batch of fewer rows is compared with random draws instead of the chi-squared distribution."""
LEAST_SKEWNESS = 0.5
"""The skewness of 199 draws may be too small by chance, and the tail then too thin."""
MOST_NEEDED = 10_000_000
DETECTORS = ("mmd", "hotelling", "scores", "probabilities", "predicted", "statistics")
DEFAULT_SHARES = MappingProxyType(
    {
        "mmd": 0.5,
        "hotelling": 0.1,
        "scores": 0.1,
        "probabilities": 0.1,
        "predicted": 0.1,
        "statistics": 0.1,
    }
)
"""The kernel is the best single test; the closed-form ones explain, and give small p."""


@dataclass(frozen=True)
class DetectionSettings:
    """How a batch is compared with the reference.

    Args:
        alpha: share of batches from the reference's own worlds that ring.
        max_dimensions: leading whitened dimensions tested at most (on PACS 32 see
            .35 of slightly brighter batches, 64 .57; 96 need longer for no more).
        min_part: rows that a world's part of a batch needs, or it goes with the largest part.
        detectors: the tests, of `DETECTORS`, and each one's share of alpha; the shares are
            divided by their sum.

    Raises:
        ValueError: if a value is out of its range, or a test is not known.

    """

    alpha: float = 0.01
    max_dimensions: int = 64
    min_part: int = MIN_PART
    detectors: Mapping[str, float] = field(default_factory=lambda: dict(DEFAULT_SHARES), hash=False)

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 1:
            raise ValueError(f"alpha={self.alpha} is no share between 0 and 1")
        if self.max_dimensions < 1 or self.min_part < 1:
            raise ValueError(
                f"max_dimensions={self.max_dimensions} and min_part={self.min_part} are at least 1"
            )
        unknown = [name for name in self.detectors if name not in DETECTORS]
        if unknown or not self.detectors:
            raise ValueError(
                f"detectors={dict(self.detectors)}: "
                + (f"{unknown[0]!r} is none of" if unknown else "name at least one of")
                + f" {', '.join(DETECTORS)}"
            )
        if not all(0 < share < math.inf for share in self.detectors.values()):
            raise ValueError(
                f"detectors={dict(self.detectors)}: each share of alpha is over 0; "
                "leave a test out to turn it off"
            )

    @cached_property
    def joint(self) -> Joint:
        """The tests named in `detectors`, in the order of `DETECTORS`, as one."""
        k = self.max_dimensions
        known: dict[str, DriftDetector] = {
            "mmd": MMD(k),
            "hotelling": HotellingT2(k),
            "scores": ScoresKS(k),
            "probabilities": ProbabilitiesKS(),
            "predicted": PredictedClasses(),
            "statistics": StatisticsKS(),
        }
        total = sum(self.detectors.values())
        return Joint(
            tuple(
                (known[name], self.detectors[name] / total)
                for name in DETECTORS
                if name in self.detectors
            )
        )


@dataclass(frozen=True)
class Shift:
    """One test's answer; `statistic` is in the test's own unit."""

    detector: str
    statistic: float
    p_value: float


class DriftDetector(Protocol):
    """A two-sample test."""

    @property
    def name(self) -> str:
        """What the test is called in reports."""
        ...

    def detect(self, reference: Regime, batch: FeatureTable) -> Shift:
        """Test whether the batch comes from where the regime's rows came from.

        Raises:
            ValueError: if the batch is empty or not finite, or the regime has under 2 rows.

        """
        ...

    def compare(self, comparison: Comparison) -> Shift:
        """Do the same with what several tests share."""
        ...

    def floor(self, n: int, m: int) -> float:
        """Give the smallest p that m rows can have against n, at most."""
        ...


@dataclass(frozen=True, eq=False)
class Comparison:
    """A regime and a batch, and what several tests need of both, made once.

    The batch's rows are put in an order of their own, so that the order in which they came does
    not matter to tests that draw rows at random.

    Raises:
        ValueError: if the batch is empty or not finite, or the regime has under 2 rows.

    """

    reference: Regime
    batch: FeatureTable
    _whitened: dict[int, tuple[Floats, Floats]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not len(self.batch):
            raise ValueError("the batch has no rows to compare with the reference")
        self.batch.require_finite("batch")
        if len(self.reference.features) < 2:  # noqa: PLR2004
            raise ValueError(
                f"regime {self.reference.name!r} has {len(self.reference.features)} reference "
                "rows, but a comparison needs at least 2 (better ten times a batch)"
            )

    @cached_property
    def order(self) -> Integers:
        """The batch's rows, sorted by what the model saw in them."""
        table = self.batch
        seen = np.ascontiguousarray(np.concatenate([table.embedding, table.probabilities], axis=1))
        whole_rows = seen.view(np.dtype((np.void, seen.dtype.itemsize * seen.shape[1])))
        return np.asarray(np.argsort(whole_rows.ravel(), kind="stable"), dtype=np.int64)

    @property
    def pooled(self) -> bool:
        """Whether axes are fitted to both sides together; see `POOLED_UP_TO`."""
        return is_pooled(self.reference)

    def whitened(self, max_dimensions: int) -> tuple[Floats, Floats]:
        """Give both sides in the leading whitened dimensions, (n, k) and (m, k) float64."""
        if max_dimensions not in self._whitened:
            self._whitened[max_dimensions] = self._whiten(max_dimensions)
        return self._whitened[max_dimensions]

    def _whiten(self, max_dimensions: int) -> tuple[Floats, Floats]:
        theirs = self.batch.embedding[self.order]
        if not self.pooled:
            axes = self.reference.whitening.leading(max_dimensions)
            return self.reference.compared[:, :max_dimensions], axes.apply(theirs)
        ours = self.reference.features.embedding
        rows = np.concatenate([ours, theirs])
        k = max(1, len(rows) // ROWS_PER_POOLED_DIMENSION)
        axes = whiten(rows, min(max_dimensions, k))
        return axes.apply(ours), axes.apply(theirs)

    @cached_property
    def constant(self) -> Shift | None:
        """The answer, without a name, if the reference's embeddings never vary: no p in between."""
        if self.pooled or self.reference.whitening.axes.shape[1]:
            return None
        constant = self.reference.features.embedding[halves(self.reference)[1][0]]
        gap = float(np.abs(self.batch.embedding - constant).max())
        same = gap <= 1e-5 * max(1.0, float(np.abs(constant).max()))
        n, m = len(self.reference.compared), len(self.batch)
        return Shift("", 0.0 if same else gap, 1.0 if same else _fewest(n, m))


def is_pooled(reference: Regime) -> bool:
    """Whether a regime is so small that axes are fitted to it and the batch together."""
    return reference.split is None and len(reference.features) <= POOLED_UP_TO


def _fewest(n: int, m: int) -> float:
    """Give the share of one batch among all of m that n + m rows can be cut into."""
    log = math.lgamma(n + m + 1) - math.lgamma(n + 1) - math.lgamma(m + 1)
    return math.exp(-min(log, 600.0))


@lru_cache(maxsize=8)
def _membership(n: int, m: int, permutations: int) -> Floats:
    """Lay batches of m of n + m rows out as columns of zeros and ones, the last rows' own first.

    Drawn at random, the same ones for the same sizes; where there are no more than wanted, all.
    """
    if math.comb(n + m, m) <= permutations + 1:
        every = np.array(list(itertools.combinations(range(n + m), m))[:-1], dtype=np.int64)
        columns: Floats = np.zeros((n + m, len(every) + 1), dtype=np.float32)
        columns[every.reshape(-1, m), np.arange(1, len(every) + 1)[:, None]] = 1
    else:
        columns = _draw(n, m, permutations).astype(np.float32)
    columns[n:, 0] = 1
    return columns


def _draw(n: int, m: int, permutations: int) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    """Draw m of n + m rows, (n + m, 1 + permutations), the first column empty.

    Floyd's algorithm (Bentley and Floyd 1987), all draws at once: the row drawn from the first
    n + i joins, or if it is there already row n + i.
    """
    last = np.arange(n, n + m)
    rows = np.random.default_rng(0).integers(0, last, size=(permutations, m), endpoint=True)
    width = 1 + permutations
    joined = np.zeros((n + m) * width, dtype=bool)
    draws = np.arange(1, width)
    for end, row in zip(last, rows.T, strict=True):
        place = row * width + draws
        joined[np.where(joined[place], end * width + draws, place)] = True
    return joined.reshape(n + m, width)


class _Test(ABC):
    """What all tests do alike: they differ in how they compare, and in their smallest p."""

    @abstractmethod
    def compare(self, comparison: Comparison) -> Shift:
        """Do the same as `detect` with what several tests share."""

    def detect(self, reference: Regime, batch: FeatureTable) -> Shift:
        """Test whether the batch comes from where the regime's rows came from."""
        return self.compare(Comparison(reference, batch))

    def floor(self, n: int, m: int) -> float:
        """Give the smallest p that m rows can have against n, at most."""
        return _fewest(n, m)


@dataclass(frozen=True, eq=False)
class _Kernel:
    """The reference's own part of the kernel: nothing in it depends on the batch, but its size."""

    points: Floats
    scale: float
    bandwidth: float
    block: Floats
    sums: Floats
    swapped: dict[int, tuple[Floats, Floats]] = field(default_factory=dict)

    def swaps(self, m: int) -> tuple[Floats, Floats]:
        """Give the memberships (n + m, 200) and, for each, the sum over the reference's rows."""
        if m not in self.swapped:
            n = len(self.points)
            columns = _membership(n, m, PERMUTATIONS)
            inside = np.einsum("ib,ib->b", columns[:n], self.block @ columns[:n])
            if len(self.swapped) >= 8:  # noqa: PLR2004  a few sizes come again and again
                self.swapped.clear()
            self.swapped[m] = columns, inside.astype(np.float64)
        return self.swapped[m]


def _gaussian(squared: Floats, bandwidth: float) -> Floats:
    squared /= -bandwidth
    return np.asarray(np.exp(np.maximum(squared, -FARTHEST, out=squared), out=squared))


def _bandwidth(points: Floats) -> float:
    """Give twice the median squared distance between two different rows, over zero.

    Of at most 500 rows, spread evenly over the distances from the centre: which ones does not
    depend on the rows' order.
    """
    from_centre = ((points - points.mean(axis=0)) ** 2).sum(axis=1)
    step = math.ceil(len(points) / MEDIAN_ROWS)
    some = points[np.argsort(from_centre, kind="stable")[::step]]
    apart = squared_distances(some, some)[np.triu_indices(len(some), 1)]
    median = float(np.median(apart)) if apart.size else 0.0
    return 2 * median if median > 0 else float(2 * apart.mean() if apart.any() else 1.0)


def _uncertainty(features: FeatureTable) -> Floats:
    return np.log(1 - features.confidence.astype(np.float64) + SMALLEST_UNCERTAINTY)


@dataclass(frozen=True)
class MMD(_Test):
    """Maximum mean discrepancy with a Gaussian kernel, by permutation (Gretton et al. 2012).

    On the leading whitened dimensions and, weighed as three of them, the model's uncertainty
    log(1 - confidence). The kernel is exp(-d^2 / (2 s^2)) with s the median distance in the
    reference. All 199 permutations are one matrix product, of which the reference's own part is
    kept from check to check. If the batch is farther than all of them, p is the tail beyond of a
    Pearson III distribution with their mean, deviation and skewness, at most .005.
    Statistic: the unbiased estimate of the squared discrepancy, 0 if nothing changed.
    """

    max_dimensions: int = 64

    @property
    def name(self) -> str:
        """What the test is called in reports."""
        return "MMD of embeddings"

    def floor(self, n: int, m: int) -> float:
        """Give the smallest p that m rows can have against n, at most."""
        return max(_fewest(n, m), 0.0 if m >= TAIL_FROM else 1 / (PERMUTATIONS + 1))

    def compare(self, comparison: Comparison) -> Shift:
        """Do the same with what several tests share."""
        if comparison.constant is not None:
            return Shift(self.name, comparison.constant.statistic, comparison.constant.p_value)
        kernel, theirs = self._sides(comparison)
        n, m = len(kernel.points), len(theirs)
        columns, inside = kernel.swaps(m)
        across = _gaussian(squared_distances(theirs, kernel.points), kernel.bandwidth)
        own = _gaussian(squared_distances(theirs, theirs), kernel.bandwidth)
        np.fill_diagonal(own, 0)
        ours, swapped = columns[:n], columns[n:]
        mixed = np.einsum("ib,ib->b", swapped, 2 * across @ ours + own @ swapped)
        in_batch = inside + mixed.astype(np.float64)
        sums = np.concatenate(
            [kernel.sums + across.sum(axis=0), across.sum(axis=1) + own.sum(axis=1)]
        )
        touching = sums @ columns
        in_reference = sums.sum() - 2 * touching + in_batch
        values = (
            in_batch / max(1, m * (m - 1))
            + in_reference / max(1, n * (n - 1))
            - 2 * (touching - in_batch) / (n * m)
        )
        p_value = max(_beyond(float(values[0]), values[1:], m), _fewest(n, m))
        return Shift(self.name, float(values[0]), p_value)

    def _sides(self, comparison: Comparison) -> tuple[_Kernel, Floats]:
        k, reference = self.max_dimensions, comparison.reference
        ours, theirs = comparison.whitened(k)
        doubt = _uncertainty(comparison.batch)[comparison.order]
        if comparison.pooled:
            ours = np.column_stack([ours, _uncertainty(reference.features)])
            theirs = np.column_stack([theirs, doubt])
            spread = float(np.concatenate([ours[:, -1], theirs[:, -1]]).std())
            weight = np.sqrt(UNCERTAINTY_WEIGHT) / spread if spread > 0 else 0.0
            ours[:, -1] *= weight
            theirs[:, -1] *= weight
            both = np.concatenate([ours, theirs]).astype(np.float32)
            kernel = _kernel(both[: len(ours)], weight, _bandwidth(both))
            return kernel, both[len(ours) :]
        kernels = _kernels(reference)
        if k not in kernels:
            own = _uncertainty(reference.features)[halves(reference)[1]]
            weight = np.sqrt(UNCERTAINTY_WEIGHT) / own.std() if own.std() > 0 else 0.0
            points = np.column_stack([ours, weight * own]).astype(np.float32)
            kernels[k] = _kernel(points, weight, _bandwidth(points))
        kernel = kernels[k]
        return kernel, np.column_stack([theirs, kernel.scale * doubt]).astype(np.float32)


@kept_with
def _kernels(reference: Regime) -> dict[int, _Kernel]:
    """Hold a regime's own part of the kernel, by the number of dimensions; empty at first."""
    del reference
    return {}


def _kernel(points: Floats, scale: float, bandwidth: float) -> _Kernel:
    block = _gaussian(squared_distances(points, points), bandwidth)
    np.fill_diagonal(block, 0)
    return _Kernel(points, scale, bandwidth, block, block.sum(axis=1))


def _beyond(observed: float, drawn: Floats, m: int) -> float:
    """Give the share of draws that are as large, or the tail beyond if there are none."""
    spread = float(drawn.std())
    larger = int((drawn >= observed - 1e-5 * spread).sum())
    share = (1 + larger) / (len(drawn) + 1)
    if larger or m < TAIL_FROM or spread == 0:
        return share
    away = (observed - float(drawn.mean())) / spread
    skewness = max(float(stats.skew(drawn)), LEAST_SKEWNESS)
    return min(share, float(stats.pearson3.sf(away, skewness)))


@dataclass(frozen=True)
class HotellingT2(_Test):
    """Hotelling's T² between the mean embeddings, on the leading whitened dimensions.

    T²·(n+m-k-1)/(k·(n+m-2)) follows F(k, n+m-k-1) if the embeddings are normal and nothing
    changed (Hotelling 1931); with whitening fitted on other rows and k at most a tenth of the
    reference it holds its level on real embeddings from 50 rows and up to 1280 dimensions.
    Fewer than 50 rows on either side are held against 999 random batches drawn from both instead,
    which needs no normality; its p is at least .001, and at least the share of one such batch
    among all, so that one picture cannot ring at 1 % against under 99 rows.
    Statistic: T².
    """

    max_dimensions: int = 64

    @property
    def name(self) -> str:
        """What the test is called in reports."""
        return "Hotelling T² of embeddings"

    def floor(self, n: int, m: int) -> float:
        """Give the smallest p that m rows can have against n, at most."""
        drawn = 1 / (MEAN_PERMUTATIONS + 1) if min(n, m) < SMALL else 0.0
        return max(_fewest(n, m), drawn)

    def compare(self, comparison: Comparison) -> Shift:
        """Do the same with what several tests share."""
        if comparison.constant is not None:
            return Shift(self.name, comparison.constant.statistic, comparison.constant.p_value)
        ours, theirs = comparison.whitened(self.max_dimensions)
        n, m = len(ours), len(theirs)
        k = min(ours.shape[1], n + m - 2)
        if k == 0:
            return Shift(self.name, 0.0, 1.0)
        ours, theirs = ours[:, :k], theirs[:, :k]
        gap = theirs.mean(axis=0) - ours.mean(axis=0)
        scatter = _scatter(ours) + _scatter(theirs)
        # A dimension that varied only in the fitting half has no scatter here: it is left out.
        values, vectors = np.linalg.eigh(scatter / (n + m - 2))
        usable = values > 1e-10 * max(values[-1], 1e-10 * float((gap**2).sum()))
        k = int(usable.sum())
        fewest = _fewest(n, m)
        if k == 0:
            # neither side varies: they are the same or they are not
            same = float(np.abs(gap).max()) <= 1e-5  # noqa: PLR2004
            return Shift(self.name, 0.0 if same else math.inf, 1.0 if same else fewest)
        along = (gap @ vectors)[usable] ** 2 / values[usable]
        t2 = float(along.sum()) * n * m / (n + m)
        if min(n, m) < SMALL:
            return Shift(self.name, t2, _permutation_p(ours, theirs))
        f = t2 * (n + m - k - 1) / (k * (n + m - 2))
        return Shift(self.name, t2, max(fewest, float(stats.f.sf(f, k, n + m - k - 1))))


def _permutation_p(ours: Floats, theirs: Floats) -> float:
    """Give the share of batches as far from the centre, of those drawn from all rows at random.

    T² grows with the distance of a batch's mean from the common mean in the scatter of all rows,
    which does not depend on who is in the batch: so that distance orders batches as T² does.
    """
    n, m = len(ours), len(theirs)
    rows = np.concatenate([ours, theirs])
    rows = rows - rows.mean(axis=0)
    values, vectors = np.linalg.eigh(rows.T @ rows)
    usable = values > 1e-10 * values[-1]
    points = (rows @ vectors)[:, usable] / np.sqrt(values[usable])
    means = _membership(n, m, MEAN_PERMUTATIONS).T @ points.astype(np.float32)
    distances = (means**2).sum(axis=1)
    larger = int((distances[1:] >= distances[0] * (1 - 1e-5)).sum())
    return max((1 + larger) / len(distances), _fewest(n, m))


def _scatter(rows: Floats) -> Floats:
    centred = rows - rows.mean(axis=0)
    return np.asarray(centred.T @ centred)


def _farthest(ours: Floats, theirs: Floats) -> tuple[float, int, int]:
    """Find where the two distribution functions of any column are farthest apart.

    Values that only rounding may tell apart count as equal: a picture that comes again and again,
    such as a blank page, is otherwise below itself in all of the batch.

    Args:
        ours: (n, c), each column sorted.
        theirs: (m, c), each column sorted.

    Returns:
        How far, and the rows of ours and of theirs that are below.

    """
    n, m = len(ours), len(theirs)
    farthest = (0.0, 0, 0)
    for one, other in zip(ours.T, theirs.T, strict=True):
        error = ROUNDING_ERROR * np.abs(other)
        # ours only rises between two rows of theirs: so they are farthest apart at a row of theirs
        after = np.searchsorted(one, other + error, side="right")
        before = np.searchsorted(one, other - error, side="left")
        up = np.searchsorted(other, other, side="right")
        down = np.searchsorted(other, other, side="left")
        apart = np.concatenate([up / m - after / n, before / n - down / m])
        at = int(apart.argmax())
        if apart[at] > farthest[0]:
            below = np.concatenate([after, before])[at], np.concatenate([up, down])[at]
            farthest = float(apart[at]), int(below[0]), int(below[1])
    return farthest


def _kolmogorov_smirnov(ours: Floats, theirs: Floats) -> tuple[float, float]:
    """Give the largest distance over the columns, and the p of that column alone."""
    n, m = len(ours), len(theirs)
    distance, i, j = _farthest(ours, theirs)
    if n * m <= EXACT_PAIRS:
        # p depends on the distance alone, and these rows of two values have the same
        exact = stats.ks_2samp(np.arange(n) >= i, np.arange(m) >= j, method="exact")
        return distance, float(exact.pvalue)
    return distance, float(stats.kstwo.sf(distance, round(n * m / (n + m))))


def _of_many(p_value: float, tests: int, n: int, m: int) -> float:
    return min(1.0, max(tests * p_value, _fewest(n, m)))


@dataclass(frozen=True)
class ScoresKS(_Test):
    """Kolmogorov and Smirnov's test on confidence, entropy and Mahalanobis distance.

    Three tests by Bonferroni, both ways; it sees damage best. A model of values has neither
    confidence nor entropy: there the distance alone can ring. Statistic: the largest distance
    between two distribution functions, 0 to 1.
    """

    max_dimensions: int = 64

    @property
    def name(self) -> str:
        """What the test is called in reports."""
        return "KS of confidence, entropy, distance"

    def floor(self, n: int, m: int) -> float:
        """Give the smallest p that m rows can have against n, at most."""
        return 3 * _fewest(n, m)

    def compare(self, comparison: Comparison) -> Shift:
        """Do the same with what several tests share."""
        reference = comparison.reference.sorted_scores
        batch = np.sort(scores(comparison.batch), axis=0)
        far = [
            np.sort((side**2).sum(axis=1))[:, None]
            for side in comparison.whitened(self.max_dimensions)
        ]
        found = [_kolmogorov_smirnov(reference, batch), _kolmogorov_smirnov(far[0], far[1])]
        return Shift(
            self.name,
            max(distance for distance, _ in found),
            _of_many(min(p for _, p in found), 3, len(reference), len(batch)),
        )


@dataclass(frozen=True)
class ProbabilitiesKS(_Test):
    """Kolmogorov and Smirnov's test on each class's probability, or each value, by Bonferroni.

    Black-box shift detection (Lipton et al. 2018, Rabanser et al. 2019). Statistic: the largest
    distance between two distribution functions, 0 to 1.
    """

    @property
    def name(self) -> str:
        """What the test is called in reports."""
        return "KS of class probabilities"

    def compare(self, comparison: Comparison) -> Shift:
        """Do the same with what several tests share."""
        ours = comparison.reference.sorted_probabilities
        theirs = np.sort(comparison.batch.probabilities, axis=0)
        distance, p_value = _kolmogorov_smirnov(ours, theirs)
        return Shift(self.name, distance, _of_many(p_value, ours.shape[1], len(ours), len(theirs)))


@dataclass(frozen=True)
class StatisticsKS(_Test):
    """Kolmogorov and Smirnov's test on each picture statistic that varies, by Bonferroni.

    It sees a camera that changes before the model does: faint noise, another size, a colour cast.
    Statistic: the largest distance between two distribution functions, 0 to 1.
    """

    @property
    def name(self) -> str:
        """What the test is called in reports."""
        return "KS of picture statistics"

    def compare(self, comparison: Comparison) -> Shift:
        """Do the same with what several tests share."""
        known = comparison.reference.sorted_statistics
        seen = comparison.batch.statistics
        pairs = [
            (ours, np.sort(seen[name].to_numpy(dtype=np.float64)))
            for name, ours in known.items()
            if name in seen.columns
        ]
        varying = [
            (ours, theirs)
            for ours, theirs in pairs
            if min(ours[0], theirs[0]) < max(ours[-1], theirs[-1])
        ]
        if not varying:
            return Shift(self.name, 0.0, 1.0)
        ours, theirs = (np.column_stack(side) for side in zip(*varying, strict=True))
        distance, p_value = _kolmogorov_smirnov(ours, theirs)
        p_value = _of_many(p_value, ours.shape[1], len(ours), len(theirs))
        return Shift(self.name, distance, p_value)


@dataclass(frozen=True)
class PredictedClasses(_Test):
    """Test that the predicted classes have the same shares: Pearson's chi-squared.

    Rare classes are put together until each group has 5 expected rows on both sides. Under 50
    rows, classes stay as they are and the statistic is held against 1,999 random batches drawn
    from all rows instead. Statistic: chi-squared.

    Where any number of labels is answered, each one's share is tested by itself, by Fisher's exact
    test and Bonferroni; statistic: the largest difference of shares. A model of values predicts no
    class, and p is 1.
    """

    @property
    def name(self) -> str:
        """What the test is called in reports."""
        return "chi-squared of predicted classes"

    def floor(self, n: int, m: int) -> float:
        """Give the smallest p that m rows can have against n, at most."""
        drawn = 1 / (COUNT_PERMUTATIONS + 1) if min(n, m) < COUNTED else 0.0
        return max(_fewest(n, m), drawn)

    def compare(self, comparison: Comparison) -> Shift:
        """Do the same with what several tests share."""
        reference, batch = comparison.reference, comparison.batch
        if batch.kind is not Kind.SINGLE_LABEL:
            return Shift(self.name, *_fisher(reference.features.said[reference.read], batch.said))
        classes = batch.probabilities.shape[1]
        ours = np.bincount(reference.features.predicted[reference.read], minlength=classes)
        theirs = np.bincount(batch.predicted, minlength=classes)
        both = ours + theirs
        n, m = int(ours.sum()), int(theirs.sum())
        if min(n, m) < COUNTED:
            seen = both > 0
            if seen.sum() < 2:  # noqa: PLR2004
                return Shift(self.name, 0.0, 1.0)
            rng = np.random.default_rng(0)
            drawn = rng.multivariate_hypergeometric(both[seen], m, size=COUNT_PERMUTATIONS)
            statistic = float(_chisquared_distances(theirs[None, seen], both[seen])[0])
            larger = (_chisquared_distances(drawn, both[seen]) >= statistic * (1 - 1e-9)).sum()
            p_value = float(1 + larger) / (COUNT_PERMUTATIONS + 1)
            return Shift(self.name, statistic, max(p_value, _fewest(n, m)))
        group = _groups(both, EXPECTED * (n + m) / min(n, m))
        both, theirs = np.bincount(group, both), np.bincount(group, theirs)
        if len(both) < 2:  # noqa: PLR2004
            return Shift(self.name, 0.0, 1.0)
        statistic = float(_chisquared_distances(theirs[None], both)[0])
        p_value = float(stats.chi2.sf(statistic, len(both) - 1))
        return Shift(self.name, statistic, max(p_value, _fewest(n, m)))


def _fisher(
    ours: np.ndarray[tuple[int, ...], np.dtype[np.bool_]],
    theirs: np.ndarray[tuple[int, ...], np.dtype[np.bool_]],
) -> tuple[float, float]:
    """Compare the share of each column, (n, c) and (m, c): the largest difference, and a joint p.

    Each is Fisher's exact test, the smaller tail doubled.
    """
    n, m, labels = len(ours), len(theirs), ours.shape[1]
    if not labels:
        return 0.0, 1.0
    counts = theirs.sum(axis=0)
    drawn = stats.hypergeom(n + m, ours.sum(axis=0) + counts, m)
    tail = np.minimum(drawn.cdf(counts), drawn.sf(counts - 1))
    difference = np.abs(theirs.mean(axis=0) - ours.mean(axis=0)).max()
    return float(difference), _of_many(2 * float(tail.min()), labels, n, m)


def _chisquared_distances(theirs: Floats | Integers, both: Floats | Integers) -> Floats:
    """Give the statistic of batches (b, c) out of `both` (c,), with expectations from `both`."""
    total, m = both.sum(), theirs[0].sum()
    expected = both * m / total
    return np.asarray(((theirs - expected) ** 2 / expected).sum(axis=1) * total / (total - m))


def _groups(both: Integers, least: float) -> Integers:
    """Put classes together, the most frequent first, until each group has at least so many rows.

    It depends on what both sides have in all, not on who has it: so it favours neither.
    """
    group = np.empty(len(both), dtype=np.int64)
    current, filled = 0, 0
    order = np.argsort(-both, kind="stable")
    for place, i in enumerate(order):
        group[i] = current
        filled += int(both[i])
        if filled >= least and both[order[place + 1 :]].sum() >= least:
            current, filled = current + 1, 0
    return group


@dataclass(frozen=True)
class Joint(_Test):
    """Several tests that share one false-alarm rate: p = min(1, min(p_i / w_i)).

    By Bonferroni's inequality it rings no more often than stated whatever the tests have in
    common. Statistic: the smallest p_i / w_i, before it is cut at 1.

    Args:
        members: tests and their shares of the false-alarm rate, which sum to one.

    Raises:
        ValueError: if they do not.

    """

    members: tuple[tuple[DriftDetector, float], ...]

    def __post_init__(self) -> None:
        weights = [weight for _, weight in self.members]
        if min(weights, default=0) <= 0 or abs(sum(weights) - 1) > 1e-9:  # noqa: PLR2004
            raise ValueError(f"the weights of a joint test are positive and sum to one: {weights}")

    @property
    def name(self) -> str:
        """What the test is called in reports."""
        return "joint"

    def shifts(self, reference: Regime, batch: FeatureTable) -> tuple[Shift, ...]:
        """Give each member's own answer, in order."""
        comparison = Comparison(reference, batch)
        return tuple(detector.compare(comparison) for detector, _ in self.members)

    def combine(self, shifts: tuple[Shift, ...]) -> Shift:
        """Put the members' answers together."""
        smallest = min(
            shift.p_value / weight for shift, (_, weight) in zip(shifts, self.members, strict=True)
        )
        return Shift(self.name, smallest, min(1.0, smallest))

    def compare(self, comparison: Comparison) -> Shift:
        """Do the same with what several tests share."""
        return self.combine(tuple(detector.compare(comparison) for detector, _ in self.members))

    def floor(self, n: int, m: int) -> float:
        """Give the smallest p that m rows can have against n, at most."""
        return min(1.0, *(detector.floor(n, m) / weight for detector, weight in self.members))


@dataclass(frozen=True)
class Part:
    """The samples of a batch that are nearest to one regime, tested against it.

    `share` is of the batch; `p_value` is the joint test's, not corrected for the other parts.
    """

    regime: str
    n: int
    share: float
    p_value: float
    shifts: tuple[Shift, ...]


@dataclass(frozen=True)
class Detection:
    """Whether a batch differs from everything its version was judged on.

    `p_value` is corrected for the number of parts; `regime` is the one that most of the batch
    belongs to; `top_columns` says in words which picture statistics and classes moved most, and
    is empty when none moved more than chance moves them.
    """

    alarm: bool
    p_value: float
    alpha: float
    parts: tuple[Part, ...]
    regime: str
    top_columns: tuple[str, ...]

    @property
    def distance(self) -> float | None:
        """How far the batch is from its regimes, 0 to 1.414; None if no kernel compared them.

        The maximum mean discrepancy, whose square is the mean of the parts' over the samples. It
        does not grow with the batch, as evidence does.
        """
        found = [
            part.share * min(2.0, max(0.0, shift.statistic))
            for part in self.parts
            for shift in part.shifts
            if shift.detector == MMD().name
        ]
        return math.sqrt(sum(found)) if found else None


def detect_drift(
    reference: Reference, batch: FeatureTable, settings: DetectionSettings
) -> Detection:
    """Test each part of a batch against the regimes that it may have come from.

    A part's p is the largest over its candidates (see `reference.portions`), so a batch of known
    worlds stays at alpha whichever of them it came from. At alpha = .05, 64-d, two regimes of 600
    rows, pure and mixed batches of 50, 100 and 400 (100 each) rang in 0-.03 of cases where the
    second regime is the same world again, .01-.09 where it is half a world 6 or 15 standard
    deviations off, and .03-.05 where it is all new and 6 off. Known limits, at 400 rows only:
    worlds that overlap (3 off), where the shares of an unequal mixture are not among the candidates
    (.25 at 90 to 10), and half/half regimes of overlapping worlds (.08).

    Raises:
        ValueError: if the batch cannot be compared with the reference, or a regime is too small:
            for several regimes, or for a batch of this size ever to ring at alpha.

    """
    joint = settings.joint
    parts, cut = [], portions(reference, batch, settings.min_part)
    _require_level(cut, settings)
    for portion in cut:
        rows = batch.take(portion.rows)
        tested = [joint.shifts(candidate, rows) for candidate in portion.candidates]
        shifts = max(tested, key=lambda answers: joint.combine(answers).p_value)
        parts.append(
            Part(
                regime=reference.worlds[portion.world].name,
                n=len(rows),
                share=len(rows) / len(batch),
                p_value=joint.combine(shifts).p_value,
                shifts=shifts,
            )
        )
    p_value = min(1.0, len(parts) * min(part.p_value for part in parts))
    return Detection(
        alarm=p_value <= settings.alpha,
        p_value=p_value,
        alpha=settings.alpha,
        parts=tuple(parts),
        regime=max(parts, key=lambda part: part.n).regime,
        top_columns=moved_columns(reference.classes, batch, cut),
    )


def _require_level(cut: tuple[Portion, ...], settings: DetectionSettings) -> None:
    """Refuse a reference against which no part of the batch could ring, whatever is in it."""
    joint, alpha = settings.joint, settings.alpha
    homes = [(portion.home, len(portion.rows)) for portion in cut]
    least = [joint.floor(_compared(home), m) for home, m in homes]
    if len(cut) * min(least) <= alpha:
        return
    home, m = homes[int(np.argmax([m for _, m in homes]))]
    needed = _compared(home)
    while len(cut) * joint.floor(needed, m) > alpha:
        needed = math.ceil(1.02 * needed) + 1
        if needed > MOST_NEEDED:
            raise ValueError(
                f"a batch of {m} rows cannot ring at alpha={alpha:g} with the tests "
                f"{', '.join(settings.detectors)}, however large the reference is: raise alpha, "
                "check larger batches, or use more tests"
            )
    # above this number only half of the rows are compared
    needed = needed if needed <= POOLED_UP_TO else 2 * needed
    raise ValueError(
        f"regime {home.name!r} has {len(home.features)} reference rows, too few for alpha="
        f"{alpha:g}: a batch of {m} rows has a p of {len(cut) * max(least):.2g} at the smallest; "
        f"hold out at least {needed} samples, raise alpha, or check larger batches"
    )


def _compared(regime: Regime) -> int:
    return len(regime.features) if is_pooled(regime) else len(halves(regime)[1])
