"""What Prometheus is told of a model, read from the book of record at each scrape.

Whatever restarts, the figures are those of MLflow and of the feed; only the sums over all checks
are carried from scrape to scrape, so that a long record is read whole once.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector

from flows.records import CheckRecord
from flows.registry import Registry
from flows.tracking import SKEW
from flows.watch import Plan, make_plan

FRESH_SECONDS = 30.0
"""An answer is given again for so long: it takes a look at the record and at the feed."""

GAUGES = {
    "sustain_up": "Whether the record and the feed of a model can be read (1) or not (0).",
    "sustain_champion_version": "The version that serves.",
    "sustain_versions": "Registered versions.",
    "sustain_queue_batches": "Batches in the feed without a finished check against the champion.",
    "sustain_failed_batches": "Batches that could not be checked and have not changed since.",
    "sustain_fresh_labels": "Labels that the champion has not learned from.",
    "sustain_accuracy_estimated": "Accuracy in the newest check, estimated without labels.",
    "sustain_accuracy_true": "Accuracy in the newest check that has labels, on them.",
    "sustain_accuracy_reference": "Accuracy of the champion on its own reference.",
    "sustain_drift_p_value": "The p-value of the newest check.",
    "sustain_drift_evidence": "Evidence of drift over the stream, 1 where it rings.",
    "sustain_last_check_timestamp_seconds": "When the newest check ended.",
}
COUNTERS = {
    "sustain_checks": "Finished checks, against any champion.",
    "sustain_alarms": "Checks that rang.",
    "sustain_moves": "Changes of champion on record.",
}
SECONDS = "sustain_check_seconds"


@dataclass
class _Totals:
    """What all finished checks of a model add up to; only those that ended lately are read again.

    `recent` are counted ones, by run, and when they ended: so late by another machine's clock that
    the next look sees them again.
    """

    checks: int = 0
    alarms: int = 0
    seconds: float = 0.0
    recent: dict[str, datetime] = field(default_factory=dict)

    @property
    def _since(self) -> datetime | None:
        """From when on they are read: a clock that was ahead must not hide those after it."""
        newest = max(self.recent.values(), default=None)
        return None if newest is None else min(newest, datetime.now(UTC)) - SKEW

    def look(self, registry: Registry) -> None:
        """Add the checks that finished since the last look."""
        for check in list(registry.finished_since(self._since)):  # all of them, or none
            if check.run_id not in self.recent:
                self.checks += 1
                self.alarms += check.alarm
                self.seconds += (check.ended - check.started).total_seconds()
                self.recent[check.run_id] = check.ended
        if (since := self._since) is not None:
            self.recent = {run: ended for run, ended in self.recent.items() if ended > since}


class Exporter(Collector):
    """Tells the metrics of some models.

    Args:
        registries: of the models.
        clock: gives a monotonic time in seconds.
    """

    def __init__(
        self, registries: Sequence[Registry], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.registries = registries
        self._clock = clock
        self._totals = [_Totals() for _ in registries]
        self._lock = threading.Lock()
        self._told = b""
        self._until = float("-inf")

    def text(self) -> bytes:
        """Give Prometheus's text."""
        with self._lock:
            if self._clock() >= self._until:
                registry = CollectorRegistry(auto_describe=False)
                registry.register(self)
                self._told = generate_latest(registry)
                self._until = self._clock() + FRESH_SECONDS
            return self._told

    def describe(self) -> list[Metric]:
        """Give none, so that registering does not collect."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Read the record and the feed of every model."""
        gauges = {n: GaugeMetricFamily(n, words, labels=["model"]) for n, words in GAUGES.items()}
        counters = {
            n: CounterMetricFamily(n, words, labels=["model"]) for n, words in COUNTERS.items()
        }
        seconds = SummaryMetricFamily(SECONDS, "Time that a check took.", labels=["model"])
        for registry, totals in zip(self.registries, self._totals, strict=True):
            labels = [registry.name]
            try:
                plan = make_plan(registry, registry.settings, datetime.now(UTC))
                totals.look(registry)
                figures = {**_state(registry, plan), **_newest(plan.finished)}
                moves = len(registry.moves())
            except Exception:  # noqa: BLE001 - a scrape tells that it failed, whatever failed
                gauges["sustain_up"].add_metric(labels, 0.0)
                continue
            gauges["sustain_up"].add_metric(labels, 1.0)
            for name, value in figures.items():
                gauges[name].add_metric(labels, value)
            counters["sustain_checks"].add_metric(labels, totals.checks)
            counters["sustain_alarms"].add_metric(labels, totals.alarms)
            counters["sustain_moves"].add_metric(labels, moves)
            seconds.add_metric(labels, count_value=totals.checks, sum_value=totals.seconds)
        yield from (*gauges.values(), *counters.values(), seconds)


def _state(registry: Registry, plan: Plan) -> dict[str, float]:
    return {
        "sustain_champion_version": plan.champion.number,
        "sustain_versions": len(registry.versions()),
        "sustain_queue_batches": len(plan.pending),
        "sustain_failed_batches": plan.failed,
        "sustain_fresh_labels": len(plan.fresh),
    }


def _newest(checks: Sequence[CheckRecord]) -> dict[str, float]:
    """Give what the newest checks of the champion say, as far as they say it."""
    told: dict[str, float] = {}
    for check in checks:  # oldest first
        metrics = check.metrics
        told["sustain_last_check_timestamp_seconds"] = check.ended.timestamp()
        if check.settled:
            told["sustain_accuracy_true"], _ = check.settled
        if metrics.get("drift.stream_threshold"):
            evidence = metrics["drift.stream"] / metrics["drift.stream_threshold"]
            told["sustain_drift_evidence"] = evidence
        for name, metric in (
            ("sustain_accuracy_estimated", "accuracy.estimated"),
            ("sustain_accuracy_reference", "accuracy.reference"),
            ("sustain_drift_p_value", "drift.p_value"),
        ):
            if metric in metrics:
                told[name] = metrics[metric]
    return told
