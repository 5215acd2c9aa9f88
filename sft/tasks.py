"""What a network is to answer: one class of several, any number of labels, or numbers.

A task is one small object that every other part asks: how labels are written, what a batch costs,
what a network's outputs mean, and which samples are answered rightly. "Right" is what settling,
probation and the gate count, so that none of them knows what kind of task it is. A further task
(segmentation, detection, text) is one more class here.

Each task has an output of the head for each name: a class, a label or a target.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from sft.objectives import class_weights, likelihood, soft_cross_entropy, soft_targets
from sft.objectives import divergence as softmax_divergence

SEPARATOR = "|"
"""Between the labels, or the numbers, of one sample."""
NO_CLASS = -1
MOST_WEIGHT = 10.0
"""Of a label's presence beside its absence, so that one with a single sample does not drown the
others; the same bound as for classes."""
LOSSES = ("mse", "huber")


class LabelError(ValueError):
    """A text that cannot be a label; the message says what could be one."""


class Task(ABC):
    """What a network answers, with a row of a label tensor for each sample.

    Attributes:
        name: as under [model] in the settings.
        least_names: fewer names leave nothing to answer.
        grows: whether names may be added to a trained network.
        unfit: training settings that make no sense for it.
    """

    name: ClassVar[str]
    least_names: ClassVar[int] = 1
    grows: ClassVar[bool] = True
    unfit: ClassVar[tuple[str, ...]] = ()

    # --- labels as people write them

    def refuse(self, names: Sequence[str]) -> None:
        """Raise ValueError for names that it cannot have."""
        if len(names) < self.least_names:
            raise ValueError(
                f"a {self.name} model needs at least {self.least_names} classes, got {list(names)}"
            )
        if bad := [name for name in names if SEPARATOR in name or name != name.strip()]:
            raise ValueError(
                f"{bad[0]!r} cannot be a name in a {self.name} model: {SEPARATOR!r} stands between"
                " the labels of a sample, and space around them does not count"
            )

    @abstractmethod
    def names_in(self, texts: Iterable[str]) -> tuple[str, ...]:
        """Give the names that labels use, sorted; what cannot be a label is left to `row`."""

    @abstractmethod
    def row(self, text: str, names: Sequence[str]) -> Tensor:
        """Read one label.

        Raises:
            LabelError: it cannot be one.
        """

    @abstractmethod
    def missing(self, names: Sequence[str]) -> Tensor:
        """Give the row of a sample without a label."""

    @abstractmethod
    def known(self, labels: Tensor) -> Tensor:
        """Tell which samples have a label, bool (n,)."""

    @abstractmethod
    def text(self, row: Tensor, names: Sequence[str]) -> str:
        """Write one label; `row` reads it back."""

    def rows(self, texts: Iterable[str | None], names: Sequence[str]) -> Tensor:
        """Read labels, (n, …); None, and what cannot be a label, counts as missing."""
        missing = self.missing(names)
        found = [missing]
        for text in texts:
            try:
                found.append(missing if text is None else self.row(text, names))
            except LabelError:
                found.append(missing)
        return torch.stack(found)[1:]

    def texts(self, labels: Tensor, names: Sequence[str]) -> list[str | None]:
        """Write labels; None for a missing one."""
        return [
            self.text(row, names) if known else None
            for row, known in zip(labels, self.known(labels).tolist(), strict=True)
        ]

    # --- training

    def fitted(self, labels: Tensor) -> Task:
        """Take from the first training labels what it needs to know of them."""
        del labels
        return self

    def unlearnable(self, labels: Tensor) -> str:
        """Say why nothing can be learned from labels; empty when something can."""
        if len(labels.unique(dim=0)) > 1:
            return ""
        return "all samples have the same label: nothing can be learned from them"

    def outside(self, labels: Tensor, outputs: int) -> str:
        """Say which labels no output stands for; empty when each one has its own."""
        del labels, outputs
        return ""

    @abstractmethod
    def counts(self, labels: Tensor, outputs: int) -> Tensor:
        """Count the samples of each class, int64 (classes,)."""

    @abstractmethod
    def alike(self, labels: Tensor, counts: Tensor) -> Tensor:
        """Tell how many samples each one's class has, int64 (n,): the rarest of its labels."""

    def weights(self, labels: Tensor, outputs: int, drawn: Tensor | None = None) -> Tensor | None:
        """Weigh classes so that each counts the same; None where there are none.

        Args:
            labels: (n, …), of all that is trained on.
            outputs: of the head.
            drawn: float32 (n,), how often each sample is drawn; None: all as often.
        """
        del labels, outputs, drawn
        return None

    @abstractmethod
    def targets(self, labels: Tensor, outputs: int, *, smoothing: float = 0.0) -> Tensor:
        """Make what a loss is taken towards, float (n, outputs); blends of it are targets too."""

    @abstractmethod
    def loss(
        self,
        outputs: Tensor,
        targets: Tensor,
        weights: Tensor | None = None,
        samples: Tensor | None = None,
    ) -> Tensor:
        """Give the mean loss of a batch, a scalar.

        Args:
            outputs: of the head, (n, outputs).
            targets: (n, outputs).
            weights: (outputs,), of classes.
            samples: (n,), of samples.
        """

    def validation_loss(
        self, outputs: Tensor, labels: Tensor, samples: Tensor | None = None
    ) -> Tensor:
        """Give the mean loss without weights of classes and smoothing, a scalar."""
        return self.loss(outputs, self.targets(labels, outputs.shape[1]), None, samples)

    @abstractmethod
    def divergence(self, learned: Tensor, taught: Tensor) -> Tensor:
        """Tell how far a student's outputs are from its teacher's, a scalar; for distillation."""

    @abstractmethod
    def likelihood(
        self, outputs: Tensor, labels: Tensor | None, generator: torch.Generator | None
    ) -> Tensor:
        """Give one sample's log-likelihood, a scalar, for EWC.

        Args:
            outputs: (1, outputs), with gradient.
            labels: its row, (1, …); None draws one from the outputs.
            generator: of the draw.
        """

    # --- answers

    @abstractmethod
    def answers(self, outputs: Tensor) -> Tensor:
        """Give what outputs mean, (n, outputs): probabilities, or values."""

    @abstractmethod
    def predicted(self, answers: Tensor) -> Tensor:
        """Decide; the form is that of labels."""

    @abstractmethod
    def right(self, predicted: Tensor, labels: Tensor) -> Tensor:
        """Tell which samples are answered rightly, bool (n,)."""

    @abstractmethod
    def scores(self, predicted: Tensor, labels: Tensor) -> Tensor:
        """Tell how well each sample is answered, float (n,); more is better."""

    @abstractmethod
    def of_class(self, labels: Tensor, place: int) -> Tensor:
        """Tell which samples belong to a class, bool (n,)."""

    @abstractmethod
    def chance(self, labels: Tensor, outputs: int) -> float:
        """Give the share that a guess gets right."""

    @abstractmethod
    def details(self, predicted: Tensor, labels: Tensor, names: Sequence[str]) -> dict[str, Any]:
        """Give counts or errors by name, as JSON holds them."""

    @abstractmethod
    def served(self, answers: Tensor, names: Sequence[str]) -> dict[str, list[Any]]:
        """Give what a service returns: columns of n entries."""


