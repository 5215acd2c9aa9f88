"""Wrong labels: which ones are found, which deliveries go to a person, and what can't be judged."""

import functools
from collections.abc import Callable

import numpy as np
import pytest
from sklearn.datasets import load_digits

from sft.noise import LabelVerdict, NoiseAction, NoiseSettings, _agreement, judge_labels

SETTINGS = NoiseSettings()
CLASSES = tuple(str(digit) for digit in range(10))
N = 200


@functools.cache
def digits() -> tuple[np.ndarray, np.ndarray]:
    """Give optical digits as embeddings (1797, 64), and their labels."""
    found = load_digits()
    return found.data, found.target.astype(np.int64)


def delivery(seed: int, n: int = N) -> tuple[np.ndarray, np.ndarray]:
    """Draw n digits."""
    x, y = digits()
    rows = np.random.default_rng(seed).permutation(len(y))[:n]
    return x[rows], y[rows]


def spoilt(labels: np.ndarray, share: float, kind: str, seed: int = 0) -> np.ndarray:
    """Make a share of the labels wrong: the next class, or any other."""
    rng = np.random.default_rng(seed)
    wrong = rng.random(len(labels)) < share
    step = np.ones(len(labels), dtype=np.int64) if kind == "next" else rng.integers(1, 10, N)
    return np.where(wrong, (labels + step) % 10, labels)


def judged(
    x: np.ndarray,
    labels: np.ndarray,
    champion: np.ndarray | None = None,
    settings: NoiseSettings = SETTINGS,
    adapted: Callable[[], np.ndarray] | None = None,
) -> LabelVerdict:
    """Judge labels beside a champion that knows nothing unless one is given."""
    know_nothing = np.full((len(labels), 10), 0.1)
    return judge_labels(
        x,
        labels,
        know_nothing if champion is None else champion,
        CLASSES,
        settings=settings,
        adapted=adapted,
    )


@pytest.mark.parametrize("kind", ["random", "next"])
def test_a_delivery_with_many_wrong_labels_goes_to_a_person(kind: str) -> None:
    """Of five deliveries with 60 % wrong labels each is stopped, without any help by a champion."""
    for seed in range(5):
        x, y = delivery(seed)
        verdict = judged(x, spoilt(y, 0.6, kind, seed))
        assert verdict.stop
        assert "person" in verdict.words


def test_a_clean_delivery_of_a_new_domain_passes() -> None:
    """Right labels are believed although the champion is never right about them."""
    for seed in range(5):
        x, y = delivery(seed)
        verdict = judged(x, y, np.eye(10)[np.random.default_rng(seed).integers(0, 10, N)])
        assert not verdict.stop
        assert verdict.suspicious.mean() < 0.03
        assert verdict.interval[0] == pytest.approx(0, abs=1e-9)


def test_hard_pictures_are_not_wrong_labels() -> None:
    """Half the pictures show nothing: their labels agree with no prediction, and are believed."""
    x, y = delivery(0)
    hidden = np.random.default_rng(0).random(N) < 0.5
    x = np.where(hidden[:, None], np.random.default_rng(1).normal(8, 6, x.shape), x)
    assert not judged(x, y).stop


