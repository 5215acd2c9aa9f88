"""How accurate is the champion on a batch without labels, and how good was that estimate?"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import stats

from monitoring.features import ROUNDING_ERROR, Kind
from monitoring.kept import kept_with
from monitoring.reference import NO_LABEL, Reference, Regime, portions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from monitoring.features import FeatureTable, Floats, Integers
    from monitoring.reference import Mask

ANGLE_QUANTILE = 0.96
"""Of the angle between a reference row and the nearest other one of the class it is said to be.

Measured on MNIST (44 kinds of batches) and on PACS: the mean absolute error moves little from .95
to .97 (.030 to .033; .09 to .06 when all of a batch of PACS is foreign). Angles (.030) beat
distances (.033) and distances in whitened axes (.036): shown something foreign, a network often
answers with a small embedding, which is near everything.
"""
DISTANCE_QUANTILE = 0.995
"""Angles are blind to an embedding that only grew; ordinary samples should not pay for that."""
MAX_INDEXED = 2000
"""Rows per world, for the time it takes; with 500 the error on MNIST was .028 in place of .022."""
MIN_OF_CLASS = 5
"""Of fewer reference rows the nearest says little, so those of all classes are looked at."""
MAX_NOVELTY = 0.25
"""Measured on PACS: with a quarter of a batch foreign the estimate is 3 points off, with all 8, and
every wholly foreign batch is marked, no mildly corrupted one."""
UNSURE_OF_FALL = 0.5
"""How far an estimated fall may be wrong, for the interval.

With 0, .77 of the intervals hold the truth on MNIST's shifts and .91 on PACS; with .25, .89 and 1;
with .5, .94 and 1, and a quiet batch's interval is a tenth wider at most.
"""
Z_95 = 1.959963984540054


@dataclass(frozen=True)
class Estimate:
    """An estimate of a batch's accuracy, made without labels.

    Args:
        value: estimated share of right answers.
        low: lower end of its 95 % interval: chance, and half of the estimated fall.
        high: upper end.
        reference: accuracy on the labelled reference, its regimes mixed as in the batch.
        novelty: share of samples that are foreign, beyond what the reference's own rows would show.
        believable: False when more than a quarter is novel, and of a model of values, whose `value`
            is the reference's: then only labels tell.
        reference_n: labels of one regime that would tell `reference` as closely; 0 if not known.

    """

    value: float
    low: float
    high: float
    reference: float
    novelty: float
    believable: bool
    reference_n: int = 0


def estimate_accuracy(reference: Reference, batch: FeatureTable) -> Estimate:
    """Estimate accuracy by thresholded confidence, less what is unlike anything known.

    By average thresholded confidence (ATC, Garg et al. 2022), the share of labelled reference rows
    that are at least as confident as a threshold equals their accuracy; such samples of the batch
    are taken to be right. A network is confident about foreign pictures too, so a sample far from
    the reference rows of its predicted class (as in deep nearest neighbours, Sun et al. 2022) is
    taken to be right by chance, at the odds that it is foreign: how much more of the batch than of
    the reference lies that far out. Each sample is judged by the world it is nearest to (a world
    without labels by all labelled rows together), so a known world in which the model is weaker is
    no fall. Where any number of labels is answered, a sample is right when all are, with the
    product of their probabilities as confidence. A model of values tells no confidence: nothing is
    estimated then.

    Mean absolute error, measured: 1-2 points without shift, 2 over MNIST's shifts (ATC alone: 8),
    8 when all of a batch of PACS is foreign. A novel class is found in part only: with a tenth,
    a fifth or half of a batch of one class never seen, the estimate is 5, 9 or 23 points too rosy,
    and the interval mostly misses.

    Raises:
        ValueError: if no reference row has a label, or the batch cannot be compared with it.

    """
    cut = portions(reference, batch)
    pooled = _labelled(reference.regimes)
    if not pooled[0].size:
        raise ValueError(
            "no row of the reference has a label, so accuracy cannot be estimated: "
            "build the reference from labelled held-out samples"
        )
    k, kind = len(reference.classes), reference.kind
    chance = 0.5**k if kind is Kind.MULTI_LABEL else 1 / k
    value = accuracy = variance = novelty = per_label = 0.0
    for portion in cut:
        regime, rows = portion.home, portion.rows
        share = len(rows) / len(batch)
        confidence, correct = _labelled((regime,)) if regime.labelled.size else pooled
        right = float(correct.mean())
        threshold = _Threshold.fit(confidence, right)
        kept = threshold.keeps(confidence)
        believed = threshold.keeps(batch.confidence[rows])
        index = _index(reference.worlds[portion.world])
        far = index.is_far(batch.embedding[rows], batch.predicted[rows])
        foreign = max(0.0, (float(far.mean()) - index.expected) / (1 - index.expected))
        odds = far * (foreign / max(float(far.mean()), foreign, 1 / len(rows)))
        by_chance = min(right, chance)
        part_value = float((believed * (1 - odds) + by_chance * odds).mean())
        # What the estimate gets wrong, sample by sample: it can't be better than the disagreement
        # of "confident" and "right" in the reference, nor than two binomial shares.
        disagreement = _smoothed(float(np.abs(kept - correct).sum()), len(correct))
        binomial = max(
            p * (1 - p)
            for p in (
                _smoothed(part_value * len(rows), len(rows)),
                _smoothed(float(correct.sum()), len(correct)),
            )
        )
        spread = max(disagreement, binomial)
        value += share * part_value
        accuracy += share * right
        per_label += share**2 / len(correct)
        variance += share**2 * spread * (1 / len(rows) + 1 / len(correct))
        novelty += share * foreign
    reference_n = math.floor(1 / per_label + 1e-9)
    if kind is Kind.REGRESSION:
        return Estimate(
            accuracy, 0.0, 1.0, accuracy, novelty, believable=False, reference_n=reference_n
        )
    # A share of n rows comes in steps of 1/n: half a step is Yates's correction.
    margin = Z_95 * math.sqrt(variance) + 0.5 / len(batch)
    margin += UNSURE_OF_FALL * max(0.0, accuracy - value)
    return Estimate(
        value=value,
        low=max(0.0, value - margin),
        high=min(1.0, value + margin),
        reference=accuracy,
        novelty=novelty,
        believable=novelty <= MAX_NOVELTY,
        reference_n=reference_n,
    )


def _labelled(
    regimes: tuple[Regime, ...],
) -> tuple[Floats, np.ndarray[tuple[int, ...], np.dtype[np.bool_]]]:
    confidence = [regime.features.confidence[regime.labelled] for regime in regimes]
    return np.concatenate(confidence), np.concatenate([regime.correct for regime in regimes])


def _smoothed(successes: float, n: int) -> float:
    """Give a share that is never 0 or 1, as in Agresti and Coull's interval."""
    return (successes + 2) / (n + 4)


