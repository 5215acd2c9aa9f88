"""The summary columns of the report: which are shown, and made fit to be drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import pandas as pd

from monitoring.features import Kind
from monitoring.figures import clip, label
from monitoring.reference import halves

if TYPE_CHECKING:
    from collections.abc import Container

    from monitoring.features import FeatureTable
    from monitoring.reference import Reference, Regime

MAX_REFERENCE_ROWS = 1000
"""Over a thousand reference rows Evidently's tests ring on .81 to 1.00 of quiet small batches."""
MAX_BATCH_ROWS = 10_000
MAX_COLUMNS = 16
"""Each costs .05 CPU seconds and 30 kB of HTML, at 100 rows as at 10,000."""
MAX_VALUES = 15
"""Of a category: Evidently draws one bar for each."""
MAX_LABEL = 40
CONFIDENCE = "confidence"
PREDICTED = "predicted class"
PREDICTED_SET = "predicted labels"
STATISTICS = (
    "brightness",
    "contrast",
    "sharpness",
    "noise",
    "saturation",
    "width",
    "height",
    "aspect",
    "channels",
)
FIRST_DIMENSIONS = 2
MAX_DIMENSIONS = 4
OTHER = "other"
MISSING = "no value"

Values: TypeAlias = "np.ndarray[tuple[int, ...], np.dtype[np.generic]]"


@dataclass(frozen=True, eq=False)
class Columns:
    """Summary columns of a batch and of the reference, under names that plotly may read.

    Args:
        now: the batch.
        before: the reference; the same columns.
        categories: the columns that hold text; the others hold float64.
        notes: what was left out, and which metadata columns came, went or changed, in words.

    """

    now: pd.DataFrame
    before: pd.DataFrame
    categories: frozenset[str]
    notes: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class _Pair:
    """One column of the batch and of the reference: float64, or text of at most 16 values."""

    now: Values
    before: Values

    @property
    def is_category(self) -> bool:
        return self.now.dtype == object

    @property
    def varies(self) -> bool:
        values = np.concatenate([self.now, self.before])
        return len(pd.unique(values[~pd.isna(values)])) > 1

    @property
    def distance(self) -> float:
        """How far the two are apart: total variation, or Kolmogorov and Smirnov's distance."""
        if self.is_category:
            now, before = (pd.Series(v).value_counts(normalize=True) for v in self._sides)
            return float(now.sub(before, fill_value=0).abs().sum() / 2)
        first, second = (np.sort(v[~pd.isna(v)]) for v in self._sides)
        at = np.concatenate([first, second])
        ranks = [np.searchsorted(v, at, side="right") / len(v) for v in (first, second)]
        return float(np.abs(ranks[0] - ranks[1]).max())

    @property
    def _sides(self) -> tuple[Values, Values]:
        return self.now, self.before


def summary_columns(reference: Reference, regime: Regime, batch: FeatureTable) -> Columns:
    """Choose at most 16 columns that vary, in this order.

    Confidence, predicted class (or labels, or values), picture statistics, two leading whitened
    embedding dimensions, the metadata columns that both have (the largest move first), two more
    dimensions, and picture statistics that this release does not know. The reference's rows are
    the compared half of a regime: the others fitted the whitening.
    """
    _, compare = halves(regime)
    tables = (
        _at_most(batch, MAX_BATCH_ROWS),
        _at_most(regime.features.take(compare), MAX_REFERENCE_ROWS),
    )
    metadata, notes = _metadata(*tables)
    dimensions = _dimensions(regime, *tables)
    statistics = _statistics(*tables)
    candidates = [
        (CONFIDENCE, _Pair(*(t.confidence.astype(np.float64) for t in tables))),
        *_predicted(reference.classes, *tables),
        *((name, pair) for name, pair in statistics if name in STATISTICS),
        *dimensions[:FIRST_DIMENSIONS],
        *metadata,
        *dimensions[FIRST_DIMENSIONS:],
        *((name, pair) for name, pair in statistics if name not in STATISTICS),
    ]
    varying = [
        (name, pair) for name, pair in candidates if name.startswith("predicted ") or pair.varies
    ]
    if varying[MAX_COLUMNS:]:
        names = ", ".join(clip(name, MAX_LABEL) for name, _ in varying[MAX_COLUMNS:])
        notes.append(f"at most {MAX_COLUMNS} columns are drawn below, so these are not: {names}")
    chosen: dict[str, _Pair] = {}
    for name, pair in varying[:MAX_COLUMNS]:
        chosen[_unique(label(clip(name, MAX_LABEL)), chosen)] = pair
    return Columns(
        now=pd.DataFrame({name: pair.now for name, pair in chosen.items()}),
        before=pd.DataFrame({name: pair.before for name, pair in chosen.items()}),
        categories=frozenset(name for name, pair in chosen.items() if pair.is_category),
        notes=tuple(notes),
    )


def _at_most(table: FeatureTable, rows: int) -> FeatureTable:
    if len(table) <= rows:
        return table
    return table.take(np.sort(np.random.default_rng(0).permutation(len(table))[:rows]))


