"""A month in minutes: 200 batches through the real flows, with drift that comes, goes, and poison.

`make bench-month`. The stream is real digits: MNIST's test digits (A), scikit-learn's optical ones
(B), negatives of MNIST (C), MNIST under low contrast and noise (D). Labels of three fifths of a
batch come two batches later. Two deliveries are poisoned: in one 60 % of the labels are random, in
the other every label is the next class; eighteen batches after each began, somebody corrects it.
Once a person moves the alias by hand, and back. The feed keeps the batches of six days.

Nothing is mocked but time: DAY batches are a day, by a clock that the flows read.
"""

from __future__ import annotations

import gzip
import importlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from results import Figure, write
from rich.progress import track

if TYPE_CHECKING:
    from flows.history import Tenure
    from flows.records import Version
    from flows.registry import Registry

BATCHES, SIZE, LABELLED, LATE, DAY = 200, 40, 24, 2, 7
KEPT = 6 * DAY
"""Batches that the feed holds: a new champion is held against them."""
PROBATION_DAYS = 14
POISON = {"random": range(100, 114), "next class": range(150, 164)}
CORRECTED = {"random": 118, "next class": 168}
BY_HAND = (95, 97)
DATA = Path(os.environ.get("BENCH_DATA", Path(__file__).parents[3] / "shared" / "data"))
PICTURE = Path(__file__).parents[2] / "docs" / "month.png"
COLOURS = {"A": "white", "B": "#dbe9f6", "C": "#fde0c5", "D": "#dcecd2", "AB": "#eef4fa"}
WORDS = {"A": "MNIST", "B": "optical", "C": "negatives", "D": "noisy", "AB": "A+B", "ABD": "A+B+D"}
MOVES = {"promoted": "#2a7d3b", "rolled back": "#b04040", "by hand": "#7d5fa0"}
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
probation_days = {probation}
"""


class Clock(datetime):
    """The month's clock: each look at it takes a second, each batch the DAY-th part of a day."""

    moment: ClassVar[datetime] = datetime(2026, 1, 1, tzinfo=UTC)

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]  # no Clock
        """Tell the time."""
        cls.moment += timedelta(seconds=1)
        return cls.moment.astimezone(tz)


@dataclass(frozen=True)
class Lived:
    """What happened: a line for each batch in which something did, and who served which batch.

    `served` holds the champion after each batch, the version before it, and the time.
    """

    events: list[str]
    served: list[tuple[int, int | None, datetime]]


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
    path.write_text(SETTINGS.format(probation=float(PROBATION_DAYS)))
    settings = load_settings(path, environ={})
    export_to_environment(settings)

    from flows.bootstrap import bootstrap
    from flows.history import read_history
    from flows.registry import Registry

    Clock.moment = datetime.now(UTC)  # MLflow's own times lie in the month's first minutes
    importlib.import_module("flows.bootstrap").__dict__["datetime"] = Clock
    Registry.now = lambda _: Clock.now(UTC)  # type: ignore[method-assign]
    demo._write_class_folders(root / "first", demo._mnist()[:3500])
    bootstrap(str(path), data=str(root / "first"))
    registry = Registry(settings)
    month = list(stream())
    lived = Lived([], [])
    for number in track(range(len(month)), description="batches"):
        live_through(root, registry, month, number, lived)
    history = read_history(registry)
    print("\n".join([*lived.events, *(tenure.words for tenure in history)]))  # noqa: T201
    right = right_of_all(registry, month, lived)
    draw(PICTURE, month, lived, right, history)
    return figures(registry, month, lived, right, history)


def live_through(
    root: Path, registry: Registry, month: Sequence[Batch], number: int, lived: Lived
) -> None:
    """Let a batch, what labels are due and what a person does come, and watch."""
    from flows.watch import watch

    batch = month[number]
    Clock.moment += timedelta(days=1 / DAY)
    arrive(root, batch)
    if number >= KEPT:
        shutil.rmtree(root / "feed" / month[number - KEPT].name)
    if number >= LATE:
        label(root, month[number - LATE])
    for kind, when in CORRECTED.items():
        if number == when:
            correct(root, [month[i] for i in POISON[kind]])
    if number in BY_HAND:
        before = lived.served[BY_HAND[0] - 1][0]
        other = 1 if number == BY_HAND[0] else before
        registry.set_alias("champion", registry.version(other))
    watched = watch(str(registry.settings.path))
    champion = registry.champion()
    before_it = champion.tags.get("promoted_from")
    lived.served.append((champion.number, int(before_it) if before_it else None, Clock.moment))
    if watched.move is not None:
        lived.events.append(f"{batch.name} ({batch.world}): seen, {watched.move}")
    if watched.done:
        lived.events.append(f"{batch.name} ({batch.world}): {watched.done}")


