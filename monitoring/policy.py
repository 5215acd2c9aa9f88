"""What follows from a check: a pure decision, with its reason in words."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Annotated

from pydantic import PlainValidator
from scipy import stats

from monitoring.accuracy import MAX_NOVELTY, Pooled
from monitoring.probation import Comparison
from monitoring.triggers import (
    DEFAULT_TRIGGER,
    LAST_CHECKS,
    LEAST_CHECKS,
    MAX_DAYS,
    AtLeast,
    Limit,
    Measure,
    Schedule,
    Sign,
    Trigger,
    clause,
    parse_trigger,
)
from monitoring.words import count, number, p_words

ROUNDING = 1e-9
"""`.90 - .85` is a hair more than `.05`; a limit is met up to this much."""
MIN_SETTLED = 30
"""Labels that overrule an estimate: they are within about 18 points of the truth, no closer than
the estimate on a foreign batch (8-15 points), but not always too rosy as it is."""
ROLLBACK_SHARE = 0.5
"""A version goes back for half of the fall that makes it learn: going back costs seconds and no
labels, but for a point or two, which thousands of labels prove, it would undo what was learned."""
MAX_SKEW = timedelta(days=1)
"""No clock or time zone is off by more; a date farther in the future is a wrong one, and counting
it as now would forbid training until then."""
TOLD_SKEW = timedelta(minutes=1)
LEVEL = 0.025
"""At which labels show a fall: that of the upper end of a 95 % interval."""
MANY_LABELS = 100_000
MANY_TIMES = 100
"""Labels, and times the reference's, so many that their own error is nothing beside its."""
FINEST_FALL = 1e-5
"""For a smaller one no number of labels is looked for: it would be in the thousands of millions."""


class FreshFrom(StrEnum):
    """Which fresh labels count towards a retraining that an alarm calls for."""

    ALL = "all"
    ALARM = "alarm"


@dataclass(frozen=True)
class PolicySettings:
    """When a new model is made, or the one before comes back; a value out of range is a ValueError.

    Args:
        retrain_when: triggers, composed; see `parse_trigger` for how TOML says it.
        min_drop: fall in accuracy, estimated or settled, that counts as damage.
        min_labels: fresh labels without which nothing is trained.
        min_classes: classes that these labels need to cover.
        fresh_from: after an alarm, whether labels of all batches count, or those of batches from
            the first that rang against the champion on.
        cooldown_hours: time after a training, promotion or rollback in which nothing is trained.
        max_retrains: trainings in any `budget_days`; 0 for no limit.
        budget_days: the period of `max_retrains`.
        probation_days: time after a promotion in which the version before may come back by itself;
            0 for none.
        rollback_alpha: chance that it comes back although it is no better, over all of probation.

    """

    retrain_when: Annotated[Trigger, PlainValidator(parse_trigger)] = DEFAULT_TRIGGER
    min_drop: float = 0.05
    min_labels: int = 100
    min_classes: int = 2
    fresh_from: FreshFrom = FreshFrom.ALARM
    cooldown_hours: float = 0
    max_retrains: int = 0
    budget_days: float = 30
    probation_days: float = 14
    rollback_alpha: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.min_drop < 1:
            raise ValueError(f"min_drop={self.min_drop} is no share between 0 and 1")
        if self.min_labels < 1:
            raise ValueError(f"min_labels={self.min_labels}: at least 1 label is needed to train")
        if self.min_classes < 1:
            raise ValueError(f"min_classes={self.min_classes}: labels are of at least 1 class")
        if not 0 <= self.cooldown_hours <= 24 * MAX_DAYS:
            raise ValueError(f"cooldown_hours={self.cooldown_hours} is no time: 0 for none")
        if self.max_retrains < 0:
            raise ValueError(f"max_retrains={self.max_retrains} is no number: 0 for no limit")
        if not 0 < self.budget_days <= MAX_DAYS:
            raise ValueError(
                f"budget_days={self.budget_days} is no period: max_retrains = 0 for no limit"
            )
        if not 0 <= self.probation_days <= MAX_DAYS:
            raise ValueError(f"probation_days={self.probation_days} is no time: 0 for none")
        if not 0 < self.rollback_alpha < 1:
            raise ValueError(f"rollback_alpha={self.rollback_alpha} is no share between 0 and 1")


