"""The same questions of a part of the batch: one camera, one site, one kind of customer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from monitoring.accuracy import estimate_accuracy
from monitoring.detectors import DetectionSettings, detect_drift
from monitoring.features import Kind, number_text
from monitoring.reference import MIN_ROWS, Reference, Regime

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd

    from monitoring.features import FeatureTable, Integers

MAX_VALUES = 20
"""Of a column; the rarer ones are not looked at one by one, or the level is spread too thin."""
SHARE = 0.5
"""Of alpha, for all slices together: a drift in one of them must not hide in the whole."""


@dataclass(frozen=True)
class Slice:
    """One value of a metadata column, checked by itself.

    Figures are NaN where there was nothing to compare with; `note` says why. `p_value` is corrected
    for the number of slices tested; `alarm` is whether it is at most alpha.
    """

    column: str
    value: str
    n: int
    p_value: float
    alarm: bool
    estimated: float
    reference: float
    note: str = ""


def check_slices(
    reference: Reference,
    batch: FeatureTable,
    columns: Sequence[str],
    settings: DetectionSettings,
) -> tuple[Slice, ...]:
    """Check each value of each column against the reference's rows of the same value.

    Tested are the 20 commonest values of each column that have at least 20 reference rows in some
    regime; of the others it is said why not. Numbers are slices by their exact value, so name
    columns of few values. A column that the batch lacks gives one row that says so.
    """
    rows: list[Slice] = []
    parts: list[tuple[str, str, FeatureTable, Reference]] = []
    for column in columns:
        if column not in batch.metadata.columns:
            rows.append(_untested(column, "", 0, "the batch has no such column"))
            continue
        told = _texts(batch.metadata[column])
        for place, (value, n) in enumerate(told.value_counts().items()):
            known = None if place >= MAX_VALUES else _part(reference, column, str(value))
            if place >= MAX_VALUES:
                note = f"only the {MAX_VALUES} commonest values are tested"
                rows.append(_untested(column, str(value), int(n), note))
            elif known is None:
                note = f"fewer than {MIN_ROWS} reference rows have this value"
                rows.append(_untested(column, str(value), int(n), note))
            else:
                selected = batch.take(np.flatnonzero(told == value))
                parts.append((column, str(value), selected, known))
    corrected = replace(settings, alpha=settings.alpha / max(1, len(parts)))
    for column, value, selected, known in parts:
        try:
            found = detect_drift(known, selected, corrected)
        except ValueError as error:  # too few rows, here or in the reference, for the level
            rows.append(_untested(column, value, len(selected), str(error)))
            continue
        estimable = _has_labels(known) and known.kind is not Kind.REGRESSION
        estimate = estimate_accuracy(known, selected) if estimable else None
        rows.append(
            Slice(
                column=column,
                value=value,
                n=len(selected),
                p_value=min(1.0, found.p_value * len(parts)),
                alarm=found.alarm,
                estimated=float("nan") if estimate is None else estimate.value,
                reference=float("nan") if estimate is None else estimate.reference,
            )
        )
    return tuple(sorted(rows, key=lambda row: (row.column, -row.n, row.value)))


def joined(p_value: float, slices: Sequence[Slice]) -> float:
    """Join the whole batch's p-value with those of its slices, each side with half of alpha."""
    tested = [row.p_value for row in slices if np.isfinite(row.p_value)]
    if not tested:
        return p_value
    return min(1.0, p_value / (1 - SHARE), min(tested) / SHARE)


def values_of(features: FeatureTable, column: str) -> pd.Series:
    """Give the slice of each row, (n,) text or None."""
    return _texts(features.metadata[column])


def _texts(values: pd.Series) -> pd.Series:
    if values.dtype != np.float64:
        return values
    return values.map(number_text, na_action="ignore").astype("object")


def _part(reference: Reference, column: str, value: str) -> Reference | None:
    """Select the reference's rows of a slice, regime by regime."""
    regimes = []
    for regime in reference.regimes:
        if column not in regime.features.metadata.columns:
            continue
        rows = np.flatnonzero(_texts(regime.features.metadata[column]) == value)
        if len(rows) >= MIN_ROWS:
            regimes.append(_take(regime, rows))
    return Reference(tuple(regimes), reference.classes) if regimes else None


def _take(regime: Regime, rows: Integers) -> Regime:
    return Regime(regime.name, regime.features.take(rows), regime.labels[rows])


def _has_labels(reference: Reference) -> bool:
    return any(regime.labelled.size for regime in reference.regimes)


def _untested(column: str, value: str, n: int, note: str) -> Slice:
    nan = float("nan")
    return Slice(column, value, n, nan, alarm=False, estimated=nan, reference=nan, note=note)
