"""Is a promoted version worse than the one before it? A test that may be looked at often."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import special

PRIOR = 2.0
"""Of the paired test's mixture. With p = .01, looking at every label, half of 1,000 falls of 5, 10
and 20 points (discordance .1, .15, .3) were found within 352, 140, 68 labels; 1 needs 350, 128, 63
and 5 needs 390, 167, 81, but 1 finds fewer falls that are small against the discordance."""


@dataclass(frozen=True)
class Comparison:
    """The champion and the version before it on the same labelled samples since the promotion.

    Args:
        version: number of the version before.
        n: samples that both answered.
        right_now: how many of them the champion has right.
        right_before: how many the version before has right.
        p_value: that the version before is no better; it must allow for being looked at often.

    """

    version: int
    n: int
    right_now: int
    right_before: int
    p_value: float


@dataclass(frozen=True)
class Pairs:
    """How many of n samples that both answered either has right, and how many only one."""

    n: int
    right_now: int
    right_before: int
    only_now: int
    only_before: int


def count_pairs(version: int, now: Sequence[bool], before: Sequence[bool]) -> Pairs:
    """Count sample by sample, in any order, who is right.

    Args:
        version: number of the version before.
        now: whether the champion has each sample right.
        before: whether the version before has the same sample right.

    Raises:
        ValueError: if they are not of the same samples.

    """
    if len(now) != len(before):
        raise ValueError(
            f"{len(now)} answers of the champion and {len(before)} of version {version}: a paired "
            "test needs both versions' answers to the same samples"
        )
    return Pairs(
        n=len(now),
        right_now=sum(map(bool, now)),
        right_before=sum(map(bool, before)),
        only_now=sum(a and not b for a, b in zip(now, before, strict=True)),
        only_before=sum(b and not a for a, b in zip(now, before, strict=True)),
    )


def compare_pairs(version: int, pairs: Pairs) -> Comparison:
    """Compare the champion with the version before it."""
    return Comparison(
        version=version,
        n=pairs.n,
        right_now=pairs.right_now,
        right_before=pairs.right_before,
        p_value=min(1.0, 1 / max(paired_e_value(pairs.only_before, pairs.only_now), 1e-300)),
    )


def paired_e_value(only_before: int, only_now: int) -> float:
    """Bet that of two models the one before is better, from samples that only one has right.

    H0: where the two differ, the champion is right at least half of the time. The e-value is the
    mixture of likelihood ratios against 1/2 with a Beta(2, 2) prior cut to above 1/2 (Robbins 1970;
    Ramdas et al. 2023, "Game-theoretic statistics and safe anytime-valid inference"): a
    non-negative supermartingale under H0, so it exceeds 1/alpha with a chance of at most alpha,
    however often it is looked at (Ville). It depends on the counts only, so the order of the
    samples is free, as long as which labels come does not depend on who is right.

    Args:
        only_before: samples that only the model before has right.
        only_now: samples that only the champion has right.

    """
    a, b = only_before + PRIOR, only_now + PRIOR
    above_half = float(special.betainc(b, a, 0.5))
    if above_half == 0:
        return 0.0
    log_e = (
        (only_before + only_now + 1) * math.log(2)
        + float(special.betaln(a, b) - special.betaln(PRIOR, PRIOR))
        + math.log(above_half)
    )
    return math.exp(min(log_e, 690))  # a float ends at e^709
