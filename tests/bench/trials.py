"""Draws of reference and batch from pools of real pictures, and the tests asked of them."""

from __future__ import annotations

import functools
import multiprocessing
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import peers
import peers_elsewhere
import realdata
from realdata import Pool
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from monitoring.detectors import DetectionSettings, detect_drift
from monitoring.features import FeatureTable, concatenate
from monitoring.reference import Reference, Regime

ALPHA = 0.05
SIZES = (10, 50, 100, 200, 500, 1000)
PAPER_SIZES = (10, 20, 50, 100, 200, 500, 1000)
PUBLISHED_BBSD = dict(zip(PAPER_SIZES, (0.15, 0.28, 0.40, 0.52, 0.51, 0.59, 0.72), strict=True))
"""Accuracy of detection that Failing Loudly (Rabanser et al. 2019) prints for BBSD, by size."""
AMOUNTS = ("small", "medium", "large")
SHARES = (0.1, 0.5, 1.0)
KNOCKED_OUT = 0
PAPER_SHIFTS = (
    *(
        (f"{kind}-{amount}", share)
        for kind in ("noise", "image")
        for amount in AMOUNTS
        for share in SHARES
    ),
    *(("knock-out", share) for share in SHARES),
)
PACS_REFERENCE = 1100
LARGE = 2000
STREAM_BATCH = 100
CLEAN_BEFORE = 20
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Effort:
    """How many draws each section makes; `limit`: changed batches at most in a stream."""

    level: int = 400
    level_evidently: int = 100
    power_mnist: int = 50
    power_mnist_evidently: int = 5
    power_mnist_elsewhere: int = 1
    power_pacs: int = 100
    power_pacs_evidently: int = 50
    failing_loudly: int = 40
    streams: int = 20
    stream_length: int = 1000
    delays: int = 40
    limit: int = 60
    regimes: int = 200
    accuracy: int = 60
    accuracy_elsewhere: int = 3
    repeat: int = 7


FULL = Effort()
QUICK = Effort(2, 1, 1, 1, 0, 1, 1, 1, 2, 20, 1, 5, 2, 2, 0, 1)


# --- draws


@functools.cache
def pool(name: str, shift: str = "none") -> Pool:
    """Give a pool by its short name, kept in memory."""
    if name.startswith("digits"):
        _, width, without = name.split("-")
        return realdata.digits(
            shift, width=int(width), without=None if without == "all" else int(without)
        )
    domain, backbone = name.split("-")
    return realdata.pictures(domain, shift, backbone=backbone)


DIGITS, DIGITS_128 = "digits-64-all", "digits-128-all"


def regime(name: str, rows: np.ndarray, called: str = "first") -> Regime:
    """Make a regime of some rows of a clean pool."""
    return Regime(called, pool(name).features.take(rows), pool(name).labels[rows])


def reference_of(*regimes: Regime) -> Reference:
    """Make a reference of regimes."""
    classes = regimes[0].features.probabilities.shape[1]
    return Reference(regimes, tuple(f"class {i}" for i in range(classes)))


def generator(*key: int | str) -> np.random.Generator:
    """Give the random numbers of one draw, the same in every run."""
    return np.random.default_rng([b for part in key for b in str(part).encode()])


@dataclass(frozen=True, eq=False)
class Batch:
    """A drawn batch with its true labels."""

    features: FeatureTable
    labels: np.ndarray

    @property
    def accuracy(self) -> float:
        """The truth that estimates are held against."""
        return float((self.features.predicted == self.labels).mean())


def mixed(*parts: tuple[Pool, np.ndarray]) -> Batch:
    """Put rows of several pools together."""
    parts = tuple((p, rows) for p, rows in parts if len(rows))
    return Batch(
        concatenate([p.features.take(rows) for p, rows in parts]),
        np.concatenate([p.labels[rows] for p, rows in parts]),
    )


def shifted(rows: np.ndarray, n: int, name: str, share: float, rng: np.random.Generator) -> Batch:
    """Draw n digits from `rows` (in random order) under a shift of `PAPER_SHIFTS` or `MILD`."""
    clean = pool(DIGITS)
    if name == "knock-out":
        removed = (clean.labels[rows] == KNOCKED_OUT) & (rng.random(len(rows)) < share)
        return mixed((clean, rows[~removed][:n]))
    cut = round(share * n)
    return mixed((pool(DIGITS, name), rows[:cut]), (clean, rows[cut:n]))


# --- tests under comparison


