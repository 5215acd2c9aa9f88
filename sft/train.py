"""Fine-tuning: one visible loop with rehearsal, L_pre and early stopping."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from sft.augment import Augmentation, augment, strengths
from sft.averaging import AfterSettings
from sft.cache import ActivationCache, Tail, cut, frozen_part_digest
from sft.dataset import LabelledPictures, batches, mixup, often, parts
from sft.distributed import ALONE, Team
from sft.evaluate import mean_loss
from sft.models import ModelConfig, Network, fill
from sft.modes import evaluating
from sft.objectives import EWC, L2SP, DarkExperience, Distillation, Penalty, Teacher, fisher
from sft.ranges import at_least_one, below_one, not_negative, positive
from sft.schedules import RateSettings, make_optimiser, make_schedule
from sft.speed import ComputeSettings, Device, dropout, faster_dropout, trains_in_half
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
LEAST_VALIDATION = 5
"""Samples that each validation set must have for training to stop by them. With 0 or 1 fresh ones
beside 100 old ones it stopped where least was forgotten: 5 to 6 points of accuracy on 60 fresh
digits were lost against training to the end, 1 to 2 points with 2 to 50."""


class TrainingError(ValueError):
    """Training cannot start or go on; the message names the thing and the way out."""


class DivergedError(TrainingError):
    """The loss was no number any more before the first epoch had ended."""


class StopBy(StrEnum):
    """What early stopping looks at."""

    LOSS = "loss"
    ACCURACY = "accuracy"


@dataclass(frozen=True)
class TrainingSettings(StrategySettings, RateSettings, Augmentation, AfterSettings):
    """How a network is fine-tuned.

    The defaults are what won on real pictures: rehearsal of old samples is the term that no default
    may lack (a new domain learned at 45 % with the old one at 62 %, against 47/33 without it), then
    a weak pull towards the champion (46/62), with batch-norm statistics frozen (77 against 74). 15
    epochs of batches of 32 were better than 30 of 64 on a drifted sensor (41.8/62.6 against
    39.1/61.3): there the validation loss rises, and stops the training, before accuracy has.

    What may move, how large the steps are, how far pictures are changed and what follows is told by
    the settings that these extend.

    Attributes:
        epochs, batch_size: `epochs` at most; a batch holds fresh and rehearsed samples.
        rehearsal: share of each batch that is old samples.
        l2_sp, ewc, distillation, temperature, dark_experience: strengths of the terms of L_pre that
            hold the champion's weights or answers; see `sft.objectives`. 0 turns one off.
        class_weights: each class counts the same in the loss, whatever its share of the batches is
            by fresh and rehearsed samples, `balanced` or not, but none over ten times the average;
            of several labels, the presence of each as much as its absence. A regression has none.
        balanced: of fresh samples each class is drawn equally often, with repetition; of several
            labels, samples in the measure in which the rarest of theirs is rare. A regression
            refuses it.
        label_smoothing, mixup, dropout: against overfitting; `dropout` acts before the head.
        freeze_batch_norm: keep the champion's batch-norm statistics.
        views: augmented views of each picture that are kept where a part is frozen and runs once;
            0 augments anew in each epoch, from pictures.
        stop_by, patience: epochs without a better validation loss, or accuracy, before it stops.
        clip_norm: longest gradient.
        seed: of every random draw.
    """

    epochs: int = 15
    batch_size: int = 32
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
    """One pass over the fresh samples: mean training loss, and validation (NaN without any).

    `learning_rate` is the largest of its first step.
    """

    number: int
    train_loss: float
    validation_loss: float
    validation_accuracy: float
    learning_rate: float = math.nan


@dataclass(frozen=True)
class FineTuned:
    """The best network of a run, and the run's history.

    `alpha` is the share of the way from the champion that was kept; `notes` say what was corrected,
    and what could not be done; `members` what each of several fine-tunings reached.
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
    on_batch: Callable[[int], None] | None = None,
    compute: ComputeSettings | None = None,
    team: Team = ALONE,
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
            weight (fresh and old, so that the best epoch is not the one that forgot most). One
            with fewer than `LEAST_VALIDATION` samples decides nothing: all epochs are done, the
            last weights are kept, and the notes say so.
        on_epoch: called after each epoch, for progress.
        on_batch: called after each step with the number of its fresh samples, for progress.
        compute: where, and how precisely; by default on the CPU in float32.
        team: processes that each call this with the same arguments and share the passes out.

    Returns:
        The weights of the epoch that validated best (of the last one without validation) and the
        history. The same seed on the same machine gives the same weights.

    Raises:
        TrainingError: an ensemble, no samples, a single class, labels outside the classes, a
            strategy that the network has no layers for, batch norm that would learn statistics from
            parts of a batch or from one sample, or a loss that is not finite before any epoch has
            ended (later, training stops and the best weights are kept).
    """
    if start.config.members > 1:
        raise TrainingError("an ensemble's members are tuned one by one: call sft.after.tune")
    if memory is not None and not len(memory):
        memory = None
    rehearsed = memory if settings.rehearsal else None
    _check_labels(fresh, rehearsed, start.config)
    _check_settings(settings, start.config.task)
    _check_shared(start, settings, team)
    small = [len(data) for data in validation if len(data) < LEAST_VALIDATION]
    compute = compute or ComputeSettings(device=Device.CPU)
    network, champion = _placed(start, anchor or start, compute.start())
    generator = torch.Generator().manual_seed(settings.seed)
    try:
        plan = phases(network, settings, new_head=network.config != champion.config)
        epochs = epochs_of(plan, settings.epochs)
        terms = _terms(champion, memory, settings, generator, team)
    except ValueError as error:
        raise TrainingError(str(error)) from error
    weights = _loss_weights(network, fresh, rehearsed, settings)
    job = _Job(
        network,
        fresh,
        rehearsed,
        settings,
        tuple(terms),
        weights,
        generator,
        compute,
        team,
        on_batch,
    )
    _check_batches(job, plan)
    best = _Best(_snapshot(network), settings, validated=bool(validation) and not small)
    history: list[Epoch] = []
    notes = [_too_few(small)] if small else []
    stopped = "all epochs done"

    with _tuning(network, settings):
        for phase, count in zip(plan, epochs, strict=True):
            optimiser, schedule, corrected = _begin(job, phase, count)
            views, validated = _cached(job, phase, champion, validation, cache)
            notes += [corrected] if corrected else []
            best.last = len(history)
            for number in range(len(history) + 1, len(history) + 1 + count):
                rate = max(group["lr"] for group in optimiser.param_groups)
                try:
                    train_loss = _one_pass(views[number % len(views)], optimiser, schedule)
                except _NotFiniteError as error:
                    stopped = (
                        f"the loss or its gradient was not finite at step {error.step} of epoch"
                        f" {number}: lower learning_rate ({settings.learning_rate:g})"
                    )
                    if not history:
                        raise DivergedError(stopped) from None
                    break
                epoch = _validated(views[0], number, train_loss, validated, rate)
                history.append(epoch)
                if on_epoch is not None:
                    on_epoch(epoch)
                if not best.takes(epoch, network) and number - best.last >= settings.patience:
                    stopped = (
                        f"no better validation {settings.stop_by} for {settings.patience} epochs"
                    )
                    break
            fill(network, best.weights)  # where the next phase starts
    network.eval().to("cpu")
    return FineTuned(network, tuple(history), best.epoch, stopped, notes=tuple(notes))


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
    compute: ComputeSettings
    team: Team
    on_batch: Callable[[int], None] | None = None

    @cached_property
    def half(self) -> bool:
        """Whether a phase's steps are in bfloat16; the weights stay float32."""
        half = trains_in_half(self.network, self.fresh.pixels, self.compute)
        return bool(self.team.agree([float(half)])[0])

    @property
    def autocast(self) -> torch.autocast:
        """What the network answers in."""
        return torch.autocast(self.network.mean.device.type, torch.bfloat16, enabled=self.half)

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
        settings = self.settings
        fresh_count, _ = parts(self.rehearsed, settings.batch_size, settings.rehearsal)
        return math.ceil(len(self.fresh) / fresh_count)


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
        still = {name for name, value in network.named_parameters() if not value.requires_grad}
        kept = {name: value for name, value in self.weights.items() if name in still}
        self.weights, self.score = {**_snapshot(network, still), **kept}, score
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
    device = network.mean.device
    losses: list[float] = []
    for pixels, labels, is_old, counted in batches(
        job.fresh,
        job.rehearsed,
        batch_size=settings.batch_size,
        rehearsal=settings.rehearsal,
        generator=job.generator,
        balanced=settings.balanced,
        task=task,
    ):
        seen = pixels
        if settings.augments:
            seen = augment(pixels, settings, job.generator, job.strength(labels))
        targets = task.targets(labels, job.outputs, smoothing=settings.label_smoothing)
        seen, targets, shares = mixup(seen, targets, counted, settings.mixup, job.generator)
        seen, targets, shares = (_moved(one, device) for one in (seen, targets, shares))
        with job.autocast:
            logits = job.team.answers(network, seen).float()
            loss = task.loss(logits, targets, job.weights, shares)
            for term in job.terms:
                loss = loss + term(network, seen, logits, is_old.to(device))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        job.team.average_gradients(network)
        norm = nn.utils.clip_grad_norm_(network.parameters(), settings.clip_norm)
        if not torch.isfinite(loss + norm):
            raise _NotFiniteError(len(losses) + 1)
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
        if job.on_batch is not None:
            job.on_batch(int((~is_old).sum()))
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
        return augment(data.pixels[:], settings, generator, job.strength(data.labels))

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
        team=job.team,
    )
    if part is None:
        return [job], validation
    terms: list[Penalty] = [term for term in job.terms if isinstance(term, L2SP | EWC)]
    if len(terms) < len(job.terms):
        at = part.network.at
        if frozen_part_digest(champion, at) != frozen_part_digest(job.network, at):
            return [job], validation  # the teacher sees other activations
        terms += _answer_terms(Tail(champion, at), settings, job.team)
    job = replace(
        job,
        network=part.network,
        terms=tuple(terms),
        settings=settings.without_augmentation(),
    )
    return [replace(job, fresh=new, rehearsed=old) for new, old in part.views], part.validation


