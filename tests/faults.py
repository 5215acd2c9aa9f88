"""The figures of the failure matrix: faults injected, survived, batches and labels lost.

A session with FAILURES_TABLE set ends by writing them to tests/bench/results/failures.{json,md};
the rows of faults that it did not try stay as they are.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import pytest
from bench.results import FOLDER, Figure, write

from flows.registry import Registry
from flows.settings import Settings

PROPERTY = "faults"
ALL = "all of these"


def kept(settings: Settings) -> set[str]:
    """Name the batches whose check is on record, and the labels learned from or still to use."""
    from flows.watch import make_plan

    registry = Registry(settings)
    checked = {c.key.batch_id for c in registry.checks(None) if c.finished}
    fresh = make_plan(registry, settings, datetime.now(UTC)).fresh.table["sample_id"]
    learned = (registry.learned(version)["sample_id"] for version in registry.versions())
    return checked.union(fresh, *learned)


def count(node: pytest.Item, fault: str, store: str, outcomes: Iterable[tuple[bool, int]]) -> None:
    """Note of each time that a test injected a fault: was it survived, and how much was lost."""
    found = list(outcomes)
    survived, lost = sum(ok for ok, _ in found), sum(number for _, number in found)
    node.user_properties.append((PROPERTY, [f"{fault}, {store}", len(found), survived, lost]))


@contextmanager
def counted(
    node: pytest.Item, fault: str, store: str, settings: Settings, wanted: set[str]
) -> Iterator[None]:
    """Note of one fault that it was survived, unless what is within raises.

    Args:
        node: the test.
        fault: what is injected.
        store: where the records are.
        settings: of the model that it strikes.
        wanted: what an undisturbed run has `kept`.
    """
    survived = False
    try:
        yield
        survived = True
    finally:
        try:
            missing = len(wanted - kept(settings))
        except Exception:  # noqa: BLE001 - what cannot be read is lost
            missing = len(wanted)
        count(node, fault, store, [(survived, missing)])


def write_table(reports: Iterable[pytest.TestReport]) -> None:
    """Write what the tests of a session counted into the table."""
    rows: dict[str, list[int]] = {}
    for report in reports:
        for name, value in report.user_properties:
            if name == PROPERTY:
                figure, *numbers = value
                before = rows.get(figure, [0, 0, 0])
                rows[figure] = [a + b for a, b in zip(before, numbers, strict=True)]
    if not rows:
        return
    path = FOLDER / "failures.json"
    written = json.loads(path.read_text()) if path.exists() else []
    known = {row["figure"]: _numbers(row) for row in written if row["figure"] != ALL} | rows
    known[ALL] = [sum(column) for column in zip(*known.values(), strict=True)]
    write(
        "failures",
        [
            Figure(
                figure,
                missing,
                "0 lost, all survived",
                missing == 0 and survived == injected,
                {"injected": injected, "survived": survived},
            )
            for figure, (injected, survived, missing) in known.items()
        ],
    )


def _numbers(row: dict[str, Any]) -> list[int]:
    """Read injected, survived and lost back from a row that was written."""
    return [int(n) for n in (row["peers"]["injected"], row["peers"]["survived"], row["value"])]
