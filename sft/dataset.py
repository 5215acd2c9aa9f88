"""Labelled pictures: fixed roles, and batches that mix fresh with rehearsed samples."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from sft.pixels import Pixels, concatenate, take
from sft.tasks import SINGLE_LABEL, Task

TINY = float(np.finfo(np.float32).tiny)


class Role(StrEnum):
    """What a sample may be used for, for ever."""

    TRAIN = "train"
    VALIDATION = "validation"
    HOLDOUT = "holdout"


HOLDOUT_SHARE = 0.3
SHARES = {Role.HOLDOUT: HOLDOUT_SHARE, Role.VALIDATION: 0.1, Role.TRAIN: 0.6}
"""How a hash shares samples out that nobody has split; it walks through them in this order."""

SPLITS = {
    "train": Role.TRAIN,
    "val": Role.VALIDATION,
    "valid": Role.VALIDATION,
    "validation": Role.VALIDATION,
    "test": Role.HOLDOUT,
}
"""Names of folders into which people split their data themselves, and the role of what is there."""

REMEMBERED = 100_000
"""Roles that are kept: every decision counts those of all fresh labels."""
SPLIT_MARK = "//"
"""Ends the name of such a folder in a sample id: no path has it, so no class is taken for one."""


@lru_cache(maxsize=REMEMBERED)
def role_of(sample_id: str) -> Role:
    """Tell a sample's role by its id alone: by the split that it names, else by a hash.

    The role never changes, whatever arrives later, so no hold-out sample is ever trained on, across
    all versions. The shares are constants for the same reason: a setting could be changed.

    An id `<batch>/test//cat/1.png` names a split. One that stands for two, as `val+test//`, is
    shared out between their roles by the hash.
    """
    split, mark, _ = sample_id.partition("/")[2].partition(SPLIT_MARK)
    named = {SPLITS.get(name) for name in split.split("+") if mark}
    shares = {role: share for role, share in SHARES.items() if role in named} or SHARES
    digest = hashlib.sha256(b"sustain role\0" + sample_id.encode()).digest()
    place = int.from_bytes(digest[:8]) / 2**64 * sum(shares.values())
    bound = 0.0
    for role, share in shares.items():  # noqa: B007 - the last one is returned
        bound += share
        if place < bound:
            break
    return role


@dataclass(frozen=True)
class LabelledPictures:
    """Decoded pictures with labels.

    Attributes:
        sample_ids: n ids.
        pixels: uint8 (n, C, H, W), in memory or in a file.
        labels: (n, …), as the task has them: int64 (n,), the index of the class, or float32
            (n, outputs).
        weights: float32 (n,), how much each sample counts, less where its label is in doubt; None:
            all the same.
    """

    sample_ids: tuple[str, ...]
    pixels: Pixels
    labels: Tensor
    weights: Tensor | None = None

    def __post_init__(self) -> None:
        """Refuse parts of unequal length."""
        if not len(self.sample_ids) == len(self.pixels) == len(self.labels):
            raise ValueError(
                f"{len(self.sample_ids)} ids, {len(self.pixels)} pictures and"
                f" {len(self.labels)} labels do not belong together"
            )
        if self.weights is not None and len(self.weights) != len(self.labels):
            raise ValueError(f"{len(self.labels)} labels, but {len(self.weights)} weights")

    def __len__(self) -> int:
        return len(self.sample_ids)

    def take(self, index: Sequence[int]) -> LabelledPictures:
        """Return the samples at these places, in this order."""
        places = torch.as_tensor(list(index), dtype=torch.int64)
        ids = tuple(self.sample_ids[i] for i in index)
        weights = None if self.weights is None else self.weights[places]
        return LabelledPictures(ids, take(self.pixels, places), self.labels[places], weights)

    def split(self, size: int) -> Iterator[LabelledPictures]:
        """Give so many samples at a time, in their order."""
        for start in range(0, len(self), size):
            yield self.take(range(start, min(start + size, len(self))))

    @property
    def shares(self) -> Tensor:
        """How much each sample counts, float32 (n,)."""
        return torch.ones(len(self)) if self.weights is None else self.weights

    def with_role(self, role: Role) -> LabelledPictures:
        """Return the samples whose id has this role."""
        return self.take([i for i, name in enumerate(self.sample_ids) if role_of(name) is role])


def join(parts: Sequence[LabelledPictures]) -> LabelledPictures:
    """Put several sets behind one another; raises ValueError when there is none."""
    if not parts:
        raise ValueError("nothing to join")
    weighted = any(part.weights is not None for part in parts)
    return LabelledPictures(
        tuple(name for part in parts for name in part.sample_ids),
        concatenate([part.pixels for part in parts]),
        torch.cat([part.labels for part in parts]),
        torch.cat([part.shares for part in parts]) if weighted else None,
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
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Go once through the fresh samples; a share `rehearsal` of each batch is old ones.

    Yields uint8 pictures (b, C, H, W), labels (b,), whether each is old, bool (b,), and how much
    each counts, float32 (b,). The old samples are drawn uniformly, and none again before all were.
    With `balanced` as many fresh samples are drawn with repetition, each class equally often, as
    the task tells classes.
    """
    fresh_count, old_count = parts(memory, batch_size, rehearsal)
    chunks = list(_order(fresh, generator, task, balanced=balanced).split(fresh_count))
    if not old_count and len(chunks) > 1 and len(chunks[-1]) == 1:  # too few for batch norm
        chunks[-2:] = [torch.cat(chunks[-2:])]
    shares = [max(1, round(old_count * len(one) / fresh_count)) for one in chunks]
    drawn = _drawn(memory, shares, generator) if memory is not None and old_count else None
    for place, chosen in enumerate(chunks):
        pixels, labels, counted = fresh.pixels[chosen], fresh.labels[chosen], fresh.shares[chosen]
        if memory is not None and drawn is not None:
            old = drawn[place]
            pixels = torch.cat([pixels, memory.pixels[old]])
            labels = torch.cat([labels, memory.labels[old]])
            counted = torch.cat([counted, memory.shares[old]])
        yield pixels, labels, torch.arange(len(labels)) >= len(chosen), counted


