"""What others do, in a few lines each: tests of a batch, alarms over a stream, accuracy estimates.

A test takes rows of a reference and of a batch, (n, d) and (m, d), and gives a p-value.
"""

from __future__ import annotations

import functools
import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from monitoring.features import FeatureTable

PERMUTATIONS = 199
MAX_COLUMNS = 16
PREDICTED = "predicted"
EVIDENTLY_SHARE = 0.5
"""Evidently's default: the dataset has drifted when half of its columns have."""
CUSUM_SLACK, CUSUM_LIMIT = 0.5, 5.07
"""Siegmund's approximation puts the mean run to a false alarm at 1,000 checks of normal scores."""


# --- tests of one batch


def ks_bonferroni(reference: np.ndarray, batch: np.ndarray) -> float:
    """Test each column by Kolmogorov and Smirnov, the smallest p times the number of columns.

    On embeddings; on softmax outputs this is black-box shift detection (BBSD, Lipton et al. 2018).
    """
    largest = max(
        range(reference.shape[1]), key=lambda j: _ks_statistic(reference[:, j], batch[:, j])
    )
    # p falls with the statistic, which has the same distribution in every column
    p = stats.ks_2samp(reference[:, largest], batch[:, largest]).pvalue
    return min(1.0, float(p) * reference.shape[1])


def _ks_statistic(one: np.ndarray, other: np.ndarray) -> float:
    one, other = np.sort(one), np.sort(other)
    both = np.concatenate([one, other])
    gap = np.searchsorted(one, both, side="right") / len(one) - np.searchsorted(
        other, both, side="right"
    ) / len(other)
    return float(np.abs(gap).max())


def mmd(reference: np.ndarray, batch: np.ndarray, rng: np.random.Generator) -> float:
    """Test by the maximum mean discrepancy of a Gaussian kernel and 199 permutations.

    Exact; the bandwidth is the median distance of all rows (Gretton et al. 2012).
    """
    rows = np.concatenate([batch, reference]).astype(np.float32)
    m, total = len(batch), len(rows)
    rows -= rows.mean(axis=0)
    norms = (rows**2).sum(axis=1)
    kernel = np.maximum(norms[:, None] + norms - 2 * (rows @ rows.T), 0)
    pairs = rng.integers(total, size=(2, 50_000))
    sampled = kernel[pairs[0], pairs[1]][pairs[0] != pairs[1]]
    kernel /= -max(float(np.median(sampled)), 1e-12)
    np.exp(kernel, out=kernel)
    signs = np.full((total, PERMUTATIONS + 1), -1 / (total - m), dtype=np.float32)
    signs[:m, 0] = 1 / m
    for i in range(1, PERMUTATIONS + 1):
        signs[rng.choice(total, m, replace=False), i] = 1 / m
    values = (signs * (kernel @ signs)).sum(axis=0)
    return float((values >= values[0] * (1 - 1e-6)).sum() / (PERMUTATIONS + 1))


