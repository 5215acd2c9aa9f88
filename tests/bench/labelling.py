"""How many labels the chosen list saves against random choice, on real drift.

The champion's frozen embeddings, and a linear head fitted to old samples and the new labels, each
half of the weight. Half of the new world is offered, the other half measures. Run: python
tests/bench/labelling.py
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from realdata import (
    LEARNED,
    PACS_CLASSES,
    _cached,
    digits,
    digits_network,
    mnist,
    pacs,
    pacs_network,
    pictures,
)
from sklearn.linear_model import LogisticRegression

from monitoring.features import FeatureTable, concatenate
from monitoring.labelling import choose
from monitoring.reference import Reference, Regime

BUDGETS = (20, 50, 100)
RANDOM_BUDGETS = (10, 20, 35, 50, 75, 100, 150, 200, 300)
SEEDS = 10


@dataclass(frozen=True, eq=False)
class Drift:
    """What the champion learned, what it was judged on, and a world that it does not know."""

    learned: FeatureTable
    learned_labels: np.ndarray
    reference: Reference
    new: FeatureTable
    new_labels: np.ndarray
    inverse_penalty: float
    n_known: int = 0
    """The last rows of `new` that are of the old world after all, of which no score is taken."""


def half_old(drift: Drift) -> Drift:
    """Let the old world go on beside the new one; the reference keeps its first half."""
    (regime,) = drift.reference.regimes
    half, n = len(regime.labels) // 2, len(regime.labels)
    rest = regime.features.take(range(half, n))
    rest = replace(rest, sample_ids=tuple(f"old/{name}" for name in rest.sample_ids))
    kept = Regime(regime.name, regime.features.take(range(half)), regime.labels[:half])
    return replace(
        drift,
        reference=Reference((kept,), drift.reference.classes),
        new=concatenate([drift.new, rest]),
        new_labels=np.r_[drift.new_labels, regime.labels[half:]],
        n_known=n - half,
    )


def optical() -> Drift:
    """Give MNIST's champion scikit-learn's optical digits: another scanner, other writers."""
    from flows.demo import _optical

    found, n = _optical(), 1000
    pixels, labels = mnist()
    learned = _cached("digits-64-learned", lambda: (digits_network(), pixels[:n]))
    new = _cached(
        "digits-64-optical",
        lambda: (digits_network(), torch.from_numpy(found.pictures).unsqueeze(1)),
    )
    pool = digits()
    rows = range(2000)
    reference = Reference(
        (Regime("MNIST", pool.features.take(rows), pool.labels[rows]),), tuple("0123456789")
    )
    return Drift(learned, labels[:n], reference, new, found.labels, 1.0)


def paintings(domain: str) -> Drift:
    """Give the champion of PACS' photos a domain of another style."""
    n = LEARNED["pacs"]
    pixels, labels = pacs("photo")
    learned = _cached("pacs-squeezenet-learned", lambda: (pacs_network("squeezenet"), pixels[:n]))
    photos, new = pictures("photo"), pictures(domain)
    reference = Reference((Regime("photo", photos.features, photos.labels),), PACS_CLASSES)
    return Drift(learned, labels[:n], reference, new.features, new.labels, 0.05)


DRIFTS = {
    "digits to optical digits": optical,
    "photo to art": lambda: paintings("art"),
    "photo to sketch": lambda: paintings("sketch"),
    "half of it optical digits": lambda: half_old(optical()),
    "half of it sketches": lambda: half_old(paintings("sketch")),
}


def accuracy(drift: Drift, rows: np.ndarray, test: np.ndarray) -> float:
    """Fit the head to the old samples and to these new ones, and measure it on others."""
    old, new = drift.learned.embedding, drift.new.embedding
    mean, scale = old.mean(axis=0), old.std()
    weights = np.r_[np.full(len(old), 100 / len(old)), np.full(len(rows), 100 / len(rows))]
    head = LogisticRegression(C=drift.inverse_penalty, max_iter=150, tol=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 150 steps are enough to compare by
        head.fit(
            (np.concatenate([old, new[rows]]) - mean) / scale,
            np.r_[drift.learned_labels, drift.new_labels[rows]],
            sample_weight=weights,
        )
    return float((head.predict((new[test] - mean) / scale) == drift.new_labels[test]).mean())


def chosen(drift: Drift, offered: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Give the rows of the product's list, all of them to learn from."""
    requests = choose(
        drift.reference,
        [drift.new.take(offered)],
        n,
        holdout=lambda _: False,
        share=0,
        seed=seed,
    )
    place = {name: i for i, name in enumerate(drift.new.sample_ids)}
    return np.array([place[request.sample_id] for request in requests])


def splits(drift: Drift, seeds: int = SEEDS) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Give each seed with the rows that are offered, in random order, and those that measure."""
    n = len(drift.new) - drift.n_known
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        order = rng.permutation(n)
        offered, test = order[: n // 2], order[n // 2 :]
        if drift.n_known:
            m = min(len(offered) // 2, drift.n_known)
            old = n + rng.permutation(drift.n_known)[:m]
            offered = rng.permutation(np.r_[offered[:m], old])
        yield seed, offered, test


def labels_for(reached: float, curve: dict[int, float]) -> float:
    """Say how many labels a curve needs for an accuracy (by log n); at most its last point."""
    sizes, heights = np.array(list(curve)), np.maximum.accumulate(list(curve.values()))
    if reached > heights[-1]:
        return float(sizes[-1])
    return float(np.exp(np.interp(reached, heights, np.log(sizes))))


def run() -> list[dict[str, object]]:
    """Measure what chosen labels are worth in random ones; 40 CPU seconds."""
    found: list[dict[str, object]] = []
    for name, make in DRIFTS.items():
        drift = make()
        ours: dict[int, list[float]] = {n: [] for n in BUDGETS}
        random: dict[int, list[float]] = {n: [] for n in RANDOM_BUDGETS}
        for seed, offered, test in splits(drift):
            for n, scores in ours.items():
                scores.append(accuracy(drift, chosen(drift, offered, n, seed), test))
            for n, scores in random.items():
                scores.append(accuracy(drift, offered[:n], test))
        curve = {n: float(np.mean(scores)) for n, scores in random.items()}
        for n, scores in ours.items():
            reached = float(np.mean(scores))
            worth = labels_for(reached, curve)
            spread = np.array(scores) - np.array(random[n])
            found.append(
                {
                    "figure": f"random labels that {n} chosen ones are worth, {name}",
                    "value": worth,
                    "target": f"over {n}",
                    "met": worth > n,
                    "peers": {
                        "accuracy chosen": reached,
                        "accuracy random": curve[n],
                        "standard error of the gain": float(spread.std(ddof=1) / SEEDS**0.5),
                    },
                }
            )
    return found


if __name__ == "__main__":
    from results import Figure, write

    write("labelling", [Figure(**row) for row in run()])  # type: ignore[arg-type]
