"""Fine-tuning: one visible loop with rehearsal, L_pre and early stopping."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from sft.augment import Augmentation, augment, strengths
from sft.averaging import AfterSettings
from sft.cache import ActivationCache, Tail, cut, frozen_part_digest
from sft.dataset import LabelledPictures, batches, mixup
from sft.evaluate import mean_loss
from sft.models import Network
from sft.objectives import EWC, L2SP, DarkExperience, Distillation, Penalty, Teacher, fisher
from sft.ranges import at_least_one, below_one, not_negative, positive
from sft.schedules import RateSettings, make_optimiser, make_schedule
from sft.strategies import (
    Phase,
    StrategySettings,
    apply,
    correct_momentum,
    epochs_of,
    parameter_groups,
    phases,
    training_mode,
)
from sft.tasks import Task

FISHER_SAMPLES = 200
"""Old samples that EWC's Fisher information is estimated on: one backward pass each."""


class TrainingError(ValueError):
    """Training cannot start or go on; the message names the thing and the way out."""


class StopBy(StrEnum):
    """What early stopping looks at."""

    LOSS = "loss"
    ACCURACY = "accuracy"


@dataclass(frozen=True)
class TrainingSettings(StrategySettings, RateSettings, Augmentation, AfterSettings):
    """How a network is fine-tuned.

    The defaults are what won on real pictures: rehearsal of old samples is the term that no default
    may lack (a new domain learned at 45 % with the old one at 62 %, against 47/33 without it), then
    a weak pull towards the champion (46/62), with batch-norm statistics frozen (77 against 74).

    What may move, how large the steps are, how far pictures are changed and what follows is told by
    the settings that these extend.

    Attributes:
        epochs, batch_size: `epochs` at most; a batch holds fresh and rehearsed samples.
        rehearsal: share of each batch that is old samples.
        l2_sp, ewc, distillation, temperature, dark_experience: strengths of the terms of L_pre that
            hold the champion's weights or answers; see `sft.objectives`. 0 turns one off.
        class_weights: each class counts the same in the loss; of several labels, the presence of
            each as much as its absence. A regression has none.
        balanced: each class is drawn equally often, with repetition; of several labels, samples in
            the measure in which the rarest of theirs is rare. A regression refuses it.
        label_smoothing, mixup, dropout: against overfitting; `dropout` acts before the head.
        freeze_batch_norm: keep the champion's batch-norm statistics.
        views: augmented views of each picture that are kept where a part is frozen and runs once;
            0 augments anew in each epoch, from pictures.
        stop_by, patience: epochs without a better validation loss, or accuracy, before it stops.
        clip_norm: longest gradient.
        seed: of every random draw.
    """

    epochs: int = 30
    batch_size: int = 64
    rehearsal: float = 0.5
    l2_sp: float = 0.01
    ewc: float = 0.0
    distillation: float = 0.0
    temperature: float = 2.0
    dark_experience: float = 0.0
    class_weights: bool = True
    balanced: bool = False
    label_smoothing: float = 0.0
    mixup: float = 0.0
    dropout: float = 0.0
    freeze_batch_norm: bool = True
    views: int = 0
    stop_by: StopBy = StopBy.LOSS
    patience: int = 6
    clip_norm: float = 5.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse values outside their range, by name."""
        for part in (StrategySettings, RateSettings, Augmentation, AfterSettings):
            part.__post_init__(self)
        at_least_one(self, "epochs", "batch_size", "patience")
        positive(self, "clip_norm", "temperature")
        not_negative(self, "l2_sp", "ewc", "distillation", "dark_experience", "mixup", "views")
        below_one(self, "rehearsal", "label_smoothing", "dropout")

    def without_augmentation(self) -> TrainingSettings:
        """Change no picture."""
        plain: dict[str, Any] = asdict(Augmentation())
        return replace(self, **plain)


@dataclass(frozen=True)
class Epoch:
    """One pass over the fresh samples: mean training loss, and validation (NaN without any)."""

    number: int
    train_loss: float
    validation_loss: float
    validation_accuracy: float


@dataclass(frozen=True)
class FineTuned:
    """The best network of a run, and the run's history.

    `alpha` is the share of the way from the champion that was kept; `notes` say what was corrected,
    and `members` what each of several fine-tunings reached.
    """

    network: Network
    epochs: tuple[Epoch, ...]
    best_epoch: int
    stopped: str
    alpha: float = 1.0
    notes: tuple[str, ...] = ()
    members: tuple[str, ...] = ()


class _NotFiniteError(Exception):
    """The loss or its gradient is not a number; `step` of the epoch says where."""

    def __init__(self, step: int) -> None:
        super().__init__(step)
        self.step = step


def fine_tune(
    start: Network,
    fresh: LabelledPictures,
    settings: TrainingSettings,
    *,
    memory: LabelledPictures | None = None,
    anchor: Network | None = None,
    validation: tuple[LabelledPictures, ...] = (),
    cache: ActivationCache | None = None,
    on_epoch: Callable[[Epoch], None] | None = None,
) -> FineTuned:
    """Fine-tune a copy of `start` on fresh samples; `start` itself is not changed.

    Args:
        start: the network to begin from.
        fresh: what to learn.
        settings: how.
        memory: old samples, rehearsed beside the fresh ones.
        cache: of what a frozen part answers, so that it runs once for each picture.
        anchor: the champion, whose weights and answers L_pre holds; `start` by default. A head that
            was widened is held only in the rows that the anchor has.
        validation: sets whose mean losses are averaged for early stopping, each set with the same
            weight (fresh and old, so that the best epoch is not the one that forgot most).
        on_epoch: called after each epoch, for progress.

    Returns:
        The weights of the epoch that validated best (of the last one without validation) and the
        history. The same seed on the same machine gives the same weights.

    Raises:
        TrainingError: an ensemble, no samples, a single class, a strategy that the network has no
            layers for, or a loss that is not finite before any epoch has ended (later, training
            stops and the best weights are kept).
    """
    if start.config.members > 1:
        raise TrainingError("an ensemble's members are tuned one by one: call sft.after.tune")
    if memory is not None and not len(memory):
        memory = None
    rehearsed = memory if settings.rehearsal else None
    _check_labels(fresh, rehearsed, start.config.task)
    _check_settings(settings, start.config.task)
    network, champion = copy.deepcopy(start), anchor or start
    network.to(memory_format=torch.channels_last)
    generator = torch.Generator().manual_seed(settings.seed)
    try:
        plan = phases(network, settings, new_head=network.config != champion.config)
        epochs = epochs_of(plan, settings.epochs)
        terms = _terms(champion, memory, settings, generator)
    except ValueError as error:
        raise TrainingError(str(error)) from error
    weights = _loss_weights(network, fresh, rehearsed, settings)
    job = _Job(network, fresh, rehearsed, settings, tuple(terms), weights, generator)
    best = _Best(_snapshot(network), settings, validated=any(len(data) for data in validation))
    history: list[Epoch] = []
    notes: list[str] = []
    stopped = "all epochs done"

    with torch.random.fork_rng(devices=[]), _dropout(network, settings.dropout), _unfrozen(network):
        torch.manual_seed(settings.seed)  # dropout draws from the global generator
        for phase, count in zip(plan, epochs, strict=True):
            optimiser, schedule, corrected = _begin(job, phase, count)
            views, validated = _cached(job, phase, champion, validation, cache)
            notes += [corrected] if corrected else []
            best.last = len(history)
            for number in range(len(history) + 1, len(history) + 1 + count):
                training_mode(network, phase, freeze_batch_norm=settings.freeze_batch_norm)
                try:
                    train_loss = _one_pass(views[number % len(views)], optimiser, schedule)
                except _NotFiniteError as error:
                    stopped = (
                        f"the loss or its gradient was not finite at step {error.step} of epoch"
                        f" {number}: lower learning_rate ({settings.learning_rate:g})"
                    )
                    if not history:
                        raise TrainingError(stopped) from None
                    break
                epoch = _validated(views[0].network, number, train_loss, validated)
                history.append(epoch)
                if on_epoch is not None:
                    on_epoch(epoch)
                if not best.takes(epoch, network) and number - best.last >= settings.patience:
                    stopped = (
                        f"no better validation {settings.stop_by} for {settings.patience} epochs"
                    )
                    break
            network.load_state_dict(best.weights)  # where the next phase starts
    return FineTuned(network.eval(), tuple(history), best.epoch, stopped, notes=tuple(notes))


@dataclass(frozen=True)
class _Job:
    """What every pass over the fresh samples needs."""

    network: Network
    fresh: LabelledPictures
    rehearsed: LabelledPictures | None
    settings: TrainingSettings
    terms: tuple[Penalty, ...]
    weights: Tensor | None
    generator: torch.Generator

    @cached_property
    def counts(self) -> Tensor:
        """Samples of each class to train on, int64 (classes,)."""
        return self.task.counts(_labels(self.fresh, self.rehearsed), self.outputs)

    @property
    def task(self) -> Task:
        """What is learned."""
        return self.network.config.task

    @property
    def outputs(self) -> int:
        """How many the head has."""
        return len(self.network.config.classes)

    def strength(self, labels: Tensor) -> Tensor:
        """Say how far each sample is augmented, (n,)."""
        return strengths(self.task.alike(labels, self.counts), self.counts, self.settings.rare)

    @property
    def steps(self) -> int:
        """Batches in a pass."""
        old = self.settings.rehearsal if self.rehearsed is not None else 0.0
        old_count = round(self.settings.batch_size * old)
        return math.ceil(len(self.fresh) / max(1, self.settings.batch_size - old_count))


@dataclass
class _Best:
    """The weights that validated best, or the last ones where nothing validates."""

    weights: dict[str, Tensor]
    settings: TrainingSettings
    validated: bool
    score: float = -math.inf
    epoch: int = 0
    last: int = 0

    def takes(self, epoch: Epoch, network: Network) -> bool:
        """Take the weights of an epoch if it is the best so far."""
        score = float(epoch.number)
        if self.validated:
            by_accuracy = self.settings.stop_by is StopBy.ACCURACY
            score = epoch.validation_accuracy if by_accuracy else -epoch.validation_loss
        if not score > self.score:
            return False
        self.weights, self.score = _snapshot(network), score
        self.epoch = self.last = epoch.number
        return True


def _begin(job: _Job, phase: Phase, epochs: int) -> tuple[Optimizer, LRScheduler, str]:
    """Let a phase's parameters move; give its optimiser, its schedule and what was corrected."""
    settings = job.settings
    apply(job.network, phase)
    training_mode(job.network, phase, freeze_batch_norm=settings.freeze_batch_norm)
    corrected = correct_momentum(job.network, epochs * job.steps)
    groups = parameter_groups(
        job.network,
        phase,
        learning_rate=settings.learning_rate,
        backbone_rate=settings.backbone_rate,
    )
    optimiser = make_optimiser(groups, settings)
    return optimiser, make_schedule(optimiser, settings, job.steps, epochs), corrected


