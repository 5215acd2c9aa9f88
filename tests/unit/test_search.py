"""The search for settings: what it finds on digits, its budget, its folds, and its refusals."""

import gzip
import importlib.util
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sft.cache import ActivationCache
from sft.dataset import LabelledPictures
from sft.models import ModelConfig, Network, build
from sft.pictures import Preprocessing
from sft.search import BODY_RATE, SEARCHABLE, Searched, SearchError, fold_of, search
from sft.strategies import Strategy
from sft.train import TrainingSettings, fine_tune

HEAD = TrainingSettings(epochs=4, batch_size=32, strategy=Strategy.HEAD)
FACTORY = "samples:batch_norm_net"
RATES = {"learning_rate": [1e-5, 1e-2, 3.0]}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Train on one thread: for networks this small, threads cost more than they bring."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def ticking(seconds: float = 1.0) -> Callable[[], float]:
    """Make a clock on which some time passes whenever it is read."""
    read = [0.0]

    def now() -> float:
        read[0] += seconds
        return read[0]

    return now


def never() -> float:
    return 0.0


@cache
def digits() -> LabelledPictures:
    """Read 580 of the optical digits that scikit-learn ships, 8 x 8; importing it takes seconds."""
    spec = importlib.util.find_spec("sklearn")
    if spec is None or spec.origin is None:
        pytest.skip("scikit-learn ships the optical digits")
    path = Path(spec.origin).parent / "datasets/data/digits.csv.gz"
    with gzip.open(path, "rt") as lines:
        table = torch.from_numpy(np.loadtxt(islice(lines, 580), delimiter=",", dtype=np.float32))
    pixels = (table[:, :-1] * 255 / 16).to(torch.uint8).view(-1, 1, 8, 8)
    ids = tuple(f"optical/{i}" for i in range(len(table)))
    return LabelledPictures(ids, pixels, table[:, -1].long())


@cache
def champion() -> Network:
    config = ModelConfig(
        "small_cnn", tuple("0123456789"), Preprocessing(8, channels=1), (0.3,), (0.35,)
    )
    train = TrainingSettings(epochs=4, batch_size=32, learning_rate=4e-3, l2_sp=0.0)
    return fine_tune(build(config), digits().take(range(400)), train).network


def old(n: int = 120) -> LabelledPictures:
    return digits().take(range(n))


def fresh(n: int = 80) -> LabelledPictures:
    """Give other digits through an inverted sensor."""
    data = digits().take(range(500, 500 + n))
    return LabelledPictures(data.sample_ids, 255 - data.pixels, data.labels)


def values(found: Searched) -> list[tuple[float, int]]:
    return [(row.values["learning_rate"], row.folds) for row in found.tried]


def test_it_finds_a_sensible_rate() -> None:
    """Neither the rate that learns nothing nor the one that blows up; the table tells all three."""
    found = search(champion(), fresh(), old(), HEAD, RATES, now=never, folds=3)
    assert found.settings == TrainingSettings(**{**vars(HEAD), "learning_rate": 1e-2})
    assert found.stopped_by == "every candidate ran on every fold"
    assert values(found) == [(1e-5, 3), (1e-2, 3), (3.0, 3)]
    slow, good, _ = found.tried
    assert good.fresh < slow.fresh - 0.3
    assert good.loss == (good.fresh + good.old) / 2
    assert 0 < good.error < slow.loss - good.loss
    assert {row.stage for row in found.tried} == {"head"}


def test_the_seed_decides() -> None:
    """The same seed gives the same table to the bit, and the champion stays as it was."""
    before = {name: value.clone() for name, value in champion().state_dict().items()}
    one, same = (
        search(champion(), fresh(), old(), HEAD, RATES, now=never, folds=2) for _ in range(2)
    )
    assert one == same
    after = champion().state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_each_picture_is_embedded_once() -> None:
    """However many fits, the frozen part sees a picture once, and a second search none."""
    seen: list[int] = []
    hook = (
        champion()
        .get_submodule("body.0")
        .register_forward_hook(lambda _module, given, _output: seen.append(len(given[0])))
    )
    known = ActivationCache()
    counts = []
    for _ in range(2):
        seen.clear()
        search(champion(), fresh(), old(), HEAD, RATES, now=never, folds=2, cache=known)
        counts.append(sum(count for count in seen if count > 2))  # a check of the cut is of two
    hook.remove()
    assert counts == [200, 0]


