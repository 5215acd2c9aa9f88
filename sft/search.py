"""Learning rate and strengths of L_pre by cross-validation on cached embeddings, in a budget."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sft.cache import ActivationCache, Tail, agrees
from sft.dataset import LabelledPictures
from sft.evaluate import mean_loss
from sft.models import Network
from sft.ranges import positive
from sft.strategies import Strategy, boundary, phases
from sft.tasks import Task
from sft.train import DivergedError, TrainingError, TrainingSettings, fine_tune

SEARCHABLE = (
    "learning_rate", "weight_decay", "label_smoothing", "dropout", "rehearsal", "l2_sp", "ewc",
    "distillation", "dark_experience",
)  # fmt: skip
"""In the order of caution: of settings that are about as good, the one with the smaller learning
rate is taken, and of those the one with the larger value of the others."""
BODY_RATE = 0.1
"""Of the head's best learning rate, for what is tuned beyond the head, where the budget does not
allow to search it."""
BODY_RATES = (1 / 3, 1.0, 3.0)
"""Around it, tried by full runs where the budget allows."""


DEFAULT_GRID = {"learning_rate": (3e-4, 1e-3, 3e-3), "l2_sp": (0.001, 0.01, 0.1)}
"""A factor of three to either side of the default rate, and of ten for the pull."""


class SearchError(ValueError):
    """There is nothing to search with; the message names the thing and the way out."""


@dataclass(frozen=True)
class SearchSettings:
    """Whether settings are searched before a fine-tuning, and among what.

    Attributes:
        enabled: search; otherwise the training settings are taken as they are.
        grid: names of `SEARCHABLE` to the values to try, in every combination.
        folds: of the cross-validation.
        budget_seconds: no candidate is begun after it. One that is too small for the grid makes the
            choice depend on the machine's speed.
    """

    enabled: bool = False
    grid: Mapping[str, tuple[float, ...]] = field(
        default_factory=lambda: dict(DEFAULT_GRID), hash=False
    )
    folds: int = 5
    budget_seconds: float = 60.0

    def __post_init__(self) -> None:
        """Refuse values outside their range, by name."""
        _check_grid(self.grid)
        if self.folds < 2:  # noqa: PLR2004 - one to learn from, one to test on
            raise ValueError(f"folds must be at least 2, got {self.folds}")
        positive(self, "budget_seconds")


@dataclass(frozen=True)
class Tried:
    """Settings that were cross-validated.

    Attributes:
        values: what was set.
        stage: `head` (on cached embeddings) or the strategy itself (on pictures).
        fresh, old: mean loss on the folds left out that hold such samples; NaN where none does.
        error: standard error of the mean of both losses over the folds; NaN below two folds.
        folds: how many were run; fewer than asked for when others were clearly better.
    """

    values: Mapping[str, float]
    stage: str
    fresh: float
    old: float
    error: float
    folds: int

    @property
    def loss(self) -> float:
        """Mean of both losses, fresh and old with the same weight."""
        return _both(self.fresh, self.old)


@dataclass(frozen=True)
class Searched:
    """The settings that were found, all that were tried, why it stopped, and a note on the rate."""

    settings: TrainingSettings
    tried: tuple[Tried, ...]
    stopped_by: str
    note: str = ""


def fold_of(sample_id: str, folds: int) -> int:
    """Tell a sample's fold by a hash of its id, so that it stays when others arrive."""
    digest = hashlib.sha256(b"sustain fold\0" + sample_id.encode()).digest()
    return int.from_bytes(digest[:8]) % folds


