"""What a benchmark leaves behind: `results/NAME.json`, a Markdown table, a closing line.

A README that has the markers `<!-- bench:NAME -->` and `<!-- /bench:NAME -->` gets the table too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"


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
    put_into_readme(name, table)
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


def put_into_readme(name: str, table: str) -> None:
    """Replace what stands between the README's markers of that name, if it has any."""
    readme = Path(__file__).parents[2] / "README.md"
    begin, end = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
    pattern = f"{re.escape(begin)}.*?{re.escape(end)}"
    text = readme.read_text()
    readme.write_text(re.sub(pattern, lambda _: f"{begin}\n{table}{end}", text, flags=re.DOTALL))
