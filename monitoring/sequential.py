"""Alarms over a stream of batches: a fold over the checks on record, no state of its own.

Testing each batch at 5 % is certain to ring within some hundred quiet batches. Here evidence adds
up over the batches instead, and what is declared is the mean number of quiet batches between two
false alarms. So shares that no single batch can show, such as a novel class at 5 %, are found too.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import scipy.optimize
import scipy.special
from scipy import stats

from monitoring.features import ROUNDING_ERROR
from monitoring.kept import kept_with
from monitoring.reference import MIN_ROWS, Mask, Reference, portions

if TYPE_CHECKING:
    from monitoring.features import FeatureTable, Floats, Integers

Method = Literal["e_detector", "cusum", "per_batch"]

_NOT_WRITTEN = (
    KeyError, TypeError, AttributeError, ValueError, OverflowError, RecursionError,
)  # fmt: skip
"""What reading a text raises that `to_json` did not write."""

MIN_RUN_LENGTH = 10
KAPPA = 0.25
"""e = kappa * p^(kappa - 1) is an e-value of p for any kappa in (0, 1); at .25 it about halves with
each quiet batch, so a reference that is a little off does not ring."""
CUSUM_DRIFT = 0.5
"""Half the move in z that is found fastest: one standard deviation."""

JOINT = "joint test"
NOVELTY = "novelty"
CUSUM = "cusum"
CLASS_BETS = 64
"""At most 32 classes, each rarer or more common: what a tag has room for."""
JOINT_WEIGHT, NOVELTY_WEIGHT, CLASSES_WEIGHT = 0.4, 0.4, 0.2
"""Shares of the e-detector; a share w costs log(1 / w) of evidence, whatever w the rate holds."""

NOVELTY_SHARE = 0.08
"""The share of foreign rows that the bet on novelty is made for; larger ones are found sooner."""
NOVELTY_POWER = 0.4
MAX_NOVELTY = 50.0
"""A foreign row's rank u has the density a * u^(a - 1), cut so that no row says too much.

Measured: expected log-evidence a batch of 100 with 5 % of a class left out (MNIST, 3 / 8 / 5), of
art and of sketches among photos (PACS, SqueezeNet), 2,000 or 800 reference rows, at a share of .06
and a bound of 1.28: .50 / .65 / .37, .48, 2.28; counting rows beyond the 95 % quantile instead
gives .39 / .54 / .36, .07, .84.
"""
EUCLIDEAN_WEIGHT = 0.5
BOUND_Z = 1.0
"""One-sided 84 % bound on what the reference leaves open of the mean bet on novelty.

Measured with the share of .08, on its own, run length 1,000: 6 alarms in 64,000 quiet batches of
100 (MNIST, 64 references of 2,000), median delay of a class at 5 % (3 / 8 / 5) 13 / 12 / 22; a
bound of 1.6: none, 18 / 18 / 41. Beyond the bound the mean e is over 1, but its logarithm still
falls, by half its variance: errors of up to three more standard errors do not add up at 2,000 rows,
and of one at 200.
"""
BOUND_LEVEL = 0.975
MIN_SHARE_ADDED = 0.02
PROJECTED = 256
"""Random dimensions in which wider embeddings are searched (Johnson and Lindenstrauss).

