"""Answers and scores: what a network says about a set of labelled pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from sft.dataset import LabelledPictures
from sft.models import Network


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

    def per_class(self, classes: tuple[str, ...]) -> dict[str, float]:
        """Accuracy (recall) of each class that occurs among the labels."""
        return {
            name: float(self.right[self.labels == index].mean())
            for index, name in enumerate(classes)
            if (self.labels == index).any()
        }


def answer(network: Network, data: LabelledPictures, *, batch_size: int = 256) -> Answers:
    """Let the network answer every sample, in the order of the set."""
    chunks = [network.embed(pixels)[1] for pixels in data.pixels.split(batch_size)]
    width = len(network.config.classes)
    probabilities = torch.cat(chunks) if len(data) else torch.empty(0, width)
    return Answers(
        predicted=probabilities.argmax(dim=1).numpy(),
        labels=data.labels.numpy(),
        probabilities=probabilities.numpy(),
    )


def confusion(answers: Answers, classes: int) -> NDArray[np.int64]:
    """Count (true class, predicted class), shape (classes, classes)."""
    table = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(table, (answers.labels, answers.predicted), 1)
    return table


def mean_loss(network: Network, sets: Sequence[LabelledPictures]) -> tuple[float, float]:
    """Give cross-entropy and accuracy, each set with the same weight.

    Empty sets are left out; without any sample both are NaN. The network's mode stays as it is.
    """
    losses, accuracies = [], []
    with torch.inference_mode():
        for data in sets:
            if len(data):
                logits = torch.cat([network(c).float().cpu() for c in data.pixels.split(256)])
                losses.append(functional.cross_entropy(logits, data.labels).item())
                accuracies.append((logits.argmax(1) == data.labels).float().mean().item())
    if not losses:
        return math.nan, math.nan
    return sum(losses) / len(losses), sum(accuracies) / len(accuracies)