@dataclass(frozen=True)
class SingleLabel(Task):
    """One class of several: labels are int64 (n,), places in the names; -1 is a missing one."""

    name: ClassVar[str] = "single_label"
    least_names: ClassVar[int] = 2

    def refuse(self, names: Sequence[str]) -> None:
        """Refuse fewer than two classes."""
        if len(names) < self.least_names:
            raise ValueError(f"a classifier needs at least 2 classes, got {list(names)}")

    def names_in(self, texts: Iterable[str]) -> tuple[str, ...]:
        """Each label is the name of a class."""
        return tuple(sorted(set(texts)))

    def row(self, text: str, names: Sequence[str]) -> Tensor:
        """Read the name of a class."""
        if text not in names:
            raise LabelError(f"{text!r} is none of the classes {_some(names)}")
        return torch.tensor(list(names).index(text))

    def missing(self, names: Sequence[str]) -> Tensor:
        """Give -1."""
        del names
        return torch.tensor(NO_CLASS)

    def known(self, labels: Tensor) -> Tensor:
        """Tell which are not -1."""
        return labels != NO_CLASS

    def text(self, row: Tensor, names: Sequence[str]) -> str:
        """Write the name of the class."""
        return names[int(row)]

    def rows(self, texts: Iterable[str | None], names: Sequence[str]) -> Tensor:
        """Read many names fast."""
        places: dict[str | None, int] = {name: place for place, name in enumerate(names)}
        return torch.tensor([places.get(text, NO_CLASS) for text in texts], dtype=torch.int64)

    def unlearnable(self, labels: Tensor) -> str:
        """One class leaves nothing to learn."""
        if len(labels.unique()) > 1:
            return ""
        return "the labels are of one class only: nothing can be learned from them"

    def outside(self, labels: Tensor, outputs: int) -> str:
        """Labels are places among the outputs; at this point none is missing."""
        odd = sorted({*labels.tolist()}.difference(range(outputs)))
        if not odd:
            return ""
        return (
            f"labels are places among the {outputs} classes of the network, 0 to {outputs - 1},"
            f" but there are others: {odd[:5]}"
        )

    def counts(self, labels: Tensor, outputs: int) -> Tensor:
        """Count the samples of each class."""
        return torch.bincount(labels, minlength=outputs)

    def alike(self, labels: Tensor, counts: Tensor) -> Tensor:
        """Give the size of each one's class."""
        return counts[labels]

    def weights(self, labels: Tensor, outputs: int, drawn: Tensor | None = None) -> Tensor | None:
        """Weigh each class by the inverse of its share."""
        return class_weights(labels, outputs, drawn, most=MOST_WEIGHT)

    def targets(self, labels: Tensor, outputs: int, *, smoothing: float = 0.0) -> Tensor:
        """Make shares of one."""
        return soft_targets(labels, outputs, smoothing=smoothing)

    def loss(
        self,
        outputs: Tensor,
        targets: Tensor,
        weights: Tensor | None = None,
        samples: Tensor | None = None,
    ) -> Tensor:
        """Cross-entropy."""
        return soft_cross_entropy(outputs, targets, weights, samples)

    def validation_loss(
        self, outputs: Tensor, labels: Tensor, samples: Tensor | None = None
    ) -> Tensor:
        """Cross-entropy."""
        if samples is not None:
            return super().validation_loss(outputs, labels, samples)
        return functional.cross_entropy(outputs, labels)

    def divergence(self, learned: Tensor, taught: Tensor) -> Tensor:
        """KL of the softmaxes."""
        return softmax_divergence(learned, taught)

    def likelihood(
        self, outputs: Tensor, labels: Tensor | None, generator: torch.Generator | None
    ) -> Tensor:
        """Of a class."""
        return likelihood(outputs, labels, generator)

    def answers(self, outputs: Tensor) -> Tensor:
        """Softmax."""
        return outputs.softmax(dim=1)

    def predicted(self, answers: Tensor) -> Tensor:
        """Take the likeliest class."""
        return answers.argmax(dim=1)

    def right(self, predicted: Tensor, labels: Tensor) -> Tensor:
        """Whether it is the class."""
        return predicted == labels

    def scores(self, predicted: Tensor, labels: Tensor) -> Tensor:
        """0 or 1."""
        return self.right(predicted, labels).float()

    def of_class(self, labels: Tensor, place: int) -> Tensor:
        """Whether it is the class."""
        return labels == place

    def chance(self, labels: Tensor, outputs: int) -> float:
        """One class is as likely as another."""
        del labels
        return 1 / outputs

    def details(self, predicted: Tensor, labels: Tensor, names: Sequence[str]) -> dict[str, Any]:
        """Count (true class, predicted class)."""
        k = len(names)
        counts = torch.bincount(labels * k + predicted, minlength=k * k)
        return {"confusion": counts.view(k, k).tolist()}

    def served(self, answers: Tensor, names: Sequence[str]) -> dict[str, list[Any]]:
        """Give the class, its probability, and all probabilities by name."""
        return {
            "class": [names[place] for place in self.predicted(answers).tolist()],
            "confidence": answers.amax(dim=1).tolist(),
            "probabilities": _by_name(answers, names),
        }


