"""Settings that have to stand before torch is imported, and the table of the failure matrix."""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("GOMP_SPINCOUNT", "0")  # busy processes starve each other otherwise
os.environ.setdefault("OMP_NUM_THREADS", "1")  # small networks gain nothing from more


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what has a server as slow."""
    for item in items:
        if item.path.parent.name in ("integration", "e2e"):
            item.add_marker(pytest.mark.slow)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Write what the tests counted of faults, if that is asked for."""
    if os.environ.get("FAILURES_TABLE"):
        from faults import write_table

        found = [one for reports in terminalreporter.stats.values() for one in reports]
        write_table(r for r in found if getattr(r, "when", "") == "call")
