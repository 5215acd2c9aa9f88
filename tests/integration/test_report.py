"""The drift report as a file: what it says, what it never says, how big it is."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from monitoring.accuracy import estimate_accuracy
from monitoring.detectors import DetectionSettings, detect_drift
from monitoring.features import FeatureTable
from monitoring.policy import Action, Decision
from monitoring.reference import Reference, Regime
from monitoring.report import write_report

EVIL = "<script>alert(1)</script>"
MAX_BYTES = 6_000_000


def table(seed: int, n: int, classes: int, columns: int, shift: float = 0.0) -> FeatureTable:
    rng = np.random.default_rng(seed)
    statistics = {f"column {i}": rng.random(n) + shift for i in range(columns)}
    return FeatureTable(
        tuple(f"b/{i}" for i in range(n)),
        (rng.standard_normal((n, 8)) + shift).astype(np.float32),
        rng.dirichlet(np.ones(classes), n).astype(np.float32),
        pd.DataFrame(statistics | {"constant": np.zeros(n)}),
    )


def write(path: Path, n: int, classes: int, columns: int) -> tuple[str, list[str]]:
    """Write a report in which every name is hostile; give its HTML and our figures in it."""
    names = (EVIL, *(f"{EVIL}{i}" for i in range(1, classes)))
    features = table(0, 1500, classes, columns)
    labels = features.predicted.copy()
    labels[:300] = (labels[:300] + 1) % classes
    reference = Reference((Regime(f"photos {EVIL}", features, labels),), names)
    batch = table(1, n, classes, columns, shift=1.0)
    detection = detect_drift(reference, batch, DetectionSettings())
    estimate = estimate_accuracy(reference, batch)
    decision = Decision(Action.ASK_FOR_LABELS, f"60 labels are missing: 40 of 100. {EVIL}")
    write_report(
        path,
        reference=reference,
        batch=batch,
        detection=detection,
        estimate=estimate,
        decision=decision,
        title=f"Check of {EVIL}",
    )
    shift = detection.parts[0].shifts[0]
    figures = [
        f"{estimate.value:.3f}",
        f"{estimate.low:.3f} to {estimate.high:.3f}",
        f"{estimate.reference:.3f}",
        f"{estimate.novelty:.1%}",
        f"{shift.statistic:.3g}",
        shift.detector.split()[0],
        *detection.top_columns[:1],
    ]
    return path.read_text(encoding="utf-8"), figures


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_report_says_what_was_found_and_runs_nobodys_script(tmp_path: Path) -> None:
    """Our figures and the reason are in the page, in the order of the questions, all escaped."""
    html, figures = write(tmp_path / "new" / "report.html", n=200, classes=4, columns=3)
    assert len(html.encode()) <= MAX_BYTES
    questions = ["Did it change?", "Does it hurt?", "What changed?", "What next?", "in column"]
    places = [html.index(question) for question in questions]
    assert places == sorted(places)
    for figure in [*figures, "Yes, it changed", "Ask for labels", "60 labels are missing: 40 of"]:
        assert figure in html
    assert "<script>alert" not in html
    assert "script&gt;alert(1)" in html
    assert "\\u003cscript>alert(1)" in html
    assert "Drift in column 'constant'" not in html


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_report_stays_small(tmp_path: Path) -> None:
    """Many rows, columns and classes stay within 6 MB; one picture is enough for a report."""
    html, _ = write(tmp_path / "big.html", n=12_000, classes=120, columns=30)
    assert len(html.encode()) <= MAX_BYTES
    assert html.count("Drift in column '") <= 16
    assert "other classes" in html
    html, _ = write(tmp_path / "one.html", n=1, classes=2, columns=1)
    assert "What next?" in html