def _placed(start: Network, champion: Network, device: torch.device) -> tuple[Network, Network]:
    """Copy the network to a device; the champion only where it is not there yet."""
    network = copy.deepcopy(start).to(device).to(memory_format=torch.channels_last)
    if champion.mean.device.type != device.type:
        champion = copy.deepcopy(champion).to(device)
    return network, champion


@contextmanager
def _tuning(network: Network, settings: TrainingSettings) -> Iterator[None]:
    """Set up what holds for all phases, and leave all else as it was."""
    with (
        torch.random.fork_rng(devices=[]),
        faster_dropout(network),
        _dropout(network, settings.dropout),
        _unfrozen(network),
    ):
        torch.manual_seed(settings.seed)  # dropout draws from the global generator
        yield


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
    team: Team,
) -> list[Penalty]:
    """Make the terms of L_pre that the settings ask for."""
    start = dict(champion.named_parameters())
    terms: list[Penalty] = []
    if settings.l2_sp:
        terms.append(L2SP(start, settings.l2_sp))
    if settings.ewc:
        old = torch.empty(0)
        if memory is not None:  # its first samples may be of one class only
            of_its_own = torch.Generator().manual_seed(settings.seed)
            drawn = torch.randperm(len(memory), generator=of_its_own)[:FISHER_SAMPLES]
            old = memory.pixels[drawn.sort().values]
        likelihood = champion.config.task.likelihood
        found = fisher(champion, old, generator=generator, likelihood=likelihood)
        terms.append(EWC(start, found, settings.ewc))
    return [*terms, *_answer_terms(champion, settings, team)]


