"""Lines for machines: one JSON object each, with model, version and batch."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from flows.logs import log
from flows.settings import LogSettings, ModelSettings, Settings


def settings(folder: Path, **logs: str) -> Settings:
    return Settings(folder / "a.toml", model=ModelSettings(name="digits"), logs=LogSettings(**logs))


def test_nothing_is_written_unless_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The default says nothing, anywhere."""
    log(settings(tmp_path), "batch.checked", version=1)
    assert capsys.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())


def test_a_line_holds_what_is_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is not a number, or nothing, is left out, so that every line is JSON."""
    facts = {"version": 2, "batch": "b\n1", "accuracy": float("nan"), "who": None, "alarm": True}
    log(settings(tmp_path, format="json"), "batch.checked", **facts)
    (line,) = capsys.readouterr().err.splitlines()
    told = json.loads(line, parse_constant=pytest.fail)
    assert told.pop("time")
    assert told == {
        "event": "batch.checked",
        "model": "digits",
        "version": 2,
        "batch": "b\n1",
        "alarm": True,
    }


def test_lines_of_many_writers_do_not_mix(tmp_path: Path) -> None:
    """A file beside the settings takes whole lines from all of them."""
    of = settings(tmp_path, format="json", file="logs/events.jsonl")
    writers = [
        threading.Thread(target=log, args=(of, "x"), kwargs={"batch": str(n) * 3000})
        for n in range(20)
    ]
    for one in writers:
        one.start()
    for one in writers:
        one.join()
    lines = (tmp_path / "logs" / "events.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["batch"][:2] for line in lines) == sorted(
        (str(n) * 3000)[:2] for n in range(20)
    )
