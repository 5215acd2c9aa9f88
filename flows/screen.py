"""Tables for a terminal that never break a word, a date, a name or an address of theirs."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text


def print_table(
    console: Console,
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    whole: Collection[str] = (),
) -> None:
    """Print a table; without its lines, or as a line a row, where the terminal is too narrow.

    Args:
        console: where to.
        title: above it.
        columns: their names.
        rows: a cell a column each, shown as they are: a batch may be called [red].
        whole: columns whose cells stay on one line; those of the others break between words.
    """
    cells = [[name, *(row[place] for row in rows)] for place, name in enumerate(columns)]
    least = [
        max(map(cell_len, [*name.split(), *(inner if name in whole else _words(inner))]), default=1)
        for name, *inner in cells
    ]
    most = [max(map(cell_len, column)) for column in cells]
    n = len(columns)
    forms: list[tuple[int, dict[str, Any]]] = [
        (3 * n + 1, {}),
        (2 * (n - 1), {"box": None, "padding": (0, 2, 0, 0), "pad_edge": False}),
    ]
    for beside, form in forms:
        if sum(least) + beside <= console.width:
            table = Table(title=Text(title), title_justify="left", **form)
            widths = _shared(least, most, console.width - beside)
            for name, width in zip(columns, widths, strict=True):
                table.add_column(Text(name), width=width, overflow="fold")
            for row in rows:
                table.add_row(*map(Text, row))
            console.print(table)
            return
    print_line(console, title)
    for first, *others in rows:
        told = [f"{name} {cell}" for name, cell in zip(columns[1:], others, strict=True) if cell]
        print_line(console, f"  {first}: {'; '.join(told)}")


def print_line(console: Console, text: str) -> None:
    """Print a text as it is, which the terminal alone may break: what is copied is whole."""
    console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)


def _words(cells: Sequence[str]) -> list[str]:
    return [word for cell in cells for word in cell.split()]


def _shared(least: Sequence[int], most: Sequence[int], width: int) -> list[int]:
    """Give each column its least width, and what is left to those that would break most."""
    given = list(least)
    for _ in range(width - sum(least)):
        lines = [wanted / has for wanted, has in zip(most, given, strict=True)]
        place = lines.index(max(lines))
        if lines[place] <= 1:
            break
        given[place] += 1
    return given
