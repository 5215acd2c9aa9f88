"""The drift report as a file: what it says, what it never says, how big it is."""

from __future__ import annotations

import dataclasses
import html.parser
import io
import json
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from browser import open_tab
from evidently.ui.workspace import Workspace
from PIL import Image

from monitoring.accuracy import estimate_accuracy
from monitoring.detectors import DetectionSettings, detect_drift
from monitoring.features import FeatureTable
from monitoring.figures import clip
from monitoring.policy import Action, Decision
from monitoring.reference import Reference, Regime
from monitoring.report import Page, Past, write_report
from monitoring.slices import Slice

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

EVIL = "<script>alert(1)</script>"
CLOSING = "</script><img src=x onerror=alert(2)><!--<script>"
MARKDOWN = "![](http://tracker.invalid/x.png) <b>bold</b>"
QUESTIONS = ("Did it change?", "Does it hurt?", "What changed?", "What next?")
MAX_BYTES = 6_000_000
STATISTICS = ("brightness", "contrast", "sharpness", "saturation", "width", "height", "aspect")
NAN = float("nan")
NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)


def table(
    seed: int, n: int, classes: int, *, name: str = "", shift: float = 0.0, extra: int = 0
) -> FeatureTable:
    rng = np.random.default_rng(seed)
    statistics = {column: rng.random(n) + shift for column in STATISTICS}
    statistics |= {f"column {i}": rng.random(n) + shift for i in range(extra)}
    return FeatureTable(
        tuple(f"b{name}/{i}" for i in range(n)),
        (rng.standard_normal((n, 8)) + shift).astype(np.float32),
        rng.dirichlet(np.ones(classes), n).astype(np.float32),
        pd.DataFrame(statistics | {"constant": np.zeros(n)}),
        pd.DataFrame(
            {
                f"camera{name}": rng.choice(["north", f"south{name}"], n).astype(object),
                "temperature": np.where(np.arange(n) % 7 == 1, np.nan, rng.normal(shift, 1, n)),
            }
        ),
    )


def picture(seed: int, size: int = 64) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "PNG")
    return encoded.getvalue()


def make_page(
    *,
    n: int = 200,
    classes: int = 4,
    name: str = "",
    shift: float = 1.0,
    past: int = 30,
    strays: int = 3,
    extra: int = 0,
) -> Page:
    """Check a batch for real; every name on the page ends in `name`."""
    features = table(0, 1500, classes, name=name, extra=extra)
    labels = features.predicted.copy()
    labels[:300] = (labels[:300] + 1) % classes
    names = tuple(f"class {i}{name}" for i in range(classes))
    reference = Reference((Regime(f"photos{name}", features, labels),), names)
    batch = table(1, n, classes, name=name, shift=shift, extra=extra)
    return Page(
        title=f"Check of {name}",
        reference=reference,
        batch=batch,
        detection=detect_drift(reference, batch, DetectionSettings()),
        estimate=estimate_accuracy(reference, batch),
        decision=Decision(Action.ASK_FOR_LABELS, f"60 labels are missing: 40 of 100. {name}"),
        stream_words=f"evidence 2,310 of the 1,000 needed{name}",
        stream_value=3.36,
        stream_threshold=3.0,
        past=tuple(
            Past(
                f"b{i}{name}",
                NOON + timedelta(hours=i),
                10.0 ** (-i % 14),
                NAN if i == 3 else 0.1 * i,
                i % 9 == 8,
                0.8,
                0.7,
                NAN,
                0.75 if i % 4 == 0 else None,
            )
            for i in range(past)
        ),
        strays=tuple(
            (
                f"far {i}{name}",
                picture(i),
                f"near {i}{name}",
                picture(99 - i) if i else b"",
                9.0 - i,
            )
            for i in range(strays)
        ),
        dimensions=(f"embedding 1 +2.0 sd{name}",),
        slices=(
            Slice("camera", f"east{name}", 3, NAN, False, NAN, NAN, f"too few pictures{name}"),
            Slice("camera", f"north{name}", 90, 0.0004, True, 0.6, 0.8),
        ),
        error_words=f"off by .02 on 7 settled batches{name}",
        notes=(f"3-channel pictures before, 1-channel now{name}",),
        later_words=f"labels that come later are told elsewhere{name}",
        at=NOON + timedelta(days=9),
    )