@pytest.mark.parametrize(("second", "hard"), [(32, True), (48, False)])
def test_labels_that_are_the_second_guess_are_no_hard_pictures(second: int, hard: bool) -> None:
    """Sure predictions that 60 labels of 200 contradict, spread over the classes.

    The label is the second guess of .16 of the samples, as on hard pictures, or of .24.
    """
    n, place = 400, np.arange(400)
    predicted, offset = place % 10, 1 + place // 10 % 6
    scores = np.zeros((n, 10))
    scores[place, predicted] = 2 - place / n  # the first are the surest
    scores[place, (predicted + offset) % 10] = 0.5
    turn = (place + place // 10) % 10
    contradicted = np.where(place < n // 2, turn < 3, turn < 8)
    seconds = contradicted & (contradicted.cumsum() <= second)
    step = np.where(seconds, offset, offset + 1) * contradicted
    assert _agreement(scores, (predicted + step) % 10).hard is hard


def test_suspicious_labels_are_those_that_are_wrong() -> None:
    """Among 10 % wrong labels: most suspicions are right, most wrong ones found and corrected."""
    x, y = delivery(3)
    given = spoilt(y, 0.1, "random")
    wrong = given != y
    verdict = judged(x, given)
    found = verdict.suspicious & wrong
    assert found.sum() >= 0.8 * verdict.suspicious.sum()
    assert found.sum() >= 0.6 * wrong.sum()
    assert (verdict.likely[found] == y[found]).mean() > 0.9
    assert (verdict.likely[~verdict.suspicious] == given[~verdict.suspicious]).all()
    assert verdict.interval[0] <= wrong.mean() <= verdict.interval[1]
    assert verdict.doubt[wrong].mean() > verdict.doubt[~wrong].mean() + 0.3


def test_a_champion_that_knows_the_domain_is_heard() -> None:
    """With a champion that is right, at least as many wrong labels are found as without one."""
    x, y = delivery(4)
    given = spoilt(y, 0.1, "next")
    wrong = given != y
    alone, helped = judged(x, given), judged(x, given, np.eye(10)[y] * 0.9 + 0.01)
    assert (helped.suspicious & wrong).sum() >= (alone.suspicious & wrong).sum()
    assert (helped.suspicious == wrong).mean() > 0.98


def test_renamed_classes_are_seen_by_the_champion() -> None:
    """Every label moved by one class is consistent in itself; only the champion contradicts."""
    x, y = delivery(5)
    moved = (y + 1) % 10
    assert not judged(x, moved).stop
    verdict = judged(x, moved, np.eye(10)[y])
    assert verdict.stop
    assert "mixed up" in verdict.words


@pytest.mark.parametrize("kind", ["random", "next"])
def test_an_adapted_champion_vouches_for_right_labels_only(kind: str) -> None:
    """Embeddings show nothing: one that is right on half the pictures saves right labels alone."""
    for seed in range(5):
        rng = np.random.default_rng(seed)
        _, y = delivery(seed)
        muddled = rng.normal(size=(N, 8))
        answered = np.where(rng.random(N) < 0.5, y, rng.integers(0, 10, N))
        sure = np.full((N, 10), 0.3 / 9)
        sure[np.arange(N), answered] = 0.7
        assert judged(muddled, y).stop
        vouched = judged(muddled, y, adapted=lambda sure=sure: sure)
        assert not vouched.stop
        assert "agrees with the labels" in vouched.words
        assert judged(muddled, spoilt(y, 0.6, kind, seed), adapted=lambda sure=sure: sure).stop


def test_an_adapted_champion_that_knows_nothing_vouches_for_nothing() -> None:
    """It agrees with as many labels as it must by chance, and is as unsure as it should be."""
    _, y = delivery(0)
    rng = np.random.default_rng(0)
    for answers in (np.full((N, 10), 0.1), rng.dirichlet(np.full(10, 50.0), N)):
        assert judged(rng.normal(size=(N, 8)), y, adapted=lambda answers=answers: answers).stop


def test_an_adapted_champion_is_asked_only_when_a_delivery_would_be_stopped() -> None:
    """It costs another pass of all pictures."""
    x, y = delivery(0)
    asked = []
    judged(x, y, adapted=lambda: asked.append(0) or np.full((N, 10), 0.1))
    assert not asked


def test_the_setting_decides_what_becomes_of_suspicious_labels() -> None:
    """They are left out, count less the more they are doubted, or count like the others."""
    x, y = delivery(6)
    verdict = judged(x, spoilt(y, 0.1, "random"))
    assert verdict.suspicious.any()
    kept, less, left = (
        verdict.weights(NoiseSettings(action=action))
        for action in (NoiseAction.KEEP, NoiseAction.DOWN_WEIGHT, NoiseAction.LEAVE_OUT)
    )
    assert (kept == 1).all()
    assert (left == ~verdict.suspicious).all()
    assert (less[~verdict.suspicious] == 1).all()
    assert less[verdict.suspicious].max() < 1 - SETTINGS.least_doubt


def test_old_samples_say_nothing_against_a_new_class() -> None:
    """Labels of a class that the champion's memory and answers lack are believed."""
    x, y = delivery(7)
    old_x, old_y = digits()
    old = old_y < 9
    verdict = judge_labels(
        x,
        y,
        np.full((N, 9), 1 / 9),
        CLASSES,
        settings=SETTINGS,
        old_embeddings=old_x[old][:300],
        old_labels=old_y[old][:300],
    )
    assert not verdict.stop
    assert verdict.suspicious[y == 9].mean() < 0.1


@pytest.mark.parametrize(
    "labels",
    [
        np.zeros(100, dtype=np.int64),
        np.arange(30, dtype=np.int64) % 10,
        np.r_[np.zeros(60, dtype=np.int64), np.arange(1, 10)],
        np.empty(0, dtype=np.int64),
    ],
    ids=["one class", "few labels", "classes with one sample", "none"],
)
def test_what_cannot_be_judged_is_said_so(labels: np.ndarray) -> None:
    """Nothing is suspicious and nothing stops."""
    verdict = judged(digits()[0][: len(labels)], labels)
    assert not verdict.judged
    assert not verdict.stop
    assert not verdict.suspicious.any()
    assert verdict.words.startswith("cannot judge")


def test_a_class_with_one_sample_is_not_suspicious() -> None:
    """Nothing else tells what such a class looks like."""
    x, y = delivery(8)
    once = y.copy()
    once[y == 9] = 8
    once[0] = 9
    assert not judged(x, once).suspicious[0]


def test_identical_embeddings_do_no_harm() -> None:
    """A dead network's embeddings are all equal: nothing agrees, so a person looks."""
    verdict = judged(np.ones((N, 4)), delivery(9)[1])
    assert np.isfinite(verdict.doubt).all()
    assert verdict.stop


def test_the_seed_decides_alone() -> None:
    """Twice the same call gives the same verdict, in chunks too."""
    x, y = (part[:1001] for part in digits())
    first, second = judged(x, y), judged(x, y)
    np.testing.assert_array_equal(first.doubt, second.doubt)
    assert not first.stop


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": np.full(N, 10)}, "200 of 200 labels are not among the classes"),
        ({"labels": np.zeros(3, dtype=np.int64)}, "do not belong together"),
        ({"embeddings": np.full((N, 2), np.nan)}, "200 of 200 embeddings"),
        ({"champion_probabilities": np.ones((N, 11))}, "the champion answers 11 classes"),
        ({"old_embeddings": np.ones((2, 64)), "old_labels": np.ones(1, dtype=np.int64)}, "2 old"),
    ],
)
def test_bad_input_is_named(change: dict[str, np.ndarray], message: str) -> None:
    """The message says what is wrong."""
    x, y = delivery(0)
    good = {"embeddings": x, "labels": y, "champion_probabilities": np.full((N, 10), 0.1)}
    with pytest.raises(ValueError, match=message):
        judge_labels(**(good | change), classes=CLASSES, settings=SETTINGS)


@pytest.mark.parametrize(
    "setting",
    [
        {"max_wrong_share": 0.0},
        {"action": "drop"},
        {"least_doubt": -0.1},
        {"min_labels": 3},
    ],
)
def test_a_setting_out_of_range_is_named(setting: dict[str, object]) -> None:
    """The message begins with the setting's name."""
    with pytest.raises(ValueError, match=next(iter(setting))):
        NoiseSettings(**setting)
