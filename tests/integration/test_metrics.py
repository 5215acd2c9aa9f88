"""Prometheus is told what is on record, and Grafana's dashboard asks for just that."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from flows.metrics import COUNTERS, FRESH_SECONDS, GAUGES, SECONDS, Exporter
from flows.registry import Registry
from flows.servers import basic
from flows.watch import watch
from flows.webhook import Gatekeeper, make_app

if TYPE_CHECKING:
    from worlds import World

DASHBOARD = Path(__file__).parents[2] / "deployments" / "grafana.json"


def told(text: bytes) -> dict[str, dict[str, float]]:
    """Read Prometheus's text: metric to model to value."""
    found: dict[str, dict[str, float]] = {}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            found.setdefault(sample.name, {})[sample.labels["model"]] = sample.value
    return found


def test_the_metrics_are_those_of_the_record(
    small_world: Callable[[str], World], tmp_path: Path
) -> None:
    """Checks, alarms, accuracy, time and queue, also of a model whose feed is gone."""
    world, other = small_world("seen"), small_world("blind")
    world.path.write_text(world.path.read_text().replace("min_labels = 30", "min_labels = 1000"))
    world.arrive(0)
    watch(str(world.path))
    world.arrive(1, 2, labelled=True)
    registry, blind = Registry(world.settings), Registry(other.settings)
    (check,) = registry.checks(1)
    shutil.rmtree(other.path.parent / "feed")
    now = 0.0
    exporter = Exporter([registry, blind], lambda: now)
    at_first = exporter.text()
    found = told(at_first)
    assert found["sustain_up"] == {"seen": 1, "blind": 0}
    assert found["sustain_queue_batches"] == {"seen": 2}
    assert found["sustain_checks_total"] == {"seen": 1}
    assert found["sustain_alarms_total"] == {"seen": float(check.alarm)} == {"seen": 1}
    assert found["sustain_champion_version"] == found["sustain_versions"] == {"seen": 1}
    assert found["sustain_accuracy_estimated"]["seen"] == check.metrics["accuracy.estimated"]
    assert found["sustain_fresh_labels"]["seen"] > 100
    seconds = (check.ended - check.started).total_seconds()
    assert found["sustain_check_seconds_sum"] == {"seen": seconds}
    assert found["sustain_drift_evidence"]["seen"] >= 1
    assert "sustain_accuracy_true" not in found  # no label came for what was checked

    watch(str(world.path))
    now = FRESH_SECONDS - 1
    assert exporter.text() == at_first
    now = FRESH_SECONDS + 1
    later = told(exporter.text())
    afresh = told(Exporter([registry]).text())
    assert later["sustain_checks_total"]["seen"] == afresh["sustain_checks_total"]["seen"] >= 3
    for name in (f"{SECONDS}_sum", "sustain_alarms_total"):
        assert later[name]["seen"] == pytest.approx(afresh[name]["seen"])
    assert 0 <= later["sustain_accuracy_true"]["seen"] <= 1
    (tmp_path / "later.prom").write_bytes(exporter.text())

    names = set(later)
    families = {*GAUGES, *(f"{n}_total" for n in COUNTERS), f"{SECONDS}_sum", f"{SECONDS}_count"}
    assert names == families
    asked = re.findall(r"sustain_\w+", " ".join(queries()))
    assert set(asked) == families

    client = TestClient(make_app(Gatekeeper("x"), {}, exporter, "ada:a secret"))
    assert client.get("/metrics").status_code == 401
    assert client.get("/metrics", headers={"Authorization": basic("ada:no")}).status_code == 401
    answer = client.get("/metrics", headers={"Authorization": basic("ada:a secret")})
    assert answer.status_code == 200
    assert set(told(answer.content)) == families


def queries() -> list[str]:
    """List what the dashboard's panels ask for."""
    board = json.loads(DASHBOARD.read_text())
    panels = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    variables = [one["query"] for one in board["templating"]["list"] if one["type"] == "query"]
    assert all('{model=~"$model"}' in expression for expression in panels)
    return [*panels, *variables]
