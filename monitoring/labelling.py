"""Which samples to label next: some at random to judge on, some chosen to learn from.

Labels have two uses that must not be mixed. A model is judged on held-out samples, and a hold-out
of chosen samples (hard ones, rare ones) is biased: its accuracy is not that of the batches, and the
gate's figures are wrong. So the held-out part of a list is a uniform random sample of the batches,
and only among the samples that may be trained on are some preferred.
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import optimize, stats

from monitoring.features import FeatureTable, Kind, concatenate
from monitoring.gallery import Shown, gallery
from monitoring.reference import MIN_ROWS, ROWS_PER_DIMENSION, squared_distances, whiten
from monitoring.words import count

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence
    from pathlib import Path

    from monitoring.features import Floats, Integers
    from monitoring.reference import Reference

HELD_OUT_SHARE = 0.4
"""The share of samples that are held out or validate: a list then holds what chance would give."""
MAX_CANDIDATES = 5000
"""More are thinned out at random first."""
DIMENSIONS = 64
FOLDS = 5
RIDGE = 0.01
"""In units of the variance along each whitened axis."""
ROUNDS = 30
FARTHEST = 6.0
"""No two points have a larger squared distance: directions 4, probabilities 2."""
COLUMNS = ("sample_id", "label", "number", "predicted", "confidence", "novelty", "reason")
"""Of the list; whoever reads it back needs the first two."""
CSV_NAME = "label_requests.csv"
HTML_NAME = "label_requests.html"
BINS = 200
"""Of novelty: with 50 the 2 % of old samples in the last bin weighed as new ones."""
LEAST_WEIGHT = 1e-3
RANDOM_REASON = "drawn at random, to judge on"

_SAFE = "./"


@dataclass(frozen=True)
class Request:
    """A sample that somebody should label.

    Args:
        sample_id: which.
        predicted: what the model says.
        confidence: its probability; NaN of a model of values, which tells none.
        novelty: share of the reference that looks less new than the sample, 0 to 1.
        reason: why this one, in words.

    """

    sample_id: str
    predicted: str
    confidence: float
    novelty: float
    reason: str


def choose(
    reference: Reference,
    batches: Sequence[FeatureTable],
    n: int,
    *,
    holdout: Callable[[str], bool],
    labelled: Collection[str] = (),
    share: float = HELD_OUT_SHARE,
    seed: int = 0,
) -> tuple[Request, ...]:
    """Choose n samples to label, best first: whoever stops half-way has half a good list.

    The samples that `holdout` names are drawn uniformly at random, so that a model is judged on
    what the batches hold. Of the others, one is taken from the middle of each of as many clusters
    as are wanted: k-means on directions of the embedding beside probabilities, weighted by how new
    a sample looks, samples already labelled being clusters of their own. What is typical teaches
    most while labels are few (TypiClust, Hacohen et al. 2022). On real drift, where the model is
    unsure of nearly everything, uncertainty (margin, entropy) was worse than random choice on
    digits, k-center (Sener & Savarese 2018) on pictures, and BADGE (Ash et al. 2020) on digits.
    Measured: tests/bench/labelling.py.

    The same batches and labels give the same list. The random draw goes by a hash of the id, so
    another batch that joins leaves the order of the earlier samples as it was.

    Args:
        reference: of the champion.
        batches: features of the drifted batches; of a sample that comes twice the first one counts.
        n: how many; fewer are returned if the batches hold fewer unlabelled samples.
        holdout: whether a sample is never trained on (held out or for validation). The roles are
            fixed elsewhere, by a hash of the id; this package must only keep to them.
        labelled: ids that have a label.
        share: of the n, how many are drawn from the samples that `holdout` names. If one part has
            too few, the other fills up.
        seed: another one draws other samples.

    Raises:
        ValueError: if n or the share make no sense, there is no batch, or one cannot be compared
            with the reference.

    """
    if n < 1:
        raise ValueError(f"n={n}: ask for at least one label")
    if not 0 <= share <= 1:
        raise ValueError(f"share={share}: the held-out share of a list lies between 0 and 1")
    pool = _distinct(concatenate(batches))
    reference.require_readable(pool)
    order = _draw(pool.sample_ids, seed)
    has_label = np.isin(pool.sample_ids, list(labelled))
    is_held = np.array([holdout(name) for name in pool.sample_ids])
    held = order[(is_held & ~has_label)[order]].tolist()
    free = order[(~is_held & ~has_label)[order]].tolist()
    known = np.flatnonzero(~is_held & has_label).tolist()
    most = min(n, len(held) + len(free))
    k = min(len(held), max(round(share * most), most - len(free)))
    drawn, free = held[:k], free[:MAX_CANDIDATES]
    novelty = _novelty(reference, pool)
    weights = LEAST_WEIGHT + _new_share(novelty)
    points = _points(pool, weights)
    spread = _spread(points[free], weights[free], points[known], most - k, seed)
    chosen = {free[i]: _learn_reason(others) for i, others in spread}
    reasons = dict.fromkeys(drawn, RANDOM_REASON) | chosen
    predicted = pool.words(reference.classes)
    sure = pool.confidence if pool.kind is not Kind.REGRESSION else np.full(len(pool), np.nan)
    return tuple(
        Request(
            sample_id=pool.sample_ids[row],
            predicted=predicted[row],
            confidence=float(sure[row]),
            novelty=float(novelty[row]),
            reason=reasons[row],
        )
        for row in _interleave(drawn, list(chosen))
    )


def _distinct(pool: FeatureTable) -> FeatureTable:
    places = dict.fromkeys(pool.sample_ids, 0)
    for i in reversed(range(len(pool))):
        places[pool.sample_ids[i]] = i
    return pool if len(places) == len(pool) else pool.take(list(places.values()))


def _draw(sample_ids: Sequence[str], seed: int) -> Integers:
    """Put samples in a random order that does not depend on which others there are.

    By a hash of the id, of another kind than the one that fixes the roles.
    """
    salt = f"sustain request\0{seed}\0".encode()
    ranks = [
        hashlib.sha256(salt + name.encode(errors="surrogateescape")).digest() for name in sample_ids
    ]
    return np.asarray(sorted(range(len(ranks)), key=ranks.__getitem__), dtype=np.int64)


def _interleave(drawn: list[int], chosen: list[int]) -> list[int]:
    """Mix two lists evenly, each in its own order."""
    places = [
        *((i + 0.5) / len(drawn) for i in range(len(drawn))),
        *((i + 0.5) / len(chosen) for i in range(len(chosen))),
    ]
    rows = [*drawn, *chosen]
    return [rows[i] for i in np.argsort(places, kind="stable")]


def _novelty(reference: Reference, pool: FeatureTable) -> Floats:
    """Give the share of the reference that each row looks newer than, (n,).

    By a linear discriminant between reference and pool; each row is judged by one that was fitted
    without it. Distance from the reference would not do: sketches lie nearer to the middle of the
    photos than photos do. If there are under 20 of
    either, or nothing varies, every row counts as new.
    """
    old = np.concatenate([regime.features.embedding for regime in reference.regimes])
    n = (len(old), len(pool))
    rows = np.concatenate([old, pool.embedding])
    points = whiten(rows, min(DIMENSIONS, len(rows) // ROWS_PER_DIMENSION)).apply(rows)
    if min(n) < MIN_ROWS or not points.shape[1]:
        return np.ones(len(pool))
    is_new = np.repeat([False, True], n)
    rng = np.random.default_rng(0)
    fold = np.concatenate([rng.permutation(np.arange(size) % FOLDS) for size in n])
    score = np.empty(len(rows))
    for left_out in range(FOLDS):
        groups = [points[(fold != left_out) & (is_new == new)] for new in (False, True)]
        within = sum(np.cov(group.T).reshape(points.shape[1], -1) for group in groups) / 2
        between = groups[1].mean(axis=0) - groups[0].mean(axis=0)
        axis = np.linalg.solve(within + RIDGE * np.eye(len(between)), between)
        score[fold == left_out] = points[fold == left_out] @ axis
    return np.asarray(np.searchsorted(np.sort(score[: n[0]]), score[n[0] :]) / n[0])


def _new_share(novelty: Floats) -> Floats:
    """Give the probability that a sample of this novelty is of a new world, (n,), 0 to 1.

    Novelty is spread evenly over what is old, so its density in the pool says how much is not: the
    local false discovery rate (Efron et al. 2001), with the density rising (Grenander 1956) and
    the old share from the lower half (Storey 2002).
    """
    old_share = min(1.0, 2 * float((novelty < 0.5).mean()))  # noqa: PLR2004
    place = np.minimum((novelty * BINS).astype(np.int64), BINS - 1)
    density = np.bincount(place, minlength=BINS) / len(novelty) * BINS
    rising = optimize.isotonic_regression(density).x
    return np.asarray(np.clip(1 - old_share / np.maximum(rising[place], 1e-9), 0, 1))


def _points(pool: FeatureTable, weights: Floats) -> Floats:
    """Lay out what clusters are sought in: directions from the weighted mean, and probabilities.

    From the reference's mean all of a new world can lie in one direction.
    """
    centred = pool.embedding - np.average(pool.embedding, axis=0, weights=weights)
    length = np.linalg.norm(centred, axis=1, keepdims=True)
    unit = centred / np.where(length > 0, length, 1)
    if unit.shape[1] > DIMENSIONS:
        _, axes = np.linalg.eigh(unit.T @ unit)
        unit = unit @ axes[:, -DIMENSIONS:]
    return np.concatenate([unit, _answers(pool)], axis=1, dtype=np.float64)


def _answers(pool: FeatureTable) -> Floats:
    """Give answers between which the squared distance is at most 2, (n, k): values as ranks."""
    if pool.kind is Kind.SINGLE_LABEL:
        return pool.probabilities
    answers = pool.probabilities
    if pool.kind is Kind.REGRESSION:
        answers = stats.rankdata(answers, axis=0) / len(pool)
    return np.asarray(answers * math.sqrt(2 / answers.shape[1]))


def _spread(
    points: Floats, weights: Floats, fixed: Floats, k: int, seed: int
) -> list[tuple[int, int]]:
    """Choose k points, one from the middle of each cluster; the heaviest cluster comes first.

    Args:
        points: (n, d), n at least k.
        weights: (n,), over 0.
        fixed: (m, d) centres that do not move, and that nothing is chosen from.
        k: how many.
        seed: of the clusters' start.

    Returns:
        For each chosen point its position and how many others its cluster has.

    """
    if not k:
        return []
    cluster, distance = _cluster(points, weights, fixed, k, np.random.default_rng(seed))
    found: dict[int, int] = {}
    mass = np.bincount(cluster, weights, minlength=len(fixed) + k)[len(fixed) :]
    for c in np.argsort(-mass, kind="stable"):
        members = np.flatnonzero(cluster == len(fixed) + c)
        if members.size:
            middle = members[(distance[members] / weights[members]).argmin()]
            found[int(middle)] = len(members) - 1
    for i in range(len(points)):  # a cluster can run empty, where points coincide
        if len(found) == k:
            break
        found.setdefault(i, 0)
    return list(found.items())


def _cluster(
    points: Floats, weights: Floats, fixed: Floats, k: int, rng: np.random.Generator
) -> tuple[Integers, Floats]:
    """Run weighted k-means beside centres that are fixed.

    Returns:
        For each point its cluster (the fixed ones come first) and the squared distance to it.

    """
    moving = _start(points, weights, fixed, k, rng)
    for _ in range(ROUNDS):
        squared = squared_distances(points, np.concatenate([fixed, moving]))
        cluster = squared.argmin(axis=1)
        belongs = np.zeros((len(fixed) + k, len(points)))
        belongs[cluster, np.arange(len(points))] = weights
        mass = belongs.sum(axis=1, keepdims=True)[len(fixed) :]
        sums = (belongs @ points)[len(fixed) :]
        moved = np.where(mass > 0, sums / np.where(mass > 0, mass, 1), moving)
        if np.allclose(moved, moving):
            break
        moving = moved
    return np.asarray(cluster, dtype=np.int64), squared.min(axis=1)


def _start(
    points: Floats, weights: Floats, fixed: Floats, k: int, rng: np.random.Generator
) -> Floats:
    """Give the k centres of greedy k-means++, (k, d): of a few drawn ones the best, each time.

    Plain k-means++ missed small clusters.
    """
    trials = 2 + int(np.log(k))
    nearest = (
        squared_distances(points, fixed).min(axis=1)
        if len(fixed)
        else np.full(len(points), FARTHEST)
    )
    centres: list[int] = []
    for _ in range(k):
        cost = nearest * weights
        total = cost.sum()
        drawn = rng.choice(len(points), size=trials, p=cost / total if total > 0 else None)
        left = np.minimum(nearest[:, None], squared_distances(points, points[drawn]))
        best = int((weights @ left).argmin())
        centres.append(int(drawn[best]))
        nearest = left[:, best]
    return points[centres]


def write_requests(
    folder: Path, requests: Sequence[Request], thumbnails: Mapping[str, bytes]
) -> Path:
    """Write `label_requests.csv`, to be filled in, and `label_requests.html`, to look at.

    The list goes back into the labels folder as it is: an empty label is no label, and further
    columns are left alone. A cell that a spreadsheet would run as a formula is made text: a sample
    id by "./" before it, which `read_id` takes away, anything else by an apostrophe.

    Args:
        folder: made if it is not there.
        requests: the list; its numbers are the places in it, from 1.
        thumbnails: small PNG, JPEG, GIF or WebP files by sample id; others are not shown. They
            become part of the page, which loads nothing and runs nothing.

    Returns:
        The path of the CSV file.

    Raises:
        ValueError: a list lies there that somebody has begun to fill in.
    """
    path = folder / CSV_NAME
    if path.exists() and not _is_untouched(path):
        raise ValueError(
            f"{path} has been filled in, and was left as it is: move it into the labels folder, or"
            " have the new list written to another folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    for number, request in enumerate(requests, start=1):
        writer.writerow(
            (
                _write_id(request.sample_id),
                "",
                number,
                _cell(request.predicted),
                "" if math.isnan(request.confidence) else f"{request.confidence:.3f}",
                f"{request.novelty:.3f}",
                _cell(request.reason),
            )
        )
    # with a byte order mark, without which Excel reads no UTF-8
    _write(folder / HTML_NAME, _page(requests, thumbnails), "utf-8")
    _write(path, text.getvalue(), "utf-8-sig")
    return path


def read_id(cell: str) -> str:
    """Give the sample id that stands in a cell of a list: no id begins with "./"."""
    return cell.removeprefix(_SAFE)


def _write(path: Path, text: str, encoding: str) -> None:
    """Write beside the target and rename, so that a killed process leaves no half file."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(text.encode(encoding, errors="backslashreplace"))
    partial.replace(path)


