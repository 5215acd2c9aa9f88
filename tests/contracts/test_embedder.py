"""What every `Embedder` promises: the real network, and the fake that other tests use."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from monitoring.features import Embedder, extract
from sft.models import ModelConfig, build
from sft.pictures import Preprocessing

CLASSES = ("a", "b", "c")


class FakeEmbedder:
    """Embeds a picture as its mean colour, and is sure of the class that this is nearest to."""

    def embed(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        brightness = pixels.float().mean(dim=(1, 2, 3)) / 255
        centres = torch.linspace(0, 1, len(CLASSES))
        distance = -10 * (brightness[:, None] - centres).square()
        return pixels.float().mean(dim=(2, 3)), distance.softmax(dim=1)


def real(architecture: str) -> Embedder:
    size = 16 if architecture in ("small_cnn", "mlp") else 64
    config = ModelConfig(
        architecture, CLASSES, Preprocessing(size, size, 3), (0.5,) * 3, (0.5,) * 3
    )
    return build(config)


@pytest.fixture(params=["fake", "small_cnn", "mlp", "resnet18"])
def embedder(request: pytest.FixtureRequest) -> tuple[Embedder, int]:
    name = str(request.param)
    size = 64 if name == "resnet18" else 16
    return (FakeEmbedder() if name == "fake" else real(name)), size


def pictures(size: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (6, 3, size, size), dtype=torch.uint8, generator=generator)


def test_shapes_and_types(embedder: tuple[Embedder, int]) -> None:
    """A row a picture, float32, and probabilities that sum to one."""
    model, size = embedder
    embedding, probabilities = model.embed(pictures(size))
    assert embedding.ndim == 2
    assert len(embedding) == 6
    assert probabilities.shape == (6, len(CLASSES))
    assert embedding.dtype == probabilities.dtype == torch.float32
    assert torch.allclose(probabilities.sum(dim=1), torch.ones(6), atol=1e-5)


def test_a_picture_is_answered_the_same_in_any_company(embedder: tuple[Embedder, int]) -> None:
    """The answer for a picture does not depend on the others of its batch, or on their order."""
    model, size = embedder
    together, _ = model.embed(pictures(size))
    alone = torch.cat([model.embed(p[None])[0] for p in pictures(size)])
    reversed_, _ = model.embed(pictures(size).flip(0))
    assert torch.allclose(together, alone, atol=1e-4)
    assert torch.allclose(together, reversed_.flip(0), atol=1e-4)


def test_nothing_is_remembered(embedder: tuple[Embedder, int]) -> None:
    """Embedding twice gives the same bits: no statistics move, and no gradient is kept."""
    model, size = embedder
    first, second = model.embed(pictures(size)), model.embed(pictures(size))
    assert torch.equal(first[0], second[0])
    assert not first[0].requires_grad


def test_extract_takes_it(embedder: tuple[Embedder, int]) -> None:
    """`extract` turns its answers into a feature table."""
    model, size = embedder
    table = extract(model, tuple("abcdef"), pictures(size), [(size, size, 3)] * 6, batch_size=4)
    assert table.embedding.shape == (6, model.embed(pictures(size))[0].shape[1])
    assert table.probabilities.shape == (6, 3)
