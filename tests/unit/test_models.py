"""Networks: every architecture gets a head, weights come and go unchanged, and nothing is run."""

import copy
import gc
import hashlib
import json
import pickle
import sys
import types
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.modules import activation
from torchvision.models import WeightsEnum

from sft import models
from sft.cache import ActivationCache
from sft.dataset import LabelledPictures
from sft.models import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    ModelConfig,
    ModelError,
    Network,
    build,
    load,
    read_config,
    read_state_dict,
    require_known,
    save,
    widen,
)
from sft.pictures import Preprocessing
from sft.strategies import Strategy, stages
from sft.train import TrainingSettings, fine_tune

TORCHVISION = torchvision.models.list_models(module=torchvision.models)
IMAGENET_WEIGHTS = (
    Path(__file__).parents[3] / "shared/data/weights/squeezenet1_1-imagenet.safetensors"
)
FACTORY = "factories_of_a_test:make"


def configuration(architecture: str, *classes: str, size: int = 32) -> ModelConfig:
    classes = classes or ("cat", "dog", "eel")
    return ModelConfig(architecture, classes, Preprocessing(size), IMAGENET_MEAN, IMAGENET_STD)


def pictures(n: int = 3, size: int = 32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=generator)


def logits(network: Network, size: int = 32) -> Tensor:
    with torch.inference_mode():
        return network.eval()(pictures(size=size))


@pytest.fixture(scope="module")
def few_collections() -> Iterator[None]:
    """Keep the garbage collector from what was imported; networks are many small objects."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def shapes_only(monkeypatch: pytest.MonkeyPatch, few_collections: None) -> None:  # noqa: ARG001
    """Leave weights without numbers: eighty networks are built for the shapes of their layers."""

    def leave(*given: Tensor, **named: Tensor) -> Tensor:
        return given[0] if given else named["tensor"]

    for name in dir(nn.init):
        if name.endswith("_") and not name.startswith("_"):
            monkeypatch.setattr(nn.init, name, leave)
            if hasattr(activation, name):
                monkeypatch.setattr(activation, name, leave)


@pytest.mark.filterwarnings("ignore:The default weight initialization")
@pytest.mark.parametrize("architecture", TORCHVISION)
@pytest.mark.usefixtures("shapes_only")
def test_every_torchvision_classifier_gets_a_head(architecture: str) -> None:
    """Each has one output a class, and a replaced head changes the shapes of nothing else."""
    config = configuration(architecture, *"abcdefg", size=224)
    network = models._built(config, None, (), keep_head=False, seed=0)  # without a trial picture
    before = {name: value.shape for name, value in network.body.state_dict().items()}
    head = network.head
    assert head.weight.shape[0] == 7
    name = next(name for name, module in network.body.named_modules() if module is head)
    models._with_outputs(network.body, 5, anew=True)
    after = {name: value.shape for name, value in network.body.state_dict().items()}
    assert network.head is not head
    assert {key for key in before if before[key] != after[key]} <= {
        f"{name}.weight",
        f"{name}.bias",
    }
    assert after[f"{name}.weight"] == (5, *head.weight.shape[1:])
    assert before.keys() == after.keys()
    assert not any("aux" in key.lower() for key in after)


@pytest.mark.parametrize(
    ("architecture", "size", "width"),
    [
        ("small_cnn", 28, 128),
        ("mlp", 20, 128),
        ("squeezenet1_1", 32, 512),
        ("resnet18", 32, 512),
        ("mobilenet_v3_small", 32, 1024),
    ],
)
def test_one_pass_gives_embeddings_and_probabilities(
    architecture: str, size: int, width: int
) -> None:
    """Embeddings are as wide as the head's input; probabilities are the softmax of the logits."""
    network = build(configuration(architecture, size=size))
    embedding, probabilities = network.embed(pictures(size=size))
    assert embedding.shape == (3, width)
    assert network.training  # as it was before
    torch.testing.assert_close(probabilities, logits(network, size).softmax(1))
    head = network.head
    if isinstance(head, nn.Linear):  # SqueezeNet has a ReLU between its head and the average
        with torch.inference_mode():
            torch.testing.assert_close(head(embedding).softmax(1), probabilities)


