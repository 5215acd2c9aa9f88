"""The fastest way of a pass: it answers alike, it is measured once, and it can always be left."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

from sft.cache import ActivationCache
from sft.dataset import LabelledPictures
from sft.folding import FoldingError, PackedConvolution, folded, packed
from sft.models import ModelConfig, Network, build
from sft.pictures import Preprocessing
from sft.speed import (
    TOLERANCE,
    ComputeSettings,
    Kind,
    Precision,
    Way,
    dropout,
    faster_dropout,
    fastest_way,
    frozen_pass,
    race,
    trains_in_half,
)
from sft.strategies import Strategy, activations, stages
from sft.train import TrainingSettings, fine_tune

CLASSES = ("a", "b", "c")
SIDE = 16
AUTO = Precision.AUTO


class Block(nn.Module):
    """A residual block whose sum, as in ResNet, waits for the shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, 2 * width, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(2 * width)
        self.short = nn.Sequential(nn.Conv2d(width, 2 * width, 1), nn.BatchNorm2d(2 * width))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, given: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(given)))))
        out += self.short(given)
        return self.relu(out)


class Branching(nn.Module):
    """A layer whose path depends on its input, so that no graph can hold it."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 8, 3)

    def forward(self, given: Tensor) -> Tensor:
        seen = self.one(given)
        return seen if seen.isfinite().all() else -seen


class Pretending(nn.Module):
    """A layer that is another one while it is traced."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 8, 3)

    def forward(self, given: Tensor) -> Tensor:
        return self.one(given) * (2 if isinstance(given, fx.Proxy) else 1)


def network(*first: nn.Module, seed: int = 0) -> Network:
    """Make a small residual network whose batch norms know other statistics than 0 and 1."""
    torch.manual_seed(seed)
    layers = first or (nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.Hardswish())
    body = nn.Sequential(
        *layers, Block(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(16, 3)
    )
    for layer in body.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.running_mean)
            nn.init.uniform_(layer.running_var, 0.5, 2.0)
            nn.init.uniform_(layer.weight, 0.5, 2.0)
    seen = Preprocessing(SIDE)
    return Network(ModelConfig("tests:net", CLASSES, seen, (0.4,) * 3, (0.3,) * 3), body).eval()


def pictures(n: int = 24, seed: int = 0) -> LabelledPictures:
    """Make noise whose brightness tells the class."""
    labels = torch.arange(n) % 3
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(0, 60, (n, 3, SIDE, SIDE), generator=generator)
    pixels = (noise + labels.view(-1, 1, 1, 1) * 80).to(torch.uint8)
    return LabelledPictures(tuple(f"{seed}/{i}" for i in range(n)), pixels, labels)


def head(of: Network) -> str:
    return stages(of)[-1].modules[0]


def here(tmp_path: Path, precision: Precision = Precision.FLOAT32) -> ComputeSettings:
    return ComputeSettings(precision=precision, findings=str(tmp_path))


@pytest.mark.parametrize("kind", list(Kind))
@pytest.mark.parametrize("precision", [Precision.FLOAT32, Precision.BFLOAT16])
def test_every_way_answers_as_the_network_does(kind: Kind, precision: Precision) -> None:
    """Folded, packed, in either order and precision, within the tolerance that is stated."""
    of, pixels = network(), pictures().pixels
    run = frozen_pass(of, head(of), Way(kind, precision))
    assert run is not None
    exact, answered = activations(of, head(of), pixels), run(pixels)
    assert answered.dtype == getattr(torch, precision)
    assert (answered.float() - exact).norm() <= TOLERANCE[precision] * exact.norm()
    assert precision == "float32" or not torch.equal(answered.float(), exact)