Measured at 512 and 1280, the bet on art among photos: .48 and .76 a batch in all, .49 and .74 in
256, .39 and .71 in 128; in the 256 leading ones only .17 and .03, since novelty is in the others.
"""
MAX_NEIGHBOURS = 4000
"""Reference rows searched for neighbours; the cost grows with it, and its square at first."""
ROUNDING = 5
"""Decimals of a distance, so that rounding of float32 does not tell equal rows apart."""
CHUNK = 512
MAX_NAME = 16


@dataclass(frozen=True)
class StreamSettings:
    """When a stream of checks rings.

    Args:
        method: "e_detector" adds up the joint test and the bets on rare things, "cusum" only the
            joint test, "per_batch" rings whenever a batch's own test does.
        run_length: quiet batches between two false alarms, on average at least. So the chance
            of any false alarm within N batches is at most N / run_length. The e-detector holds this
            given a reference whose bounds hold (see `bets`), CUSUM given exact p-values; it means
            nothing for "per_batch".

    Raises:
        ValueError: if a value is out of its range.

    """

    method: Method = "e_detector"
    run_length: int = 1000

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise ValueError(
                f"method={self.method!r} is unknown: choose one of {', '.join(get_args(Method))}"
            )
        if self.run_length < MIN_RUN_LENGTH:
            raise ValueError(
                f"run_length={self.run_length} batches between two false alarms is under "
                f"{MIN_RUN_LENGTH}: take 1000, or method='per_batch' to ring at each drifted batch"
            )


@dataclass(frozen=True)
class StreamEvidence:
    """What one check puts on record for the stream.

    Args:
        p_value: of the batch's joint test.
        log_e: natural logarithms of the e-values of `bets`.

    Raises:
        ValueError: if p is no probability or a logarithm is not finite.

    """

    p_value: float
    log_e: Mapping[str, float]

    def __post_init__(self) -> None:
        if not 0 <= self.p_value <= 1:
            raise ValueError(f"p_value={self.p_value} is no probability")
        bad = [name for name, value in self.log_e.items() if not math.isfinite(value)]
        if bad:
            raise ValueError(f"the log e-values of {', '.join(bad)} are not finite")

    def to_json(self) -> str:
        """Write it in at most 4,000 characters; p keeps six digits, the logarithms three decimals.

        What has been written and read once stays the same.
        """
        content = {
            "p": float(f"{self.p_value:.6g}"),
            "log_e": {name: round(value, 3) for name, value in self.log_e.items()},
        }
        return json.dumps(content, ensure_ascii=False, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> StreamEvidence:
        """Read what `to_json` wrote.

        Raises:
            ValueError: if it is something else.

        """
        try:
            content = json.loads(text)
            log_e = {str(name): float(value) for name, value in content["log_e"].items()}
            return cls(float(content["p"]), log_e)
        except _NOT_WRITTEN as error:
            raise ValueError(
                f"this is no evidence of a check: {text[:80]!r} ({error}); check the batch again"
            ) from error


@dataclass(frozen=True)
class StreamState:
    """Where the stream stands after a batch.

    Args:
        value: log10 of the e-detector, CUSUM's sum in standard deviations, or -log10 of the
            batch's p.
        threshold: the value that rings, in the same unit.
        alarm: whether this batch rang; the next one starts afresh.
        since: batches added up, this one included.
        leading: the component that carries most of the evidence, in words.

    """

    value: float
    threshold: float
    alarm: bool
    since: int
    leading: str


@dataclass(frozen=True)
class Running:
    """What the stream has added up since it last started: all of the past that a batch needs.

    Args:
        sums: log R of each component of the e-detector, or CUSUM's one sum.
        since: batches added up.

    """

    sums: Mapping[str, float] = field(default_factory=dict)
    since: int = 0

    def to_json(self) -> str:
        """Write it as the next check may begin with it; the logarithms keep three decimals."""
        sums = {name: round(value, 3) for name, value in self.sums.items()}
        content = {"since": self.since, "sums": sums}
        return json.dumps(content, ensure_ascii=False, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Running:
        """Read what `to_json` wrote.

        Raises:
            ValueError: if it is something else.

        """
        try:
            content = json.loads(text)
            sums = {str(name): float(value) for name, value in content["sums"].items()}
            return cls(sums, int(content["since"]))
        except _NOT_WRITTEN as error:
            raise ValueError(f"this is no running sum of a stream: {text[:80]!r}") from error


def step(
    before: Running, one: StreamEvidence, settings: StreamSettings, alpha: float
) -> tuple[Running, StreamState]:
    """Add a batch; return what the next one needs, and where the stream stands.

    After an alarm it starts afresh, so drift that goes on rings again.

    Args:
        before: what the batches before it left.
        one: the batch's evidence.
        settings: method and rate.
        alpha: of the batch test, which only "per_batch" needs.

    """
    if settings.method == "per_batch":
        return Running(), _per_batch(one.p_value, alpha)
    since = before.since + 1
    if settings.method == "cusum":
        sums, value, threshold, leading = _cusum(before.sums, one, settings.run_length)
    else:
        sums, value, threshold, leading = _e_detector(before.sums, one, settings.run_length)
    alarm = value >= threshold
    state = StreamState(value, threshold, alarm, since, leading)
    return (Running() if alarm else Running(sums, since)), state


def fold(
    evidence: Sequence[StreamEvidence], settings: StreamSettings, alpha: float
) -> tuple[StreamState, ...]:
    """Fold the checks of one champion, oldest first, into one state after each; see `step`."""
    running, states = Running(), []
    for one in evidence:
        running, state = step(running, one, settings, alpha)
        states.append(state)
    return tuple(states)


def _e_detector(
    before: Mapping[str, float], one: StreamEvidence, run_length: int
) -> tuple[Mapping[str, float], float, float, str]:
    """Average Shiryaev and Roberts's R_t = (1 + R_{t-1}) e_t over the components.

    R_t - t is a supermartingale while all is quiet, so R >= N has a mean run of at least N (Shin,
    Ramdas, Rinaldo 2023, "E-detectors"), and by Doob's inequality a chance of at most n / N within
    n batches. Any weighted average of such processes is one; each component keeps its own, so that
    one may grow while the others shrink. In logarithms: p may be 1e-300.
    """
    log_e = {JOINT: _log_e_of_p(one.p_value), **one.log_e}
    sums = {
        name: float(np.logaddexp(0.0, before.get(name, -math.inf))) + log_e.get(name, 0.0)
        for name in {**before, **log_e}
    }
    carried = {
        name: log_r + math.log(weight)
        for name, log_r in sums.items()
        if (weight := _weight(name)) > 0
    }
    value = float(np.logaddexp.reduce(list(carried.values()))) / math.log(10)
    return sums, value, math.log10(run_length), max(carried, key=carried.__getitem__)


def _log_e_of_p(p_value: float) -> float:
    return math.log(KAPPA) + (KAPPA - 1) * math.log(max(p_value, 1e-300))


def _weight(name: str) -> float:
    """Give a component's share, which must not depend on the data; unknown ones have none."""
    if name == JOINT:
        return JOINT_WEIGHT
    if name == NOVELTY:
        return NOVELTY_WEIGHT
    return CLASSES_WEIGHT / CLASS_BETS if name.startswith("class") else 0.0


