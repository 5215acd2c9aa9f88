"""The gate: is the challenger better where it should be, and no worse where it must not be?

Challenger and champion answer the *same* held-out samples, now. "At least as accurate", the rule of
tutorials, promotes a challenger that is no better in about .55 of cases at any size; these rules
state their chance of error instead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from sft.evaluate import Answers


@dataclass(frozen=True)
class GateSettings:
    """When a challenger may be promoted.

    Attributes:
        alpha: chance of promoting one that is no better on fresh data. The K-th challenger that a
            hold-out judges has alpha/K: ten that are counted beforehand stay below alpha together,
            ten that come one after another do not (.07 to .11 measured for .05).
        min_fresh: fewest fresh hold-out samples for a verdict: with 100, a gain of 20 points is
            seen in more than nine of ten cases.
        max_drop: largest fall of accuracy on the old hold-out.
        max_drop_bound: largest fall that the 95 % lower bound may allow; 2 points as a bound would
            need over 900 samples.
        max_class_drop: a class that falls by more, significantly, has collapsed.
    """

    alpha: float = 0.05
    min_fresh: int = 100
    max_drop: float = 0.02
    max_drop_bound: float = 0.05
    max_class_drop: float = 0.15

    def __post_init__(self) -> None:
        """Refuse values outside their range, by name."""
        for name in ("alpha", "max_drop", "max_drop_bound", "max_class_drop"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must lie between 0 and 1, got {getattr(self, name)}")
        if self.min_fresh < 1:
            raise ValueError(f"min_fresh must be at least 1, got {self.min_fresh}")


class Outcome(StrEnum):
    """What the gate says."""

    PROMOTE = "promote"
    REFUSE = "refuse"
    INCONCLUSIVE = "inconclusive"


@dataclass(frozen=True)
class Criterion:
    """One rule of the gate: what was asked, the figures, and whether it holds."""

    name: str
    passed: bool
    words: str


@dataclass(frozen=True)
class Verdict:
    """The gate's answer; `missing` fresh labels would decide an inconclusive one."""

    outcome: Outcome
    criteria: tuple[Criterion, ...]
    missing: int = 0

    @property
    def reason(self) -> str:
        """One sentence: what decided."""
        failed = [c.words for c in self.criteria if not c.passed]
        if self.outcome is Outcome.INCONCLUSIVE:
            return (
                f"not enough evidence, about {self.missing} more labels are needed: "
                + "; ".join(failed)
            )
        return "; ".join(failed or [c.words for c in self.criteria])


@dataclass(frozen=True)
class Pair:
    """Champion and challenger on the same samples, in the same order."""

    champion: Answers
    challenger: Answers

    def __post_init__(self) -> None:
        """Refuse answers to different questions."""
        if not np.array_equal(self.champion.labels, self.challenger.labels):
            raise ValueError("champion and challenger did not answer the same samples")

    @property
    def gained(self) -> int:
        """How many samples only the challenger answers rightly."""
        return int((self.challenger.right & ~self.champion.right).sum())

    @property
    def lost(self) -> int:
        """How many samples only the champion answers rightly."""
        return int((self.champion.right & ~self.challenger.right).sum())

    def __len__(self) -> int:
        return len(self.champion.labels)


def judge(
    fresh: Pair,
    old: Pair,
    settings: GateSettings,
    *,
    classes: Sequence[str],
    judged_before: int = 0,
) -> Verdict:
    """Judge a challenger.

    Args:
        fresh: answers on the fresh hold-out.
        old: answers on the old hold-out.
        settings: the rules.
        classes: names of the classes, in the order of the labels.
        judged_before: challengers that this fresh hold-out has judged already; the level is divided
            by their number and this one's.
    """
    better = _better_on_fresh(fresh, settings, judged_before + 1)
    kept = _kept_on_old(old, settings)
    collapsed = _no_class_collapses(fresh, old, settings, classes)
    criteria = (better, kept, collapsed)
    if all(c.passed for c in criteria):
        return Verdict(Outcome.PROMOTE, criteria)
    missing = _missing_labels(fresh, settings, judged_before + 1)
    if kept.passed and collapsed.passed and missing:
        return Verdict(Outcome.INCONCLUSIVE, criteria, missing)
    return Verdict(Outcome.REFUSE, criteria)


def mcnemar(gained: int, lost: int) -> float:
    """Exact one-sided p-value that the challenger is no better (McNemar 1947, binomial form)."""
    if gained + lost == 0:
        return 1.0
    return float(stats.binomtest(gained, gained + lost, 0.5, alternative="greater").pvalue)


