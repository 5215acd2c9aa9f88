"""Losses by hand."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from sft.objectives import (
    EWC,
    L2SP,
    DarkExperience,
    Distillation,
    Penalty,
    Teacher,
    class_weights,
    fisher,
    soft_cross_entropy,
    soft_targets,
)


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([5, 5, 5], [1.0, 1.0, 1.0]),
        ([1, 3], [1.5, 0.5]),  # 2/1 and 2/3, divided by their mean 4/3
        ([2, 0, 6], [1.5, 1.0, 0.5]),  # a class that does not occur has no say
        ([0, 0, 4], [1.0, 1.0, 1.0]),
        ([0, 0, 0], [1.0, 1.0, 1.0]),
        ([1, 99], [10 / 5.252525, 0.505051 / 5.252525 * 1.0]),  # 50 is cut to 10
    ],
)
def test_classes_weigh_by_the_inverse_of_their_share(
    counts: list[int], expected: list[float]
) -> None:
    """Rare classes weigh more, with a mean of one over those that occur."""
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    weights = class_weights(labels, len(counts))
    torch.testing.assert_close(weights, torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_each_class_counts_the_same() -> None:
    """The weights of all samples of a class sum to the same for every class."""
    counts = torch.tensor([10, 40, 25])
    weights = class_weights(torch.repeat_interleave(torch.arange(3), counts), 3)
    total = counts * weights
    torch.testing.assert_close(total, total[:1].expand(3))


def test_no_class_drowns_the_others() -> None:
    """A class with one sample weighs no more than `most` before the mean is brought to one."""
    labels = torch.tensor([0] + [1] * 1000 + [2] * 1000)
    free, capped = (class_weights(labels, 3, most=most) for most in (1e9, 2.0))
    assert free[0] / free[1] == pytest.approx(1000)
    assert capped[0] / capped[1] == pytest.approx(2 / (2001 / 3 / 1000), rel=1e-4)


def linear(rows: list[list[float]], bias: list[float]) -> nn.Linear:
    layer = nn.Linear(len(rows[0]), len(rows))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(rows))
        layer.bias.copy_(torch.tensor(bias))
    return layer


def test_l2_sp_is_half_the_squared_distance() -> None:
    """Its value and gradient are those of strength/2 · ‖w - w₀‖², and zero at the start."""
    layer = linear([[1.0, 2.0]], [0.0])
    pull = L2SP(dict(layer.named_parameters()), 0.3)
    assert pull(layer).item() == 0.0
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[4.0, 1.0]]))
        layer.bias.copy_(torch.tensor([2.0]))
    penalty = pull(layer)
    assert penalty.item() == pytest.approx(0.15 * (9 + 1 + 4))
    penalty.backward()
    torch.testing.assert_close(layer.weight.grad, torch.tensor([[0.9, -0.3]]))
    torch.testing.assert_close(layer.bias.grad, torch.tensor([0.6]))


def test_l2_sp_holds_the_old_rows_of_a_wider_head() -> None:
    """Rows and biases of new classes are free, and get no gradient."""
    pull = L2SP({"weight": torch.tensor([[1.0, 2.0]]), "bias": torch.tensor([0.5])}, 2.0)
    wide = linear([[1.0, 3.0], [7.0, 8.0]], [0.5, 9.0])
    penalty = pull(wide)
    assert penalty.item() == pytest.approx(1.0)
    penalty.backward()
    torch.testing.assert_close(wide.weight.grad, torch.tensor([[0.0, 2.0], [0.0, 0.0]]))
    torch.testing.assert_close(wide.bias.grad, torch.tensor([0.0, 0.0]))


def test_l2_sp_leaves_out_frozen_and_unknown_weights() -> None:
    """What does not train, and what the champion did not have, costs nothing."""
    layer = linear([[1.0, 2.0]], [3.0])
    layer.bias.requires_grad_(False)
    pull = L2SP({"bias": torch.zeros(1)}, 1.0)
    assert pull(layer).item() == 0.0


def test_l2_sp_takes_a_scalar_weight() -> None:
    """A temperature, which has no rows, is held too."""
    module = nn.Module()
    module.temperature = nn.Parameter(torch.tensor(3.0))
    assert L2SP({"temperature": torch.tensor(1.0)}, 1.0)(module).item() == 2.0


def test_l2_sp_refuses_a_negative_strength() -> None:
    """A push away from the champion is no pull."""
    with pytest.raises(ValueError, match="l2_sp must not be negative, got -1"):
        L2SP({}, -1.0)


def network(classes: int = 3, seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, classes))


def inputs(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(seed))


def test_fisher_of_a_logistic_regression_is_known() -> None:
    """With many draws it is E[p(1-p) x²] for each weight, up to the scale that makes its mean 1."""
    layer = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    x = torch.tensor([[1.0, 3.0], [-2.0, 0.5]]).repeat(1000, 1)
    p = layer(x).softmax(1).detach()
    expected = ((p * (1 - p)).unsqueeze(2) * x.square().unsqueeze(1)).mean(0)
    found = fisher(layer, x, generator=torch.Generator().manual_seed(0))["weight"]
    torch.testing.assert_close(found, expected / expected.mean(), rtol=0.06, atol=0.01)
    assert found.mean() == pytest.approx(1.0)


def test_empirical_fisher_takes_the_labels_given() -> None:
    """It is the mean squared gradient of the labels' log-probabilities."""
    model, x, labels = network().eval(), inputs(3), torch.tensor([0, 2, 1])
    squares = []
    for place in range(3):
        log_odds = model(x[place : place + 1]).log_softmax(1)[0, labels[place]]
        squares.append(torch.autograd.grad(log_odds, model[0].weight)[0].square())
    expected = torch.stack(squares).mean(0)
    found = fisher(model, x, labels)["0.weight"]
    torch.testing.assert_close(found / found.mean(), expected / expected.mean())


