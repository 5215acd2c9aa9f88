"""What training minimises: L_task + λ · L_pre."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from sft.modes import evaluating


def class_weights(
    labels: Tensor, classes: int, drawn: Tensor | None = None, *, most: float = 10.0
) -> Tensor:
    """Weight each class by the inverse of its share, so that each counts the same.

    Args:
        labels: int64 (n,), the labels that will be trained on.
        classes: number of outputs of the head.
        drawn: float32 (n,), how often each sample is drawn; None: all as often.
        most: no class weighs more than this many times the average, so that a class with one sample
            does not drown the others.

    Returns:
        float32 (classes,), with mean 1 over the classes that occur; 1 for those that do not.
    """
    counts = torch.bincount(labels, drawn, minlength=classes).float()
    seen = counts > 0
    weights = torch.ones(classes)
    weights[seen] = counts[seen].mean() / counts[seen]
    weights = weights.clamp(max=most)
    weights[seen] /= weights[seen].mean()
    return weights


class Penalty(Protocol):
    """A term of λ · L_pre, added to the loss of a batch."""

    def __call__(
        self, network: nn.Module, pixels: Tensor, logits: Tensor, is_old: Tensor
    ) -> Tensor:
        """Return a scalar.

        Args:
            network: as it is now.
            pixels: what the network was given for this batch, (b, …): pictures, or the cached
                activations that its moving part starts from.
            logits: what it answered, (b, classes), with gradient.
            is_old: bool (b,), which samples are rehearsed.
        """
        ...


class _Held:
    """λ/2 times what it costs that the weights left those of the champion.

    A head that was widened is held only in the rows that the champion had.
    """

    def __init__(self, start: Mapping[str, Tensor], strength: float, setting: str) -> None:
        if strength < 0:
            raise ValueError(f"{setting} must not be negative, got {strength}")
        self.start = {name: value.detach().clone() for name, value in start.items()}
        self.strength = strength

    def __call__(
        self,
        network: nn.Module,
        pixels: Tensor | None = None,
        logits: Tensor | None = None,
        is_old: Tensor | None = None,
    ) -> Tensor:
        """Return the penalty (a scalar) for the trainable weights as they are now."""
        del pixels, logits, is_old
        total = torch.zeros(())
        for name, weight in network.named_parameters():
            if weight.requires_grad and name in self.start:
                before = self.start[name]
                kept = weight if weight.shape == before.shape else weight[: len(before)]
                total = total + self._cost(name, (kept - before).square())
        return 0.5 * self.strength * total

    def _cost(self, name: str, squares: Tensor) -> Tensor:
        del name
        return squares.sum()


class L2SP(_Held):
    """λ/2 · ‖w - w₀‖²: keep the weights near those of the champion (Li et al. 2018, L2-SP)."""

    def __init__(self, start: Mapping[str, Tensor], strength: float) -> None:
        super().__init__(start, strength, "l2_sp")


class EWC(_Held):
    """λ/2 · Σ F (w - w₀)²: hold what the old answers depend on (Kirkpatrick et al. 2017).

    F has a mean of 1 (see `fisher`), so the strength has the scale of L2-SP's: with F = 1
    everywhere, both are the same.
    """

    def __init__(
        self, start: Mapping[str, Tensor], fisher: Mapping[str, Tensor], strength: float
    ) -> None:
        super().__init__({name: start[name] for name in fisher}, strength, "ewc")
        self.fisher = dict(fisher)

    def _cost(self, name: str, squares: Tensor) -> Tensor:
        return (self.fisher[name] * squares).sum()


def likelihood(logits: Tensor, labels: Tensor | None, generator: torch.Generator | None) -> Tensor:
    """Give the log-likelihood of one sample's class, a scalar.

    Args:
        logits: (1, classes), with gradient.
        labels: int64 (1,); None draws a class from the logits.
        generator: of the draw.
    """
    log_odds = logits.log_softmax(1)[0]
    if labels is None:
        return log_odds[torch.multinomial(log_odds.detach().exp(), 1, generator=generator)[0]]
    return log_odds[labels[0]]


def fisher(
    network: nn.Module,
    pixels: Tensor,
    labels: Tensor | None = None,
    *,
    generator: torch.Generator | None = None,
    likelihood: Callable[[Tensor, Tensor | None, torch.Generator | None], Tensor] = likelihood,
) -> dict[str, Tensor]:
    """Estimate the diagonal of the Fisher information on old samples, one backward pass each.

    F = mean over samples of (∂ log p(y|x) / ∂w)², with y drawn from the network's own prediction:
    the true Fisher information (Kunstner et al. 2019 tell why the next one is not it). With labels,
    y is the label: the empirical one, which is near zero where the network is right and sure, and
    large on samples with wrong labels. Then divided by its mean over all trainable parameters, so
    that it says where, and the strength how much. Dropout is off, and batch norm keeps its
    statistics.

    Args:
        network: the champion.
        pixels: what it is given, (n, …); 200 samples are many.
        labels: (n, …), for the empirical Fisher information.
        generator: of the drawn labels.
        likelihood: the log-likelihood of one sample, of its label or of one that it draws.

    Returns:
        For each parameter that requires a gradient, a tensor of its shape.

    Raises:
        ValueError: no samples, or gradients of zero or not finite.
    """
    if not len(pixels):
        raise ValueError(
            "ewc needs old samples to estimate the Fisher information on: there is none"
        )
    moving = {name: w for name, w in network.named_parameters() if w.requires_grad}
    total = {name: torch.zeros_like(weight) for name, weight in moving.items()}
    with evaluating(network):
        for place in range(len(pixels)):
            one = slice(place, place + 1)
            label = None if labels is None else labels[one]
            log_likelihood = likelihood(network(pixels[one]), label, generator)
            gradients = torch.autograd.grad(
                log_likelihood, list(moving.values()), allow_unused=True
            )
            for name, gradient in zip(moving, gradients, strict=True):
                if gradient is not None:
                    total[name] += gradient.square()
    count = sum(value.numel() for value in total.values())
    mean = float(sum(value.sum(dtype=torch.float64) for value in total.values())) / max(1, count)
    if not 0 < mean < float("inf"):
        raise ValueError(
            f"the Fisher information is {mean} on average: the network answers with certainty or"
            " with numbers that are not finite; take L2-SP instead of EWC"
        )
    return {name: value / mean for name, value in total.items()}


class Teacher:
    """The champion's logits for a batch; several penalties share one forward pass.

    Args:
        answer: gives logits (b, old classes) for what the network is given. The champion, or its
            moving part where the network is trained from cached activations.
    """

    def __init__(self, answer: Callable[[Tensor], Tensor]) -> None:
        self.answer = copy.deepcopy(answer).eval() if isinstance(answer, nn.Module) else answer
        self._last: tuple[Tensor, Tensor] | None = None

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return logits (b, old classes), without gradient."""
        if self._last is None or self._last[0] is not pixels:
            with torch.no_grad():
                self._last = (pixels, self.answer(pixels))
        return self._last[1]