def describe(settings: PolicySettings) -> str:
    """Say in one sentence what makes a policy retrain and roll back."""
    labels = count(settings.min_labels, "fresh label")
    limits = [f"on at least {labels} of {count(settings.min_classes, 'class', 'classes')}"]
    if settings.fresh_from is FreshFrom.ALARM:
        limits[0] += " (after an alarm those of batches from the first that rang on)"
    if settings.cooldown_hours:
        limits.append(f"not within {settings.cooldown_hours:g} hours of the last change")
    if settings.max_retrains:
        times = count(settings.max_retrains, "time")
        limits.append(f"at most {times} in {settings.budget_days:g} days")
    back = (
        f"rolls back within {settings.probation_days:g} days of a promotion when the version "
        "before is shown to be better by "
        f"{settings.min_drop * ROLLBACK_SHARE:g} or more (p at most {settings.rollback_alpha:g})"
        if settings.probation_days
        else "never rolls back by itself"
    )
    if settings.retrain_when is Sign.NEVER:
        return f"Never retrains; {back}."
    when = clause(settings.retrain_when, f"fallen by {settings.min_drop:g} or more")
    return f"Retrains when {when}, {', '.join(limits)}; {back}."


@dataclass(frozen=True)
class Evidence:
    """What a check found.

    Args:
        batch_id: the batch.
        alarm: whether the data changed: the stream of batches if `stream` is told, else the batch
            at the rate `alpha`.
        p_value: of the joint test.
        alpha: declared share of false alarms.
        estimated: accuracy on the batch, estimated without labels.
        reference: accuracy on the held-out reference.
        settled: accuracy on the batch's labelled samples, if there are any.
        settled_n: how many those are.
        settled_high: upper end of the 95 % interval of `settled`.
        novelty: share of samples unlike any that the reference knows.
        believable: False when so many are novel that the estimate says little; labels decide then.
        stream: what rings for the stream and how often by chance, in words, such as "false alarms:
            at most one in 1,000 batches on average"; empty when each batch rings for itself.
        before: how the version before the champion does on the labels since, if it was asked.
        distance: how far the batch is from the reference, None where no kernel measured it.
        distance_rank: the share of the last checks' distances that it exceeds, None after too few.
        estimated_high: upper end of the 95 % interval of `estimated`.
        pooled: what labels told of the batches that rang, if they told anything.
        reference_n: labels that tell `reference`, which counts as exact if that is not known (0).

    """

    batch_id: str
    alarm: bool
    p_value: float
    alpha: float
    estimated: float
    reference: float
    settled: float | None = None
    settled_n: int = 0
    settled_high: float | None = None
    novelty: float = 0.0
    believable: bool = True
    stream: str = ""
    before: Comparison | None = None
    distance: float | None = None
    distance_rank: float | None = None
    estimated_high: float = math.nan
    pooled: Pooled | None = None
    reference_n: int = 0

    @property
    def peers(self) -> Pooled | None:
        """Labelled batches to hold the estimate against: those that rang, if this one did."""
        enough = self.alarm and self.pooled is not None and self.pooled.n >= MIN_SETTLED
        return self.pooled if enough else None

    @property
    def corrected(self) -> float:
        """The estimate, less what it was off by on the labelled batches that rang.

        A drift that does no harm may make estimates too dark, one that does may leave them too
        rosy, and either in all its batches alike.
        """
        off = self.peers.off if self.peers is not None else 0.0
        return min(max(self.estimated - off, 0.0), 1.0)

    @property
    def corrected_high(self) -> float:
        """Upper end of the 95 % interval of `corrected`."""
        by_chance = self.peers.off_by_chance if self.peers is not None else 0.0
        return self.corrected + math.hypot(self.estimated_high - self.estimated, by_chance)


@dataclass(frozen=True)
class FreshLabels:
    """Labelled samples that the champion has not learned from: how many, of how many classes.

    `of` says of which batches, where only some count.
    """

    n: int
    classes: int
    of: str = ""


