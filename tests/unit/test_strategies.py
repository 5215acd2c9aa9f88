"""What may move: every stage of every kind of network, and what each strategy does to the bits."""

import re

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from sft.cache import Tail
from sft.models import HEAD_NAME, IMAGENET_MEAN, IMAGENET_STD, ModelConfig, Network, build
from sft.pictures import Preprocessing
from sft.strategies import (
    Phase,
    StrategySettings,
    activations,
    apply,
    boundary,
    check_momentum,
    correct_momentum,
    epochs_of,
    parameter_groups,
    phases,
    stages,
    training_mode,
)

CLASSES = ("a", "b", "c")
STEM = {"body.conv1.weight", "body.bn1.weight", "body.bn1.bias"}
HEAD = {"body.fc.weight", "body.fc.bias"}


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.bn(self.conv(x)).relu()) + x.mean(1, keepdim=True)


class Body(nn.Module):
    """A residual network in small: a stem, three blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.block1, self.block2, self.block3 = Block(4, 6), Block(6, 6), Block(6, 8)
        self.dropout = nn.Dropout(0.2)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block3(self.block2(self.block1(self.relu(self.bn1(self.conv1(x))))))
        return self.fc(self.dropout(x.mean((2, 3))))


def configuration(architecture: str, size: int = 32) -> ModelConfig:
    return ModelConfig(architecture, CLASSES, Preprocessing(size), IMAGENET_MEAN, IMAGENET_STD)


@pytest.fixture
def network() -> Network:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Network(configuration("tests:body", 8), Body())


def pictures(n: int = 12, size: int = 8, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=generator)


def block(number: int) -> set[str]:
    return {f"body.block{number}.{name}" for name in ("conv.weight", "bn.weight", "bn.bias")}


def moved_by(network: Network, phase: Phase, *, freeze_batch_norm: bool = True) -> set[str]:
    """Make two steps as the loop does, and name what changed."""
    before = {name: value.clone() for name, value in network.state_dict().items()}
    apply(network, phase)
    training_mode(network, phase, freeze_batch_norm=freeze_batch_norm)
    optimiser = torch.optim.AdamW(
        parameter_groups(network, phase, learning_rate=0.1), weight_decay=0.1
    )
    for seed in range(2):
        loss = functional.cross_entropy(network(pictures(seed=seed)), torch.arange(12) % 3)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return {name for name, value in network.state_dict().items() if not value.equal(before[name])}


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("small_cnn", ["0", "3", "8", "10"]),
        ("mlp", ["1", "3", "5"]),
        ("resnet18", ["conv1", "layer1", "layer2", "layer3", "layer4", "fc"]),
        ("shufflenet_v2_x0_5", ["conv1", "stage2", "stage3", "stage4", "conv5", "fc"]),
        ("mobilenet_v3_small", [*(f"features.{i}" for i in range(13)), "classifier.0",
                                "classifier.3"]),
        ("squeezenet1_1", [*(f"features.{i}" for i in (0, 3, 4, 6, 7, 9, 10, 11, 12)),
                           "classifier.1"]),
        ("alexnet", [*(f"features.{i}" for i in (0, 3, 6, 8, 10)), "classifier.1", "classifier.4",
                     "classifier.6"]),
        ("vit_b_32", ["conv_proj", *(f"encoder.layers.encoder_layer_{i}" for i in range(12)),
                      "heads.head"]),
        ("swin_t", [*(f"features.{i}" for i in range(8)), "head"]),
        ("convnext_tiny", [*(f"features.{i}" for i in range(8)), "classifier.2"]),
    ],
)  # fmt: skip
def test_stages_of_an_architecture(architecture: str, expected: list[str]) -> None:
    """They open with layers and blocks, hold each parameter once, and the head alone is the last.

    Norms join the stage before them: a ViT's last one is its last layer's, class token its stem's.
    """
    with torch.device("meta"):
        network = build(configuration(architecture, 64))
    found = stages(network)
    assert [stage.name for stage in found] == expected
    names = [name for stage in found for name in stage.parameters]
    assert sorted(names) == sorted(name for name, _ in network.named_parameters())
    head = {id(value) for value in network.head.parameters()}
    assert {id(dict(network.named_parameters())[n]) for n in found[-1].parameters} == head


@pytest.mark.parametrize(
    ("order", "trunk"),
    [
        ("trunk fc norm", "trunk norm"),
        ("trunk fc drop norm", "trunk drop norm"),
        ("fc norm trunk", "norm trunk"),
        ("norm fc trunk", "norm trunk"),
        ("trunk norm drop fc", "trunk norm"),
    ],
)
def test_the_head_stands_alone_wherever_it_was_registered(order: str, trunk: str) -> None:
    """A norm that a network registers after its head runs before it, and is none of it."""
    layers = {"fc": nn.Linear(4, 3), "trunk": nn.Linear(4, 4), "drop": nn.Dropout()}
    body = nn.Module()
    for name in order.split():
        body.add_module(name, layers.get(name, nn.LayerNorm(4)))
    setattr(body, HEAD_NAME, "fc")
    first, last = stages(Network(configuration("tests:body", 8), body))
    assert last.parameters == HEAD
    assert first.modules == tuple(f"body.{name}" for name in trunk.split())


def test_what_follows_the_head_in_a_sequential_stays_with_it() -> None:
    """There it runs after the head: a convolution's norm, activation and pooling."""
    layers = [nn.Conv2d(3, 4, 1), nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1)]
    last = stages(Network(configuration("tests:body", 8), nn.Sequential(*layers, nn.Flatten())))[-1]
    assert last.modules == ("body.1", "body.2", "body.3", "body.4")