@pytest.mark.filterwarnings("ignore:The default weight initialization")
@pytest.mark.parametrize(("architecture", "width"), [("googlenet", 1024), ("inception_v3", 2048)])
@pytest.mark.usefixtures("shapes_only")
def test_auxiliary_heads_are_taken_off(architecture: str, width: int) -> None:
    """In training mode too, the network answers with one tensor of logits."""
    with torch.device("meta"):
        network = build(configuration(architecture, "a", "b", size=75)).train()
        embedding, logits = network.features(torch.zeros(2, 3, 75, 75, dtype=torch.uint8))
    assert logits.shape == (2, 2)
    assert embedding.shape == (2, width)
    assert network.body.aux_logits is False


@pytest.mark.usefixtures("shapes_only")
@pytest.mark.filterwarnings("ignore:The default weight initialization")
def test_what_a_state_dict_does_not_hold_survives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network that normalises its input because torchvision fetched it still does when loaded."""
    published = torchvision.models.get_model("googlenet", weights=None)
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda *_, **__: published.state_dict())
    network = build(configuration("googlenet"), weights="DEFAULT")
    assert network.body.transform_input is True
    save(network, tmp_path)
    assert load(tmp_path).body.transform_input is True


def test_a_transformer_is_built_for_the_pictures_it_gets() -> None:
    """Another picture size than 224 builds, and one that its patches do not fit is refused."""
    with torch.device("meta"):
        body = build(configuration("vit_b_32", size=96)).body
    assert body.encoder.pos_embedding.shape == (1, 10, 768)
    with torch.device("meta"), pytest.raises(ModelError, match=r"vit_b_32 .* 100 pixels.*patch"):
        build(configuration("vit_b_32", size=100))
    with pytest.raises(ModelError, match=r"maxvit_t cannot be built for pictures of 100 pixels"):
        build(configuration("maxvit_t", size=100))


@pytest.mark.parametrize(("architecture", "least"), [("squeezenet1_1", 17), ("small_cnn", 4)])
def test_pictures_that_are_too_small_are_refused(architecture: str, least: int) -> None:
    """The message names the least size, which builds and answers; a pixel less does not."""
    with pytest.raises(ModelError, match=rf"{architecture} takes .* at least {least} pixels, but"):
        build(configuration(architecture, size=2))
    with pytest.raises(ModelError, match=f"image_size is {least - 1}: set image_size = {least}"):
        build(configuration(architecture, size=least - 1))
    assert logits(build(configuration(architecture, size=least)), least).shape == (3, 3)


@pytest.mark.parametrize(
    "architecture", ["resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "squeezenet1_1"]
)
def test_a_family_is_tuned_widened_and_kept(architecture: str, tmp_path: Path) -> None:
    """Only its head moves where only the head may; wider, saved and loaded it answers the same."""
    start = build(configuration(architecture))
    data = LabelledPictures(tuple("abcdef"), pictures(6), torch.arange(6) % 3)
    settings = TrainingSettings(epochs=1, strategy=Strategy.HEAD, rehearsal=0.0)
    tuned = fine_tune(start, data, settings).network
    after = tuned.state_dict()
    moved = {name for name, value in start.state_dict().items() if not value.equal(after[name])}
    assert moved == stages(start)[-1].parameters
    wide = widen(tuned, ["cat", "dog", "eel", "fox"])
    torch.testing.assert_close(logits(wide)[:, :3], logits(tuned), rtol=1e-4, atol=1e-5)
    save(wide, tmp_path)
    torch.testing.assert_close(logits(load(tmp_path)), logits(wide), rtol=1e-4, atol=1e-5)


def test_weights_that_cannot_be_fetched_are_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Where they cannot be kept, as without a network, the way out is said."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "file"))
    with pytest.raises(ModelError, match=r"weights of resnet18 cannot be fetched .*as a file"):
        build(configuration("resnet18"), weights="DEFAULT")


def test_the_seed_alone_decides_random_weights() -> None:
    """The same seed builds the same network, and the global generator does not move."""
    config = configuration("small_cnn")
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one, same, other = (logits(build(config, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("architecture", ["small_cnn", "squeezenet1_1", "mlp"])
def test_old_classes_keep_their_answers_in_a_wider_head(architecture: str) -> None:
    """The logits of the old classes stay bit for bit, and the network itself is not touched."""
    network = build(configuration(architecture)).eval()
    before = logits(network)
    wide = widen(network, ["fox", "dog", "cat", "eel", "gnu"], seed=3)
    assert wide.config.classes == ("cat", "dog", "eel", "fox", "gnu")
    assert not wide.training
    after = logits(wide)
    assert after.shape == (3, 5)
    torch.testing.assert_close(after[:, :3], before, rtol=1e-6, atol=1e-6)
    assert torch.equal(wide.head.weight[:3], network.head.weight)
    assert torch.equal(wide.head.bias[:3], network.head.bias)
    assert wide.head.weight[3:].abs().min() > 0
    assert torch.equal(logits(network), before)
    assert network.config.classes == ("cat", "dog", "eel")
    assert torch.equal(logits(widen(network, wide.config.classes, seed=3)), after)


def test_a_wider_head_forgets_no_class() -> None:
    """An old class that is not named any more is refused."""
    with pytest.raises(ModelError, match=r"keeps every old class; missing: \['eel'\]"):
        widen(build(configuration("mlp")), ["cat", "dog", "fox"])


@pytest.mark.parametrize("architecture", ["small_cnn", "mlp", "mnasnet0_5", "squeezenet1_1"])
def test_saved_and_loaded_it_answers_the_same(architecture: str, tmp_path: Path) -> None:
    """A round trip keeps the configuration and every bit of the answers."""
    network = build(configuration(architecture)).to(memory_format=torch.channels_last)
    save(network, tmp_path / "new" / "folder")
    again = load(tmp_path / "new" / "folder")
    assert again.config == network.config
    assert not again.training
    assert torch.equal(logits(again), logits(network))
    assert {p.name for p in (tmp_path / "new" / "folder").iterdir()} == {
        "model.safetensors",
        "config.json",
    }


def test_tampered_weights_are_refused(tmp_path: Path) -> None:
    """One flipped bit in the weights is found by the digest."""
    save(build(configuration("mlp")), tmp_path)
    path = tmp_path / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.safetensors is not what was saved"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"classes": ["a", "b", "c", "d"]}, r"do not fit mlp: 5\.weight: \(3, 128\) instead of"),
        ({"classes": ["a"]}, "at least 2 classes"),
        ({"classes": ["a", "a", "b"]}, "named twice"),
        ({"architecture": "mlpp"}, "unknown architecture"),
        ({"weights_sha256": "0" * 64}, "not what was saved"),
        ({"mean": [0.5]}, "need 3 values"),
        ({"mean": [0.5, 0.5, "half"]}, "not the configuration of a model"),
        ({"preprocessing": {"image_size": 0}}, "not the configuration of a model"),
        ({"preprocessing": {"image_size": 8, "code": "x"}}, "not the configuration of a model"),
        ({"classes": None}, "not the configuration of a model"),
    ],
)
def test_an_edited_configuration_is_refused(
    edit: dict[str, object], message: str, tmp_path: Path
) -> None:
    """Whatever was edited, loading says what is wrong and gives no network."""
    save(build(configuration("mlp")), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **edit}))
    with pytest.raises(ModelError, match=message):
        load(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", '"text"', "{}"])
def test_what_is_no_configuration_is_refused(content: str, tmp_path: Path) -> None:
    """A file that is not JSON, or not of our form, is named."""
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match=r"config\.json is not the configuration of a model"):
        read_config(tmp_path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    """Loading names the file that is not there."""
    with pytest.raises(ModelError, match=r"config\.json"):
        load(tmp_path)
    save(build(configuration("mlp")), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"the weights are missing: .*model\.safetensors"):
        load(tmp_path)


class Bomb:
    """Pickles to something that raises when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("import sys; sys.exit('a pickle was run')",)