@dataclass(frozen=True)
class History:
    """What happened before, all times with a time zone.

    Args:
        last_promotion: of the champion.
        last_rollback: of any version.
        last_training: from the champion.
        remade: a version that these very labels already made from this champion, in words, such as
            "version 2, which was rolled back".
        trainings: all of them, for the budget; `last_training` need not be among them.
        last_training_seconds: what the last one took.
        batches_since_training: batches checked since.
        samples_since_training: and their samples.

    """

    last_promotion: datetime | None = None
    last_rollback: datetime | None = None
    last_training: datetime | None = None
    remade: str | None = None
    trainings: tuple[datetime, ...] = ()
    last_training_seconds: float | None = None
    batches_since_training: int = 0
    samples_since_training: int = 0

    @property
    def trained(self) -> tuple[datetime, ...]:
        """All trainings, oldest first."""
        last = () if self.last_training is None else (self.last_training,)
        return tuple(sorted({*self.trainings, *last}))


class Action(StrEnum):
    """What to do after a check, the weightier the later."""

    NONE = "none"
    WATCH = "watch"
    ASK_FOR_LABELS = "ask_for_labels"
    RETRAIN = "retrain"
    ROLLBACK = "rollback"


@dataclass(frozen=True)
class Decision:
    """What to do, and why, in a few sentences with figures.

    Args:
        action: what to do.
        reason: why.
        suppressed: why a change was not answered by a retraining, None if that was not the case.
        saved: what such a retraining would have cost, in words.

    """

    action: Action
    reason: str
    suppressed: str | None = None
    saved: str = ""


def decide(
    evidence: Evidence,
    labels: FreshLabels,
    history: History,
    now: datetime,
    settings: PolicySettings,
) -> Decision:
    """Turn what was measured into one action.

    A version on probation that is shown worse than the one before goes back, whatever else holds.
    When `retrain_when` is met: retrain, unless labels are missing, these labels were tried
    already, the last change is too young or the budget is spent. When only labels can tell whether
    it is met: ask for them. Else: watch if the data changed or labels show damage, and none if not.
    Thirty labels that do not show a fall overrule an estimate that does.

    Raises:
        ValueError: if an accuracy is not a number, which would read as "no damage", or a time has
            no time zone.

    """
    if not (math.isfinite(evidence.estimated) and math.isfinite(evidence.reference)):
        raise ValueError(
            f"batch {evidence.batch_id}: accuracy estimated as {evidence.estimated}, reference "
            f"{evidence.reference}: without both there is nothing to decide on"
        )
    back = decide_rollback(evidence.before, history, now, settings)
    known, skew = _plausible(history, now)
    decision = back or _decide(_Case(evidence, labels, known, now, settings))
    return replace(decision, reason=f"{decision.reason} {skew}") if skew else decision


def on_probation(history: History, now: datetime, settings: PolicySettings) -> bool:
    """Whether the champion was promoted so lately that the version before may come back.

    A champion that came by a rollback is on no probation, so two versions do not take turns.

    Raises:
        ValueError: if a time has no time zone.

    """
    _refuse_naive(history, now)
    if history.last_promotion is None or settings.probation_days == 0:
        return False
    if history.last_rollback is not None and history.last_rollback >= history.last_promotion:
        return False
    return now - history.last_promotion <= timedelta(days=settings.probation_days)


def decide_rollback(
    before: Comparison | None, history: History, now: datetime, settings: PolicySettings
) -> Decision | None:
    """Roll back a champion on probation that is shown worse than the one before, else None.

    Raises:
        ValueError: if a time has no time zone.

    """
    probation = on_probation(history, now, settings)
    if before is None or not probation or before.n < MIN_SETTLED:
        return None
    lost = (before.right_before - before.right_now) / before.n
    if before.p_value > settings.rollback_alpha or lost < (
        settings.min_drop * ROLLBACK_SHARE - ROUNDING
    ):
        return None
    promoted = max(timedelta(0), now - (history.last_promotion or now))
    return Decision(
        Action.ROLLBACK,
        f"The champion is worse than version {before.version}, the one before it: of the "
        f"{count(before.n, 'sample')} labelled since the promotion it has {before.right_now} "
        f"right, and version {before.version} has {before.right_before} "
        f"(p {p_words(before.p_value)}, however often it is looked at; "
        f"{settings.rollback_alpha:g} is enough). It was promoted {_days(promoted)} "
        f"days ago and is on probation for {settings.probation_days:g} days.",
    )


