"""The drift report: one HTML page that answers four questions and shows the columns.

The only module that imports Evidently, which draws here and does not decide: its own alarms ring
on most quiet batches of 50 to 100 rows. Evidently writes what it is given into a script without
escaping `</script>`, and plotly reads its labels as HTML, so nothing that has a name from outside
is handed over as it is: see `_text` and `_label`.
"""

from __future__ import annotations

import html
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
from evidently import DataDefinition, Dataset, Report
from evidently.core.metric_types import SingleValueCalculation, SingleValueMetric
from evidently.legacy.renderers.html_widgets import (
    CounterData,
    counter,
    table_data,
    text_widget,
)
from evidently.metrics import ValueDrift

from monitoring.policy import Action

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd

    from monitoring.accuracy import Estimate
    from monitoring.detectors import Detection
    from monitoring.features import FeatureTable
    from monitoring.policy import Decision
    from monitoring.reference import Reference, Regime

MAX_REFERENCE_ROWS = 1000
"""Over a thousand reference rows Evidently's tests ring on .81 to 1.00 of quiet small batches."""
MAX_BATCH_ROWS = 10_000
MAX_COLUMNS = 16
"""Each costs .18 CPU seconds and 71 kB of HTML."""
MAX_CLASSES = 15
OTHER_CLASSES = "other classes"
PREDICTED = "predicted class"
IN_WORDS = {
    Action.NONE: "Nothing to do",
    Action.WATCH: "Keep watching",
    Action.ASK_FOR_LABELS: "Ask for labels",
    Action.RETRAIN: "Retrain",
}
MARK = "\ue000"
MARK_IN_JSON = "\\ue000"


class JointShift(SingleValueMetric):  # type: ignore[misc]  # evidently has no types
    """Did the batch change: the joint p-value and every test of every part."""

    title: str
    alarm: bool
    p_value: float
    alpha: float
    regime: str
    rows: int
    table: list[list[str]]


class JointShiftCalculation(SingleValueCalculation[JointShift]):  # type: ignore[misc]
    """Draws what `detect_drift` found."""

    def calculate(self, context: Any, current_data: Any, reference_data: Any) -> Any:  # noqa: ARG002
        """Give the joint p-value with its widgets."""
        metric = self.metric
        result = self.result(metric.p_value)
        changed = "Yes, it changed" if metric.alarm else "No change seen"
        result.widget = [
            counter(counters=[CounterData("drift report", metric.title)]),
            counter(
                title="Did it change?",
                counters=[
                    CounterData(f"p {_p(metric.p_value)}, alpha {metric.alpha:g}", changed),
                    CounterData("pictures in the batch", str(metric.rows)),
                    CounterData("regime that most of it belongs to", metric.regime),
                ],
            ),
            table_data(
                title="Parts of the batch, each tested against its own regime",
                column_names=["regime", "pictures", "share", "test", "statistic", "p"],
                data=metric.table,
            ),
        ]
        return result

    def display_name(self) -> str:
        """Name the metric."""
        return "Joint shift (p)"


class EstimatedAccuracy(SingleValueMetric):  # type: ignore[misc]
    """Does it hurt: the accuracy estimated without labels."""

    value: float
    low: float
    high: float
    reference: float
    novelty: float
    believable: bool


class EstimatedAccuracyCalculation(SingleValueCalculation[EstimatedAccuracy]):  # type: ignore[misc]
    """Draws what `estimate_accuracy` found."""

    def calculate(self, context: Any, current_data: Any, reference_data: Any) -> Any:  # noqa: ARG002
        """Give the estimate with its widgets."""
        metric = self.metric
        result = self.result(metric.value)
        trust = (
            "An estimate from the model's confidence, calibrated on the reference. "
            "It tends to be too rosy on unknown pictures; labels decide."
            if metric.believable
            else f"Do not believe this estimate: {metric.novelty:.0%} of the pictures are farther "
            "from the reference than 99 % of its own. Label some of them."
        )
        result.widget = [
            counter(
                title="Does it hurt?",
                counters=[
                    CounterData(
                        f"estimated accuracy, 95 % interval {metric.low:.3f} to {metric.high:.3f}",
                        f"{metric.value:.3f}",
                    ),
                    CounterData("accuracy on the reference", f"{metric.reference:.3f}"),
                    CounterData("novel pictures", f"{metric.novelty:.1%}"),
                ],
            ),
            text_widget(text=trust),
        ]
        return result

    def display_name(self) -> str:
        """Name the metric."""
        return "Estimated accuracy"


class MovedColumns(SingleValueMetric):  # type: ignore[misc]
    """What changed: the picture statistics and classes that moved most, in words."""

    words: list[str]


class MovedColumnsCalculation(SingleValueCalculation[MovedColumns]):  # type: ignore[misc]
    """Draws what `Detection.top_columns` says."""

    def calculate(self, context: Any, current_data: Any, reference_data: Any) -> Any:  # noqa: ARG002
        """Give the number of columns that moved, and their names."""
        words = self.metric.words
        result = self.result(len(words))
        result.widget = [
            table_data(
                title="What changed?",
                column_names=["moved most, the largest move first"],
                data=[[word] for word in words]
                or [["no picture statistic and no class moved more than chance moves them"]],
            )
        ]
        return result

    def display_name(self) -> str:
        """Name the metric."""
        return "Columns that moved"


class DecisionTaken(SingleValueMetric):  # type: ignore[misc]
    """What next: the decision and its reason."""

    action: Action
    reason: str
    reference_rows: int