def test_a_body_within_a_body_is_opened() -> None:
    """A user's own wrapper around a network does not hide its stages, and no block is cut."""

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = Body()

    wrapped = Network(configuration("tests:wrapped"), Wrapper())
    assert [stage.name for stage in stages(wrapped)] == [
        f"model.{name}" for name in ("conv1", "block1", "block2", "block3", "fc")
    ]


NORMS = {
    f"body.{layer}.{name}"
    for layer in ("bn1", "block1.bn", "block2.bn", "block3.bn")
    for name in ("weight", "bias")
}
BLOCKS = block(1) | block(2) | block(3)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (StrategySettings(), [STEM | BLOCKS | HEAD]),
        (StrategySettings("head"), [HEAD]),
        (StrategySettings("two_stage"), [HEAD, STEM | BLOCKS | HEAD]),
        (StrategySettings("two_stage", freeze_first=3), [HEAD, block(3) | HEAD]),
        (StrategySettings("batch_norm"), [NORMS]),
        (StrategySettings("surgical", surgical_first=1), [STEM]),
        (StrategySettings("surgical"), [STEM | block(1)]),
        (StrategySettings(freeze_first=1), [BLOCKS | HEAD]),
        (StrategySettings(freeze_first=4), [HEAD]),
        (StrategySettings(train_last=1), [block(3) | HEAD]),
        (StrategySettings(train_last=4), [STEM | BLOCKS | HEAD]),
    ],
)
def test_what_a_strategy_moves(
    network: Network, settings: StrategySettings, expected: list[set[str]]
) -> None:
    """Two steps of each phase change these tensors and no others; statistics stay frozen."""
    plan = phases(network, settings)
    assert [moved_by(network, phase) for phase in plan] == expected


def test_statistics_move_with_the_layer_they_belong_to(network: Network) -> None:
    """Left free, only batch norms whose own parameters move follow the pictures."""
    (phase,) = phases(network, StrategySettings(train_last=2))
    moved = moved_by(network, phase, freeze_batch_norm=False)
    assert {name for name in moved if "running" in name} == {
        f"body.block{i}.bn.running_{what}" for i in (2, 3) for what in ("mean", "var")
    }


def test_a_new_head_moves_in_every_strategy(network: Network) -> None:
    """Classes that the champion did not have can be learned by a surgical tuning too."""
    for strategy, rest in (("surgical", STEM | block(1)), ("batch_norm", NORMS)):
        (phase,) = phases(network, StrategySettings(strategy), new_head=True)
        assert phase.trainable == rest | HEAD


def test_what_was_frozen_before_stays(network: Network) -> None:
    """A parameter that requires no gradient at the start is in no phase."""
    network.body.block2.requires_grad_(False)
    (phase,) = phases(network, StrategySettings())
    assert phase.trainable == STEM | block(1) | block(3) | HEAD
    apply(network, phase)
    assert {name for name, value in network.named_parameters() if value.requires_grad} == (
        phase.trainable
    )