def search(
    network: Network,
    fresh: LabelledPictures,
    memory: LabelledPictures | None,
    settings: TrainingSettings,
    grid: Mapping[str, Sequence[float]],
    *,
    now: Callable[[], float],
    folds: int = 5,
    budget_seconds: float = 60.0,
    cache: ActivationCache | None = None,
) -> Searched:
    """Choose settings by the loss on folds that were left out, fresh and old with the same weight.

    The head is tuned alone on embeddings that are computed once, with every combination of the
    grid. All candidates run on one fold, then on the next; before each fold, the worse half of them
    is dropped as long as the rest would not fit into the budget (successive halving, Jamieson and
    Talwalkar 2016). Of those that ran on all these folds, the most cautious one is taken whose loss
    is within one standard error of the best one's, of the paired difference over the folds.

    Where the settings move more than the head, the strengths are kept and the learning rate is
    searched anew: by full runs at `BODY_RATES` around `BODY_RATE` times the head's, as far as the
    budget goes, or else it is `BODY_RATE` times the head's. The strength of EWC holds for the head.

    Args:
        network: the champion.
        fresh: what will be learned.
        memory: old samples to rehearse, if any; they are left out fold by fold too.
        settings: all that is not searched. Every epoch runs, since nothing is left to stop early
            by; augmentation is off while embeddings are cached.
        grid: names of `SEARCHABLE` to the values to try.
        now: source of the time in seconds, such as `time.monotonic`.
        folds: at most; one without a fresh sample, or that leaves one class to learn, is left out.
        budget_seconds: no candidate is begun after it.
        cache: of embeddings; one of its own unless given.

    Returns:
        The same for the same seed and samples, as long as the budget cuts nothing short.

    Raises:
        SearchError: an empty grid or one with unknown names or values, fewer than two folds, or no
            candidate with a finite loss, such as where `fine_tune` refuses each.
    """
    candidates = _candidates(grid)
    if memory is not None and not len(memory):
        memory = None
    parts = _folds(fresh, memory, folds, network.config.task)
    clock = _Clock(now, now() + budget_seconds)
    head = _head_only(settings)
    tail, embed = _frozen_part(network, head, cache or ActivationCache(), fresh.pixels[:2])
    old = None if memory is None else embed(memory)
    embedded = _folds(embed(fresh), old, folds, network.config.task)
    race = _Race(tail, head, embedded, candidates, clock)
    race.run()
    tried = race.table(Strategy.HEAD)
    if not tried:
        return Searched(settings, (), race.stopped)
    found = _with(settings, race.choose())
    if settings.strategy is Strategy.HEAD or "learning_rate" not in grid:
        return Searched(found, tried, race.stopped)
    found = replace(found, learning_rate=BODY_RATE * found.learning_rate)
    rates = [{"learning_rate": factor * found.learning_rate} for factor in BODY_RATES]
    whole = _Race(network, found, parts, rates, clock)
    whole.run()
    tried += whole.table(settings.strategy)
    if not whole.compared:
        note = f"learning_rate = {found.learning_rate:g}: {BODY_RATE:g} times the head's, by rule"
        return Searched(found, tried, whole.stopped, note)
    found = _with(found, whole.choose())
    note = f"learning_rate = {found.learning_rate:g}: searched by full runs"
    return Searched(found, tried, whole.stopped, note)


@dataclass(frozen=True)
class _Clock:
    now: Callable[[], float]
    end: float

    @property
    def left(self) -> float:
        return self.end - self.now()

    @property
    def over(self) -> bool:
        return self.left <= 0


@dataclass(frozen=True)
class _Fold:
    """What is learned from, and what is left out of it."""

    fresh: LabelledPictures
    memory: LabelledPictures | None
    fresh_out: LabelledPictures
    memory_out: LabelledPictures | None