@dataclass(frozen=True)
class _Threshold:
    """Keep what is above `at`, and the share `of_ties` of what is there but for rounding.

    Softmax in float32 saturates at 1, so ties at the threshold are the rule, not the exception; and
    a picture that comes again and again, such as a blank page, is in one batch a little above it
    and in the next a little below.
    """

    at: float
    of_ties: float

    @classmethod
    def fit(cls, confidence: Floats, accuracy: float) -> _Threshold:
        kept = accuracy * len(confidence)
        descending = np.sort(confidence)[::-1]
        at = float(descending[max(0, math.ceil(kept - 1e-9) - 1)])
        unsure = cls(at, 0.0)
        above, ties = float(unsure.keeps(confidence).sum()), float(unsure.ties(confidence).sum())
        return cls(at, min(1.0, max(0.0, (kept - above) / ties)))

    def ties(self, confidence: Floats) -> Mask:
        """Say which ones only rounding tells from the threshold."""
        return np.asarray(np.abs(confidence - self.at) <= ROUNDING_ERROR * self.at)

    def keeps(self, confidence: Floats) -> Floats:
        """Give 1 for kept, 0 for not, `of_ties` at the threshold."""
        kept = np.where(self.ties(confidence), self.of_ties, confidence > self.at)
        return np.asarray(kept, dtype=np.float64)