@dataclass(frozen=True)
class MultiLabel(Task):
    """Any number of labels: float32 (n, labels) of 0 and 1; NaN in the row of a missing one.

    A label is written as names between `|`, and none of them as `|` alone: in a file of labels an
    empty cell is a sample that nobody has labelled yet.
    """

    name: ClassVar[str] = "multi_label"

    def names_in(self, texts: Iterable[str]) -> tuple[str, ...]:
        """Collect the names between separators."""
        return tuple(sorted({name for text in texts for name in _parts(text)}))

    def row(self, text: str, names: Sequence[str]) -> Tensor:
        """Read names between separators; an empty text is none of them."""
        given = _parts(text)
        if unknown := sorted(set(given).difference(names)):
            raise LabelError(f"{unknown[0]!r} in {text!r} is none of the labels {_some(names)}")
        return torch.tensor([float(name in given) for name in names])

    def missing(self, names: Sequence[str]) -> Tensor:
        """Give NaN."""
        return torch.full((len(names),), math.nan)

    def known(self, labels: Tensor) -> Tensor:
        """Tell which rows are finite."""
        return labels.isfinite().all(dim=1)

    def text(self, row: Tensor, names: Sequence[str]) -> str:
        """Write the names in their order."""
        held = zip(names, row.tolist(), strict=True)
        return SEPARATOR.join(name for name, value in held if value) or SEPARATOR

    def counts(self, labels: Tensor, outputs: int) -> Tensor:
        """Count the samples with each label, and at last those with none."""
        del outputs
        return torch.cat([labels.sum(0), (labels.sum(1) == 0).sum(0, keepdim=True)]).long()

    def alike(self, labels: Tensor, counts: Tensor) -> Tensor:
        """Give how many samples have the rarest of each one's labels."""
        held = torch.cat([labels > 0, labels.sum(1, keepdim=True) == 0], dim=1)
        return torch.where(held, counts, torch.iinfo(torch.int64).max).amin(dim=1)

    def weights(self, labels: Tensor, outputs: int, drawn: Tensor | None = None) -> Tensor | None:
        """Weigh each label's presence so that it counts as much as its absence."""
        del outputs
        drawn = torch.ones(len(labels)) if drawn is None else drawn
        with_it, without = drawn @ labels, drawn @ (1 - labels)
        weight = (without / with_it).clamp(1 / MOST_WEIGHT, MOST_WEIGHT)
        return torch.where((with_it > 0) & (without > 0), weight, 1.0)

    def targets(self, labels: Tensor, outputs: int, *, smoothing: float = 0.0) -> Tensor:
        """Move 0 and 1 towards a half."""
        del outputs
        return labels * (1 - smoothing) + smoothing / 2

    def loss(
        self,
        outputs: Tensor,
        targets: Tensor,
        weights: Tensor | None = None,
        samples: Tensor | None = None,
    ) -> Tensor:
        """Binary cross-entropy, the mean over labels."""
        each = functional.binary_cross_entropy_with_logits(
            outputs, targets, pos_weight=weights, reduction="none"
        )
        return _mean(each.mean(1), samples)

    def divergence(self, learned: Tensor, taught: Tensor) -> Tensor:
        """KL of the sigmoids, the mean over labels."""
        truth = taught.sigmoid()
        cost = functional.binary_cross_entropy_with_logits
        return cost(learned, truth) - cost(taught, truth)

    def likelihood(
        self, outputs: Tensor, labels: Tensor | None, generator: torch.Generator | None
    ) -> Tensor:
        """Of each label by itself."""
        if labels is None:
            labels = torch.bernoulli(outputs.detach().sigmoid(), generator=generator)
        cost = functional.binary_cross_entropy_with_logits(outputs, labels, reduction="sum")
        return -cost

    def answers(self, outputs: Tensor) -> Tensor:
        """Sigmoids."""
        return outputs.sigmoid()

    def predicted(self, answers: Tensor) -> Tensor:
        """Take the labels that are likelier than not."""
        return (answers >= 0.5).float()  # noqa: PLR2004 - a half

    def right(self, predicted: Tensor, labels: Tensor) -> Tensor:
        """Whether every label is right."""
        return (predicted == labels).all(dim=1)

    def scores(self, predicted: Tensor, labels: Tensor) -> Tensor:
        """Give the share of labels that are right."""
        return (predicted == labels).float().mean(dim=1)

    def of_class(self, labels: Tensor, place: int) -> Tensor:
        """Whether it has the label."""
        return labels[:, place] > 0

    def chance(self, labels: Tensor, outputs: int) -> float:
        """Give the share of the set that comes most often, or that coins hit."""
        sets, counts = labels.unique(dim=0, return_counts=True)
        often = float(counts.max()) / len(labels) if len(sets) else 0.0
        return max(often, 0.5**outputs)

    def details(self, predicted: Tensor, labels: Tensor, names: Sequence[str]) -> dict[str, Any]:
        """Count (true, predicted) for each label: 0 without it, 1 with it."""
        places = (labels * 2 + predicted).long()
        counts = functional.one_hot(places, 4).sum(0).view(len(names), 2, 2)
        return {"confusion": counts.tolist()}

    def served(self, answers: Tensor, names: Sequence[str]) -> dict[str, list[Any]]:
        """Give the list of labels, and all probabilities by name."""
        return {
            "labels": [
                [name for name, held in zip(names, row, strict=True) if held]
                for row in self.predicted(answers).tolist()
            ],
            "probabilities": _by_name(answers, names),
        }


