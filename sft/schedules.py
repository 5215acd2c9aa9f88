"""Optimisers, and how their rate changes over the steps."""

from __future__ import annotations

import math
from enum import StrEnum
from typing import Any, Protocol

import torch
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

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


class RateSettings(Protocol):
    """The part of the training settings that this module reads."""

    @property
    def optimiser(self) -> Optimiser:
        """Which one."""
        ...

    @property
    def momentum(self) -> float:
        """Of SGD."""
        ...

    @property
    def weight_decay(self) -> float:
        """Pull towards zero."""
        ...

    @property
    def schedule(self) -> Schedule:
        """Which one."""
        ...

    @property
    def step_epochs(self) -> int:
        """Epochs between two steps of `step`."""
        ...

    @property
    def step_factor(self) -> float:
        """What each of them multiplies the rate by."""
        ...

    @property
    def warmup(self) -> float:
        """Share of the steps in which the rate rises to its full height."""
        ...


def make_optimiser(groups: list[dict[str, Any]], settings: RateSettings) -> Optimizer:
    """Make the optimiser for groups that carry a rate each (`lr`)."""
    if settings.optimiser is Optimiser.SGD:
        return SGD(groups, momentum=settings.momentum, weight_decay=settings.weight_decay)
    kind = AdamW if settings.optimiser is Optimiser.ADAMW else Adam
    return kind(groups, weight_decay=settings.weight_decay)


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

    with torch.no_grad():
        return LambdaLR(optimiser, factor)


def _one_cycle(done: float) -> float:
    low, lowest = 1 / START_OF_CYCLE, 1 / START_OF_CYCLE / END_OF_CYCLE
    if done < CYCLE_UP:
        return low + (1 - low) * (1 - math.cos(math.pi * done / CYCLE_UP)) / 2
    down = (done - CYCLE_UP) / (1 - CYCLE_UP)
    return lowest + (1 - lowest) * (1 + math.cos(math.pi * down)) / 2