def test_a_pickle_is_never_run(tmp_path: Path) -> None:
    """Neither as a version's weights with a fitting digest, nor as a state dict to start from."""
    save(build(configuration("mlp")), tmp_path)
    poison = pickle.dumps({"weight": Bomb()}, protocol=2)  # what torch.save writes
    (tmp_path / "model.safetensors").write_bytes(poison)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["weights_sha256"] = hashlib.sha256(poison).hexdigest()
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError, match="not in safetensors' form"):
        load(tmp_path)
    (tmp_path / "old.pkl").write_bytes(poison)
    torch.save({"weight": Bomb()}, tmp_path / "new.pt")
    for name in ("old.pkl", "new.pt"):
        with pytest.raises(ModelError, match=rf"{name} is not a state dict of tensors"):
            read_state_dict(tmp_path / name)


def test_state_dicts_are_read_in_their_usual_forms(tmp_path: Path) -> None:
    """Bare, in a checkpoint, from a DataParallel, as safetensors: the same weights."""
    config = configuration("small_cnn")
    source = build(config, seed=4)
    state = source.body.state_dict()
    torch.save(state, tmp_path / "bare.pt")
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "checkpoint.pth")
    torch.save(nn.DataParallel(source.body).state_dict(), tmp_path / "parallel.pt")
    save_file(state, tmp_path / "safe.safetensors")
    for path in sorted(tmp_path.iterdir()):
        adopted = build(config, weights=path, keep_head=True)
        assert torch.equal(logits(adopted), logits(source)), path.name
        assert torch.equal(logits(build(config, weights=str(path), keep_head=True)), logits(source))