def test_a_strength_is_searched_beside_the_rate() -> None:
    """Every combination runs; a strength that forbids learning is not taken."""
    grid = {"l2_sp": [0.0, 1e4], "learning_rate": [1e-5, 1e-2]}
    found = search(champion(), fresh(), old(), HEAD, grid, now=never, folds=2)
    assert len(found.tried) == 4
    assert (found.settings.learning_rate, found.settings.l2_sp) == (1e-2, 0.0)


def test_of_equals_the_most_cautious_is_taken() -> None:
    """Strengths too small to matter: the largest one wins, and so does the smaller rate."""
    grid = {"l2_sp": [0.0, 1e-9, 1e-7], "learning_rate": [1e-2, 1.0000000001e-2]}
    found = search(champion(), fresh(), old(), HEAD, grid, now=never, folds=3)
    losses = [row.loss for row in found.tried]
    assert max(losses) - min(losses) < 1e-3
    assert found.settings.learning_rate == 1e-2


def test_a_fold_without_an_old_sample_hides_no_old_loss() -> None:
    """What is forgotten is told by the folds that hold old samples; NaN where none does."""
    few = old(40)
    some = few.take([i for i, name in enumerate(few.sample_ids) if fold_of(name, 3) > 0])
    grid = {"learning_rate": [1e-2]}
    (row,) = search(champion(), fresh(), some, HEAD, grid, now=never, folds=3).tried
    assert row.folds == 3
    assert math.isfinite(row.old)
    assert row.loss == (row.fresh + row.old) / 2
    (row,) = search(champion(), fresh(), None, HEAD, grid, now=never, folds=3).tried
    assert math.isnan(row.old)
    assert row.loss == row.fresh


@pytest.mark.parametrize("name", sorted(set(SEARCHABLE) - {"learning_rate"}))
def test_every_name_can_be_searched(name: str) -> None:
    """Each strength of L_pre and each regulariser reaches the loop on embeddings."""
    short = TrainingSettings(**{**vars(HEAD), "epochs": 1})
    found = search(champion(), fresh(30), old(30), short, {name: [0.0, 0.3]}, now=never, folds=2)
    assert len({row.loss for row in found.tried}) == 2


def test_a_small_budget_drops_the_worse_half() -> None:
    """Each fold costs more than is left for all: fewer candidates see the later folds."""
    rates = {"learning_rate": [1e-5, 1e-4, 1e-2, 3e-2]}
    found = search(
        champion(), fresh(), old(), HEAD, rates, now=ticking(), folds=4, budget_seconds=18
    )
    assert "dropped" in found.stopped_by
    folds = dict(values(found))
    assert folds[1e-5] == 1
    assert max(folds.values()) == 4
    assert found.settings.learning_rate >= 1e-2


def test_an_exhausted_budget_stops_at_once() -> None:
    """Two candidates on the first fold are compared; without any, the settings stay as they are."""
    some = search(
        champion(), fresh(), old(), HEAD, RATES, now=ticking(), folds=3, budget_seconds=4.5
    )
    assert values(some) == [(1e-5, 1), (1e-2, 1)]
    assert some.stopped_by == "the budget: 0 of 3 folds were finished"
    assert some.settings.learning_rate == 1e-2
    assert math.isnan(some.tried[0].error)
    none = search(champion(), fresh(), old(), HEAD, RATES, now=ticking(), folds=3, budget_seconds=0)
    assert none.settings == HEAD
    assert none.tried == ()


def test_beyond_the_head_the_rate_is_searched_by_full_runs() -> None:
    """Three rates around the rule's, with the strategy itself."""
    full = TrainingSettings(epochs=2, batch_size=32)
    found = search(champion(), fresh(), old(), full, RATES, now=never, folds=2)
    assert [row.stage for row in found.tried] == ["head"] * 3 + ["full"] * 3
    tried = [row.values["learning_rate"] for row in found.tried[3:]]
    assert tried == pytest.approx([BODY_RATE * 1e-2 * factor for factor in (1 / 3, 1, 3)])
    assert found.settings.learning_rate in tried
    assert found.settings.strategy is Strategy.FULL
    assert found.note.endswith("searched by full runs")