@pytest.mark.parametrize("name", ["shufflenet_v2_x0_5", "mobilenet_v3_small", "squeezenet1_1"])
def test_torchvision_networks_are_packed(name: str) -> None:
    """Shuffled channels, squeeze-and-excitation, depthwise: every convolution, and alike."""
    config = ModelConfig(name, CLASSES, Preprocessing(32), (0.4,) * 3, (0.3,) * 3)
    of = build(config).eval()
    assert frozen_pass(of, head(of), Way(Kind.PACKED)) is not None
    graph = packed(of.body, head(of).removeprefix("body."), torch.float32)
    kinds = [type(layer) for layer in graph.modules()]
    assert PackedConvolution in kinds
    assert not {nn.Conv2d, nn.BatchNorm2d}.intersection(kinds)


def test_residual_block_is_one_call_a_convolution() -> None:
    """Of the block's norms, sum and activations nothing is left but three convolutions."""
    of = network()
    graph = packed(of.body, "4", torch.float32).graph
    calls = [node for node in graph.nodes if node.op not in {"placeholder", "output"}]
    assert [node.target for node in calls] == ["0", "3.conv1", "3.conv2", "3.short.0"]


def test_nothing_behind_the_boundary_runs() -> None:
    """A graph ends where the frozen part does."""
    graph = folded(network().body, "3")
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["0", "2"]


def test_the_network_stays_as_it_is() -> None:
    """Folding works on a copy."""
    of = network()
    before = {name: value.clone() for name, value in of.state_dict().items()}
    frozen_pass(of, head(of), Way(Kind.PACKED, Precision.BFLOAT16))
    assert all(torch.equal(value, before[name]) for name, value in of.state_dict().items())


def test_a_network_that_cannot_be_folded_still_works(tmp_path: Path) -> None:
    """It runs as it is, and the cache gives what it answers."""
    of, data = network(Branching()), pictures()
    with pytest.raises(FoldingError, match="cannot be traced"):
        folded(of.body, "3")
    assert frozen_pass(of, head(of), Way(Kind.PACKED)) is None
    assert fastest_way(of, head(of), here(tmp_path)).kind is Kind.PLAIN
    cached = ActivationCache(compute=here(tmp_path)).get(of, head(of), data)
    torch.testing.assert_close(cached, activations(of, head(of), data.pixels))


def test_a_way_that_answers_otherwise_is_not_taken() -> None:
    """A pass is compared with the network before it is used."""
    of = network(Pretending())
    assert frozen_pass(of, head(of), Way(Kind.FOLDED)) is None
    assert frozen_pass(of, head(of), Way(Kind.PLAIN)) is not None


def test_a_measurement_is_made_once(tmp_path: Path) -> None:
    """Another process reads it, and does not run the network; another size is measured anew."""
    of = network()
    seen: list[int] = []
    of.body[0].register_forward_hook(lambda *_: seen.append(1))
    way = fastest_way(of, head(of), here(tmp_path))
    (path,) = tmp_path.iterdir()
    found = json.loads(path.read_text())
    assert found["kind"] == way.kind
    path.write_text(json.dumps({**found, "kind": "contiguous", "batch_size": 3}))
    measured = len(seen)
    assert measured
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sft.speed._FOUND", {})  # as in another process
        assert fastest_way(of, head(of), here(tmp_path)) == Way(Kind.CONTIGUOUS, batch_size=3)
    assert fastest_way(of, head(of), here(tmp_path)) == way
    assert len(seen) == measured
    other = Network(replace(of.config, preprocessing=Preprocessing(12)), of.body)
    fastest_way(other, head(of), here(tmp_path))
    assert len(list(tmp_path.iterdir())) == 2


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    """What was found then holds for the process."""
    (tmp_path / "file").touch()
    settings = here(tmp_path / "file" / "within")
    of = network(seed=3)
    assert fastest_way(of, "body.3", settings) == fastest_way(of, "body.3", settings)


@pytest.mark.parametrize("precision", list(Precision))
def test_only_the_precision_asked_for_is_taken(tmp_path: Path, precision: Precision) -> None:
    """Float32 unless told otherwise; "auto" may take either."""
    of = network()
    way = fastest_way(of, head(of), here(tmp_path, precision))
    assert precision is AUTO or way.precision == precision
    assert precision is AUTO or trains_in_half(
        of, pictures().pixels, here(tmp_path, precision)
    ) == (precision == "bfloat16")


