"""Augmentation of a whole batch at once, each picture by its own random amounts."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional

from sft.ranges import at_least_one, below_one, not_negative


@dataclass(frozen=True)
class Augmentation:
    """How far pictures may be changed; the defaults change nothing.

    Attributes:
        shift_pixels: moves of up to so many pixels in each direction, edges repeated.
        flip: half of the pictures are mirrored, left to right.
        crop: least share of the area that a random-resized crop keeps, of an aspect between 3/4 and
            4/3 (as torchvision's RandomResizedCrop; .08 is ImageNet's); 1 for none.
        rotate: degrees, to either side.
        brightness: grey levels as a share of white, added or taken away.
        contrast: share by which the distance from the picture's mean grows or shrinks.
        rare: pictures of classes that are rarer than the average are changed by up to so many times
            as much (crop and flip aside); 1 for all alike.
    """

    shift_pixels: int = 0
    flip: bool = False
    crop: float = 1.0
    rotate: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    rare: float = 1.0

    def __post_init__(self) -> None:
        """Refuse values outside their range, by name."""
        not_negative(self, "shift_pixels", "rotate", "brightness")
        if not 0 < self.crop <= 1:
            raise ValueError(f"crop must be above 0 and at most 1, got {self.crop}")
        below_one(self, "contrast")
        at_least_one(self, "rare")

    @property
    def augments(self) -> bool:
        """Whether anything is changed."""
        return any(getattr(self, one.name) != one.default for one in fields(Augmentation))


def strengths(alike: Tensor, counts: Tensor, rare: float) -> Tensor:
    """Give each sample the strength of its augmentation, float32 (n,), from 1 up to `rare`.

    A class with a k-th of the average number of samples gets the root of k times as much.

    Args:
        alike: int64 (n,), how many samples of each one's class there are to train on.
        counts: int64 (classes,), the same of each class.
        rare: the most.
    """
    average = counts[counts > 0].float().mean()
    return (average / alike.clamp(min=1)).sqrt().clamp(1.0, rare)


def augment(
    pixels: Tensor, settings: Augmentation, generator: torch.Generator, strength: Tensor
) -> Tensor:
    """Change each picture of a batch by its own random amounts.

    Moves, crops, mirrors and rotations are one resampling (bilinear, edges repeated), so that a
    picture is blurred at most once.

    Args:
        pixels: uint8 (n, C, H, W).
        settings: how far.
        generator: source of the amounts.
        strength: (n,), what the amounts of each picture are multiplied by.

    Returns:
        Pictures of the same form; the same tensor when nothing is to be changed.
    """
    moved = settings.flip or settings.crop < 1 or settings.rotate or settings.shift_pixels
    changed = _resampled(pixels, settings, generator, strength) if moved else pixels
    if not (settings.brightness or settings.contrast):
        return changed
    scaled = changed.float()
    by, times = (
        _drawn(len(pixels), most, generator, strength).view(-1, 1, 1, 1)
        for most in (settings.brightness * 255, settings.contrast)
    )
    mean = scaled.mean(dim=(1, 2, 3), keepdim=True)
    scaled = mean + (scaled - mean) * (1 + times.clamp(-0.95, 3)) + by
    return scaled.round().clamp(0, 255).to(torch.uint8)


def _resampled(
    pixels: Tensor, settings: Augmentation, generator: torch.Generator, strength: Tensor
) -> Tensor:
    n, _, height, width = pixels.shape
    ones = torch.ones(n)
    angle = _drawn(n, math.radians(settings.rotate), generator, strength)
    across, down = _crop(n, settings.crop, generator)
    # the centre of a crop stays where the crop lies within the picture; a shift adds to it
    x = _drawn(n, 1.0, generator, ones) * (1 - across)
    y = _drawn(n, 1.0, generator, ones) * (1 - down)
    x = x + _whole(n, settings.shift_pixels, generator, strength) * 2 / width
    y = y + _whole(n, settings.shift_pixels, generator, strength) * 2 / height
    mirror = torch.ones(n)
    if settings.flip:
        mirror = torch.where(torch.rand(n, generator=generator) < 0.5, -1.0, 1.0)  # noqa: PLR2004
    cos, sin, aspect = angle.cos(), angle.sin(), height / width
    theta = torch.stack(
        [
            torch.stack([cos * across * mirror, -sin * down * aspect, x], dim=1),
            torch.stack([sin * across * mirror / aspect, cos * down, y], dim=1),
        ],
        dim=1,
    )
    grid = functional.affine_grid(theta, list(pixels.shape), align_corners=False)
    seen = functional.grid_sample(pixels.float(), grid, padding_mode="border", align_corners=False)
    return seen.round().clamp(0, 255).to(torch.uint8)


def _crop(n: int, least: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw shares of the width and of the height that are kept."""
    if least == 1:
        return torch.ones(n), torch.ones(n)
    area = least + (1 - least) * torch.rand(n, generator=generator)
    log_aspect = (torch.rand(n, generator=generator) * 2 - 1) * math.log(4 / 3)
    across = (area * log_aspect.exp()).sqrt().clamp(max=1)
    return across, (area / log_aspect.exp()).sqrt().clamp(max=1)


def _drawn(n: int, most: float, generator: torch.Generator, strength: Tensor) -> Tensor:
    return (torch.rand(n, generator=generator) * 2 - 1) * most * strength


def _whole(n: int, most: int, generator: torch.Generator, strength: Tensor) -> Tensor:
    """Draw whole pixels, so that a plain move blurs nothing."""
    reach = (most * strength).round()
    return ((torch.rand(n, generator=generator) * (2 * reach + 1)).floor() - reach).clamp(
        -reach, reach
    )
