"""Answers and scores: what a network says about a set of labelled pictures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sft.dataset import LabelledPictures
from sft.distributed import ALONE, Team
from sft.models import Network
from sft.tasks import SINGLE_LABEL, Task


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

    def per_class(self, classes: Sequence[str]) -> dict[str, ClassScore]:
        """Score each class that occurs among labels or answers; nothing where there are none."""
        counts = np.array(self.details(classes).get("confusion", []))
        if not counts.size:
            return {}
        if counts.ndim == 2:  # noqa: PLR2004 - (true, answered)
            given, answered, right = counts.sum(axis=1), counts.sum(axis=0), counts.diagonal()
        else:  # (label, true, answered)
            given, answered = counts[:, 1].sum(axis=1), counts[:, :, 1].sum(axis=1)
            right = counts[:, 1, 1]
        return {
            name: ClassScore(
                support=int(given[place]),
                recall=_share(right[place], given[place]),
                precision=_share(right[place], answered[place]),
            )
            for place, name in enumerate(classes)
            if given[place] or answered[place]
        }

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
    passes = (network.embed(pixels)[1:] for pixels in data.pixels.split(batch_size))
    width, task = len(network.config.classes), network.config.task
    probabilities = torch.empty(0, width)
    if len(data):
        [probabilities] = collect(passes, len(data))
    return Answers(
        predicted=task.predicted(probabilities).numpy(),
        labels=data.labels.numpy(),
        probabilities=probabilities.numpy(),
        task=task,
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


def confusion(answers: Answers, classes: Sequence[str]) -> NDArray[np.int64]:
    """Count (true class, predicted class), shape (classes, classes).

    Of a task with several labels, (label, true, predicted), shape (labels, 2, 2).
    """
    return np.asarray(answers.details(classes)["confusion"], dtype=np.int64)


def mean_loss(
    network: Network, sets: Sequence[LabelledPictures], team: Team = ALONE
) -> tuple[float, float]:
    """Give the task's loss and the accuracy, each set with the same weight.

    Within a set, samples count by their weights. Empty sets are left out; without any sample both
    are NaN. The network's mode stays as it is. A team shares the passes out.
    """
    losses, accuracies = [], []
    task = network.config.task
    with torch.inference_mode():
        for data in sets:
            if len(data):
                passes = (
                    [team.answers(network, part).float().cpu()] for part in data.pixels.split(256)
                )
                [logits] = collect(passes, len(data))
                losses.append(task.validation_loss(logits, data.labels, data.weights).item())
                right = task.right(task.predicted(task.answers(logits)), data.labels).float()
                accuracies.append(_mean(right, data.weights))
    if not losses:
        return math.nan, math.nan
    return sum(losses) / len(losses), sum(accuracies) / len(accuracies)


def _share(part: int, whole: int) -> float:
    return float(part / whole) if whole else math.nan


def _mean(values: Tensor, weights: Tensor | None) -> float:
    return (values.mean() if weights is None else (values * weights).sum() / weights.sum()).item()