def _cusum(
    before: Mapping[str, float], one: StreamEvidence, run_length: int
) -> tuple[Mapping[str, float], float, float, str]:
    """Sum z - 1/2 from zero up, where z is the normal quantile of 1 - p (Page 1954)."""
    z = -float(scipy.special.ndtri(np.clip(one.p_value, 1e-300, 1 - 1e-9)))
    value = max(0.0, before.get(CUSUM, 0.0) + z - CUSUM_DRIFT)
    return {CUSUM: value}, value, _cusum_threshold(run_length), JOINT


@functools.lru_cache
def _cusum_threshold(run_length: int) -> float:
    """Solve Siegmund's (1985) approximation of the mean run for the limit: 5.06 for 1,000."""

    def surplus(limit: float) -> float:
        b = 2 * CUSUM_DRIFT * (limit + 1.166)
        return math.expm1(b) - b - 2 * CUSUM_DRIFT**2 * run_length

    return float(scipy.optimize.brentq(surplus, 0.0, 100.0))


def _per_batch(p_value: float, alpha: float) -> StreamState:
    value = -math.log10(max(p_value, 1e-300))
    return StreamState(value, -math.log10(alpha), p_value <= alpha, 1, JOINT)


def bets(reference: Reference, batch: FeatureTable) -> dict[str, float]:
    """Bet on rare things: natural logarithms of e-values, which add up over batches.

    "novelty" bets that some rows are far from every reference row and answered with doubt; each
    "class ... rarer" and "class ... more common" that the predicted shares moved (of classes or
    labels; a model of values has none, and no doubt but the distance). A reference is
    the same for all batches, so its own error would add up too: each bet is against the bound that
    the reference leaves open (the share of a class: Clopper and Pearson's 97.5 %; novelty: 84 %),
    not against its estimate. If the bounds hold, a quiet batch has a mean e of at most 1.

    Rows are bet on by the world that they are nearest to, against reference rows of the same; so
    mixtures of known worlds in any shares stay quiet. A part that `assign` put back with another
    one stays there, unless regimes of that one are known to send rows where it lies: those of a
    regime that differs by its mix of classes alone are no strays. What the reference needs is found
    once for each reference object.

    Raises:
        ValueError: if the batch cannot be compared with the reference, or a regime is too small.

    """
    cut = portions(reference, batch)
    baseline = _baseline(reference)
    far = _distances(baseline, batch)
    scores = np.column_stack([*far, batch.entropy])
    said = _in_groups(batch.said, baseline.group, len(baseline.names))
    log_e = np.zeros(1 + 2 * len(baseline.names))
    for portion in cut:
        world = portion.nearest.copy()
        for other in np.unique(world):
            if not baseline.cells[other].bounded.intersection(reference.members[portion.world]):
                world[world == other] = portion.world
        for cell in np.unique(world):
            rows = portion.rows[world == cell]
            log_e += _cell_bets(baseline.cells[cell], scores[rows], said[rows])
    ways = ("rarer", "more common")
    names = [NOVELTY, *(f"{name} {way}" for way in ways for name in baseline.names)]
    return dict(zip(names, log_e.tolist(), strict=True))