def test_fisher_leaves_the_network_as_it_was() -> None:
    """Its mode, its gradients and its weights; dropout is off; what is frozen has no entry."""
    model = network().train()
    model[0].requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    one, same = (fisher(model, inputs(5), torch.arange(5) % 3) for _ in range(2))
    assert one.keys() == {"3.weight", "3.bias"}
    assert all(value.equal(same[name]) for name, value in one.items())
    assert all(module.training for module in model.modules())
    assert all(value.grad is None for value in model.parameters())
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


def test_fisher_needs_samples_and_doubt() -> None:
    """Without samples, or where the network is certain, it says what to do instead."""
    with pytest.raises(ValueError, match="ewc needs old samples"):
        fisher(network(), inputs(0))
    certain = linear([[1e9, 0.0], [-1e9, 0.0]], [0.0, 0.0])
    with pytest.raises(ValueError, match="take L2-SP instead"):
        fisher(certain, torch.ones(3, 2))


def test_ewc_weighs_each_weight_by_its_information() -> None:
    """Its value and gradient are those of strength/2 · Σ F (w - w₀)², new rows left free."""
    start = {"weight": torch.tensor([[1.0, 2.0]]), "bias": torch.tensor([0.5])}
    pull = EWC(start, {"weight": torch.tensor([[3.0, 0.0]]), "bias": torch.tensor([1.0])}, 2.0)
    wide = linear([[2.0, 9.0], [7.0, 8.0]], [1.5, 9.0])
    penalty = pull(wide)
    assert penalty.item() == pytest.approx(3.0 + 1.0)
    penalty.backward()
    torch.testing.assert_close(wide.weight.grad, torch.tensor([[6.0, 0.0], [0.0, 0.0]]))
    torch.testing.assert_close(wide.bias.grad, torch.tensor([2.0, 0.0]))


def test_ewc_of_equal_information_is_l2_sp() -> None:
    """So that one strength means the same for both."""
    model = network()
    start = {name: value + 0.1 for name, value in model.named_parameters()}
    ones = {name: torch.ones_like(value) for name, value in start.items()}
    torch.testing.assert_close(EWC(start, ones, 0.3)(model), L2SP(start, 0.3)(model))


