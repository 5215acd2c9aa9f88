"""One training by several processes: each answers its part of every batch.

The loop stays one loop, which every process runs: the same samples in the same order, drawn and
augmented from the same seed. Only the passes through the network are shared out. Each process
answers its rows of a batch, all receive all answers, and each takes the loss of the whole batch, so
that its normaliser, class weights, blends and L_pre are what they are in one process, whatever the
size of a part. Backwards, each goes on from its own rows with `size` times their gradient, so that
the mean over the processes is the gradient of the whole batch, and of terms that all have alike,
such as L2-SP.

That mean is a plain `all_reduce` after the backward pass rather than DistributedDataParallel: what
moves changes from phase to phase, a tail shares its weights with the whole network, and L_pre
reaches weights past the forward pass. The price is that gradients travel after the backward pass
instead of during it.

What a network draws by itself is not shared out: stochastic depth, dropout within attention, and on
CUDA all dropout, are drawn by each process, and so differ from those of one process. `nn.Dropout`
on the CPU does not differ.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Part(NamedTuple):
    """Some rows, int64 (k,), of a batch of n."""

    rows: Tensor
    n: int


LARGE = 2**12
"""Numbers of a gradient that travels by itself, in place; smaller ones are sent together."""

_PART: ContextVar[Part | None] = ContextVar("what this process answers", default=None)


@dataclass(frozen=True)
class Team:
    """The processes that train one network together, as one of them sees them.

    Attributes:
        rank: of this one; 0 leads.
        size: how many there are; 1: this one alone, which shares nothing.
        group: through which they speak; None for the default one.
        device: that its backend takes tensors from.
    """

    rank: int = 0
    size: int = 1
    group: Any = None
    device: torch.device = torch.device("cpu")  # noqa: RUF009 - it cannot change

    @property
    def leads(self) -> bool:
        """Whether this process speaks to the world."""
        return self.rank == 0

    def rows(self, n: int) -> Tensor:
        """Give the places of this process among n, int64 (⌈n/size⌉,).

        All have as many, so that what they give can be gathered: beyond the end the last one is
        repeated, and `gathered` drops it.
        """
        each = -(-n // self.size)
        return torch.arange(self.rank * each, (self.rank + 1) * each).clamp(max=n - 1)

    def answers(self, network: Callable[[Tensor], Tensor], pixels: Tensor) -> Tensor:
        """Let a network answer (n, …), each process its rows; all get all answers, (n, …).

        From more than one process they are float32.
        """
        if self.size == 1:
            return network(pixels)
        part = Part(self.rows(len(pixels)), len(pixels))
        with _passing(part):
            own = network(pixels[part.rows]).float()
        answers: Tensor = _Gathered.apply(own, self)
        return answers[: part.n]

    def gathered(self, own: Tensor, n: int) -> Tensor:
        """Give what all processes have for n places, each for its `rows`: (n, …), on the CPU."""
        if self.size == 1:
            return own
        half = self.agree([float(own.dtype == torch.bfloat16)])[0]
        own = own.to(torch.bfloat16 if half else torch.float32).contiguous()
        whole = self.concatenated(own.view(torch.uint8) if half else own)[:n].cpu()
        return whole.view(torch.bfloat16) if half else whole

    def concatenated(self, own: Tensor) -> Tensor:
        """Put the tensors of all processes, of one shape, behind one another."""
        own = own.detach().to(self.device).contiguous()
        parts = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(parts, own, group=self.group)
        return torch.cat(parts)

    def average_gradients(self, network: nn.Module) -> None:
        """Replace each gradient by its mean over the processes."""
        if self.size == 1:
            return
        gradients = [one.grad for one in network.parameters() if one.grad is not None]
        # autograd may give two parameters that are added up one memory, to be averaged once
        uses = Counter(map(_place, gradients))

        def in_place(one: Tensor) -> bool:
            return one.numel() >= LARGE and _dense(one) and uses[_place(one)] == 1

        large = [one for one in gradients if in_place(one)]
        small = [one for one in gradients if not in_place(one)]
        sent = [
            dist.all_reduce(one.as_strided((one.numel(),), (1,)), group=self.group, async_op=True)
            for one in large
        ]
        if small:
            flat = torch.cat([one.reshape(-1) for one in small])
            dist.all_reduce(flat, group=self.group)
            flat /= self.size
            for one, mean in zip(small, flat.split([g.numel() for g in small]), strict=True):
                one.copy_(mean.view_as(one))
        for work, one in zip(sent, large, strict=True):
            work.wait()
            one.div_(self.size)

    def agree(self, values: Sequence[float]) -> list[float]:
        """Take the values of the one that leads, so that all decide alike."""
        if self.size == 1:
            return list(values)
        told = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.broadcast(told, src=0, group=self.group)
        return [float(value) for value in told.tolist()]


ALONE = Team()


def whole_batch(inputs: Tensor) -> Part | None:
    """Tell which rows of the whole batch those are that now pass through a network.

    None where they are the whole batch, or something else than rows of it.
    """
    part = _PART.get()
    return part if part and inputs.ndim and len(inputs) == len(part.rows) else None


def _place(gradient: Tensor) -> int:
    return gradient.untyped_storage().data_ptr()


def _dense(gradient: Tensor) -> bool:
    """Whether its numbers lie behind one another, in the same order in all processes."""
    return gradient.is_contiguous() or gradient.is_contiguous(memory_format=torch.channels_last)


@contextmanager
def _passing(part: Part) -> Iterator[None]:
    token = _PART.set(part)
    try:
        yield
    finally:
        _PART.reset(token)


class _Gathered(torch.autograd.Function):
    """The rows of all processes behind one another; only the own ones have a gradient."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, team: Team) -> Tensor:
        ctx.team, ctx.start = team, team.rank * len(own)
        ctx.stop = ctx.start + len(own)
        return team.concatenated(own)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient[ctx.start : ctx.stop] * ctx.team.size, None