def _one_pass(job: _Job, optimiser: Optimizer, schedule: LRScheduler) -> float:
    """Go once through the fresh samples; give the mean loss.

    Raises:
        _NotFiniteError: before a step that would spoil the weights.
    """
    settings, network, task = job.settings, job.network, job.task
    losses: list[float] = []
    for pixels, labels, is_old in batches(
        job.fresh,
        job.rehearsed,
        batch_size=settings.batch_size,
        rehearsal=settings.rehearsal,
        generator=job.generator,
        balanced=settings.balanced,
        task=task,
    ):
        seen = augment(pixels, settings, job.generator, job.strength(labels))
        targets = task.targets(labels, job.outputs, smoothing=settings.label_smoothing)
        seen, targets = mixup(seen, targets, settings.mixup, job.generator)
        logits = network(seen)
        loss = task.loss(logits, targets, job.weights)
        for term in job.terms:
            loss = loss + term(network, seen, logits, is_old)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(network.parameters(), settings.clip_norm)
        if not torch.isfinite(loss + norm):
            raise _NotFiniteError(len(losses) + 1)
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
    return sum(losses) / len(losses)


def _cached(
    job: _Job,
    phase: Phase,
    champion: Network,
    validation: tuple[LabelledPictures, ...],
    cache: ActivationCache | None,
) -> tuple[list[_Job], tuple[LabelledPictures, ...]]:
    """Give a phase's job and validation sets: pictures, or what its frozen part makes of them.

    There is one job for each augmented view, which the epochs take in turn.
    """
    settings = job.settings
    if cache is None or settings.mixup:
        return [job], validation

    def change(data: LabelledPictures, generator: torch.Generator) -> Tensor:
        return augment(data.pixels, settings, generator, job.strength(data.labels))

    part = cut(
        job.network,
        phase,
        cache,
        job.fresh,
        memory=job.rehearsed,
        validation=validation,
        change=change if settings.augments else None,
        views=settings.views,
        seed=settings.seed,
    )
    if part is None:
        return [job], validation
    terms: list[Penalty] = [term for term in job.terms if isinstance(term, L2SP | EWC)]
    if len(terms) < len(job.terms):
        at = part.network.at
        if frozen_part_digest(champion, at) != frozen_part_digest(job.network, at):
            return [job], validation  # the teacher sees other activations
        terms += _answer_terms(Tail(champion, at), settings)
    job = replace(
        job,
        network=part.network,
        terms=tuple(terms),
        settings=settings.without_augmentation(),
    )
    return [replace(job, fresh=new, rehearsed=old) for new, old in part.views], part.validation