def test_ewc_lets_what_the_old_world_left_unused_move() -> None:
    """It learns a new task better than L2-SP does, and changes the old answers less."""
    used = torch.tensor([1.0, 1.0, 0.0, 0.0])
    champion, old, new = nn.Linear(4, 2), inputs(50) * used, inputs(100, seed=1)
    with torch.no_grad():
        champion.weight.copy_(torch.tensor([[1.0, -1.0, 0.2, 0.0], [-1.0, 1.0, 0.0, 0.2]]))
    labels = (new[:, 2] > 0).long()
    start = dict(champion.named_parameters())
    information = fisher(champion, old, generator=torch.Generator().manual_seed(0))

    def tune(penalty: Penalty) -> tuple[float, float]:
        tuned = copy.deepcopy(champion)
        optimiser = torch.optim.SGD(tuned.parameters(), 0.3)
        for _ in range(100):
            logits = tuned(new)
            task = functional.cross_entropy(logits, labels)
            optimiser.zero_grad()
            (task + penalty(tuned, new, logits, torch.zeros(100, dtype=torch.bool))).backward()
            optimiser.step()
        return task.item(), (tuned(old) - champion(old)).square().mean().item()

    ewc, l2_sp = tune(EWC(start, information, 0.3)), tune(L2SP(start, 0.3))
    assert ewc[0] < 0.7 * l2_sp[0]
    assert ewc[1] < 0.7 * l2_sp[1]


def penalties(champion: nn.Module) -> dict[str, Penalty]:
    teacher = Teacher(champion)
    return {
        "lwf": Distillation(teacher, 0.5),
        "lwf on old": Distillation(teacher, 0.5, only_old=True),
        "der": DarkExperience(teacher, 0.5),
        "l2_sp": L2SP(dict(champion.named_parameters()), 0.5),
    }


@pytest.mark.parametrize("name", ["lwf", "lwf on old", "der", "l2_sp"])
def test_penalties_are_zero_at_the_champion_and_pull_back(name: str) -> None:
    """Each is zero there, positive elsewhere, and its gradient leads back; they can be added."""
    champion = network().eval()
    penalty = penalties(champion)[name]
    x, is_old = inputs(8), torch.arange(8) >= 4
    moved = copy.deepcopy(champion)
    assert penalty(moved, x, moved(x), is_old).item() == pytest.approx(0.0, abs=1e-6)
    with torch.no_grad():
        for weight in moved.parameters():
            weight.add_(0.3)
        moved[3].bias[0] += 1.0
    before = penalty(moved, x, moved(x), is_old)
    before.backward()
    with torch.no_grad():
        for weight in moved.parameters():
            weight.sub_(0.01 * weight.grad)
    assert 0 < penalty(moved, x, moved(x), is_old) < before


def test_distillation_by_hand() -> None:
    """λ·T²·KL over the champion's classes, whatever a new class says."""
    taught, answered = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0, 50.0]])
    p = torch.tensor([1.0, 0.0]).softmax(0)  # at a temperature of 2
    divergence = (p * (p.log() - p.flip(0).log())).sum()
    term = Distillation(Teacher(lambda _: taught), 3.0, temperature=2.0)
    found = term(network(), inputs(1), answered, torch.tensor([False]))
    assert found.item() == pytest.approx(3.0 * 4.0 * divergence.item(), rel=1e-5)


def test_dark_experience_by_hand() -> None:
    """The mean squared difference on rehearsed samples, over the champion's classes."""
    taught = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    answered = torch.tensor([[9.0, 9.0, 9.0], [3.0, 6.0, 9.0]])
    term = DarkExperience(Teacher(lambda _: taught), 0.5)
    found = term(network(), inputs(2), answered, torch.tensor([False, True]))
    assert found.item() == pytest.approx(0.5 * 4.0 / 2)


@pytest.mark.parametrize("name", ["lwf on old", "der"])
def test_without_rehearsed_samples_nothing_is_asked(name: str) -> None:
    """The term is zero and trains nothing."""
    model, x = network(seed=1), inputs(4)
    term = penalties(network())[name](model, x, model(x), torch.zeros(4, dtype=torch.bool))
    assert term.item() == 0.0


