"""The gate's chances of error on pairs of real models: `make bench-gate`.

Worlds
    digits: a CNN's champion head (64-d), and 12,000 MNIST digits under strong noise ("noise-large"
    of Failing Loudly). sketches, art: a head for 420 photos of PACS on SqueezeNet (512-d). Ten
    challengers each: logistic heads on the same embeddings, from 140 fresh labels, drawn anew, and
    280 old ones. What they are drawn from is not judged on.
Known truth
    The rest of each world is the population, so a pair's gain on it is exact. A challenger is given
    the gain wanted (0, 5, 10 or 20 points) by taking the champion's answers for some of the
    pictures that only it has right (or wrong): everything else stays as the models answered. On old
    data it is given a gain of 0.
Draws
    Hold-outs are drawn from the population with replacement: 20,000 a cell and world for the test
    on fresh data, 2,000 a cell for the whole gate, with 1,000 old samples (or 300). Fewer than 100
    fresh samples are inconclusive by default; here `min_fresh` is 50 for those, to show what the
    test alone does.
Rules
    "at least as accurate": the tutorial's. "any of ten": ten challengers that are no better come
    one after another, and the same hold-out judges them until one is promoted.
"""

from __future__ import annotations

import single_thread  # noqa: F401 - numpy and torch read what it sets when they are imported

# isort: split

import argparse
import functools
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import realdata
from numpy.typing import NDArray
from results import Figure, write
from rich.console import Console
from sklearn.linear_model import LogisticRegression

from sft.evaluate import Answers
from sft.gate import GateSettings, Outcome, Pair, bootstrap, judge, mcnemar, sign_flips

SIZES = (50, 100, 200, 400)
GAINS = (0.0, 0.05, 0.10, 0.20)
WORLDS = {"digits": "noise-large", "sketches": "sketch", "art": "art"}
"""And the shift, or the domain, that is new there."""
ALPHA, POWER = 0.05, 0.90
PLACES = (1, 2, 3, 5, 10)
FEW = 100
"""Fresh samples that the gate asks for."""
TEN, LABELS, OLD, FEW_OLD = 10, 140, 1000, 300


@dataclass(frozen=True, eq=False)
class World:
    """The answers of the champion and of ten challengers on a fresh and on an old population."""

    fresh: tuple[Answers, ...]
    old: tuple[Answers, ...]
    classes: tuple[str, ...]

    def pairs(self, gain: float, rng: np.random.Generator) -> list[tuple[Pair, Pair]]:
        """Give the fresh and the old pair of each challenger, with this gain on fresh data."""
        return [
            (with_gain(self.fresh[0], fresh, gain, rng), with_gain(self.old[0], old, 0.0, rng))
            for fresh, old in zip(self.fresh[1:], self.old[1:], strict=True)
        ]


@functools.cache
def world(name: str) -> World:
    """Train the ten challengers of a world and let all answer."""
    if name == "digits":
        new, old, learn_old = realdata.digits(WORLDS[name]), realdata.digits(), 2000
    else:
        new, old, learn_old = realdata.pictures(WORLDS[name]), realdata.pictures("photo"), 400
    width = old.features.probabilities.shape[1]
    learn_new = len(new) // 3
    answers = [
        [_answers(part.features.probabilities[rest:], part.labels[rest:])]
        for part, rest in ((new, learn_new), (old, learn_old))
    ]
    for seed in range(TEN):
        rng = np.random.default_rng(seed)
        fresh = rng.choice(learn_new, LABELS, replace=False)
        known = rng.choice(learn_old, LABELS * 2, replace=False)
        features = np.concatenate([new.features.embedding[fresh], old.features.embedding[known]])
        labels = np.concatenate([new.labels[fresh], old.labels[known]])
        head = LogisticRegression(C=0.1, max_iter=2000).fit(features, labels)
        for kept, part, rest in zip(answers, (new, old), (learn_new, learn_old), strict=True):
            probabilities = np.zeros((len(part) - rest, width), np.float32)
            probabilities[:, head.classes_] = head.predict_proba(part.features.embedding[rest:])
            kept.append(_answers(probabilities, part.labels[rest:]))
    return World(tuple(answers[0]), tuple(answers[1]), tuple(map(str, range(width))))


def _answers(probabilities: NDArray[np.float32], labels: NDArray[np.int64]) -> Answers:
    return Answers(probabilities.argmax(axis=1), labels, probabilities)


def take(answers: Answers, rows: NDArray[np.int64]) -> Answers:
    """Select rows, which may repeat."""
    return Answers(answers.predicted[rows], answers.labels[rows], answers.probabilities[rows])


