"""Optimisers, and how their rate changes over the steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from sft.ranges import at_least_one, below_one, not_negative, positive

START_OF_CYCLE = 25.0
END_OF_CYCLE = 1e4
"""One-cycle starts at 1/25 of the rate and ends at 1/10,000 of its start (Smith and Topin 2018)."""
CYCLE_UP = 0.3


class Optimiser(StrEnum):
    """What makes a step of a gradient."""

    ADAMW = "adamw"
    ADAM = "adam"
    SGD = "sgd"


class Schedule(StrEnum):
    """How the rate changes."""

    COSINE = "cosine"
    STEP = "step"
    ONE_CYCLE = "one_cycle"
    CONSTANT = "constant"


@dataclass(frozen=True)
class RateSettings:
    """How large the steps are.

    Attributes:
        optimiser: which one.
        learning_rate: at its full height.
        momentum: of SGD.
        weight_decay: pull towards zero.
        schedule: how the rate changes; see `make_schedule`.
        step_epochs: epochs between two falls of `step`.
        step_factor: what each of them multiplies the rate by.
        warmup: share of the steps in which the rate rises to its full height.
    """

    optimiser: Optimiser = Optimiser.ADAMW
    learning_rate: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 1e-4
    schedule: Schedule = Schedule.COSINE
    step_epochs: int = 10
    step_factor: float = 0.1
    warmup: float = 0.0

    def __post_init__(self) -> None:
        """Refuse values outside their range, by name."""
        at_least_one(self, "step_epochs")
        positive(self, "learning_rate", "step_factor")
        not_negative(self, "weight_decay")
        below_one(self, "momentum", "warmup")


def make_optimiser(groups: list[dict[str, Any]], settings: RateSettings) -> Optimizer:
    """Make the optimiser for groups that carry a rate each (`lr`)."""
    decay = settings.weight_decay
    if settings.optimiser is Optimiser.SGD:
        return SGD(groups, momentum=settings.momentum, weight_decay=decay, fused=True)
    kind = AdamW if settings.optimiser is Optimiser.ADAMW else Adam
    return kind(groups, weight_decay=decay, fused=True)


def make_schedule(
    optimiser: Optimizer, settings: RateSettings, per_epoch: int, epochs: int
) -> LRScheduler:
    """Make the schedule; it is stepped after each batch.

    `cosine` falls to zero; `step` falls by `step_factor` every `step_epochs`; `one_cycle` rises
    over the first three tenths of the steps and falls; each after a linear rise over `warmup`.

    Args:
        optimiser: whose rates it scales.
        settings: which one.
        per_epoch: steps in an epoch.
        epochs: how many.
    """
    steps = max(1, per_epoch * epochs)
    rising = round(settings.warmup * steps)

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / (rising + 1)
        done = min(1.0, (step - rising) / max(1, steps - rising))
        match settings.schedule:
            case Schedule.COSINE:
                return (1 + math.cos(math.pi * done)) / 2
            case Schedule.STEP:
                return settings.step_factor ** (step // (settings.step_epochs * per_epoch))
            case Schedule.ONE_CYCLE:
                return _one_cycle(done)
            case Schedule.CONSTANT:
                return 1.0

    return LambdaLR(optimiser, factor)


def _one_cycle(done: float) -> float:
    low, lowest = 1 / START_OF_CYCLE, 1 / START_OF_CYCLE / END_OF_CYCLE
    if done < CYCLE_UP:
        return low + (1 - low) * (1 - math.cos(math.pi * done / CYCLE_UP)) / 2
    down = (done - CYCLE_UP) / (1 - CYCLE_UP)
    return lowest + (1 - lowest) * (1 + math.cos(math.pi * down)) / 2
