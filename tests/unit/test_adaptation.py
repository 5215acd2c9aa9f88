"""A champion adapted without labels: what it wins on real digits, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from samples import optical_digits
from torch import Tensor

from sft.adaptation import AdaptationSettings, Method, adapt
from sft.averaging import ensemble
from sft.batchnorm import BatchNormError
from sft.dataset import LabelledPictures
from sft.evaluate import answer
from sft.models import ModelConfig, Network, build, load, save, widen
from sft.pictures import Preprocessing
from sft.train import TrainingSettings, fine_tune

FACTORY = "samples:batch_norm_net"
CONFIG = ModelConfig(FACTORY, tuple("0123456789"), Preprocessing(8, channels=1), (0.3,), (0.35,))
BANK, REESTIMATE = (AdaptationSettings(method=method) for method in Method)
SHORT = TrainingSettings(epochs=5, batch_size=32, learning_rate=4e-3, l2_sp=0.0)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Train on one thread: for networks this small, threads cost more than they bring."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def digits(first: int, n: int) -> LabelledPictures:
    return optical_digits().take(range(first, first + n))


def sensor(pixels: Tensor) -> Tensor:
    """Low contrast on a bright ground."""
    return (0.3 * pixels + 150).to(torch.uint8)


def through(change: Callable[[Tensor], Tensor], data: LabelledPictures) -> LabelledPictures:
    return replace(data, pixels=change(data.pixels))


def known() -> Tensor:
    return digits(0, 400).pixels


@cache
def champion(seed: int = 0) -> Network:
    settings = replace(SHORT, freeze_batch_norm=False, seed=seed)
    start = build(CONFIG, allowed_factories=[FACTORY])
    return fine_tune(start, digits(0, 400), settings).network


@cache
def bank() -> Network:
    return adapt(champion(), known(), sensor(digits(400, 100).pixels), BANK)


def reloaded(network: Network, folder: Path) -> Network:
    save(network, folder)
    return load(folder, allowed_factories=[FACTORY])


def test_a_bank_wins_the_new_world_and_keeps_the_old_without_a_label() -> None:
    """Re-estimation wins it too, and loses some of the old one."""
    new, old = through(sensor, digits(500, 400)), digits(500, 400)
    anew = adapt(champion(), known(), sensor(digits(400, 100).pixels), REESTIMATE)
    before = answer(champion(), new).accuracy
    assert answer(bank(), new).accuracy > before + 0.2
    assert answer(anew, new).accuracy > before + 0.2
    assert answer(bank(), old).accuracy > answer(champion(), old).accuracy - 0.02
    assert answer(bank(), old).accuracy > answer(anew, old).accuracy + 0.02
    assert (bank().config.domains, anew.config.domains) == (2, 1)


def test_a_bank_is_saved_and_loaded_to_the_bit(tmp_path: Path) -> None:
    """Statistics and routes are tensors of the one file; nobody's code is loaded."""
    again = reloaded(bank(), tmp_path)
    mixed = torch.cat([digits(500, 50).pixels, sensor(digits(550, 50).pixels)])
    for one, other in zip(bank().embed(mixed), again.embed(mixed), strict=True):
        assert one.equal(other)
    assert again.config == bank().config
    assert again.embed(mixed[:0])[1].shape == (0, 10)  # as a hold-out without a label is answered


def test_an_ensemble_is_adapted_member_by_member(tmp_path: Path) -> None:
    """Each member has a bank and a route of its own, and all of it is kept."""
    new = through(sensor, digits(500, 300))
    both = adapt(ensemble([champion(0), champion(1)]), known(), new.pixels[:100], BANK)
    assert (both.config.members, both.config.domains) == (2, 2)
    alone = [adapt(champion(seed), known(), new.pixels[:100], BANK) for seed in (0, 1)]
    expected = torch.stack([one(new.pixels) for one in alone]).mean(0)
    torch.testing.assert_close(both(new.pixels), expected)
    assert reloaded(both, tmp_path)(new.pixels).equal(both(new.pixels))


def test_a_bank_grows_by_another_world(tmp_path: Path) -> None:
    """A second adaptation adds a third domain, and the first two worlds stay known."""
    three = reloaded(adapt(bank(), known(), 255 - digits(400, 100).pixels, BANK), tmp_path)
    assert three.config.domains == 3
    for world in (digits(500, 300), through(sensor, digits(500, 300))):
        assert answer(three, world).accuracy > answer(bank(), world).accuracy - 0.03


def test_a_bank_takes_a_new_class_and_can_be_tuned(tmp_path: Path) -> None:
    """Old logits stay; a fine-tuning with rehearsal learns both worlds better."""
    wide = widen(bank(), (*"0123456789", "x"))
    new, old = through(sensor, digits(500, 300)), digits(500, 300)
    torch.testing.assert_close(wide(new.pixels)[:, :10], bank()(new.pixels))
    learned = through(sensor, digits(400, 100))
    settings = replace(SHORT, learning_rate=1e-3)
    made = fine_tune(wide, learned, settings, memory=digits(0, 200)).network
    made = reloaded(made, tmp_path)
    assert made.config.domains == 2
    assert answer(made, new).accuracy > answer(bank(), new).accuracy
    assert answer(made, old).accuracy > answer(bank(), old).accuracy - 0.03


def test_what_is_no_other_world_is_refused() -> None:
    """Other digits of the known world: the bank cannot tell them from those that it knows."""
    with pytest.raises(BatchNormError, match="no statistics of theirs would help"):
        adapt(champion(), known(), digits(400, 200).pixels, BANK)


def test_what_cannot_be_adapted_is_refused_by_name() -> None:
    """Too few pictures, no batch norm, and a bank that shall be re-estimated."""
    new = sensor(digits(400, 50).pixels)
    with pytest.raises(BatchNormError, match="9 pictures, and at least 10"):
        adapt(champion(), known(), new[:9], BANK)
    plain = build(replace(CONFIG, architecture="small_cnn"))
    for settings in (BANK, REESTIMATE):
        with pytest.raises(BatchNormError, match="small_cnn has no batch-norm layer"):
            adapt(plain, known(), new, settings)
    with pytest.raises(BatchNormError, match="keeps a bank of 2 domains: set method = 'bank'"):
        adapt(bank(), known(), new, REESTIMATE)
    with pytest.raises(ValueError, match="method must be one of bank, reestimate"):
        AdaptationSettings(method="hope")  # type: ignore[arg-type]  # from a file
    with pytest.raises(ValueError, match="share must be above 0 and at most 1, got 0"):
        AdaptationSettings(share=0)