def draw(pair: Pair, n: int, rng: np.random.Generator) -> Pair:
    """Draw a hold-out of n."""
    rows = rng.integers(len(pair), size=n)
    return Pair(take(pair.champion, rows), take(pair.challenger, rows))


def with_gain(
    champion: Answers, challenger: Answers, gain: float, rng: np.random.Generator
) -> Pair:
    """Let a challenger take the champion's answers where that brings its gain to the one wanted."""
    gained = np.flatnonzero(challenger.right & ~champion.right)
    lost = np.flatnonzero(champion.right & ~challenger.right)
    excess = len(gained) - len(lost) - round(gain * len(champion.labels))
    among = gained if excess > 0 else lost
    if abs(excess) > len(among):
        raise ValueError(f"the pair cannot have a gain of {gain}")
    rows = rng.choice(among, abs(excess), replace=False)
    predicted, probabilities = challenger.predicted.copy(), challenger.probabilities.copy()
    predicted[rows], probabilities[rows] = champion.predicted[rows], champion.probabilities[rows]
    return Pair(champion, Answers(predicted, champion.labels, probabilities))


@dataclass(frozen=True)
class Rates:
    """Of many draws: what the whole gate promotes, and how often it is inconclusive."""

    whole: float
    inconclusive: float
    refused_by: dict[str, float]


def single(name: str, gain: float, n: int, draws: int, *, old_n: int = OLD) -> Rates:
    """Judge the first challenger against a champion, one hold-out after another."""
    rng = np.random.default_rng([n, round(gain * 100)])
    settings = replace(GateSettings(), min_fresh=min(n, FEW))
    pairs = world(name).pairs(gain, rng)
    outcomes: Counter[str] = Counter()
    refused_by: Counter[str] = Counter()
    for trial in range(draws):
        fresh, old = pairs[trial % TEN]
        verdict = judge(
            draw(fresh, n, rng), draw(old, old_n, rng), settings, classes=world(name).classes
        )
        outcomes[verdict.outcome] += 1
        refused_by.update(c.name for c in verdict.criteria[1:] if not c.passed)
    return Rates(
        outcomes[Outcome.PROMOTE] / draws,
        outcomes[Outcome.INCONCLUSIVE] / draws,
        {criterion: count / draws for criterion, count in refused_by.items()},
    )


def fresh_test(name: str, n: int, draws: int, gain: float = 0.0) -> dict[str, float]:
    """Judge ten on the same hold-out by the fresh test alone, the strictest question of errors.

    Returns:
        Shares of draws in which a rule promotes any of the ten, or the first (`one, …`), and, by
        `at K`, the share in which the gate promotes the K-th.
    """
    rng = np.random.default_rng([n, TEN])
    pairs = [pair for pair, _ in world(name).pairs(gain, rng)]
    better = np.stack([pair.difference for pair in pairs]).astype(np.int8)
    rows = rng.integers(better.shape[1], size=(draws, n))
    gained = np.stack([(one[rows] > 0).sum(axis=1) for one in better], axis=1)
    lost = np.stack([(one[rows] < 0).sum(axis=1) for one in better], axis=1)
    known = {pair: mcnemar(*pair) for pair in set(zip(gained.flat, lost.flat, strict=True))}
    p_values = np.array([known[pair] for pair in zip(gained.flat, lost.flat, strict=True)]).reshape(
        gained.shape
    )
    gate = p_values <= [GateSettings().level(before) for before in range(TEN)]
    divided = p_values <= GateSettings().alpha / np.arange(1, TEN + 1)
    return {
        "gate": float(gate.any(axis=1).mean()),
        "alpha/K": float(divided.any(axis=1).mean()),
        "at least as accurate": float((gained >= lost).any(axis=1).mean()),
        "one, at least as accurate": float((gained >= lost)[:, 0].mean()),
        **{f"at {k}": float(gate[:, k - 1].mean()) for k in PLACES},
    }


def bootstrap_level(name: str, n: int, draws: int) -> float:
    """Share of draws at .05 in which scores (Brier's) of no gain pass the gate's test."""
    champion, challenger = world(name).fresh[:2]
    target = np.eye(len(world(name).classes))[champion.labels]
    scores = [-((one.probabilities - target) ** 2).sum(axis=1) for one in (champion, challenger)]
    difference = scores[1] - scores[0]
    difference -= difference.mean()
    rng = np.random.default_rng(n)
    drawn = (rng.choice(difference, n) for _ in range(draws))
    return float(np.mean([max(bootstrap(x, 499), sign_flips(x, 499)) <= ALPHA for x in drawn]))