def _cell_bets(cell: _Cell, scores: Floats, said: Mask) -> Floats:
    novelty = np.log(cell.bet(scores)).sum() - len(scores) * cell.log_bound
    counts = said.sum(axis=0)
    rarer = _binomial_log_ratio(counts, len(said), cell.lower, cell.lower / 2)
    raised = cell.upper + np.maximum(cell.upper / 2, MIN_SHARE_ADDED)
    commoner = np.minimum(raised, (1 + cell.upper) / 2)
    common = _binomial_log_ratio(counts, len(said), cell.upper, commoner)
    return np.concatenate([[novelty], rarer, common])


def _binomial_log_ratio(counts: Integers, n: int, null: Floats, alternative: Floats) -> Floats:
    """Give the log-likelihood ratio of two shares; no bet where the null is 0 or 1.

    Where the alternative is beyond the null, its mean is at most 1 for every share on this side.
    """
    open_ = (null > 0) & (null < 1)
    q0, q1 = np.where(open_, null, 0.5), np.where(open_, alternative, 0.5)
    ratio = counts * np.log(q1 / q0) + (n - counts) * np.log((1 - q1) / (1 - q0))
    return np.asarray(np.where(open_, ratio, 0.0))


@dataclass(frozen=True, eq=False)
class _Cell:
    """Reference rows that are nearest to one world.

    Args:
        ordered: (3, n), each score in ascending order: two distances and the entropy.
        surprise: (n,), the scores' ranks put together, ascending.
        mean: of the density over the reference rows.
        bounded: the regimes that the bounds are of, as they stand in the reference.
        log_bound: of the mean bet, for the regime with the largest.
        lower: (groups,), bounds of the predicted shares: the smallest of any regime.
        upper: the largest of any regime.

    """

    ordered: Floats
    surprise: Floats
    mean: float
    bounded: frozenset[int]
    log_bound: float
    lower: Floats
    upper: Floats

    def bet(self, scores: Floats) -> Floats:
        """Give (n,) factors for new rows' scores (n, 3)."""
        ranks = _ranks(self.ordered, scores)
        return _factor(_density(_upper_rank(self.surprise, _surprise(ranks))), self.mean)


@dataclass(frozen=True, eq=False)
class _Baseline:
    """What bets need of a reference: neighbours (n, k) float32, cells, and groups of classes."""

    axes: Floats | None
    neighbours: Floats
    norms: Floats
    cells: tuple[_Cell, ...]
    group: Integers
    names: tuple[str, ...]


