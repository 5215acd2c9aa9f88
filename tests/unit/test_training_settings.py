"""The training settings, each by what it does to the weights."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from sft.cache import ActivationCache
from sft.dataset import LabelledPictures
from sft.models import ModelConfig, Network, build
from sft.pictures import Preprocessing
from sft.schedules import Optimiser, Schedule
from sft.strategies import Strategy
from sft.train import StopBy, TrainingError, TrainingSettings, fine_tune

CONFIG = ModelConfig("small_cnn", ("a", "b", "c"), Preprocessing(8, channels=1), (0.4,), (0.3,))


def network() -> Network:
    return build(CONFIG)


def pictures(n: int, seed: int = 0, prefix: str = "b") -> LabelledPictures:
    """Noise whose brightness tells the class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    noise = torch.randint(0, 90, (n, 1, 8, 8), generator=generator)
    pixels = (noise + labels.view(-1, 1, 1, 1) * 60).to(torch.uint8)
    return LabelledPictures(tuple(f"{prefix}/{i}" for i in range(n)), pixels, labels)


def moved(before: Network, after: Network) -> set[str]:
    """Names of the parameters that a tuning changed."""
    return {
        name
        for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True)
        if not torch.equal(old, new)
    }


SHORT = TrainingSettings(epochs=2, batch_size=16, rehearsal=0, l2_sp=0, learning_rate=0.01)


@pytest.mark.parametrize(
    ("changes", "still"),
    [
        ({"strategy": Strategy.HEAD}, {"body.0", "body.3", "body.8"}),
        ({"freeze_first": 1}, {"body.0"}),
        ({"train_last": 1}, {"body.0", "body.3"}),
        ({"strategy": Strategy.SURGICAL, "surgical_first": 1}, {"body.3", "body.8", "body.10"}),
        ({"strategy": Strategy.TWO_STAGE}, set()),
    ],
)
def test_only_what_may_move_moves(changes: dict[str, Any], still: set[str]) -> None:
    """Frozen layers keep their bits; all the others change; afterwards everything may move."""
    start = network()
    tuned = fine_tune(start, pictures(64), replace(SHORT, **changes)).network
    layers = {name.rsplit(".", 1)[0] for name in moved(start, tuned)}
    assert layers == {"body.0", "body.3", "body.8", "body.10"} - still
    assert all(value.requires_grad for value in tuned.parameters())


@pytest.mark.parametrize(
    "changes",
    [
        {"optimiser": Optimiser.SGD}, {"optimiser": Optimiser.ADAM}, {"mixup": 0.4},
        {"label_smoothing": 0.2}, {"dropout": 0.5}, {"balanced": True}, {"backbone_rate": 0.1},
        {"schedule": Schedule.ONE_CYCLE}, {"schedule": Schedule.STEP, "step_epochs": 1},
        {"schedule": Schedule.CONSTANT}, {"warmup": 0.5}, {"ewc": 10.0}, {"distillation": 1.0},
        {"dark_experience": 1.0, "rehearsal": 0.5}, {"flip": True}, {"crop": 0.5},
        {"shift_pixels": 1, "rare": 2.0},
    ],
    ids=str,
)  # fmt: skip
def test_each_setting_changes_the_weights_and_only_by_the_seed(changes: dict[str, Any]) -> None:
    """The result differs from the plain one, and is the same when it is made again."""
    start, memory = network(), pictures(40, seed=3, prefix="old")
    base = replace(SHORT, rehearsal=changes.get("rehearsal", 0.0))
    plain = fine_tune(start, pictures(64), base, memory=memory).network
    one, same = (
        fine_tune(start, pictures(64), replace(base, **changes), memory=memory).network
        for _ in range(2)
    )
    assert moved(plain, one)
    assert not moved(one, same)


def test_ewc_without_old_samples_is_refused() -> None:
    """Its Fisher information needs some; the message says so."""
    with pytest.raises(TrainingError, match="ewc needs old samples"):
        fine_tune(network(), pictures(64), replace(SHORT, ewc=1.0))


def test_a_strategy_without_its_layers_is_refused() -> None:
    """A network without batch norm has nothing that `batch_norm` could move."""
    with pytest.raises(TrainingError, match="no batch-norm layer"):
        fine_tune(network(), pictures(64), replace(SHORT, strategy=Strategy.BATCH_NORM))


def test_stopping_by_accuracy_keeps_the_most_accurate_epoch() -> None:
    """The best epoch is the one with the highest validation accuracy, the first of equals."""
    settings = replace(SHORT, epochs=6, stop_by=StopBy.ACCURACY)
    tuned = fine_tune(network(), pictures(200), settings, validation=(pictures(100, seed=5),))
    accuracies = [epoch.validation_accuracy for epoch in tuned.epochs]
    assert tuned.best_epoch == accuracies.index(max(accuracies)) + 1


@pytest.mark.parametrize(
    "changes",
    [
        {"strategy": Strategy.HEAD},
        {"train_last": 1, "dropout": 0.3},
        {"strategy": Strategy.TWO_STAGE, "epochs": 4},
        {"strategy": Strategy.HEAD, "distillation": 1.0, "dark_experience": 1.0, "l2_sp": 0.1},
    ],
    ids=str,
)
def test_a_cached_frozen_part_changes_nothing(changes: dict[str, Any]) -> None:
    """With and without the cache the weights are the same."""
    start, memory = network(), pictures(40, seed=3, prefix="old")
    settings = replace(SHORT, rehearsal=0.5, **changes)
    validation = (pictures(30, seed=8, prefix="new"),)
    plain, cached = (
        fine_tune(
            start, pictures(64), settings, memory=memory, validation=validation, cache=cache
        ).network
        for cache in (None, ActivationCache())
    )
    for one, other in zip(plain.parameters(), cached.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_augmented_views_are_kept() -> None:
    """Head tuning on three views of each picture differs from tuning on the pictures alone."""
    start = network()
    settings = replace(SHORT, epochs=3, strategy=Strategy.HEAD, shift_pixels=1, views=3)
    varied = fine_tune(start, pictures(64), settings, cache=ActivationCache()).network
    plain = fine_tune(start, pictures(64), replace(settings, shift_pixels=0)).network
    assert moved(plain, varied)
    assert moved(start, varied) == {"body.10.weight", "body.10.bias"}


@pytest.mark.parametrize(
    "changes",
    [{}, {"mixup": 0.4}, {"strategy": Strategy.HEAD}, {"label_smoothing": 0.1, "balanced": True}],
)
def test_a_sample_counts_by_its_weight(changes: dict[str, Any]) -> None:
    """Labels of samples with weight 0 change no weight of the network; with weight .1 they do."""
    data, settings = pictures(60), replace(SHORT, class_weights=False, **changes)
    doubted = torch.arange(60) % 5 == 0
    # classes are moved among the doubted, so that each is drawn as often as before
    labels = data.labels.clone()
    labels[doubted] = labels[doubted].roll(1)
    held = pictures(30, seed=1, prefix="v")
    tuned = []
    for weight in (0.0, 0.1):
        weights = torch.where(doubted, weight, 1.0)
        for given in (data.labels, labels):
            fresh = replace(data, labels=given, weights=weights)
            unsure = replace(held, weights=torch.where(held.labels == 0, weight, 1.0))
            tuned.append(
                fine_tune(
                    network(), fresh, settings, validation=(unsure,), cache=ActivationCache()
                ).network
            )
    assert not moved(tuned[0], tuned[1])
    assert moved(tuned[2], tuned[3])
