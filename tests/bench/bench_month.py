"""A month in minutes: 200 batches through the real flows, with drift that comes, goes, and poison.

`make bench-month`. The stream is real digits: MNIST's test digits (A), scikit-learn's optical ones
(B), negatives of MNIST (C), MNIST under low contrast and noise (D). Labels of three fifths of a
batch come two batches later. Two deliveries are poisoned: in one 60 % of the labels are random, in
the other every label is the next class; eighteen batches after each began, somebody corrects it.
Once a person moves the alias by hand, and back.

Nothing is mocked but time: a day lasts as long as DAY batches take.
"""

from __future__ import annotations

import gzip
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from results import Figure, write
from rich.progress import track

if TYPE_CHECKING:
    from flows.registry import Registry, Version

BATCHES, SIZE, LABELLED, LATE, DAY = 200, 40, 24, 2, 7
PROBATION_DAYS = 14
SECONDS_A_BATCH = 5.0
"""About what a batch takes on this machine: only how long probation is depends on it."""
POISON = {"random": range(100, 114), "next class": range(150, 164)}
CORRECTED = {"random": 118, "next class": 168}
BY_HAND = (95, 97)
MNIST = Path(__file__).parents[3] / "shared" / "data" / "mnist"
WINDOW = 10
SETTINGS = """\
[model]
name = "month"
architecture = "small_cnn"
channels = 1

[servers]
prefect_home = "prefect"

[bootstrap]
epochs = 20

[policy]
probation_days = {probation:.6f}
"""


@dataclass(frozen=True)
class Batch:
    """Pictures uint8 (n, 28, 28), their true classes (n,), and those that labellers give (n,)."""

    name: str
    world: str
    pictures: NDArray[np.uint8]
    truth: NDArray[np.int64]
    told: NDArray[np.int64]


def world_of(number: int) -> str:
    """Tell which world a batch comes from; two letters are half of each."""
    plan = ((40, "A"), (70, "B"), (80, "A"), (90, "AB"), (100, "A"), (135, "C"), (150, "A"))
    return next((world for end, world in plan if number < end), "D" if number < 185 else "ABD")


def stream() -> Iterator[Batch]:
    """Give every batch of the month, in order."""
    rng = np.random.default_rng(0)
    pools = {name: _shuffled(*_world(name), rng) for name in "ABCD"}
    for number in range(BATCHES):
        world = world_of(number)
        share = SIZE // len(world)
        parts = [[next(pools[letter]) for _ in range(share)] for letter in world]
        pictures, truth = zip(*[one for part in parts for one in part], strict=True)
        right = np.asarray(truth, dtype=np.int64)
        told = right.copy()
        if number in POISON["random"]:
            wrong = rng.random(len(told)) < 0.6
            told[wrong] = rng.integers(0, 10, int(wrong.sum()))
        if number in POISON["next class"]:
            told = (told + 1) % 10
        yield Batch(f"b{number:03d}", world, np.stack(pictures), right, told)


def main() -> None:
    """Live through the month, and write the table."""
    for name in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI"):
        os.environ.pop(name, None)
    with tempfile.TemporaryDirectory() as name:
        write("month", live(Path(name)))


def live(root: Path) -> list[Figure]:
    """Run the month in a folder."""
    from flows import demo
    from flows.settings import export_to_environment, load_settings

    (root / "feed").mkdir()
    (root / "labels").mkdir()
    path = root / "sustain.toml"
    probation = PROBATION_DAYS * DAY * SECONDS_A_BATCH / 86_400
    path.write_text(SETTINGS.format(probation=probation))
    settings = load_settings(path, environ={})
    export_to_environment(settings)

    from flows.bootstrap import bootstrap
    from flows.history import read_history
    from flows.registry import Registry
    from flows.watch import watch

    demo._write_class_folders(root / "first", demo._mnist()[:3500])
    bootstrap(str(path), data=str(root / "first"))
    registry = Registry(settings)
    month = list(stream())
    served: list[tuple[int, int | None]] = []
    events: list[str] = []
    for number, batch in enumerate(track(month, description="batches")):
        arrive(root, batch)
        if number >= LATE:
            label(root, month[number - LATE])
        for kind, when in CORRECTED.items():
            if number == when:
                correct(root, [month[i] for i in POISON[kind]])
        if number in BY_HAND and len(registry.versions()) > 1:
            other = 1 if number == BY_HAND[0] else served[-2][0]
            registry.set_alias("champion", registry.version(other))
        watched = watch(str(path))
        champion = registry.champion()
        before = champion.tags.get("promoted_from")
        served.append((champion.number, int(before) if before else None))
        if watched.done:
            events.append(f"{batch.name} ({batch.world}): {watched.done}")
    print("\n".join(events))  # noqa: T201 - the story of the month
    for tenure in read_history(registry):
        print(tenure.words)  # noqa: T201
    return figures(registry, month, served)


