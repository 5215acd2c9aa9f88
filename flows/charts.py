"""Pictures beside a training and a verdict: losses, confusions, and what is still wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from sft.evaluate import confusion
from sft.gate import Pair
from sft.pixels import Pixels
from sft.train import FineTuned

MAX_CLASSES = 30
"""More names than this cannot be read beside a matrix."""
SHOWN = 24
COLUMNS = 8


def draw_training(path: Path, tuned: FineTuned) -> None:
    """Draw losses and learning rate by epoch, with the epoch marked whose weights were kept."""
    figure = Figure(figsize=(8, 6), layout="constrained")
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    numbers = [epoch.number for epoch in tuned.epochs]
    losses.plot(numbers, [epoch.train_loss for epoch in tuned.epochs], label="training", marker=".")
    if not all(np.isnan(epoch.validation_loss) for epoch in tuned.epochs):
        validation = [epoch.validation_loss for epoch in tuned.epochs]
        losses.plot(numbers, validation, label="validation", marker=".")
    losses.axvline(tuned.best_epoch, ls="--", color="gray", label=f"kept: epoch {tuned.best_epoch}")
    losses.set_ylabel("loss")
    losses.set_title(tuned.stopped, fontsize=10, parse_math=False)
    losses.legend()
    rates.plot(numbers, [epoch.learning_rate for epoch in tuned.epochs], marker=".")
    rates.set_ylabel("learning rate")
    rates.set_xlabel("epoch")
    figure.savefig(path, format="png", dpi=100)


def draw_confusions(path: Path, pairs: Mapping[str, Pair], classes: Sequence[str]) -> None:
    """Draw the champion's and the challenger's confusions on each hold-out, row by row.

    Each row of a matrix is a true class; its shades are shares of that class.
    """
    shown = {name: pair for name, pair in pairs.items() if len(pair)}
    size = 4 + 0.12 * min(len(classes), MAX_CLASSES)
    figure = Figure(figsize=(2 * size, max(1, len(shown)) * size), layout="constrained")
    axes = figure.subplots(max(1, len(shown)), 2, squeeze=False)
    for row, (name, pair) in zip(axes, shown.items(), strict=True):
        for axis, who, answers in zip(
            row, ("champion", "challenger"), (pair.champion, pair.challenger), strict=True
        ):
            counts = confusion(answers, len(classes))
            shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
            axis.imshow(shares, vmin=0, vmax=1, cmap="Blues")
            axis.set_title(f"{who}, {name} hold-out: {answers.accuracy:.1%} of {len(pair)}")
            axis.set_xlabel("answered")
            axis.set_ylabel("true")
            _name(axis, classes)
    figure.savefig(path, format="png", dpi=100)


def draw_still_wrong(path: Path, pixels: Pixels, pair: Pair, classes: Sequence[str]) -> int:
    """Draw up to 24 samples that the challenger gets wrong, the surest first; return how many.

    Args:
        path: of the PNG; not written when nothing is wrong.
        pixels: uint8 (n, C, H, W), the samples of the pair.
        pair: both versions' answers.
        classes: names.
    """
    answers = pair.challenger
    wrong = np.flatnonzero(~answers.right)
    sure = answers.probabilities[wrong].max(axis=1) if len(wrong) else np.empty(0)
    wrong = wrong[np.argsort(-sure, kind="stable")][:SHOWN]
    if not len(wrong):
        return 0
    rows = -(-len(wrong) // COLUMNS)
    figure = Figure(figsize=(1.6 * COLUMNS, 2.1 * rows), layout="constrained")
    for axis in figure.subplots(rows, COLUMNS, squeeze=False).ravel():
        axis.axis("off")
    for axis, i in zip(figure.axes, wrong, strict=False):
        picture = pixels[int(i)].permute(1, 2, 0).numpy()
        axis.imshow(picture.squeeze(), cmap="gray" if picture.shape[2] == 1 else None)
        said, truth = classes[answers.predicted[i]], classes[answers.labels[i]]
        # names are shown as they are: no mathtext in what a folder was called
        axis.set_title(f"{said[:14]}\nnot {truth[:14]}", fontsize=8, parse_math=False)
    figure.savefig(path, format="png", dpi=100)
    return len(wrong)


def _name(axis: Any, classes: Sequence[str]) -> None:
    if len(classes) > MAX_CLASSES:
        return
    places, names = range(len(classes)), [name[:14] for name in classes]
    axis.set_xticks(places, names, rotation=90, fontsize=8, parse_math=False)
    axis.set_yticks(places, names, fontsize=8, parse_math=False)
