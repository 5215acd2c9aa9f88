"""Pictures beside a verdict: what was confused before and after, and what is still wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from sft.evaluate import Answers, confusion
from sft.gate import Pair
from sft.tasks import SINGLE_LABEL, MultiLabel, Regression

MAX_CLASSES = 30
"""More names than this cannot be read beside a matrix."""
SHOWN = 24
COLUMNS = 8


def draw_confusions(path: Path, pairs: Mapping[str, Pair], classes: Sequence[str]) -> None:
    """Draw the champion's and the challenger's confusions on each hold-out, row by row.

    Each row of a matrix is a true class; its shades are shares of that class. Of several labels,
    each has a bar of what was found, missed and wrongly said; of a regression, each target has
    points, predicted against true.
    """
    shown = {name: pair for name, pair in pairs.items() if len(pair)}
    size = 4 + 0.12 * min(len(classes), MAX_CLASSES)
    figure = Figure(figsize=(2 * size, max(1, len(shown)) * size), layout="constrained")
    axes = figure.subplots(max(1, len(shown)), 2, squeeze=False)
    for row, (name, pair) in zip(axes, shown.items(), strict=True):
        for axis, who, answers in zip(
            row, ("champion", "challenger"), (pair.champion, pair.challenger), strict=True
        ):
            draw = _DRAWN.get(answers.task.name, _draw_matrix)
            draw(axis, answers, classes)
            axis.set_title(f"{who}, {name} hold-out: {answers.accuracy:.1%} of {len(pair)}")
    figure.savefig(path, format="png", dpi=100)


def draw_still_wrong(path: Path, pixels: Tensor, pair: Pair, classes: Sequence[str]) -> int:
    """Draw up to 24 samples that the challenger gets wrong; return how many.

    The surest come first; of other tasks than one class, those that were answered worst.

    Args:
        path: of the PNG; not written when nothing is wrong.
        pixels: uint8 (n, C, H, W), the samples of the pair.
        pair: both versions' answers.
        classes: names.
    """
    answers = pair.challenger
    wrong = np.flatnonzero(~answers.right)
    if not len(wrong):
        return 0
    one_class = answers.task == SINGLE_LABEL
    badness = answers.probabilities.max(axis=1) if one_class else -answers.scores
    wrong = wrong[np.argsort(-badness[wrong], kind="stable")][:SHOWN]
    said, truth = (
        answers.task.texts(torch.as_tensor(rows[wrong]), classes)
        for rows in (answers.predicted, answers.labels)
    )
    rows = -(-len(wrong) // COLUMNS)
    figure = Figure(figsize=(1.6 * COLUMNS, 2.1 * rows), layout="constrained")
    for axis in figure.subplots(rows, COLUMNS, squeeze=False).ravel():
        axis.axis("off")
    for axis, i, now, was in zip(figure.axes, wrong, said, truth, strict=False):
        picture = pixels[i].permute(1, 2, 0).numpy()
        axis.imshow(picture.squeeze(), cmap="gray" if picture.shape[2] == 1 else None)
        # names are shown as they are: no mathtext in what a folder was called
        axis.set_title(f"{str(now)[:14]}\nnot {str(was)[:14]}", fontsize=8, parse_math=False)
    figure.savefig(path, format="png", dpi=100)
    return len(wrong)


def _draw_matrix(axis: Any, answers: Answers, classes: Sequence[str]) -> None:
    counts = confusion(answers, classes)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axis.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    axis.set_xlabel("answered")
    axis.set_ylabel("true")
    _name(axis, classes)


def _draw_bars(axis: Any, answers: Answers, classes: Sequence[str]) -> None:
    counts = confusion(answers, classes)
    shown, left = range(len(classes)), np.zeros(len(classes))
    for words, true, said in (("found", 1, 1), ("missed", 1, 0), ("wrongly said", 0, 1)):
        axis.barh(shown, counts[:, true, said], left=left, label=words)
        left = left + counts[:, true, said]
    axis.invert_yaxis()
    axis.set_xlabel("pictures")
    axis.legend()
    if len(classes) <= MAX_CLASSES:
        axis.set_yticks(shown, [name[:14] for name in classes], fontsize=8, parse_math=False)


def _draw_points(axis: Any, answers: Answers, classes: Sequence[str]) -> None:
    for place, name in enumerate(classes):
        axis.scatter(answers.labels[:, place], answers.predicted[:, place], s=8, label=name[:14])
    ends = answers.labels.min(), answers.labels.max()
    axis.plot(ends, ends, color="gray", linewidth=1)
    axis.set_xlabel("true")
    axis.set_ylabel("answered")
    if 1 < len(classes) <= MAX_CLASSES:
        for text in axis.legend().get_texts():
            text.set_parse_math(False)


_DRAWN: Mapping[str, Callable[[Any, Answers, Sequence[str]], None]] = {
    MultiLabel.name: _draw_bars,
    Regression.name: _draw_points,
}


def _name(axis: Any, classes: Sequence[str]) -> None:
    if len(classes) > MAX_CLASSES:
        return
    places, names = range(len(classes)), [name[:14] for name in classes]
    axis.set_xticks(places, names, rotation=90, fontsize=8, parse_math=False)
    axis.set_yticks(places, names, fontsize=8, parse_math=False)