@dataclass(frozen=True)
class _Case:
    """All that a decision depends on; the history's times are not after `now`."""

    evidence: Evidence
    labels: FreshLabels
    history: History
    now: datetime
    settings: PolicySettings

    @property
    def estimate_fell(self) -> bool:
        """Whether the estimate shows a fall, and no labels overrule it."""
        evidence, settings = self.evidence, self.settings
        if _labels_overrule(evidence, settings):
            return False
        fell = has_fallen(evidence.reference, evidence.corrected, settings.min_drop)
        return fell and (evidence.peers is None or evidence.corrected_high < evidence.reference)

    @property
    def unknown(self) -> bool:
        """Whether the estimate says nothing, and no label does."""
        return not self.evidence.believable and self.evidence.settled is None

    @property
    def last_training(self) -> datetime | None:
        """The last training; the champion's promotion if none is on record."""
        return max(self.history.trained, default=self.history.last_promotion)


LACKING = {
    Sign.DRIFT: "the data is not shown to have changed",
    Sign.ESTIMATED_DAMAGE: "the estimate shows no fall",
    Sign.TRUE_DAMAGE: "labels show no fall",
}


@dataclass(frozen=True)
class _Reading:
    """Whether a trigger is met, None if only labels can tell, and the simple ones that decide it.

    `told` has their words, but for those that the account of the batch gives anyway.
    """

    met: bool | None
    signs: tuple[Sign, ...] = ()
    told: tuple[str, ...] = ()


def _decide(case: _Case) -> Decision:
    reading = _read(case.settings.retrain_when, case)
    if reading.met is None:
        return _ask(case)
    if not reading.met:
        return _stay(case, reading)
    due = f"{_account(case, told=True)}{_due(case, reading)}"
    obstacle = _obstacle(case)
    if obstacle is not None:
        return replace(obstacle, reason=f"{due} {obstacle.reason}")
    return Decision(
        Action.RETRAIN,
        f"{due} There are {count(case.labels.n, 'fresh label')} of "
        f"{count(case.labels.classes, 'class', 'classes')} to learn from.",
    )


def _ask(case: _Case) -> Decision:
    """Ask for labels, for only they can tell whether a trigger is met."""
    evidence = case.evidence
    obstacle = _obstacle(case)
    wanted = (
        obstacle.reason
        if obstacle is not None and obstacle.action is Action.ASK_FOR_LABELS
        else "Label some of it."
    )
    why = (
        _fell_words(evidence)
        if case.estimate_fell
        else f"{evidence.novelty:.0%} of it is unlike anything known, so the estimated accuracy of "
        f"{evidence.estimated:.3f} is not to be believed"
        if evidence.novelty > MAX_NOVELTY
        else "the model tells no confidence that accuracy could be estimated from"
    )
    return Decision(
        Action.ASK_FOR_LABELS,
        f"{_change(evidence)}, {'and' if evidence.alarm else 'but'} only labels can tell whether "
        f"it hurts: {why}. {wanted}",
    )


def _stay(case: _Case, reading: _Reading) -> Decision:
    """Do not train, for `retrain_when` is not met."""
    evidence, settings = case.evidence, case.settings
    shown = _true_damage(evidence, settings)
    damage = _damage(case) if evidence.alarm else shown
    lacking = [*reading.told]
    if damage is not None:
        lacking += [LACKING[sign] for sign in reading.signs if sign in LACKING]
    reason = _account(case, told=shown is not None)
    if lacking:
        reason += f" Not due: {', '.join(lacking)}."
    if damage is None:
        if not evidence.alarm:
            return Decision(Action.NONE, reason)
        why = ", ".join(["not shown to hurt", *lacking])
        return Decision(Action.WATCH, reason, why, _cost(case, "was not needed"))
    missing = _labels_to_be_due(case)
    if missing is not None:
        return Decision(
            Action.ASK_FOR_LABELS,
            f"{reason} {count(missing, 'label')} {'is' if missing == 1 else 'are'} missing.",
        )
    return Decision(Action.WATCH, reason, ", ".join(lacking), _cost(case, "was put off"))