def _is_untouched(path: Path) -> bool:
    """Whether a list is as it was written: with our columns, and no label."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header, *rows = csv.reader(file)
    except (ValueError, csv.Error):
        return False
    empty = all(len(row) == len(COLUMNS) and not row[1].strip() for row in rows)
    return tuple(header) == COLUMNS and empty


def _learn_reason(others: int) -> str:
    alike = f"stands for {count(others, 'similar one')}" if others else "no other is like it"
    return f"to learn from: {alike}"


def _runs(cell: str) -> bool:
    """Tell whether a spreadsheet may read a cell as a formula (OWASP, "CSV Injection")."""
    first = unicodedata.normalize("NFKC", cell.lstrip())[:1]  # full-width signs count too
    return first in {"=", "+", "-", "@"} or cell[:1] in {"\t", "\r", "\n"}


def _write_id(sample_id: str) -> str:
    return _SAFE + sample_id if _runs(sample_id) else sample_id


def _cell(text: str) -> str:
    return f"'{text}" if _runs(text) else text


def _page(requests: Sequence[Request], thumbnails: Mapping[str, bytes]) -> str:
    drawn = sum(request.reason == RANDOM_REASON for request in requests)
    shown = []
    for one in requests:
        sure = "" if math.isnan(one.confidence) else f" ({one.confidence:.0%})"
        words = f"predicted {one.predicted}{sure}, newer than {one.novelty:.0%} of the reference"
        thumbnail = thumbnails.get(one.sample_id) or b""
        shown.append(Shown(one.sample_id, (words, one.reason), thumbnail))
    task = (
        f"Fill in the column label of {CSV_NAME} (the numbers are the same) and put the file into"
        f" the labels folder. {drawn} of them were drawn at random to judge models on: skip none of"
        " those, or the judgement is about the easy ones only."
    )
    return gallery("Labels worth asking for", f"{len(requests)} samples to label", task, shown)