def _answer_terms(champion: Network, settings: TrainingSettings, team: Team) -> list[Penalty]:
    """Make those that hold the champion's answers; it is given what the network is given."""
    if not settings.distillation and not settings.dark_experience:
        return []
    answer = partial(team.answers, copy.deepcopy(champion).eval())
    teacher, terms = Teacher(answer), list[Penalty]()
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
        lambda head, given: (dropout(given[0], p) if head.training else given[0], *given[1:])
    )
    try:
        yield
    finally:
        hook.remove()


def _too_few(small: Sequence[int]) -> str:
    return (
        f"a validation set of {min(small)} samples is too small to stop or choose by (at least"
        f" {LEAST_VALIDATION} are needed): all epochs were done, and the last weights kept"
    )


def _check_labels(
    fresh: LabelledPictures, memory: LabelledPictures | None, config: ModelConfig
) -> None:
    if not len(fresh):
        raise TrainingError("there is no fresh sample to train on")
    labels = _labels(fresh, memory)
    outside = config.task.outside(labels, len(config.classes))
    if why := outside or config.task.unlearnable(labels):
        raise TrainingError(why)


def _check_settings(settings: TrainingSettings, task: Task) -> None:
    defaults = TrainingSettings()
    for name in task.unfit:
        if getattr(settings, name) != getattr(defaults, name):
            raise TrainingError(
                f"{name} = {getattr(settings, name)!r} makes no sense for a {task.name}: leave it"
                f" at {getattr(defaults, name)!r}"
            )


