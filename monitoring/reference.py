"""What "no drift" looks like to one version: held-out features, by regime.

A regime is one world that the version was judged on. A batch is compared with the regimes it came
from, sample by sample, because a pooled reference of photos and sketches rings on every batch of
pure photos (measured on PACS: 1.00 of them).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import scipy.linalg
import scipy.special
from scipy import stats

from monitoring.features import (
    FeatureTable,
    Floats,
    Integers,
    Kind,
    concatenate,
    write_parquet,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

MIN_ROWS = 20
"""Fewer rows than this have no two halves worth the name."""
MIN_PART = 3
"""A part of under 20 rows has an exact test, so it need not be large to be one of its own."""
MERGE_BELOW = 0.6
"""Regimes told apart in a smaller share of held-out rows (half of them: by chance) are one world.

Measured, 64-d, 25 pairs each: the same world twice is told apart in .43-.56 of rows at 200 rows a
regime and in .46-.54 at 600; worlds one standard deviation apart in .61-.72, two in .77-.86, and a
regime that is half the other, half a world 15 off in .68-.76, which must not be merged. Regimes of
20 rows are too noisy to tell: .35-.70 for the same world, of which .56 are merged.
"""
STRAY_QUANTILE = 0.999
STRAY_STEP = 0.05
"""Expected shares of strays are rounded to it, so that mixtures are made once and kept."""
ROUNDS = 50
"""Of expectation and maximisation: with 10 a border between worlds 3 apart has not settled."""
SMALLEST_EIGENVALUE = 1e-4
"""Relative to the largest; dead ReLU dimensions below it broke the test's level."""
ROWS_PER_DIMENSION = 10
DISCRIMINANT_DIMENSIONS = 64
NO_LABEL = -1
RIGHT, WRONG = 0, 1
"""Labels of a model that does not answer one class: `FeatureTable.predicted` is 0 throughout."""

Mask: TypeAlias = np.ndarray[tuple[int, ...], np.dtype[np.bool_]]


@dataclass(frozen=True, eq=False)
class Whitening:
    """Leading principal axes, scaled to unit variance: mean (d,), axes (d, k), both float64."""

    mean: Floats
    axes: Floats

    def leading(self, dimensions: int) -> Whitening:
        """Keep the first axes only."""
        return Whitening(self.mean, np.ascontiguousarray(self.axes[:, :dimensions]))

    def apply(self, embedding: Floats) -> Floats:
        """Give (n, k) float64, the axis of the largest variance first."""
        return (embedding.astype(np.float64) - self.mean) @ self.axes


def whiten(rows: Floats, max_dimensions: int) -> Whitening:
    """Find the axes of the largest variance and their scale.

    Args:
        rows: (n, d), n at least 2.
        max_dimensions: never more axes than this.

    Returns:
        As many axes as have an eigenvalue of at least 1e-4 of the largest: none at all if the rows
        are constant. In float64 (a float32 SVD ruined the test), by the Gram matrix when there are
        fewer rows than dimensions.

    """
    rows = rows.astype(np.float64)
    n, d = rows.shape
    mean = rows.mean(axis=0)
    centred = rows - mean
    few_rows = n < d
    square = centred @ centred.T if few_rows else centred.T @ centred
    size = len(square)
    leading = (size - max(1, min(max_dimensions, size)), size - 1)
    values, vectors = scipy.linalg.eigh(square / (n - 1), subset_by_index=leading)
    values, vectors = values[::-1], vectors[:, ::-1]
    # rounding leaves a constant table with eigenvalues of about (eps * size)^2, not zero
    noise = (np.finfo(np.float64).eps * max(1.0, float(np.abs(rows).max()))) ** 2 * n * d
    kept = int(np.sum(values >= max(SMALLEST_EIGENVALUE * values[0], noise)))
    k = min(kept, max_dimensions)
    values, vectors = values[:k], vectors[:, :k]
    if few_rows:
        vectors = centred.T @ vectors / np.sqrt(values * (n - 1))
    return Whitening(mean, vectors / np.sqrt(values))


