"""Several processes fine-tune as one does: real gloo processes on real digits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import pytest
import torch
from samples import optical_digits

from sft import processes
from sft.after import tune
from sft.cache import ActivationCache
from sft.dataset import LabelledPictures
from sft.distributed import Team
from sft.models import ModelConfig, Network, build
from sft.pictures import Preprocessing
from sft.speed import ComputeSettings, Device, Precision
from sft.strategies import Strategy
from sft.train import FineTuned, TrainingError, TrainingSettings, fine_tune

TWO = ComputeSettings(device=Device.CPU, processes=2)
CLOSE = 1e-5
"""Largest difference of a weight, where weights move by .01 and more; measured: 2e-6 and less."""
FACTORY = "samples:batch_norm_net"


@pytest.fixture(scope="module", autouse=True)
def crew() -> Iterator[None]:
    """Keep one pair of processes for all tests: starting the second takes seconds."""
    with processes._crew(TWO, champion(FACTORY)) as found:
        assert found is not None
        processes._JOINED.append(found)
        yield
        processes._JOINED.clear()


@cache
def champion(architecture: str = "small_cnn") -> Network:
    config = ModelConfig(
        architecture, tuple("0123456789"), Preprocessing(8, channels=1), (0.3,), (0.35,)
    )
    network = build(config, allowed_factories={FACTORY})
    learned = TrainingSettings(epochs=2, l2_sp=0.0)
    return fine_tune(network, old(), learned).network


def old() -> LabelledPictures:
    return optical_digits().take(range(120))


def inverted(start: int, stop: int) -> LabelledPictures:
    """Digits of another world: white on black has become black on white."""
    some = optical_digits().take(range(start, stop))
    return replace(some, pixels=255 - some.pixels[:])


def both_ways(
    settings: TrainingSettings,
    fresh: LabelledPictures,
    start: Network,
    compute: ComputeSettings = TWO,
    *,
    cached: bool = False,
) -> tuple[FineTuned, FineTuned]:
    """Fine-tune by one process and by two."""
    given = {"memory": old(), "validation": (inverted(600, 620), old().take(range(20)))}
    one, two = (
        way(
            start,
            fresh,
            settings,
            cache=ActivationCache(compute=compute) if cached else None,
            compute=compute,
            **given,
        )
        for way in (tune, processes.tune)
    )
    return one, two


def farthest(one: Network, other: Network) -> float:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs)


def distance(one: Network, other: Network) -> float:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return sum(float((a - b).detach().square().sum()) for a, b in pairs) ** 0.5


@pytest.mark.parametrize(
    ("changed", "architecture"),
    [
        pytest.param({}, "small_cnn", id="the default"),
        pytest.param({"batch_size": 7}, "small_cnn", id="batches that do not divide"),
        pytest.param({"batch_size": 1, "rehearsal": 0.0, "epochs": 1}, "small_cnn", id="of one"),
        pytest.param(
            {"dropout": 0.3, "mixup": 0.4, "shift_pixels": 1, "label_smoothing": 0.1},
            "small_cnn",
            id="with all that is drawn",
        ),
        pytest.param(
            {"distillation": 1.0, "dark_experience": 0.1, "ewc": 0.1, "balanced": True},
            "small_cnn",
            id="with every term",
        ),
        pytest.param({"strategy": Strategy.TWO_STAGE}, FACTORY, id="frozen batch norm, a factory"),
    ],
)
def test_two_processes_make_the_weights_of_one(
    changed: dict[str, float], architecture: str
) -> None:
    """Whatever the settings, they differ by rounding alone, and so does the history."""
    settings = TrainingSettings(**{"epochs": 2, "batch_size": 16, **changed})  # type: ignore[arg-type]
    fresh = inverted(400, 431)
    fresh = replace(fresh, weights=torch.linspace(0.2, 1, 31))
    one, two = both_ways(settings, fresh, champion(architecture))
    assert farthest(one.network, champion(architecture)) > 100 * CLOSE
    assert farthest(one.network, two.network) < CLOSE
    assert (one.best_epoch, one.stopped) == (two.best_epoch, two.stopped)
    for ours, theirs in zip(one.epochs, two.epochs, strict=True):
        assert theirs.train_loss == pytest.approx(ours.train_loss, rel=1e-4)
        assert theirs.validation_loss == pytest.approx(ours.validation_loss, rel=1e-4)
        assert theirs.validation_accuracy == ours.validation_accuracy


@pytest.mark.parametrize("precision", [Precision.FLOAT32, Precision.BFLOAT16])
def test_the_frozen_part_runs_once_for_each_picture_over_all_processes(
    precision: Precision, tmp_path: object
) -> None:
    """A head learns from activations of which each process computed a half.

    bfloat16 holds three digits, and rounds otherwise in a batch of half the size. A gradient near 0
    may then change its sign, and AdamW moves that one weight by a whole step; so all are compared.
    """
    settings = TrainingSettings(
        strategy=Strategy.HEAD, epochs=2, shift_pixels=1, views=2, distillation=0.5
    )
    compute = replace(TWO, precision=precision, findings=str(tmp_path))
    one, two = both_ways(settings, inverted(400, 431), champion(), compute, cached=True)
    assert farthest(one.network, champion()) > 100 * CLOSE
    if precision == Precision.FLOAT32:
        assert farthest(one.network, two.network) < CLOSE
    apart, moved = distance(one.network, two.network), distance(one.network, champion())
    assert apart < moved / 10


def test_all_stop_early_together() -> None:
    """The rate is so large that validation gets worse: both ways end at the same epoch."""
    settings = TrainingSettings(epochs=12, learning_rate=0.03, patience=1)
    one, two = both_ways(settings, inverted(400, 440), champion())
    assert one.stopped.startswith("no better validation")
    assert (len(one.epochs), one.best_epoch) == (len(two.epochs), two.best_epoch)


def test_all_tune_each_member_of_a_soup() -> None:
    """Several fine-tunings behind one another, by the same processes."""
    settings = TrainingSettings(epochs=2, after="soup", members=2)  # type: ignore[arg-type]
    one, two = both_ways(settings, inverted(400, 440), champion())
    assert farthest(one.network, two.network) < CLOSE


def test_what_cannot_be_learned_is_refused_by_all_and_nobody_is_lost() -> None:
    """After a refusal the same processes make the next fine-tuning."""
    wrong = replace(inverted(400, 420), labels=torch.full((20,), 10))
    with pytest.raises(TrainingError, match="0 to 9"):
        processes.tune(champion(), wrong, TrainingSettings(epochs=1), compute=TWO)
    settings = TrainingSettings(epochs=1, learning_rate=1e30)
    with pytest.raises(TrainingError, match="lower learning_rate"):
        processes.tune(champion(), inverted(400, 440), settings, compute=TWO)
    one, two = both_ways(TrainingSettings(epochs=1), inverted(400, 420), champion())
    assert farthest(one.network, two.network) < CLOSE


def test_batch_norm_that_learns_statistics_is_refused() -> None:
    """Each process would normalise by its own part of a batch."""
    settings = TrainingSettings(epochs=1, freeze_batch_norm=False)
    with pytest.raises(TrainingError, match="leave freeze_batch_norm at true"):
        fine_tune(champion(FACTORY), inverted(400, 420), settings, team=Team(0, 2))


@pytest.mark.parametrize(("n", "size"), [(1, 4), (7, 2), (8, 4), (33, 32)])
def test_every_place_has_one_process(n: int, size: int) -> None:
    """What the parts give, behind one another and cut to n, is each place once, in order."""
    parts = [Team(rank, size).rows(n) for rank in range(size)]
    assert len({len(part) for part in parts}) == 1
    assert torch.cat(parts)[:n].tolist() == list(range(n))
