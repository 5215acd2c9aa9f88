"""Every way of following a new domain that is compared: settings, and what is made with them.

Most are the default with one thing changed, so that a row says what that thing does. The first few
are what others do.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import realdata
from sft_worlds import MEMORY, VALIDATING, Arrival, World, remember
from torch.nn.modules.batchnorm import _BatchNorm

from flows.settings import load_settings
from sft import after
from sft.augment import Augmentation
from sft.averaging import After, ensemble, greedy_soup, uniform_soup
from sft.batchnorm import DomainNorm, add_domain, open_bank, reestimate
from sft.cache import ActivationCache
from sft.dataset import LabelledPictures, join
from sft.evaluate import answer, mean_loss
from sft.models import Network
from sft.schedules import Optimiser, Schedule
from sft.speed import ComputeSettings
from sft.strategies import Strategy
from sft.train import TrainingSettings, fine_tune

DEFAULT = TrainingSettings()
OLD = round(MEMORY * (1 - VALIDATING))
SOUP = 3
"""Networks of a soup or an ensemble, each of its own seed."""
HEAD_EPOCHS = 10
FINDINGS = str(realdata.CACHE / "findings")
COMPUTE = ComputeSettings(findings=FINDINGS)
RECIPE = load_settings(
    Path(__file__).parents[2] / "deployments" / "recipes" / "photographs.toml",
    {"SUSTAIN_MODEL_NAME": "photographs"},
)
"""What is ours for photographs."""


@dataclass(eq=False)
class Turn:
    """One domain that has arrived, and what there is to follow it with."""

    world: World
    champion: Network
    arrivals: tuple[Arrival, ...]
    memory: LabelledPictures
    memory_validation: LabelledPictures
    settings: TrainingSettings
    compute: ComputeSettings
    cache: ActivationCache
    steps: int = 0
    began: float = field(default_factory=time.process_time)

    @property
    def arrival(self) -> Arrival:
        """The newest."""
        return self.arrivals[-1]

    @property
    def validation(self) -> tuple[LabelledPictures, ...]:
        """What early stopping looks at."""
        return self.arrival.validation, self.memory_validation

    def tune(self, start: Network | None = None, **changes: Any) -> Network:
        """Fine-tune the champion, or another start, as the settings say."""
        settings = replace(self.settings, **changes)
        tuned = after.tune(
            start or self.champion,
            self.arrival.fresh,
            settings,
            memory=self.memory,
            validation=self.validation,
            cache=self.cache,
            compute=self.compute,
        )
        fresh = max(1, settings.batch_size - round(settings.batch_size * settings.rehearsal))
        self.steps += len(tuned.epochs) * math.ceil(len(self.arrival.fresh) / fresh)
        return tuned.network


Maker = Callable[[Turn], Network]


@dataclass(frozen=True)
class Method:
    """How a new domain is followed; `needs_norms`: only a network with batch norm can."""

    make: Maker
    settings: TrainingSettings = DEFAULT
    needs_norms: bool = False
    compute: ComputeSettings = COMPUTE


@dataclass(frozen=True)
class Outcome:
    """What became of a stream.

    Attributes:
        domains: the first one, then those that arrived.
        accuracies: (stages, domains), in percent, after each stage; NaN where no figure needs it.
        before: of the champion, on each domain.
        seconds: CPU time of each stage.
        steps: of the optimiser, of each stage.
    """

    domains: tuple[str, ...]
    before: tuple[float, ...]
    accuracies: tuple[tuple[float, ...], ...]
    seconds: tuple[float, ...]
    steps: tuple[int, ...]

    @property
    def mean(self) -> float:
        """Accuracy at the end, over the domains."""
        return sum(self.accuracies[-1]) / len(self.domains)

    @property
    def new(self) -> float:
        """Accuracy at the end, on the newest domain."""
        return self.accuracies[-1][-1]

    @property
    def old(self) -> float:
        """Accuracy at the end, over all the others."""
        return sum(self.accuracies[-1][:-1]) / (len(self.domains) - 1)

    @property
    def forgetting(self) -> float:
        """What was lost of each domain since it was learned, over all but the newest."""
        learned = [self.before[0], *(row[i + 1] for i, row in enumerate(self.accuracies))]
        lost = [a - b for a, b in zip(learned[:-1], self.accuracies[-1][:-1], strict=True)]
        return sum(lost) / len(lost)


def follow(world: World, method: Method, seed: int) -> Outcome:
    """Go through a stream with a method; the memory grows by what was learned."""
    network, memory, validation = world.champion, world.memory, world.memory_validation
    accuracies, seconds, steps = [], [], []
    _probe(world, method)
    for place, arrival in enumerate(world.arrivals):
        turn = Turn(
            world,
            network,
            world.arrivals[: place + 1],
            memory,
            validation,
            replace(method.settings, seed=seed),
            method.compute,
            ActivationCache(compute=method.compute),
        )
        network = method.make(turn)
        seconds.append(time.process_time() - turn.began)
        steps.append(turn.steps)
        accuracies.append(after_stage(network, world, place))
        memory = remember(memory, arrival.fresh, OLD, seed)
        validation = remember(validation, arrival.validation, MEMORY - OLD, seed)
    return Outcome(
        tuple(world.tests),
        before(world),
        tuple(accuracies),
        tuple(seconds),
        tuple(steps),
    )


def _probe(world: World, method: Method) -> None:
    """Let the machine be probed, which happens once on each, before anything is measured."""
    settings = replace(method.settings, epochs=2, ewc=0.0)  # which needs a memory
    some = world.arrivals[0].fresh.take(range(8))
    if len(some.labels.unique()) > 1:
        after.tune(
            world.champion,
            some,
            settings,
            cache=ActivationCache(compute=method.compute),
            compute=method.compute,
        )


_BEFORE: dict[str, tuple[float, ...]] = {}


def before(world: World) -> tuple[float, ...]:
    """Give the champion's accuracy on each domain; it is the same for all seeds and labels."""
    if world.name not in _BEFORE:
        _BEFORE[world.name] = after_stage(world.champion, world, len(world.arrivals) - 1)
    return _BEFORE[world.name]


