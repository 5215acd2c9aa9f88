"""Answers and scores: what a network says about a set of labelled pictures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from sft.dataset import LabelledPictures
from sft.models import Network


@dataclass(frozen=True)
class ClassScore:
    """How one class is answered; NaN where there is nothing to count.

    Attributes:
        support: samples of the class.
        recall: share of them that is answered with the class.
        precision: share of the answers with the class that are right.
    """

    support: int
    recall: float
    precision: float


@dataclass(frozen=True)
class Answers:
    """A network's answers to a set, beside the truth.

    Attributes:
        predicted, labels: int64 (n,).
        probabilities: float32 (n, classes).
    """

    predicted: NDArray[np.int64]
    labels: NDArray[np.int64]
    probabilities: NDArray[np.float32]

    @property
    def right(self) -> NDArray[np.bool_]:
        """Which samples were answered rightly, (n,)."""
        return np.asarray(self.predicted == self.labels)

    @property
    def accuracy(self) -> float:
        """Share of right answers; NaN for an empty set."""
        return float(self.right.mean()) if len(self.labels) else float("nan")

    def per_class(self, classes: Sequence[str]) -> dict[str, ClassScore]:
        """Score each class that occurs among the labels or the answers."""
        counts = confusion(self, len(classes))
        given, answered, right = counts.sum(axis=1), counts.sum(axis=0), counts.diagonal()
        return {
            name: ClassScore(
                support=int(given[place]),
                recall=_share(right[place], given[place]),
                precision=_share(right[place], answered[place]),
            )
            for place, name in enumerate(classes)
            if given[place] or answered[place]
        }


def answer(network: Network, data: LabelledPictures, *, batch_size: int = 256) -> Answers:
    """Let the network answer every sample, in the order of the set."""
    passes = (network.embed(pixels)[1:] for pixels in data.pixels.split(batch_size))
    probabilities = torch.empty(0, len(network.config.classes))
    if len(data):
        [probabilities] = collect(passes, len(data))
    return Answers(
        predicted=probabilities.argmax(dim=1).numpy(),
        labels=data.labels.numpy(),
        probabilities=probabilities.numpy(),
    )


def collect(passes: Iterable[Sequence[Tensor]], n: int) -> list[Tensor]:
    """Put what each pass gives, (b, …), into tables float32 (n, …); no pass, no table.

    A list of them would keep small tensors between the large ones of each pass, so that the C
    library could not use that memory again: 1 MB a pass was seen.
    """
    tables: list[Tensor] = []
    start = 0
    for given in passes:
        tables = tables or [torch.empty(n, *rows.shape[1:]) for rows in given]
        for table, rows in zip(tables, given, strict=True):
            table[start : start + len(rows)] = rows
        start += len(given[0])
    return tables


def confusion(answers: Answers, classes: int) -> NDArray[np.int64]:
    """Count (true class, predicted class), shape (classes, classes)."""
    table = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(table, (answers.labels, answers.predicted), 1)
    return table


def mean_loss(network: Network, sets: Sequence[LabelledPictures]) -> tuple[float, float]:
    """Give cross-entropy and accuracy, each set with the same weight.

    Within a set, samples count by their weights. Empty sets are left out; without any sample both
    are NaN. The network's mode stays as it is.
    """
    losses, accuracies = [], []
    with torch.inference_mode():
        for data in sets:
            if len(data):
                [logits] = collect(([network(part)] for part in data.pixels.split(256)), len(data))
                loss = functional.cross_entropy(logits, data.labels, reduction="none")
                losses.append(_mean(loss, data.weights))
                accuracies.append(_mean((logits.argmax(1) == data.labels).float(), data.weights))
    if not losses:
        return math.nan, math.nan
    return sum(losses) / len(losses), sum(accuracies) / len(accuracies)


def _share(part: int, whole: int) -> float:
    return float(part / whole) if whole else math.nan


def _mean(values: Tensor, weights: Tensor | None) -> float:
    return (values.mean() if weights is None else (values * weights).sum() / weights.sum()).item()
