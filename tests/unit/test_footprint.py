"""What a network takes to serve, and whether it still answers as it did."""

from pathlib import Path

import pytest
import torch

from sft.footprint import largest_change, latency_ratio, weight_bytes
from sft.gate import ROUNDING
from sft.models import ModelConfig, build, load, save
from sft.pictures import Preprocessing

PIXELS = torch.randint(
    0, 256, (8, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)
CONFIG = ModelConfig("mlp", ("a", "b"), Preprocessing(8, 8, 1), (0.5,), (0.5,))


def test_a_saved_network_answers_as_before_and_an_altered_one_does_not(tmp_path: Path) -> None:
    """One weight of the head that moved by .1 is seen; saving and loading is not."""
    network = build(CONFIG, seed=0)
    before = network.embed(PIXELS)[1].numpy()
    save(network, tmp_path)
    back = load(tmp_path)
    assert largest_change(back, PIXELS, before) <= ROUNDING
    with torch.no_grad():
        list(back.parameters())[-1][0] += 0.1
    assert largest_change(back, PIXELS, before) == pytest.approx(0.025, abs=0.005)


def test_bytes_are_those_of_the_weights() -> None:
    """Four for each float32 parameter; there are no buffers but the normalisation."""
    network = build(CONFIG, seed=0)
    floats = sum(t.numel() for t in network.state_dict().values())
    assert weight_bytes(network) == 4 * floats
    assert latency_ratio(network, network, PIXELS) > 0