@contextmanager
def _unfrozen(network: Network) -> Iterator[None]:
    """Let move afterwards what could move before."""
    movable = {name: value.requires_grad for name, value in network.named_parameters()}
    try:
        yield
    finally:
        for name, value in network.named_parameters():
            value.requires_grad_(movable[name])


def _terms(
    champion: Network,
    memory: LabelledPictures | None,
    settings: TrainingSettings,
    generator: torch.Generator,
) -> list[Penalty]:
    """Make the terms of L_pre that the settings ask for."""
    start = dict(champion.named_parameters())
    terms: list[Penalty] = []
    if settings.l2_sp:
        terms.append(L2SP(start, settings.l2_sp))
    if settings.ewc:
        old = memory.pixels[:FISHER_SAMPLES] if memory is not None else torch.empty(0)
        likelihood = champion.config.task.likelihood
        found = fisher(champion, old, generator=generator, likelihood=likelihood)
        terms.append(EWC(start, found, settings.ewc))
    return [*terms, *_answer_terms(champion, settings)]


def _answer_terms(champion: Network, settings: TrainingSettings) -> list[Penalty]:
    """Make those that hold the champion's answers; it is given what the network is given."""
    teacher, terms = Teacher(champion), list[Penalty]()
    if settings.distillation:
        terms.append(
            Distillation(
                teacher,
                settings.distillation,
                temperature=settings.temperature,
                divergence=champion.config.task.divergence,
            )
        )
    if settings.dark_experience:
        terms.append(DarkExperience(teacher, settings.dark_experience))
    return terms


