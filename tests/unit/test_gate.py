"""The gate: each criterion, each outcome, and its stated chances of error."""

import numpy as np
import pytest

from sft.evaluate import Answers
from sft.gate import (
    GateSettings,
    Outcome,
    Pair,
    Verdict,
    difference_bound,
    judge,
    mcnemar,
    samples_for_power,
)

SETTINGS = GateSettings()
CLASSES = ("a", "b", "c", "d")


def pair(
    n: int, gained: int = 0, lost: int = 0, *, wrong: int = 0, labels: list[int] | None = None
) -> Pair:
    """Make n samples: the first were gained, the next lost, then some both get wrong."""
    truth = np.array(labels if labels is not None else np.arange(n) % 4, dtype=np.int64)
    champion, challenger = np.ones(n, dtype=bool), np.ones(n, dtype=bool)
    champion[:gained] = False
    challenger[gained : gained + lost] = False
    champion[gained + lost : gained + lost + wrong] = False
    challenger[gained + lost : gained + lost + wrong] = False
    return Pair(answers(truth, champion), answers(truth, challenger))


def answers(truth: np.ndarray, right: np.ndarray) -> Answers:
    predicted = np.where(right, truth, (truth + 1) % 4)
    return Answers(predicted, truth, np.eye(4, dtype=np.float32)[predicted])


def verdict(fresh: Pair, old: Pair | None = None, *, judged_before: int = 0) -> Verdict:
    old = old if old is not None else pair(300)
    return judge(fresh, old, SETTINGS, classes=CLASSES, judged_before=judged_before)


@pytest.mark.parametrize(
    ("gained", "lost", "expected"),
    [
        (0, 0, 1.0),
        (1, 0, 1 / 2),
        (5, 0, 1 / 32),
        (0, 5, 1.0),
        (3, 1, 5 / 16),
        (8, 2, 56 / 1024),  # 45 + 10 + 1 of 2^10
        (9, 1, 11 / 1024),
    ],
)
def test_exact_mcnemar_by_hand(gained: int, lost: int, expected: float) -> None:
    """The one-sided binomial tail."""
    assert mcnemar(gained, lost) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("gained", "lost", "n", "expected"),
    [
        (0, 0, 300, -1.645 * (2 / 302 / 302) ** 0.5),
        (10, 4, 98, 0.06 - 1.645 * ((0.16 - 0.0036) / 100) ** 0.5),
        (4, 10, 98, -0.06 - 1.645 * ((0.16 - 0.0036) / 100) ** 0.5),
    ],
)
def test_the_lower_bound_by_hand(gained: int, lost: int, n: int, expected: float) -> None:
    """The adjusted Wald bound of Bonett and Price, with one sample added on either side."""
    assert difference_bound(gained, lost, n) == pytest.approx(expected)


def test_the_lower_bound_covers() -> None:
    """In 4,000 seeded trials the true difference lies over the bound in about 95 %."""
    rng = np.random.default_rng(0)
    counts = rng.multinomial(300, [0.06, 0.09, 0.85], size=4000)
    bounds = {tuple(c): difference_bound(int(c[0]), int(c[1]), 300) for c in counts}
    covered = np.mean([bounds[tuple(c)] <= -0.03 for c in counts])
    assert 0.93 < covered < 0.97


@pytest.mark.parametrize(
    ("gain", "discordance", "level", "expected"),
    [(0.2, 0.2, 0.05, 29), (0.1, 0.2, 0.05, 122), (0.1, 0.2, 0.005, 231)],
)
def test_samples_for_power(gain: float, discordance: float, level: float, expected: int) -> None:
    """(z√d + .84√(d - D²))²/D², rounded up."""
    assert samples_for_power(gain, discordance, level=level) == expected


def test_that_many_samples_have_the_power() -> None:
    """With the samples asked for, the exact test sees the gain in about 80 % of trials."""
    n = samples_for_power(0.1, 0.2)
    counts = np.random.default_rng(0).multinomial(n, [0.15, 0.05, 0.8], size=2000)
    seen = {tuple(c): mcnemar(int(c[0]), int(c[1])) <= 0.05 for c in counts}
    assert 0.72 < np.mean([seen[tuple(c)] for c in counts]) < 0.85


