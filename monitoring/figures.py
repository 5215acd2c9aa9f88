"""Plotly figures of the report, as the plain dictionaries that plotly reads.

Plotly reads labels as HTML, so every name from outside goes through `label`; a picture from outside
is decoded and encoded again.
"""

from __future__ import annotations

import base64
import html
import io
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from PIL import Image

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

Json: TypeAlias = dict[str, Any]

THUMBNAIL = 96
SMALLEST_P = 1e-12
"""Where the logarithmic axis ends."""
MAX_TICKS = 6
PAIRS_ACROSS = 4
HEIGHT = 500
"""Evidently gives every figure of full width this many pixels, whatever its layout says."""
RED, GREY, BLUE, GREEN = "#ed0400", "#4d4d4d", "#3b5bb5", "#0b8043"


@dataclass(frozen=True)
class Past:
    """One earlier check; a figure that was not measured is nan or None.

    Args:
        batch_id: the batch.
        at: when it was checked.
        p_value: of the joint test.
        stream: log10 of the e-process after it.
        alarm: whether it rang.
        estimated: accuracy, estimated without labels.
        low: lower end of its interval.
        high: upper end.
        settled: accuracy on its labels.

    """

    batch_id: str
    at: datetime
    p_value: float | None
    stream: float | None
    alarm: bool
    estimated: float | None
    low: float | None
    high: float | None
    settled: float | None = None


def label(text: str) -> str:
    """Make safe what plotly reads as HTML."""
    return html.escape(text, quote=False)


def clip(text: str, length: int) -> str:
    """Keep the beginning of a text."""
    return text if len(text) <= length else text[: length - 1] + "…"


def history(
    checks: Sequence[Past], *, alpha: float, threshold: float | None, reference: float
) -> tuple[list[Json], Json]:
    """Draw checks from the oldest to the newest: p-values, e-process, accuracy, one above another.

    Args:
        checks: at least one; a check that rang is red.
        alpha: level of the joint test.
        threshold: log10 of the e-process at which it rings.
        reference: accuracy on the reference.

    Returns:
        Traces and layout.

    """
    x = list(range(1, len(checks) + 1))
    hover = [
        f"{label(c.batch_id)}<br>{c.at:%Y-%m-%d %H:%M}{'<br><b>alarm</b>' if c.alarm else ''}"
        for c in checks
    ]

    def trace(axis: str, values: Sequence[float | None], name: str, **more: Any) -> Json:
        return {
            "type": "scatter",
            "x": x,
            "y": [_drawn(value) for value in values],
            "yaxis": axis,
            "name": name,
            "text": hover,
            "hovertemplate": "%{text}<br>" + name + " %{y:.3g}<extra></extra>",
            "mode": "lines+markers",
            "line": {"color": GREY, "width": 1.5},
            "marker": {"color": [RED if c.alarm else GREY for c in checks], "size": 6},
            "showlegend": False,
            **more,
        }

    band: Json = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip", "hovertemplate": None}
    fill: Json = {"fill": "tonexty", "fillcolor": "rgba(90,120,200,.2)"}
    diamonds: Json = {"mode": "markers", "marker": {"color": GREEN, "size": 9, "symbol": "diamond"}}
    floored = [p if p is None else max(p, SMALLEST_P) for p in (_drawn(c.p_value) for c in checks)]
    traces = [
        trace("y", floored, "p"),
        trace("y2", [c.stream for c in checks], "evidence, log10"),
        trace("y3", [c.low for c in checks], "low", **band),
        trace("y3", [c.high for c in checks], "high", **band, **fill),
        trace("y3", [c.estimated for c in checks], "estimated", line={"color": BLUE, "width": 1.5}),
        trace("y3", [c.settled for c in checks], "settled by labels", **diamonds),
    ]
    limits = [("y", alpha, "alpha", RED), ("y3", reference, "reference", GREY)]
    if threshold is not None:
        limits.append(("y2", threshold, "rings", RED))
    every = math.ceil(len(checks) / MAX_TICKS)
    ticks = range((len(checks) - 1) % every, len(checks), every)
    grid = {"gridcolor": "#e8e8e8", "zeroline": False}
    return traces, {
        "height": HEIGHT,
        "margin": {"l": 70, "r": 60, "t": 10, "b": 60},
        "plot_bgcolor": "#fff",
        "hovermode": "closest",
        "xaxis": {
            "anchor": "y3",
            "range": [0.5, len(checks) + 0.5],
            "tickvals": [x[i] for i in ticks],
            "ticktext": [label(clip(checks[i].batch_id, 16)) for i in ticks],
            "tickangle": 0,
            "showgrid": False,
        },
        "yaxis": {
            "domain": [0.7, 1],
            "type": "log",
            "title": {"text": "p-value"},
            "exponentformat": "power",
            "nticks": 5,
            **grid,
        },
        "yaxis2": {"domain": [0.36, 0.64], "title": {"text": "evidence<br>log10"}, **grid},
        "yaxis3": {"domain": [0, 0.3], "title": {"text": "accuracy"}, **grid},
        "shapes": [
            {
                "type": "line",
                "xref": "paper",
                "x0": 0,
                "x1": 1,
                "yref": axis,
                "y0": value,
                "y1": value,
                "line": {"color": colour, "dash": "dot", "width": 1},
            }
            for axis, value, _, colour in limits
        ],
        "annotations": [
            {
                "text": words,
                "xref": "paper",
                "x": 1.005,
                "xanchor": "left",
                "yref": axis,
                # plotly places annotations, unlike shapes, by the logarithm
                "y": math.log10(value) if axis == "y" else value,
                "showarrow": False,
                "font": {"size": 11},
            }
            for axis, value, words, colour in limits
        ],
    }


