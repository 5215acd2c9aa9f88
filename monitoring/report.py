"""The drift report: one HTML page that answers four questions, then shows what they rest on.

The only module that imports Evidently, which draws here and does not decide: its own alarms ring
on most quiet batches of 50 to 100 rows.

What has a name from outside (classes, batches, samples, metadata) is made safe where it is read: by
a script, into which Evidently writes `</script>` as it is (`_escaped`), and by plotly, which reads
labels as HTML (`figures.label`). The other widgets show plain text; names are never handed to one
that reads Markdown, which would fetch pictures from anywhere.
"""

from __future__ import annotations

import math
import uuid
import warnings
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evidently import DataDefinition, Dataset, Report
from evidently.core.metric_types import SingleValueCalculation, SingleValueMetric
from evidently.legacy.model.widget import Insight
from evidently.legacy.renderers.html_widgets import (
    CounterData,
    GraphData,
    TabData,
    WidgetSize,
    counter,
    plotly_graph,
    table_data,
    text_widget,
    widget_tabs,
)
from evidently.metrics import ValueDrift
from evidently.sdk.models import DashboardModel, DashboardTabModel, PanelMetric, ProjectModel
from evidently.sdk.panels import line_plot_panel
from evidently.tests import eq, gt, lt
from evidently.ui.storage.local.base import DOT_JSON, SNAPSHOTS_DIR_NAME, LocalState

from monitoring.columns import Columns, summary_columns
from monitoring.features import Kind
from monitoring.figures import Past, clip, history, pairs
from monitoring.policy import ROUNDING, Action, PolicySettings, has_fallen
from monitoring.words import p_words

if TYPE_CHECKING:
    from monitoring.accuracy import Estimate
    from monitoring.detectors import Detection
    from monitoring.features import FeatureTable
    from monitoring.policy import Decision
    from monitoring.reference import Reference
    from monitoring.slices import Slice

__all__ = ["Page", "Past", "write_report"]

MAX_ANSWER = 28
"""Characters that stand on one line in a card."""
MAX_PAST = 200
MAX_STRAYS = 12
MAX_TABLE_ROWS = 60
LEGEND = "red where it rang, a diamond where labels settled the accuracy"
IN_WORDS = {
    Action.NONE: ("Nothing to do", "success"),
    Action.WATCH: ("Keep watching", "info"),
    Action.ASK_FOR_LABELS: ("Ask for labels", "warning"),
    Action.RETRAIN: ("Retrain", "warning"),
    Action.ROLLBACK: ("Roll back", "error"),
}
"""Each action's words, and the colour of its card."""
PROJECTS = uuid.UUID("5f0e8a53-5f3c-4b0e-9d0e-5c1a7b7c1d11")
"""The space of names from which a project's and a run's id follow, so that none is made twice."""


@dataclass(frozen=True, eq=False)
class Page:
    """Everything that the report shows.

    Args:
        title: what was checked against what.
        reference: of the champion.
        batch: the features of the batch.
        detection: did it change?
        estimate: does it hurt?
        decision: what next?
        stream_words: the alarm over the stream, with its declared rate and its condition.
        stream_value: log10 of the e-process after this batch; None where there is none.
        stream_threshold: log10 of the value at which it rings.
        past: earlier checks, oldest first; the newest 199 are drawn beside this one.
        strays: the farthest pictures: sample id and picture (PNG or JPEG; bytes that are neither,
            such as b"", are shown as gone), the same of the nearest reference one, the distance.
        dimensions: the leading embedding dimensions that moved, in words.
        slices: what was found in each slice.
        error_words: how far off the estimate has been where labels came.
        notes: findings, in words.
        at: when it was checked; now if it is None.
        min_drop: fall in accuracy that counts as damage.
        later_words: where what labels say that come later is told.

    """

    title: str
    reference: Reference
    batch: FeatureTable
    detection: Detection
    estimate: Estimate
    decision: Decision
    stream_words: str = ""
    stream_value: float | None = None
    stream_threshold: float | None = None
    past: tuple[Past, ...] = ()
    strays: tuple[tuple[str, bytes, str, bytes, float], ...] = ()
    dimensions: tuple[str, ...] = ()
    slices: tuple[Slice, ...] = ()
    error_words: str = ""
    notes: tuple[str, ...] = ()
    at: datetime | None = None
    min_drop: float = field(default_factory=lambda: PolicySettings().min_drop)
    later_words: str = ""


