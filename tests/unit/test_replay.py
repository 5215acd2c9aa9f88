"""Accuracy, days below a floor, the oracle and the frontier, on small figures."""

from __future__ import annotations

import io
import itertools
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from rich.console import Console

from flows import backtest
from monitoring.replay import Replayed, Retraining, Served, frontier, oracle

BEGIN = datetime(2026, 1, 1, tzinfo=UTC)


def served(*right: int | None, samples: int = 100) -> tuple[Served, ...]:
    """A batch a day with 100 labels each, or none where `right` is None."""
    return tuple(
        Served(
            f"b{day}", BEGIN + timedelta(days=day), "v", 1, samples,
            0 if n is None else 100, n or 0, False, 0.0,
        )
        for day, n in enumerate(right)
    )  # fmt: skip


def replayed(*batches: Served, retrainings: int = 0) -> Replayed:
    made = Retraining(BEGIN, "b0", 2, "w", "", "", True, 0)
    return Replayed("p", "", batches, (made,) * retrainings, (), 0, 0, 1.0)


def test_of_many_policies_one_is_told_of_every_few_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 100 that take a second each the 5th, the 10th and so on, and of 40 each."""
    for total, numbers in ((100, range(5, 101, 5)), (40, range(1, 41))):
        clock = itertools.count()
        monkeypatch.setattr(backtest, "monotonic", lambda clock=clock: float(next(clock)))
        console = Console(file=io.StringIO(), width=80)
        progress = backtest.Progress(console, total)
        for _ in range(total):
            progress.tell(replayed(*served(90, 70)))
        assert isinstance(console.file, io.StringIO)
        assert console.file.getvalue().splitlines() == [
            f"replayed {n} of {total} policies after {n} s: p: accuracy 0.800" for n in numbers
        ]


def brute_force(errors: np.ndarray, ready: list[int], cost: float) -> float:
    """Try every way of serving."""
    versions, batches = errors.shape
    losses = []
    for path in itertools.product(range(versions), repeat=batches):
        if any(batch < ready[v] for batch, v in enumerate(path)):
            continue
        switches = sum(a != b for a, b in itertools.pairwise((0, *path)))
        losses.append(sum(errors[v, b] for b, v in enumerate(path)) + cost * switches)
    return min(losses)


@pytest.mark.parametrize("cost", [0.0, 3.0, 15.0, 100.0])
def test_the_oracle_is_the_best_of_all_ways(cost: float) -> None:
    """Dynamic programming finds what trying all 4^6 ways finds, and its path has that loss."""
    rng = np.random.default_rng(0)
    for _ in range(5):
        errors = rng.integers(0, 30, (4, 6)).astype(float)
        ready = [0, *sorted(rng.integers(0, 6, 3).tolist())]
        found = oracle(errors, ready, cost)
        assert found.loss == pytest.approx(brute_force(errors, ready, cost))
        assert found.loss == pytest.approx(found.errors + cost * found.retrainings)
        assert all(batch >= ready[version] for batch, version in enumerate(found.path))


def test_a_dear_retraining_is_never_made() -> None:
    """At a cost above all that could be gained, the first champion serves to the end."""
    errors = np.array([[50.0] * 4, [0.0] * 4])
    assert oracle(errors, [0, 1], cost=151).path == (0, 0, 0, 0)
    assert oracle(errors, [0, 1], cost=149).path == (0, 1, 1, 1)


def test_an_oracle_of_nothing_loses_nothing() -> None:
    """No batches, no loss; a first champion that is not there is refused."""
    assert oracle(np.empty((1, 0)), [0], 5).loss == 0
    with pytest.raises(ValueError, match="first champion"):
        oracle(np.zeros((1, 3)), [1], 5)


def test_accuracy_counts_pictures_and_only_batches_with_labels() -> None:
    """A batch of 300 pictures weighs three times one of 100; one without labels nothing."""
    small, large = served(90)[0], served(50, samples=300)[0]
    assert replayed(small, large).accuracy == pytest.approx(0.6)
    assert replayed(small, *served(None)).accuracy == pytest.approx(0.9)
    assert np.isnan(replayed(*served(None)).accuracy)


def test_days_below_a_floor_last_until_the_next_batch() -> None:
    """Two of four days are below .8; without labels no day is."""
    assert replayed(*served(90, 70, 60, 85)).days_below(0.8) == 2
    assert replayed(*served(None, None)).days_below(0.8) == 0


def test_a_retraining_costs_wrong_answers() -> None:
    """Loss is 10 and 20 wrong answers, and twice the cost."""
    assert replayed(*served(90, 80), retrainings=2).loss(7) == pytest.approx(44)


def test_the_frontier_has_what_nothing_beats() -> None:
    """Dearer must be more accurate; what nobody can measure is not on it."""
    points = [(3, 0.9), (1, 0.7), (2, 0.6), (4, 0.9), (5, float("nan")), (0, 0.2), (1, 0.8)]
    assert frontier(points) == (5, 6, 0)
