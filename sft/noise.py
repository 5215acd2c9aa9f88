"""Labels that are wrong: which ones, and is a delivery of them fit to be learned from?

Each label is compared with what the other labels say about its embedding (leave-one-out kernel
ridge regression, in closed form) and with the champion: confident learning (Northcutt, Jiang and
Chuang 2021). A hold-out cut from the same delivery can't do this, since it is wrong too.

What tells wrong labels from hard pictures: labels that are wrong at random are wrong among the
surest predictions as often as among the rest, so agreement there stays near the share of right
labels however easy the pictures are. With hard pictures and right labels the surest predictions
are right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import linalg, optimize, stats

Floats: TypeAlias = NDArray[np.float64]
Integers: TypeAlias = NDArray[np.int64]

OLD_SAMPLES = 200
"""Old samples beside the fresh ones: more cost time."""
OLD_WEIGHT = 0.1
"""Of an old sample beside a fresh one's 1: the surest fifth of 140 clean MNIST digits under
`image-medium` agree in .60 with it, .54 without old samples, .58 with weight 1 (4 draws)."""
RIDGES = (0.001, 0.003, 0.01, 0.03, 0.1)
"""Ridge penalties to choose from by leave-one-out error, a sample and unit of kernel."""
CHUNK = 1000
"""Fresh samples judged together: the eigendecomposition takes n³ steps."""
SURE_SHARE = 0.25
"""Of the predictions that count as sure. There, 140 clean labels agree in .83 of cases at least
(PACS sketches), with 60 % wrong ones in .71 at most."""
LEAST_SURE = 24
SUREST_SHARE = 0.15
LEAST_SUREST = 20
HARD_SUREST = 0.6
HARD_FALL = 0.5
HARD_CONCENTRATION = 0.5
HARD_SECOND = 0.2
"""Hard pictures with right labels: the surest agree in .6 or more, the less sure half in less than
half of that, disagreements are spread over the classes, and the second guess is seldom the given
label (.16 on digits under `image-medium`, .27 to .30 on PACS art with 60 % "next class")."""
LEAST_VOUCHED = 0.5
"""Share of the labels that an adapted champion must vouch for: more right ones than wrong ones."""
NO_CHANCE = 3.0
"""Standard errors by which it must agree more often than with shuffled labels."""
RENAMED_GAIN = 0.25
RENAMED_LEAST = 0.5
"""Classes are mixed up when renaming them brings the champion's agreement with the labels to half
or more, and that much above what it is."""
LEAST_MIX = 0.5
"""Of the classes, the effective number (the exponential of the entropy) that a mix has at least."""
LEAST_OF_CLASS = 5
"""Labels of a class below which its samples are not called suspicious."""
EVEN_MIX = np.linspace(0, 1, 11)
UNSURE = 0.1
"""Weight of the uniform distribution where a likelihood is computed: one wrong label may not
decide it."""


class NoiseAction(StrEnum):
    """What becomes of suspicious labels."""

    LEAVE_OUT = "leave_out"
    DOWN_WEIGHT = "down_weight"
    KEEP = "keep"


@dataclass(frozen=True)
class NoiseSettings:
    """How wrong labels are looked for, and what follows.

    Attributes:
        max_wrong_share: a delivery with a larger estimated share goes to a person.
        action: `leave_out`; `down_weight`, by which a suspicious label counts for 1 less its doubt;
            or `keep`, which only lists them. Leaving out gained up to a point of accuracy with 10 %
            wrong labels and cost up to .8 on hard pictures.
        least_doubt: a suspicious label is less probable than the likeliest class by at least this.
            With .4, among 10 % wrong labels: precision .5 to .9 and recall .9 (easy) to .25 (PACS
            sketches); with 0, precision .15 to .9, and leaving them out harmed hard deliveries.
        min_labels: fewer can't be judged.
    """

    max_wrong_share: float = 0.25
    action: NoiseAction = NoiseAction.KEEP
    least_doubt: float = 0.4
    min_labels: int = 40

    def __post_init__(self) -> None:
        """Refuse values outside their range, by name."""
        if self.action not in list(NoiseAction):
            raise ValueError(f"action must be one of {', '.join(NoiseAction)}, got {self.action!r}")
        if not 0 < self.max_wrong_share < 1:
            raise ValueError(
                f"max_wrong_share must lie between 0 and 1, got {self.max_wrong_share}"
            )
        if not 0 <= self.least_doubt < 1:
            raise ValueError(f"least_doubt must be at least 0 and below 1, got {self.least_doubt}")
        if self.min_labels < LEAST_SURE:
            raise ValueError(f"min_labels must be at least {LEAST_SURE}, got {self.min_labels}")


@dataclass(frozen=True, eq=False)
class LabelVerdict:
    """What is thought of n labels.

    Attributes:
        judged: False: nothing could be said; nothing is suspicious then.
        suspicious: bool (n,).
        likely: int64 (n,), the class that a suspicious sample more likely has; else the given one.
        doubt: float64 (n,) in 0..1: the likeliest class's probability less the given one's.
        share: estimated share of wrong labels; NaN when it wasn't judged. When more than half of a
            class has the same wrong label, the estimate is of the others.
        interval: 95 %, of the share.
        stop: a person should look before anything is trained.
        words: why.
    """

    judged: bool
    suspicious: NDArray[np.bool_]
    likely: Integers
    doubt: Floats
    share: float
    interval: tuple[float, float]
    stop: bool
    words: str

    def weights(self, settings: NoiseSettings) -> Floats:
        """Tell how much each sample counts where it is learned from, 0 (not at all) to 1, (n,)."""
        trusted = {
            NoiseAction.KEEP: np.ones_like(self.doubt),
            NoiseAction.DOWN_WEIGHT: 1 - self.doubt,
            NoiseAction.LEAVE_OUT: np.zeros_like(self.doubt),
        }
        return np.where(self.suspicious, trusted[settings.action], 1.0)


def judge_labels(
    embeddings: NDArray[np.floating],
    labels: Integers,
    champion_probabilities: NDArray[np.floating],
    classes: Sequence[str],
    *,
    settings: NoiseSettings,
    old_embeddings: NDArray[np.floating] | None = None,
    old_labels: Integers | None = None,
    adapted: Callable[[], NDArray[np.floating]] | None = None,
    aligned: NDArray[np.floating] | None = None,
    seed: int = 0,
) -> LabelVerdict:
    """Judge the labels of a delivery.

    Args:
        embeddings: (n, d), the champion's, of the fresh samples.
        labels: (n,), places in `classes`.
        champion_probabilities: (n, c): the champion's answers; c may be less than the number of
            classes when new ones came last.
        classes: their names.
        settings: limits, and what follows.
        old_embeddings: (m, d), the champion's, of samples of its memory.
        old_labels: (m,), theirs.
        adapted: gives (n, c), the answers of the champion with batch-norm statistics of these very
            pictures. It is only asked when the delivery would be stopped, and can vouch for it:
            through a drifted sensor embeddings are muddled, and right labels look wrong.
        aligned: (n, c), the champion's answers by embeddings moved to a known world's moments
            (`sft.alignment`), if there is one. By them a champion that a drift has blinded sees
            whether classes are mixed up. Of 140 labels, every one the next class, .90 to 1.00 of
            the deliveries are stopped in four drifted worlds of digits (by its answers as they are
            0 to .03), .47 of PACS art (.20), none of sketches; of clean ones of three classes only,
            0 to .20 (0 to .75).
        seed: draws `OLD_SAMPLES` of the old ones, and the chunks of a large delivery.

    Raises:
        ValueError: parts of unequal length, labels outside the classes, or values not finite.
    """
    x, given, champion = _checked(embeddings, labels, champion_probabilities, classes)
    counts = np.bincount(given, minlength=len(classes))
    if reason := _cannot_judge(counts, settings):
        return not_judged(given, f"cannot judge the labels: {reason}")
    rng = np.random.default_rng(seed)
    old_x, old_y = _drawn(old_embeddings, old_labels, x.shape[1], len(classes), rng)
    scores = np.empty((len(given), len(classes)))
    for part in np.array_split(rng.permutation(len(given)), math.ceil(len(given) / CHUNK)):
        scores[part] = _leave_one_out(x[part], given[part], old_x, old_y, len(classes))
    suspicious, likely, doubt = _confident_learning(scores, given, champion, counts, settings)
    agreement = _agreement(scores, given)
    answers = champion if aligned is None else _checked(x, given, aligned, classes)[2]
    mixed_up = mixed_up_classes(answers, given, classes)
    verdict = partial(_verdict, agreement, mixed_up, suspicious, likely, doubt, settings)
    judged = verdict()
    if not judged.stop or mixed_up or adapted is None:
        return judged
    return verdict(vouched=_vouched(_checked(x, given, adapted(), classes)[2], given))


def not_judged(given: Integers, words: str) -> LabelVerdict:
    """Say nothing of labels (n,), and why."""
    return LabelVerdict(
        judged=False,
        suspicious=np.zeros(len(given), dtype=bool),
        likely=given.copy(),
        doubt=np.zeros(len(given)),
        share=math.nan,
        interval=(0.0, 1.0),
        stop=False,
        words=words,
    )


def _checked(
    embeddings: NDArray[np.floating],
    labels: Integers,
    probabilities: NDArray[np.floating],
    classes: Sequence[str],
) -> tuple[Floats, Integers, Floats]:
    x = np.asarray(embeddings, dtype=np.float64)
    champion = np.asarray(probabilities, dtype=np.float64)
    given = np.asarray(labels, dtype=np.int64)
    if not len(x) == len(given) == len(champion):
        raise ValueError(
            f"{len(x)} embeddings, {len(given)} labels and {len(champion)} rows of the champion's"
            " probabilities do not belong together"
        )
    if outside := int(((given < 0) | (given >= len(classes))).sum()):
        raise ValueError(f"{outside} of {len(given)} labels are not among the classes {classes}")
    bad = int((~(np.isfinite(x).all(axis=1) & np.isfinite(champion).all(axis=1))).sum())
    if bad:
        raise ValueError(f"{bad} of {len(x)} embeddings or probabilities are not finite")
    new = len(classes) - champion.shape[1]
    if new < 0:
        raise ValueError(f"the champion answers {champion.shape[1]} classes, not {len(classes)}")
    return x, given, np.pad(champion, ((0, 0), (0, new)))


def _cannot_judge(counts: Integers, settings: NoiseSettings) -> str:
    total, enough = int(counts.sum()), int((counts >= LEAST_OF_CLASS).sum())
    if total < settings.min_labels:
        return f"{total} are fewer than min_labels = {settings.min_labels}"
    if enough < 2:  # noqa: PLR2004 - nothing to mix them up with
        return f"{enough} of the classes has {LEAST_OF_CLASS} labels or more, and 2 are needed"
    return ""


def _drawn(
    embeddings: NDArray[np.floating] | None,
    labels: Integers | None,
    width: int,
    classes: int,
    rng: np.random.Generator,
) -> tuple[Floats, Integers]:
    if embeddings is None or labels is None:
        return np.empty((0, width)), np.empty(0, dtype=np.int64)
    if len(embeddings) != len(labels):
        raise ValueError(f"{len(embeddings)} old embeddings but {len(labels)} old labels")
    known = np.flatnonzero((labels >= 0) & (labels < classes))
    rows = rng.permutation(known)[:OLD_SAMPLES]
    return np.asarray(embeddings, dtype=np.float64)[rows], np.asarray(labels, dtype=np.int64)[rows]


def _leave_one_out(
    x: Floats, labels: Integers, old_x: Floats, old_labels: Integers, classes: int
) -> Floats:
    """Score (n, classes) each fresh sample by kernel ridge regression on all samples but itself.

    The penalty is chosen by the leave-one-out error on the given labels. The kernel is Gaussian
    with the median squared distance as its scale, and a constant.
    """
    n = len(x)
    spread = x.std(axis=0)
    scale = spread + 0.1 * spread.mean() + np.finfo(np.float64).tiny
    rows = (np.concatenate([x, old_x]) - x.mean(axis=0)) / scale
    norms = (rows**2).sum(axis=1)
    distances = np.maximum(norms[:, None] + norms - 2 * rows @ rows.T, 0)
    typical = float(np.median(distances[:n, :n][np.triu_indices(n, 1)])) or 1.0
    root = np.sqrt(np.r_[np.ones(n), np.full(len(old_x), OLD_WEIGHT)])
    kernel = (np.exp(-distances / typical) + 0.3) * root[:, None] * root
    targets = np.eye(classes)[np.r_[labels, old_labels]] - 1 / classes
    values, vectors = linalg.eigh(kernel)
    values = np.maximum(values, 0)
    turned = vectors.T @ (targets * root[:, None])
    best, chosen = math.inf, np.zeros((n, classes))
    for ridge in RIDGES:
        shrunk = 1 / (values + ridge * n)
        missed = ((vectors * shrunk) @ turned)[:n] / ((vectors[:n] ** 2) @ shrunk)[:, None]
        error = float((missed**2).mean())
        if error < best:
            best, chosen = error, targets[:n] - missed
    return chosen + 1 / classes


def _confident_learning(
    scores: Floats,
    labels: Integers,
    champion: Floats,
    counts: Integers,
    settings: NoiseSettings,
) -> tuple[NDArray[np.bool_], Integers, Floats]:
    """Find samples that are confidently in another class than the given one.

    The champion's answers have the weight under which the given labels are likeliest, so one that
    knows nothing of a new domain is not heard. A class's threshold is the mean probability of the
    samples that were given it (Northcutt et al. 2021, eq. 2).
    """
    rows = np.arange(len(labels))
    own = np.maximum(scores, 1e-3)
    own /= own.sum(axis=1, keepdims=True)
    flat = UNSURE / scores.shape[1]
    likelihoods = [
        np.log((1 - UNSURE) * ((1 - w) * own + w * champion)[rows, labels] + flat).mean()
        for w in EVEN_MIX
    ]
    weight = EVEN_MIX[int(np.argmax(likelihoods))]
    believed = (1 - weight) * own + weight * champion
    given = believed[rows, labels]
    sums = np.bincount(labels, weights=given, minlength=scores.shape[1])
    thresholds = np.where(counts > 0, sums / np.maximum(counts, 1), np.inf)
    confident = np.where(believed >= thresholds, believed, -1.0)
    best = confident.argmax(axis=1)
    doubt = np.clip(believed.max(axis=1) - given, 0, 1)
    suspicious = (
        (confident.max(axis=1) >= 0)
        & (best != labels)
        & (doubt > settings.least_doubt)
        & (counts[labels] >= LEAST_OF_CLASS)
    )
    return suspicious, np.where(suspicious, best, labels), doubt


@dataclass(frozen=True)
class _Agreement:
    """How often given labels agree with leave-one-out predictions.

    Attributes:
        sure: among the sure predictions, `counted` of them.
        surest, unsure: among the surest few, and the less sure half.
        concentration: of the disagreements of the surer half, how many are with the one label that
            the predicted class is most often given instead.
    """

    sure: float
    counted: int
    surest: float
    unsure: float
    concentration: float
    second: float

    @property
    def hard(self) -> bool:
        """Pictures are hard and labels right: agreement falls with sureness, errors are spread."""
        return (
            self.surest >= HARD_SUREST
            and self.unsure < HARD_FALL * self.surest
            and self.concentration < HARD_CONCENTRATION
            and self.second < HARD_SECOND
        )


def _agreement(scores: Floats, labels: Integers) -> _Agreement:
    n = len(labels)
    ranked = np.sort(scores, axis=1)
    order = np.argsort(-(ranked[:, -1] - ranked[:, -2]), kind="stable")
    predicted, given = scores.argmax(axis=1)[order], labels[order]
    agrees = predicted == given
    counted = min(n, max(LEAST_SURE, int(n * SURE_SHARE)))
    confusion = np.zeros((scores.shape[1],) * 2)
    np.add.at(confusion, (predicted[: n // 2], given[: n // 2]), 1)
    np.fill_diagonal(confusion, 0)
    return _Agreement(
        sure=float(agrees[:counted].mean()),
        counted=counted,
        surest=float(agrees[: max(LEAST_SUREST, int(n * SUREST_SHARE))].mean()),
        unsure=float(agrees[n // 2 :].mean()),
        concentration=float(confusion.max(axis=1).sum() / max(confusion.sum(), 1)),
        second=float((scores.argsort(axis=1)[order, -2] == given)[: n // 2].mean()),
    )


def _vouched(adapted: Floats, labels: Integers) -> float:
    """Estimate the share of right labels by how often a champion agrees with them.

    If it were right as often as it is sure, agreement beyond chance would shrink with the share of
    wrong labels. It is less often right, so the estimate is too low rather than too high.
    """
    n, classes = adapted.shape
    predicted = adapted.argmax(axis=1)
    counts = (np.bincount(rows, minlength=classes) for rows in (predicted, labels))
    chance = float(np.dot(*counts)) / n**2
    beyond = float((predicted == labels).mean() - chance)
    if beyond < NO_CHANCE * math.sqrt(chance * (1 - chance) / n):
        return 0.0
    return min(1.0, beyond / max(float(adapted.max(axis=1).mean() - chance), beyond))


def mixed_up_classes(
    answers: NDArray[np.floating], labels: Integers, classes: Sequence[str]
) -> str:
    """Say which classes seem renamed, by answers (n, c) to n labels; empty when none do.

    A mix of few classes can be renamed into anything, and is not judged.
    """
    shares = np.bincount(labels, minlength=len(classes)) / len(labels)
    if math.exp(stats.entropy(shares)) < LEAST_MIX * len(classes):
        return ""
    table = np.zeros((len(classes),) * 2)
    np.add.at(table, (answers.argmax(axis=1), labels), 1)
    answered, named = optimize.linear_sum_assignment(-table)
    as_given, renamed = np.trace(table) / table.sum(), table[answered, named].sum() / table.sum()
    if renamed < max(RENAMED_LEAST, as_given + RENAMED_GAIN):
        return ""
    pairs = sorted(
        (
            (table[a, b], a, b)
            for a, b in zip(answered.tolist(), named.tolist(), strict=True)
            if a != b
        ),
        reverse=True,
    )
    shown = ", ".join(f"{classes[a]!r} is labelled {classes[b]!r}" for _, a, b in pairs[:3])
    return (
        f"classes seem mixed up: the champion agrees with {as_given:.0%} of the labels, and with"
        f" {renamed:.0%} when classes are renamed ({shown})"
    )


def _verdict(
    agreement: _Agreement,
    mixed_up: str,
    suspicious: NDArray[np.bool_],
    likely: Integers,
    doubt: Floats,
    settings: NoiseSettings,
    vouched: float = 0.0,
) -> LabelVerdict:
    share = 1 - agreement.sure
    wrong = stats.binomtest(round(share * agreement.counted), agreement.counted)
    interval = wrong.proportion_ci(0.95, method="wilson")
    low, high = float(interval.low), float(interval.high)
    many = share > settings.max_wrong_share
    hard = many and (agreement.hard or vouched >= LEAST_VOUCHED)
    listed = f"{int(suspicious.sum())} of {len(suspicious)} labels are suspicious"
    about = f"about {share:.0%} are wrong ({low:.0%} to {high:.0%})"
    if mixed_up:
        words = f"{mixed_up}; let a person look at the labels"
    elif hard:
        low = 0.0
        words = f"{listed}; the pictures are hard, so at most {share:.0%} are wrong"
        if vouched:
            words += (
                "; the champion, once adapted to these pictures, agrees with the labels as if at"
                f" least {vouched:.0%} were right"
            )
    elif many:
        words = (
            f"{listed}, and {about}, more than max_wrong_share = {settings.max_wrong_share}: even"
            " where the labels of similar pictures are surest, they contradict each other; let a"
            " person look at the labels"
        )
    else:
        words = f"{listed}, and {about}"
    return LabelVerdict(
        judged=True,
        suspicious=suspicious,
        likely=likely,
        doubt=doubt,
        share=share,
        interval=(low, high),
        stop=bool(mixed_up) or (many and not hard),
        words=words,
    )