# --- what goes into Evidently: one metric a question, and one for what stands below


class _PageReport(Report):  # type: ignore[misc]  # evidently has no types
    """A report whose metrics read what they show from a page.

    The metrics have no parameters of their own: Evidently's dashboards draw one line for each
    combination of parameters, so a parameter that differs by batch would leave lines of one point.
    """

    def __init__(self, metrics: list[Any], page: Page, columns: Columns) -> None:
        super().__init__(metrics, include_tests=True)
        self.page = page
        self.columns = columns


def _page(context: Any) -> Page:
    page: Page = context.configuration.page
    return page


class JointShift(SingleValueMetric):  # type: ignore[misc]
    """Did it change: the joint p-value."""

    def _default_tests_with_reference(self, context: Any) -> list[Any]:
        detection = _page(context).detection
        # where the stream decides on the alarm, a p-value alone neither passes nor fails
        if detection.alarm != (detection.p_value <= detection.alpha):
            return []
        return [gt(detection.alpha).bind_single(self.get_fingerprint())]


class JointShiftCalculation(SingleValueCalculation[JointShift]):  # type: ignore[misc]
    """Shows what `detect_drift` found."""

    def calculate(self, context: Any, current_data: Any, reference_data: Any) -> Any:  # noqa: ARG002
        """Give the joint p-value and the card of the first question."""
        page = _page(context)
        found = page.detection
        result = self.result(float(found.p_value))
        words = (
            f"p {p_words(found.p_value)} at alpha {found.alpha:g}, {len(page.batch):,} pictures, "
            f"most of them nearest to regime {found.regime}."
        )
        result.widget = [
            counter(title=page.title, counters=[]),
            _card(
                "Did it change?",
                "Yes, it changed" if found.alarm else "No change seen",
                "error" if found.alarm else "success",
                words,
                _sentence(page.stream_words),
            ),
        ]
        return result

    def display_name(self) -> str:
        """Name the metric."""
        return "Joint shift (p)"


class Alarm(SingleValueMetric):  # type: ignore[misc]
    """Whether the check rang, by whichever rule decides: 1 or 0."""

    def _default_tests_with_reference(self, context: Any) -> list[Any]:  # noqa: ARG002
        return [eq(0).bind_single(self.get_fingerprint())]


class AlarmCalculation(SingleValueCalculation[Alarm]):  # type: ignore[misc]
    """Holds `Detection.alarm` for the tests and for Evidently's dashboards."""

    def calculate(self, context: Any, current_data: Any, reference_data: Any) -> Any:  # noqa: ARG002
        """Give 1 if the check rang, else 0."""
        result = self.result(int(_page(context).detection.alarm))
        result.widget = []
        return result

    def display_name(self) -> str:
        """Name the metric."""
        return "Alarm"


class StreamEvidence(SingleValueMetric):  # type: ignore[misc]
    """The e-process over the stream, log10."""

    def _default_tests_with_reference(self, context: Any) -> list[Any]:
        threshold = _page(context).stream_threshold
        if threshold is None:
            return []
        return [lt(threshold).bind_single(self.get_fingerprint())]


class StreamEvidenceCalculation(SingleValueCalculation[StreamEvidence]):  # type: ignore[misc]
    """Holds the e-process for the tests and for Evidently's dashboards."""

    def calculate(self, context: Any, current_data: Any, reference_data: Any) -> Any:  # noqa: ARG002
        """Give log10 of the e-process after this batch."""
        result = self.result(float(_page(context).stream_value or 0))
        result.widget = []
        return result

    def display_name(self) -> str:
        """Name the metric."""
        return "Evidence over the stream (log10)"


