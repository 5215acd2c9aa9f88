"""The gate: is the challenger better where it should be, and no worse where it must not be?

Challenger and champion answer the *same* held-out samples, now. "At least as accurate", the rule of
tutorials, promotes a challenger that is no better in about .55 of cases at any size; these rules
state their chance of error instead.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from sft.dataset import HOLDOUT_SHARE
from sft.evaluate import Answers
from sft.tasks import SingleLabel

Floats = NDArray[np.float64]
RESAMPLES = 20_000
"""Of a paired bootstrap: the smallest p-value, 1/20,001, is under the 30th challenger's level."""
AT_ONCE = 2_000_000
"""Numbers that are drawn at once: 16 MB."""
TIE = 1e-6
"""Sums of differences nearer than this share of all of them are equal."""
ROUNDING = 1e-4
"""A probability may differ by as much after loading: float32 sums in another order."""
BIN = 50
"""Fewest samples in a bin of the calibration error: with fewer it measures the noise."""
MAX_BINS, MAX_VALUES = 10, 20
"""Bins of the calibration error; values of a column that are slices, the commonest first."""


@dataclass(frozen=True)
class GateSettings:
    """When a challenger may be promoted.

    Attributes:
        alpha: chance that any of the challengers that are judged against one champion, one after
            another, is promoted although it is no better on fresh data; see `level`.
        min_fresh: fewest fresh hold-out samples for a verdict: with 100, a gain of 20 points is
            seen in more than nine of ten cases.
        max_drop: largest fall of accuracy on the old hold-out.
        max_drop_bound: largest fall that the 95 % lower bound may allow; 2 points as a bound would
            need over 900 samples.
        max_class_drop: a class, or a slice, has collapsed when it falls by more, significantly, and
            lies as far below the challenger's own mean. (The second, since a champion that answers
            a new world with always the same class has all of that class right.)
        max_calibration_rise: largest rise of the expected calibration error, on fresh or on old
            data; a larger one counts when it is significant. Only of one class of several.
        max_latency_ratio: CPU time of an answer, as a multiple of the champion's.
        max_bytes: of the weights; 0 for no limit.
        approval: `auto`, or `manual`: what the gate lets through waits for a person.
        shadow_batches: batches that a challenger answers beside the champion before it is judged.
    """

    alpha: float = 0.05
    min_fresh: int = 100
    max_drop: float = 0.02
    max_drop_bound: float = 0.05
    max_class_drop: float = 0.15
    max_calibration_rise: float = 0.05
    max_latency_ratio: float = 2.0
    max_bytes: int = 0
    approval: Literal["auto", "manual"] = "auto"
    shadow_batches: int = 0

    def __post_init__(self) -> None:
        """Refuse values outside their range, by name."""
        shares = ("alpha", "max_drop", "max_drop_bound", "max_class_drop", "max_calibration_rise")
        for name in shares:
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must lie between 0 and 1, got {getattr(self, name)}")
        if self.min_fresh < 1:
            raise ValueError(f"min_fresh must be at least 1, got {self.min_fresh}")
        if not self.max_latency_ratio > 0:
            raise ValueError(f"max_latency_ratio must be positive, got {self.max_latency_ratio}")
        for name in ("max_bytes", "shadow_batches"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")

    def level(self, judged_before: int) -> float:
        """Give the level of the next challenger, once so many were judged: alpha/(k(k + 1)).

        The levels of all challengers sum to alpha, however many come (alpha spending): after the
        k-th alpha/(k + 1) is left. alpha/k instead has a total that grows without limit.
        """
        k = judged_before + 1
        return self.alpha / (k * (k + 1))


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
    """The gate's answer; `missing` fresh labels would decide an inconclusive one.

    The first of the criteria is the one on fresh data.
    """

    outcome: Outcome
    criteria: tuple[Criterion, ...]
    missing: int = 0

    @property
    def reason(self) -> str:
        """One sentence: what decided, and whatever it was, the gain on fresh data."""
        failed = [c.words for c in self.criteria if not c.passed]
        if self.outcome is Outcome.INCONCLUSIVE:
            return (
                f"not enough evidence, about {self.missing} more labels are needed: "
                + "; ".join(failed)
            )
        if failed and (better := self.criteria[0]).passed:
            failed.append(f"{better.name}, though: {better.words}")
        return "; ".join(failed or [c.words for c in self.criteria])


@dataclass(frozen=True)
class Pair:
    """Champion and challenger on the same samples, in the same order.

    Attributes:
        champion, challenger: n answers each.
        slices: column of metadata to n values; None where a sample has none.
    """

    champion: Answers
    challenger: Answers
    slices: Mapping[str, Sequence[str | None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse answers to different questions."""
        if not np.array_equal(self.champion.labels, self.challenger.labels):
            raise ValueError("champion and challenger did not answer the same samples")
        for column, values in self.slices.items():
            if len(values) != len(self):
                raise ValueError(f"slice {column!r} has {len(values)} values, not {len(self)}")

    @property
    def difference(self) -> Floats:
        """By how much the challenger scores better on each sample, (n,)."""
        return np.asarray(self.challenger.scores - self.champion.scores, dtype=np.float64)

    @property
    def gained(self) -> int:
        """How many samples only the challenger answers rightly."""
        return int((self.challenger.right & ~self.champion.right).sum())

    @property
    def lost(self) -> int:
        """How many samples only the champion answers rightly."""
        return int((self.champion.right & ~self.challenger.right).sum())

    @property
    def is_right_or_wrong(self) -> bool:
        """Whether every score is 0 or 1."""
        both = np.concatenate([self.champion.scores, self.challenger.scores])
        return bool(np.isin(both, (0.0, 1.0)).all())

    def __len__(self) -> int:
        return len(self.champion.labels)


@dataclass(frozen=True)
class Serving:
    """The challenger as it came back from the registry.

    Attributes:
        bytes: of its weights.
        latency_ratio: its CPU time for an answer, divided by the champion's, measured side by side.
        round_trip: largest difference of a probability from what it was before it was registered.
    """

    bytes: int
    latency_ratio: float
    round_trip: float


def judge(
    fresh: Pair,
    old: Pair,
    settings: GateSettings,
    *,
    classes: Sequence[str],
    judged_before: int = 0,
    serving: Serving | None = None,
) -> Verdict:
    """Judge a challenger.

    Args:
        fresh: answers on the fresh hold-out.
        old: answers on the old hold-out.
        settings: the rules.
        classes: names of the classes, in the order of the labels.
        judged_before: challengers that were judged against this champion already.
        serving: how it came back from the registry; None leaves those criteria out.
    """
    level = settings.level(judged_before)
    better = _better_on_fresh(fresh, settings, level)
    others = [
        _kept_on_old(old, settings),
        _nothing_collapses(fresh, old, settings, classes),
        _as_calibrated({"fresh": fresh, "old": old}, settings),
    ]
    if serving is not None:
        others += [_answers_as_before(serving), _within_budget(serving, settings)]
    criteria = (better, *(c for c in others if c is not None))
    if all(c.passed for c in criteria):
        return Verdict(Outcome.PROMOTE, criteria)
    missing = 0 if better.passed else _missing_labels(fresh, settings, level)
    if missing and all(c.passed for c in criteria[1:]):
        return Verdict(Outcome.INCONCLUSIVE, criteria, missing)
    return Verdict(Outcome.REFUSE, criteria)


def paired_p_value(challenger: NDArray[Any], champion: NDArray[Any]) -> float:
    """One-sided p-value that the challenger scores no better on the same samples.

    Exact McNemar where every score is 0 or 1, else the larger of a paired bootstrap's and of sign
    flips': the first is too bold where few scores differ (of 100 scores of several labels 8
    differed: any of ten challengers that were no better passed in .088 of cases, at a level of
    .05), and the second supposes that differences are as often large upwards as downwards.

    Args:
        challenger: scores (n,), more is better.
        champion: scores (n,) of the same samples, in the same order.
    """
    difference = np.asarray(challenger - champion, dtype=np.float64)
    if np.isin(np.concatenate([challenger, champion]), (0.0, 1.0)).all():
        return mcnemar(int((difference > 0).sum()), int((difference < 0).sum()))
    return max(bootstrap(difference), sign_flips(difference))


def mcnemar(gained: int, lost: int) -> float:
    """Exact one-sided p-value that the challenger is no better (McNemar 1947, binomial form)."""
    return float(stats.binom.sf(gained - 1, gained + lost, 0.5)) if gained else 1.0


def bootstrap(difference: Floats, resamples: int = RESAMPLES) -> float:
    """Test by a paired bootstrap whether the mean difference is over zero; same data, same answer.

    The statistic is studentised (Efron and Tibshirani 1993, chapter 16): percentiles of the mean
    promote too often when samples are few.

    Args:
        difference: (n,) of the scores of the same samples.
        resamples: the p-value is at least 1/(resamples + 1).

    Returns:
        One-sided p-value that it is not.
    """
    n = len(difference)
    mean = float(difference.mean()) if n else 0.0
    if n < 2 or np.ptp(difference) == 0:  # noqa: PLR2004 - no spread: the signs are all there is
        return 0.5**n if mean > 0 else 1.0
    rng = np.random.default_rng(0)
    at_once, as_large = max(1, AT_ONCE // n), 0
    for begin in range(0, resamples, at_once):
        drawn = difference[rng.integers(n, size=(min(at_once, resamples - begin), n))]
        apart, spread = drawn.mean(axis=1) - mean, drawn.std(axis=1)
        # a resample without spread is no evidence for anything: it counts against the challenger
        drawn_t = np.divide(apart, spread, out=np.full_like(apart, np.inf), where=spread > 0)
        as_large += int((drawn_t >= mean / difference.std()).sum())
    return (1 + as_large) / (resamples + 1)


def sign_flips(difference: Floats, resamples: int = RESAMPLES) -> float:
    """Test by random signs whether the sum of differences is over zero; same data, same answer.

    Where the two are equally good each could as well have had the other's score (Fisher 1935). Then
    its level holds, however few differ.

    Args:
        difference: (n,) of the scores of the same samples.
        resamples: of signs; all of them are tried where they are no more.

    Returns:
        One-sided p-value that it is not.
    """
    size = np.abs(difference[difference != 0])
    n = len(size)
    # ties count, which scores in float32 miss by their rounding
    enough = difference[difference > 0].sum() - TIE * size.sum()
    if 2**n <= resamples:
        every = np.arange(2**n)[:, None] >> np.arange(n) & 1
        return float((every @ size >= enough).mean())
    rng, as_large, at_once = np.random.default_rng(0), 0, max(1, AT_ONCE // n)
    for begin in range(0, resamples, at_once):
        rows = min(at_once, resamples - begin)
        drawn = rng.integers(256, size=(rows, -(-n // 8)), dtype=np.uint8)
        upwards = np.unpackbits(drawn, axis=1, count=n)
        as_large += int((upwards @ size >= enough).sum())
    return (1 + as_large) / (resamples + 1)


def difference_bound(gained: int, lost: int, n: int) -> float:
    """Lower 95 % bound of the gain in accuracy (Bonett and Price 2012, adjusted Wald)."""
    p_gain, p_loss = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    gain = p_gain - p_loss
    return gain - 1.645 * math.sqrt((p_gain + p_loss - gain**2) / (n + 2))


def calibration_error(answers: Answers) -> float:
    """Expected calibration error of the top answer, in bins of equally many samples."""
    return float(np.abs(_gaps(answers).sum(axis=0)).sum() / max(1, len(answers.labels)))


def samples_for_power(gain: float, discordance: float, *, level: float = 0.05) -> int:
    """How many samples show a gain with 80 % power (McNemar, one-sided, normal form).

    Args:
        gain: difference of accuracies, or of mean scores, D.
        discordance: share of samples on which the two differ, or mean square of the differences of
            their scores, d ≥ D².
        level: of the test.
    """
    spread = max(0.0, discordance - gain**2)
    z = float(stats.norm.isf(level))
    return math.ceil((z * math.sqrt(discordance) + 0.84 * math.sqrt(spread)) ** 2 / gain**2)


def _better_on_fresh(fresh: Pair, settings: GateSettings, level: float) -> Criterion:
    p_value = paired_p_value(fresh.challenger.scores, fresh.champion.scores)
    enough = len(fresh) >= settings.min_fresh
    if not len(fresh):
        words = f"fresh hold-out: no sample has a label, and {settings.min_fresh} are asked for"
        return Criterion("better on fresh data", passed=False, words=words)
    test = "exact McNemar" if fresh.is_right_or_wrong else "paired bootstrap and sign flips"
    words = (
        f"fresh hold-out ({len(fresh)} samples): {_means(fresh)}, gained {fresh.gained}, lost"
        f" {fresh.lost}, {test} p = {p_value:.2g} against a level of {level:.2g}"
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
        f"old hold-out ({len(old)} samples): {_percent(old.champion.right)} →"
        f" {_percent(old.challenger.right)}, difference {change * 100:+.1f} points (at least"
        f" {-settings.max_drop * 100:+.0f}), lower 95 % bound {bound * 100:+.1f} (over"
        f" {-settings.max_drop_bound * 100:+.0f})",
    )


def _nothing_collapses(
    fresh: Pair, old: Pair, settings: GateSettings, classes: Sequence[str]
) -> Criterion:
    before = np.concatenate([fresh.champion.right, old.champion.right]).astype(np.float64)
    after = np.concatenate([fresh.challenger.right, old.challenger.right]).astype(np.float64)
    groups = [*_classes(fresh, old, classes), *_slices(fresh, old)]
    means = [np.full(len(p), p.challenger.accuracy) for p in (fresh, old) if len(p)]
    expected = np.concatenate(means or [np.empty(0)])
    fallen = [
        f"{name} {_percent(before[rows])} → {_percent(after[rows])}"
        for name, rows in groups
        if (before[rows] - after[rows]).mean() > settings.max_class_drop
        and (expected[rows] - after[rows]).mean() > settings.max_class_drop
        and paired_p_value(before[rows], after[rows]) <= settings.alpha / len(groups)
    ]
    sliced = bool(fresh.slices or old.slices)
    what = "classes and slices" if sliced else "classes"
    words = (
        f"{what} that collapsed: {', '.join(fallen)}"
        if fallen
        else f"none of {len(groups)} {what} fell by over {settings.max_class_drop * 100:.0f} points"
    )
    return Criterion(f"no class{' or slice' if sliced else ''} collapses", not fallen, words)


def _classes(
    fresh: Pair, old: Pair, classes: Sequence[str]
) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    """Give the samples of each class that occurs; a sample may have several."""
    for index, name in enumerate(classes):
        rows = np.concatenate([pair.champion.of_class(index) for pair in (fresh, old)])
        if rows.any():
            yield name, rows


def _slices(fresh: Pair, old: Pair) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    """Give the samples of the commonest values of each column."""
    for column in dict.fromkeys((*fresh.slices, *old.slices)):
        parts = (pair.slices.get(column, (None,) * len(pair)) for pair in (fresh, old))
        values = np.array([value for part in parts for value in part], dtype=object)
        counts = Counter(value for value in values.tolist() if value is not None)
        for value, _ in counts.most_common(MAX_VALUES):
            yield f"{column} = {value}", values == value


def _as_calibrated(pairs: Mapping[str, Pair], settings: GateSettings) -> Criterion | None:
    """Compare the calibration errors; None where no class is the top answer of a sample."""
    if not all(isinstance(pair.champion.task, SingleLabel) for pair in pairs.values()):
        return None
    told, passed = [], True
    for name, pair in pairs.items():
        if not len(pair):
            continue
        before, after = calibration_error(pair.champion), calibration_error(pair.challenger)
        words = f"{name} {before:.3f} → {after:.3f}"
        if after - before > settings.max_calibration_rise:
            bound = _rise_bound(pair, settings.alpha / len(pairs))
            words += f" (over {settings.max_calibration_rise:+.3g}, lower bound {bound:+.3f})"
            passed = passed and bound <= 0
        told.append(words)
    return Criterion("as well calibrated", passed, f"calibration error: {', '.join(told)}")


def _rise_bound(pair: Pair, level: float) -> float:
    """Lower bound of the rise of the calibration error, by a paired bootstrap of a normal width."""
    n = len(pair)
    drawn = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=1000)
    before, after = (
        np.abs(drawn @ _gaps(answers)).sum(axis=1) / n
        for answers in (pair.champion, pair.challenger)
    )
    rise = calibration_error(pair.challenger) - calibration_error(pair.champion)
    return rise - float(stats.norm.isf(level)) * float((after - before).std())


def _gaps(answers: Answers) -> Floats:
    """Give confidence minus rightness of each sample, in the column of its bin, (n, bins)."""
    n = len(answers.labels)
    confidence = answers.probabilities.max(axis=1) if n else np.empty(0)
    bins = max(1, min(MAX_BINS, n // BIN))
    place = np.argsort(np.argsort(confidence, kind="stable")) * bins // max(1, n)
    gaps = np.zeros((n, bins))
    gaps[np.arange(n), place] = confidence - answers.scores
    return gaps


def _answers_as_before(serving: Serving) -> Criterion:
    passed = serving.round_trip <= ROUNDING
    words = (
        f"it loads, and answers as before within {ROUNDING:g}"
        if passed
        else f"its probabilities differ by up to {serving.round_trip:.2g} from those before"
    )
    return Criterion("answers as before it was registered", passed, words)


def _within_budget(serving: Serving, settings: GateSettings) -> Criterion:
    slow = serving.latency_ratio > settings.max_latency_ratio
    large = 0 < settings.max_bytes < serving.bytes
    limit = f" (at most {settings.max_bytes:,})" if settings.max_bytes else ""
    return Criterion(
        "within the budget",
        not slow and not large,
        f"CPU time {serving.latency_ratio:.2f} times the champion's (at most"
        f" {settings.max_latency_ratio:g}), {serving.bytes:,} bytes{limit}",
    )


def _missing_labels(fresh: Pair, settings: GateSettings, level: float) -> int:
    """How many more fresh labels would decide; 0 when more would not help."""
    n = len(fresh)
    missing_holdout = max(0, settings.min_fresh - n)
    gain = float(fresh.difference.mean()) if n else 0.0
    if gain > 0:
        discordance = float((fresh.difference**2).mean())
        needed = samples_for_power(gain, discordance, level=level)
        missing_holdout = max(missing_holdout, needed - n, 1)  # it was not enough, as it stands
    return math.ceil(missing_holdout / HOLDOUT_SHARE)


def _means(pair: Pair) -> str:
    """Write the means of both, the gain, and its lower 95 % bound."""
    before, after = pair.champion.scores, pair.challenger.scores
    if pair.is_right_or_wrong:
        gain = float(after.mean() - before.mean()) * 100
        bound = difference_bound(pair.gained, pair.lost, len(pair)) * 100
        return (
            f"{_percent(before)} → {_percent(after)}, a gain of {gain:+.1f} points (lower 95 %"
            f" bound {bound:+.1f})"
        )
    gains = pair.difference
    bound = gains.mean() - 1.645 * gains.std() / math.sqrt(len(gains))
    return (
        f"score {before.mean():.4g} → {after.mean():.4g}, a gain of {gains.mean():+.4g} (lower 95 %"
        f" bound {bound:+.4g})"
    )


def _percent(right: NDArray[Any]) -> str:
    return f"{float(right.mean()) * 100:.1f} %" if len(right) else "nothing"
