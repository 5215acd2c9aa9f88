"""What a network takes to serve, and whether it still answers as it did."""

from __future__ import annotations

import statistics
import time

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sft.models import Network

ROUNDS, ENOUGH_SECONDS, MAX_ROUNDS = 5, 0.2, 50
"""Both networks answer in turn, at least 5 times, and small ones until .2 s of CPU are spent."""


def weight_bytes(network: Network) -> int:
    """Bytes of the parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in network.state_dict().values())


def latency_ratio(network: Network, other: Network, pixels: Tensor) -> float:
    """CPU time of an answer, divided by the other's: medians, measured side by side.

    Args:
        network: measured.
        other: what it is compared with.
        pixels: uint8 (n, C, H, W), a few.
    """
    times: tuple[list[float], list[float]] = ([], [])
    for each in (network, other):
        each.embed(pixels)  # the first pass allocates
    while len(times[0]) < ROUNDS or (
        sum(map(sum, times)) < ENOUGH_SECONDS and len(times[0]) < MAX_ROUNDS
    ):
        for each, spent in zip((network, other), times, strict=True):
            began = time.process_time()
            each.embed(pixels)
            spent.append(time.process_time() - began)
    return statistics.median(times[0]) / max(statistics.median(times[1]), 1e-9)


def largest_change(network: Network, pixels: Tensor, before: NDArray[np.float32]) -> float:
    """Largest difference of an answer from one that was kept; of a number over 1, its share.

    Args:
        network: asked again.
        pixels: uint8 (n, C, H, W).
        before: (n, outputs) float32.
    """
    change = np.abs(network.embed(pixels)[1].numpy() - before)
    return float((change / np.maximum(1, np.abs(before))).max())