def _drawn(value: float | None) -> float | None:
    """Give a figure that JSON knows; plotly leaves a gap at None."""
    return None if value is None or not math.isfinite(value) else float(value)


def pairs(strays: Sequence[tuple[str, bytes, str, bytes, float]]) -> Json:
    """Lay out pictures, each beside the nearest one of the reference, for a figure without traces.

    Args:
        strays: one or more: name and picture, the same of the nearest one, their distance.

    """
    down = math.ceil(len(strays) / PAIRS_ACROSS)
    width, height = 1 / PAIRS_ACROSS, 1 / down
    images: list[Json] = []
    captions: list[Json] = []
    for i, (name, picture, nearest, other, distance) in enumerate(strays):
        left, top = i % PAIRS_ACROSS * width, 1 - i // PAIRS_ACROSS * height
        for x, data, caption, words in (
            (left, picture, name, f"distance {distance:.3g}"),
            (left + 0.45 * width, other, nearest, "nearest known"),
        ):
            source = thumbnail(data)
            at = {"xref": "paper", "yref": "paper", "x": x, "xanchor": "left", "yanchor": "top"}
            if source:
                size = {"sizex": 0.42 * width, "sizey": 0.68 * height, "sizing": "contain"}
                images.append({**at, "y": top, "source": source, "layer": "above", **size})
            captions.append(
                {
                    **at,
                    "y": top - (0.7 if source else 0.3) * height,
                    "text": ("" if source else "<i>picture is gone</i><br>")
                    + f"{label(_tail(caption, 17))}<br>{words}",
                    "hovertext": label(caption),
                    "align": "left",
                    "showarrow": False,
                    "font": {"size": 10},
                }
            )
    return {
        "height": HEIGHT,
        "margin": {"l": 10, "r": 10, "t": 10, "b": 0},
        "plot_bgcolor": "#fff",
        "xaxis": {"visible": False, "fixedrange": True},
        "yaxis": {"visible": False, "fixedrange": True},
        "images": images,
        "annotations": captions,
    }


def _tail(text: str, length: int) -> str:
    return text if len(text) <= length else "…" + text[1 - length :]


def thumbnail(data: bytes) -> str:
    """Give a PNG or JPEG picture, at most 96 pixels large, as a data URI; "" if it is neither."""
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as opened:
            opened.draft("RGB", (THUMBNAIL, THUMBNAIL))
            picture = opened.convert("L" if opened.mode in {"1", "L"} else "RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return ""
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    larger = THUMBNAIL // max(picture.size)
    if larger > 1:  # a browser would blur a picture of 28 pixels
        size = (picture.width * larger, picture.height * larger)
        picture = picture.resize(size, Image.Resampling.NEAREST)
    encoded = io.BytesIO()
    picture.save(encoded, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(encoded.getvalue()).decode("ascii")
