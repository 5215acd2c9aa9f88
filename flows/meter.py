"""What a step costs: CPU and GPU seconds, and energy where codecarbon can tell it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch


@dataclass(frozen=True)
class Cost:
    """What was spent.

    Attributes:
        cpu_seconds: of this process.
        gpu_seconds: wall time, where there is a GPU.
        energy_wh: of CPU, memory and GPU together; None where codecarbon is not installed
            (`pip install 'sustain[energy]'`).
    """

    cpu_seconds: float = 0.0
    gpu_seconds: float = 0.0
    energy_wh: float | None = None

    def __add__(self, other: Cost) -> Cost:
        known = [e for e in (self.energy_wh, other.energy_wh) if e is not None]
        return Cost(
            self.cpu_seconds + other.cpu_seconds,
            self.gpu_seconds + other.gpu_seconds,
            sum(known) if known else None,
        )

    @property
    def metrics(self) -> dict[str, float]:
        """Lay it out for a run; energy only where it is known."""
        found = {"cost.cpu_seconds": self.cpu_seconds, "cost.gpu_seconds": self.gpu_seconds}
        return found if self.energy_wh is None else {**found, "cost.energy_wh": self.energy_wh}

    @classmethod
    def read(cls, metrics: Mapping[str, float]) -> Cost | None:
        """Read what `metrics` laid out; None where nothing was measured."""
        if "cost.cpu_seconds" not in metrics:
            return None
        return cls(
            metrics["cost.cpu_seconds"],
            metrics.get("cost.gpu_seconds", 0.0),
            metrics.get("cost.energy_wh"),
        )

    @property
    def words(self) -> str:
        """Say it in a few words."""
        gpu = f", {self.gpu_seconds:.1f} GPU s" if self.gpu_seconds else ""
        energy = "" if self.energy_wh is None else f", {self.energy_wh:.3g} Wh"
        return f"{self.cpu_seconds:.1f} CPU s{gpu}{energy}"


def total(costs: Iterable[Cost]) -> Cost:
    """Add costs up."""
    return sum(costs, Cost())


class Meter:
    """Measures the block that it is entered for; `cost` is known when that ends."""

    def __init__(self, *, energy: bool = True) -> None:
        self.cost = Cost()
        self._tracker = _tracker() if energy else None

    def __enter__(self) -> Self:
        self._cpu, self._wall = time.process_time(), time.perf_counter()
        if self._tracker is not None:
            self._tracker.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        energy = None
        if self._tracker is not None:
            self._tracker.stop()
            energy = float(self._tracker.final_emissions_data.energy_consumed) * 1000
        wall = time.perf_counter() - self._wall
        self.cost = Cost(
            time.process_time() - self._cpu, wall if torch.cuda.is_available() else 0.0, energy
        )


def _tracker() -> Any | None:
    """Prepare codecarbon's offline tracker, if it is installed: it asks nobody where it runs."""
    try:
        from codecarbon import OfflineEmissionsTracker
    except ImportError:  # not installed, or not all that it needs
        return None

    return OfflineEmissionsTracker(
        # energy is the same in every country; only emissions, which nobody is told, would differ
        country_iso_code="DEU",
        tracking_mode="process",
        measure_power_secs=5,
        save_to_file=False,
        log_level="error",
        allow_multiple_runs=True,
    )