class Elements(html.parser.HTMLParser):
    """What a browser makes of a page: its elements, and the text of its scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note an element."""
        del attrs
        self.tags.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        """Note a script's text."""
        if self.cdata_elem == "script":
            self.scripts[-1] += data


def widgets(page: str) -> Any:
    """Read the data that the page's script holds, as the browser does."""
    (script,) = [s for s in Elements(page).scripts if s.lstrip().startswith("var metric_")]
    line = script.strip().split("\n")[0]
    return json.loads(line.partition(" = ")[2].rstrip(";"))


def written(folder: Path, page: Page) -> str:
    write_report(folder / "new" / "report.html", page)
    return (folder / "new" / "report.html").read_text(encoding="utf-8")


def runs(workspace: Path, project: str) -> list[Any]:
    opened = Workspace.create(str(workspace))
    (found,) = opened.search_project(project)
    return [opened.get_run(found.id, run) for run in opened.list_runs(found.id)]


def verdicts(workspace: Path, page: Page) -> dict[str, str]:
    """Write a page and give the states of its tests by the names of the metrics."""
    write_report(workspace.parent / "page.html", page, workspace=workspace, project="p")
    (run,) = runs(workspace, "p")
    return {
        str(result.display_name): str(test.status.value)
        for result in run.metric_results.values()
        for test in result.tests
    }


def test_report_says_what_was_found_in_the_order_of_the_questions(tmp_path: Path) -> None:
    """Our figures, the reason, slices, findings and the alarm's condition are on the page."""
    page = make_page()
    text = written(tmp_path, page)
    places = [text.index(words) for words in [*QUESTIONS, "in column"]]
    assert places == sorted(places)
    shift = page.detection.parts[0].shifts[0]
    for words in (
        f"{page.estimate.value:.3f}",
        f"{page.estimate.low:.3f} to {page.estimate.high:.3f}",
        f"{page.estimate.reference:.3f}",
        f"{page.estimate.novelty:.1%}",
        f"{shift.statistic:.3g}",
        shift.detector.split()[0],
        page.detection.top_columns[0],
        "Yes, it changed",
        "Ask for labels",
        "60 labels are missing: 40 of 100.",
        "Evidence 2,310 of the 1,000 needed.",
        "Off by .02 on 7 settled batches.",
        "3-channel pictures before, 1-channel now",
        "Labels that come later are told elsewhere.",
        "embedding 1 +2.0 sd",
        "Drift in column 'temperature'",
        "Drift in column 'camera'",
        "Drift in column 'embedding 1'",
        "The last 31 checks",
    ):
        assert words in text
    assert "Drift in column 'constant'" not in text
    slices = [
        text.index(words) for words in ("camera = north", "camera = east", "too few pictures")
    ]
    assert slices == sorted(slices)  # what rang comes first
    assert "NaN" not in json.dumps(widgets(text))


@pytest.mark.parametrize("name", [EVIL, CLOSING, MARKDOWN])
def test_no_name_becomes_an_element(tmp_path: Path, name: str) -> None:
    """A page of hostile names parses into the same elements, and its data still reads as JSON."""
    calm = written(tmp_path, make_page())
    hostile = written(tmp_path, make_page(name=name))
    assert Elements(hostile).tags == Elements(calm).tags
    strings = json.dumps(widgets(hostile), ensure_ascii=False)
    for words in ("Check of ", "photos", "camera = north", "too few pictures", "far 2", "near 2"):
        assert f"{words}{json.dumps(name)[1:-1]}" in strings
    for words in ("class 0", "south", "b29"):  # what plotly reads as HTML
        assert json.dumps(html.escape(clip(f"{words}{name}", 40), quote=False))[1:16] in strings


