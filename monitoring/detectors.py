"""Has the data changed? Two-sample tests of a batch against the reference of a version."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from scipy import stats

from monitoring.reference import MIN_PART, Portion, Reference, Regime, halves, portions

if TYPE_CHECKING:
    from monitoring.features import FeatureTable, Floats

SMALL_BATCH = 20
"""Below it the F distribution is too hopeful on real embeddings: at 1 % it rang on .06 to .10 of
quiet batches of 1, .02 to .03 of 5 and 10, and on .003 to .017 of 20 (MNIST, 64-d, 300 each)."""
PERMUTATIONS = 999
MOVED_STANDARD_ERRORS = 3.0
MAX_COLUMNS_NAMED = 5


@dataclass(frozen=True)
class DetectionSettings:
    """How a batch is compared with the reference.

    Args:
        alpha: share of batches from the reference's own worlds that ring.
        max_dimensions: leading whitened dimensions tested at most (measured: 32; 8 lose power).
        min_part: rows that a world's part of a batch needs, or it goes with the largest part.

    Raises:
        ValueError: if a value is out of its range.

    """

    alpha: float = 0.01
    max_dimensions: int = 32
    min_part: int = MIN_PART

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 1:
            raise ValueError(f"alpha={self.alpha} is no share between 0 and 1")
        if self.max_dimensions < 1 or self.min_part < 1:
            raise ValueError(
                f"max_dimensions={self.max_dimensions} and min_part={self.min_part} are at least 1"
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
        """Test whether the batch comes from where the regime's compare half came from.

        Raises:
            ValueError: if the batch is empty or not finite, or the regime has under 20 rows.

        """
        ...


@dataclass(frozen=True)
class HotellingT2:
    """Hotelling's T² between the mean embeddings, on the leading whitened dimensions.

    T²·(n+m-k-1)/(k·(n+m-2)) follows F(k, n+m-k-1) if the embeddings are normal and nothing
    changed (Hotelling 1931); with whitening fitted on other rows and k at most a tenth of the
    reference it holds its level on real embeddings from 50 rows and up to 1280 dimensions.
    A batch of fewer than 20 rows is held against 999 random batches drawn from it and
    the reference instead, which needs no normality; its p is at least .001, and at least the share
    of one such batch among all, so that one picture cannot ring against under 200 reference rows.
    Statistic: T².
    """

    max_dimensions: int = 32

    @property
    def name(self) -> str:
        """What the test is called in reports."""
        return "Hotelling T² of embeddings"

    def detect(self, reference: Regime, batch: FeatureTable) -> Shift:
        """Test whether the mean embedding moved; see DriftDetector."""
        _require_rows(batch)
        ours = reference.compared[:, : self.max_dimensions]
        theirs = reference.whitening.apply(batch.embedding)[:, : self.max_dimensions]
        n, m = len(ours), len(theirs)
        k = min(ours.shape[1], n + m - 2)
        if k == 0:
            return self._of_a_constant(reference, batch)
        ours, theirs = ours[:, :k], theirs[:, :k]
        gap = theirs.mean(axis=0) - ours.mean(axis=0)
        scatter = _scatter(ours) + _scatter(theirs)
        # A dimension that varied only in the fitting half has no scatter here: it is left out.
        values, vectors = np.linalg.eigh(scatter / (n + m - 2))
        usable = values > 1e-10 * values[-1]
        k = int(usable.sum())
        if k == 0:
            return self._of_a_constant(reference, batch)
        along = (gap @ vectors)[usable] ** 2 / values[usable]
        t2 = float(along.sum()) * n * m / (n + m)
        if m < SMALL_BATCH:
            return Shift(self.name, t2, _permutation_p(ours, theirs))
        f = t2 * (n + m - k - 1) / (k * (n + m - 2))
        return Shift(self.name, t2, float(stats.f.sf(f, k, n + m - k - 1)))

    def _of_a_constant(self, reference: Regime, batch: FeatureTable) -> Shift:
        """Compare with embeddings that never vary: any other value is a change."""
        _, compare = halves(reference)
        constant = reference.features.embedding[compare[0]]
        gap = float(np.abs(batch.embedding - constant).max())
        same = gap <= 1e-5 * max(1.0, float(np.abs(constant).max()))
        return Shift(self.name, 0.0 if same else gap, 1.0 if same else 0.0)


def _permutation_p(ours: Floats, theirs: Floats) -> float:
    """Give the share of batches as far from the centre, of those drawn from all rows at random.

    T² grows with the distance of a batch's mean from the common mean in the scatter of all rows,
    which does not depend on who is in the batch: so that distance orders batches as T² does.
    """
    n, m = len(ours), len(theirs)
    # in an order of their own, so that the order in which the samples came does not matter
    rows = np.concatenate([theirs[np.lexsort(theirs.T)], ours])
    rows = rows - rows.mean(axis=0)
    values, vectors = np.linalg.eigh(rows.T @ rows)
    usable = values > 1e-10 * values[-1]
    points = (rows @ vectors)[:, usable] / np.sqrt(values[usable])
    rng = np.random.default_rng(0)
    drawn = [rng.choice(n + m, size=m, replace=False, shuffle=False) for _ in range(PERMUTATIONS)]
    distances = (points[np.stack(drawn)].mean(axis=1) ** 2).sum(axis=1)
    observed = float((points[:m].mean(axis=0) ** 2).sum())
    return float(1 + (distances >= observed * (1 - 1e-9)).sum()) / (PERMUTATIONS + 1)


def _scatter(rows: Floats) -> Floats:
    centred = rows - rows.mean(axis=0)
    return np.asarray(centred.T @ centred)


@dataclass(frozen=True)
class ConfidenceKS:
    """Kolmogorov and Smirnov's test on the confidence, both ways; it sees damage best.

    Statistic: the largest distance between the two distribution functions, 0 to 1.
    """

    @property
    def name(self) -> str:
        """What the test is called in reports."""
        return "KS of confidence"

    def detect(self, reference: Regime, batch: FeatureTable) -> Shift:
        """Test whether the confidence is distributed as it was; see DriftDetector."""
        _require_rows(batch)
        _, compare = halves(reference)
        result = stats.ks_2samp(reference.features.confidence[compare], batch.confidence)
        return Shift(self.name, float(result.statistic), float(result.pvalue))


@dataclass(frozen=True)
class Joint:
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
        return tuple(detector.detect(reference, batch) for detector, _ in self.members)

    def combine(self, shifts: tuple[Shift, ...]) -> Shift:
        """Put the members' answers together."""
        smallest = min(
            shift.p_value / weight for shift, (_, weight) in zip(shifts, self.members, strict=True)
        )
        return Shift(self.name, smallest, min(1.0, smallest))

    def detect(self, reference: Regime, batch: FeatureTable) -> Shift:
        """Test whether anything that a member sees has changed; see DriftDetector."""
        return self.combine(self.shifts(reference, batch))


def _require_rows(batch: FeatureTable) -> None:
    if not len(batch):
        raise ValueError("the batch has no rows to compare with the reference")
    batch.require_finite("batch")


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
        ValueError: if the batch cannot be compared with the reference, or a regime is too small.

    """
    joint = Joint(((HotellingT2(settings.max_dimensions), 0.5), (ConfidenceKS(), 0.5)))
    parts, cut = [], portions(reference, batch, settings.min_part)
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
        top_columns=_moved_columns(reference.classes, batch, cut),
    )


def _moved_columns(
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
    """Lay picture statistics, confidence and one column a predicted class side by side."""
    statistics = features.statistics[common]
    is_class = features.predicted[:, None] == np.arange(len(classes))
    values = np.column_stack(
        [statistics.to_numpy(dtype=np.float64), features.confidence, is_class.astype(np.float64)]
    )
    names = [str(column) for column in statistics.columns]
    return values, [*names, "confidence", *(f"'{name}'" for name in classes)]


def _figure(value: float, decimals: int = 2) -> str:
    text = f"{value:.{decimals}f}"
    return text[1:] if text.startswith("0.") else text