def measure(draws: int, console: Console) -> list[Figure]:
    """Measure every cell."""
    ten = {n: [fresh_test(name, n, draws * 10) for name in WORLDS] for n in SIZES}
    whole: dict[tuple[int, float], list[Rates]] = {}
    for n in SIZES:
        for gain in GAINS:
            whole[n, gain] = [single(name, gain, n, draws // len(WORLDS)) for name in WORLDS]
        console.print(f"{n} samples, {time.process_time():.0f} CPU s; at 20 points refused by")
        for name, found in zip(WORLDS, whole[n, 0.20], strict=True):
            console.print(f"  {name}: {found.refused_by}", highlight=False)

    figures = []
    for n in SIZES:
        first = max(one["at 1"] for one in ten[n])
        equal = whole[n, 0.0]
        figures.append(
            Figure(
                f"promoted though no better, {n} fresh samples (worst world, fresh test alone)",
                first,
                "≤ .05",
                first <= ALPHA,
                {
                    "at least as accurate": float(
                        np.mean([one["one, at least as accurate"] for one in ten[n]])
                    ),
                    "the whole gate": float(np.mean([one.whole for one in equal])),
                    "inconclusive": float(np.mean([one.inconclusive for one in equal])),
                },
            )
        )
    for n in SIZES:
        gate = max(one["gate"] for one in ten[n])
        figures.append(
            Figure(
                f"any of ten promoted though none is better, {n} fresh samples (worst world)",
                gate,
                "≤ .05",
                gate <= ALPHA,
                {
                    rule: max(one[rule] for one in ten[n])
                    for rule in ("at least as accurate", "alpha/K")
                },
            )
        )
    return [*figures, *_missed(whole, draws), *_later(draws), _bootstrap(draws)]


def _missed(whole: Mapping[tuple[int, float], Sequence[Rates]], draws: int) -> list[Figure]:
    """Tell how often the whole gate misses one that is better."""
    few_old = [
        single(name, 0.20, FEW, draws // len(WORLDS), old_n=FEW_OLD).whole for name in WORLDS
    ]
    figures = []
    for n in SIZES:
        missed = {gain: [1 - one.whole for one in whole[n, gain]] for gain in GAINS}
        twenty = float(np.mean(missed[0.20]))
        figures.append(
            Figure(
                f"missed though 20 points better, {n} fresh samples, the whole gate",
                twenty,
                "≤ .10" if n >= FEW else "no target under 100",
                twenty <= 1 - POWER or n < FEW,
                {
                    **dict(zip(WORLDS, missed[0.20], strict=True)),
                    **({"with 300 old samples": 1 - float(np.mean(few_old))} if n == FEW else {}),
                    "10 points better": float(np.mean(missed[0.10])),
                    "5 points better": float(np.mean(missed[0.05])),
                    **{
                        f"inconclusive at {gain * 100:.0f}": float(
                            np.mean([one.inconclusive for one in whole[n, gain]])
                        )
                        for gain in GAINS[1:]
                    },
                },
            )
        )
    return figures


def _later(draws: int) -> list[Figure]:
    """Tell what the spending of the level costs the later challengers."""
    figures = []
    for n in (FEW, 2 * FEW):
        later = [fresh_test(name, n, draws * 10, gain=0.20) for name in WORLDS]
        missed = {k: 1 - float(np.mean([one[f"at {k}"] for one in later])) for k in PLACES}
        figures.append(
            Figure(
                f"missed though 20 points better, {n} fresh samples, fresh test alone, the first",
                missed[1],
                "≤ .10",
                missed[1] <= 1 - POWER,
                {f"number {k}": missed[k] for k in PLACES[1:]},
            )
        )
    return figures


def _bootstrap(draws: int) -> Figure:
    level = max(bootstrap_level(name, FEW, draws) for name in WORLDS)
    return Figure(
        "test of scores at .05 on Brier scores of no gain, 100 fresh samples (worst world)",
        level,
        "≤ .06, .05 within the binomial error",
        level <= 0.06,
        {},
    )


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--quick", action="store_true", help="100 draws; writes nothing")
    asked = parser.parse_args()
    console = Console()
    for name in WORLDS:
        one = world(name)
        told = [f"{answers.accuracy:.3f}" for answers in one.fresh]
        before = [f"{answers.accuracy:.3f}" for answers in one.old]
        console.print(f"{name}: fresh {told}, old {before}, {len(one.fresh[0].labels)} pictures")
    figures = measure(100 if asked.quick else asked.draws, console)
    if asked.quick:
        for figure in figures:
            console.print(figure, highlight=False)
    else:
        write("gate", figures)


if __name__ == "__main__":
    main()
