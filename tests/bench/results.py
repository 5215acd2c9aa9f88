"""What a benchmark leaves behind: `results/NAME.json`, a Markdown table, a closing line.

README and the pages of docs/ get the table too, between `<!-- bench:NAME -->` and its closing pair,
and README a summary of all.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"
ROOT = Path(__file__).parents[2]
MEASURED = {
    "monitoring": ("false alarms, power, delay, estimated accuracy", "docs/figures.md#monitoring"),
    "gate": ("what the gate promotes and misses", "docs/figures.md#the-gate"),
    "sft": ("what fine-tuning wins and forgets", "docs/figures.md#fine-tuning"),
    "sft-speed": ("how fast it is", "docs/figures.md#fine-tuning"),
    "backtest": ("policies replayed on history", "docs/figures.md#replays"),
    "month": ("a month of the real flows", "#a-month"),
    "scale": ("what grows with what", "#what-grows-with-what"),
    "failures": ("faults injected, survived, and what was lost", "docs/figures.md#faults"),
    "cli": ("the demo", "#what-the-demo-shows"),
}
"""Of each benchmark, what it measures and where its table stands, as seen from README."""


@dataclass(frozen=True)
class Figure:
    """One measured figure: its target in words, whether it was met, and others in the same run."""

    figure: str
    value: float
    target: str
    met: bool
    peers: Mapping[str, float]


def write(name: str, figures: Sequence[Figure], *, merge: bool = False) -> None:
    """Write both files and print `N met, M missed`.

    With `merge` the figures of an earlier run stay where this one, of a part, measured nothing.
    """
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{name}.json"
    rows = [_plain(figure) for figure in figures]
    if merge and path.exists():
        measured = {row["figure"]: row for row in rows}
        before = json.loads(path.read_text())
        kept = [measured.pop(row["figure"], row) for row in before]
        rows = [*kept, *measured.values()]
    path.write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n")
    lines = ["| figure | value | target | met | beside it |", "|---|---|---|---|---|"]
    for row in rows:
        peers = ", ".join(f"{peer} {value:.3g}" for peer, value in row["peers"].items())
        met = "yes" if row["met"] else "**no**"
        lines.append(
            f"| {row['figure']} | {row['value']:.3g} | {row['target']} | {met} | {peers} |"
        )
    table = "\n".join([*lines, ""])
    (FOLDER / f"{name}.md").write_text(table)
    publish(name, table)
    publish("summary", summary())
    count = sum(row["met"] for row in rows)
    print(table)  # noqa: T201 - the report of a benchmark
    print(f"{count} met, {len(rows) - count} missed")  # noqa: T201


def _plain(figure: Figure) -> dict[str, Any]:
    """Turn numpy's numbers into Python's, which JSON can hold."""
    return {
        "figure": figure.figure,
        "value": float(figure.value),
        "target": figure.target,
        "met": bool(figure.met),
        "peers": {peer: float(value) for peer, value in figure.peers.items()},
    }


def summary() -> str:
    """Tell of each benchmark how many of its targets were met."""
    lines = ["| measured | targets met | missed |", "|---|---|---|"]
    for name, (words, where) in MEASURED.items():
        rows = json.loads((FOLDER / f"{name}.json").read_text())
        met = sum(row["met"] for row in rows)
        lines.append(f"| [{words}]({where}) | {met} | {len(rows) - met} |")
    return "\n".join([*lines, ""])


def publish(name: str, table: str) -> None:
    """Replace what stands between the markers of that name, in README and the pages of docs/."""
    begin, end = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
    pattern = f"{re.escape(begin)}.*?{re.escape(end)}"
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = page.read_text()
        new = re.sub(pattern, lambda _: f"{begin}\n{table}{end}", text, flags=re.DOTALL)
        if new != text:
            page.write_text(new)
