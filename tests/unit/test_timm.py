"""Architectures of timm's: the same network as any other, fed as timm feeds it."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from flows.bootstrap import _config
from flows.settings import Settings, load_settings
from sft.dataset import LabelledPictures
from sft.models import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    ModelConfig,
    ModelError,
    Network,
    build,
    load,
    published_input,
    save,
    widen,
)
from sft.pictures import Preprocessing
from sft.strategies import Strategy, stages
from sft.tasks import SINGLE_LABEL
from sft.train import TrainingSettings, fine_tune

timm = pytest.importorskip("timm")


def configuration(name: str, size: int = 32, channels: int = 3) -> ModelConfig:
    seen = Preprocessing(size, channels=channels)
    mean, std = IMAGENET_MEAN[:channels], IMAGENET_STD[:channels]
    return ModelConfig(f"timm/{name}", ("cat", "dog", "eel"), seen, mean, std)


def pictures(n: int = 6, size: int = 32, channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (n, channels, size, size)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def logits(network: Network, size: int = 32, channels: int = 3) -> Tensor:
    with torch.inference_mode():
        return network.eval()(pictures(3, size, channels))


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224", "convnext_atto"])
def test_a_family_is_tuned_widened_and_kept(name: str, tmp_path: Path) -> None:
    """Only its head moves where only the head may; wider, saved and loaded it answers the same."""
    start = build(configuration(name))
    data = LabelledPictures(tuple("abcdef"), pictures(), torch.arange(6) % 3)
    settings = TrainingSettings(epochs=1, strategy=Strategy.HEAD, rehearsal=0.0)
    tuned = fine_tune(start, data, settings).network
    after = tuned.state_dict()
    moved = {key for key, value in start.state_dict().items() if not value.equal(after[key])}
    assert moved == stages(start)[-1].parameters
    wide = widen(tuned, ["cat", "dog", "eel", "fox"])
    torch.testing.assert_close(logits(wide)[:, :3], logits(tuned), rtol=1e-4, atol=1e-5)
    save(wide, tmp_path)
    torch.testing.assert_close(logits(load(tmp_path)), logits(wide), rtol=1e-4, atol=1e-5)


def test_it_is_the_network_that_timm_makes(tmp_path: Path) -> None:
    """Its state dict, from a file, gives timm's own answers to pictures normalised timm's way."""
    theirs = timm.create_model("resnet10t", num_classes=3).eval()
    torch.save(theirs.state_dict(), tmp_path / "theirs.pt")
    ours = build(configuration("resnet10t"), weights=tmp_path / "theirs.pt", keep_head=True)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    with torch.inference_mode():
        expected = theirs((pictures(3) / 255 - mean) / std)
    torch.testing.assert_close(logits(ours), expected, rtol=1e-4, atol=1e-5)


def test_one_channel_is_built_for() -> None:
    """Timm makes networks for grey pictures too."""
    assert logits(build(configuration("resnet10t", channels=1)), channels=1).shape == (3, 3)


def test_pictures_are_normalised_by_timms_data_configuration(tmp_path: Path) -> None:
    """A vision transformer of timm's wants .5 and .5, and at bootstrap it gets them."""
    published = published_input("timm/vit_tiny_patch16_224")
    assert published.image_size == 224
    assert published.mean == published.std == (0.5, 0.5, 0.5)
    assert published_input("timm/resnet10t").mean == IMAGENET_MEAN
    config = _config(
        settings(tmp_path, "timm/vit_tiny_patch16_224"),
        LabelledPictures(("a",), pictures(1), torch.tensor([0])),
        ("cat", "dog"),
        SINGLE_LABEL,
    )
    assert (config.mean, config.std) == (published.mean, published.std)
    assert config.preprocessing.image_size == 224


def settings(folder: Path, architecture: str) -> Settings:
    path = folder / "sustain.toml"
    path.write_text(f'[model]\nname = "m"\narchitecture = "{architecture}"\n')
    return load_settings(path, environ={})


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("resnet_18", None, r"timm has no model called 'resnet_18'; did you mean resnet18"),
        ("resnet18", "V1", r"no weights called 'V1': give DEFAULT, .*resnet18\.a1_in1k"),
        ("deit_tiny_distilled_patch16_224", None, r"answers by several heads"),
        ("squeezenet", None, r"no model called 'squeezenet'"),
    ],
)
def test_what_timm_cannot_give_is_named(name: str, weights: str | None, message: str) -> None:
    """Unknown models and weights, and networks with several heads, are refused by name."""
    with torch.device("meta"), pytest.raises(ModelError, match=message):
        build(configuration(name, size=224), weights=weights)


def test_pretrained_weights_come_from_timm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`DEFAULT` takes what timm keeps, under a new head; a hub that is away is said."""
    published = timm.create_model("resnet10t")
    torch.save(published.state_dict(), tmp_path / "published.pt")
    known = timm.models._registry._model_pretrained_cfgs["resnet10t"]
    monkeypatch.setattr(known, "file", str(tmp_path / "published.pt"))
    network = build(configuration("resnet10t"), weights="DEFAULT")
    assert torch.equal(network.body.layer1[0].conv1.weight, published.layer1[0].conv1.weight)
    assert isinstance(network.head, nn.Linear)
    assert network.head.out_features == 3
    (tmp_path / "published.pt").unlink()
    with pytest.raises(ModelError, match=r"weights of timm/resnet10t cannot be fetched .*a file"):
        build(configuration("resnet10t"), weights="DEFAULT")


def test_without_timm_the_way_out_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names the extra to install."""
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ModelError, match=r"needs timm, .*pip install 'sustain\[timm\]'"):
        build(configuration("resnet18"))
