"""What one check costs beside others, and its report."""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd
import peers
import realdata
import torch
from PIL import Image
from results import Figure
from trials import (
    ALPHA,
    DIGITS,
    LARGE,
    PACS_REFERENCE,
    Held,
    Runner,
    generator,
    mixed,
    pool,
    reference_of,
    regime,
)

from monitoring.accuracy import estimate_accuracy
from monitoring.columns import summary_columns
from monitoring.detectors import DetectionSettings, detect_drift
from monitoring.features import FeatureTable
from monitoring.policy import Action, Decision
from monitoring.reference import Reference
from monitoring.report import Page, Past, write_report
from monitoring.sequential import Running, StreamEvidence, StreamSettings, bets, step

FEW, MANY = 10, 1000
TARGETS = {200: 15, 1000: 100}
THUMBNAILS = 12
PAST = 200


@dataclass(frozen=True, eq=False)
class Check:
    """What a check does between the forward pass and the report; calling it does it once."""

    reference: Reference
    batch: FeatureTable
    running: Running

    def __call__(self) -> None:
        batch = self.batch.take(np.arange(len(self.batch)))  # nothing that was worked out before
        detection = detect_drift(self.reference, batch, DetectionSettings(alpha=ALPHA))
        estimate_accuracy(self.reference, batch)
        evidence = StreamEvidence(detection.p_value, bets(self.reference, batch))
        step(self.running, evidence, StreamSettings(), ALPHA)


def milliseconds(repeat: int, action: Callable[[], object]) -> float:
    """Give the median CPU time of this process, after one run that does not count."""
    action()
    took = []
    for _ in range(repeat):
        began = time.process_time()
        action()
        took.append(time.process_time() - began)
    return 1000 * statistics.median(took)


def _timed(name: str, n: int, past: int, repeat: int) -> float:
    """Time a check of n rows of a pool against a prepared reference."""
    order = generator("cost").permutation(len(pool(name)))
    large = LARGE if name == DIGITS else len(order) - max(TARGETS)
    reference = reference_of(regime(name, order[:large]))
    batch = pool(name).features.take(order[-n:])
    one, running = StreamEvidence(0.5, bets(reference, batch)), Running()
    for _ in range(past):
        running, _state = step(running, one, StreamSettings(), ALPHA)
    return milliseconds(repeat, Check(reference, batch, running))


def _prepared(name: str) -> float:
    """Time what is done once for each reference: a first check less a second one."""
    order = generator("cost").permutation(len(pool(name)))
    batch = pool(name).features.take(order[-200:])
    check = Check(reference_of(regime(name, order[:LARGE])), batch, Running())
    took = []
    for _ in range(2):
        began = time.process_time()
        check()
        took.append(time.process_time() - began)
    return 1000 * (took[0] - took[1])


def cost(run: Runner) -> list[Figure]:
    """Give CPU milliseconds of one check with one thread, reference 2,000."""
    repeat = run.effort.repeat
    order = generator("cost").permutation(len(pool(DIGITS)))
    held = Held(reference_of(regime(DIGITS, order[:LARGE])))
    fitted, frame = held.summaries
    figures, ours = [], {n: _timed(DIGITS, n, FEW, repeat) for n in TARGETS}
    for n, target in TARGETS.items():
        table = pool(DIGITS).features.take(order[-n:])
        columns = fitted.of(table)

        def preset(columns: object = columns) -> None:
            peers.evidently_whole_preset(frame, columns)

        beside = {
            "in 1280 dimensions, reference 1,048": _timed("art-lite0", n, FEW, repeat),
            "once for each reference": _prepared(DIGITS),
            f"Evidently preset, {columns.shape[1]} columns": milliseconds(min(3, repeat), preset),
        }
        if repeat > 1:
            elsewhere = run.ask("cost", reference=held.table.embedding, batch=table.embedding)
            beside |= {f"alibi-detect {k}": 1000 * v for k, v in (elsewhere or {}).items()}
        figures.append(
            Figure(
                f"one check beyond forward pass and HTML, n = {n}, reference 2,000, CPU ms",
                ours[n],
                f"≤ {target}",
                ours[n] <= target,
                beside,
            )
        )
    many = _timed(DIGITS, 200, MANY, repeat)
    figures.append(
        Figure(
            f"CPU ms that {MANY:,} past checks add to a check with {FEW}, n = 200",
            many - ours[200],
            "≤ 15 in all, and flat: ≤ 25 % more",
            many <= min(TARGETS[200], 1.25 * ours[200]),
            {f"with {FEW}": ours[200], f"with {MANY:,}": many},
        )
    )
    return figures