def test_what_cannot_move_is_said(network: Network) -> None:
    """Too many stages, no batch norm, nothing that requires a gradient."""
    with pytest.raises(ValueError, match=r"train_last = 5, .* 4 stages .*: conv1, block1, block2"):
        phases(network, StrategySettings(train_last=5))
    with pytest.raises(ValueError, match="small_cnn has no batch-norm layer; take another"):
        phases(build(configuration("small_cnn")), StrategySettings("batch_norm"))
    network.head.requires_grad_(False)
    with pytest.raises(ValueError, match="head would move nothing: none of the parameters"):
        phases(network, StrategySettings("head"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"strategy": "last"}, "strategy must be one of full, head, two_stage, .* got 'last'"),
        ({"freeze_first": -1}, "freeze_first must not be negative"),
        ({"surgical_first": 0}, "surgical_first must be at least 1"),
        ({"head_share": 1.0}, "head_share must lie between 0 and 1"),
        ({"backbone_rate": 0.0}, "backbone_rate must be above 0 and at most 1, got 0.0"),
        ({"second_rate": 2.0}, "second_rate must be above 0 and at most 1"),
        ({"freeze_first": 1, "train_last": 1}, "say the same in two ways"),
        ({"strategy": "head", "train_last": 1}, "limit the strategies full and two_stage"),
    ],
)
def test_settings_outside_their_range_are_named(changed: dict[str, object], message: str) -> None:
    """Each is refused by its name."""
    with pytest.raises(ValueError, match=message):
        StrategySettings(**changed)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("shares", "epochs", "expected"),
    [
        ([1.0], 7, (7,)),
        ([0.3, 0.7], 10, (3, 7)),
        ([0.3, 0.7], 2, (1, 1)),
        ([0.01, 0.99], 10, (1, 9)),
        ([0.99, 0.01], 10, (9, 1)),
    ],
)
def test_each_phase_gets_its_share_of_the_epochs(
    shares: list[float], epochs: int, expected: tuple[int, ...]
) -> None:
    """At least one each, and all of them together."""
    plan = [Phase(str(place), frozenset(), share=share) for place, share in enumerate(shares)]
    assert epochs_of(plan, epochs) == expected


def test_too_few_epochs_for_the_phases(network: Network) -> None:
    """They are named."""
    plan = phases(network, StrategySettings("two_stage"))
    with pytest.raises(ValueError, match=r"2 phases \(head, everything\) .* epochs is 1"):
        epochs_of(plan, 1)


def test_the_backbone_learns_slower_than_the_head(network: Network) -> None:
    """Rates multiply: the phase's, and the backbone's for all but the head."""
    second = phases(network, StrategySettings("two_stage", second_rate=0.1))[1]
    head, rest = parameter_groups(network, second, learning_rate=0.5, backbone_rate=0.2)
    assert head["lr"] == pytest.approx(0.05)
    assert rest["lr"] == pytest.approx(0.01)
    assert {id(p) for p in head["params"]} == {id(p) for p in network.head.parameters()}
    assert len(head["params"]) + len(rest["params"]) == len(list(network.parameters()))


def test_no_empty_group_is_made(network: Network) -> None:
    """With the head alone, or without it, there is one group."""
    for strategy in ("head", "surgical"):
        (phase,) = phases(network, StrategySettings(strategy))
        assert len(parameter_groups(network, phase, learning_rate=1.0)) == 1


def test_the_frozen_part_answers_the_same_in_every_epoch(network: Network) -> None:
    """Its dropout is off and its statistics stay, while the dropout before the head is on."""
    (phase,) = phases(network, StrategySettings(train_last=1))
    apply(network, phase)
    training_mode(network, phase, freeze_batch_norm=False)
    at = boundary(network, phase)
    assert at == "body.block3"
    seen: list[Tensor] = []
    hook = network.get_submodule(at).register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    for _ in range(2):
        network(pictures())
    hook.remove()
    assert seen[0].equal(seen[1])
    assert network.body.dropout.training
    assert network.body.block3.drop.training
    assert not network.body.block2.drop.training


@pytest.mark.parametrize("architecture", ["small_cnn", "squeezenet1_1", "shufflenet_v2_x0_5"])
def test_cached_activations_stand_for_the_frozen_part(architecture: str) -> None:
    """From every boundary on, logits are those of a whole pass, however deep the cut."""
    network = build(configuration(architecture)).eval()
    pixels = pictures(2, 32)
    with torch.inference_mode():
        expected = network(pixels)
    *trunk, _ = stages(network)
    for count in range(1, len(trunk) + 1):
        (phase,) = phases(network, StrategySettings(freeze_first=count))
        at = boundary(network, phase)
        assert at is not None
        cached = activations(network, at, pixels)
        assert not cached.requires_grad
        with torch.inference_mode():
            torch.testing.assert_close(Tail(network, at)(cached), expected, rtol=1e-4, atol=1e-4)


