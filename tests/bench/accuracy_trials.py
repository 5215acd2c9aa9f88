"""Estimated accuracy held against the truth."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import peers
import peers_elsewhere
import realdata
from realdata import MILD
from results import Figure
from sklearn.metrics import roc_auc_score
from trials import (
    DIGITS,
    LARGE,
    PACS_REFERENCE,
    PAPER_SHIFTS,
    Batch,
    Runner,
    generator,
    mixed,
    pool,
    reference_of,
    regime,
    shifted,
)

from monitoring.accuracy import Estimate, estimate_accuracy
from monitoring.reference import Reference

ESTIMATED_ON = ("none", *MILD)
ACCURACY_BATCH = 500
FELL = 0.03
NOVEL = 9
"""Label of the class that a network of `realdata.digits(without=...)` does not know."""
NOVEL_SHARES = (0.05, 0.2, 0.5)


@dataclass(frozen=True)
class Guess:
    """The truth about a batch, our estimate and the peers' ones."""

    condition: str
    truth: float
    reference: float
    ours: Estimate
    others: dict[str, float]


def guess(condition: str, reference: Reference, batch: Batch) -> Guess:
    """Estimate the accuracy of one batch by every method."""
    known = reference.regimes[0]
    confidence, correct = known.features.confidence, known.correct.astype(np.float64)
    return Guess(
        condition,
        batch.accuracy,
        float(correct.mean()),
        estimate_accuracy(reference, batch.features),
        {
            name: estimate(confidence, correct, batch.features.confidence)
            for name, estimate in peers.ESTIMATORS.items()
        },
    )


def accuracy_mnist_draw(i: int) -> tuple[np.ndarray, list[tuple[str, Batch]]]:
    """Draw the reference's rows and a batch of 500 for each of MNIST's shifts and for none."""
    rng = generator("accuracy-mnist", i)
    order = rng.permutation(len(pool(DIGITS)))
    conditions = [*((name, 1.0) for name in ESTIMATED_ON), *PAPER_SHIFTS]
    return order[:LARGE], [
        (f"{name} {share:.0%}", shifted(order[LARGE:], ACCURACY_BATCH, name, share, rng))
        for name, share in conditions
    ]


def accuracy_mnist_trial(i: int) -> list[Guess]:
    """Estimate the accuracy of every batch of one draw of digits."""
    rows, batches = accuracy_mnist_draw(i)
    reference = reference_of(regime(DIGITS, rows))
    return [guess(condition, reference, batch) for condition, batch in batches]


def accuracy_novel_trial(task: tuple[int, float]) -> list[Guess]:
    """Estimate the accuracy of 500 digits, a share of them of a class that the model never saw."""
    i, share = task
    rng = generator("accuracy-novel", i, str(share))
    name = f"digits-64-{(3, 8)[i % 2]}"
    order = rng.permutation(len(pool(name)))
    is_novel = pool(name).labels[order] == NOVEL
    known, novel = order[~is_novel], order[is_novel]
    k = round(share * ACCURACY_BATCH)
    batch = mixed((pool(name), novel[:k]), (pool(name), known[LARGE:][: ACCURACY_BATCH - k]))
    return [
        guess(f"a novel class at {share:.0%}", reference_of(regime(name, known[:LARGE])), batch)
    ]


def accuracy_pacs_trial(task: tuple[str, int]) -> list[Guess]:
    """Estimate the accuracy of batches of 100 by photos, corrupted or partly or wholly foreign."""
    backbone, i = task
    rng = generator("accuracy-pacs", backbone, i)
    photos = f"photo-{backbone}"
    order = rng.permutation(len(pool(photos)))
    reference = reference_of(regime(photos, order[:PACS_REFERENCE]))
    rest = order[PACS_REFERENCE:]
    guesses = [
        guess("photos", reference, mixed((pool(photos, shift), rest[:100])))
        for shift in ESTIMATED_ON
    ]
    for domain in ("art", "sketch"):
        other = pool(f"{domain}-{backbone}")
        strangers = rng.permutation(len(other))
        for what, k in (("quarter", 25), ("half", 50), ("all", 100)):
            batch = mixed((other, strangers[:k]), (pool(photos), rest[: 100 - k]))
            guesses.append(guess(what, reference, batch))
    return guesses


def _mean_error(pairs: Iterable[tuple[float, float]]) -> float:
    return statistics.mean(abs(estimate - truth) for estimate, truth in pairs)