@pytest.mark.parametrize(
    ("fresh", "old", "before", "outcome", "failed"),
    [
        pytest.param(pair(100, 20), pair(300), 0, "promote", [], id="better"),
        pytest.param(pair(100, 5), pair(300), 0, "promote", [], id="p=.031"),
        pytest.param(pair(100, 5), pair(300), 1, "inconclusive", ["fresh"], id="level-halved"),
        pytest.param(pair(100, 6), pair(300), 2, "promote", [], id="p=.0156-of-.0167"),
        pytest.param(pair(99, 50), pair(300), 0, "inconclusive", ["fresh"], id="99-samples"),
        pytest.param(pair(0), pair(300), 0, "inconclusive", ["fresh"], id="no-fresh-sample"),
        pytest.param(pair(100), pair(300), 0, "refuse", ["fresh"], id="unchanged"),
        pytest.param(pair(100, 4, 20), pair(300), 0, "refuse", ["fresh"], id="worse"),
        pytest.param(pair(100, 20), pair(0), 0, "refuse", ["old"], id="no-old-sample"),
        pytest.param(pair(100, 20), pair(300, 0, 6), 0, "promote", [], id="drop-of-2-points"),
        pytest.param(pair(100, 20), pair(300, 0, 7), 0, "refuse", ["old"], id="drop-of-2.3"),
        pytest.param(pair(100, 20), pair(300, 30, 36), 0, "refuse", ["old"], id="bound-too-low"),
        pytest.param(pair(100, 20), pair(40, 0, 0), 0, "refuse", ["old"], id="old-too-small"),
        pytest.param(
            pair(99, 50), pair(300, 0, 30), 0, "refuse", ["fresh", "old"],
            id="more-labels-would-not-help",
        ),
        pytest.param(
            pair(100, 30, labels=[0] * 60 + [1] * 40),
            pair(300, 0, 5, labels=[2] * 10 + [1] * 290),
            0, "promote", [], id="half-a-class-of-ten-is-no-proof",
        ),
        pytest.param(
            pair(400, 60, 8, labels=[0] * 60 + [3] * 20 + [1] * 320), pair(300), 0, "promote", [],
            id="8-of-95-is-within-15-points",
        ),
        pytest.param(
            pair(400, 60, 12, labels=[0] * 60 + [3] * 20 + [1] * 320),
            pair(300, labels=[1] * 300), 0, "refuse", ["class"], id="a-class-collapses",
        ),
    ],
)  # fmt: skip
def test_the_verdict(fresh: Pair, old: Pair, before: int, outcome: str, failed: list[str]) -> None:
    """Each criterion alone can refuse; what only more labels can settle is inconclusive."""
    given = verdict(fresh, old, judged_before=before)
    assert given.outcome == outcome
    assert [c.name.split()[-2] if "class" not in c.name else "class" for c in given.criteria] == [
        "fresh",
        "old",
        "class",
    ]
    named = {"fresh": 0, "old": 1, "class": 2}
    assert [i for i, c in enumerate(given.criteria) if not c.passed] == [named[f] for f in failed]
    assert bool(given.missing) == (outcome == "inconclusive")


def test_a_verdict_gives_its_figures_in_words() -> None:
    """Counts, accuracies, levels and bounds are in the reason."""
    good = verdict(pair(100, 20, 5, wrong=10)).reason
    for figure in ("(100 samples): 70.0 % → 85.0 %", "gained 20, lost 5", "p = 0.002", "of 0.05"):
        assert figure in good
    assert "difference +0.0 points (at least -2), lower 95 % bound -0.8 (over -5)" in good
    bad = verdict(pair(100, 20), pair(300, 0, 30)).reason
    assert bad.startswith("old hold-out (300 samples): 100.0 % → 90.0 %, difference -10.0 points")
    labels = [0] * 60 + [3] * 20 + [1] * 320
    collapse = verdict(pair(400, 60, 12, labels=labels), pair(300, labels=[1] * 300)).reason
    assert collapse == "classes that collapsed: d 100.0 % → 40.0 %"


def test_what_is_not_enough_names_the_missing_labels() -> None:
    """Three in ten labels are held out, so 40 missing samples are 134 labels."""
    few = verdict(pair(60, 20))
    assert few.missing == 134
    assert few.reason.startswith("not enough evidence, about 134 more labels are needed: fresh")
    assert "at least 100 samples are asked for" in few.reason
    gain = verdict(pair(100, 15, 8))
    assert gain.outcome is Outcome.INCONCLUSIVE
    assert gain.missing == -(-(samples_for_power(0.07, 0.23) - 100) * 10 // 3)
    later = verdict(pair(100, 15, 8), judged_before=9)
    assert later.missing > 1.5 * gain.missing


def simulate(
    n: int, shares: tuple[float, float], trials: int, before: int, seed: int
) -> np.ndarray:
    """Tell which of so many trials are promoted; equal counts are judged once."""
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(n, [*shares, 1 - sum(shares)], size=trials)[:, :2]
    kinds, which = np.unique(counts, axis=0, return_inverse=True)
    promoted = [
        verdict(pair(n, int(gained), int(lost)), judged_before=before).outcome is Outcome.PROMOTE
        for gained, lost in kinds
    ]
    return np.array(promoted)[which.ravel()]


@pytest.mark.parametrize("discordance", [0.05, 0.2, 0.4])
def test_one_that_is_no_better_passes_at_most_at_the_level(discordance: float) -> None:
    """Of 2,000 challengers that win as often as they lose, no more than alpha are promoted."""
    half = discordance / 2
    assert simulate(100, (half, half), 2000, 0, seed=1).mean() <= SETTINGS.alpha


def test_the_best_of_ten_that_are_no_better_passes_at_most_at_the_level() -> None:
    """With nine judged before, the chance that any of ten passes is still below alpha."""
    passed = simulate(100, (0.1, 0.1), 20_000, 9, seed=2).reshape(2000, 10)
    assert passed.any(axis=1).mean() <= SETTINGS.alpha


def test_a_gain_of_twenty_points_is_seen() -> None:
    """With 100 samples it passes in at least nine of ten trials."""
    assert simulate(100, (0.25, 0.05), 2000, 0, seed=3).mean() >= 0.9


def test_answers_to_other_questions_are_refused() -> None:
    """A pair is of the same samples."""
    with pytest.raises(ValueError, match="did not answer the same samples"):
        Pair(pair(4).champion, pair(5).challenger)


@pytest.mark.parametrize("name", ["alpha", "max_drop", "max_drop_bound", "max_class_drop"])
@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, float("nan")])
def test_settings_outside_their_range_are_named(name: str, value: float) -> None:
    """Shares lie between 0 and 1."""
    with pytest.raises(ValueError, match=f"{name} must lie between 0 and 1"):
        GateSettings(**{name: value})
    with pytest.raises(ValueError, match="min_fresh must be at least 1, got 0"):
        GateSettings(min_fresh=0)