def figures(
    registry: Registry, month: list[Batch], served: list[tuple[int, int | None]]
) -> list[Figure]:
    """Hold what served against the truth that nobody knew."""
    from flows.history import read_history

    numbers = {n for pair in served for n in pair if n is not None} | {1}
    right = {n: _right(registry, n, month) for n in sorted(numbers)}
    ours = np.array([right[n][i] for i, (n, _) in enumerate(served)])
    never = right[1]
    worse, longest = 0, 0
    for i, (now, before) in enumerate(served):
        first = max(0, i - WINDOW + 1)
        same = before is not None and all(served[j] == (now, before) for j in range(first, i + 1))
        lost = same and right[now][first : i + 1].mean() < right[before or 1][first : i + 1].mean()
        worse = worse + 1 if lost else 0
        longest = max(longest, worse)
    moves = read_history(registry)
    unexplained = sum(not (move.by and move.why) for move in moves)
    poisoned = [v for v in registry.versions() if _learned_poison(registry, v, month)]
    kept = [v for v in poisoned if served[-1][0] == v.number]
    stopped = sum("let a person look" in c.reason for c in registry.checks(None))
    drifted = np.array([b.world != "A" for b in month])
    return [
        Figure("batches", len(month), "≥ 200", len(month) >= BATCHES, {}),
        Figure(
            "mean accuracy of what served",
            float(ours.mean()),
            "above version 1's",
            bool(ours.mean() > never.mean()),
            {"version 1 for ever": float(never.mean())},
        ),
        Figure(
            "mean accuracy on drifted batches",
            float(ours[drifted].mean()),
            "above version 1's",
            bool(ours[drifted].mean() > never[drifted].mean()),
            {"version 1 for ever": float(never[drifted].mean())},
        ),
        Figure(
            f"longest time that the champion did worse than the one before ({WINDOW} batches"
            " together), batches",
            longest,
            f"≤ {PROBATION_DAYS * DAY}, as long as probation",
            longest <= PROBATION_DAYS * DAY,
            {},
        ),
        Figure("moves of the champion", len(moves), "≥ 3", len(moves) >= 3, {}),
        Figure("moves that the history does not explain", unexplained, "0", unexplained == 0, {}),
        Figure(
            "versions trained on poison that serve at the end",
            len(kept),
            "0",
            not kept,
            {
                "trained on poison": len(poisoned),
                "checks whose delivery went to a person": stopped,
                "rolled back": sum(v.rolled_back for v in poisoned),
            },
        ),
    ]


def arrive(root: Path, batch: Batch) -> None:
    """Write a batch elsewhere, and rename it into the feed."""
    elsewhere = root / f"{batch.name}.partial"
    elsewhere.mkdir()
    for place, picture in enumerate(batch.pictures):
        Image.fromarray(picture).save(elsewhere / f"{place:02d}.png")
    elsewhere.rename(root / "feed" / batch.name)


def label(root: Path, batch: Batch) -> None:
    """Let the labels of three fifths of a batch come."""
    _write_labels(root / "labels" / f"{batch.name}.csv", [(batch, batch.told)])


def correct(root: Path, batches: list[Batch]) -> None:
    """Let the right labels of poisoned batches come."""
    name = f"{batches[0].name}-corrected.csv"
    _write_labels(root / "labels" / name, [(batch, batch.truth) for batch in batches])


def _write_labels(path: Path, told: list[tuple[Batch, NDArray[np.int64]]]) -> None:
    rows = [
        f"{batch.name}/{place:02d}.png,{labels[place]}"
        for batch, labels in told
        for place in range(LABELLED)
    ]
    partial = path.with_suffix(".partial")
    partial.write_text("\n".join(["sample_id,label", *rows, ""]))
    partial.rename(path)


def _right(registry: Registry, number: int, month: list[Batch]) -> NDArray[np.float64]:
    """Give a version's true accuracy on every batch, (batches,)."""
    network = registry.network(registry.version(number))
    return np.array(
        [
            float((network.embed(_pixels(b.pictures))[1].argmax(1).numpy() == b.truth).mean())
            for b in month
        ]
    )


def _learned_poison(registry: Registry, version: Version, month: list[Batch]) -> bool:
    """Whether a version, not its parents alone, was trained on labels that were wrong."""
    if version.parent is None:
        return False
    learned = registry.learned(version).drop_duplicates("sample_id")
    told = dict(zip(learned["sample_id"], learned["label"], strict=True))
    wrong = sum(
        told.get(f"{batch.name}/{place:02d}.png", str(truth)) != str(truth)
        for numbers in POISON.values()
        for batch in (month[i] for i in numbers)
        for place, truth in enumerate(batch.truth)
    )
    return wrong > 0


def _pixels(pictures: NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(pictures).unsqueeze(1)


def _world(name: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    from flows import demo

    if name == "B":
        optical = demo._optical()
        return optical.pictures, optical.labels
    pictures, labels = _mnist()
    part = {"A": slice(0, 5000), "C": slice(5000, 7000), "D": slice(7000, 10_000)}[name]
    pictures, labels = pictures[part], labels[part]
    if name == "C":
        pictures = 255 - pictures
    if name == "D":
        noise = np.random.default_rng(1).normal(0, 40, pictures.shape)
        pictures = (pictures * 0.35 + 60 + noise).clip(0, 255).astype(np.uint8)
    return pictures, labels


def _mnist() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    raw = gzip.decompress((MNIST / "t10k-images-idx3-ubyte.gz").read_bytes())[16:]
    told = gzip.decompress((MNIST / "t10k-labels-idx1-ubyte.gz").read_bytes())[8:]
    pictures = np.frombuffer(raw, dtype=np.uint8).reshape(-1, 28, 28)
    return pictures, np.frombuffer(told, dtype=np.uint8).astype(np.int64)


def _shuffled(
    pictures: NDArray[np.uint8], labels: NDArray[np.int64], rng: np.random.Generator
) -> Iterator[tuple[NDArray[np.uint8], int]]:
    for place in rng.permutation(len(labels)):
        yield pictures[place], int(labels[place])


if __name__ == "__main__":
    main()