def _predicted(
    classes: tuple[str, ...], batch: FeatureTable, reference: FeatureTable
) -> list[tuple[str, _Pair]]:
    """Pair the predicted classes, the sets of labels, or each target's values."""
    if batch.kind is Kind.REGRESSION:
        sides = [table.probabilities.astype(np.float64).T for table in (batch, reference)]
        return [
            (f"predicted {name}", _Pair(now, before))
            for name, now, before in zip(classes, *sides, strict=True)
        ]
    if batch.kind is Kind.MULTI_LABEL:
        words = [pd.Series(table.words(classes)) for table in (batch, reference)]
        sets = _categories(words[0], words[1])
        return [] if sets is None else [(PREDICTED_SET, sets)]
    return [(PREDICTED, _predicted_class(classes, batch, reference))]


def _predicted_class(
    classes: tuple[str, ...], batch: FeatureTable, reference: FeatureTable
) -> _Pair:
    """Name the classes predicted most, and put the rest together."""
    predicted = batch.predicted, reference.predicted
    counts = np.bincount(np.concatenate(predicted), minlength=len(classes))
    most = set(np.argsort(-counts, kind="stable")[:MAX_VALUES].tolist())
    names = np.array(
        [
            label(clip(name, MAX_LABEL)) if i in most else f"{OTHER} classes"
            for i, name in enumerate(classes)
        ],
        dtype=object,
    )
    return _Pair(*(names[rows] for rows in predicted))


def _dimensions(
    regime: Regime, batch: FeatureTable, reference: FeatureTable
) -> list[tuple[str, _Pair]]:
    now, before = (
        regime.whitening.apply(table.embedding)[:, :MAX_DIMENSIONS].T
        for table in (batch, reference)
    )
    return [
        (f"embedding {i}", _Pair(*sides))
        for i, sides in enumerate(zip(now, before, strict=True), start=1)
    ]


def _statistics(batch: FeatureTable, reference: FeatureTable) -> list[tuple[str, _Pair]]:
    """Pair the picture statistics that both have, the known ones in their order."""
    common = [str(c) for c in batch.statistics.columns if c in reference.statistics.columns]
    order = [c for c in STATISTICS if c in common] + [c for c in common if c not in STATISTICS]
    pairs = []
    for name in order:
        sides = [_numbers(table.statistics[name]) for table in (batch, reference)]
        if sides[0] is not None and sides[1] is not None:
            pairs.append((name, _Pair(sides[0], sides[1])))
    return pairs


def _metadata(
    batch: FeatureTable, reference: FeatureTable
) -> tuple[list[tuple[str, _Pair]], list[str]]:
    """Pair the metadata columns that both have, the largest move first; say what cannot be paired.

    A column stays a number where both sides have nothing else; all other columns are categories of
    at most 15 values. One in which every value differs (a file name, a time) tells nothing.
    """
    tables = {"batch": batch.metadata, "reference": reference.metadata}
    now, before = (
        {str(name): frame[name] for name in frame if frame[name].notna().any()}
        for frame in tables.values()
    )
    notes = [f"metadata column {clip(c, MAX_LABEL)} is new" for c in now if c not in before]
    notes += [f"metadata column {clip(c, MAX_LABEL)} is gone" for c in before if c not in now]
    pairs = []
    for name in [name for name in now if name in before]:
        called = f"metadata column {clip(name, MAX_LABEL)}"
        numbers = [_numbers(values) for values in (now[name], before[name])]
        if numbers[0] is not None and numbers[1] is not None:
            pairs.append((name, _Pair(numbers[0], numbers[1])))
            continue
        if numbers[0] is not None or numbers[1] is not None:
            kinds = ["text" if side is None else "numbers" for side in numbers]
            notes.append(f"{called} had {kinds[1]} in the reference and has {kinds[0]} now")
        pair = _categories(now[name], before[name])
        if pair is None:
            notes.append(f"{called} has another value in every row, so it is not compared")
        else:
            pairs.append((name, pair))
    return sorted(pairs, key=lambda found: -found[1].distance), notes


def _numbers(values: pd.Series) -> Values | None:
    """Give float64 with NaN for what is missing; None if there is nothing else, or no number."""
    if pd.api.types.is_bool_dtype(values) or not pd.api.types.is_numeric_dtype(values):
        return None
    numbers = values.to_numpy(dtype=np.float64, na_value=np.nan)
    numbers = np.where(np.isfinite(numbers), numbers, np.nan)
    return None if np.isnan(numbers).all() else numbers


def _categories(now: pd.Series, before: pd.Series) -> _Pair | None:
    """Give the most frequent values and put the rest together; None if all values differ."""
    words = [side.astype(object).where(side.notna(), MISSING).map(str) for side in (now, before)]
    counts = pd.concat(words).value_counts()
    if len(counts) > MAX_VALUES and counts.iloc[0] == 1:
        return None
    labels = {word: label(clip(word, MAX_LABEL)) for word in counts.index[:MAX_VALUES]}
    sides = [side.map(lambda word: labels.get(word, OTHER)) for side in words]
    return _Pair(*(side.to_numpy(dtype=object) for side in sides))


def _unique(name: str, taken: Container[str]) -> str:
    number, candidate = 1, name
    while candidate in taken:
        number += 1
        candidate = f"{name} ({number})"
    return candidate