@dataclass(frozen=True, eq=False)
class _Index:
    """Reference rows by class, and how near each is to another of the class it is said to be.

    Args:
        directions: (m, d) float32, the rows at unit length, those of a class together.
        lengths: (m,) float32.
        of_class: for each class, which of the rows to compare with.
        angle_limit: cosine distance beyond which a sample is far.
        distance_limit: squared distance beyond which it is far as well.
        expected: share of the reference's own world beyond either limit.

    """

    directions: Floats
    lengths: Floats
    of_class: tuple[slice, ...]
    angle_limit: float = math.inf
    distance_limit: float = math.inf
    expected: float = 0.0

    @classmethod
    def fit(cls, regime: Regime) -> _Index:
        rows = np.arange(len(regime.labels))
        if len(rows) > MAX_INDEXED:
            rows = np.random.default_rng(0).choice(rows, MAX_INDEXED, replace=False)
        labels = regime.labels[rows]
        known = regime.features.predicted[rows]
        if regime.features.kind is Kind.SINGLE_LABEL:
            known = np.where(labels == NO_LABEL, known, labels)
        order = np.argsort(known, kind="stable")
        rows, known = rows[order], known[order]
        ends = np.searchsorted(known, np.arange(regime.features.probabilities.shape[1] + 1))
        of_class = tuple(
            slice(int(start), int(end)) if end - start >= MIN_OF_CLASS else slice(0, len(rows))
            for start, end in itertools.pairwise(ends)
        )
        directions, lengths = _polar(regime.features.embedding[rows])
        index = cls(directions, lengths, of_class)
        angle, distance = index.nearest(
            directions, lengths, regime.features.predicted[rows], itself=True
        )
        # the slack is for rows that are all alike, where rounding decides which zero is larger
        slack = 1e-5 * float(np.square(lengths).mean())
        limits = (
            float(np.quantile(angle, ANGLE_QUANTILE, method="higher")) + 1e-5,
            float(np.quantile(distance, DISTANCE_QUANTILE, method="higher")) + slack,
        )
        beyond = int(((angle > limits[0]) | (distance > limits[1])).sum())
        # of m + 1 rows that are alike, the new one is as likely to be any of them
        return cls(directions, lengths, of_class, *limits, (beyond + 1) / (len(rows) + 1))

    def is_far(self, embedding: Floats, predicted: Integers) -> Mask:
        """Say which samples lie beyond the limits, (n,)."""
        angle, distance = self.nearest(*_polar(embedding), predicted)
        return np.asarray(~((angle <= self.angle_limit) & (distance <= self.distance_limit)))

    def nearest(
        self, directions: Floats, lengths: Floats, predicted: Integers, *, itself: bool = False
    ) -> tuple[Floats, Floats]:
        """Give the least cosine distance and squared distance to the predicted class, (n,) each.

        With `itself`, the samples are the index's own rows, and none is its own neighbour.
        """
        angle, distance = np.empty((2, len(directions)), dtype=np.float32)
        for c in np.unique(predicted):
            rows, others = np.flatnonzero(predicted == c), self.of_class[c]
            own, theirs = lengths[rows, None], self.lengths[others]
            cosine = directions[rows] @ self.directions[others].T
            squared = theirs * (theirs - 2 * own * cosine)
            if itself:
                same = rows[:, None] == np.arange(len(lengths))[others]
                cosine[same], squared[same] = -np.inf, np.inf
            angle[rows] = 1 - cosine.max(axis=1)
            distance[rows] = lengths[rows] ** 2 + squared.min(axis=1)
        return angle, distance


def _polar(embedding: Floats) -> tuple[Floats, Floats]:
    """Give directions (n, d) and lengths (n,) in float32; zero has no direction: zeros."""
    embedding = np.asarray(embedding, dtype=np.float32)
    lengths = np.sqrt(np.einsum("nd,nd->n", embedding, embedding))
    return embedding / np.where(lengths > 0, lengths, 1)[:, None], lengths


@kept_with
def _index(world: Regime) -> _Index:
    """Index a world, which is asked for with every batch."""
    return _Index.fit(world)


@dataclass(frozen=True)
class Settlement:
    """What labels said about an estimate.

    Args:
        n: labelled samples.
        accuracy: share of them that the model got right.
        low: lower end of Clopper and Pearson's exact 95 % interval.
        high: upper end.
        estimated: the estimate that is settled.
        error: `estimated - accuracy`; positive when it was too rosy.

    """

    n: int
    accuracy: float
    low: float
    high: float
    estimated: float
    error: float


def settle(estimate_value: float, answers: Mask) -> Settlement:
    """Hold an estimate against labels that came later.

    Args:
        estimate_value: estimated accuracy; NaN where nothing could be estimated.
        answers: (n,), which labelled samples were answered rightly.

    Raises:
        ValueError: if there is none.

    """
    n, right = len(answers), int(answers.sum())
    if n == 0:
        raise ValueError("no sample has a label, so nothing can be settled")
    interval = stats.binomtest(right, n).proportion_ci(confidence_level=0.95, method="exact")
    accuracy = right / n
    return Settlement(
        n=n,
        accuracy=accuracy,
        low=float(interval.low),
        high=float(interval.high),
        estimated=estimate_value,
        error=estimate_value - accuracy,
    )


