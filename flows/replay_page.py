"""The page of a replay: accuracy over the drift, the frontier, and why each version was made."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from html import escape
from math import isnan

import plotly.graph_objects as go
import plotly.io
from plotly.subplots import make_subplots

from flows.replay import Backtest
from monitoring.replay import Replayed, Served

SHOWN = 8
"""Curves that are drawn at first; the others are a click in the legend away."""
COLOURS = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31", "#636363",
)  # fmt: skip
"""Okabe and Ito's, which colour-blind people tell apart, and two more."""
WRAP = 90
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1180px; margin: 24px auto; color: #222 }
table { border-collapse: collapse; margin: 8px 0 24px } h1, h2 { font-weight: 600 }
th, td { padding: 4px 10px; text-align: right; border-bottom: 1px solid #ddd; vertical-align: top }
th { background: #f4f4f4 } td:first-child, th:first-child, td.text { text-align: left }
tr.chosen { background: #eaf5ee } .quiet { color: #666 } details { margin: 6px 0 }
"""
HEAD = (
    "policy", "mean accuracy", "retrainings", "rollbacks", "labels used", "CPU s", "energy, Wh",
    "days below", "regret",
)  # fmt: skip


def write_page(found: Backtest, name: str, chosen: Replayed | None) -> str:
    """Write one self-contained HTML page.

    Args:
        found: what was replayed.
        name: of the model.
        chosen: the policy that is marked, if any.
    """
    first = found.replays[0].served
    timeline = plotly.io.to_html(
        _timeline(found), include_plotlyjs="inline", full_html=False, config={"displaylogo": False}
    )
    cost = plotly.io.to_html(_frontier(found), include_plotlyjs=False, full_html=False)
    notes = "".join(f"<li>{escape(note)}</li>" for note in found.notes)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Replay of {escape(name)}</title>
<style>{STYLE}</style></head><body>
<h1>When should {escape(name)} have been retrained?</h1>
<p>{len(found.replays)} policies on {len(first)} batches, {first[0].at:%Y-%m-%d %H:%M} to
{first[-1].at:%Y-%m-%d %H:%M} UTC. A policy saw only what had arrived; accuracy is that of whatever
was champion when a batch arrived, on all labels known at the end. {escape(_ideal_words(found))}</p>
{f"<ul class=quiet>{notes}</ul>" if notes else ""}
{_table(found, chosen)}
{timeline}
{cost}
<h2>Why each version was made</h2>
{"".join(map(_reasons, found.replays))}
</body></html>
"""


def cells(found: Backtest, one: Replayed) -> tuple[str, ...]:
    """Write a policy's figures, in the order of `HEAD`."""
    regret = found.regret(one)
    below = "" if found.floor is None else f"{one.days_below(found.floor):.1f}"
    return (
        one.name,
        "" if isnan(one.accuracy) else f"{one.accuracy:.3f}",
        str(len(one.retrainings)),
        str(len(one.rollbacks)),
        f"{one.labels_used:,}",
        f"{one.cpu_seconds:.1f}",
        "" if one.energy_wh is None else f"{one.energy_wh:.2f}",
        below,
        "" if regret is None else f"{regret:.0f}",
    )


def _ideal_words(found: Backtest) -> str:
    if found.ideal is None:
        return "Without labels there is no oracle to compare with."
    ideal = found.ideal
    return (
        f"Regret counts the wrong answers more than the oracle's, a retraining as {found.cost:g} of"
        f" them. The oracle knows the future: of {ideal.candidates} versions (all that a policy"
        " made, and the first champion fine-tuned on all labels of some moments) it puts the best"
        f" into service at the best time, {ideal.found.retrainings} times here, at a mean accuracy"
        f" of {ideal.accuracy:.3f}."
    )


def _timeline(found: Backtest) -> go.Figure:
    """Draw accuracy over time above the evidence of drift."""
    figure = make_subplots(
        rows=2,
        cols=1,
        shared_xaxes=True,
        row_heights=[0.75, 0.25],
        vertical_spacing=0.06,
        subplot_titles=("accuracy of the champion of the time", f"drift: {_alarm_words(found)}"),
    )
    best = {one.name for one in found.frontier}
    order = sorted(found.replays, key=lambda one: one.name not in best)[:SHOWN]
    for place, one in enumerate(found.replays):
        colour = COLOURS[place % len(COLOURS)]
        shown = True if one in order else "legendonly"
        told = [served for served in one.served if served.labelled]
        figure.add_scatter(
            x=[served.at for served in told],
            y=[served.accuracy for served in told],
            mode="lines",
            line={"color": colour, "width": 2},
            name=one.name,
            legendgroup=one.name,
            visible=shown,
            hovertext=[_hover(served) for served in told],
            hoverinfo="text+name",
            row=1,
            col=1,
        )
        figure.add_scatter(
            x=[made.at for made in one.retrainings],
            y=[_at(told, made.at) for made in one.retrainings],
            mode="markers",
            marker={
                "color": colour,
                "size": 11,
                "symbol": [
                    "triangle-up" if made.promoted else "x-thin-open" for made in one.retrainings
                ],
            },
            name=one.name,
            legendgroup=one.name,
            showlegend=False,
            visible=shown,
            hovertext=[
                f"version {made.number} {'promoted' if made.promoted else 'not promoted'}"
                f" at {escape(made.batch_id)}<br>{_wrapped(made.reason)}"
                for made in one.retrainings
            ],
            hoverinfo="text",
            row=1,
            col=1,
        )
    if found.ideal is not None:
        told = [served for served in found.ideal.served if served.labelled]
        figure.add_scatter(
            x=[served.at for served in told],
            y=[served.accuracy for served in told],
            mode="lines",
            line={"color": "#222", "width": 1, "dash": "dot"},
            name="oracle",
            row=1,
            col=1,
        )
    first = found.replays[0].served
    figure.add_bar(
        x=[served.at for served in first],
        y=[max(served.evidence, 0) for served in first],
        marker={"color": ["#c0392b" if served.alarm else "#b8c4ce" for served in first]},
        hovertext=[escape(served.batch_id) for served in first],
        showlegend=False,
        row=2,
        col=1,
    )
    figure.update_yaxes(title="accuracy", row=1, col=1)
    figure.update_yaxes(title="evidence / limit", row=2, col=1)
    figure.update_layout(height=620, template="plotly_white", margin={"t": 40, "b": 30})
    return figure


def _alarm_words(found: Backtest) -> str:
    one = found.replays[0]
    return f"evidence against the champion of “{escape(one.name)}”, red where it rings"


def _frontier(found: Backtest) -> go.Figure:
    """Draw mean accuracy over what it cost."""
    told = [one for one in found.replays if not isnan(one.accuracy)]
    best = found.frontier
    figure = go.Figure()
    figure.add_scatter(
        x=[one.cpu_seconds for one in best],
        y=[one.accuracy for one in best],
        mode="lines",
        line={"color": "#999", "shape": "hv"},
        name="frontier",
    )
    figure.add_scatter(
        x=[one.cpu_seconds for one in told],
        y=[one.accuracy for one in told],
        mode="markers+text" if len(told) <= 2 * SHOWN else "markers",
        text=[one.name for one in told],
        textposition="top center",
        marker={
            "size": 12,
            "color": [len(one.retrainings) for one in told],
            "colorscale": "Blues",
            "cmin": -2,
            "line": {"width": 1, "color": "#333"},
            "colorbar": {"title": "retrainings"},
        },
        hovertext=[f"{escape(one.name)}: {len(one.retrainings)} retrainings" for one in told],
        hoverinfo="text",
        showlegend=False,
    )
    if found.ideal is not None:
        figure.add_hline(
            y=found.ideal.accuracy, line={"dash": "dot", "width": 1}, annotation_text="oracle"
        )
    figure.update_layout(
        title="what accuracy costs",
        xaxis_title="CPU seconds of checks, trainings and verdicts, as if nothing were shared",
        yaxis_title="mean accuracy",
        height=460,
        template="plotly_white",
    )
    return figure


def columns(found: Backtest) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """Give the head and the rows of the table, without columns of which nothing is known."""
    head = list(HEAD)
    if found.floor is not None:
        head[7] += f" {found.floor:g}"
    rows = [cells(found, one) for one in found.replays]
    kept = [place for place in range(len(head)) if any(row[place] for row in rows)]
    return tuple(head[i] for i in kept), tuple(tuple(row[i] for i in kept) for row in rows)


def _table(found: Backtest, chosen: Replayed | None) -> str:
    head, told = columns(found)
    rows = "".join(
        f"<tr{' class=chosen' if one is chosen else ''}>"
        + "".join(f"<td>{escape(cell)}</td>" for cell in row)
        + "</tr>"
        for one, row in zip(found.replays, told, strict=True)
    )
    return (
        f"<table><tr>{''.join(f'<th>{escape(h)}</th>' for h in head)}</tr>{rows}</table>"
        f"<p class=quiet>All together took {found.cpu_seconds:.1f} CPU s, for steps that policies"
        " agree on are taken once.</p>"
    )


def _reasons(one: Replayed) -> str:
    rows = "".join(
        f"<tr><td>{made.at:%Y-%m-%d %H:%M}</td><td class=text>{escape(made.batch_id)}</td>"
        f"<td>{made.labels}</td><td class=text>{escape(made.reason)}</td>"
        f"<td class=text>{'promoted' if made.promoted else 'not promoted'}: "
        f"{escape(made.outcome)}</td></tr>"
        for made in one.retrainings
    )
    head = "<tr><th>when</th><th>batch</th><th>labels</th><th>why</th><th>outcome</th></tr>"
    table = f"<table>{head}{rows}</table>" if rows else "<p class=quiet>No version was made.</p>"
    count = len(one.retrainings)
    return (
        f"<details{' open' if 0 < count <= SHOWN else ''}><summary><b>{escape(one.name)}</b>:"
        f" {escape(one.said)}</summary>{table}</details>"
    )


def _hover(served: Served) -> str:
    return (
        f"{escape(served.batch_id)}: {served.accuracy:.3f} on {served.labelled} labels"
        f" (version {served.number})"
    )


def _at(served: Sequence[Served], moment: datetime) -> float | None:
    """Give the accuracy at a time, that of the batch before."""
    before = [one.accuracy for one in served if one.at <= moment]
    return before[-1] if before else None


def _wrapped(text: str) -> str:
    words, lines = text.split(), [""]
    for word in words:
        if len(lines[-1]) + len(word) > WRAP:
            lines.append("")
        lines[-1] += f"{word} "
    return "<br>".join(escape(line.strip()) for line in lines)