def _labels_to_be_due(case: _Case) -> int | None:
    """Count the fresh labels that are missing to meet `retrain_when`, None if others are too."""
    trigger, here = case.settings.retrain_when, case.labels.n
    for n in sorted(int(limit) for limit in _label_limits(trigger) if limit > here):
        if _read(trigger, replace(case, labels=replace(case.labels, n=n))).met:
            return n - here
    return None


def _label_limits(trigger: Trigger) -> list[float]:
    match trigger:
        case Limit(Measure.FRESH_LABELS, limit):
            return [limit]
        case AtLeast(_, of):
            return [limit for one in of for limit in _label_limits(one)]
        case _:
            return []


def _change(evidence: Evidence) -> str:
    """Say whether the data changed, and what makes it be called so."""
    said = "changed" if evidence.alarm else "looks like the reference"
    p = p_words(evidence.p_value)
    if evidence.stream:
        return f"The stream of batches {said} (this batch: p {p}; {evidence.stream})"
    return f"The batch {said} (p {p}, alpha {evidence.alpha:g})"


def _account(case: _Case, *, told: bool) -> str:
    """Say whether the data changed and whether it hurts; without an alarm the latter if `told`."""
    evidence, settings = case.evidence, case.settings
    changed, damage = _change(evidence), _damage(case)
    if not evidence.alarm:
        return f"{changed}, but {damage}." if told and damage is not None else f"{changed}."
    if damage is not None:
        return f"{changed}, and it hurts: {damage}."
    return (
        f"{changed}, but it is not shown to hurt: accuracy is estimated at "
        f"{evidence.corrected:.3f} against {evidence.reference:.3f} on the reference"
        f"{_beside_estimate(evidence)}, and {_would_count(evidence, settings)}."
    )


def _due(case: _Case, reading: _Reading) -> str:
    """Say what makes a retraining due, where the account of the batch does not."""
    damage = _damage(case) is not None
    told = list(reading.told)
    if Sign.DRIFT in reading.signs and not damage:
        told.insert(0, "the change is enough")
    return f" A retraining is due: {', '.join(told)}." if told else ""


def _read(trigger: Trigger, case: _Case) -> _Reading:
    match trigger:
        case Sign():
            return _read_sign(trigger, case)
        case Limit(Measure.ACCURACY):
            return _read_accuracy(trigger, case)
        case Limit(Measure.DISTANCE | Measure.DISTANCE_RANK):
            return _read_distance(trigger, case.evidence)
        case Limit():
            return _read_amount(trigger, case)
        case Schedule():
            return _read_schedule(trigger, case)
        case AtLeast(n, of):
            readings = [_read(one, case) for one in of]
            met = sum(one.met is True for one in readings)
            open_ = sum(one.met is None for one in readings)
            verdict = True if met >= n else None if met + open_ >= n else False
            deciding = [one for one in readings if one.met is verdict]
            return _Reading(
                verdict,
                tuple(sign for one in deciding for sign in one.signs),
                tuple(words for one in deciding for words in one.told),
            )


def _read_sign(sign: Sign, case: _Case) -> _Reading:
    evidence, settings = case.evidence, case.settings
    shown = _true_damage(evidence, settings) is not None
    met: bool | None
    match sign:
        case Sign.ALWAYS:
            return _Reading(met=True, told=("at every check",))
        case Sign.NEVER:
            return _Reading(met=False, told=("the settings never retrain",))
        case Sign.DRIFT:
            met = evidence.alarm
        case Sign.ESTIMATED_DAMAGE:
            met = case.estimate_fell or (None if case.unknown else False)
        case Sign.TRUE_DAMAGE:
            few = case.estimate_fell and evidence.settled_n < MIN_SETTLED
            met = shown or (None if case.unknown or few else False)
        case Sign.DAMAGE:
            met = shown or case.estimate_fell or (None if case.unknown else False)
    return _Reading(met, (sign,))


def _read_accuracy(limit: Limit, case: _Case) -> _Reading:
    evidence = case.evidence
    if evidence.settled is not None and evidence.settled_n >= MIN_SETTLED:
        accuracy, source = evidence.settled, f"on {count(evidence.settled_n, 'label')}"
    else:
        accuracy, source = evidence.corrected, "by estimate"
    met = accuracy < limit.value - ROUNDING
    words = f"accuracy {accuracy:.3f} {source} (limit {number(limit.value)})"
    return _Reading(None if not met and case.unknown else met, told=(words,))