class EstimatedAccuracy(SingleValueMetric):  # type: ignore[misc]
    """Does it hurt: the accuracy estimated without labels."""


class EstimatedAccuracyCalculation(SingleValueCalculation[EstimatedAccuracy]):  # type: ignore[misc]
    """Shows what `estimate_accuracy` found."""

    def calculate(self, context: Any, current_data: Any, reference_data: Any) -> Any:  # noqa: ARG002
        """Give the estimate and the card of the second question."""
        page = _page(context)
        found = page.estimate
        result = self.result(float(found.value))
        answer, colour = _does_it_hurt(page)
        if not found.believable:
            trust = (
                "A model of values tells no confidence, so nothing is estimated. Label some of "
                "the pictures."
                if page.batch.kind is Kind.REGRESSION
                else f"Do not believe this estimate: about {found.novelty:.0%} of the pictures are "
                "unlike anything in the reference. Label some of them."
            )
        else:
            trust = (
                "It is made from the model's confidence, and too rosy where a class is new; "
                "labels decide."
            )
        words = (
            f"Accuracy is estimated at {found.value:.3f} (95 % interval {found.low:.3f} to "
            f"{found.high:.3f}) against {found.reference:.3f} on the reference; "
            f"{found.novelty:.1%} of the pictures are novel."
            if page.batch.kind is not Kind.REGRESSION
            else f"On the reference {found.reference:.3f} are right, within the tolerance; "
            f"{found.novelty:.1%} of the pictures are novel."
        )
        told = (_sentence(page.later_words), _sentence(page.error_words))
        result.widget = [_card("Does it hurt?", answer, colour, words, *told, trust)]
        return result

    def display_name(self) -> str:
        """Name the metric."""
        return "Estimated accuracy"


class EstimatedFall(SingleValueMetric):  # type: ignore[misc]
    """The reference's accuracy less the estimate."""

    def _default_tests_with_reference(self, context: Any) -> list[Any]:
        page = _page(context)
        limit = lt(page.min_drop - ROUNDING, is_critical=page.estimate.believable)
        return [limit.bind_single(self.get_fingerprint())]


class EstimatedFallCalculation(SingleValueCalculation[EstimatedFall]):  # type: ignore[misc]
    """Holds the fall for the tests and for Evidently's dashboards."""

    def calculate(self, context: Any, current_data: Any, reference_data: Any) -> Any:  # noqa: ARG002
        """Give the fall; it is negative where the estimate is higher."""
        estimate = _page(context).estimate
        result = self.result(float(estimate.reference - estimate.value))
        result.widget = []
        return result

    def display_name(self) -> str:
        """Name the metric."""
        return "Estimated fall in accuracy"


class MovedColumns(SingleValueMetric):  # type: ignore[misc]
    """What changed: how many picture statistics and classes moved more than by chance."""


class MovedColumnsCalculation(SingleValueCalculation[MovedColumns]):  # type: ignore[misc]
    """Shows what `Detection.top_columns` says."""

    def calculate(self, context: Any, current_data: Any, reference_data: Any) -> Any:  # noqa: ARG002
        """Give the number of columns that moved and the card of the third question."""
        page = _page(context)
        moved = [words.replace("->", "→") for words in page.detection.top_columns]
        findings = len(page.notes) + len(context.configuration.columns.notes)
        result = self.result(len(moved))
        result.widget = [
            _card(
                "What changed?",
                clip(moved[0], MAX_ANSWER) if moved else "Nothing stands out",
                "info" if moved or findings else "success",
                f"The largest move first: {'; '.join(clip(words, 80) for words in moved)}."
                if moved
                else "No picture statistic and no class moved more than chance moves them.",
                f"{findings} {'finding' if findings == 1 else 'findings'} below."
                if findings
                else "",
            )
        ]
        return result

    def display_name(self) -> str:
        """Name the metric."""
        return "Columns that moved"


class DecisionTaken(SingleValueMetric):  # type: ignore[misc]
    """What next: whether something is to be done."""

    def _default_tests_with_reference(self, context: Any) -> list[Any]:  # noqa: ARG002
        return [eq(0).bind_single(self.get_fingerprint())]