def test_beyond_the_head_without_time_the_rule_sets_the_rate() -> None:
    """The budget is used up when the head is done."""
    full = TrainingSettings(epochs=2, batch_size=32)
    readings = iter([0.0] * 13)
    found = search(
        champion(), fresh(), old(), full, RATES, now=lambda: next(readings, 61.0), folds=2
    )
    assert found.settings.learning_rate == pytest.approx(BODY_RATE * 1e-2)
    assert found.note.endswith("by rule")


def test_without_memory_the_fresh_loss_decides() -> None:
    """None and an empty one are the same, and the old loss is not a number."""
    found = [
        search(champion(), fresh(), memory, HEAD, RATES, now=never, folds=2)
        for memory in (None, old(0))
    ]
    assert all(math.isnan(row.old) and row.loss == row.fresh for row in found[0].tried)
    assert found[0].settings == found[1].settings


def test_a_network_that_cannot_be_cut_is_searched_whole() -> None:
    """Its code asks a frozen layer for its width, which no cached activation tells."""

    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(64, 8), nn.Linear(8, 10)

        def forward(self, scaled: Tensor) -> Tensor:
            hidden = self.first(scaled.flatten(1))
            return self.last(hidden.view(-1, self.first.out_features))

    asks = Network(champion().config, Asks())
    found = search(asks, fresh(40), None, HEAD, {"learning_rate": [1e-3]}, now=never, folds=2)
    assert values(found) == [(1e-3, 2)]


def test_folds_are_fixed_by_the_id() -> None:
    """They are about equally large, and a sample's does not depend on the others."""
    folds = [fold_of(f"batch/{i}.png", 5) for i in range(2000)]
    assert all(350 < folds.count(fold) < 450 for fold in range(5))
    assert fold_of("batch/7.png", 5) == folds[7]


def test_too_few_samples_leave_out_folds_or_are_refused() -> None:
    """Of five folds, three samples fill at most three; one sample is no search."""
    found = search(champion(), fresh(3), old(), HEAD, RATES, now=never, folds=5)
    filled = {fold_of(name, 5) for name in fresh(3).sample_ids}
    assert {row.folds for row in found.tried} == {len(filled)}
    with pytest.raises(SearchError, match=r"1 fresh samples make 0 folds of 5 .* label more"):
        search(champion(), fresh(1), old(), HEAD, RATES, now=never)
    with pytest.raises(SearchError, match="0 fresh samples"):
        search(champion(), fresh(0), old(), HEAD, RATES, now=never)


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({}, "the grid is empty"),
        ({"learning_rate": []}, "the grid is empty"),
        ({"epochs": [3.0]}, "epochs cannot be searched; these can: learning_rate"),
        ({"l2_sp": [-1.0]}, "cannot be set: l2_sp must not be negative"),
        ({"learning_rate": [1e30]}, "smaller learning rates"),
    ],
)
def test_a_grid_that_makes_no_sense_is_refused(grid: dict[str, list[float]], message: str) -> None:
    """The message names what is wrong with it."""
    with pytest.raises(SearchError, match=message):
        search(champion(), fresh(20), old(20), HEAD, grid, now=never, folds=2)


def test_a_candidate_that_cannot_be_trained_loses_to_one_that_can() -> None:
    """Fresh labels of one class are nothing to learn from without the old ones."""
    labels = fresh().labels
    one = fresh().take(torch.flatten(torch.nonzero(labels == labels[0])).tolist())
    grid = {"rehearsal": [0.0, 0.5]}
    found = search(champion(), one, old(), HEAD, grid, now=never, folds=3)
    assert found.settings.rehearsal == 0.5
    assert [math.isinf(row.fresh) for row in found.tried] == [True, False]
    with pytest.raises(SearchError, match="class"):
        search(champion(), one, old(), HEAD, {"rehearsal": [0.0]}, now=never, folds=3)


def test_what_cannot_be_trained_is_named() -> None:
    """It is not taken for rates that are too large."""
    settings = TrainingSettings(
        epochs=1, batch_size=1, rehearsal=0.0, strategy=Strategy.FULL, freeze_batch_norm=False
    )
    network = build(replace(champion().config, architecture=FACTORY), allowed_factories={FACTORY})
    with pytest.raises(SearchError, match="statistics from batches of one sample"):
        search(network, fresh(20), old(20), settings, RATES, now=never, folds=2)


def test_one_fold_is_refused() -> None:
    """There has to be one to learn from."""
    with pytest.raises(SearchError, match="folds must be at least 2, got 1"):
        search(champion(), fresh(), old(), HEAD, RATES, now=never, folds=1)