def after_stage(network: Network, world: World, place: int) -> tuple[float, ...]:
    """Give the accuracy on each domain, in percent; before the last stage, on the newest alone."""
    if network is world.champion and world.name in _BEFORE:
        return before(world)
    last = place == len(world.arrivals) - 1
    return tuple(
        100 * answer(network, data, batch_size=16).accuracy
        if last or name == world.arrivals[place].domain
        else math.nan
        for name, data in world.tests.items()
    )


def has_norms(network: Network) -> bool:
    """Whether there is a batch norm in it."""
    return any(isinstance(module, _BatchNorm) for module in network.modules())


# --- what is made


def _unchanged(turn: Turn) -> Network:
    return turn.champion


def _tuned(turn: Turn) -> Network:
    return turn.tune()


def _tutorial(turn: Turn) -> Network:
    """Fine-tune on what is new, for a fixed number of epochs; nothing validates."""
    tuned = fine_tune(turn.champion, turn.arrival.fresh, turn.settings, compute=turn.compute)
    turn.steps = len(tuned.epochs) * math.ceil(len(turn.arrival.fresh) / turn.settings.batch_size)
    return tuned.network


def _scratch(turn: Turn) -> Network:
    world = turn.world
    return fine_tune(
        world.untrained,
        join([world.learned, *(one.fresh for one in turn.arrivals)]),
        replace(world.scratch, seed=turn.settings.seed),
        validation=(world.validated, *(one.validation for one in turn.arrivals)),
        compute=turn.compute,
    ).network


def _head_again(turn: Turn) -> Network:
    """Tune the head when a check has embedded all pictures already: that pass does not count."""
    turn.tune(epochs=1)
    turn.steps, turn.began = 0, time.process_time()
    return turn.tune()


def _several(turn: Turn) -> list[Network]:
    first = turn.settings.seed * SOUP
    return [turn.tune(seed=seed) for seed in range(first, first + SOUP)]


def _greedy(turn: Turn) -> Network:
    return greedy_soup(_several(turn), lambda one: -mean_loss(one, turn.validation)[0]).network


def _reestimated(turn: Turn) -> Network:
    return reestimate(turn.champion, turn.arrival.fresh.pixels)


def _bank(turn: Turn) -> Network:
    """Add the statistics of the new domain to a bank; no label is looked at."""
    bank = turn.champion
    if not any(isinstance(module, DomainNorm) for module in bank.modules()):
        bank = open_bank(bank, turn.memory.pixels)
    return add_domain(bank, turn.arrival.fresh.pixels)


PLAIN: Mapping[str, Any] = {
    "rehearsal": 0.0,
    "l2_sp": 0.0,
    "ewc": 0.0,
    "distillation": 0.0,
    "dark_experience": 0.0,
    "after": After.NOTHING,
    "class_weights": False,
    "freeze_first": 0,
    "train_last": 0,
    "backbone_rate": 1.0,
    "dropout": 0.0,
}
"""Nothing that holds the old, and nothing against overfitting."""
UNCHANGED: Mapping[str, Any] = {
    key: getattr(Augmentation(), key)
    for key in ("shift_pixels", "flip", "crop", "rotate", "brightness", "contrast")
}
TUTORIAL = replace(
    DEFAULT,
    **PLAIN,
    **UNCHANGED,
    epochs=10,
    batch_size=32,
    optimiser=Optimiser.ADAM,
    learning_rate=1e-3,
    weight_decay=0.0,
    schedule=Schedule.CONSTANT,
    freeze_batch_norm=False,
    clip_norm=1e9,
)