@dataclass(frozen=True)
class Regression(Task):
    """Numbers: labels are float32 (n, targets), as people write them; NaN for a missing row.

    Inside, targets are standardised by the first training labels, so that learning rates and
    strengths mean the same whatever the unit is.

    Attributes:
        loss_kind: `mse`, or `huber`, which is linear beyond one standard deviation of the labels.
        tolerance: the largest error that counts as right, in the unit of the labels.
        mean, std: of the first training labels, one value a target; empty: not fitted yet.
    """

    loss_kind: str = "mse"
    tolerance: float = 1.0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    name: ClassVar[str] = "regression"
    grows: ClassVar[bool] = False
    unfit: ClassVar[tuple[str, ...]] = ("label_smoothing", "balanced", "rare")

    def __post_init__(self) -> None:
        """Refuse values outside their range, by name."""
        if self.loss_kind not in LOSSES:
            raise ValueError(
                f"regression_loss must be one of {', '.join(LOSSES)}, got {self.loss_kind!r}"
            )
        if not 0 < self.tolerance < math.inf:
            raise ValueError(f"tolerance must be positive and finite, got {self.tolerance}")
        if len(self.mean) != len(self.std) or not all(0 < one < math.inf for one in self.std):
            raise ValueError("mean and std of the targets need one value a target each")

    def refuse(self, names: Sequence[str]) -> None:
        """Refuse names without a mean and a deviation, too."""
        super().refuse(names)
        if len(self.mean) not in (0, len(names)):
            raise ValueError(
                f"{len(names)} targets have {len(self.mean)} means: the targets of a regression"
                " stay as they were at bootstrap"
            )

    def names_in(self, texts: Iterable[str]) -> tuple[str, ...]:
        """Number the targets: as many as most labels have numbers."""
        sizes = [text.count(SEPARATOR) + 1 for text in texts]
        targets = max(set(sizes), key=sizes.count)
        return tuple(f"value {i}" for i in range(1, targets + 1)) if targets > 1 else ("value",)

    def row(self, text: str, names: Sequence[str]) -> Tensor:
        """Read numbers between separators."""
        given = text.split(SEPARATOR)
        if len(given) != len(names):
            raise LabelError(
                f"{text!r} holds {len(given)} numbers, and there are {len(names)} targets:"
                f" {_some(names)}"
            )
        return torch.tensor([_finite(part, text) for part in given])

    def missing(self, names: Sequence[str]) -> Tensor:
        """Give NaN."""
        return torch.full((len(names),), math.nan)

    def known(self, labels: Tensor) -> Tensor:
        """Tell which rows are finite."""
        return labels.isfinite().all(dim=1)

    def text(self, row: Tensor, names: Sequence[str]) -> str:
        """Write the fewest digits that give the same float32."""
        del names
        return SEPARATOR.join(str(value).removesuffix(".0") for value in row.float().numpy())

    def fitted(self, labels: Tensor) -> Regression:
        """Take the labels' mean and standard deviation; 1 where a target never varies."""
        rows = labels.double()
        std = rows.std(dim=0, correction=0)
        std = torch.where(std > 0, std, 1.0)
        return replace(self, mean=tuple(rows.mean(dim=0).tolist()), std=tuple(std.tolist()))

    def counts(self, labels: Tensor, outputs: int) -> Tensor:
        """All samples are of one kind."""
        del outputs
        return torch.tensor([len(labels)])

    def alike(self, labels: Tensor, counts: Tensor) -> Tensor:
        """All samples are of one kind."""
        return counts.expand(len(labels))

    def targets(self, labels: Tensor, outputs: int, *, smoothing: float = 0.0) -> Tensor:
        """Standardise."""
        del outputs, smoothing
        mean, std = self._scale(labels)
        return (labels - mean) / std

    def loss(
        self,
        outputs: Tensor,
        targets: Tensor,
        weights: Tensor | None = None,
        samples: Tensor | None = None,
    ) -> Tensor:
        """Mean squared error, or Huber's loss, in standard deviations of the labels."""
        del weights
        cost = functional.mse_loss if self.loss_kind == "mse" else functional.huber_loss
        return _mean(cost(outputs, targets, reduction="none").mean(1), samples)

    def divergence(self, learned: Tensor, taught: Tensor) -> Tensor:
        """Mean squared difference."""
        return functional.mse_loss(learned, taught)

    def likelihood(
        self, outputs: Tensor, labels: Tensor | None, generator: torch.Generator | None
    ) -> Tensor:
        """Of a normal distribution around the outputs, one standard deviation of labels wide."""
        if labels is None:
            around = outputs.detach()
            target = around + torch.randn(around.shape, generator=generator)
        else:
            target = self.targets(labels, outputs.shape[1])
        return -0.5 * (outputs - target).square().sum()

    def answers(self, outputs: Tensor) -> Tensor:
        """Give values in the unit of the labels."""
        mean, std = self._scale(outputs)
        return outputs * std + mean

    def predicted(self, answers: Tensor) -> Tensor:
        """Take the values."""
        return answers

    def right(self, predicted: Tensor, labels: Tensor) -> Tensor:
        """Whether every target is within the tolerance."""
        return ((predicted - labels).abs() <= self.tolerance).all(dim=1)

    def scores(self, predicted: Tensor, labels: Tensor) -> Tensor:
        """Give minus the mean absolute error over the targets, in units of the tolerance."""
        return -(predicted - labels).abs().mean(dim=1) / self.tolerance

    def of_class(self, labels: Tensor, place: int) -> Tensor:
        """There are no classes."""
        del place
        return torch.zeros(len(labels), dtype=torch.bool)

    def chance(self, labels: Tensor, outputs: int) -> float:
        """Give what the median of the labels gets right."""
        del outputs
        guess = labels.median(dim=0).values.expand_as(labels)
        return float(self.right(guess, labels).float().mean())

    def details(self, predicted: Tensor, labels: Tensor, names: Sequence[str]) -> dict[str, Any]:
        """Give the mean absolute error of each target, in its own unit."""
        errors = (predicted - labels).abs().mean(dim=0).tolist()
        return {"mean_absolute_error": dict(zip(names, errors, strict=True))}

    def served(self, answers: Tensor, names: Sequence[str]) -> dict[str, list[Any]]:
        """Give the values by name."""
        return {"values": _by_name(answers, names)}

    def _scale(self, like: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = self.mean or (0.0,), self.std or (1.0,)
        return like.new_tensor(mean), like.new_tensor(std)


SINGLE_LABEL = SingleLabel()
TASKS: Mapping[str, type[Task]] = {
    task.name: task for task in (SingleLabel, MultiLabel, Regression)
}


def to_json(task: Task) -> dict[str, Any]:
    """Describe a task for `config.json`."""
    return {"name": task.name, **asdict(task)}  # type: ignore[call-overload]  # each is a dataclass


def from_json(stated: Mapping[str, Any] | None) -> Task:
    """Read what `to_json` wrote; without anything, one class of several.

    Raises:
        ValueError: a task that this release does not know, or values outside their range.
    """
    if stated is None:
        return SingleLabel()
    fields = {
        key: tuple(map(float, value)) if isinstance(value, list) else value
        for key, value in stated.items()
        if key != "name"
    }
    if stated.get("name") not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {stated.get('name')!r}")
    return TASKS[stated["name"]](**fields)


def rightly(
    task: Task, answers: NDArray[np.floating], texts: Sequence[str], names: Sequence[str]
) -> NDArray[np.bool_]:
    """Tell which answers agree with labels as people wrote them, (n,).

    A label that the network does not know (a new class) is answered wrongly, whatever it says.

    Args:
        task: of the network.
        answers: (n, outputs), probabilities or values.
        texts: n labels.
        names: the network's.
    """
    labels = task.rows(texts, names)
    predicted = task.predicted(torch.as_tensor(np.asarray(answers)))
    return np.asarray((task.right(predicted, labels) & task.known(labels)).numpy())


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(SEPARATOR) if part.strip()]


def _finite(part: str, text: str) -> float:
    try:
        value = float(np.float32(part))
    except ValueError:
        raise LabelError(f"{part.strip()!r} in {text!r} is not a number") from None
    if not math.isfinite(value):
        raise LabelError(f"{part.strip()!r} in {text!r} is not a finite number")
    return value


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (", …" if len(names) > 10 else "")  # noqa: PLR2004 - a few


def _by_name(answers: Tensor, names: Sequence[str]) -> list[dict[str, float]]:
    return [dict(zip(names, row, strict=True)) for row in answers.tolist()]


def _mean(each: Tensor, samples: Tensor | None) -> Tensor:
    if samples is None:
        return each.mean()
    total = samples.sum()
    return (each * samples).sum() / total if total > 0 else (each * 0).sum()