def difference_bound(gained: int, lost: int, n: int) -> float:
    """Lower 95 % bound of the gain in accuracy (Bonett and Price 2012, adjusted Wald)."""
    p_gain, p_loss = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    gain = p_gain - p_loss
    return gain - 1.645 * math.sqrt((p_gain + p_loss - gain**2) / (n + 2))


def samples_for_power(gain: float, discordance: float, *, level: float = 0.05) -> int:
    """How many samples show a gain with 80 % power (McNemar, one-sided, normal form).

    Args:
        gain: difference of accuracies, D.
        discordance: share of samples on which the two differ, d ≥ D.
        level: of the test.
    """
    spread = max(0.0, discordance - gain**2)
    z = float(stats.norm.isf(level))
    return math.ceil((z * math.sqrt(discordance) + 0.84 * math.sqrt(spread)) ** 2 / gain**2)


def _better_on_fresh(fresh: Pair, settings: GateSettings, tries: int) -> Criterion:
    level = settings.alpha / tries
    p_value = mcnemar(fresh.gained, fresh.lost)
    enough = len(fresh) >= settings.min_fresh
    if not len(fresh):
        words = f"fresh hold-out: no sample has a label, and {settings.min_fresh} are asked for"
        return Criterion("better on fresh data", passed=False, words=words)
    words = (
        f"fresh hold-out ({len(fresh)} samples): {_percent(fresh.champion.accuracy)} →"
        f" {_percent(fresh.challenger.accuracy)}, gained {fresh.gained}, lost {fresh.lost}, exact"
        f" McNemar p = {p_value:.2g} against a level of {level:.2g}"
    )
    if not enough:
        words += f", and at least {settings.min_fresh} samples are asked for"
    return Criterion("better on fresh data", enough and p_value <= level, words)


def _kept_on_old(old: Pair, settings: GateSettings) -> Criterion:
    name = "no worse on old data"
    if not len(old):
        return Criterion(name, passed=False, words="old hold-out: there is no sample")
    change = (old.gained - old.lost) / len(old)
    bound = difference_bound(old.gained, old.lost, len(old))
    passed = change >= -settings.max_drop and bound > -settings.max_drop_bound
    return Criterion(
        name,
        passed,
        f"old hold-out ({len(old)} samples): {_percent(old.champion.accuracy)} →"
        f" {_percent(old.challenger.accuracy)}, difference {change * 100:+.1f} points (at least"
        f" {-settings.max_drop * 100:+.0f}), lower 95 % bound {bound * 100:+.1f} (over"
        f" {-settings.max_drop_bound * 100:+.0f})",
    )


def _no_class_collapses(
    fresh: Pair, old: Pair, settings: GateSettings, classes: Sequence[str]
) -> Criterion:
    before = np.concatenate([fresh.champion.right, old.champion.right])
    after = np.concatenate([fresh.challenger.right, old.challenger.right])
    members = [
        np.concatenate([pair.champion.of_class(index) for pair in (fresh, old)])
        for index in range(len(classes))
    ]
    occurring = [index for index, rows in enumerate(members) if rows.any()]
    fallen = [
        f"{classes[index]} {_percent(float(before[members[index]].mean()))} →"
        f" {_percent(float(after[members[index]].mean()))}"
        for index in occurring
        if _collapsed(
            before[members[index]],
            after[members[index]],
            settings.max_class_drop,
            settings.alpha / len(occurring),
        )
    ]
    words = (
        f"classes that collapsed: {', '.join(fallen)}"
        if fallen
        else f"none of {len(occurring)} classes fell by over {settings.max_class_drop * 100:.0f}"
        " points"
    )
    return Criterion("no class collapses", not fallen, words)


def _collapsed(
    before: NDArray[np.bool_], after: NDArray[np.bool_], most: float, level: float
) -> bool:
    lost, gained = int((before & ~after).sum()), int((after & ~before).sum())
    return (lost - gained) / len(before) > most and mcnemar(lost, gained) <= level


def _missing_labels(fresh: Pair, settings: GateSettings, tries: int) -> int:
    """How many more fresh labels would decide; 0 when more would not help."""
    n = len(fresh)
    missing_holdout = max(0, settings.min_fresh - n)
    gain = (fresh.gained - fresh.lost) / n if n else 0.0
    level = settings.alpha / tries
    if gain > 0 and mcnemar(fresh.gained, fresh.lost) > level:
        discordance = (fresh.gained + fresh.lost) / n
        needed = samples_for_power(gain, discordance, level=level)
        missing_holdout = max(missing_holdout, needed - n, 1)
    from sft.dataset import HOLDOUT_SHARE

    return math.ceil(missing_holdout / HOLDOUT_SHARE)


def _percent(share: float) -> str:
    return f"{share * 100:.1f} %"