@pytest.mark.parametrize("content", [[1, 2], {"weight": "text"}, nn.Linear(2, 2).weight])
def test_what_is_no_state_dict_is_refused(content: object, tmp_path: Path) -> None:
    """A file of other contents is named."""
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ModelError, match=r"x\.pt does not hold a state dict of tensors"):
        read_state_dict(tmp_path / "x.pt")


def test_a_part_called_module_keeps_its_name(tmp_path: Path) -> None:
    """The prefix of a DataParallel is taken off only where every name has it."""
    body = nn.ModuleDict({"module": nn.Linear(4, 4), "head": nn.Linear(4, 2)})
    torch.save(body.state_dict(), tmp_path / "x.pt")
    assert read_state_dict(tmp_path / "x.pt").keys() == body.state_dict().keys()


def test_weights_that_do_not_fit_list_the_first_mismatches(tmp_path: Path) -> None:
    """Missing, unexpected and misshapen tensors are listed, three of them, and the rest counted."""
    config = configuration("small_cnn")
    state = dict(build(config).body.state_dict())
    del state["0.weight"]
    state |= {"3.weight": torch.zeros(2, 2), "extra": torch.zeros(1), "another": torch.zeros(1)}
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(
        ModelError,
        match=r"w\.safetensors do not fit small_cnn: missing 0\.weight; unexpected \w+;"
        r" unexpected \w+ and 1 more$",
    ):
        build(config, weights=tmp_path / "w.safetensors")
    save_file({"fc.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match=r"have no 10\.weight, but fc\.weight"):
        build(config, weights=tmp_path / "other.safetensors")


def test_files_without_step_counters_load(tmp_path: Path) -> None:
    """Torchvision's own older files lack batch norm's counters, which answers do not depend on."""
    config = configuration("mnasnet0_5")
    source = build(config, seed=1)
    whole = source.body.state_dict()
    state = {name: value for name, value in whole.items() if "num_batches" not in name}
    assert len(state) < len(whole)
    torch.save(state, tmp_path / "old.pth")
    adopted = build(config, weights=tmp_path / "old.pth", keep_head=True)
    assert torch.equal(logits(adopted), logits(source))


@pytest.mark.filterwarnings("ignore:The default weight initialization")
@pytest.mark.usefixtures("shapes_only")
def test_auxiliary_heads_in_a_file_are_left_out(tmp_path: Path) -> None:
    """A file of GoogLeNet with its training heads fits the network without them."""
    config = configuration("googlenet")
    state = build(config).body.state_dict()
    state["fc.weight"] = torch.ones(3, 1024)
    aux = {"aux1.fc2.weight": torch.zeros(3, 1024), "aux2.fc2.bias": torch.zeros(3)}
    torch.save({**state, **aux}, tmp_path / "g.pth")
    adopted = build(config, weights=tmp_path / "g.pth", keep_head=True)
    assert torch.equal(adopted.body.fc.weight, state["fc.weight"])


def test_a_missing_file_of_weights_is_named(tmp_path: Path) -> None:
    """A path without a file behind it is not taken for a name of torchvision's."""
    with pytest.raises(ModelError, match=r"no weights at .*gone\.pt"):
        build(configuration("mlp"), weights=str(tmp_path / "gone.pt"))


def test_a_head_of_other_classes_is_replaced_or_adopted(tmp_path: Path) -> None:
    """The body comes from the file; the head is new, unless the file's own is asked for."""
    finished = build(configuration("squeezenet1_1", *"abcde"), seed=7)
    torch.save(finished.body.state_dict(), tmp_path / "five.pt")
    three = build(configuration("squeezenet1_1"), weights=tmp_path / "five.pt", seed=1)
    assert torch.equal(three.body.features[0].weight, finished.body.features[0].weight)
    assert three.head.out_channels == 3
    five = configuration("squeezenet1_1", *"vwxyz")
    replaced = build(five, weights=tmp_path / "five.pt", seed=1)
    adopted = build(five, weights=tmp_path / "five.pt", seed=1, keep_head=True)
    assert torch.equal(logits(adopted), logits(finished))
    assert not torch.equal(replaced.head.weight, finished.head.weight)
    with pytest.raises(ModelError, match=r"head of 5 outputs, but 3 classes are named"):
        build(configuration("squeezenet1_1"), weights=tmp_path / "five.pt", keep_head=True)


def test_named_weights_keep_their_head_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adopting by name keeps the published head or says that its classes are other ones."""
    published = torchvision.models.squeezenet1_1(weights=None)
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda *_, **__: published.state_dict())
    thousand = configuration("squeezenet1_1", *(f"class {i}" for i in range(1000)))
    adopted = build(thousand, weights="DEFAULT", keep_head=True)
    assert torch.equal(adopted.head.weight, published.classifier[1].weight)
    replaced = build(configuration("squeezenet1_1"), weights="IMAGENET1K_V1")
    assert torch.equal(replaced.body.features[0].weight, published.features[0].weight)
    assert replaced.head.out_channels == 3
    with pytest.raises(ModelError, match=r"DEFAULT have a head of 1000 outputs, but 3 classes"):
        build(configuration("squeezenet1_1"), weights="DEFAULT", keep_head=True)


@pytest.mark.skipif(
    not IMAGENET_WEIGHTS.is_file(),
    reason="the real weights lie in ../shared/data/weights, outside of the repository",
)
def test_real_published_weights_start_a_network_and_can_be_adopted() -> None:
    """SqueezeNet's ImageNet file gives its body to three classes, and its head to a thousand."""
    state = load_file(IMAGENET_WEIGHTS)
    three = build(configuration("squeezenet1_1", size=64), weights=IMAGENET_WEIGHTS)
    assert torch.equal(three.body.features[0].weight, state["features.0.weight"])
    assert logits(three, 64).shape == (3, 3)
    thousand = configuration("squeezenet1_1", *map(str, range(1000)), size=64)
    adopted = build(thousand, weights=IMAGENET_WEIGHTS, keep_head=True)
    assert torch.equal(adopted.head.weight, state["classifier.1.weight"])


@pytest.mark.parametrize(
    ("architecture", "hint"),
    [("resnet_18", "resnet18"), ("smal_cnn", "small_cnn"), ("efficientnetb0", "efficientnet_b0")],
)
def test_a_misspelt_architecture_is_told_its_neighbours(architecture: str, hint: str) -> None:
    """The message offers the nearest names."""
    with pytest.raises(ModelError, match=rf"unknown architecture .*did you mean .*\b{hint}\b"):
        build(configuration(architecture))
    with pytest.raises(ModelError, match=rf"did you mean .*\b{hint}\b"):
        require_known(architecture)
    for known in (hint, FACTORY):
        require_known(known)


def test_an_unknown_architecture_without_neighbours_says_what_there_is() -> None:
    """No far-fetched guess is offered."""
    with pytest.raises(ModelError, match=r"small_cnn, mlp, or package\.module:function$"):
        build(configuration("qqqqqqqq"))


def test_torchvision_takes_colour_only() -> None:
    """One channel is refused by name for torchvision, and built for the small networks."""
    grey = ModelConfig("resnet18", ("a", "b"), Preprocessing(16, channels=1), (0.5,), (0.5,))
    with pytest.raises(ModelError, match=r"resnet18 takes pictures of 3 channels: set channels"):
        build(grey)
    small = build(replace(grey, architecture="small_cnn")).eval()
    assert small(torch.zeros(2, 1, 16, 16, dtype=torch.uint8)).shape == (2, 2)


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ("resnet18", "resnet18 has no weights called 'V9': torchvision has IMAGENET1K_V1, DEFAULT"),
        ("small_cnn", "small_cnn has no published weights"),
        (FACTORY, "is your own factory: give its weights as a file"),
    ],
)
def test_unknown_names_of_weights_are_refused(architecture: str, message: str) -> None:
    """The message says which there are, or why there are none."""
    with pytest.raises(ModelError, match=message):
        build(configuration(architecture), weights="V9", allowed_factories=[FACTORY])