def divergence(learned: Tensor, taught: Tensor) -> Tensor:
    """KL(taught ‖ learned) of the softmaxes of logits (n, classes), the mean over samples."""
    before, now = taught.log_softmax(1), learned.log_softmax(1)
    return functional.kl_div(now, before, reduction="batchmean", log_target=True)


class Distillation:
    """λ·T²·KL(champion ‖ network) at temperature T (Li and Hoiem 2016, LwF; Hinton et al. 2015).

    Over all samples of the batch, fresh ones too: that is where it needs no old data. Only the
    champion's classes are compared, as they stand first in a widened head. A champion that is wrong
    about the fresh world teaches its mistakes there; `only_old` restricts it to rehearsed samples.
    Other tasks than one class of several have another `divergence` of outputs.
    """

    def __init__(
        self,
        teacher: Teacher,
        strength: float,
        *,
        temperature: float = 2.0,
        only_old: bool = False,
        divergence: Callable[[Tensor, Tensor], Tensor] = divergence,
    ) -> None:
        if strength < 0:
            raise ValueError(f"distillation must not be negative, got {strength}")
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        self.teacher = teacher
        self.strength = strength
        self.temperature = temperature
        self.only_old = only_old
        self.divergence = divergence

    def __call__(
        self, network: nn.Module, pixels: Tensor, logits: Tensor, is_old: Tensor
    ) -> Tensor:
        """Return the mean divergence over the samples; 0 when there is none."""
        del network
        taught = self.teacher(pixels)
        learned = logits[:, : taught.shape[1]]
        if self.only_old:
            taught, learned = taught[is_old], learned[is_old]
        if not len(taught):
            return logits.new_zeros(())
        divergence = self.divergence(learned / self.temperature, taught / self.temperature)
        return self.strength * self.temperature**2 * divergence


class DarkExperience:
    """λ · mean (z - z₀)² on rehearsed samples (Buzzega et al. 2020, DER).

    z₀ are the champion's logits on the same pictures as augmented, over its classes. With the
    labels that rehearsal brings anyway, this is DER++.
    """

    def __init__(self, teacher: Teacher, strength: float) -> None:
        if strength < 0:
            raise ValueError(f"dark_experience must not be negative, got {strength}")
        self.teacher = teacher
        self.strength = strength

    def __call__(
        self, network: nn.Module, pixels: Tensor, logits: Tensor, is_old: Tensor
    ) -> Tensor:
        """Return the mean squared difference; 0 when no sample is rehearsed."""
        del network
        if not is_old.any():
            return logits.new_zeros(())
        taught = self.teacher(pixels)[is_old]
        learned = logits[is_old, : taught.shape[1]]
        return self.strength * functional.mse_loss(learned, taught)


def soft_targets(labels: Tensor, classes: int, *, smoothing: float = 0.0) -> Tensor:
    """Turn labels int64 (n,) into shares (n, classes) of one, smoothed (Szegedy et al. 2016).

    A share `smoothing` is spread over all classes, the right one included.
    """
    if not 0 <= smoothing < 1:
        raise ValueError(f"label_smoothing must be at least 0 and below 1, got {smoothing}")
    hard = functional.one_hot(labels, classes).float()
    return hard * (1 - smoothing) + smoothing / classes


def soft_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
    samples: Tensor | None = None,
) -> Tensor:
    """Cross-entropy towards shares of classes, as label smoothing and mixup make them.

    With targets of 0 and 1 it is `functional.cross_entropy(logits, labels, weights)`: the weighted
    mean, divided by the sum of the weights. (PyTorch's own, given shares, divides by n instead.)

    Args:
        logits: (n, classes).
        targets: (n, classes), each row sums to 1.
        weights: (classes,), how much each class counts.
        samples: (n,), how much each sample counts, such as one whose label is in doubt.
    """
    shares = targets if weights is None else targets * weights
    if samples is not None:
        shares = shares * samples.unsqueeze(1)
    total = shares.sum()
    if not total > 0:
        return (logits * 0).sum()
    return -(shares * logits.log_softmax(1)).sum() / total