@kept_with
def _baseline(reference: Reference) -> _Baseline:
    """Find the neighbours of a reference and bound its shares, in .1 to 1 s."""
    embedding = np.concatenate([r.features.embedding for r in reference.regimes])
    entropy = np.concatenate([r.features.entropy for r in reference.regimes])
    said = np.concatenate([r.features.said for r in reference.regimes])
    regime = np.repeat(
        np.arange(len(reference.regimes)), [len(r.features) for r in reference.regimes]
    )
    world = np.concatenate(reference.routed)
    kept = np.arange(len(embedding))
    if len(kept) > MAX_NEIGHBOURS:
        kept = np.sort(np.random.default_rng(0).permutation(len(kept))[:MAX_NEIGHBOURS])
    axes = _random_axes(embedding.shape[1])
    embedding, entropy, said = _project(embedding[kept], axes), entropy[kept], said[kept]
    regime, world = regime[kept], world[kept]
    norms = np.linalg.norm(embedding, axis=1)
    far = _nearest_neighbours(embedding, embedding, norms, leave_one_out=True)
    scores = np.column_stack([*far, entropy])
    counted = np.ones(len(said), dtype=np.bool_)
    if len(reference.classes) > CLASS_BETS // 2:
        # who is among the commonest by luck is not, in the rows that did not choose
        counted[np.random.default_rng(0).permutation(len(said))[::2]] = False
    group, names = _groups(reference.classes[: said.shape[1]], said[~counted].sum(axis=0))
    said = _in_groups(said, group, len(names))
    cells = []
    for i in range(len(reference.members)):
        rows = np.flatnonzero(world == i)
        if len(rows) < MIN_ROWS:
            rows = np.arange(len(world))
        cells.append(_cell(scores[rows], said[rows], counted[rows], regime[rows]))
    return _Baseline(axes, embedding, norms, tuple(cells), group, names)