def test_pictures_are_normalised_by_the_configuration() -> None:
    """Mean and standard deviation are of pixels in [0, 1], channel by channel."""
    seen: list[Tensor] = []

    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            seen.append(x)
            return self.fc(x.mean((2, 3)))

    config = ModelConfig("mlp", ("a", "b"), Preprocessing(1), (0.0, 0.5, 1.0), (1.0, 0.5, 2.0))
    Network(config, Body())(torch.tensor([0, 255, 51], dtype=torch.uint8).view(1, 3, 1, 1))
    torch.testing.assert_close(seen[0].flatten(), torch.tensor([0.0, 1.0, -0.4]))


@pytest.fixture
def factories(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Make a module of the user's, with one factory that works; the list holds its calls."""
    calls: list[int] = []

    def make(num_classes: int) -> nn.Module:
        calls.append(num_classes)
        tied = nn.Linear(6, 6)
        return nn.Sequential(nn.Flatten(), nn.Linear(12, 6), tied, tied, nn.Linear(6, num_classes))

    module = types.ModuleType("factories_of_a_test")
    module.make = make  # type: ignore[attr-defined]
    module.text = lambda num_classes: f"a network of {num_classes}"  # type: ignore[attr-defined]
    module.headless = lambda num_classes: nn.Dropout(1 / num_classes)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return calls


class Odd(nn.Module):
    """A classifier whose head is not its last layer, in one of several ways."""

    def __init__(self, num_classes: int, way: str) -> None:
        super().__init__()
        self.way = way
        if way == "first":
            self.fc = nn.Linear(4, num_classes)
        self.trunk = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
        self.drop = nn.Dropout(0.5)
        if way == "convolution":
            self.fc = nn.Conv2d(4, num_classes, 1)
        elif way != "first":
            self.fc = nn.Linear(4, num_classes)
        self.projection = nn.Linear(4, 8)
        self.aux = nn.Linear(4, num_classes)

    def forward(self, x: Tensor) -> object:
        x = self.drop(self.trunk(x))
        aux = self.aux(x.mean((2, 3)))
        if self.way == "convolution":
            return self.fc(x).relu_().mean((2, 3))
        if self.way == "maps":
            return self.fc(x.movedim(1, 3))
        out = self.fc(x.mean((2, 3)))
        if self.way == "two":
            return (out + aux) / 2
        if self.way == "functional":
            return nn.functional.linear(x.mean((2, 3)), self.fc.weight)
        if self.way == "tuple" or (self.way == "training" and self.training):
            return out, aux
        return out.log_softmax(1)


def make_odd(monkeypatch: pytest.MonkeyPatch, way: str) -> str:
    module = types.ModuleType("odd_factories")
    module.make = lambda num_classes: Odd(num_classes, way)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return "odd_factories:make"


@pytest.mark.parametrize("way", ["first", "middle", "convolution"])
@pytest.mark.filterwarnings("ignore:.*suspicious")
def test_the_head_is_the_layer_that_answers(
    way: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An auxiliary layer after it is no head: what answers is replaced, tuned, widened and kept."""
    name = make_odd(monkeypatch, way)
    start = build(configuration(name, size=4), allowed_factories=[name])
    assert start.head is start.body.fc
    assert start.embed(pictures(3, 4))[0].shape == (3, 4)
    data = LabelledPictures(tuple("abcdef"), pictures(6, 4), torch.arange(6) % 3)
    for strategy in (Strategy.HEAD, Strategy.TWO_STAGE):
        settings = TrainingSettings(epochs=2, strategy=strategy, rehearsal=0.5, ewc=1.0)
        caches = [None, ActivationCache()]
        cold, cached = (
            fine_tune(start, data, settings, memory=data, cache=cache).network for cache in caches
        )
        torch.testing.assert_close(logits(cached, 4), logits(cold, 4), rtol=1e-4, atol=1e-5)
        after = cold.state_dict()
        moved = {key for key, was in start.state_dict().items() if not was.equal(after[key])}
        assert {"body.fc.weight", "body.fc.bias"} <= moved
        if strategy == Strategy.HEAD:
            assert moved == stages(start)[-1].parameters
    wide = widen(cold, ["cat", "dog", "eel", "fox"])
    assert logits(wide, 4).shape == (3, 4)
    torch.testing.assert_close(wide.head.weight[:3], cold.head.weight)
    save(wide, tmp_path)
    torch.testing.assert_close(logits(load(tmp_path, allowed_factories=[name]), 4), logits(wide, 4))
    torch.save(start.body.state_dict(), tmp_path / "three.pt")
    two = configuration(name, "a", "b", size=4)
    replaced = build(two, weights=tmp_path / "three.pt", allowed_factories=[name])
    assert replaced.head.weight.shape[0] == 2
    assert replaced.body.aux.weight.equal(start.body.aux.weight)
    save(replaced, tmp_path / "two")
    again = load(tmp_path / "two", allowed_factories=[name])
    torch.testing.assert_close(logits(again, 4), logits(replaced, 4))


@pytest.mark.parametrize(
    ("way", "message"),
    [
        ("two", r"make answers by aux, fc of its .*\(trunk.0, fc, projection, aux\), and its head"),
        ("functional", r"answers by none of its linear layers .* let one nn\.Linear or nn\.Conv2d"),
        ("tuple", r"answers two pictures with a tuple: let it return one tensor"),
        ("maps", r"answers two pictures with a tensor \(2, 4, 4, 3\)"),
        ("training", r"answers with a tuple while it is trained: .* without auxiliary outputs"),
    ],
)
def test_a_factory_without_one_head_is_refused(
    way: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What would be tuned or widened in vain is told before it is trained."""
    name = make_odd(monkeypatch, way)
    with pytest.raises(ModelError, match=message):
        build(configuration(name, size=4), allowed_factories=[name])


@pytest.mark.usefixtures("shapes_only")
def test_auxiliary_heads_of_a_factory_are_taken_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network of torchvision's that a factory makes is treated as torchvision's own."""
    module = types.ModuleType("odd_factories")
    module.make = lambda num_classes: torchvision.models.googlenet(  # type: ignore[attr-defined]
        num_classes=num_classes, aux_logits=True, init_weights=False
    )
    monkeypatch.setitem(sys.modules, module.__name__, module)
    name = "odd_factories:make"
    with torch.device("meta"):
        network = build(configuration(name, size=32), allowed_factories=[name])
        answers = network.train()(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    assert answers.shape == (2, 3)
    assert network.head is network.body.fc


def test_an_allowed_factory_builds_and_loads(factories: list[int], tmp_path: Path) -> None:
    """A network of the user's own, with layers that share weights, makes the round trip."""
    network = build(configuration(FACTORY, size=2), allowed_factories=[FACTORY])
    assert factories == [3]
    save(network, tmp_path)
    again = load(tmp_path, allowed_factories=[FACTORY])
    assert torch.equal(logits(again, 2), logits(network, 2))


def test_a_factory_that_is_not_allowed_is_never_called(
    factories: list[int], tmp_path: Path
) -> None:
    """Neither to build nor to load, whatever the model's files ask for."""
    with pytest.raises(ModelError, match=r"factories_of_a_test:make, which is not allowed"):
        build(configuration(FACTORY, size=2), allowed_factories=["factories_of_a_test:text"])
    save(build(configuration(FACTORY, size=2), allowed_factories=[FACTORY]), tmp_path)
    factories.clear()
    with pytest.raises(ModelError, match="not allowed"):
        load(tmp_path)
    assert factories == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_package.here:make", "cannot be imported: No module named 'no_such_package'"),
        ("factories_of_a_test:gone", "cannot be imported: .*no attribute 'gone'"),
        ("factories_of_a_test:text", "returned str, not a torch module"),
        ("factories_of_a_test:headless", "Dropout has no linear layer that could be its head"),
    ],
)
@pytest.mark.usefixtures("factories")
def test_a_factory_that_fails_says_how(name: str, message: str) -> None:
    """What cannot be imported, or gives no classifier, is named."""
    with pytest.raises(ModelError, match=message):
        build(configuration(name), allowed_factories=[name])


