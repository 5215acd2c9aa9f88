"""Augmentation: what it does to each picture, and that it is each picture's own."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sft.augment import Augmentation, augment, strengths


def pictures(n: int = 64, channels: int = 3, height: int = 12, width: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (n, channels, height, width)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def apply(pixels: Tensor, settings: Augmentation, *, seed: int = 0, strength: float = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return augment(pixels, settings, generator, torch.full((len(pixels),), float(strength)))


def test_nothing_is_changed_by_default() -> None:
    """The pictures come back as they are, the very tensor."""
    pixels = pictures()
    assert apply(pixels, Augmentation()) is pixels


def test_a_flip_mirrors_about_half_of_the_pictures_exactly() -> None:
    """Each is itself or its mirror image, to the bit."""
    pixels = pictures(200)
    flipped = apply(pixels, Augmentation(flip=True))
    same = (flipped == pixels).flatten(1).all(dim=1)
    mirrored = (flipped == pixels.flip(3)).flatten(1).all(dim=1)
    assert (same ^ mirrored).all()
    assert 70 < mirrored.sum() < 130


def test_a_shift_moves_by_whole_pixels() -> None:
    """Inside, each picture is an exact copy of itself some pixels off, no more than asked for."""
    pixels = pictures(60)
    moved = apply(pixels, Augmentation(shift_pixels=2))
    seen = set()
    for before, after in zip(pixels, moved, strict=True):
        found = [
            (down, right)
            for down in range(-2, 3)
            for right in range(-2, 3)
            if torch.equal(
                after[:, 2:-2, 2:-2],
                before[:, 2 + down : 10 + down, 2 + right : 14 + right],
            )
        ]
        assert len(found) == 1
        seen.add(found[0])
    assert {down for down, _ in seen} == {right for _, right in seen} == {-2, -1, 0, 1, 2}


@pytest.mark.parametrize(
    "settings",
    [
        Augmentation(crop=0.3),
        Augmentation(rotate=20),
        Augmentation(brightness=0.3),
        Augmentation(contrast=0.5),
        Augmentation(shift_pixels=1, flip=True, crop=0.5, rotate=5, brightness=0.1, contrast=0.1),
    ],
    ids=str,
)
def test_each_picture_is_changed_by_its_own_amount(settings: Augmentation) -> None:
    """Copies of one picture come out different; form and type stay; the seed decides."""
    pixels = pictures(1).expand(32, -1, -1, -1)
    changed = apply(pixels, settings)
    assert (changed.shape, changed.dtype) == (pixels.shape, torch.uint8)
    assert len({picture.numpy().tobytes() for picture in changed}) > 25
    assert torch.equal(changed, apply(pixels, settings))
    assert not torch.equal(changed, apply(pixels, settings, seed=1))


def test_brightness_and_contrast_stay_within_their_range() -> None:
    """A grey picture gets lighter or darker by at most the share asked for."""
    grey = torch.full((100, 1, 4, 4), 128, dtype=torch.uint8)
    by = (apply(grey, Augmentation(brightness=0.2)).float() - 128).flatten(1)
    assert 40 < by.abs().max() <= 52
    assert (by.amax(1) == by.amin(1)).all()
    assert torch.equal(apply(grey, Augmentation(contrast=0.9)), grey)


def test_a_crop_keeps_a_part_of_the_picture() -> None:
    """A picture that is dark on the left and light on the right never gets new values."""
    pixels = torch.zeros(50, 1, 16, 16, dtype=torch.uint8)
    pixels[..., 8:] = 200
    shares = (apply(pixels, Augmentation(crop=0.25)) > 100).float().mean(dim=(1, 2, 3))
    assert shares.min() < 0.3
    assert shares.max() > 0.7


def test_rare_classes_are_changed_more() -> None:
    """A class with a quarter of the average gets twice as much, at most as asked for."""
    labels = torch.tensor([0] * 70 + [1] * 10)
    counts = torch.bincount(labels, minlength=3)
    strength = strengths(counts[labels], counts, 3.0)
    assert strength[:70].unique().tolist() == [1.0]
    assert strength[70:].unique().tolist() == pytest.approx([2.0])
    assert strengths(counts[labels], counts, 1.5)[-1] == 1.5
    assert strengths(counts[labels], counts, 1.0).unique().tolist() == [1.0]
    few = apply(pictures(50), Augmentation(rotate=5)).float()
    more = apply(pictures(50), Augmentation(rotate=5), strength=3).float()
    pixels = pictures(50).float()
    assert (more - pixels).abs().mean() > (few - pixels).abs().mean()


@pytest.mark.parametrize(
    "changes",
    [{"crop": 0.0}, {"crop": 1.1}, {"rotate": -1}, {"contrast": 1.0}, {"rare": 0.5}],
)
def test_values_out_of_range_are_named(changes: dict[str, float]) -> None:
    """The message names the setting."""
    with pytest.raises(ValueError, match=next(iter(changes))):
        replace(Augmentation(), **changes)
