"""The gate: each criterion, each outcome, and its stated chances of error."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from sft.evaluate import Answers
from sft.gate import (
    GateSettings,
    Outcome,
    Pair,
    Serving,
    Verdict,
    bootstrap,
    calibration_error,
    difference_bound,
    judge,
    mcnemar,
    paired_p_value,
    samples_for_power,
    sign_flips,
)
from sft.tasks import MultiLabel, Regression

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
    """Sure where right, at a loss where wrong, so that calibration decides nothing."""
    predicted = np.where(right, truth, (truth + 1) % 4)
    sure = np.eye(4, dtype=np.float32)[predicted]
    return Answers(predicted, truth, np.where(right[:, None], sure, np.float32(0.25)))


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
        pytest.param(pair(100, 6), pair(300), 0, "promote", [], id="p=.016-of-.025"),
        pytest.param(pair(100, 5), pair(300), 0, "inconclusive", ["fresh"], id="p=.031"),
        pytest.param(pair(100, 6), pair(300), 1, "inconclusive", ["fresh"], id="the-second"),
        pytest.param(pair(100, 7), pair(300), 1, "promote", [], id="p=.0078-of-.0083"),
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
    assert [c.name for c in given.criteria] == [
        "better on fresh data",
        "no worse on old data",
        "no class collapses",
        "as well calibrated",
    ]
    named = {"fresh": 0, "old": 1, "class": 2}
    assert [i for i, c in enumerate(given.criteria) if not c.passed] == [named[f] for f in failed]
    assert bool(given.missing) == (outcome == "inconclusive")


def test_a_verdict_gives_its_figures_in_words() -> None:
    """Counts, accuracies, levels and bounds are in the reason."""
    good = verdict(pair(100, 20, 5, wrong=10)).reason
    for figure in ("(100 samples): 70.0 % → 85.0 %", "gained 20, lost 5", "p = 0.002", "of 0.025"):
        assert figure in good
    assert "difference +0.0 points (at least -2), lower 95 % bound -0.8 (over -5)" in good
    bad = verdict(pair(100, 20), pair(300, 0, 30)).reason
    assert bad.startswith("old hold-out (300 samples): 100.0 % → 90.0 %, difference -10.0 points")
    labels = [0] * 60 + [3] * 20 + [1] * 320
    collapse = verdict(pair(400, 60, 12, labels=labels), pair(300, labels=[1] * 300)).reason
    assert collapse.startswith("classes that collapsed: d 100.0 % → 40.0 %; better on fresh data")


def test_a_refusal_tells_the_fresh_gain_whatever_decided() -> None:
    """With its lower bound: once, whether it is that which failed or not; of scores, too."""
    gain = f"a gain of +20.0 points (lower 95 % bound {difference_bound(20, 0, 100) * 100:+.1f})"
    old = verdict(pair(100, 20), pair(300, 0, 30)).reason
    assert "; better on fresh data, though: fresh hold-out (100 samples): " in old
    assert gain in old
    assert gain in verdict(pair(100, 20)).reason
    few = verdict(pair(100, 5)).reason
    assert few.count("fresh hold-out (100 samples): 95.0 % → 100.0 %, a gain of +5.0 points") == 1
    worse = verdict(pair(100, 4, 20)).reason
    assert worse.startswith("fresh hold-out (100 samples): 96.0 % → 80.0 %, a gain of -16.0 points")
    truth = np.arange(100.0)[:, None]
    values = truth + np.tile([[2.0], [4.0]], (50, 1))
    task = Regression(tolerance=10)
    scores = Pair(Answers(values, truth, values, task), Answers(truth, truth, truth, task))
    gains = scores.difference
    bound = gains.mean() - 1.645 * gains.std() / 10
    told = verdict(scores, pair(300, 0, 30)).reason
    assert f"a gain of {gains.mean():+.4g} (lower 95 % bound {bound:+.4g})" in told


def test_what_is_not_enough_names_the_missing_labels() -> None:
    """Three in ten labels are held out, so 40 missing samples are 134 labels."""
    few = verdict(pair(60, 20))
    assert few.missing == 134
    assert few.reason.startswith("not enough evidence, about 134 more labels are needed: fresh")
    assert "at least 100 samples are asked for" in few.reason
    gain = verdict(pair(100, 15, 8))
    assert gain.outcome is Outcome.INCONCLUSIVE
    needed = samples_for_power(0.07, 0.23, level=0.025)
    assert gain.missing == -(-(needed - 100) * 10 // 3)
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


@pytest.mark.parametrize("champion_is_shared", [False, True])
def test_one_of_ten_that_are_no_better_passes_at_most_at_alpha(champion_is_shared: bool) -> None:
    """Ten come one after another, on one hold-out; alpha/k each promotes too many, as peers do."""
    rng = np.random.default_rng(2)
    trials, ten, n = 2000, 10, 100
    champion = rng.random((trials, 1, n) if champion_is_shared else (trials, ten, n)) < 0.75
    right = rng.random((trials, ten, n)) < 0.75
    gained, lost = (right & ~champion).sum(2), (champion & ~right).sum(2)
    p = {pair: mcnemar(*pair) for pair in set(zip(gained.flat, lost.flat, strict=True))}
    p_values = np.vectorize(lambda g, b: p[g, b])(gained, lost)
    levels = np.array([SETTINGS.level(before) for before in range(ten)])
    assert (p_values <= levels).any(axis=1).mean() <= SETTINGS.alpha
    divided = SETTINGS.alpha / np.arange(1, ten + 1)
    assert (p_values <= divided).any(axis=1).mean() > SETTINGS.alpha


def test_the_levels_of_all_challengers_sum_to_alpha() -> None:
    """However many come, alpha is not overspent, and none of it is given away."""
    levels = [SETTINGS.level(before) for before in range(10_000)]
    assert SETTINGS.alpha * 0.999 < sum(levels) < SETTINGS.alpha
    assert levels[:2] == [0.025, pytest.approx(0.05 / 6)]


def test_a_gain_of_twenty_points_is_seen() -> None:
    """With 100 samples it passes in at least nine of ten trials."""
    assert simulate(100, (0.25, 0.05), 2000, 0, seed=3).mean() >= 0.9


def test_the_bootstrap_holds_its_level_on_real_scores_and_sees_a_gain() -> None:
    """Squared errors of two linear models of the diabetes data, the sign of each pair tossed."""
    from sklearn.datasets import load_diabetes
    from sklearn.linear_model import LinearRegression

    features, target = load_diabetes(return_X_y=True)
    learn, held = slice(0, 150), slice(150, None)
    errors = []
    for columns in (slice(0, 10), slice(2, 3)):
        fitted = LinearRegression().fit(features[learn, columns], target[learn])
        errors.append((fitted.predict(features[held, columns]) - target[held]) ** 2)
    difference = errors[1] - errors[0]
    difference *= 10 / difference.std()
    rng = np.random.default_rng(0)
    passed = 0
    for _ in range(200):
        drawn = rng.choice(difference, 60) * rng.choice([-1, 1], 60)
        passed += bootstrap(drawn, 299) <= 0.05
    assert passed <= 17  # of 200 at .05: the binomial's 98 % quantile
    assert bootstrap(difference) < 0.01
    assert bootstrap(-difference) > 0.99


def test_the_bootstrap_agrees_with_students_t_on_normal_differences() -> None:
    """Within the error of the resampling."""
    difference = np.random.default_rng(1).normal(0.15, 1, 200)
    test = stats.ttest_1samp(difference, 0, alternative="greater")
    assert bootstrap(difference) == pytest.approx(test.pvalue, abs=0.01)


def test_a_bootstrap_without_spread_counts_signs() -> None:
    """Five equal gains are a sign test of five; no gain and no sample are no evidence."""
    assert bootstrap(np.full(5, 0.3)) == 1 / 32
    assert bootstrap(np.zeros(50)) == 1
    assert bootstrap(np.empty(0)) == 1
    # of four gains that differ little a third of the resamples have no spread: no evidence at all
    assert bootstrap(np.array([0.5, 0.5, 0.5, 0.4])) > 0.3


def test_scores_of_right_and_wrong_are_judged_by_mcnemar_and_others_by_the_bootstrap() -> None:
    """One function takes both; of scores that differ as little it says as little as of answers."""
    right = np.array([1.0] * 12 + [0.0] * 30)
    assert paired_p_value(right, np.zeros(42)) == mcnemar(12, 0)
    assert paired_p_value(right - 0.5, np.full(42, -0.5)) == pytest.approx(mcnemar(12, 0))
    many = np.random.default_rng(0).normal(0.15, 1, 200)
    assert paired_p_value(many, np.zeros(200)) == max(bootstrap(many), sign_flips(many))


@pytest.mark.parametrize("differ", [4, 6, 8])
def test_scores_of_which_few_differ_pass_at_most_at_the_level(differ: int) -> None:
    """Of 100 samples with three labels each so many differ in one label, one way or the other."""
    chance = 0.0
    for better in range(differ + 1):
        champion, challenger = np.ones((2, 100), dtype=np.float32)
        champion[:better] -= np.float32(1 / 3)
        challenger[better:differ] -= np.float32(1 / 3)
        passes = paired_p_value(challenger, champion) <= SETTINGS.level(0)
        chance += passes * stats.binom.pmf(better, differ, 0.5)
    assert chance <= SETTINGS.level(0)


@pytest.mark.parametrize("n", [10, 30])
def test_sign_flips_of_equal_sizes_are_the_exact_sign_test(n: int) -> None:
    """Ten signs are all tried, thirty are drawn; sums that float32 rounds apart are ties."""
    sizes = np.tile(np.float32([0.8, 0.6, 0.4]) - np.float32([0.6, 0.4, 0.2]), n // 3 + 1)[:n]
    sizes[: n // 5] *= -1
    expected = mcnemar(n - n // 5, n // 5)
    assert sign_flips(sizes.astype(np.float64)) == pytest.approx(expected, abs=1e-3)


def test_numbers_are_judged_by_their_scores_and_old_data_by_what_is_right() -> None:
    """Errors halve on fresh data, though as many are within the tolerance: the bootstrap sees it.

    Calibration and classes are not asked of a regression.
    """
    rng = np.random.default_rng(0)
    truth = rng.normal(0, 1, (150, 1)).astype(np.float32)
    task = Regression(tolerance=10)

    def off_by(size: float) -> Answers:
        values = truth + rng.normal(0, size, truth.shape).astype(np.float32)
        return Answers(values, truth, values, task)

    given = verdict(Pair(off_by(1.0), off_by(0.5)), Pair(off_by(0.5), off_by(0.5)))
    assert given.outcome is Outcome.PROMOTE
    assert "paired bootstrap and sign flips p = 5e-05" in given.reason
    assert [c.name for c in given.criteria][1:] == ["no worse on old data", "no class collapses"]
    assert verdict(Pair(off_by(0.5), off_by(1.0))).outcome is Outcome.REFUSE


def test_a_slice_that_collapses_is_named() -> None:
    """One camera loses 20 of its 60 samples, spread over all classes: only the slice tells."""
    cameras = ["new" if i < 60 else None for i in range(400)]
    fresh = pair(400, 0, 20)
    better = np.array([i >= 300 for i in range(400)])
    champion = answers(fresh.champion.labels, fresh.champion.right & ~better)
    hidden = Pair(champion, fresh.challenger)
    assert verdict(hidden).outcome is Outcome.PROMOTE
    told = verdict(replace(hidden, slices={"camera": cameras}))
    assert told.outcome is Outcome.REFUSE
    assert told.reason.startswith(
        "classes and slices that collapsed: camera = new 100.0 % → 66.7 %; better on fresh data"
    )
    rows = [f"row {i % 30}" if i < 300 else None for i in range(400)]
    many = replace(hidden, slices={"row": rows})  # 20 of the 30, and those without one are none
    assert verdict(many).criteria[2].words.startswith("none of 24 classes and slices")
    with pytest.raises(ValueError, match="slice 'camera' has 3 values, not 400"):
        replace(hidden, slices={"camera": cameras[:3]})


def test_a_class_that_a_lost_champion_always_answers_has_not_collapsed() -> None:
    """It calls everything 0 and has every 0 right; the challenger has three in four of each."""
    truth = np.arange(400) % 4
    lost, found = answers(truth, truth == 0), answers(truth, np.arange(400) // 4 % 4 > 0)
    assert found.right[truth == 0].mean() == 0.75
    assert verdict(Pair(lost, found)).outcome is Outcome.PROMOTE
    blind = answers(truth, truth > 0)
    told = verdict(Pair(lost, blind)).reason
    assert told.startswith("classes that collapsed: a 100.0 % → 42.9 %; better on fresh data")


@pytest.mark.parametrize(("right", "collapsed"), [(70, False), (60, True)])
def test_a_class_collapses_where_it_lies_far_below_the_others(right: int, collapsed: bool) -> None:
    """From 100 % it fell by 30 or 40 points; 10 below the mean are few, 18 are too many."""
    truth, place = np.repeat(np.arange(4), 100), np.arange(400) % 100
    lost = answers(truth, truth == 0)
    found = answers(truth, np.where(truth == 0, place < right, place < 84))
    words = verdict(Pair(lost, found), pair(300, labels=[1] * 300)).criteria[2].words
    assert words.startswith("classes that collapsed: a 100.0" if collapsed else "none of 4 classes")


def test_a_slice_of_few_samples_is_no_proof() -> None:
    """Thirty slices of four samples each may lose all of one by chance."""
    sites = [f"site {i // 4}" if i < 120 else None for i in range(400)]
    fresh = pair(400, 60, 4)
    fresh = replace(fresh, slices={"site": [sites[i - 60] for i in range(400)]})
    assert verdict(fresh).outcome is Outcome.PROMOTE


def confident(n: int, right: int, confidence: float) -> Answers:
    """Make n answers with the same confidence, every k-th of them right."""
    truth = np.zeros(n, dtype=np.int64)
    predicted = (np.random.default_rng(0).permutation(n) >= right).astype(np.int64)
    probabilities = np.full((n, 4), (1 - confidence) / 3, dtype=np.float32)
    probabilities[np.arange(n), predicted] = confidence
    return Answers(predicted, truth, probabilities)


def test_a_challenger_that_is_too_sure_of_itself_is_refused() -> None:
    """The same answers, but .99 sure where .80 are right: calibration alone tells."""
    honest, sure = confident(300, 240, 0.8), confident(300, 240, 0.99)
    given = verdict(pair(100, 20), Pair(honest, sure))
    assert given.outcome is Outcome.REFUSE
    assert [c.name for c in given.criteria if not c.passed] == ["as well calibrated"]
    # nor where old data, on which it may be chance, are asked about last
    by_chance = Pair(confident(20, 15, 0.8), confident(20, 15, 0.85))
    criterion = verdict(Pair(honest, sure), by_chance).criteria[3]
    assert not criterion.passed
    assert criterion.words.count("lower bound") == 2
    assert "old 0.047 → 0.190 (over +0.05, lower bound +0.0" in given.reason
    assert verdict(pair(100, 20), Pair(sure, honest)).outcome is Outcome.PROMOTE


def test_a_label_that_is_there_or_not_has_no_top_answer_to_be_sure_of() -> None:
    """Of one label, .03 for its absence is sure and right, so calibration is not asked."""
    truth = (np.arange(300) % 5 < 3).astype(np.float32)[:, None]

    def said(sure: float, *, wrong: int) -> Answers:
        presence = np.abs(truth - (np.arange(300) < wrong)[:, None])
        probability = (0.5 + (presence - 0.5) * (2 * sure - 1)).astype(np.float32)
        return Answers((probability >= 0.5).astype(np.float32), truth, probability, MultiLabel())

    better = Pair(said(0.75, wrong=75), said(0.97, wrong=0))
    given = judge(better, better, SETTINGS, classes=("defect",))
    assert given.outcome is Outcome.PROMOTE
    assert "as well calibrated" not in [c.name for c in given.criteria]


def test_calibration_that_differs_by_chance_is_let_through() -> None:
    """Twenty samples cannot show that .80 is too sure for 15 of 20, nor that .90 is."""
    few = Pair(confident(20, 15, 0.8), confident(20, 15, 0.85))
    assert "as well calibrated" not in [
        c.name for c in verdict(pair(100, 20), few).criteria if not c.passed
    ]
    assert calibration_error(few.champion) == pytest.approx(0.05)
    assert calibration_error(few.challenger) == pytest.approx(0.10)


@pytest.mark.parametrize(
    ("serving", "failed"),
    [
        (Serving(1000, 1.1, 0.0), ""),
        (Serving(1000, 2.1, 0.0), "CPU time 2.10 times the champion's (at most 2), 1,000 bytes"),
        (Serving(1000, 1.0, 2e-4), "its probabilities differ by up to 0.0002 from those before"),
        (Serving(5001, 1.0, 0.0), "CPU time 1.00 times the champion's (at most 2), 5,001 bytes"),
    ],
)  # fmt: skip
def test_what_comes_back_from_the_registry_is_judged_too(serving: Serving, failed: str) -> None:
    """Another answer, too slow or too large: each alone refuses, however good the scores are."""
    settings = GateSettings(max_bytes=5000)
    given = judge(pair(100, 20), pair(300), settings, classes=CLASSES, serving=serving)
    assert given.outcome == ("refuse" if failed else "promote")
    assert given.reason.startswith(failed or "fresh hold-out")
    assert [c.words for c in given.criteria[1:] if not c.passed] == (
        [given.reason.partition("; better on fresh data")[0]] if failed else []
    )
    assert len(given.criteria) == 6


def test_without_a_limit_nothing_is_too_large() -> None:
    """`max_bytes = 0` sets none."""
    serving = Serving(10**12, 1.0, 0.0)
    given = judge(pair(100, 20), pair(300), SETTINGS, classes=CLASSES, serving=serving)
    assert given.outcome is Outcome.PROMOTE


def test_answers_to_other_questions_are_refused() -> None:
    """A pair is of the same samples."""
    with pytest.raises(ValueError, match="did not answer the same samples"):
        Pair(pair(4).champion, pair(5).challenger)


@pytest.mark.parametrize(
    "name", ["alpha", "max_drop", "max_drop_bound", "max_class_drop", "max_calibration_rise"]
)
@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, float("nan")])
def test_settings_outside_their_range_are_named(name: str, value: float) -> None:
    """Shares lie between 0 and 1."""
    with pytest.raises(ValueError, match=f"{name} must lie between 0 and 1"):
        GateSettings(**{name: value})
    with pytest.raises(ValueError, match="min_fresh must be at least 1, got 0"):
        GateSettings(min_fresh=0)
    with pytest.raises(ValueError, match="max_latency_ratio must be positive, got 0"):
        GateSettings(max_latency_ratio=0)
    with pytest.raises(ValueError, match="max_bytes must not be negative, got -1"):
        GateSettings(max_bytes=-1)