def test_a_file_of_weights_that_unpacks_to_more_is_refused(tmp_path: Path) -> None:
    """A zip bomb: a file of kilobytes whose tensors would take the memory of megabytes."""
    torch.save({"weight": torch.zeros(4_000_000)}, tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as plain,
        zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for one in plain.namelist():
            bomb.writestr(one, plain.read(one))
    assert (tmp_path / "bomb.pt").stat().st_size < 100_000
    with pytest.raises(ModelError, match=r"bomb\.pt is not a state dict .* is compressed"):
        read_state_dict(tmp_path / "bomb.pt")
    assert read_state_dict(tmp_path / "plain.pt")["weight"].shape == (4_000_000,)


@pytest.mark.usefixtures("a_gigabyte")
@pytest.mark.parametrize("length", [2**26, 2**33, 2**63])
def test_a_header_of_weights_that_claims_gigabytes_is_refused(length: int, tmp_path: Path) -> None:
    """What the first eight bytes of a safetensors file claim is not believed."""
    (tmp_path / "w.safetensors").write_bytes(length.to_bytes(8, "little") + b'{"a": {}}')
    with pytest.raises(ModelError, match=r"w\.safetensors is not a state dict .*[Hh]eader"):
        read_state_dict(tmp_path / "w.safetensors")


@pytest.mark.usefixtures("a_gigabyte")
def test_a_tensor_that_claims_gigabytes_is_refused(tmp_path: Path) -> None:
    """A shape that the file has no bytes for is refused before there is room for it."""
    said = {"a": {"dtype": "F32", "shape": [2**20, 2**20], "data_offsets": [0, 2**42]}}
    header = json.dumps(said).encode()
    (tmp_path / "w.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ModelError, match=r"w\.safetensors is not a state dict"):
        read_state_dict(tmp_path / "w.safetensors")


def test_parts_of_a_file_of_weights_that_overlap_are_refused(tmp_path: Path) -> None:
    """A zip bomb without compression: many names for the same bytes."""
    path = tmp_path / "w.pt"
    torch.save({"weight": torch.zeros(10_000)}, path)
    assert read_state_dict(path)
    with zipfile.ZipFile(path, "a") as packed:
        packed.writestr("more", b"")
        (data,) = (one for one in packed.filelist if one.filename.endswith("/data/0"))
        for number in range(100):
            again = copy.copy(data)
            again.filename = f"w/data/{number}"
            packed.filelist.append(again)
    assert path.stat().st_size < 60_000
    with pytest.raises(ModelError, match=r"w\.pt is not a state dict .*its parts overlap"):
        read_state_dict(path)
