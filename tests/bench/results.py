"""What a benchmark leaves behind: `results/NAME.json`, a Markdown table, a closing line.

A README that has the markers `<!-- bench:NAME -->` and `<!-- /bench:NAME -->` gets the table too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

FOLDER = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Figure:
    """One measured figure: its target in words, whether it was met, and others in the same run."""

    figure: str
    value: float
    target: str
    met: bool
    peers: Mapping[str, float]


def write(name: str, figures: Sequence[Figure]) -> None:
    """Write both files and print `N met, M missed`."""
    FOLDER.mkdir(exist_ok=True)
    rows = [asdict(figure) for figure in figures]
    (FOLDER / f"{name}.json").write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n")
    lines = ["| figure | value | target | met | beside it |", "|---|---|---|---|---|"]
    for f in figures:
        peers = ", ".join(f"{peer} {value:.3g}" for peer, value in f.peers.items())
        met = "yes" if f.met else "**no**"
        lines.append(f"| {f.figure} | {f.value:.3g} | {f.target} | {met} | {peers} |")
    table = "\n".join([*lines, ""])
    (FOLDER / f"{name}.md").write_text(table)
    _put_into_readme(name, table)
    count = sum(figure.met for figure in figures)
    print(table)  # noqa: T201 - the report of a benchmark
    print(f"{count} met, {len(figures) - count} missed")  # noqa: T201


def _put_into_readme(name: str, table: str) -> None:
    readme = Path(__file__).parents[2] / "README.md"
    begin, end = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
    pattern = f"{re.escape(begin)}.*?{re.escape(end)}"
    text = readme.read_text()
    readme.write_text(re.sub(pattern, lambda _: f"{begin}\n{table}{end}", text, flags=re.DOTALL))