def _changed(**values: Any) -> Method:
    return Method(_tuned, replace(DEFAULT, **values))


def _strategy(strategy: Strategy, *, needs_norms: bool = False, **values: Any) -> Method:
    limits = {"freeze_first": 0, "train_last": 0, "strategy": strategy, **values}
    return Method(_tuned, replace(DEFAULT, **limits), needs_norms)


def _only(**values: Any) -> Method:
    """Hold the old by nothing but these terms."""
    terms = ("rehearsal", "l2_sp", "ewc", "distillation", "dark_experience", "after")
    return _changed(**{**{key: PLAIN[key] for key in terms}, **values})


TUTORIAL_SGD = "tutorial fine-tuning, SGD .001"
PHOTOGRAPH = "photographs recipe"
HEAD_CACHED = "photographs recipe, head alone, embeddings cached"
OF_RECIPE = replace(RECIPE.compute, findings=FINDINGS)
HEAD = replace(
    DEFAULT,
    **UNCHANGED,
    strategy=Strategy.HEAD,
    freeze_first=0,
    train_last=0,
    epochs=HEAD_EPOCHS,
)
HEAD_OF_RECIPE = replace(
    RECIPE.training,
    **UNCHANGED,
    strategy=Strategy.HEAD,
    freeze_first=0,
    train_last=0,
    epochs=HEAD_EPOCHS,
    views=0,
)
METHODS: dict[str, Method] = {
    "no update": Method(_unchanged),
    "tutorial fine-tuning": Method(_tutorial, TUTORIAL),
    TUTORIAL_SGD: Method(
        _tutorial, replace(TUTORIAL, optimiser=Optimiser.SGD, learning_rate=1e-3)
    ),  # Adam at 1e-3 destroys a pretrained network
    "scratch on everything": Method(_scratch),
    "the default": Method(_tuned),
    "30 epochs of 64": _changed(epochs=30, batch_size=64),  # the default before
    # what may move
    "head": Method(_tuned, HEAD),
    PHOTOGRAPH: Method(_tuned, RECIPE.training, compute=OF_RECIPE),
    HEAD_CACHED: Method(_head_again, HEAD_OF_RECIPE, compute=OF_RECIPE),
    "first 2 stages frozen": _strategy(Strategy.FULL, freeze_first=2),
    "last stage and head": _strategy(Strategy.FULL, train_last=1),
    "two stages": _strategy(Strategy.TWO_STAGE),
    "everything": _strategy(Strategy.FULL),
    "batch norm only": _strategy(Strategy.BATCH_NORM, needs_norms=True),
    "surgical": _strategy(Strategy.SURGICAL),
    # what holds the old
    "nothing": _only(),
    "L2-SP .1": _only(l2_sp=0.1),
    "EWC 1": _only(ewc=1.0),
    "distillation 1": _only(distillation=1.0),
    "rehearsal": _only(rehearsal=0.5),
    "rehearsal, L2-SP .1": _only(rehearsal=0.5, l2_sp=0.1),
    "rehearsal, EWC 1": _only(rehearsal=0.5, ewc=1.0),
    "rehearsal, distillation .3": _only(rehearsal=0.5, distillation=0.3),
    "rehearsal, dark experience .3": _only(rehearsal=0.5, dark_experience=0.3),
    "all of them": _only(rehearsal=0.5, l2_sp=0.01, ewc=0.1, dark_experience=0.1),
    # after training
    "interpolated": _changed(after=After.INTERPOLATE),
    "uniform soup of 3": Method(lambda turn: uniform_soup(_several(turn))),
    "greedy soup of 3": Method(_greedy),
    "ensemble of 3": Method(lambda turn: ensemble(_several(turn))),
    "batch norm re-estimated, no labels": Method(_reestimated, needs_norms=True),
    "batch-norm bank, no labels": Method(_bank, needs_norms=True),
    "batch-norm bank, then tuned": Method(lambda turn: turn.tune(_bank(turn)), needs_norms=True),
    # imbalance and overfitting
    "no class weights": _changed(class_weights=False),
    "balanced": _changed(class_weights=False, balanced=True),
    "not augmented": _changed(**UNCHANGED),
    "augmented": _changed(flip=True, shift_pixels=2, crop=0.7, brightness=0.1, contrast=0.2),
    "mixup .2": _changed(mixup=0.2),
    "label smoothing .1": _changed(label_smoothing=0.1),
    "dropout .3": _changed(dropout=0.3),
    "batch norm free": Method(_tuned, replace(DEFAULT, freeze_batch_norm=False), needs_norms=True),
    # how it is optimised
    "SGD .01": _changed(optimiser=Optimiser.SGD, learning_rate=0.01),
    "one-cycle": _changed(schedule=Schedule.ONE_CYCLE),
    "steps": _changed(schedule=Schedule.STEP),
    "one rate for all": _changed(backbone_rate=1.0),
}