def right_of_all(
    registry: Registry, month: Sequence[Batch], lived: Lived
) -> dict[int, NDArray[np.float64]]:
    """Give the true accuracy on every batch, (batches,), of every version that ever served."""
    numbers = {n for now, before, _ in lived.served for n in (now, before) if n is not None}
    return {n: _right(registry, n, month) for n in sorted(numbers | {1})}


def longest_loss(lived: Lived, right: dict[int, NDArray[np.float64]]) -> int:
    """Count for how many batches on end the champion did worse than the version before it.

    Each batch is taken together with those of the WINDOW before it that the same two lived through.
    """
    pairs = [(now, before) for now, before, _ in lived.served]
    worse, longest = 0, 0
    for i, (now, before) in enumerate(pairs):
        first = i
        while first > max(0, i - WINDOW + 1) and pairs[first - 1] == pairs[i]:
            first -= 1
        part = slice(first, i + 1)
        lost = before is not None and right[now][part].mean() < right[before][part].mean()
        worse = worse + 1 if lost else 0
        longest = max(longest, worse)
    return longest


def figures(
    registry: Registry,
    month: Sequence[Batch],
    lived: Lived,
    right: dict[int, NDArray[np.float64]],
    history: Sequence[Tenure],
) -> list[Figure]:
    """Hold what served against the truth that nobody knew."""
    from flows.history import champion_at

    ours = np.array([right[now][i] for i, (now, _, _) in enumerate(lived.served)])
    never = right[1]
    longest = longest_loss(lived, right)
    told = [champion_at(history, when) for _, _, when in lived.served]
    astray = sum(
        tenure is None or tenure.version != now
        for tenure, (now, _, _) in zip(told, lived.served, strict=True)
    )
    unexplained = sum(not (tenure.by and tenure.why) for tenure in history)
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
        Figure("moves of the champion", len(history), "≥ 3", len(history) >= 3, {}),
        Figure("moves that the history does not explain", unexplained, "0", unexplained == 0, {}),
        Figure(
            "batches for which the history names another champion", astray, "0", astray == 0, {}
        ),
        *(poison_figure(registry, month, lived, kind) for kind in POISON),
    ]


def poison_figure(registry: Registry, month: Sequence[Batch], lived: Lived, kind: str) -> Figure:
    """Say what became of a poisoned delivery, and of the versions that were trained on it."""
    from flows.history import read_history

    first = POISON[kind][0]
    after = [part[0] for part in POISON.values() if part[0] > first]
    theirs = range(first, min(after, default=BATCHES))
    stopped = sum(
        "let a person look" in check.reason and int(check.key.batch_id[1:]) in theirs
        for check in registry.checks(None)
    )
    trained = [v for v in registry.versions() if _learned_poison(registry, v, month, kind)]
    promoted = {tenure.version for tenure in read_history(registry)}
    served = [v for v in trained if v.number in promoted]
    back = [v for v in served if v.rolled_back and "by hand" not in v.tags.get("reason", "")]
    return Figure(
        f"poison, {kind}: versions trained on it that were promoted and did not come back by"
        " themselves",
        len(served) - len(back),
        "0",
        len(served) == len(back),
        {
            "checks whose labels went to a person untrained": stopped,
            "trained": len(trained),
            "of these promoted": len(served),
            "rolled back by itself": len(back),
            "batches that they served": sum(
                now in {v.number for v in served} for now, _, _ in lived.served
            ),
        },
    )


