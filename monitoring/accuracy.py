"""How accurate is the champion on a batch without labels, and how good was that estimate?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import stats

from monitoring.reference import NO_LABEL, Reference, Regime, portions

if TYPE_CHECKING:
    from monitoring.features import FeatureTable, Floats, Integers

NOVELTY_DIMENSIONS = 32
NOVELTY_QUANTILE = 0.99
MAX_NOVELTY = 0.25
"""With a quarter of a batch foreign the estimate is off by 4-5 points, with all of it by 8-15."""
Z_95 = 1.959963984540054


@dataclass(frozen=True)
class Estimate:
    """An estimate of a batch's accuracy, made without labels.

    Args:
        value: estimated share of right answers.
        low: lower end of its 95 % interval, which covers chance but not an unknown world.
        high: upper end.
        reference: accuracy on the labelled reference, its regimes mixed as in the batch.
        novelty: share of samples farther from their regime than 99 % of the reference's.
        believable: False when more than a quarter is novel: then only labels tell.

    """

    value: float
    low: float
    high: float
    reference: float
    novelty: float
    believable: bool


def estimate_accuracy(reference: Reference, batch: FeatureTable) -> Estimate:
    """Estimate accuracy by average thresholded confidence (ATC, Garg et al. 2022).

    The share of labelled reference rows that are at least as confident as a threshold equals their
    accuracy; the share of such samples in the batch is the estimate. Each sample is judged by the
    world it is nearest to (a world without labels by all labelled rows together), so a known
    world in which the model is weaker is no fall. Mean absolute error, measured: 2-3 points without
    shift, 8-15 when the whole batch is foreign, always too rosy.

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
    value = accuracy = variance = novelty = 0.0
    for portion in cut:
        regime = portion.home
        part = batch.take(portion.rows)
        share = len(part) / len(batch)
        confidence, correct = _labelled((regime,)) if regime.labelled.size else pooled
        threshold = _Threshold.fit(confidence, float(correct.mean()))
        kept = threshold.keeps(confidence)
        part_value = float(threshold.keeps(part.confidence).mean())
        # What the estimate gets wrong, sample by sample: it can't be better than the disagreement
        # of "confident" and "right" in the reference, nor than two binomial shares.
        disagreement = _smoothed(float(np.abs(kept - correct).sum()), len(correct))
        binomial = max(
            p * (1 - p)
            for p in (
                _smoothed(part_value * len(part), len(part)),
                _smoothed(float(correct.sum()), len(correct)),
            )
        )
        spread = max(disagreement, binomial)
        value += share * part_value
        accuracy += share * float(correct.mean())
        variance += share**2 * spread * (1 / len(part) + 1 / len(correct))
        novelty += share * _novelty(regime, part)
    # A share of n rows comes in steps of 1/n: half a step is Yates's correction.
    margin = Z_95 * math.sqrt(variance) + 0.5 / len(batch)
    return Estimate(
        value=value,
        low=max(0.0, value - margin),
        high=min(1.0, value + margin),
        reference=accuracy,
        novelty=novelty,
        believable=novelty <= MAX_NOVELTY,
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
    """Keep what is above `at`, and the share `of_ties` of what is exactly there.

    Softmax in float32 saturates at 1, so ties at the threshold are the rule, not the exception.
    """

    at: float
    of_ties: float

    @classmethod
    def fit(cls, confidence: Floats, accuracy: float) -> _Threshold:
        kept = accuracy * len(confidence)
        descending = np.sort(confidence)[::-1]
        at = float(descending[max(0, math.ceil(kept - 1e-9) - 1)])
        above, ties = float((confidence > at).sum()), float((confidence == at).sum())
        return cls(at, min(1.0, max(0.0, (kept - above) / ties)))

    def keeps(self, confidence: Floats) -> Floats:
        """Give 1 for kept, 0 for not, `of_ties` at the threshold."""
        kept = np.where(confidence > self.at, 1.0, np.where(confidence == self.at, self.of_ties, 0))
        return np.asarray(kept, dtype=np.float64)


def _novelty(regime: Regime, part: FeatureTable) -> float:
    ours = _squared_distances(regime.compared)
    theirs = _squared_distances(regime.whitening.apply(part.embedding))
    limit = float(np.quantile(ours, NOVELTY_QUANTILE, method="higher"))
    # the slack is for constant embeddings, where rounding decides which of two zeros is larger
    return float((theirs > limit + 1e-9).mean())


def _squared_distances(whitened: Floats) -> Floats:
    return np.asarray((whitened[:, :NOVELTY_DIMENSIONS] ** 2).sum(axis=1))


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


def settle(estimate_value: float, predicted: Integers, labels: Integers) -> Settlement:
    """Hold an estimate against labels that came later.

    Args:
        estimate_value: estimated accuracy.
        predicted: (n,) predicted classes.
        labels: (n,) true classes, -1 where there is none yet; those rows are left out.

    Raises:
        ValueError: if lengths differ or no row has a label.

    """
    if len(predicted) != len(labels):
        raise ValueError(
            f"{len(predicted)} predictions cannot be held against {len(labels)} labels"
        )
    known = labels != NO_LABEL
    n = int(known.sum())
    if n == 0:
        raise ValueError(f"none of {len(labels)} samples has a label, so nothing can be settled")
    right = int((predicted[known] == labels[known]).sum())
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