@dataclass(frozen=True)
class Track:
    """How good the estimates were on the batches that labels settled, each weighted by its labels.

    Args:
        n_batches: settled batches.
        n_labels: their labels.
        bias: mean error; positive when the estimates were too rosy.
        mean_absolute_error: mean size of the errors.
        bias_by_chance: the bias that so few labels make at most, in 95 of 100 cases, if there is
            none; the errors are held against samples, not against the truth.
        error_by_chance: the mean absolute error that so few labels make at most on average.

    """

    n_batches: int
    n_labels: int
    bias: float
    mean_absolute_error: float
    bias_by_chance: float
    error_by_chance: float

    @property
    def words(self) -> str:
        """One or two sentences for a person."""
        if not self.n_batches:
            return "No batch has been settled by labels yet, so how good the estimates are is open."
        batches = "1 settled batch" if self.n_batches == 1 else f"{self.n_batches} settled batches"
        labels = "1 label" if self.n_labels == 1 else f"{self.n_labels} labels"
        size = f"{abs(self.bias):.2f}"
        way = "too rosy" if self.bias > 0 else "too dark"
        said = "on target" if float(size) == 0 else f"{size} {way}"
        chance = "more than" if abs(self.bias) > self.bias_by_chance else "no more than"
        return (
            f"On {batches} ({labels}) the estimate was {said} on average (mean absolute error "
            f"{self.mean_absolute_error:.2f}). That is {chance} the chance of which samples were "
            f"labelled can explain (up to {self.bias_by_chance:.2f}; it alone makes a mean "
            f"absolute error of up to {self.error_by_chance:.2f})."
        )


def track(errors: Sequence[tuple[float, int]]) -> Track:
    """Sum up how good past estimates were.

    Args:
        errors: for each settled batch `Settlement.error` and `Settlement.n`.

    Raises:
        ValueError: if an error is not finite or settled by no label.

    """
    for error, n in errors:
        if not math.isfinite(error) or n < 1:
            raise ValueError(
                f"an error of {error} on {n} labels tells nothing: track what `settle` returned"
            )
    total = sum(n for _, n in errors)
    if not total:
        return Track(0, 0, 0.0, 0.0, 0.0, 0.0)
    # A share of n samples has a standard deviation of at most .5 / sqrt(n), and a normal variable a
    # mean absolute value of sqrt(2 / pi) standard deviations.
    return Track(
        n_batches=len(errors),
        n_labels=total,
        bias=sum(n * error for error, n in errors) / total,
        mean_absolute_error=sum(n * abs(error) for error, n in errors) / total,
        bias_by_chance=Z_95 * 0.5 / math.sqrt(total),
        error_by_chance=sum(math.sqrt(n) for _, n in errors) * 0.5 * math.sqrt(2 / math.pi) / total,
    )


@dataclass(frozen=True)
class Pooled:
    """What labels told of several batches together.

    Args:
        n_batches: how many.
        n: labels.
        accuracy: on them.
        high: upper end of the exact 95 % interval of `accuracy`.
        estimated: what had been estimated of the batches, each weighted by its labels.
        off_by_chance: how far `estimated - accuracy` is off at most by which samples were labelled,
            in 95 of 100 cases.

    """

    n_batches: int
    n: int
    accuracy: float
    high: float
    estimated: float
    off_by_chance: float

    @property
    def off(self) -> float:
        """How much too rosy the estimates were; negative when they were too dark."""
        return self.estimated - self.accuracy


def pool(settled: Sequence[tuple[float, float, int]]) -> Pooled | None:
    """Sum up batches that labels settled; None if there are none.

    Args:
        settled: for each `Settlement.accuracy`, `Settlement.error` and `Settlement.n`.

    Raises:
        ValueError: if an error is not finite or settled by no label.

    """
    if not settled:
        return None
    errors = track([(error, n) for _, error, n in settled])
    right = sum(round(accuracy * n) for accuracy, _, n in settled)
    n = errors.n_labels
    interval = stats.binomtest(right, n).proportion_ci(confidence_level=0.95, method="exact")
    return Pooled(
        n_batches=errors.n_batches,
        n=n,
        accuracy=right / n,
        high=float(interval.high),
        estimated=right / n + errors.bias,
        off_by_chance=errors.bias_by_chance,
    )