class DecisionTakenCalculation(SingleValueCalculation[DecisionTaken]):  # type: ignore[misc]
    """Draws what `decide` decided."""

    def calculate(self, context: Any, current_data: Any, reference_data: Any) -> Any:  # noqa: ARG002
        """Give 1 if something is to be done, else 0, with the decision's widget."""
        metric = self.metric
        result = self.result(int(metric.action not in {Action.NONE, Action.WATCH}))
        result.widget = [
            counter(
                title="What next?",
                counters=[CounterData(metric.reason, IN_WORDS[metric.action])],
            ),
            # stands between our answers and Evidently's columns, which follow
            text_widget(
                title="Column by column",
                text=f"The batch (current) against {metric.reference_rows} pictures of the regime "
                "that fits best (reference). These marks illustrate; they decide nothing.",
            ),
        ]
        return result

    def display_name(self) -> str:
        """Name the metric."""
        return "Decision"


def write_report(
    path: Path,
    *,
    reference: Reference,
    batch: FeatureTable,
    detection: Detection,
    estimate: Estimate,
    decision: Decision,
    title: str,
) -> None:
    """Write the report of one check as a single HTML file of at most 6 MB.

    Our own figures come first; then at most 16 summary columns, batch against at most 1,000
    rows of the regime that fits best. A column is marked as drifted when its own test is at most
    alpha divided by the number of columns.
    """
    regime = next(r for r in reference.worlds if r.name == detection.regime)
    shown, before = _columns(reference, regime, batch)
    tests = [
        ValueDrift(
            column=column,
            method="chisquare" if column == PREDICTED else "ks",
            threshold=detection.alpha / len(shown.columns),
        )
        for column in shown.columns
    ]
    definition = DataDefinition(
        numerical_columns=[column for column in shown.columns if column != PREDICTED],
        categorical_columns=[PREDICTED],
    )
    report = Report(
        [
            JointShift(
                title=_text(title),
                alarm=detection.alarm,
                p_value=detection.p_value,
                alpha=detection.alpha,
                regime=_text(detection.regime),
                rows=len(batch),
                table=_table(detection),
            ),
            EstimatedAccuracy(
                value=estimate.value,
                low=estimate.low,
                high=estimate.high,
                reference=estimate.reference,
                novelty=estimate.novelty,
                believable=estimate.believable,
            ),
            MovedColumns(words=[_text(words) for words in detection.top_columns]),
            DecisionTaken(
                action=decision.action,
                reason=_text(decision.reason),
                reference_rows=len(before),
            ),
            *tests,
        ],
        include_tests=False,
    )
    with warnings.catch_warnings():
        # its tests warn of small samples; they draw here, they do not decide
        warnings.simplefilter("ignore")
        snapshot = report.run(
            Dataset.from_pandas(shown, data_definition=definition),
            Dataset.from_pandas(before, data_definition=definition),
        )
        page = snapshot.get_html_str(as_iframe=False).replace(MARK_IN_JSON, "\\u003c")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def _columns(
    reference: Reference, regime: Regime, batch: FeatureTable
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Give the summary columns of the batch and of the regime, without those that never vary."""
    classes = _shown_classes(reference, regime, batch)
    common = [
        column
        for column in batch.statistics.columns
        if column in regime.features.statistics.columns
    ]
    now, before = (
        table.statistics[common[: MAX_COLUMNS - 2]]
        .rename(columns=lambda name: _label(str(name)))
        .assign(
            confidence=table.confidence.astype(np.float64),
            **{PREDICTED: [classes[i] for i in table.predicted]},
        )
        for table in (
            _at_most(batch, MAX_BATCH_ROWS),
            _at_most(regime.features, MAX_REFERENCE_ROWS),
        )
    )
    varies = [
        column
        for column in now.columns
        if column == PREDICTED or np.ptp(np.concatenate([now[column], before[column]])) > 0
    ]
    return now[varies], before[varies]


def _shown_classes(reference: Reference, regime: Regime, batch: FeatureTable) -> list[str]:
    """Name the classes predicted most, and put the rest together."""
    predicted = np.concatenate([batch.predicted, regime.features.predicted])
    counts = np.bincount(predicted, minlength=len(reference.classes))
    most = set(np.argsort(-counts, kind="stable")[:MAX_CLASSES].tolist())
    return [
        _label(name) if i in most else OTHER_CLASSES for i, name in enumerate(reference.classes)
    ]


def _at_most(table: FeatureTable, rows: int) -> FeatureTable:
    if len(table) <= rows:
        return table
    return table.take(np.sort(np.random.default_rng(0).permutation(len(table))[:rows]))


def _table(detection: Detection) -> list[list[str]]:
    return [
        [
            _text(part.regime),
            str(part.n),
            f"{part.share:.0%}",
            shift.detector,
            f"{shift.statistic:.3g}",
            _p(shift.p_value).removeprefix("= "),
        ]
        for part in detection.parts
        for shift in part.shifts
    ]


def _p(value: float) -> str:
    return f"= {value:.2g}" if value >= 1e-4 else "under .0001"  # noqa: PLR2004


def _text(text: str) -> str:
    """Make safe what the page shows as plain text: `<` arrives as a script's escape of it."""
    return text.replace("<", MARK)


def _label(text: str) -> str:
    """Make safe what plotly reads as HTML."""
    return html.escape(text.replace(MARK, ""), quote=False)