@pytest.mark.parametrize(
    ("size", "columns"),
    [
        ({"n": 2000, "classes": 7, "past": 300, "strays": 20, "extra": 4}, 16),
        ({"n": 12_000, "classes": 120, "past": 0, "strays": 12, "extra": 30}, 16),
        ({"n": 1, "classes": 2, "past": 0, "strays": 0}, 15),
    ],
)
def test_report_stays_small(tmp_path: Path, size: dict[str, int], columns: int) -> None:
    """Rows, columns, classes, checks and pictures are bounded: 6 MB; one picture is enough."""
    text = written(tmp_path, make_page(**size))  # type: ignore[arg-type]
    assert len(text.encode()) <= MAX_BYTES
    assert text.count("Drift in column '") == columns
    assert text.count("data:image/jpeg") <= 24
    assert ("other classes" in text) == (size["classes"] > 15)
    assert "What next?" in text


def test_tests_agree_with_the_alarm_the_estimate_and_the_decision(tmp_path: Path) -> None:
    """Each test of the snapshot fails exactly where what it stands for was found."""
    page = make_page()
    estimate = dataclasses.replace(page.estimate, value=0.7, reference=0.8, believable=True)
    loud = verdicts(tmp_path / "loud", dataclasses.replace(page, estimate=estimate))
    assert set(loud.values()) == {"FAIL"}
    assert set(loud) == {
        "Joint shift (p)",
        "Alarm",
        "Evidence over the stream (log10)",
        "Estimated fall in accuracy",
        "Something to do",
        "Slices that rang",
    }
    calm = dataclasses.replace(
        make_page(shift=0.0),
        estimate=dataclasses.replace(estimate, value=0.751),
        decision=Decision(Action.NONE, "The batch looks like the reference."),
        stream_value=2.99,
        slices=(),
    )
    assert not calm.detection.alarm
    quiet = verdicts(tmp_path / "quiet", calm)
    assert set(quiet.values()) == {"SUCCESS"}
    assert set(quiet) == set(loud) - {"Slices that rang"}


def test_p_value_is_not_tested_where_the_stream_decides(tmp_path: Path) -> None:
    """An alarm of the stream fails its own tests; an estimate not to be believed only warns."""
    page = make_page(shift=0.0)
    states = verdicts(
        tmp_path / "w",
        dataclasses.replace(
            page,
            detection=dataclasses.replace(page.detection, alarm=True),
            estimate=dataclasses.replace(
                page.estimate, value=0.1, reference=0.8, novelty=0.9, believable=False
            ),
        ),
    )
    assert "Joint shift (p)" not in states
    assert states["Alarm"] == states["Evidence over the stream (log10)"] == "FAIL"
    assert states["Estimated fall in accuracy"] == "WARNING"


def test_decision_says_what_was_not_done_and_what_that_saved(tmp_path: Path) -> None:
    """A rollback and a suppressed retraining are told in words."""
    page = make_page(past=0, strays=0)
    decision = Decision(Action.WATCH, "Not shown to hurt.", "labels show no fall", "40 minutes")
    text = written(tmp_path, dataclasses.replace(page, decision=decision))
    for words in ("Keep watching", "Not retrained: labels show no fall.", "Saved: 40 minutes."):
        assert words in text
    decision = Decision(Action.ROLLBACK, "Version 3 is worse than version 2.")
    assert "Roll back" in written(tmp_path, dataclasses.replace(page, decision=decision))
    assert "The first check" in text


def test_workspace_gets_each_check_once(tmp_path: Path) -> None:
    """The same key adds nothing; another adds a run, with our metrics, title, tags and time."""
    page = make_page(name=EVIL, strays=0)
    folder = tmp_path / "new" / "workspace"
    for key in ("one", "one", "two"):
        write_report(tmp_path / "r.html", page, workspace=folder, project=EVIL, run_key=key)
    found = runs(folder, EVIL)
    assert sorted(run.metadata["run_key"] for run in found) == ["one", "two"]
    for run in found:
        assert (run.name, run.tags) == (f"Check of {EVIL}", ["ask_for_labels", "alarm"])
        assert run.timestamp == datetime(2026, 12, 1, 12)  # noqa: DTZ001  Evidently's have no zone
        values = {result.display_name: result for result in run.metric_results.values()}
        assert values["Joint shift (p)"].value == page.detection.p_value
        assert values["Estimated accuracy"].value == page.estimate.value
        assert values["Evidence over the stream (log10)"].value == 3.36
    (project,) = Workspace.create(str(folder)).search_project(EVIL)
    assert len(project.dashboard.model().panels) == 4


