"""Tables for a terminal: nothing that is copied from them is broken."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from flows.screen import print_line, print_table
from flows.settings import ModelSettings, Settings
from flows.up import Place, _addresses

COLUMNS = ("batch", "p", "evidence", "accuracy, estimated", "champion since", "decision")
ROWS = [
    ("2026-11-21T10:00", "1.2e-05", "12.3 of 14.0", "0.913", "2026-11-23 01:51", "ask_for_labels"),
    ("[red]2", "not tested", "", "", "", "none"),
]
WHOLE = ("batch", "champion since")


def printed(width: int, rows: list[tuple[str, ...]]) -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    print_table(console, "checks [of] a model", COLUMNS, rows, WHOLE)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [40, 80, 90, 200])
def test_no_word_and_no_date_is_broken(width: int) -> None:
    """In full, without lines, and as lines where nothing else fits: each word is there whole."""
    text = printed(width, ROWS)
    words = {word for row in ROWS for cell in row for word in cell.split()}
    assert all(word in text for word in words)
    assert "2026-11-23 01:51" in text
    assert text.startswith("checks [of] a model")
    if width >= 80:
        assert max(map(len, text.splitlines())) <= width


def test_a_line_is_printed_as_it_is() -> None:
    """Neither markup nor the names of emojis are looked for in what is called otherwise."""
    console = Console(width=80, file=io.StringIO(), color_system=None)
    print_line(console, "a:car:b [red] 12:100:00")
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue() == "a:car:b [red] 12:100:00\n"


def test_the_form_follows_the_width() -> None:
    """Lines around the cells where there is room, a line a row where there is none."""
    assert "━" in printed(200, ROWS)
    assert "━" not in printed(80, ROWS)
    long = "b" * 70
    lines = printed(80, [(long, "0.5", "", "0.9", "2026-11-23 01:51", "none")]).splitlines()
    assert lines[1] == (
        f"  {long}: p 0.5; accuracy, estimated 0.9; champion since 2026-11-23 01:51; decision none"
    )


def test_an_address_is_one_line_at_any_width(tmp_path: Path) -> None:
    """It can be copied, an IPv6 host and a long name in it, too."""
    model = Settings(tmp_path / "a.toml", model=ModelSettings(name="animals" * 12))
    place = Place("fe80::1", 5000, 4200, 4280)
    lines = list(_addresses([model], place, place.url(5000), place.url(4200)))
    console = Console(width=80, file=io.StringIO(), color_system=None)
    for line in lines:
        print_line(console, line)
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().splitlines() == lines
    assert (
        f"http://[fe80::1]:5000/#/models/{'animals' * 12}  (versions: roll back here)" in lines[1]
    )