@contextmanager
def _dropout(network: Network, p: float) -> Iterator[None]:
    """Drop a share of what the head is given while the network trains."""
    if not p:
        yield
        return
    hook = network.head.register_forward_pre_hook(
        lambda head, given: (functional.dropout(given[0], p, training=head.training), *given[1:])
    )
    try:
        yield
    finally:
        hook.remove()


def _check_labels(fresh: LabelledPictures, memory: LabelledPictures | None, task: Task) -> None:
    if not len(fresh):
        raise TrainingError("there is no fresh sample to train on")
    if why := task.unlearnable(_labels(fresh, memory)):
        raise TrainingError(why)


def _check_settings(settings: TrainingSettings, task: Task) -> None:
    defaults = TrainingSettings()
    for name in task.unfit:
        if getattr(settings, name) != getattr(defaults, name):
            raise TrainingError(
                f"{name} = {getattr(settings, name)!r} makes no sense for a {task.name}: leave it"
                f" at {getattr(defaults, name)!r}"
            )


def _loss_weights(
    network: Network,
    fresh: LabelledPictures,
    memory: LabelledPictures | None,
    settings: TrainingSettings,
) -> Tensor | None:
    if not settings.class_weights:
        return None
    return network.config.task.weights(_labels(fresh, memory), len(network.config.classes))


def _labels(fresh: LabelledPictures, memory: LabelledPictures | None) -> Tensor:
    """Give the labels of all that is trained on."""
    return fresh.labels if memory is None else torch.cat([fresh.labels, memory.labels])


def _validated(
    network: Network, number: int, train_loss: float, validation: tuple[LabelledPictures, ...]
) -> Epoch:
    network.eval()
    return Epoch(number, train_loss, *mean_loss(network, validation))


def _snapshot(network: Network) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in network.state_dict().items()}