@dataclass(frozen=True, eq=False)
class Regime:
    """One world that a version was judged on.

    Args:
        name: unique among the version's regimes.
        features: n held-out samples; never training samples, which the model is overconfident on.
        labels: (n,) int64, the index of the class, -1 without a label. Of a model that does not
            answer one class, 0 where it is right and 1 where it is wrong.
        split: the rows of the two halves, where they were drawn before: in a merged regime, or in
            the rows of one that are routed alike. Not kept on disk.

    Raises:
        ValueError: if labels and features differ in number, or features are not finite.

    """

    name: str
    features: FeatureTable
    labels: Integers
    split: tuple[Integers, Integers] | None = None

    def __post_init__(self) -> None:
        if self.labels.shape != (len(self.features),):
            raise ValueError(
                f"regime {self.name!r}: {len(self.features)} rows and labels of shape "
                f"{self.labels.shape}"
            )
        self.features.require_finite(f"regime {self.name!r}")

    @property
    def labelled(self) -> Integers:
        """The positions of the rows that have a label."""
        return np.flatnonzero(self.labels != NO_LABEL)

    @property
    def correct(self) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
        """Whether the model was right, for each labelled row."""
        rows = self.labelled
        return np.asarray(self.features.predicted[rows] == self.labels[rows])

    @cached_property
    def whitening(self) -> Whitening:
        """The leading axes of the fitting half, at most one for ten rows of the regime."""
        fit, compare = halves(self)
        rows = 2 * min(len(fit), len(compare))
        return whiten(self.features.embedding[fit], rows // ROWS_PER_DIMENSION)

    @cached_property
    def compared(self) -> Floats:
        """The compare half in the whitened axes, float64."""
        _, compare = halves(self)
        return self.whitening.apply(self.features.embedding[compare])

    @cached_property
    def read(self) -> Integers:
        """The rows whose probabilities are compared: no axes were fitted to them, so all rows.

        Of rows that were selected by the discriminant only the half that it was not fitted to.
        """
        return np.arange(len(self.features)) if self.split is None else self.split[1]

    @cached_property
    def sorted_scores(self) -> Floats:
        """Confidence and entropy of the rows read, (n, 2), each column sorted."""
        return np.sort(scores(self.features)[self.read], axis=0)

    @cached_property
    def sorted_probabilities(self) -> Floats:
        """Each class's probability in the rows read, (n, classes), each column sorted."""
        return np.sort(self.features.probabilities[self.read], axis=0)

    @cached_property
    def sorted_statistics(self) -> dict[str, Floats]:
        """Each picture statistic of the rows read, (n,) float64, sorted."""
        table = self.features.statistics.iloc[self.read]
        return {str(name): np.sort(table[name].to_numpy(np.float64)) for name in table.columns}


def squared_distances(one: Floats, other: Floats) -> Floats:
    """Give the squared Euclidean distance of each row to each, (n, d) and (m, d) to (n, m)."""
    distance = (one**2).sum(axis=1)[:, None] + (other**2).sum(axis=1) - 2 * one @ other.T
    return np.asarray(np.maximum(distance, 0, out=distance))


def scores(features: FeatureTable) -> Floats:
    """Give confidence and entropy of each row, (n, 2) float64; both constant without them."""
    return np.column_stack([features.confidence.astype(np.float64), features.entropy])


def halves(regime: Regime) -> tuple[Integers, Integers]:
    """Split a regime's rows for good: one half fits the whitening, the other is compared.

    Without the split the test rings on .08 to .80 of quiet batches.

    Raises:
        ValueError: if the regime has fewer than 20 rows.

    """
    if regime.split is not None:
        return regime.split
    n = len(regime.features)
    if n < MIN_ROWS:
        raise ValueError(
            f"regime {regime.name!r} has {n} reference rows, but a check needs at least {MIN_ROWS} "
            "(better ten times a batch): hold out more labelled samples"
        )
    order = np.random.default_rng(0).permutation(n)
    return np.sort(order[: n // 2]), np.sort(order[n // 2 :])


def merge(regimes: Sequence[Regime]) -> Regime:
    """Put regimes together as one world; each row stays in the half that it was in."""
    if len(regimes) == 1:
        return regimes[0]
    starts = np.cumsum([0, *(len(regime.features) for regime in regimes[:-1])])
    split = [halves(regime) for regime in regimes]
    return Regime(
        " + ".join(dict.fromkeys(regime.name for regime in regimes)),
        concatenate([regime.features for regime in regimes]),
        np.concatenate([regime.labels for regime in regimes]),
        split=(
            np.concatenate([start + fit for start, (fit, _) in zip(starts, split, strict=True)]),
            np.concatenate([start + rest for start, (_, rest) in zip(starts, split, strict=True)]),
        ),
    )


def _restrict(regime: Regime, keep: Mask) -> Regime:
    """Keep some rows of a regime, each in the half that it was in."""
    if keep.all():
        return regime
    fit, compare = (half[keep[half]] for half in halves(regime))
    rows = np.concatenate([fit, compare])
    places = np.arange(len(rows))
    return Regime(
        regime.name,
        regime.features.take(rows),
        regime.labels[rows],
        split=(places[: len(fit)], places[len(fit) :]),
    )


def _is_large_enough(regime: Regime) -> bool:
    return min(map(len, halves(regime))) >= MIN_ROWS // 2


@dataclass(frozen=True, eq=False)
class Reference:
    """Everything that a version is compared with.

    Args:
        regimes: one or more, of the same widths and kind.
        classes: names of the classes, in the order of the probabilities.

    Raises:
        ValueError: if there is no regime, a name comes twice, or widths differ.

    """

    regimes: tuple[Regime, ...]
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.regimes:
            raise ValueError("a reference has at least one regime")
        names = [regime.name for regime in self.regimes]
        if len(set(names)) < len(names):
            raise ValueError(f"regimes of a reference have names of their own: {names}")
        width = self.regimes[0].features.embedding.shape[1]
        for regime in self.regimes:
            shapes = (
                regime.features.embedding.shape[1],
                regime.features.probabilities.shape[1],
            )
            if shapes != (width, len(self.classes)):
                raise ValueError(
                    f"regime {regime.name!r} has {shapes[0]} embedding dimensions and {shapes[1]} "
                    f"probabilities, not {width} and {len(self.classes)}"
                )
            if regime.features.kind is not self.kind:
                raise ValueError(f"regime {regime.name!r} is of another kind than {self.kind}")

    @property
    def kind(self) -> Kind:
        """What the model answers."""
        return self.regimes[0].features.kind

    @property
    def n(self) -> int:
        """Rows in all regimes."""
        return sum(len(regime.features) for regime in self.regimes)

    @property
    def accuracy(self) -> float:
        """Share of labelled rows that the model got right.

        Raises:
            ValueError: if no row has a label.

        """
        correct = np.concatenate([regime.correct for regime in self.regimes])
        if not correct.size:
            raise ValueError(
                "no row of the reference has a label, so its accuracy is not known: "
                "build the reference from labelled held-out samples"
            )
        return float(correct.mean())

    @cached_property
    def members(self) -> tuple[tuple[int, ...], ...]:
        """The positions of the regimes of each world, one tuple a world.

        Two regimes are one world when a discriminant fitted on their fitting halves tells fewer
        than `MERGE_BELOW` of their compared rows apart, each regime counted as half.
        """
        worlds = [{i} for i in range(len(self.regimes))]
        for i, one in enumerate(self.regimes):
            for j, other in enumerate(self.regimes[:i]):
                if _told_apart(one, other) < MERGE_BELOW:
                    joined = [world for world in worlds if i in world or j in world]
                    worlds = [w for w in worlds if w not in joined] + [set[int]().union(*joined)]
        return tuple(sorted(tuple(sorted(world)) for world in worlds))

    @cached_property
    def worlds(self) -> tuple[Regime, ...]:
        """The regimes, with those merged that cannot be told apart ("first + since v1")."""
        return tuple(merge([self.regimes[i] for i in world]) for world in self.members)

    @cached_property
    def discriminant(self) -> Discriminant:
        """The linear discriminant between the worlds, fitted on their fitting halves.

        A world's rows may lie in several: see `_discriminant`.
        """
        return _discriminant([w.features.embedding[halves(w)[0]] for w in self.worlds], ROUNDS)

    @cached_property
    def routed(self) -> tuple[Integers, ...]:
        """For each regime, the world that each of its own rows is nearest to."""
        return tuple(_nearest(self, regime.features) for regime in self.regimes)

    @cached_property
    def _made(self) -> dict[tuple[object, ...], Regime]:
        return {}

    def selected(self, members: tuple[int, ...], worlds: tuple[int, ...]) -> Regime:
        """Give the rows of some regimes that are routed to some worlds.

        The same object each time, so that its whitening is fitted once and not at each check.
        """

        def make() -> Regime:
            kept = [np.isin(self.routed[i], worlds) for i in members]
            return merge(
                [_restrict(self.regimes[i], k) for i, k in zip(members, kept, strict=True)]
            )

        return self._once((members, worlds), make)

    def together(self, regimes: Sequence[Regime]) -> Regime:
        """Merge regimes of this reference; the same object each time for the same ones."""
        return self._once(tuple(map(id, regimes)), lambda: merge(regimes))

    def thinned(self, home: Regime, kept: int, strays: Sequence[Regime]) -> Regime:
        """Merge so many random rows of one regime with all of some others; the same each time."""

        def make() -> Regime:
            keep = np.zeros(len(home.features), dtype=bool)
            keep[np.random.default_rng(0).permutation(len(keep))[:kept]] = True
            return merge([_restrict(home, keep), *strays])

        return self._once((id(home), kept, *map(id, strays)), make)

    def _once(self, key: tuple[object, ...], make: Callable[[], Regime]) -> Regime:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def require_readable(self, features: FeatureTable) -> None:
        """Refuse a batch that this reference cannot be compared with.

        Raises:
            ValueError: if it is empty, not finite, or of other widths.

        """
        if not len(features):
            raise ValueError("the batch has no rows to compare with the reference")
        ours, theirs = self.regimes[0].features, features
        widths = [(t.embedding.shape[1], t.probabilities.shape[1]) for t in (ours, theirs)]
        if widths[0] != widths[1]:
            raise ValueError(
                f"the batch has embeddings and probabilities of widths {widths[1]}, the reference "
                f"{widths[0]}: they come from different versions, so extract the batch again"
            )
        features.require_finite("batch")

    def save(self, folder: Path) -> None:
        """Write `regime-<i>.parquet` for each regime, then `reference.json`."""
        folder.mkdir(parents=True, exist_ok=True)
        for i, regime in enumerate(self.regimes):
            table = regime.features.to_arrow().append_column(
                "label", pa.array(regime.labels, pa.int64())
            )
            write_parquet(table, folder / f"regime-{i}.parquet")
        content = {
            "format": 1,
            "classes": list(self.classes),
            "regimes": [regime.name for regime in self.regimes],
        }
        (folder / "reference.json").write_text(
            json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )

    @classmethod
    def load(cls, folder: Path) -> Reference:
        """Read what `save` wrote, bit for bit.

        Raises:
            FileNotFoundError: if a file is missing.
            ValueError: if a file is damaged or of a format that this release does not know.

        """
        content = json.loads((folder / "reference.json").read_text(encoding="utf-8"))
        if content.get("format") != 1:
            raise ValueError(
                f"{folder / 'reference.json'} has format {content.get('format')!r}, this release "
                "reads format 1: use the release that wrote it"
            )
        regimes = []
        for i, name in enumerate(content["regimes"]):
            table = pq.read_table(folder / f"regime-{i}.parquet")
            labels = table["label"].to_numpy().astype(np.int64)
            regimes.append(Regime(name, FeatureTable.from_arrow(table), labels))
        return cls(tuple(regimes), tuple(content["classes"]))


@dataclass(frozen=True, eq=False)
class Discriminant:
    """Axes (d, k) in which every regime has unit covariance, and the regimes' centres (r, k)."""

    mean: Floats
    axes: Floats
    centres: Floats

    def nearest(self, embedding: Floats) -> Integers:
        """Give the position of the nearest centre for each row, (n,)."""
        points = (embedding.astype(np.float64) - self.mean) @ self.axes
        # |p - c|^2 without the term that is the same for every centre
        distance = (self.centres**2).sum(axis=1) - 2 * points @ self.centres.T
        return np.asarray(distance.argmin(axis=1), dtype=np.int64)


def _discriminant(groups: list[Floats], rounds: int = 0) -> Discriminant:
    """Fit axes and centres to groups of rows, then let each group spread over all centres.

    A regime that is half an older world and half a new one has its centre between the two, and the
    border in the older one. So expectation and maximisation for normal distributions of one
    covariance, in which every group has shares of its own, move the centre to the new half.
    """
    rows = np.concatenate(groups)
    # The total variance chooses the space, so that the directions between regimes are in it.
    total = whiten(rows, min(DISCRIMINANT_DIMENSIONS, max(1, len(rows) // ROWS_PER_DIMENSION)))
    points = total.apply(rows)
    group = np.repeat(np.arange(len(groups)), [len(g) for g in groups])
    belongs = np.eye(len(groups))[group]
    centres, scale = _centres(points, belongs)
    shares = np.full((len(groups),) * 2, 1 / len(groups))
    for _ in range(rounds):
        distance = (((points @ scale)[:, None] - (centres @ scale)) ** 2).sum(axis=2)
        belongs = scipy.special.softmax(np.log(shares[group]) - distance / 2, axis=1)
        if belongs.sum(axis=0).min() < MIN_ROWS // 2:
            break
        shares = np.stack([belongs[group == i].mean(axis=0) for i in range(len(groups))])
        shares = np.maximum(shares, 1e-6)
        centres, scale = _centres(points, belongs)
    return Discriminant(total.mean, total.axes @ scale, centres @ scale)


def _centres(points: Floats, belongs: Floats) -> tuple[Floats, Floats]:
    """Give the weighted centres (r, k) and the axes (k, k) of unit covariance within them."""
    weights = belongs.sum(axis=0)
    centres = (belongs.T @ points) / weights[:, None]
    within = points.T @ points - (centres.T * weights) @ centres
    # In the total whitening every variance is at most 1; the ridge only keeps a constant one apart.
    values, vectors = scipy.linalg.eigh(within / len(points) + 1e-6 * np.eye(len(within)))
    return centres, vectors / np.sqrt(np.maximum(values, 1e-9))


def _told_apart(one: Regime, other: Regime) -> float:
    groups = [r.features.embedding for r in (one, other)]
    split = [halves(one), halves(other)]
    discriminant = _discriminant([g[fit] for g, (fit, _) in zip(groups, split, strict=True)])
    right = [
        float((discriminant.nearest(g[rest]) == i).mean())
        for i, (g, (_, rest)) in enumerate(zip(groups, split, strict=True))
    ]
    return sum(right) / 2


def _nearest(reference: Reference, features: FeatureTable) -> Integers:
    if len(reference.members) == 1:
        return np.zeros(len(features), dtype=np.int64)
    return reference.discriminant.nearest(features.embedding)


def route(reference: Reference, features: FeatureTable) -> Integers:
    """Give, for each row, the position in `worlds` of the one that it is nearest to, (n,) int64.

    By the linear discriminant between the worlds; zeros if there is only one.

    Raises:
        ValueError: if the batch cannot be compared with the reference, or a regime is too small.

    """
    reference.require_readable(features)
    return _nearest(reference, features)


def assign(reference: Reference, features: FeatureTable, min_part: int = MIN_PART) -> Integers:
    """Route, then put strays back with the largest part.

    A part stays if it has at least `min_part` rows, and more than the largest part's world is
    likely to have sent there, judged by its own held-out rows that go astray.
    """
    return _put_back(reference, route(reference, features), min_part)


def _put_back(reference: Reference, world: Integers, min_part: int) -> Integers:
    counts = np.bincount(world, minlength=len(reference.members))
    largest = int(counts.argmax())
    sent = np.sum([_sent(reference, i) for i in reference.members[largest]], axis=0)
    # narrower than `_likely`: a part that stays in vain costs less than a known one put elsewhere
    limit = stats.binom.ppf(0.99, len(world), (sent + 0.5) / (sent.sum() + 1))
    small = ((counts < min_part) | (counts <= limit)) & (np.arange(len(counts)) != largest)
    return np.where(small[world], largest, world)


def _sent(reference: Reference, regime: int) -> Integers:
    """Count the compared rows of a regime that go to each world."""
    routed = reference.routed[regime][halves(reference.regimes[regime])[1]]
    return np.bincount(routed, minlength=len(reference.members))


def _likely(reference: Reference, regime: int, n: int) -> Floats:
    """Give how many of n rows of a regime may go to each world, at the 99.9 % quantile.

    The shares are only known from the regime's own compared rows: hence beta-binomial.
    """
    sent = _sent(reference, regime)
    likely = stats.betabinom.ppf(STRAY_QUANTILE, n, sent + 0.5, sent.sum() - sent + 0.5)
    return np.asarray(likely, dtype=np.float64)


@dataclass(frozen=True, eq=False)
class Portion:
    """The rows of a batch that are nearest to one world, and what they may be compared with.

    Args:
        world: its position in `Reference.worlds`.
        rows: positions in the batch.
        nearest: of each row, the world that it is nearest to; another one for strays put back.
        home: the world's own rows that the discriminant sends there too.
        candidates: each source that the rows may have come from, so selected: the world with and
            without strays, its regimes, other regimes that send as many there, and all of them
            together. The rows are new only if they differ from every one.

    """

    world: int
    rows: Integers
    nearest: Integers
    home: Regime
    candidates: tuple[Regime, ...]


def portions(
    reference: Reference, features: FeatureTable, min_part: int = MIN_PART
) -> tuple[Portion, ...]:
    """Cut a batch by world and find what each part is to be compared with.

    A part was selected by the discriminant, so it is compared with reference rows that the
    discriminant selects too: against the unselected ones a second regime of the same world made
    .81 of quiet batches of 100 ring, and all of 400 (64-d, 600 rows a regime). Where worlds
    overlap, what is nearest to one comes from several in unknown shares; of those, each alone
    and all together are tried.

    Raises:
        ValueError: if the batch cannot be compared with the reference, or a regime is too small.

    """
    if len(reference.regimes) == 1:
        reference.require_readable(features)
        only = reference.regimes[0]
        rows = np.arange(len(features))
        return (Portion(0, rows, np.zeros_like(rows), only, (only,)),)
    nearest = route(reference, features)
    assigned = _put_back(reference, nearest, min_part)
    found = []
    for world in map(int, np.unique(assigned)):
        rows = np.flatnonzero(assigned == world)
        members = reference.members[world]
        home = reference.selected(members, (world,))
        own = [reference.selected((i,), (world,)) for i in members]
        if not _is_large_enough(home):
            home, own = reference.worlds[world], [reference.regimes[i] for i in members]
        candidates = [home]
        if len(own) > 1:
            candidates += [regime for regime in own if _is_large_enough(regime)]
        cells = tuple(map(int, np.unique(nearest[rows])))
        if len(cells) > 1:
            # with the strays that its own regimes send too, where some were put back
            candidates.append(reference.selected(members, cells))
        candidates += _others(reference, world, own, len(rows), len(features))
        candidates += _with_strays(reference, world, home, rows=len(rows), assigned=assigned)
        found.append(Portion(world, rows, nearest[rows], home, tuple(candidates)))
    return tuple(found)


def _others(reference: Reference, world: int, own: list[Regime], rows: int, n: int) -> list[Regime]:
    """Give what other worlds' regimes send to a world: those that may send so many, and all."""
    others = [
        (i, reference.selected((i,), (world,)))
        for i in range(len(reference.regimes))
        if i not in reference.members[world]
    ]
    others = [(i, regime) for i, regime in others if _is_large_enough(regime)]
    if not others:
        return []
    likely = [regime for i, regime in others if rows <= _likely(reference, i, n)[world]]
    return [*likely, reference.together([*own, *(regime for _, regime in others)])]


def _with_strays(
    reference: Reference, world: int, home: Regime, *, rows: int, assigned: Integers
) -> list[Regime]:
    """Mix a small part's home with strays of the other worlds, in the share that is to be expected.

    Of 90 sketches one or two go astray: among ten photos that is a tenth, and not the hundredth
    that they are among the reference's.
    """
    counts = np.bincount(assigned, minlength=len(reference.members))
    strays, expected = [], 0.0
    for other, members in enumerate(reference.members):
        if other == world:
            continue
        sent = reference.selected(members, (world,))
        total = sum(len(reference.regimes[i].features) for i in members)
        expected += counts[other] * len(sent.features) / total
        strays += [sent] if len(sent.features) else []
    share = min(0.5, round(expected / rows / STRAY_STEP) * STRAY_STEP)
    n = sum(len(regime.features) for regime in strays)
    if not share or n / (len(home.features) + n) >= share:
        return []
    kept = math.ceil(n * (1 - share) / share)
    return [reference.thinned(home, kept, strays)] if n + kept >= 2 * MIN_ROWS else []


def bounded(reference: Reference, max_regimes: int) -> Reference:
    """Merge the regimes that are hardest to tell apart until at most so many are left.

    Each check costs time for every regime and every pair of them, so their number has a bound. A
    merged regime keeps all rows and gets halves of its own, as it would when loaded from disk.
    Regimes of one world lose nothing; two worlds in one regime make pure batches of either ring
    (PACS, photos and sketches: 1.00), so a bound is to leave room for the worlds there are.

    Raises:
        ValueError: if not even one regime is allowed, or one has fewer than 20 rows.

    """
    if max_regimes < 1:
        raise ValueError(f"max_regimes={max_regimes} leaves no regime: allow at least 1")
    regimes = list(reference.regimes)
    apart: dict[tuple[str, str], float] = {}
    while len(regimes) > max_regimes:
        pairs = [(one, other) for i, one in enumerate(regimes) for other in regimes[i + 1 :]]
        for one, other in pairs:
            if (one.name, other.name) not in apart:
                apart[one.name, other.name] = _told_apart(one, other)
        closest = min(pairs, key=lambda pair: apart[pair[0].name, pair[1].name])
        merged = merge(closest)
        merged = Regime(merged.name, merged.features, merged.labels)
        place = regimes.index(closest[0])
        regimes = [r for r in regimes if r not in closest]
        regimes.insert(place, merged)
    return Reference(tuple(regimes), reference.classes)