def draw(
    path: Path,
    month: Sequence[Batch],
    lived: Lived,
    right: dict[int, NDArray[np.float64]],
    history: Sequence[Tenure],
) -> None:
    """Draw the accuracy of what served beside version 1's, the worlds, the poison and the moves."""
    from matplotlib.figure import Figure as Drawing

    figure = Drawing(figsize=(11, 5), layout="constrained")
    axis = figure.subplots()
    numbers = np.arange(len(month))
    begins = [i for i in numbers if i == 0 or month[i].world != month[i - 1].world]
    for begin, end in zip(begins, [*begins[1:], len(month)], strict=True):
        world = month[begin].world
        axis.axvspan(begin - 0.5, end - 0.5, color=COLOURS.get(world, "#eeeeee"), zorder=0)
        axis.text((begin + end - 1) / 2, 0.02, WORDS[world], ha="center", fontsize=8)
    for kind, where in POISON.items():
        axis.axvspan(where[0], where[-1], ymax=0.12, ymin=0.06, color="#b04040", alpha=0.6)
        axis.text(where[0], 0.14, f"wrong labels: {kind}", fontsize=8, color="#b04040")
    ours = np.array([right[now][i] for i, (now, _, _) in enumerate(lived.served)])
    kernel = np.ones(5)
    for values, words, colour in (
        (right[1], "version 1 for ever", "#999999"),
        (ours, "what served", "#1f4e8c"),
    ):
        smooth = np.convolve(values, kernel, "same") / np.convolve(
            np.ones(len(values)), kernel, "same"
        )
        axis.plot(numbers, smooth, label=words, color=colour)
    times = np.array([when.timestamp() for _, _, when in lived.served])
    for tenure in history[1:]:
        at = int(np.searchsorted(times, tenure.since.timestamp()))
        kind = "rolled back" if tenure.by.startswith("rollback") else "promoted"
        colour = MOVES["by hand" if tenure.seen else kind]
        axis.axvline(at, color=colour, ls="--", lw=1)
        axis.text(at + 0.4, 1.02, f"v{tenure.version}", fontsize=8, color=colour)
    for words, colour in (
        ("promoted", "#2a7d3b"),
        ("rolled back", "#b04040"),
        ("by hand", "#7d5fa0"),
    ):
        axis.plot([], [], color=colour, ls="--", lw=1, label=words)
    axis.set_xlim(-0.5, len(month) - 0.5)
    axis.set_ylim(0, 1.08)
    axis.set_xlabel(f"batch ({DAY} a day)")
    axis.set_ylabel("true accuracy, mean of 5 batches")
    axis.legend(loc="lower right", fontsize=8)
    figure.savefig(path, dpi=90)


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


def correct(root: Path, batches: Sequence[Batch]) -> None:
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


def _right(registry: Registry, number: int, month: Sequence[Batch]) -> NDArray[np.float64]:
    """Give a version's true accuracy on every batch, (batches,)."""
    network = registry.network(registry.version(number))
    return np.array(
        [
            float((network.embed(_pixels(b.pictures))[1].argmax(1).numpy() == b.truth).mean())
            for b in month
        ]
    )


def _learned_poison(
    registry: Registry, version: Version, month: Sequence[Batch], kind: str
) -> bool:
    """Whether a version, or a parent whose labels it did not correct, learned wrong labels."""
    learned = registry.learned(version).drop_duplicates("sample_id")
    told = dict(zip(learned["sample_id"], learned["label"], strict=True))
    return any(
        told.get(f"{batch.name}/{place:02d}.png", str(truth)) != str(truth)
        for batch in (month[i] for i in POISON[kind])
        for place, truth in enumerate(batch.truth)
    )


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
    raw = gzip.decompress((DATA / "mnist" / "t10k-images-idx3-ubyte.gz").read_bytes())[16:]
    told = gzip.decompress((DATA / "mnist" / "t10k-labels-idx1-ubyte.gz").read_bytes())[8:]
    pictures = np.frombuffer(raw, dtype=np.uint8).reshape(-1, 28, 28)
    return pictures, np.frombuffer(told, dtype=np.uint8).astype(np.int64)


def _shuffled(
    pictures: NDArray[np.uint8], labels: NDArray[np.int64], rng: np.random.Generator
) -> Iterator[tuple[NDArray[np.uint8], int]]:
    for place in rng.permutation(len(labels)):
        yield pictures[place], int(labels[place])


if __name__ == "__main__":
    main()