def _picture(domain: str, row: int) -> bytes:
    """Give one picture of PACS as JPEG."""
    pixels, _ = realdata.pacs(domain)
    skip = realdata.LEARNED["pacs"] if domain == "photo" else 0
    buffer = BytesIO()
    Image.fromarray(pixels[skip + row].permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def _colours(domain: str, rows: np.ndarray) -> pd.DataFrame:
    """Give six columns that a user might add: mean and spread of each channel."""
    pixels, _ = realdata.pacs(domain)
    skip = realdata.LEARNED["pacs"] if domain == "photo" else 0
    seen = pixels[torch.from_numpy(skip + rows)].double().flatten(2)
    return pd.DataFrame(
        {
            f"{colour} {what}": values[:, i].numpy()
            for what, values in (("mean", seen.mean(dim=2)), ("spread", seen.std(dim=2)))
            for i, colour in enumerate(("red", "green", "blue"))
        }
    )


def _page() -> Page:
    """Describe a batch of 200, half of it art, against photos, with metadata, after 200 checks."""
    rng = generator("report")
    photo, art = "photo-squeezenet", "art-squeezenet"
    photos, strangers = (rng.permutation(len(pool(name))) for name in (photo, art))
    known, rest = photos[:PACS_REFERENCE], photos[PACS_REFERENCE:][:100]
    strangers = strangers[:100]
    batch = dataclasses.replace(
        mixed((pool(art), strangers), (pool(photo), rest)).features,
        metadata=pd.concat(
            [_colours("art", strangers), _colours("photo", rest)], ignore_index=True
        ),
    )
    first = regime(photo, known)
    reference = reference_of(
        dataclasses.replace(
            first, features=dataclasses.replace(first.features, metadata=_colours("photo", known))
        )
    )
    began = datetime(2026, 1, 1, tzinfo=UTC)
    return Page(
        title="art-2026 against version 1",
        reference=reference,
        batch=batch,
        detection=detect_drift(reference, batch, DetectionSettings(alpha=ALPHA)),
        estimate=estimate_accuracy(reference, batch),
        decision=Decision(Action.ASK_FOR_LABELS, "It changed, and accuracy probably fell."),
        stream_words="The stream rang.",
        stream_value=4.2,
        stream_threshold=3.0,
        past=tuple(
            Past(
                f"batch-{i:04d}",
                began + timedelta(hours=i),
                float(rng.random()),
                float(rng.normal()),
                alarm=False,
                estimated=0.9 + 0.01 * float(rng.normal()),
                low=0.85,
                high=0.95,
            )
            for i in range(PAST)
        ),
        strays=tuple(
            (
                f"art-2026/{i:05d}.jpg",
                _picture("art", int(strangers[i])),
                f"photos/{i:05d}.jpg",
                _picture("photo", int(photos[i])),
                float(9 - i / 10),
            )
            for i in range(THUMBNAILS)
        ),
        at=began + timedelta(hours=PAST),
    )


def report(run: Runner) -> list[Figure]:
    """Give the size of the HTML report and the time that writing it takes."""
    page = _page()
    drawn = summary_columns(page.reference, page.reference.worlds[0], page.batch).now.shape[1]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.html"
        write_report(path, page)  # the first one pays for imports
        took = []
        for _ in range(min(3, run.effort.repeat)):
            began = time.perf_counter()
            write_report(path, page)
            took.append(time.perf_counter() - began)
        size = path.stat().st_size / 1e6
    seconds = statistics.median(took)
    what = f"HTML report, {drawn} columns, {2 * THUMBNAILS} thumbnails, {PAST} past checks"
    return [
        Figure(f"{what}, MB", size, "≤ 6", size <= 6, {}),
        Figure(f"{what}, s", seconds, "≤ 8", seconds <= 8, {}),
    ]