def _read_distance(limit: Limit, evidence: Evidence) -> _Reading:
    distance, rank = evidence.distance, evidence.distance_rank
    if distance is None:
        return _Reading(met=False, told=("no drift distance is on record",))
    said = f"drift distance {distance:.3f}"
    if limit.measure is Measure.DISTANCE:
        found = distance
    elif rank is None:
        few = f"{said}, with fewer than {LEAST_CHECKS} earlier ones to hold it against"
        return _Reading(met=False, told=(few,))
    else:
        said, found = f"{said}, above {rank:.0%} of the last {LAST_CHECKS} or fewer", rank
    met = found >= limit.value - ROUNDING
    return _Reading(met, told=(f"{said} (limit {number(limit.value)})",))


def _read_amount(limit: Limit, case: _Case) -> _Reading:
    last = case.last_training
    if limit.measure is Measure.DAYS:
        if last is None:
            return _Reading(met=True, told=("no training is on record",))
        amount = (case.now - last) / timedelta(days=1)
        words = f"{amount:.1f} days since the last training"
    elif limit.measure is Measure.FRESH_LABELS:
        amount = case.labels.n
        words = count(case.labels.n, "fresh label")
    elif limit.measure is Measure.BATCHES:
        amount = case.history.batches_since_training
        words = f"{count(amount, 'batch', 'batches')} since the last training"
    else:
        amount = case.history.samples_since_training
        words = f"{count(amount, 'sample')} since the last training"
    return _Reading(
        amount >= limit.value - ROUNDING, told=(f"{words} (limit {number(limit.value)})",)
    )


def _read_schedule(schedule: Schedule, case: _Case) -> _Reading:
    last = case.last_training
    if last is None:
        return _Reading(met=True, told=("no training is on record",))
    comes = schedule.after(last)
    met = comes <= case.now
    when = f"{comes:%Y-%m-%d %H:%M} {schedule.timezone}"
    return _Reading(met, told=(f"{'scheduled' if met else 'next scheduled'} for {when}",))


def _damage(case: _Case) -> str | None:
    """Say how much accuracy fell, or None if it is not shown to have fallen."""
    evidence = case.evidence
    shown = _true_damage(evidence, case.settings)
    if shown is None and case.estimate_fell:
        return _fell_words(evidence)
    return shown


def _fell_words(evidence: Evidence) -> str:
    return (
        f"accuracy probably fell by {evidence.reference - evidence.corrected:.3f}, from "
        f"{evidence.reference:.3f} to {evidence.corrected:.3f}{_beside_estimate(evidence)}"
    )


def _true_damage(evidence: Evidence, settings: PolicySettings) -> str | None:
    """Say what labels show, if the fall is as large as min_drop and not by chance.

    The more batches of a drift have labels, the surer one of them looks bad by chance: each is held
    against the limit at a level that is shared, and all of them together.
    """
    peers, reference = evidence.peers, evidence.reference
    if _own_labels_fell(evidence, settings):
        return (
            f"accuracy on {count(evidence.settled_n, 'label')} of it is {evidence.settled:.3f} "
            f"(at most {evidence.settled_high:.3f}) against {reference:.3f} on the reference"
        )
    if (
        peers is not None
        and has_fallen(reference, peers.accuracy, settings.min_drop)
        and _p_no_fall(evidence, peers.accuracy, peers.n) < LEVEL
        and not _labels_overrule(evidence, settings)
    ):
        return (
            f"accuracy on {count(peers.n, 'label')} of batches that rang is {peers.accuracy:.3f} "
            f"(at most {peers.high:.3f}) against {reference:.3f} on the reference"
        )
    return None


def _own_labels_fell(evidence: Evidence, settings: PolicySettings) -> bool:
    settled, peers = evidence.settled, evidence.peers
    if settled is None or evidence.settled_high is None:
        return False
    if not has_fallen(evidence.reference, settled, settings.min_drop):
        return False
    level = LEVEL / (peers.n_batches if peers is not None else 1)
    return _p_no_fall(evidence, settled, evidence.settled_n) < level


