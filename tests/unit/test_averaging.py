"""Averages of networks: exact at their ends, chosen by validation, and refused where senseless."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from sft.averaging import (
    choose_alpha,
    ensemble,
    greedy_soup,
    interpolate,
    uniform_soup,
)
from sft.dataset import LabelledPictures
from sft.evaluate import answer
from sft.models import ModelConfig, ModelError, Network, build, widen
from sft.pictures import Preprocessing

CONFIG = ModelConfig("tests:body", ("a", "b"), Preprocessing(4, channels=1), (0.0,), (1.0,))


def network(seed: int = 0) -> Network:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        body = nn.Sequential(
            nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(),
            nn.Linear(48, 2),
        )  # fmt: skip
        made = Network(CONFIG, body).train()
        for _ in range(seed + 1):
            made(pictures(seed=seed).pixels)  # statistics of its own
    return made.eval()


def line(*weights: float) -> Network:
    """Answer with the brightness of a picture of one pixel, times a weight for each class."""
    body = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=False))
    with torch.no_grad():
        body[1].weight.copy_(torch.tensor(weights).view(2, 1))
    config = ModelConfig("tests:line", ("a", "b"), Preprocessing(1, channels=1), (0.0,), (1.0,))
    return Network(config, body).eval()


def pictures(n: int = 20, seed: int = 0) -> LabelledPictures:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (n, 1, 4, 4), dtype=torch.uint8, generator=generator)
    return LabelledPictures(tuple(map(str, range(n))), pixels, torch.arange(n) % 2)


def white(label: int, n: int = 4) -> LabelledPictures:
    pixels = torch.full((n, 1, 1, 1), 255, dtype=torch.uint8)
    return LabelledPictures(tuple(map(str, range(n))), pixels, torch.full((n,), label))


def state(of: Network) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in of.state_dict().items()}


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_interpolation_is_a_straight_line_with_exact_ends(alpha: float) -> None:
    """Weights and statistics lie on it, counters are the tuned ones, and neither end changes."""
    champion, tuned = network(0), network(1)
    before, after = state(champion), state(tuned)
    mixed = interpolate(champion, tuned, alpha)
    for name, value in mixed.state_dict().items():
        if name.endswith("num_batches_tracked"):
            assert value == after[name] == 2
        elif alpha in {0.0, 1.0}:
            assert value.equal(after[name] if alpha else before[name])
        else:
            torch.testing.assert_close(value, before[name] + alpha * (after[name] - before[name]))
    assert all(value.equal(before[name]) for name, value in champion.state_dict().items())
    assert all(value.equal(after[name]) for name, value in tuned.state_dict().items())
    assert not mixed.training


def test_rows_of_new_classes_are_the_tuned_ones() -> None:
    """Old rows are mixed, new ones have nothing to be mixed with."""
    champion = network()
    tuned = widen(champion, ("a", "b", "c"), seed=1)
    with torch.no_grad():
        tuned.head.weight += 1.0
    mixed = interpolate(champion, tuned, 0.5)
    assert mixed.config.classes == ("a", "b", "c")
    torch.testing.assert_close(mixed.head.weight[:2], champion.head.weight + 0.5)
    assert mixed.head.weight[2].equal(tuned.head.weight[2])
    assert mixed.head.bias[2].equal(tuned.head.bias[2])


def test_what_is_not_related_is_not_mixed() -> None:
    """Other layers, other classes, and an alpha outside its range are refused by name."""
    with pytest.raises(ValueError, match=r"alpha must lie between 0 and 1, got 1\.5"):
        interpolate(network(), network(), 1.5)
    with pytest.raises(ModelError, match="do not have the same weights"):
        interpolate(network(), line(1.0, 0.0), 0.5)
    with pytest.raises(ModelError, match=r"does not begin with the champion's classes \['a'"):
        interpolate(widen(network(), ("a", "b", "c")), network(), 0.5)
    small, large = (
        build(ModelConfig("mlp", ("a", "b"), Preprocessing(size, channels=1), (0.0,), (1.0,)))
        for size in (4, 5)
    )
    with pytest.raises(ModelError, match=r"body\.1\.weight: \(256, 16\) and \(256, 25\)"):
        interpolate(small, large, 0.5)


@pytest.mark.parametrize(
    ("champion", "tuned", "sets", "expected"),
    [
        # one knows the old label, one the new: the middle, however large the sets are
        ((4.0, 0.0), (0.0, 4.0), (white(0, 4), white(1, 400)), 0.5),
        ((4.0, 0.0), (0.0, 4.0), (white(1), white(0, 0)), 1.0),
        ((4.0, 0.0), (0.0, 4.0), (white(0),), 0.0),
        # from doubt to too much of what is right in two of three sets
        ((0.0, 0.0), (0.0, 3.0), (white(0), white(1, 8), white(1)), 0.25),
        ((1.0, 1.0), (3.0, 3.0), (white(0), white(1)), 1.0),  # all alike: the larger alpha
    ],
)
def test_the_alpha_that_validates_best_is_taken(
    champion: tuple[float, float],
    tuned: tuple[float, float],
    sets: tuple[LabelledPictures, ...],
    expected: float,
) -> None:
    """By the mean loss of the sets, each with the same weight; an equal loss goes to the tuned."""
    found = choose_alpha(line(*champion), line(*tuned), sets, grid=(1.0, 0.0, 0.25, 0.5))
    assert found.alpha == expected
    assert [one.alpha for one in found.tried] == [0.0, 0.25, 0.5, 1.0]
    mixed = interpolate(line(*champion), line(*tuned), expected)
    assert found.network.head.weight.equal(mixed.head.weight)


def test_losses_and_accuracies_are_those_of_the_sets() -> None:
    """The table can be checked against the networks."""
    champion, tuned = network(0), network(1)
    sets = (pictures(20, 1), pictures(0), pictures(60, 2))
    found = choose_alpha(champion, tuned, sets)
    assert [one.alpha for one in found.tried] == [0.0, 0.25, 0.5, 0.75, 1.0]
    for one in found.tried:
        mixed = interpolate(champion, tuned, one.alpha)
        with torch.inference_mode():
            losses = [
                functional.cross_entropy(mixed(data.pixels), data.labels).item()
                for data in sets
                if len(data)
            ]
        assert one.loss == pytest.approx(sum(losses) / 2, rel=1e-5)
        accuracies = [answer(mixed, data).accuracy for data in sets if len(data)]
        assert one.accuracy == pytest.approx(sum(accuracies) / 2)


def test_without_validation_what_was_trained_stays() -> None:
    """And so it does when a loss is not a number."""
    tuned = network(1)
    found = choose_alpha(network(0), tuned, (pictures(0),))
    assert (found.alpha, found.tried) == (1.0, ())
    assert found.network is tuned
    broken = line(math.nan, 0.0)
    assert choose_alpha(line(1.0, 0.0), broken, (white(0),)).alpha == 0.0


@pytest.mark.parametrize("grid", [(0.0, 0.5), (0.5, 1.0, 1.5)])
def test_a_grid_must_hold_one(grid: tuple[float, ...]) -> None:
    """A blind average is no choice."""
    with pytest.raises(ValueError, match=r"the grid of alpha must hold 1\.0"):
        choose_alpha(network(), network(), (pictures(),), grid=grid)


def test_a_uniform_soup_is_the_mean() -> None:
    """Of weights and of statistics; of one network, it is that network."""
    networks = [network(seed) for seed in range(3)]
    soup = uniform_soup(networks)
    for name, value in soup.state_dict().items():
        if value.is_floating_point():
            mean = torch.stack([one.state_dict()[name] for one in networks]).mean(0)
            torch.testing.assert_close(value, mean)
    assert all(v.equal(state(networks[0])[n]) for n, v in state(uniform_soup(networks[:1])).items())
    with pytest.raises(ModelError, match="at least one network"):
        uniform_soup([])


def test_a_greedy_soup_leaves_out_what_makes_it_worse() -> None:
    """It begins with the best, takes an equal one, and is never worse than its best member."""
    weights = [1.0, 6.0, 3.0, 5.0, math.nan]  # the score is best at a weight of 4

    def score(one: Network) -> float:
        return -abs(one.head.weight[0].item() - 4.0)

    soup = greedy_soup([line(weight, 0.0) for weight in weights], score)
    assert soup.members == (2, 3)
    assert soup.score == 0.0
    assert soup.network.head.weight[0].item() == 4.0


def test_an_ensemble_answers_with_the_mean_of_its_members() -> None:
    """Of their log-probabilities; the members stay themselves, and a network can hold it."""
    networks = [network(seed) for seed in range(3)]
    together = ensemble(networks)
    data = pictures(9)
    with torch.inference_mode():
        logs = [one(data.pixels).log_softmax(1) for one in networks]
        expected = torch.stack(logs).mean(0).softmax(1)
    torch.testing.assert_close(together.embed(data.pixels)[1], expected)
    assert together.config.classes == ("a", "b")
    assert answer(together, data).probabilities.shape == (9, 2)
    with torch.no_grad():
        together.head.weight.zero_()
    assert all(one.head.weight.any() for one in networks)


def test_an_ensemble_of_equals_is_its_member() -> None:
    """Its answers are then those of one."""
    one = network()
    together = ensemble([one, one])
    torch.testing.assert_close(
        together.embed(pictures().pixels)[1], one.embed(pictures().pixels)[1]
    )


def test_what_differs_makes_no_soup_and_no_ensemble() -> None:
    """Networks with other classes, and fewer than two, are refused."""
    for together in (uniform_soup, ensemble):
        with pytest.raises(ModelError, match="must agree in architecture, classes"):
            together([network(), widen(network(), ("a", "b", "c"))])
    with pytest.raises(ModelError, match="at least 2 networks, got 1"):
        ensemble([network()])