def accuracy(run: Runner) -> list[Figure]:
    """Errors of the estimated accuracy, and how often its interval holds the truth."""
    effort = run.effort
    tasks = range(effort.accuracy)
    digits = [g for d in run.map("accuracy on MNIST", accuracy_mnist_trial, tasks) for g in d]
    pairs = [(backbone, i) for backbone in realdata.BACKBONES for i in tasks]
    pacs = [g for d in run.map("accuracy on PACS", accuracy_pacs_trial, pairs) for g in d]
    shares = [(i, share) for i in tasks for share in NOVEL_SHARES]
    novel = [g for d in run.map("a novel class", accuracy_novel_trial, shares) for g in d]
    foreign = [g for g in pacs if g.condition == "all"]
    believed = [g for g in foreign if g.ours.believable]
    unmarked = {
        name: [g for g in guesses if g.ours.believable]
        for name, guesses in (("MNIST", digits), ("a novel class", novel), ("PACS", pacs))
    }
    held = {
        name: statistics.mean(g.ours.low <= g.truth <= g.ours.high for g in guesses)
        for name, guesses in unmarked.items()
        if guesses
    }
    everywhere = [g for guesses in unmarked.values() for g in guesses]
    covered = statistics.mean(g.ours.low <= g.truth <= g.ours.high for g in everywhere)
    for condition in dict.fromkeys(g.condition for g in digits + novel + pacs):
        some = [g for g in digits + novel + pacs if g.condition == condition]
        run.console.print(
            f"  {condition}: truth {statistics.mean(g.truth for g in some):.3f}, error "
            f"{_mean_error((g.ours.value, g.truth) for g in some):.3f}, believed "
            f"{statistics.mean(g.ours.believable for g in some):.2f}, held "
            f"{statistics.mean(g.ours.low <= g.truth <= g.ours.high for g in some):.2f}"
        )
    error = _mean_error((g.ours.value, g.truth) for g in digits)
    fell = [g.truth < g.reference - FELL for g in digits]
    area = float(roc_auc_score(fell, [g.reference - g.ours.value for g in digits]))
    believed_error = _mean_error((g.ours.value, g.truth) for g in believed) if believed else 0.0
    return [
        Figure(
            f"mean absolute error of estimated accuracy, MNIST, n = {ACCURACY_BATCH} "
            f"({len(digits)} batches)",
            error,
            "≤ .025",
            error <= 0.025,
            {
                name: _mean_error((g.others[name], g.truth) for g in digits)
                for name in peers.ESTIMATORS
            }
            | _nannyml(run)
            | {"ours, a novel class": _mean_error((g.ours.value, g.truth) for g in novel)},
        ),
        Figure(
            f"area under ROC for “fell by over 3 points” ({statistics.mean(fell):.0%} did)",
            area,
            "≥ .96",
            area >= 0.96,
            {
                name: float(roc_auc_score(fell, [g.reference - g.others[name] for g in digits]))
                for name in peers.ESTIMATORS
            },
        ),
        Figure(
            f"mean absolute error on PACS, all foreign, of those not marked as not to be believed "
            f"({len(foreign) - len(believed)} of {len(foreign)} are marked)",
            believed_error,
            "≤ .08, or marked",
            believed_error <= 0.08,
            {
                "ours, marked or not": _mean_error((g.ours.value, g.truth) for g in foreign),
                **{
                    name: _mean_error((g.others[name], g.truth) for g in foreign)
                    for name in peers.ESTIMATORS
                },
            },
        ),
        Figure(
            f"share of unmarked intervals that hold the truth ({len(everywhere)} batches)",
            covered,
            "≥ .90",
            covered >= 0.90,
            held
            | {
                f"share of {name} marked": 1 - len(unmarked[name]) / len(guesses)
                for name, guesses in (("MNIST", digits), ("a novel class", novel), ("PACS", pacs))
            },
        ),
    ]


def nannyml_trial(i: int) -> list[tuple[float, float]]:
    """Give NannyML's estimate and the truth for every batch of one draw of digits."""
    rows, batches = accuracy_mnist_draw(i)
    estimates = peers_elsewhere.ask(
        "cbpe",
        probabilities=pool(DIGITS).features.probabilities[rows],
        labels=pool(DIGITS).labels[rows],
        batches=np.stack([batch.features.probabilities for _, batch in batches]),
    )
    return [(value, b.accuracy) for value, (_, b) in zip(estimates, batches, strict=True)]


def _nannyml(run: Runner) -> dict[str, float]:
    if run.elsewhere is not None or not run.effort.accuracy_elsewhere:
        return {}
    draws = run.map("NannyML", nannyml_trial, range(run.effort.accuracy_elsewhere))
    pairs = [pair for draw in draws for pair in draw]
    return {f"NannyML CBPE ({len(pairs)} batches)": _mean_error(pairs)}