@dataclass
class _Race:
    """Candidates that run fold by fold, in which the worse ones drop out when time is short."""

    network: Network
    settings: TrainingSettings
    folds: Sequence[_Fold]
    candidates: Sequence[Mapping[str, float]]
    clock: _Clock
    losses: list[list[tuple[float, float]]] = field(init=False)
    running: list[int] = field(init=False)
    stopped: str = "every candidate ran on every fold"
    refused: str = ""

    def __post_init__(self) -> None:
        self.losses = [[] for _ in self.candidates]
        self.running = list(range(len(self.candidates)))

    @property
    def compared(self) -> bool:
        """Whether every candidate ran on a fold."""
        return all(self.losses)

    def run(self) -> None:
        """Run until the folds or the budget are used up."""
        began = self.clock.left
        for place, fold in enumerate(self.folds):
            fits = sum(map(len, self.losses))
            cost = (began - self.clock.left) / fits if fits else 0.0
            self._drop(cost * (len(self.folds) - place))
            for candidate in list(self.running):
                if self.clock.over:
                    self.stopped = f"the budget: {place} of {len(self.folds)} folds were finished"
                    return
                settings = _with(self.settings, self.candidates[candidate])
                try:
                    found = _losses(self.network, fold, settings)
                except TrainingError as error:  # others may be able to: with rehearsal, for one
                    found, self.refused = (math.inf, math.inf), str(error)
                self.losses[candidate].append(found)

    def _drop(self, cost: float) -> None:
        """Drop the worse half as long as the rest of the folds would cost too much."""
        while len(self.running) > 1 and cost * len(self.running) > self.clock.left:
            ranked = sorted(self.running, key=lambda one: (self._mean(one), one))
            self.running = sorted(ranked[: (len(ranked) + 1) // 2])
            self.stopped = "the budget: the worse candidates were dropped before the last fold"

    def choose(self) -> Mapping[str, float]:
        """Take the most cautious one of those that are about as good as the best."""
        most = max(len(losses) for losses in self.losses)
        finals = [one for one in range(len(self.candidates)) if self.losses[one][most - 1 :]]
        if len(finals) < len(self.running) and most > 1:  # the last fold was cut short
            most -= 1
            finals = self.running
        best = min(finals, key=lambda one: (self._mean(one, most), one))
        if not math.isfinite(self._mean(best, most)):
            raise SearchError(
                self.refused
                or "no candidate ended with a finite loss: give the grid smaller learning rates"
            )
        if most == 1:
            return self.candidates[best]
        near = [one for one in finals if self._within(one, best, most)]
        return self.candidates[min(near, key=lambda one: _caution(self.candidates[one]))]

    def table(self, stage: str) -> tuple[Tried, ...]:
        """Tell all that ran."""
        rows = []
        for values, losses in zip(self.candidates, self.losses, strict=True):
            if losses:
                fresh, old = map(_mean_of_known, zip(*losses, strict=True))
                error = _standard_error([_both(*pair) for pair in losses])
                rows.append(Tried(values, stage, fresh, old, error, len(losses)))
        return tuple(rows)

    def _mean(self, candidate: int, folds: int | None = None) -> float:
        losses = [_both(*pair) for pair in self.losses[candidate][:folds]]
        return sum(losses) / len(losses) if losses else math.inf

    def _within(self, candidate: int, best: int, folds: int) -> bool:
        pairs = zip(self.losses[candidate][:folds], self.losses[best][:folds], strict=True)
        worse = [_both(*one) - _both(*other) for one, other in pairs]
        if not all(map(math.isfinite, worse)):
            return False
        return sum(worse) / len(worse) <= _standard_error(worse)


def _check_grid(grid: Mapping[str, Sequence[float]]) -> None:
    if not grid or not all(len(values) for values in grid.values()):
        raise SearchError("the grid is empty: give at least one name with values to try")
    if unknown := sorted(set(grid) - set(SEARCHABLE)):
        raise SearchError(
            f"{', '.join(unknown)} cannot be searched; these can: {', '.join(SEARCHABLE)}"
        )
    for name, values in grid.items():
        for value in values:
            try:
                _with(TrainingSettings(), {name: value})
            except ValueError as error:
                raise SearchError(f"the grid holds a value that cannot be set: {error}") from error


def _candidates(grid: Mapping[str, Sequence[float]]) -> list[dict[str, float]]:
    _check_grid(grid)
    names = [name for name in SEARCHABLE if name in grid]
    rows = itertools.product(*(sorted(set(grid[name])) for name in names))
    return [dict(zip(names, row, strict=True)) for row in rows]


def _folds(
    fresh: LabelledPictures, memory: LabelledPictures | None, folds: int, task: Task
) -> list[_Fold]:
    """Make the folds that can be learned from and tested on."""
    if folds < 2:  # noqa: PLR2004 - one to learn from, one to test on
        raise SearchError(f"folds must be at least 2, got {folds}")
    parts = []
    for fold in range(folds):
        kept, out = _leave_out(fresh, fold, folds)
        old_kept, old_out = (None, None) if memory is None else _leave_out(memory, fold, folds)
        learned = kept.labels if old_kept is None else torch.cat([kept.labels, old_kept.labels])
        if len(kept) and len(out) and not task.unlearnable(learned):
            parts.append(_Fold(kept, old_kept, out, old_out))
    if len(parts) < 2:  # noqa: PLR2004
        raise SearchError(
            f"{len(fresh)} fresh samples make {len(parts)} folds of {folds} that hold a sample and"
            " leave two classes to learn: label more, or ask for other folds"
        )
    return parts


def _leave_out(
    data: LabelledPictures, fold: int, folds: int
) -> tuple[LabelledPictures, LabelledPictures]:
    inside = [fold_of(name, folds) == fold for name in data.sample_ids]
    kept, out = ([i for i, one in enumerate(inside) if one is wanted] for wanted in (False, True))
    return data.take(kept), data.take(out)


def _head_only(settings: TrainingSettings) -> TrainingSettings:
    """Tune the head on embeddings, with what makes no sense there turned off."""
    return replace(
        settings.without_augmentation(),
        strategy=Strategy.HEAD,
        freeze_first=0,
        train_last=0,
        mixup=0.0,
    )


def _frozen_part(
    network: Network, settings: TrainingSettings, cache: ActivationCache, pixels: Tensor
) -> tuple[Network, Callable[[LabelledPictures], LabelledPictures]]:
    """Give what follows the frozen part, and what turns pictures into what it takes.

    `pixels` are a few pictures to try the cut on.
    """
    whole = copy.deepcopy(network).to(memory_format=torch.channels_last)
    at = boundary(whole, phases(whole, settings)[0])
    if at is not None:
        with contextlib.suppress(ValueError):  # it cannot be cut there
            tail = Tail(whole, at)
            if agrees(whole, tail, pixels):
                return tail, lambda data: replace(data, pixels=cache.get(whole, at, data))
    return whole, lambda data: data


def _with(settings: TrainingSettings, values: Mapping[str, float]) -> TrainingSettings:
    changed: dict[str, Any] = dict(values)
    return replace(settings, **changed)


def _losses(network: Network, fold: _Fold, settings: TrainingSettings) -> tuple[float, float]:
    """Tune without a fold; give the mean losses on it, fresh and old. Infinite: it blew up."""
    try:
        tuned = fine_tune(network, fold.fresh, settings, memory=fold.memory)
    except DivergedError:
        return math.inf, math.inf
    if len(tuned.epochs) < settings.epochs:  # nothing stops early but numbers that are not finite
        return math.inf, math.inf
    return _loss(tuned.network, fold.fresh_out), _loss(tuned.network, fold.memory_out)


def _loss(network: Network, data: LabelledPictures | None) -> float:
    if data is None or not len(data):
        return math.nan
    loss, _ = mean_loss(network, [data])
    return loss if math.isfinite(loss) else math.inf


def _both(fresh: float, old: float) -> float:
    return fresh if math.isnan(old) else (fresh + old) / 2


def _mean_of_known(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def _standard_error(values: Sequence[float]) -> float:
    finite = len(values) > 1 and all(map(math.isfinite, values))
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if finite else math.nan


def _caution(values: Mapping[str, float]) -> tuple[float, ...]:
    return tuple(v if name == "learning_rate" else -v for name, v in values.items())