def _p_no_fall(evidence: Evidence, accuracy: float, n: int) -> float:
    """Give the chance of so low an accuracy on n labels, if it is no lower than the reference's.

    By Fisher's exact test, since the reference's own is known from so many labels only: were it
    exact, a reference of 100 would show a fall that is none in up to .095 of cases at .025.
    """
    right = round(accuracy * n)
    known, known_right = evidence.reference_n, round(evidence.reference * evidence.reference_n)
    if not known:
        return float(stats.binom.cdf(right, n, evidence.reference))
    return _as_low_by_chance(right, n, known_right, known)


def _as_low_by_chance(right: int, n: int, known_right: int, known: int) -> float:
    return float(stats.hypergeom.cdf(right, known + n, known_right + right, n))


def smallest_fall(reference: float, reference_n: int) -> float:
    """Give the smallest fall of accuracy that labels can show, however many come.

    The reference's accuracy is itself known from `reference_n` labels only, so that a smaller fall
    may be its error (see `_p_no_fall`; shown is what has a chance under `LEVEL`).

    Returns:
        A share in 0..1; 1 where none can be shown.
    """
    known_right = round(reference * reference_n)
    many = max(MANY_LABELS, MANY_TIMES * reference_n)
    low, high = -1, round(reference * many)  # shown, and not shown
    while high - low > 1:
        middle = (low + high) // 2
        if _as_low_by_chance(middle, many, known_right, reference_n) < LEVEL:
            low = middle
        else:
            high = middle
    return reference - low / many if low >= 0 else 1.0


def reference_needed(reference: float, min_drop: float) -> int:
    """Give how many labels the reference needs for a fall of `min_drop` to be shown.

    `reference` is over 0: an accuracy of 0 cannot fall.
    """
    min_drop = max(min_drop, FINEST_FALL)
    n = max(1, round(1.92 * reference * (1 - reference) / min_drop**2))  # half, if it were normal
    while smallest_fall(reference, n) > min_drop:
        n = math.ceil(1.1 * n) + 1
    return n


def has_fallen(before: float, now: float, min_drop: float) -> bool:
    """Whether an accuracy fell by as much as counts."""
    return before - now >= min_drop - ROUNDING


def _labels_overrule(evidence: Evidence, settings: PolicySettings) -> bool:
    """Whether enough labels say that accuracy did not fall."""
    return (
        evidence.settled is not None
        and evidence.settled_high is not None
        and evidence.settled_n >= MIN_SETTLED
        and evidence.settled_high >= evidence.reference
        and not has_fallen(evidence.reference, evidence.settled, settings.min_drop)
    )


def _would_count(evidence: Evidence, settings: PolicySettings) -> str:
    """Say why what looks like a fall is none."""
    if not has_fallen(evidence.reference, evidence.corrected, settings.min_drop):
        return f"a fall of {settings.min_drop:.3f} would count"
    if _labels_overrule(evidence, settings):
        return "labels decide: they show no fall, whatever the estimate says"
    return "so few labels and pictures may look so by chance: more labels decide"


def _beside_estimate(evidence: Evidence) -> str:
    """Say what labels told of the batch, and what they corrected the estimate by."""
    said = []
    if evidence.settled is not None:
        said.append(f"{evidence.settled:.3f} on {count(evidence.settled_n, 'label')}")
    if (peers := evidence.peers) is not None:
        labels, off = count(peers.n, "label"), peers.off
        way = "rosy" if off > 0 else "dark"
        said.append(
            f"{evidence.estimated:.3f} before correction: on {labels} of batches that rang, "
            f"estimates were {abs(off):.3f} too {way}"
        )
    return f" ({'; '.join(said)})" if said else ""


def _obstacle(case: _Case) -> Decision | None:
    """Name the first reason not to train, most lasting first."""
    labels, history, settings = case.labels, case.history, case.settings
    missing = settings.min_labels - labels.n
    if missing > 0:
        return Decision(
            Action.ASK_FOR_LABELS,
            f"{count(missing, 'label')} {'is' if missing == 1 else 'are'} missing: "
            f"{labels.n} of {settings.min_labels} are here{labels.of}.",
        )
    if labels.classes < settings.min_classes:
        return Decision(
            Action.ASK_FOR_LABELS,
            f"The {count(labels.n, 'fresh label')} cover "
            f"{count(labels.classes, 'class', 'classes')} and at least {settings.min_classes} are "
            "needed: label samples of other classes.",
        )
    if history.remade is not None:
        return Decision(
            Action.ASK_FOR_LABELS,
            f"These labels already made {history.remade}: it takes more labels, or a person who "
            "promotes it.",
        )
    waits = [wait for wait in (_cooldown(case), _budget(case)) if wait is not None]
    if not waits:
        return None
    wait = max(waits, key=lambda wait: wait.rest)
    return Decision(Action.WATCH, wait.words, wait.why, _cost(case, "was put off"))