class DecisionTakenCalculation(SingleValueCalculation[DecisionTaken]):  # type: ignore[misc]
    """Shows what `decide` decided."""

    def calculate(self, context: Any, current_data: Any, reference_data: Any) -> Any:  # noqa: ARG002
        """Give 1 if something is to be done, else 0, and the card of the last question."""
        decision = _page(context).decision
        result = self.result(int(decision.action not in {Action.NONE, Action.WATCH}))
        answer, colour = IN_WORDS[decision.action]
        result.widget = [
            _card(
                "What next?",
                answer,
                colour,
                decision.reason,
                f"Not retrained: {decision.suppressed.rstrip('.')}." if decision.suppressed else "",
                f"Saved: {decision.saved.rstrip('.')}." if decision.saved else "",
            )
        ]
        return result

    def display_name(self) -> str:
        """Name the metric."""
        return "Something to do"


class SlicesThatRang(SingleValueMetric):  # type: ignore[misc]
    """How many slices rang, and everything else that the four answers rest on."""

    def _default_tests_with_reference(self, context: Any) -> list[Any]:
        if not _page(context).slices:
            return []
        return [eq(0).bind_single(self.get_fingerprint())]


class SlicesThatRangCalculation(SingleValueCalculation[SlicesThatRang]):  # type: ignore[misc]
    """Shows findings, parts, slices, the history and the farthest pictures."""

    def calculate(self, context: Any, current_data: Any, reference_data: Any) -> Any:  # noqa: ARG002
        """Give the number of slices that rang, with what stands below the answers."""
        page, columns = _page(context), context.configuration.columns
        result = self.result(sum(bool(row.alarm) for row in page.slices))
        result.widget = [
            *_findings(page, columns),
            _parts(page.detection),
            *_slices(page.slices),
            _history(page),
            *_strays(page.strays),
            # stands between our answers and Evidently's columns, which follow
            text_widget(
                title="Column by column",
                text=f"The batch (current) against {len(columns.before)} pictures of the regime "
                "that fits best (reference). These marks illustrate; they decide nothing.",
            ),
        ]
        return result

    def display_name(self) -> str:
        """Name the metric."""
        return "Slices that rang"


def _does_it_hurt(page: Page) -> tuple[str, str]:
    """Answer the second question by the estimate, with its card's colour."""
    found = page.estimate
    fell = has_fallen(found.reference, found.value, page.min_drop)
    if not found.believable:
        return "Probably, by an unknown amount" if fell else "Not known", "warning"
    change = f"{found.reference:.3f} → {found.value:.3f}"
    return (f"Probably: {change}", "error") if fell else (f"Not shown to: {change}", "success")


def write_report(
    path: Path,
    page: Page,
    *,
    workspace: Path | str | None = None,
    project: str = "",
    run_key: str = "",
) -> None:
    """Write the report of one check as a single HTML file of at most 6 MB.

    The four answers come first, then what they rest on, then at most 16 summary columns (for their
    order see `columns.summary_columns`): batch against at most 1,000 rows of the regime that fits
    best. A column is marked as drifted when its own test is under alpha divided by the number of
    columns. The snapshot's tests say what the detection, the estimate and the decision say.

    Args:
        path: the HTML file.
        page: what it shows.
        workspace: folder of an Evidently workspace that gets the same snapshot.
        project: its project there, made if there is none of this name; "" stands for "sustain".
        run_key: what makes the check unique: the same key adds nothing; "" always adds a run.

    Raises:
        OSError: if the file cannot be written; or, with the file written, if the workspace cannot.

    """
    regime = next(r for r in page.reference.worlds if r.name == page.detection.regime)
    columns = summary_columns(page.reference, regime, page.batch)
    report = _PageReport(
        [
            JointShift(),
            Alarm(),
            *([] if page.stream_value is None else [StreamEvidence()]),
            EstimatedAccuracy(),
            EstimatedFall(),
            MovedColumns(),
            DecisionTaken(),
            SlicesThatRang(),
            *(
                ValueDrift(
                    column=column,
                    method="chisquare" if column in columns.categories else "ks",
                    threshold=page.detection.alpha / len(columns.now.columns),
                    tests=[],
                )
                for column in columns.now.columns
            ),
        ],
        page,
        columns,
    )
    definition = DataDefinition(
        numerical_columns=[c for c in columns.now.columns if c not in columns.categories],
        categorical_columns=list(columns.categories),
    )
    with warnings.catch_warnings():
        # its tests warn of small samples; they draw here, they do not decide
        warnings.simplefilter("ignore")
        snapshot = report.run(
            Dataset.from_pandas(columns.now, data_definition=definition),
            Dataset.from_pandas(columns.before, data_definition=definition),
            timestamp=_utc(page.at or datetime.now(UTC)),
            name=page.title,
            tags=[str(page.decision.action), *(["alarm"] if page.detection.alarm else [])],
            metadata={"run_key": run_key},
        )
        text = _escaped(snapshot.get_html_str(as_iframe=False))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    if workspace is not None:
        try:
            _add_to_workspace(Path(workspace), project or "sustain", run_key, snapshot)
        except (OSError, ValueError) as error:
            raise OSError(
                f"{path} is written, but the Evidently workspace {workspace} did not take it: "
                f"{error}; make the folder writable or name another one"
            ) from error


