"""What follows from a check: a pure decision, with its reason in words."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

ROUNDING = 1e-9
"""`.90 - .85` is a hair more than `.05`; a limit is met up to this much."""
MIN_SETTLED = 30
"""Labels that overrule an estimate: they are within about 18 points of the truth, no closer than
the estimate on a foreign batch (8-15 points), but not always too rosy as it is."""


@dataclass(frozen=True)
class PolicySettings:
    """When drift is answered by a new model; a value out of its range is a ValueError.

    Args:
        min_drop: fall in accuracy, estimated or settled, that counts as damage.
        min_labels: fresh labels without which nothing is trained.
        min_classes: classes that these labels need to cover.
        cooldown_hours: time after a training, promotion or rollback in which nothing is trained.

    """

    min_drop: float = 0.05
    min_labels: int = 100
    min_classes: int = 2
    cooldown_hours: float = 0

    def __post_init__(self) -> None:
        if not 0 < self.min_drop < 1:
            raise ValueError(f"min_drop={self.min_drop} is no share between 0 and 1")
        if self.min_labels < 1:
            raise ValueError(f"min_labels={self.min_labels}: at least 1 label is needed to train")
        if self.min_classes < 1:
            raise ValueError(f"min_classes={self.min_classes}: labels are of at least 1 class")
        if not self.cooldown_hours >= 0:
            raise ValueError(f"cooldown_hours={self.cooldown_hours} is no time: 0 for none")


@dataclass(frozen=True)
class Evidence:
    """What a check found.

    Args:
        batch_id: the batch.
        alarm: whether it changed, at the rate `alpha`.
        p_value: of the joint test.
        alpha: declared share of false alarms.
        estimated: accuracy on the batch, estimated without labels.
        reference: accuracy on the held-out reference.
        settled: accuracy on the batch's labelled samples, if there are any.
        settled_n: how many those are.
        settled_high: upper end of the 95 % interval of `settled`.
        novelty: share of samples unlike any that the reference knows.
        believable: False when so many are novel that the estimate says little; labels decide then.

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


@dataclass(frozen=True)
class FreshLabels:
    """Labelled samples that the champion has not learned from: how many, of how many classes."""

    n: int
    classes: int


@dataclass(frozen=True)
class History:
    """What happened before, all times with a time zone.

    `remade` names a version that these very labels already made from this champion, in words, such
    as "version 2, which was rolled back".
    """

    last_promotion: datetime | None = None
    last_rollback: datetime | None = None
    last_training: datetime | None = None
    remade: str | None = None


class Action(StrEnum):
    """What to do after a check."""

    NONE = "none"
    WATCH = "watch"
    ASK_FOR_LABELS = "ask_for_labels"
    RETRAIN = "retrain"


@dataclass(frozen=True)
class Decision:
    """What to do, and why, in one or two sentences with figures."""

    action: Action
    reason: str


def decide(
    evidence: Evidence,
    labels: FreshLabels,
    history: History,
    now: datetime,
    settings: PolicySettings,
) -> Decision:
    """Turn what was measured into one action.

    No alarm: none. An alarm without damage: watch, or ask for labels when the estimate cannot be
    believed and no label tells. Thirty labels that do not show a fall overrule an estimate that
    does. With damage: retrain, unless labels are missing,
    these labels were tried already, or the last change is too young.

    Raises:
        ValueError: if an accuracy is not a number, which would read as "no damage".

    """
    if not (math.isfinite(evidence.estimated) and math.isfinite(evidence.reference)):
        raise ValueError(
            f"batch {evidence.batch_id}: accuracy estimated as {evidence.estimated}, reference "
            f"{evidence.reference}: without both there is nothing to decide on"
        )
    if not evidence.alarm:
        return Decision(
            Action.NONE,
            f"The batch looks like the reference (p {_p(evidence.p_value)}, alpha "
            f"{evidence.alpha:g}).",
        )
    changed = f"The batch changed (p {_p(evidence.p_value)}, alpha {evidence.alpha:g})"
    damage = _damage(evidence, settings)
    obstacle = _obstacle(labels, history, now, settings)
    if damage is None and not evidence.believable and evidence.settled is None:
        wanted = (
            obstacle[1]
            if obstacle is not None and obstacle[0] is Action.ASK_FOR_LABELS
            else "Label some of it."
        )
        return Decision(
            Action.ASK_FOR_LABELS,
            f"{changed}, and only labels can tell whether it hurts: {evidence.novelty:.0%} of it "
            f"is unlike anything known, so the estimated accuracy of {evidence.estimated:.3f} is "
            f"not to be believed. {wanted}",
        )
    if damage is None:
        return Decision(
            Action.WATCH,
            f"{changed}, but it is not shown to hurt: accuracy is estimated at "
            f"{evidence.estimated:.3f} against {evidence.reference:.3f} on the reference"
            f"{_settled_words(evidence)}, and {_would_count(evidence, settings)}.",
        )
    hurts = f"{changed}, and it hurts: {damage}."
    if obstacle is not None:
        action, words = obstacle
        return Decision(action, f"{hurts} {words}")
    return Decision(
        Action.RETRAIN,
        f"{hurts} There are {_count(labels.n, 'fresh label')} of "
        f"{_count(labels.classes, 'class', 'classes')} to learn from.",
    )