def _cell(scores: Floats, said: Mask, counted: Mask, regime: Integers) -> _Cell:
    """Rank the rows and bound what each regime with at least ten of them leaves open."""
    ordered = np.sort(scores, axis=0).T
    surprise = _surprise(_ranks(ordered, scores, known=True))
    ascending = np.sort(surprise)
    density = _density(_upper_rank(ascending, surprise, known=True))
    mean = float(density.mean())
    factor = _factor(density, mean)
    sizes = np.bincount(regime)
    large = np.flatnonzero(sizes >= min(MIN_ROWS // 2, sizes.max()))
    bounds, lower, upper = [], [], []
    for i in large:
        rows = regime == i
        n = int(rows.sum())
        bounds.append(factor[rows].mean() + BOUND_Z * factor[rows].std() / math.sqrt(n))
        k, n = said[rows & counted].sum(axis=0), int((rows & counted).sum())
        lower.append(
            np.where(k > 0, stats.beta.ppf(1 - BOUND_LEVEL, np.maximum(k, 1), n - k + 1), 0)
        )
        upper.append(np.where(k < n, stats.beta.ppf(BOUND_LEVEL, k + 1, np.maximum(n - k, 1)), 1.0))
    return _Cell(
        ordered,
        ascending,
        mean,
        frozenset(large.tolist()),
        math.log(max(bounds)),
        np.min(lower, axis=0),
        np.max(upper, axis=0),
    )


def _ranks(ordered: Floats, scores: Floats, *, known: bool = False) -> list[Floats]:
    """Rank each score (n, 3) among the ordered ones; what only rounding tells apart is as large."""
    return [
        _upper_rank(own, column - ROUNDING_ERROR * column, known=known)
        for own, column in zip(ordered, scores.T, strict=True)
    ]


def _upper_rank(ordered: Floats, values: Floats, *, known: bool = False) -> Floats:
    """Give the share of rows at least as large; a new row counts itself among them."""
    new = 0 if known else 1
    below = np.searchsorted(ordered, values, side="left")
    return np.asarray((len(ordered) - below + new) / (len(ordered) + new))


def _surprise(ranks: Sequence[Floats]) -> Floats:
    """Put ranks together as Fisher does: cosine, Euclidean (half as much), entropy."""
    cosine, euclidean, entropy = (np.log(rank) for rank in ranks)
    return np.asarray(-cosine - EUCLIDEAN_WEIGHT * euclidean - entropy)


def _density(rank: Floats) -> Floats:
    return np.asarray(np.minimum(NOVELTY_POWER * rank ** (NOVELTY_POWER - 1), MAX_NOVELTY))


def _factor(density: Floats, mean: float) -> Floats:
    return np.asarray(1 + NOVELTY_SHARE * (density / mean - 1))


def _distances(baseline: _Baseline, batch: FeatureTable) -> tuple[Floats, Floats]:
    rows = _project(batch.embedding, baseline.axes)
    return _nearest_neighbours(baseline.neighbours, rows, baseline.norms)


def _random_axes(d: int) -> Floats | None:
    if d <= PROJECTED:
        return None
    drawn = np.random.default_rng(0).standard_normal((d, PROJECTED))
    return np.asarray(np.linalg.qr(drawn)[0], dtype=np.float32)


def _project(embedding: Floats, axes: Floats | None) -> Floats:
    rows = embedding.astype(np.float32)
    return rows if axes is None else np.asarray(rows @ axes)


def _nearest_neighbours(
    ours: Floats, theirs: Floats, norms: Floats, *, leave_one_out: bool = False
) -> tuple[Floats, Floats]:
    """Give the cosine and the squared Euclidean distance to the nearest of ours, each (n,).

    The Euclidean one is in units of the mean square norm of ours. One product serves both.
    """
    squares = norms**2
    unit = max(float(squares.mean()), float(np.finfo(np.float32).tiny))
    inverse = 1 / np.maximum(norms, np.finfo(np.float32).tiny)
    cosine, euclidean = np.empty((2, len(theirs)), dtype=np.float32)
    for start in range(0, len(theirs), CHUNK):
        rows = theirs[start : start + CHUNK]
        product = rows @ ours.T
        length = np.linalg.norm(rows, axis=1)
        angle = product * inverse
        product *= -2
        product += squares
        if leave_one_out:
            at = np.arange(len(rows))
            angle[at, start + at], product[at, start + at] = -np.inf, np.inf
        stop = start + len(rows)
        cosine[start:stop] = 1 - angle.max(axis=1) / np.maximum(length, np.finfo(np.float32).tiny)
        euclidean[start:stop] = (product.min(axis=1) + length**2) / unit
    return np.round(np.maximum(cosine, 0), ROUNDING), np.round(np.maximum(euclidean, 0), ROUNDING)


def _in_groups(said: Mask, group: Integers, groups: int) -> Mask:
    """Tell which groups of classes a row's answer touches, (n, classes) to (n, groups)."""
    return np.asarray(said.astype(np.float32) @ (group[:, None] == np.arange(groups)) > 0)


def _groups(classes: tuple[str, ...], counts: Integers) -> tuple[Integers, tuple[str, ...]]:
    """Give each class its bet: one each, or the 31 commonest in the reference and all others."""
    most = CLASS_BETS // 2
    if len(classes) <= most:
        return np.arange(len(classes)), _names(classes, range(len(classes)))
    common = np.sort(np.argsort(-counts, kind="stable")[: most - 1])
    group = np.full(len(classes), most - 1)
    group[common] = np.arange(most - 1)
    return group, (*_names(classes, common.tolist()), "classes other than the commonest")


def _names(classes: tuple[str, ...], chosen: Sequence[int]) -> tuple[str, ...]:
    """Name classes in at most 16 characters that JSON does not escape; a cut one has its place."""
    names = []
    for i in chosen:
        name = "".join(c if c.isprintable() and c not in '"\\' else "?" for c in classes[i])
        short = name if name == classes[i] and len(name) <= MAX_NAME else f"{name[:MAX_NAME]}… #{i}"
        names.append(f"class '{short}'")
    return tuple(names)