def _escaped(page: str) -> str:
    """Write `<` as a script's escape of it in the two lines of Evidently's data.

    Those are JSON, where `<` only stands in strings; so no name ends the script or opens another.
    """
    lines = page.split("\n")
    data = [
        i
        for i, line in enumerate(lines)
        if line.startswith(("    var metric_", "    var additional_graphs_metric_"))
    ]
    if len(data) != 2:  # noqa: PLR2004  the widgets and the graphs that they open
        raise RuntimeError(
            f"Evidently wrote {len(data)} lines of data instead of 2, so the page cannot be made "
            "safe: install the release of Evidently that pyproject.toml names"
        )
    for i in data:
        lines[i] = lines[i].replace("<", "\\u003c")
    return "\n".join(lines)


# --- the workspace


def _add_to_workspace(folder: Path, project: str, run_key: str, snapshot: Any) -> None:
    """Add a run, unless one of this key is there.

    By `LocalState`, because to open a `Workspace` reads every snapshot in it (1.7 MB each). The
    file appears whole: on half of one, `evidently ui` would not start.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = LocalState(str(folder))
    found = [one for one in state.list_projects() if state.read_project(one).name == project]
    home = found[0] if found else _new_project(state, project)
    run = uuid.uuid5(home, run_key) if run_key else uuid.uuid4()
    file = folder / str(home) / SNAPSHOTS_DIR_NAME / f"{run}{DOT_JSON}"
    if file.exists():
        return
    file.parent.mkdir(exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(snapshot.dumps(), encoding="utf-8")
    try:
        file.hardlink_to(partial)  # an `evidently ui` that runs overlooks a file that is renamed
        partial.unlink()
    except OSError:
        partial.replace(file)


def _new_project(state: Any, name: str) -> uuid.UUID:
    """Make a project with a dashboard; two processes at once make the same."""
    project = ProjectModel(
        id=uuid.uuid5(PROJECTS, name),
        name=name,
        description="One run a check: did it change, does it hurt, what changed, what next",
    )
    panels = [
        line_plot_panel(
            title,
            [PanelMetric(metric=m.__name__, legend=legend) for legend, m in lines.items()],
            size="half",
        )
        for title, lines in (
            ("Did it change? p-value of the joint test", {"p": JointShift}),
            ("Evidence over the stream, log10", {"evidence": StreamEvidence}),
            ("Does it hurt? Accuracy, estimated without labels", {"estimated": EstimatedAccuracy}),
            ("What next?", {"it rang": Alarm, "something was to do": DecisionTaken}),
        )
    ]
    tab = DashboardTabModel(title="Checks", panels=[panel.id for panel in panels])
    state.write_project(project)
    state.write_dashboard(project.id, DashboardModel(tabs=[tab], panels=panels))
    home: uuid.UUID = project.id
    return home


def _utc(at: datetime) -> datetime:
    """Give Evidently the times without a zone that it compares with its own."""
    return at.astimezone(UTC).replace(tzinfo=None)


# --- what stands below the answers


def _card(title: str, answer: str, colour: str, *sentences: str) -> Any:
    """Answer one question on half the width: colours are success, info, warning, error."""
    card = counter(title=title, counters=[CounterData("", answer)], size=WidgetSize.HALF)
    card.insights = [Insight(title="", severity=colour, text=" ".join(filter(None, sentences)))]
    return card


def _findings(page: Page, columns: Columns) -> list[Any]:
    lists = (
        ("Findings", (*page.notes, *columns.notes)),
        ("Moved in the embedding, which is what the model sees", page.dimensions),
    )
    return [_table(title, [""], [[words] for words in found]) for title, found in lists if found]


def _parts(detection: Detection) -> Any:
    return _table(
        "Parts of the batch, each tested against its own regime",
        ["regime", "pictures", "share", "test", "statistic", "p"],
        [
            [
                part.regime,
                f"{part.n:,}",
                f"{part.share:.0%}",
                shift.detector,
                f"{shift.statistic:.3g}",
                p_words(shift.p_value).removeprefix("= "),
            ]
            for part in detection.parts
            for shift in part.shifts
        ],
    )


def _slices(slices: tuple[Slice, ...]) -> list[Any]:
    if not slices:
        return []
    rows = [
        [
            f"{row.column} = {row.value}" if row.value else row.column,
            f"{row.n:,}",
            _figure(row.p_value, ".2g"),
            "rang" if row.alarm else "quiet" if math.isfinite(row.p_value) else "not tested",
            _figure(row.estimated, ".3f"),
            _figure(row.reference, ".3f"),
            row.note,
        ]
        # what rang first, so that it is not cut off
        for row in sorted(slices, key=lambda row: (not row.alarm, -row.n))
    ]
    header = ["slice", "pictures", "p", "alarm", "estimated accuracy", "on the reference", "note"]
    return [_table("Slices, at a level corrected for their number", header, rows)]


def _table(title: str, header: list[str], rows: list[list[str]]) -> Any:
    shown = rows[:MAX_TABLE_ROWS]
    if len(rows) > len(shown):
        shown = [*shown, [f"and {len(rows) - len(shown)} more", *("" for _ in header[1:])]]
    return table_data(title=title, column_names=header, data=shown)


def _history(page: Page) -> Any:
    estimate = page.estimate
    now = Past(
        batch_id="this batch",
        at=page.at or datetime.now(UTC),
        p_value=page.detection.p_value,
        stream=page.stream_value,
        alarm=page.detection.alarm,
        estimated=estimate.value,
        low=estimate.low,
        high=estimate.high,
    )
    checks = [*page.past[-MAX_PAST + 1 :], now]
    data, layout = history(
        checks,
        alpha=page.detection.alpha,
        threshold=page.stream_threshold,
        reference=estimate.reference,
    )
    title = f"The last {len(checks)} checks" if page.past else "The first check"
    return plotly_graph(graph_data=GraphData(f"{title}: {LEGEND}", data, layout))


def _strays(strays: tuple[tuple[str, bytes, str, bytes, float], ...]) -> list[Any]:
    shown = strays[:MAX_STRAYS]
    if not shown:
        return []
    rows = [[name, f"{distance:.3g}", nearest] for name, _, nearest, _, distance in shown]
    names = table_data(column_names=["sample", "distance", "nearest in the reference"], data=rows)
    return [
        widget_tabs(
            title="The farthest pictures, each beside the nearest one of the reference",
            tabs=[
                TabData("pictures", plotly_graph(graph_data=GraphData("", [], pairs(shown)))),
                TabData("names", names),
            ],
        )
    ]


def _sentence(words: str) -> str:
    words = words.strip()
    if not words:
        return ""
    return words[0].upper() + words[1:] + ("" if words[-1] in ".!?" else ".")


def _figure(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "-"