def test_the_champion_answers_a_batch_once() -> None:
    """Penalties that share a teacher share its pass; it has no gradient, and dropout is off."""
    seen: list[Tensor] = []

    class Champion(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x)
            return super().forward(x)  # type: ignore[no-any-return]

    champion = Champion(*network()).train()
    teacher, model, is_old = Teacher(champion), network(seed=1), torch.ones(4, dtype=torch.bool)
    for x in (inputs(4), inputs(4, seed=2)):
        for term in (Distillation(teacher, 1.0), DarkExperience(teacher, 1.0)):
            assert term(model, x, model(x), is_old).requires_grad
        torch.testing.assert_close(teacher(x), copy.deepcopy(champion).eval()(x))
    assert not teacher(x).requires_grad
    assert champion.training
    assert len(seen) == 4  # one a batch, one of the comparison each


def test_a_teacher_does_not_learn_from_its_pupil() -> None:
    """It keeps the champion as it was, although the champion itself is trained on."""
    champion, x = network().eval(), inputs(3)
    teacher = Teacher(champion)
    before = champion(x).detach()
    with torch.no_grad():
        champion[3].weight.zero_()
    torch.testing.assert_close(teacher(x), before)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EWC({}, {}, -1.0), "ewc must not be negative"),
        (lambda: Distillation(Teacher(network()), -1.0), "distillation must not be negative"),
        (lambda: Distillation(Teacher(network()), 1.0, temperature=0.0), "temperature must be"),
        (lambda: DarkExperience(Teacher(network()), -1.0), "dark_experience must not be negative"),
        (lambda: soft_targets(torch.tensor([0]), 2, smoothing=1.0), "label_smoothing must be"),
    ],
)
def test_strengths_outside_their_range_are_named(make: Callable[[], object], message: str) -> None:
    """Each is refused by its name."""
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("weights", [None, torch.tensor([0.2, 1.0, 3.0])])
def test_hard_shares_are_labels(weights: Tensor | None) -> None:
    """With targets of 0 and 1, it is PyTorch's cross-entropy of the labels, weighted alike."""
    logits, labels = inputs(6)[:, :3], torch.tensor([0, 1, 2, 2, 1, 0])
    torch.testing.assert_close(
        soft_cross_entropy(logits, soft_targets(labels, 3), weights),
        functional.cross_entropy(logits, labels, weights),
    )


def test_smoothing_is_that_of_pytorch() -> None:
    """And it is least where the network is as sure as the targets, not surer."""
    logits, labels = inputs(6)[:, :3], torch.tensor([0, 1, 2, 2, 1, 0])
    targets = soft_targets(labels, 3, smoothing=0.3)
    torch.testing.assert_close(
        soft_cross_entropy(logits, targets),
        functional.cross_entropy(logits, labels, label_smoothing=0.3),
    )
    at_target, surer = targets.log(), 30 * soft_targets(labels, 3)
    assert soft_cross_entropy(at_target, targets) < soft_cross_entropy(surer, targets)


def test_mixed_targets_mix_the_losses() -> None:
    """A target that is .3 of one class and .7 of another costs .3 and .7 of theirs."""
    logits = inputs(1)[:, :3]
    one, other = (functional.cross_entropy(logits, torch.tensor([c])) for c in (0, 2))
    found = soft_cross_entropy(logits, torch.tensor([[0.3, 0.0, 0.7]]))
    torch.testing.assert_close(found, 0.3 * one + 0.7 * other)


def test_a_doubted_sample_counts_less() -> None:
    """With a weight of 0 it is left out; when all are, nothing is learned."""
    logits, labels = inputs(4)[:, :3].requires_grad_(), torch.tensor([0, 1, 2, 0])
    targets = soft_targets(labels, 3)
    kept = soft_cross_entropy(logits, targets, None, torch.tensor([1.0, 1.0, 1.0, 0.0]))
    torch.testing.assert_close(kept, functional.cross_entropy(logits[:3], labels[:3]))
    none = soft_cross_entropy(logits, targets, None, torch.zeros(4))
    none.backward()
    assert none.item() == 0.0
    assert not logits.grad.any()