def _check_shared(network: Network, settings: TrainingSettings, team: Team) -> None:
    follows = any(isinstance(layer, _BatchNorm) for layer in network.modules())
    if team.size > 1 and follows and not settings.freeze_batch_norm:
        raise TrainingError(
            f"batch norm would take its statistics from parts of a batch, since {team.size}"
            " processes share each: leave freeze_batch_norm at true, or set processes to 1"
        )


def _check_batches(job: _Job, plan: Sequence[Phase]) -> None:
    """Refuse batches of one sample where batch norm would take its statistics from them."""
    settings = job.settings
    if sum(parts(job.rehearsed, settings.batch_size, settings.rehearsal)) > 1:
        return
    for phase in plan:
        training_mode(job.network, phase, freeze_batch_norm=settings.freeze_batch_norm)
        if any(isinstance(one, _BatchNorm) and one.training for one in job.network.modules()):
            raise TrainingError(
                "batch norm cannot take its statistics from batches of one sample: set batch_size"
                " to 2 or more, or freeze_batch_norm to true"
            )


def _loss_weights(
    network: Network,
    fresh: LabelledPictures,
    memory: LabelledPictures | None,
    settings: TrainingSettings,
) -> Tensor | None:
    if not settings.class_weights:
        return None
    task = network.config.task
    drawn = often(
        fresh,
        memory,
        batch_size=settings.batch_size,
        rehearsal=settings.rehearsal,
        balanced=settings.balanced,
        task=task,
    )
    weights = task.weights(_labels(fresh, memory), len(network.config.classes), drawn)
    return None if weights is None else weights.to(network.mean.device)


def _labels(fresh: LabelledPictures, memory: LabelledPictures | None) -> Tensor:
    """Give the labels of all that is trained on."""
    return fresh.labels if memory is None else torch.cat([fresh.labels, memory.labels])


def _validated(
    job: _Job,
    number: int,
    train_loss: float,
    validation: tuple[LabelledPictures, ...],
    rate: float,
) -> Epoch:
    with evaluating(job.network), job.autocast:
        found = [train_loss, *mean_loss(job.network, validation, job.team)]
        trained, loss, accuracy = job.team.agree(found)
        return Epoch(number, trained, loss, accuracy, rate)


def _moved(value: Tensor, device: torch.device) -> Tensor:
    """Copy to the device, where there is one, without waiting for it."""
    return value if device.type == "cpu" else value.pin_memory().to(device, non_blocking=True)


def _snapshot(network: Network, without: Collection[str] = ()) -> dict[str, Tensor]:
    state = network.state_dict()
    return {name: state[name].detach().clone() for name in state if name not in without}