def parts(memory: LabelledPictures | None, batch_size: int, rehearsal: float) -> tuple[int, int]:
    """Tell how many samples of a batch are fresh, and how many old: one of each at least."""
    rehearses = rehearsal > 0 and memory is not None and len(memory) > 0
    old = max(1, round(batch_size * rehearsal)) if rehearses else 0
    return max(1, batch_size - old), old


def often(
    fresh: LabelledPictures,
    memory: LabelledPictures | None,
    *,
    batch_size: int,
    rehearsal: float,
    balanced: bool = False,
    task: Task = SINGLE_LABEL,
) -> Tensor:
    """Tell how often `batches` draws each sample on average, float32 (n,): fresh, then old ones."""
    fresh_count, old_count = parts(memory, batch_size, rehearsal)
    rates = _rates(fresh, task) if balanced else torch.ones(len(fresh))
    rates = rates / rates.mean()
    if memory is None or not old_count:
        return torch.cat([rates, torch.zeros(0 if memory is None else len(memory))])
    old = old_count / fresh_count * len(fresh) / len(memory)
    return torch.cat([rates, torch.full((len(memory),), old)])


def _drawn(
    memory: LabelledPictures, shares: Sequence[int], generator: torch.Generator
) -> Sequence[Tensor]:
    rounds = math.ceil(sum(shares) / len(memory))
    orders = [torch.randperm(len(memory), generator=generator) for _ in range(rounds)]
    drawn: Sequence[Tensor] = torch.cat(orders)[: sum(shares)].split(list(shares))
    return drawn


def _order(
    fresh: LabelledPictures, generator: torch.Generator, task: Task, *, balanced: bool
) -> Tensor:
    if not balanced:
        return torch.randperm(len(fresh), generator=generator)
    rates = _rates(fresh, task)
    return torch.multinomial(rates, len(fresh), replacement=True, generator=generator)


def _rates(fresh: LabelledPictures, task: Task) -> Tensor:
    """Give samples the inverse of how many there are of their class, (n,)."""
    outputs = 0 if fresh.labels.ndim == 1 else fresh.labels.shape[1]
    return 1 / task.alike(fresh.labels, task.counts(fresh.labels, outputs)).float()


def mixup(
    pixels: Tensor, targets: Tensor, shares: Tensor, alpha: float, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Blend each picture and its target with another of the batch (Zhang et al. 2018).

    The part of a sample that counts for less is as much smaller in the blend's target.

    Args:
        pixels: uint8 (n, C, H, W).
        targets: float (n, outputs), of which blends are targets too, such as shares of classes.
        shares: float (n,), how much each sample counts.
        alpha: of the Beta(alpha, alpha) that the shares of a batch are drawn from; 0: no blending.
        generator: source of the partners and the share.
    """
    if alpha == 0 or len(pixels) < 2:  # noqa: PLR2004 - nobody to blend with
        return pixels, targets, shares
    seed = int(torch.randint(2**31, (), generator=generator))
    share = float(np.random.default_rng(seed).beta(alpha, alpha))
    partner = torch.randperm(len(pixels), generator=generator)
    blended = pixels.float().lerp(pixels[partner].float(), 1 - share).round().to(torch.uint8)
    counted, blends = targets * shares.unsqueeze(1), shares.lerp(shares[partner], 1 - share)
    counted = counted.lerp(counted[partner], 1 - share)
    return blended, counted / blends.clamp(min=TINY).unsqueeze(1), blends
