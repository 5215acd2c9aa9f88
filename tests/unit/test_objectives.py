"""Losses by hand."""

import pytest
import torch
from torch import nn

from sft.objectives import L2SP, class_weights


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