def _damage(evidence: Evidence, settings: PolicySettings) -> str | None:
    """Say how much accuracy fell, or None if it is not shown to have fallen."""
    # Labels count when the fall is as large as min_drop and not by chance.
    if (
        evidence.settled is not None
        and evidence.settled_high is not None
        and evidence.reference - evidence.settled >= settings.min_drop - ROUNDING
        and evidence.settled_high < evidence.reference
    ):
        return (
            f"accuracy on {_count(evidence.settled_n, 'label')} of it is {evidence.settled:.3f} "
            f"(at most {evidence.settled_high:.3f}) against {evidence.reference:.3f} on the "
            "reference"
        )
    if _estimate_fell(evidence, settings) and not _labels_overrule(evidence, settings):
        return (
            f"accuracy probably fell by {evidence.reference - evidence.estimated:.3f}, from "
            f"{evidence.reference:.3f} to {evidence.estimated:.3f}{_settled_words(evidence)}"
        )
    return None


def _estimate_fell(evidence: Evidence, settings: PolicySettings) -> bool:
    fall = evidence.reference - evidence.estimated
    return fall >= settings.min_drop - ROUNDING


def _labels_overrule(evidence: Evidence, settings: PolicySettings) -> bool:
    """Whether enough labels say that accuracy did not fall."""
    return (
        evidence.settled is not None
        and evidence.settled_high is not None
        and evidence.settled_n >= MIN_SETTLED
        and evidence.settled_high >= evidence.reference
        and evidence.reference - evidence.settled < settings.min_drop - ROUNDING
    )


def _would_count(evidence: Evidence, settings: PolicySettings) -> str:
    """Say why what looks like a fall is none."""
    if _estimate_fell(evidence, settings):
        return "labels decide: they show no fall, whatever the estimate says"
    return f"a fall of {settings.min_drop:.3f} would count"


def _settled_words(evidence: Evidence) -> str:
    if evidence.settled is None:
        return ""
    return f" ({evidence.settled:.3f} on {_count(evidence.settled_n, 'label')})"


def _obstacle(
    labels: FreshLabels, history: History, now: datetime, settings: PolicySettings
) -> tuple[Action, str] | None:
    """Name the first reason not to train, most lasting first."""
    missing = settings.min_labels - labels.n
    if missing > 0:
        return Action.ASK_FOR_LABELS, (
            f"{_count(missing, 'label')} {'is' if missing == 1 else 'are'} missing: "
            f"{labels.n} of {settings.min_labels} are here."
        )
    if labels.classes < settings.min_classes:
        return Action.ASK_FOR_LABELS, (
            f"The {_count(labels.n, 'fresh label')} cover "
            f"{_count(labels.classes, 'class', 'classes')} and at least {settings.min_classes} are "
            "needed: label samples of other classes."
        )
    if history.remade is not None:
        return Action.ASK_FOR_LABELS, (
            f"These labels already made {history.remade}: it takes more labels, or a person who "
            "promotes it."
        )
    changes = [
        (when, what)
        for when, what in (
            (history.last_training, "training"),
            (history.last_promotion, "promotion"),
            (history.last_rollback, "rollback"),
        )
        if when is not None
    ]
    if changes:
        when, what = max(changes, key=lambda change: change[0])
        rest = when + timedelta(hours=settings.cooldown_hours) - now
        if rest > timedelta(0):
            return Action.WATCH, (
                f"The last {what} was {_hours(now - when)} hours ago and cool-down is "
                f"{settings.cooldown_hours:g} hours: nothing is trained for another "
                f"{_hours(rest)} hours."
            )
    return None


def _hours(span: timedelta) -> str:
    return f"{span / timedelta(hours=1):.1f}"


def _p(value: float) -> str:
    return f"= {value:.2g}" if value >= 1e-4 else "under .0001"  # noqa: PLR2004


def _count(n: int, noun: str, plural: str | None = None) -> str:
    return f"{n} {noun if n == 1 else plural or noun + 's'}"