def test_training_from_the_cache_has_the_gradients_of_a_whole_pass(network: Network) -> None:
    """What moves is told the same, and the mode in which it trains is kept."""
    (phase,) = phases(network, StrategySettings(train_last=2))
    apply(network, phase)
    network.body.block2.drop.p = network.body.block3.drop.p = network.body.dropout.p = 0.0
    training_mode(network, phase)
    network(pictures()).square().sum().backward()
    expected = {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}
    network.zero_grad()
    at = boundary(network, phase)
    assert at is not None
    cached = activations(network, at, pictures())
    assert network.body.block3.training
    Tail(network, at)(cached).square().sum().backward()
    found = {n: p.grad for n, p in network.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys() == phase.trainable
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)


def test_there_is_nothing_to_cache_before_the_first_stage(network: Network) -> None:
    """When the stem moves there is no boundary; for the head it is its dropout's input."""
    for strategy, expected in (("full", None), ("surgical", None), ("head", "body.dropout")):
        (phase,) = phases(network, StrategySettings(strategy))
        assert boundary(network, phase) == expected


def test_a_module_that_runs_twice_is_no_boundary() -> None:
    """A cut that would not hold is refused."""
    shared = nn.Conv2d(3, 3, 1)
    body = nn.Sequential(shared, nn.ReLU(), shared, nn.Flatten(), nn.Linear(3 * 64, 3))
    with pytest.raises(ValueError, match=r"body\.0 runs 2 times in a pass"):
        activations(Network(configuration("tests:twice", 8), body), "body.0", pictures())


def norms(momentum: float | None, layers: int = 3) -> nn.Sequential:
    return nn.Sequential(*(nn.BatchNorm1d(2, momentum=momentum) for _ in range(layers)))


@pytest.mark.parametrize(
    ("momentum", "steps", "expected"),
    [
        (0.01, 60, 0.1),  # .55 would be left
        (0.0003, 1000, 0.1),
        (0.1, 60, None),
        (0.01, 400, None),
        (0.1, 10, 1 - 0.05**0.1),  # the usual is too slow for ten steps
    ],
)
def test_a_momentum_that_cannot_follow_is_corrected(
    momentum: float, steps: int, expected: float | None
) -> None:
    """Only a layer that would keep over 5 % of its old statistics gets another momentum."""
    network = norms(momentum)
    slow = check_momentum(network, steps)
    words = correct_momentum(network, steps)
    assert slow == ([] if expected is None else ["0", "1", "2"])
    assert bool(words) == (expected is not None)
    assert [layer.momentum for layer in network] == [pytest.approx(expected or momentum)] * 3
    assert check_momentum(network, steps) == []


def test_the_correction_lets_statistics_arrive() -> None:
    """After 30 steps in another world the mean is there; with the shipped momentum it is not."""
    worlds = [torch.randn(64, 2, generator=torch.Generator().manual_seed(s)) + 5 for s in range(30)]
    shipped, corrected = norms(0.01, 1), norms(0.01, 1)
    correct_momentum(corrected, len(worlds))
    for world in worlds:
        shipped(world)
        corrected(world)
    assert shipped[0].running_mean.mean() < 2
    assert corrected[0].running_mean.mean() > 4.5


def test_words_of_the_correction() -> None:
    """The log says how many, what they had, what it would have left, and what they have now."""
    words = correct_momentum(norms(0.01), 60)
    assert words == (
        "3 batch-norm layers had a momentum of 0.01, which after 60 steps would leave 55% of the"
        " old statistics: set to 0.1"
    )


def test_a_mean_over_all_steps_ever_cannot_follow() -> None:
    """Without a momentum, the many steps of the first training outweigh a short tuning."""
    network = norms(None, 1)
    assert check_momentum(network, 60) == []
    network[0].num_batches_tracked.fill_(100_000)
    assert check_momentum(network, 60) == ["0"]
    assert re.search("momentum of None", correct_momentum(network, 60))


def test_frozen_statistics_have_nothing_to_follow() -> None:
    """A layer in evaluation mode is left as it is."""
    assert correct_momentum(norms(0.01).eval(), 10) == ""