def classifier(reference: np.ndarray, batch: np.ndarray, rng: np.random.Generator) -> float:
    """Test whether a classifier tells batch and reference apart (Lopez-Paz and Oquab 2017).

    Logistic regression on one half of the batch and as many reference rows; binomial test of its
    accuracy on the other half.
    """
    n = min(len(batch), len(reference))
    drawn = [rng.permutation(part)[:n] for part in (reference, batch)]
    learned = np.concatenate([part[: n // 2] for part in drawn])
    held = np.concatenate([part[n // 2 :] for part in drawn])
    scaler = StandardScaler().fit(learned)
    truth = np.repeat([0, 1], n // 2)
    model = LogisticRegression(max_iter=500).fit(scaler.transform(learned), truth)
    answers = model.predict(scaler.transform(held))
    right = int((answers == np.repeat([0, 1], n - n // 2)).sum())
    return float(stats.binomtest(right, len(answers), 0.5, alternative="greater").pvalue)


@dataclass(frozen=True, eq=False)
class Summaries:
    """The at most 16 columns that Evidently is handed: it must not get raw embeddings.

    Picture statistics that vary, confidence, predicted class (text) and the leading principal
    components of the reference's embedding.
    """

    varying: list[str]
    centre: np.ndarray
    axes: np.ndarray

    @classmethod
    def fit(cls, reference: FeatureTable) -> Summaries:
        """Choose the columns by the reference."""
        varying = [c for c in reference.statistics if np.ptp(reference.statistics[c]) > 0]
        centre = reference.embedding.mean(axis=0)
        centred = (reference.embedding - centre).astype(np.float64)
        _, vectors = np.linalg.eigh(centred.T @ centred)
        return cls(varying, centre, vectors[:, ::-1][:, : MAX_COLUMNS - 2 - len(varying)])

    def of(self, table: FeatureTable) -> pd.DataFrame:
        """Give the columns of a table, one row a sample."""
        leading = (table.embedding - self.centre) @ self.axes
        return pd.DataFrame(
            {name: table.statistics[name].to_numpy() for name in self.varying}
            | {"confidence": table.confidence.astype(np.float64)}
            | {f"component {i}": column for i, column in enumerate(leading.T)}
            | {PREDICTED: table.predicted.astype(str)}
        )


def evidently_preset(reference: pd.DataFrame, batch: pd.DataFrame) -> bool:
    """Ask Evidently's drift preset for its dataset alarm, all at its defaults.

    Only the metric that carries the alarm is computed, which costs a fifth of the whole preset:
    what that also draws changes nothing in it.
    """
    from evidently.metrics import DriftedColumnsCount

    snapshot = _run_evidently(DriftedColumnsCount(drift_share=EVIDENTLY_SHARE), reference, batch)
    return float(snapshot.dict()["metrics"][0]["value"]["share"]) >= EVIDENTLY_SHARE


def evidently_whole_preset(reference: pd.DataFrame, batch: pd.DataFrame) -> None:
    """Run the whole drift preset, as its users do; for its cost."""
    from evidently.presets import DataDriftPreset

    _run_evidently(DataDriftPreset(), reference, batch)


def _run_evidently(metric: Any, reference: pd.DataFrame, batch: pd.DataFrame) -> Any:
    from evidently import DataDefinition, Dataset, Report

    definition = DataDefinition(
        numerical_columns=[c for c in reference if c != PREDICTED],
        categorical_columns=[PREDICTED],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Report([metric]).run(
            *(Dataset.from_pandas(part, data_definition=definition) for part in (batch, reference))
        )


def summary_ks(reference: pd.DataFrame, batch: pd.DataFrame) -> float:
    """Do what Evidently's `ValueDrift` at threshold .05 / columns does: KS, χ² for the class."""
    numeric = [c for c in reference if c != PREDICTED]
    ours, theirs = (part[numeric].to_numpy(np.float64) for part in (reference, batch))
    counts = pd.concat(
        [reference[PREDICTED].value_counts(), batch[PREDICTED].value_counts()], axis=1
    ).fillna(0)
    chi2 = 1.0 if len(counts) == 1 else float(stats.chi2_contingency(counts.T.to_numpy()).pvalue)
    share = reference.shape[1] / len(numeric)
    return min(1.0, ks_bonferroni(ours, theirs) * share, chi2 * reference.shape[1])


# --- alarms over a stream


def cusum(scores: np.ndarray) -> list[int]:
    """Give the checks at which Page's CUSUM of normal scores rings; it starts afresh then."""
    total, alarms = 0.0, []
    for i, score in enumerate(scores):
        total = max(0.0, total + float(score) - CUSUM_SLACK)
        if total >= CUSUM_LIMIT:
            alarms.append(i)
            total = 0.0
    return alarms


def scores_of_p(p_values: np.ndarray) -> np.ndarray:
    """Turn p-values into normal scores that grow with the evidence."""
    return np.asarray(stats.norm.isf(np.clip(p_values, 1e-12, 1 - 1e-12)))


# --- accuracy without labels


@functools.lru_cache(maxsize=2)
def _isotonic(confidence: bytes, correct: bytes) -> object:
    from sklearn.isotonic import IsotonicRegression

    return IsotonicRegression(out_of_bounds="clip").fit(
        np.frombuffer(confidence), np.frombuffer(correct)
    )


def cbpe(confidence: np.ndarray, correct: np.ndarray, batch: np.ndarray) -> float:
    """Estimate accuracy as the mean calibrated confidence (NannyML's idea; isotonic)."""
    model = _isotonic(confidence.astype(np.float64).tobytes(), correct.astype(np.float64).tobytes())
    return float(model.predict(batch.astype(np.float64)).mean())  # type: ignore[attr-defined]


def doc(confidence: np.ndarray, correct: np.ndarray, batch: np.ndarray) -> float:
    """Estimate accuracy as the reference's, less the fall in confidence (Guillory et al. 2021)."""
    return float(np.clip(correct.mean() - (confidence.mean() - batch.mean()), 0, 1))


def atc(confidence: np.ndarray, correct: np.ndarray, batch: np.ndarray) -> float:
    """Estimate accuracy as the share above the reference's threshold (Garg et al. 2022)."""
    kept = math.floor(correct.mean() * len(confidence))
    threshold = np.sort(confidence)[::-1][max(0, kept - 1)]
    return float((batch >= threshold).mean())


ESTIMATORS = {"CBPE": cbpe, "DoC": doc, "ATC": atc}