@dataclass(frozen=True)
class _Wait:
    """Time in which nothing is trained, why, and the same as a sentence."""

    rest: timedelta
    why: str
    words: str


def _cooldown(case: _Case) -> _Wait | None:
    history, now, hours = case.history, case.now, case.settings.cooldown_hours
    changes = [
        (when, what)
        for when, what in (
            (history.last_training, "training"),
            (history.last_promotion, "promotion"),
            (history.last_rollback, "rollback"),
        )
        if when is not None
    ]
    if not changes:
        return None
    when, what = max(changes, key=lambda change: change[0])
    rest = timedelta(hours=hours) - (now - when)
    if rest <= timedelta(0):
        return None
    return _Wait(
        rest,
        f"cool-down of {hours:g} hours after the last {what}",
        f"The last {what} was {_hours(now - when)} hours ago and cool-down is {hours:g} hours: "
        f"nothing is trained for another {_hours(rest)} hours.",
    )


def _budget(case: _Case) -> _Wait | None:
    limit, days = case.settings.max_retrains, case.settings.budget_days
    period = timedelta(days=days)
    spent = [when for when in case.history.trained if case.now - when < period]
    if limit == 0 or len(spent) < limit:
        return None
    rest = period - (case.now - spent[-limit])
    return _Wait(
        rest,
        f"budget of {count(limit, 'training')} in {days:g} days",
        f"The budget is spent: {count(len(spent), 'training')} in the last {days:g} days, and "
        f"max_retrains is {limit}: nothing is trained for another {_days(rest)} days.",
    )


def _cost(case: _Case, became: str) -> str:
    """Say what the retraining that was not made would have cost."""
    seconds = case.history.last_training_seconds
    lasts = "" if seconds is None else f"about {seconds:.0f} s and "
    n = max(case.labels.n, case.settings.min_labels)
    return f"a retraining of {lasts}{count(n, 'label')} {became}"


def _plausible(history: History, now: datetime) -> tuple[History, str]:
    """Take times in the future as now, or, if no clock can be so wrong, as unknown; and say so."""
    times = {
        "promotion": history.last_promotion,
        "rollback": history.last_rollback,
        "training": max(history.trained, default=None),
    }
    known = replace(
        history,
        last_promotion=_seen(history.last_promotion, now),
        last_rollback=_seen(history.last_rollback, now),
        last_training=_seen(history.last_training, now),
        trainings=tuple(t for t in (_seen(t, now) for t in history.trainings) if t is not None),
    )
    ahead = [(when - now, what) for what, when in times.items() if when is not None]
    skew, what = max(ahead, default=(timedelta(0), ""))
    if skew <= TOLD_SKEW:
        return known, ""
    became = "counts as now" if skew <= MAX_SKEW else "is left out"
    return known, (
        f"The last {what} is dated {_hours(skew)} hours in the future, so it {became}: the clock "
        "of the machine that made it is ahead, or this one is behind."
    )


def _seen(when: datetime | None, now: datetime) -> datetime | None:
    return None if when is None or when - now > MAX_SKEW else min(when, now)


def _refuse_naive(history: History, now: datetime) -> None:
    for name, when in (
        ("now", now),
        ("last_promotion", history.last_promotion),
        ("last_rollback", history.last_rollback),
        ("last_training", history.last_training),
        *(("trainings", when) for when in history.trainings),
    ):
        if when is not None and when.tzinfo is None:
            raise ValueError(
                f"{name} = {when.isoformat()} has no time zone, so hours cannot be counted: "
                "use datetime.now(UTC), or replace(tzinfo=UTC) if it was meant so"
            )


def _hours(span: timedelta) -> str:
    return f"{span / timedelta(hours=1):.1f}"


def _days(span: timedelta) -> str:
    return f"{span / timedelta(days=1):.1f}"
