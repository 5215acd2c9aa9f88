"""What may move: the stages of a network, and the phases of a fine-tuning that set them free."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from sft.batchnorm import DomainNorm
from sft.models import Network
from sft.modes import evaluating
from sft.ranges import at_least_one, not_negative

LEAST_BLOCKS = 3
"""A trunk with fewer children of several layers is opened: SqueezeNet's is one `features`."""
STALE = 0.05
"""Share of the old statistics that may be left in a batch norm after the last step."""
USUAL_MOMENTUM = 0.1
"""PyTorch's own; with it instead of a shipped .01, EfficientNet-Lite0 went from 57 to 77 on PACS
sketches."""


class Strategy(StrEnum):
    """Which parameters a fine-tuning may move."""

    FULL = "full"
    HEAD = "head"
    TWO_STAGE = "two_stage"
    BATCH_NORM = "batch_norm"
    SURGICAL = "surgical"


@dataclass(frozen=True)
class StrategySettings:
    """What may move, and how fast.

    Attributes:
        strategy: `full`: everything; `head`: the last layer on a frozen backbone; `two_stage`: the
            head, then everything at a smaller rate; `batch_norm`: scales and shifts of the
            batch-norm layers; `surgical`: the first block (Lee et al. 2023, for shifts of the
            input such as a sensor's).
        freeze_first: with `full` or `two_stage`: this many stages from the input stay.
        train_last: with `full` or `two_stage`: only this many stages before the head move, and
            the head. 0 sets no limit.
        surgical_first: stages from the input that `surgical` moves; the first is often the stem
            alone.
        head_share: of the epochs, in `two_stage`, that the head gets for itself.
        second_rate: of the learning rate, for the second phase of `two_stage`.
        backbone_rate: of the learning rate, for all but the head.
    """

    strategy: Strategy = Strategy.FULL
    freeze_first: int = 0
    train_last: int = 0
    surgical_first: int = 2
    head_share: float = 0.3
    second_rate: float = 0.1
    backbone_rate: float = 1.0

    def __post_init__(self) -> None:
        """Refuse values outside their range, by name."""
        if self.strategy not in list(Strategy):
            raise ValueError(
                f"strategy must be one of {', '.join(Strategy)}, got {self.strategy!r}"
            )
        not_negative(self, "freeze_first", "train_last")
        at_least_one(self, "surgical_first")
        if not 0 < self.head_share < 1:
            raise ValueError(f"head_share must lie between 0 and 1, got {self.head_share}")
        for name in ("second_rate", "backbone_rate"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(
                    f"{name} must be above 0 and at most 1, got {getattr(self, name)}:"
                    " it is a share of learning_rate"
                )
        if self.freeze_first and self.train_last:
            raise ValueError("freeze_first and train_last say the same in two ways: set one")
        limited = self.freeze_first or self.train_last
        if limited and self.strategy not in {Strategy.FULL, Strategy.TWO_STAGE}:
            raise ValueError(
                f"freeze_first and train_last limit the strategies full and two_stage,"
                f" not {self.strategy}"
            )


@dataclass(frozen=True)
class Stage:
    """Neighbouring layers of a network that are frozen together.

    Attributes:
        name: of the layer that opens it, as `layer1` or `features.3`.
        modules: names of its modules within the network, from the input on.
        parameters: names of its parameters within the network.
    """

    name: str
    modules: tuple[str, ...]
    parameters: frozenset[str]


@dataclass(frozen=True)
class Phase:
    """A part of a fine-tuning in which the same parameters move.

    Attributes:
        name: for progress and logs.
        trainable: names of the parameters that move.
        rate: of the learning rate.
        share: of the epochs.
    """

    name: str
    trainable: frozenset[str]
    rate: float = 1.0
    share: float = 1.0


def stages(network: Network) -> tuple[Stage, ...]:
    """Cut a network into stages, from the input to the head, which is the last one alone.

    A stage opens with a child of the body that holds a weight matrix; normalisation joins the stage
    before it, dropout the one after it. Containers are opened until the head stands alone and at
    least `LEAST_BLOCKS` blocks lie before it, where there are as many; residual blocks are never
    cut. Parameters that lie on an opened container itself (a class token, position embeddings)
    belong to the first stage. The order is that in which the modules were registered, in every
    torchvision classifier that in which they run; but for the head, and for a norm after it, which
    counts as one before it unless a Sequential has both.
    """
    units, head = _units(network), _head_name(network)
    owners: list[list[str]] = []
    opened: list[str] = []
    waiting: list[str] = []
    for unit in units:
        module = network.get_submodule(unit)
        if isinstance(module, _DropoutNd):
            waiting.append(unit)
        elif _holds_matrix(module) or not owners:
            owners.append([*waiting, unit])
            opened.append(unit)
            waiting = []
        elif opened[-1] != head or not _may_run_before(network, unit, head):
            owners[-1] += [*waiting, unit]
            waiting = []
        elif len(owners) > 1:
            owners[-2] += [*waiting, unit]
            waiting = []
        else:
            waiting.append(unit)
    owners[-1] += waiting
    place = opened.index(head)
    owners.append(owners.pop(place))  # a network of the user's may register others after its head
    opened.append(opened.pop(place))
    merged = _merge_bare_start(network, owners, opened)
    names = [name for name, _ in network.named_parameters()]
    found = [frozenset(n for n in names if _within(n, modules)) for modules, _ in merged]
    loose = frozenset(names).difference(*found)
    found[0] |= loose
    return tuple(
        Stage(name.removeprefix("body."), tuple(modules), parameters)
        for (modules, name), parameters in zip(merged, found, strict=True)
    )


def phases(
    network: Network, settings: StrategySettings, *, new_head: bool = False
) -> tuple[Phase, ...]:
    """Say what moves, in the order of training.

    Args:
        network: what will be tuned; a parameter that does not require a gradient never moves.
        settings: how.
        new_head: the head was replaced or has new classes, so it moves in every strategy.

    Raises:
        ValueError: the network has no such stages or layers, or nothing would move.
    """
    free = frozenset(name for name, value in network.named_parameters() if value.requires_grad)
    *trunk, head = stages(network)
    always = head.parameters if new_head else frozenset[str]()
    strategy = settings.strategy
    if strategy == Strategy.HEAD:
        plan = [Phase("head", head.parameters)]
    elif strategy == Strategy.BATCH_NORM:
        plan = [Phase("batch norm", _batch_norm_parameters(network) | always)]
    elif strategy == Strategy.SURGICAL:
        first = trunk[: settings.surgical_first]
        plan = [Phase("first block", _parameters(first) | always)]
    else:
        everything = Phase("everything", _within_limits(trunk, head, settings))
        plan = [everything]
        if strategy == Strategy.TWO_STAGE:
            share = settings.head_share
            plan = [
                Phase("head", head.parameters, share=share),
                Phase("everything", everything.trainable, settings.second_rate, 1 - share),
            ]
    plan = [Phase(p.name, p.trainable & free, p.rate, p.share) for p in plan]
    for phase in plan:
        if not phase.trainable:
            raise ValueError(
                f"strategy {strategy} would move nothing: {_why_nothing(strategy, network)}"
            )
    return tuple(plan)


def epochs_of(plan: Sequence[Phase], epochs: int) -> tuple[int, ...]:
    """Share the epochs out among the phases, at least one each.

    Raises:
        ValueError: fewer epochs than phases.
    """
    if epochs < len(plan):
        raise ValueError(
            f"{len(plan)} phases ({', '.join(p.name for p in plan)}) need an epoch each, but epochs"
            f" is {epochs}"
        )
    left, counts = epochs, []
    for place, phase in enumerate(plan[:-1]):
        later = len(plan) - place - 1
        counts.append(min(max(1, round(phase.share * epochs)), left - later))
        left -= counts[-1]
    return (*counts, left)


def apply(network: Network, phase: Phase) -> None:
    """Let the phase's parameters require a gradient, and no others."""
    for name, value in network.named_parameters():
        value.requires_grad_(name in phase.trainable)


def parameter_groups(
    network: Network, phase: Phase, *, learning_rate: float, backbone_rate: float = 1.0
) -> list[dict[str, Any]]:
    """Group what moves for an optimiser: the head, and all else at a smaller rate."""
    rate = learning_rate * phase.rate
    inside = {id(value) for value in network.head.parameters()}
    moving = [value for name, value in network.named_parameters() if name in phase.trainable]
    groups = [
        {"params": [v for v in moving if id(v) in inside], "lr": rate},
        {"params": [v for v in moving if id(v) not in inside], "lr": rate * backbone_rate},
    ]
    return [group for group in groups if group["params"]]


def training_mode(network: Network, phase: Phase, *, freeze_batch_norm: bool = True) -> None:
    """Put into training mode what moves, and leave the rest as it answers.

    A stage of which nothing moves stays in evaluation mode: its dropout is off, so that its outputs
    can be cached. A batch norm whose own parameters do not move keeps its statistics too, and with
    `freeze_batch_norm` every one does.
    """
    network.train()
    for stage in stages(network):
        if not stage.parameters & phase.trainable:
            for name in stage.modules:
                network.get_submodule(name).eval()
    for name, module in network.named_modules():
        if isinstance(module, _BatchNorm):
            own = {f"{name}.{key}" for key, _ in module.named_parameters()}
            if freeze_batch_norm or (own and not own & phase.trainable):
                module.eval()


def boundary(network: Network, phase: Phase) -> str | None:
    """Name the module whose input is the last thing that the frozen part computes.

    Everything before it is frozen and, in `training_mode`, the same in every epoch, so that its
    input can be cached. It is the input, not the output of the last frozen layer, because an
    activation or a pooling in between would make the cache larger. None when the first stage moves.
    """
    for place, stage in enumerate(stages(network)):
        if stage.parameters & phase.trainable:
            return stage.modules[0] if place else None
    return None


def activations(network: Network, at: str, pixels: Tensor) -> Tensor:
    """Run the frozen part: uint8 pictures (n, C, H, W) to what the module `at` is given (n, …).

    Raises:
        ValueError: the module does not run exactly once in a pass, so that there is no such cut.
    """
    seen: list[Tensor] = []
    module = network.get_submodule(at)
    hook = module.register_forward_pre_hook(lambda _, given: seen.append(given[0].clone()))
    try:
        with evaluating(network), torch.no_grad():
            network(pixels)
    finally:
        hook.remove()
    if len(seen) != 1:
        raise ValueError(f"{at} runs {len(seen)} times in a pass: activations cannot be cached")
    return seen[0]


def check_momentum(network: nn.Module, steps: int) -> list[str]:
    """Name the batch norms in training mode that cannot follow new pictures within these steps.

    Each step keeps the share 1 - momentum of the statistics, so (1 - momentum)^steps of the old
    ones is left at the end; more than `STALE` is too much. Torchvision ships .01 in MobileNetV3 and
    .0003 in MNASNet. Call it after `training_mode`: what is frozen has nothing to follow.
    """
    return [name for name, layer in _following(network) if _left(layer, steps) > STALE]


def correct_momentum(network: nn.Module, steps: int) -> str:
    """Give these layers the usual momentum, or as much as the steps need.

    Returns:
        Words for the log; empty when there was nothing to correct.
    """
    slow = check_momentum(network, steps)
    layers = dict(_following(network))
    if not slow:
        return ""
    left = max(_left(layers[name], steps) for name in slow)
    shipped = sorted({str(layers[name].momentum) for name in slow})
    momentum = max(USUAL_MOMENTUM, 1 - STALE ** (1 / steps))
    for name in slow:
        layers[name].momentum = momentum
    return (
        f"{len(slow)} batch-norm layers had a momentum of {', '.join(shipped)}, which after"
        f" {steps} steps would leave {left:.0%} of the old statistics: set to {momentum:.2g}"
    )


def _units(network: Network) -> list[str]:
    """Open the body until the head stands alone and enough blocks lie before it."""
    modules = dict(network.named_modules())
    head = _head_name(network)
    units = ["body"]
    while (holder := next((u for u in units if head.startswith(f"{u}.")), None)) is not None:
        units = _opened(modules, units, holder)
    while True:
        before = [unit for unit in units if unit != head]
        closed = [unit for unit in before if _is_trunk(modules[unit])]
        lists = [unit for unit in closed if isinstance(modules[unit], nn.ModuleList)]  # never run
        blocks = sum(_layers(modules[unit]) > 1 for unit in before)
        if not lists and (blocks >= LEAST_BLOCKS or not closed):
            return units
        closed = lists or closed
        units = _opened(modules, units, max(closed, key=lambda unit: _layers(modules[unit])))


def _head_name(network: Network) -> str:
    last = network.head
    found: str = next(name for name, module in network.named_modules() if module is last)
    return found


def _may_run_before(network: Network, unit: str, head: str) -> bool:
    """Whether a norm registered after the head is none of it: not where one Sequential has both."""
    holder = head.rpartition(".")[0]
    together = unit.startswith(f"{holder}.")
    in_order = together and isinstance(network.get_submodule(holder), nn.Sequential)
    norm = any(True for _ in network.get_submodule(unit).parameters())
    return norm and not in_order


def _opened(modules: dict[str, nn.Module], units: list[str], holder: str) -> list[str]:
    inner = [f"{holder}.{name}" for name, _ in modules[holder].named_children()]
    place = units.index(holder)
    return [*units[:place], *inner, *units[place + 1 :]]


def _is_trunk(module: nn.Module) -> bool:
    """Whether a module is a row of layers, or little more than one: a ViT's encoder."""
    if isinstance(module, nn.Sequential | nn.ModuleList):
        return _layers(module) > 0
    rows = [m for m in module.children() if isinstance(m, nn.Sequential | nn.ModuleList)]
    return any(2 * _layers(row) > _layers(module) for row in rows)


def _layers(module: nn.Module) -> int:
    """Count the modules that hold parameters of their own."""
    return sum(any(True for _ in m.parameters(recurse=False)) for m in module.modules())


def _holds_matrix(module: nn.Module) -> bool:
    return any(value.ndim > 1 for value in module.parameters())


def _merge_bare_start(
    network: Network, owners: list[list[str]], opened: list[str]
) -> list[tuple[list[str], str]]:
    """Join what comes before the first weights (a Flatten, a norm of the input) to their stage."""
    pairs = list(zip(owners, opened, strict=True))
    if len(pairs) > 1 and not _holds_matrix(network.get_submodule(pairs[0][1])):
        (first, _), (second, name), *rest = pairs
        return [([*first, *second], name), *rest]
    return pairs


def _within(parameter: str, modules: Sequence[str]) -> bool:
    return any(parameter.startswith(f"{name}.") for name in modules)


def _parameters(chosen: Sequence[Stage]) -> frozenset[str]:
    return frozenset(itertools.chain.from_iterable(stage.parameters for stage in chosen))


def _within_limits(
    trunk: Sequence[Stage], head: Stage, settings: StrategySettings
) -> frozenset[str]:
    for name in ("freeze_first", "train_last"):
        if getattr(settings, name) > len(trunk):
            raise ValueError(
                f"{name} = {getattr(settings, name)}, but the network has {len(trunk)} stages"
                f" before its head: {', '.join(stage.name for stage in trunk)}"
            )
    first = settings.freeze_first or (
        len(trunk) - settings.train_last if settings.train_last else 0
    )
    return _parameters([*trunk[first:], head])


def _batch_norm_parameters(network: nn.Module) -> frozenset[str]:
    return frozenset(
        f"{name}.{key}"
        for name, module in network.named_modules()
        if isinstance(module, _BatchNorm | DomainNorm)
        for key, _ in module.named_parameters()
    )


def _why_nothing(strategy: Strategy, network: Network) -> str:
    if strategy == Strategy.BATCH_NORM and not _batch_norm_parameters(network):
        return f"{network.config.architecture} has no batch-norm layer; take another strategy"
    return "none of the parameters that it asks for requires a gradient"


def _following(network: nn.Module) -> list[tuple[str, _BatchNorm]]:
    return [
        (name, module)
        for name, module in network.named_modules()
        if isinstance(module, _BatchNorm) and module.training and module.track_running_stats
    ]


def _left(layer: _BatchNorm, steps: int) -> float:
    """Tell the share of the old statistics that is left after some steps."""
    if layer.momentum is not None:
        return float((1 - layer.momentum) ** steps)
    # without a momentum, the mean over all steps ever made
    before = int(layer.num_batches_tracked) if layer.num_batches_tracked is not None else 0
    return before / (before + steps)