def test_the_cache_runs_full_batches(tmp_path: Path) -> None:
    """A picture has the same bits whatever came before it, with it and after it."""
    of, data = network(), pictures(10)
    compute = here(tmp_path, Precision.BFLOAT16)
    whole = ActivationCache(compute=compute).get(of, head(of), data)
    assert whole.dtype == torch.bfloat16
    piecewise = ActivationCache(compute=compute)
    for places in ([3], [9, 4, 3], range(10)):
        piecewise.get(of, head(of), data.take(places))
    assert torch.equal(piecewise.get(of, head(of), data), whole)


def test_a_measured_step_leaves_the_network_alone(tmp_path: Path) -> None:
    """Weights, statistics, gradients and the global generator are as before."""
    of = network().train()
    before = {name: value.clone() for name, value in of.state_dict().items()}
    state = torch.get_rng_state()
    trains_in_half(of, pictures().pixels, here(tmp_path, AUTO))
    assert all(torch.equal(value, before[name]) for name, value in of.state_dict().items())
    assert all(value.grad is None for value in of.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_the_slow_are_left_behind() -> None:
    """What is far behind after the first round runs no second time."""
    runs = {"quick": 0, "slow": 0}

    def call(name: str, size: int) -> None:
        runs[name] += 1
        torch.randn(size, size).matrix_power(3)

    seconds = race({"quick": lambda: call("quick", 8), "slow": lambda: call("slow", 500)})
    assert seconds["quick"] < seconds["slow"]
    assert runs == {"quick": 3, "slow": 1}


@pytest.mark.parametrize("strategy", [Strategy.HEAD, Strategy.FULL])
@pytest.mark.parametrize("precision", [Precision.FLOAT32, Precision.BFLOAT16])
def test_the_seed_decides_every_bit(
    tmp_path: Path, strategy: Strategy, precision: Precision
) -> None:
    """With the cache, dropout and bfloat16 too; and something is learned."""
    start, data = network(), pictures()
    settings = TrainingSettings(epochs=8, batch_size=8, strategy=strategy, learning_rate=0.01)
    compute = here(tmp_path, precision)
    one, other = (
        fine_tune(start, data, settings, cache=ActivationCache(compute=compute), compute=compute)
        for _ in range(2)
    )
    first, second = one.network.state_dict(), other.network.state_dict()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert all(value.dtype != torch.bfloat16 for value in first.values())
    assert one.epochs[-1].train_loss < one.epochs[0].train_loss


@pytest.mark.parametrize("p", [0.0, 0.25, 0.5, 1.0])
def test_dropout_drops_its_share_and_keeps_the_mean(p: float) -> None:
    """In any order of the axes; what is kept is scaled up alike."""
    inputs = torch.ones(9, 30, 20, 20).contiguous(memory_format=torch.channels_last)
    dropped = dropout(inputs, p)
    assert (dropped == 0).float().mean() == pytest.approx(p, abs=0.01)
    assert dropped.unique().numel() == (1 if p in {0.0, 1.0} else 2)
    assert p == 1.0 or dropped.mean() == pytest.approx(1.0, abs=0.01)


def test_dropout_layers_are_as_before_afterwards() -> None:
    """Within, they drop in training and not in evaluation; afterwards PyTorch's own runs."""
    layer, ones = nn.Dropout(0.5), torch.ones(1000)
    with faster_dropout(layer):
        assert torch.equal(layer.eval()(ones), ones)
        torch.manual_seed(0)
        quick = layer.train()(ones)
    torch.manual_seed(0)
    assert not torch.equal(layer(ones), quick)
    assert "forward" not in vars(layer)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("precision", "float16", "precision must be one of float32, bfloat16, auto"),
        ("device", "tpu", "device must be one of auto, cpu, cuda"),
        ("threads", -1, "threads must not be negative"),
    ],
)
def test_settings_outside_their_range_are_named(name: str, value: object, message: str) -> None:
    """Each says which key, and what is allowed."""
    with pytest.raises(ValueError, match=message):
        ComputeSettings(**{name: value})