def test_workspace_draws_one_line_a_metric(tmp_path: Path) -> None:
    """Two batches with different figures are two points of one series, not two series."""
    folder = tmp_path / "workspace"
    for n in (100, 200):
        page = make_page(n=n, past=0, strays=0, name=str(n))
        write_report(tmp_path / "r.html", page, workspace=folder, project="p", run_key=str(n))
    first, second = (
        {
            key
            for key, result in run.metric_results.items()
            if not str(result.display_name).startswith("Value drift for")
        }
        for run in runs(folder, "p")
    )
    assert first == second
    assert len(first) == 8


def test_half_a_run_of_a_killed_process_is_written_again(tmp_path: Path) -> None:
    """Half a file beside the runs, as a killed process leaves it, harms no run and no reader."""
    page = make_page(past=0, strays=0)
    folder = tmp_path / "workspace"
    write_report(tmp_path / "r.html", page, workspace=folder, project="p", run_key="one")
    (file,) = folder.glob("*/snapshots/*")
    file.rename(file.with_suffix(".partial"))
    file.with_suffix(".partial").write_bytes(b"{")
    write_report(tmp_path / "r.html", page, workspace=folder, project="p", run_key="one")
    (run,) = runs(folder, "p")
    assert run.name == page.title
    assert [found.name for found in file.parent.iterdir()] == [file.name]


def test_workspace_that_cannot_be_written_costs_no_report(tmp_path: Path) -> None:
    """The error names the workspace and comes after the HTML."""
    (tmp_path / "workspace").write_text("a file, not a folder")
    with pytest.raises(OSError, match=r"workspace .* did not take it: .*File exists"):
        write_report(
            tmp_path / "r.html", make_page(past=0, strays=0), workspace=tmp_path / "workspace"
        )
    assert "What next?" in (tmp_path / "r.html").read_text(encoding="utf-8")


# --- in a browser


def test_first_screen_answers_and_nobodys_script_runs(tmp_path: Path) -> None:
    """At 1280 x 800 four answers stand in order without scrolling; pictures and plots are drawn."""
    # a note under a note: what a label, a table, Markdown and a script would each be caught by
    page = make_page(name=f"{MARKDOWN}{EVIL}{CLOSING}")
    write_report(tmp_path / "report.html", page)
    asked: list[str] = []
    seen: list[str] = []
    with open_tab() as tab:
        tab.on("request", lambda request: asked.append(request.url))
        tab.on("dialog", lambda dialog: (seen.append(dialog.message), dialog.dismiss()))
        tab.on("pageerror", lambda error: seen.append(str(error)))
        tab.goto((tmp_path / "report.html").as_uri())
        boxes = []
        for words in (*QUESTIONS, "Yes, it changed", "Ask for labels"):
            place = tab.get_by_text(words, exact=True)
            place.wait_for()
            box = place.bounding_box()
            assert box is not None
            boxes.append(box)
        assert max(box["y"] + box["height"] for box in boxes) <= 800
        order = [(box["y"], box["x"]) for box in boxes[: len(QUESTIONS)]]
        assert order == sorted(order)
        pictures = tab.locator("image")
        pictures.first.wait_for()
        # SVG's images have no naturalWidth, so each is decoded once more
        widths = pictures.evaluate_all(
            """images => Promise.all(images.map(async image => {
                const copy = new Image();
                copy.src = image.href.baseVal;
                await copy.decode();
                return [copy.naturalWidth, image.getBoundingClientRect().width];
            }))"""
        )
        assert len(widths) == 5  # of three pairs one picture is gone
        assert all(0 < natural <= 96 and shown > 0 for natural, shown in widths)
        panels = tab.locator(".scatterlayer")
        drawn = [panels.nth(i).locator(".point").count() for i in range(3)]
        # 31 checks: p-values; the e-process without a NaN; estimates and 8 settled ones
        assert drawn == [31, 30, 39]
        if folder := os.environ.get("SCREENSHOTS"):
            tab.screenshot(path=Path(folder) / "first-screen.png")
        tab.get_by_role("tab", name="Tests", exact=True).click()
        tab.get_by_text("Joint shift (p): Greater 0.010").wait_for()
        assert tab.locator("img, iframe, object").count() == 0
    assert not seen
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
