"""Labelled pictures in memory: fixed roles, and batches that mix fresh with rehearsed samples."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import torch
from torch import Tensor

from sft.tasks import SINGLE_LABEL, Task

HOLDOUT_SHARE = 0.3
VALIDATION_SHARE = 0.1


class Role(StrEnum):
    """What a sample may be used for, for ever."""

    TRAIN = "train"
    VALIDATION = "validation"
    HOLDOUT = "holdout"


def role_of(sample_id: str) -> Role:
    """Tell a sample's role by a hash of its id.

    The role never changes, whatever arrives later, so no hold-out sample is ever trained on, across
    all versions. The shares are constants for the same reason: a setting could be changed.
    """
    digest = hashlib.sha256(b"sustain role\0" + sample_id.encode()).digest()
    place = int.from_bytes(digest[:8]) / 2**64
    if place < HOLDOUT_SHARE:
        return Role.HOLDOUT
    if place < HOLDOUT_SHARE + VALIDATION_SHARE:
        return Role.VALIDATION
    return Role.TRAIN


@dataclass(frozen=True)
class LabelledPictures:
    """Decoded pictures with labels.

    Attributes:
        sample_ids: n ids.
        pixels: uint8 (n, C, H, W).
        labels: (n, …), as the task has them: int64 (n,), the index of the class, or float32
            (n, outputs).
    """

    sample_ids: tuple[str, ...]
    pixels: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        """Refuse parts of unequal length."""
        if not len(self.sample_ids) == len(self.pixels) == len(self.labels):
            raise ValueError(
                f"{len(self.sample_ids)} ids, {len(self.pixels)} pictures and"
                f" {len(self.labels)} labels do not belong together"
            )

    def __len__(self) -> int:
        return len(self.sample_ids)

    def take(self, index: Sequence[int]) -> LabelledPictures:
        """Return the samples at these places, in this order."""
        places = torch.as_tensor(list(index), dtype=torch.int64)
        ids = tuple(self.sample_ids[i] for i in index)
        return LabelledPictures(ids, self.pixels[places], self.labels[places])

    def with_role(self, role: Role) -> LabelledPictures:
        """Return the samples whose id has this role."""
        return self.take([i for i, name in enumerate(self.sample_ids) if role_of(name) is role])


def join(parts: Sequence[LabelledPictures]) -> LabelledPictures:
    """Put several sets behind one another; raises ValueError when there is none."""
    if not parts:
        raise ValueError("nothing to join")
    return LabelledPictures(
        tuple(name for part in parts for name in part.sample_ids),
        torch.cat([part.pixels for part in parts]),
        torch.cat([part.labels for part in parts]),
    )


def batches(
    fresh: LabelledPictures,
    memory: LabelledPictures | None,
    *,
    batch_size: int,
    rehearsal: float,
    generator: torch.Generator,
    balanced: bool = False,
    task: Task = SINGLE_LABEL,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Go once through the fresh samples; a share `rehearsal` of each batch is old ones.

    Yields uint8 pictures (b, C, H, W), labels (b,) and whether each is old, bool (b,). The old
    samples of a batch are drawn uniformly, and repeated only when the memory holds fewer than the
    share asks for. With `balanced` as many fresh samples are drawn with repetition, each class
    equally often, as the task tells classes.
    """
    old_count = round(batch_size * rehearsal) if memory is not None and len(memory) else 0
    fresh_count = max(1, batch_size - old_count)
    chunks = list(_order(fresh, generator, task, balanced=balanced).split(fresh_count))
    if not old_count and len(chunks) > 1 and len(chunks[-1]) == 1:  # too few for batch norm
        chunks[-2:] = [torch.cat(chunks[-2:])]
    for chosen in chunks:
        pixels, labels = fresh.pixels[chosen], fresh.labels[chosen]
        if memory is not None and old_count:
            share = max(1, round(old_count * len(chosen) / fresh_count))
            old = torch.randperm(len(memory), generator=generator)
            old = old.repeat(math.ceil(share / len(old)))[:share]
            pixels = torch.cat([pixels, memory.pixels[old]])
            labels = torch.cat([labels, memory.labels[old]])
        yield pixels, labels, torch.arange(len(labels)) >= len(chosen)


def _order(
    fresh: LabelledPictures, generator: torch.Generator, task: Task, *, balanced: bool
) -> Tensor:
    if not balanced:
        return torch.randperm(len(fresh), generator=generator)
    outputs = 0 if fresh.labels.ndim == 1 else fresh.labels.shape[1]
    shares = 1 / task.alike(fresh.labels, task.counts(fresh.labels, outputs)).float()
    return torch.multinomial(shares, len(fresh), replacement=True, generator=generator)


def mixup(
    pixels: Tensor, targets: Tensor, alpha: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Blend each picture and its target with another of the batch (Zhang et al. 2018).

    Args:
        pixels: uint8 (n, C, H, W).
        targets: float (n, outputs), of which blends are targets too, such as shares of classes.
        alpha: of the Beta(alpha, alpha) that the shares of a batch are drawn from; 0: no blending.
        generator: source of the partners and the share.
    """
    if alpha == 0 or len(pixels) < 2:  # noqa: PLR2004 - nobody to blend with
        return pixels, targets
    seed = int(torch.randint(2**31, (), generator=generator))
    share = float(np.random.default_rng(seed).beta(alpha, alpha))
    partner = torch.randperm(len(pixels), generator=generator)
    blended = pixels.float().lerp(pixels[partner].float(), 1 - share).round().to(torch.uint8)
    return blended, targets.lerp(targets[partner], 1 - share)
