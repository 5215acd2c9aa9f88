"""Answers and scores: what a network says about a set of labelled pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sft.dataset import LabelledPictures
from sft.models import Network
from sft.tasks import SINGLE_LABEL, Task


@dataclass(frozen=True)
class Answers:
    """A network's answers to a set, beside the truth.

    Attributes:
        predicted, labels: (n, …), as the task has them: int64 (n,), the index of the class, or
            float32 (n, outputs).
        probabilities: float32 (n, classes), or the values of a regression.
        task: what the answers are to.
    """

    predicted: NDArray[Any]
    labels: NDArray[Any]
    probabilities: NDArray[np.float32]
    task: Task = SINGLE_LABEL

    @property
    def right(self) -> NDArray[np.bool_]:
        """Which samples were answered rightly, (n,)."""
        return np.asarray(self.task.right(*self._tensors).numpy())

    @property
    def scores(self) -> NDArray[np.float32]:
        """How well each sample was answered, (n,); more is better. See `Task.scores`."""
        return np.asarray(self.task.scores(*self._tensors).numpy(), dtype=np.float32)

    @property
    def accuracy(self) -> float:
        """Share of right answers; NaN for an empty set."""
        return float(self.right.mean()) if len(self.labels) else float("nan")

    def per_class(self, classes: tuple[str, ...]) -> dict[str, float]:
        """Accuracy (recall) of each class that occurs among the labels."""
        members = {name: self.of_class(index) for index, name in enumerate(classes)}
        right = self.right
        return {name: float(right[rows].mean()) for name, rows in members.items() if rows.any()}

    def of_class(self, index: int) -> NDArray[np.bool_]:
        """Which samples belong to a class, (n,)."""
        return np.asarray(self.task.of_class(self._tensors[1], index).numpy())

    def details(self, classes: Sequence[str]) -> dict[str, Any]:
        """Give counts or errors by class or target, as JSON holds them."""
        return self.task.details(*self._tensors, classes)

    @property
    def _tensors(self) -> tuple[Tensor, Tensor]:
        return torch.as_tensor(self.predicted), torch.as_tensor(self.labels)


def answer(network: Network, data: LabelledPictures, *, batch_size: int = 256) -> Answers:
    """Let the network answer every sample, in the order of the set."""
    chunks = [network.embed(pixels)[1] for pixels in data.pixels.split(batch_size)]
    width, task = len(network.config.classes), network.config.task
    probabilities = torch.cat(chunks) if len(data) else torch.empty(0, width)
    return Answers(
        predicted=task.predicted(probabilities).numpy(),
        labels=data.labels.numpy(),
        probabilities=probabilities.numpy(),
        task=task,
    )


def confusion(answers: Answers, classes: Sequence[str]) -> NDArray[np.int64]:
    """Count (true class, predicted class), shape (classes, classes).

    Of a task with several labels, (label, true, predicted), shape (labels, 2, 2).
    """
    return np.asarray(answers.details(classes)["confusion"], dtype=np.int64)


def mean_loss(network: Network, sets: Sequence[LabelledPictures]) -> tuple[float, float]:
    """Give the task's loss and the accuracy, each set with the same weight.

    Empty sets are left out; without any sample both are NaN. The network's mode stays as it is.
    """
    losses, accuracies = [], []
    task = network.config.task
    with torch.inference_mode():
        for data in sets:
            if len(data):
                logits = torch.cat([network(chunk) for chunk in data.pixels.split(256)])
                losses.append(task.validation_loss(logits, data.labels).item())
                right = task.right(task.predicted(task.answers(logits)), data.labels)
                accuracies.append(right.float().mean().item())
    if not losses:
        return math.nan, math.nan
    return sum(losses) / len(losses), sum(accuracies) / len(accuracies)
