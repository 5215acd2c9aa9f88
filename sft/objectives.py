"""What training minimises: L_task + λ · L_pre."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def class_weights(labels: Tensor, classes: int, *, most: float = 10.0) -> Tensor:
    """Weight each class by the inverse of its share, so that each counts the same.

    Args:
        labels: int64 (n,), the labels that will be trained on.
        classes: number of outputs of the head.
        most: no class weighs more than this many times the average, so that a class with one sample
            does not drown the others.

    Returns:
        float32 (classes,), with mean 1 over the classes that occur; 1 for those that do not.
    """
    counts = torch.bincount(labels, minlength=classes).float()
    seen = counts > 0
    weights = torch.ones(classes)
    weights[seen] = counts[seen].mean() / counts[seen]
    weights = weights.clamp(max=most)
    weights[seen] /= weights[seen].mean()
    return weights


class L2SP:
    """λ/2 · ‖w - w₀‖²: keep the weights near those of the champion (Li et al. 2018, L2-SP).

    A head that was widened is held only in the rows that the champion had.
    """

    def __init__(self, start: Mapping[str, Tensor], strength: float) -> None:
        if strength < 0:
            raise ValueError(f"l2_sp must not be negative, got {strength}")
        self.start = {name: value.detach().clone() for name, value in start.items()}
        self.strength = strength

    def __call__(self, network: nn.Module) -> Tensor:
        """Return the penalty (a scalar) for the trainable weights as they are now."""
        total = torch.zeros(())
        for name, weight in network.named_parameters():
            if weight.requires_grad and name in self.start:
                before = self.start[name]
                kept = weight if weight.shape == before.shape else weight[: len(before)]
                total = total + (kept - before).square().sum()
        return 0.5 * self.strength * total
