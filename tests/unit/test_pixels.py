"""Sets larger than their bound live in a file, and give what they would in memory."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from sft.cache import ActivationCache
from sft.dataset import LabelledPictures, Role, join
from sft.memory import remember
from sft.models import ModelConfig, build
from sft.pictures import Preprocessing
from sft.pixels import Pixels, PixelSink, StoredPixels, channel_statistics, concatenate, take
from sft.strategies import Strategy
from sft.train import TrainingSettings, fine_tune

SHAPE = (1, 8, 8)
CONFIG = ModelConfig("small_cnn", ("a", "b", "c"), Preprocessing(8, channels=1), (0.5,), (0.2,))


def stored(pixels: Tensor) -> StoredPixels:
    sink = PixelSink(pixels.shape[1:], in_memory_bytes=0)
    for one in pixels:
        sink.add(one)
    found = sink.finish()
    assert isinstance(found, StoredPixels)
    return found


def pictures(n: int, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, *SHAPE), dtype=torch.uint8, generator=generator)


def labelled(pixels: Pixels, prefix: str = "b") -> LabelledPictures:
    n = len(pixels)
    return LabelledPictures(tuple(f"{prefix}/{i}" for i in range(n)), pixels, torch.arange(n) % 3)


@pytest.mark.parametrize("bound", [0, 3 * 64, 9 * 64, 10 * 64])
def test_what_goes_in_comes_out(bound: int) -> None:
    """Ten pictures are in memory up to the bound of ten, else in a file, with the same bytes."""
    sink = PixelSink(SHAPE, bound)
    for one in pictures(10):
        sink.add(one)
    found = sink.finish()
    assert isinstance(found, StoredPixels) == (bound < 10 * 64)
    assert torch.equal(found[:], pictures(10))
    assert found.shape == (10, *SHAPE)


def test_rows_are_chosen_alike() -> None:
    """Every way to index, choose, split and iterate gives what a tensor gives."""
    whole = pictures(20)
    chosen = torch.tensor([7, 3, 3, 19])
    for pixels in (take(whole, chosen), take(stored(whole), chosen)):
        assert len(pixels) == 4
        assert torch.equal(pixels[:], whole[chosen])
        assert torch.equal(pixels[torch.tensor([2, 0])], whole[[3, 7]])
        assert torch.equal(pixels[3], whole[19])
        assert torch.equal(torch.cat(list(pixels.split(3))), whole[chosen])
        assert torch.equal(torch.stack(list(pixels)), whole[chosen])
    part = stored(whole).take(chosen)
    assert part.mapped.data_ptr() == part.take(torch.tensor([0])).mapped.data_ptr()


def test_sets_in_memory_and_in_files_are_joined() -> None:
    """A joined set lies in a file as soon as a part does; nothing is copied for an empty part."""
    one, other = pictures(3), pictures(4, seed=1)
    both = concatenate([stored(one), other])
    assert isinstance(both, StoredPixels)
    assert torch.equal(both[:], torch.cat([one, other]))
    whole = stored(one)
    assert concatenate([pictures(0), whole]) is whole
    joined = join([labelled(one), labelled(stored(other), "c")])
    assert torch.equal(joined.pixels[:], torch.cat([one, other]))


def test_files_have_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is gone from the folder while it is read, so that no kill can leave it behind."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    found = stored(pictures(5))
    assert not list(tmp_path.iterdir())
    assert torch.equal(found[:], pictures(5))


def test_channel_statistics_go_by_chunks() -> None:
    """Mean and deviation are those of the whole, also where it is read in several chunks."""
    pixels = torch.cat([pictures(400), pictures(400) // 2], dim=1)
    scaled = pixels.double().transpose(0, 1).flatten(1) / 255
    mean, std = channel_statistics(stored(pixels))
    assert mean == pytest.approx(scaled.mean(dim=1).tolist(), abs=1e-9)
    assert std == pytest.approx(scaled.std(dim=1).tolist(), abs=1e-9)


@pytest.mark.parametrize("strategy", [Strategy.FULL, Strategy.HEAD])
def test_training_from_a_file_gives_the_same_weights(strategy: Strategy) -> None:
    """Fresh, old and validation pictures in files: every weight is the same to the bit."""
    fresh, old, held = pictures(40), pictures(20, seed=1), pictures(20, seed=2)
    settings = TrainingSettings(epochs=2, strategy=strategy, shift_pixels=1, views=2, ewc=0.1)
    network = build(CONFIG)
    tuned = [
        fine_tune(
            network,
            labelled(where(fresh)),
            settings,
            memory=labelled(where(old)),
            validation=(labelled(where(held)),),
            cache=ActivationCache(),
        )
        for where in (lambda whole: whole, stored)
    ]
    assert tuned[0].epochs == tuned[1].epochs
    states = [one.network.state_dict() for one in tuned]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_a_memory_encodes_only_what_it_keeps() -> None:
    """Bounding first and encoding then gives the table that encoding first gives."""
    data = labelled(stored(pictures(30)))
    roles = [(Role.TRAIN, Role.VALIDATION, Role.HOLDOUT)[i % 3] for i in range(30)]
    first, later = (
        remember(data, CONFIG.classes, roles, "first", encode=encode).bounded(
            rehearsal=4, holdout=3
        )
        for encode in (True, False)
    )
    assert later.table["image"].isna().all()
    assert later.with_pictures(data).table.equals(first.table)