class Held:
    """A drawn reference, in the forms that the tests want."""

    def __init__(self, reference: Reference) -> None:
        self.reference = reference
        self.table = concatenate([regime.features for regime in reference.regimes])

    @functools.cached_property
    def summaries(self) -> tuple[peers.Summaries, Any]:
        """Evidently's columns, and those of the reference."""
        fitted = peers.Summaries.fit(self.table)
        return fitted, fitted.of(self.table)


def our_p(reference: Reference, batch: FeatureTable) -> float:
    """Give the check's p-value, NaN (never an alarm) if it refuses so small a reference."""
    try:
        return detect_drift(reference, batch, DetectionSettings(alpha=ALPHA)).p_value
    except ValueError as error:
        if "reference rows" not in str(error):
            raise
        return float("nan")


def _evidently(held: Held, batch: FeatureTable, _: np.random.Generator) -> float:
    fitted, frame = held.summaries
    return 0.0 if peers.evidently_preset(frame, fitted.of(batch)) else 1.0


def _summary_ks(held: Held, batch: FeatureTable, _: np.random.Generator) -> float:
    fitted, frame = held.summaries
    return peers.summary_ks(frame, fitted.of(batch))


TESTS: dict[str, Callable[[Held, FeatureTable, np.random.Generator], float]] = {
    "ours": lambda held, batch, _: our_p(held.reference, batch),
    "KS+Bonferroni": lambda h, b, _: peers.ks_bonferroni(h.table.embedding, b.embedding),
    "MMD": lambda h, b, rng: peers.mmd(h.table.embedding, b.embedding, rng),
    "classifier": lambda h, b, rng: peers.classifier(h.table.embedding, b.embedding, rng),
    "BBSD": lambda h, b, _: peers.ks_bonferroni(h.table.probabilities, b.probabilities),
    "Evidently columns, KS+Bonferroni": _summary_ks,
    "Evidently preset": _evidently,
}
"""Each gives a p-value; the preset, which has none, 0 for an alarm and 1 for none."""
QUICK_TESTS = tuple(name for name in TESTS if name != "Evidently preset")


def answers(
    held: Held, batch: FeatureTable, names: Sequence[str], rng: np.random.Generator
) -> dict[str, float]:
    """Ask several tests about one batch."""
    return {name: TESTS[name](held, batch, rng) for name in names}


def rate(p_values: Iterable[float]) -> float:
    """Give the share that rings."""
    rings = [p <= ALPHA for p in p_values]
    return sum(rings) / len(rings)


def by_test(found: Iterable[dict[str, float]]) -> dict[str, float]:
    """Give each test's share of alarms over the batches that it was asked about."""
    asked: dict[str, list[float]] = {}
    for one in found:
        for name, p in one.items():
            asked.setdefault(name, []).append(p)
    return {name: rate(values) for name, values in asked.items()}


def without_ours(rates: dict[str, float]) -> dict[str, float]:
    """Give the peers."""
    return {name: value for name, value in rates.items() if name != "ours"}


# --- running trials


class Runner:
    """Maps trials over processes and shows how far it is."""

    def __init__(self, effort: Effort, processes: int, console: Console) -> None:
        self.effort = effort
        self.console = console
        self.elsewhere: str | None = "not asked"
        self.pool: ProcessPoolExecutor | None = None
        if processes > 1:
            context = multiprocessing.get_context("spawn")
            self.pool = ProcessPoolExecutor(processes, mp_context=context)

    def map(self, what: str, trial: Callable[[T], R], tasks: Iterable[T]) -> list[R]:
        """Run every task; results come in the order of the tasks."""
        todo = list(tasks)
        columns = (
            TextColumn("  {task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self.console, transient=True) as progress:
            shown = progress.add_task(what, total=len(todo))
            if self.pool is None:
                results = []
                for task in todo:
                    results.append(trial(task))
                    progress.advance(shown)
                return results
            futures = [self.pool.submit(trial, task) for task in todo]
            for future in as_completed(futures):
                future.result()
                progress.advance(shown)
            return [future.result() for future in futures]

    def ask(self, task: str, **arrays: np.ndarray) -> Any:
        """Ask the other environment; None if there is none."""
        if self.elsewhere is not None:
            return None
        with self.console.status(f"  {task} in {peers_elsewhere.ENVIRONMENT.name}"):
            return peers_elsewhere.ask(task, **arrays)

    def close(self) -> None:
        """End the processes."""
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)
