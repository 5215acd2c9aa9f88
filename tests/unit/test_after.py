"""What follows a fine-tuning, by what it does to weights and to answers on real digits."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from samples import optical_digits

from sft.after import MEMBER_RATES, tune
from sft.averaging import After, ensemble, members_of, uniform_soup
from sft.cache import ActivationCache
from sft.dataset import LabelledPictures
from sft.evaluate import answer, mean_loss
from sft.models import ModelConfig, ModelError, Network, build, load, save, widen
from sft.pictures import Preprocessing
from sft.strategies import Strategy
from sft.train import TrainingError, TrainingSettings, fine_tune

pytestmark = pytest.mark.slow
CONFIG = ModelConfig(
    "small_cnn", tuple("0123456789"), Preprocessing(8, channels=1), (0.3,), (0.35,)
)
SHORT = TrainingSettings(epochs=3, batch_size=32, learning_rate=4e-3, members=2)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Train on one thread: for networks this small, threads cost more than they bring."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def inverted(first: int, n: int) -> LabelledPictures:
    data = optical_digits().take(range(first, first + n))
    return replace(data, pixels=255 - data.pixels)


def old(first: int = 0, n: int = 150) -> LabelledPictures:
    return optical_digits().take(range(first, first + n))


@cache
def champion() -> Network:
    return fine_tune(build(CONFIG), old(0, 400), replace(SHORT, epochs=5, l2_sp=0.0)).network


@cache
def two() -> Network:
    """An ensemble of two champions."""
    return tuned(After.ENSEMBLE)


def validation() -> tuple[LabelledPictures, LabelledPictures]:
    return inverted(550, 60), old(450, 60)


def tuned(after: After, start: Network | None = None, **changes: object) -> Network:
    settings = replace(SHORT, after=after, **changes)  # type: ignore[arg-type]  # of its fields
    return tune(
        start or champion(), inverted(400, 150), settings, memory=old(), validation=validation()
    ).network


def weights(of: Network) -> list[torch.Tensor]:
    return list(of.state_dict().values())


def same(one: Network, other: Network) -> bool:
    return all(a.equal(b) for a, b in zip(weights(one), weights(other), strict=True))


@pytest.mark.parametrize("after", [After.SOUP, After.GREEDY_SOUP, After.ENSEMBLE])
def test_several_fine_tunings_learn_the_new_world_and_keep_the_old(after: After) -> None:
    """Digits of an inverted sensor: from under 10 % to over 70 %, with the old ones over 80 %."""
    new, known = inverted(650, 200), old(650, 200)
    made = tuned(after, epochs=5)
    assert answer(champion(), new).accuracy < 0.1
    assert answer(made, new).accuracy > 0.7
    assert answer(made, known).accuracy > 0.8


def test_members_differ_by_seed_and_rate_and_the_first_is_a_single_tuning() -> None:
    """A uniform soup is the mean of what those fine-tunings give; the history tells all of them."""
    fresh, settings = inverted(400, 150), replace(SHORT, after=After.SOUP)
    second = replace(settings, seed=1, learning_rate=MEMBER_RATES[1] * SHORT.learning_rate)
    runs = [
        fine_tune(champion(), fresh, each, memory=old(), validation=validation())
        for each in (settings, second)
    ]
    assert not same(runs[0].network, runs[1].network)
    seen = []
    made = tune(
        champion(), fresh, settings, memory=old(), validation=validation(), on_epoch=seen.append
    )
    assert same(made.network, uniform_soup([run.network for run in runs]))
    assert [epoch.number for epoch in made.epochs] == [1, 2, 3, 4, 5, 6]
    assert len(seen) == 6 == SHORT.epochs * settings.runs
    losses = [mean_loss(run.network, validation())[0] for run in runs]
    best = losses.index(min(losses))
    assert made.best_epoch == 3 * best + runs[best].best_epoch
    assert len(made.members) == 3
    assert f"loss {losses[1]:.4g}" in made.members[1]


def test_a_greedy_soup_is_never_worse_than_its_best_member() -> None:
    """On the validation samples it is chosen by; a member that learned nothing is left out."""
    made = tune(
        champion(), inverted(400, 150), replace(SHORT, after=After.GREEDY_SOUP, members=3),
        memory=old(), validation=validation(),
    )  # fmt: skip
    alone = fine_tune(
        champion(), inverted(400, 150), SHORT, memory=old(), validation=validation()
    ).network
    assert mean_loss(made.network, validation())[0] <= mean_loss(alone, validation())[0]
    blind = tune(champion(), inverted(400, 150), replace(SHORT, after=After.GREEDY_SOUP))
    assert [one.endswith("left out") for one in blind.members] == [False, True, False]


def test_interpolation_keeps_what_validates_best() -> None:
    """Wrong labels, validated on right ones: the champion's own weights come back."""
    wrong = old(400, 150)
    wrong = replace(wrong, labels=(wrong.labels + 1) % 10)
    settings = replace(SHORT, after=After.INTERPOLATE)
    made = tune(champion(), wrong, settings, validation=(old(650, 60),))
    assert made.alpha == 0
    assert same(made.network, champion())


def test_an_ensemble_is_saved_and_loaded_to_the_bit(tmp_path: Path) -> None:
    """One file of weights; its embedding is as wide as a member's, and their mean."""
    save(two(), tmp_path)
    again = load(tmp_path)
    data = inverted(650, 100)
    for one, other in zip(two().embed(data.pixels), again.embed(data.pixels), strict=True):
        assert one.equal(other)
    assert again.config.members == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    alone = [one.features(data.pixels) for one in members_of(again)]
    embedding, logits = again.features(data.pixels)
    torch.testing.assert_close(embedding, (alone[0][0] + alone[1][0]) / 2)
    torch.testing.assert_close(logits, (alone[0][1] + alone[1][1]) / 2)
    assert embedding.shape == champion().features(data.pixels)[0].shape


def test_an_older_configuration_is_of_one_member(tmp_path: Path) -> None:
    """Versions from before ensembles load; one that names more members than it holds does not."""
    save(champion(), tmp_path)
    path = tmp_path / "config.json"
    raw = json.loads(path.read_text())
    assert (raw.pop("members"), raw.pop("domains")) == (1, 1)
    path.write_text(json.dumps(raw))
    assert same(load(tmp_path), champion())
    for odd, message in (({"members": 2}, "missing members"), ({"members": 0}, "at least 1"),
                         ({"domains": 2}, "no batch-norm layer")):  # fmt: skip
        path.write_text(json.dumps(raw | odd))
        with pytest.raises(ModelError, match=message):
            load(tmp_path)


def test_every_member_of_an_ensemble_is_tuned_for_another_one() -> None:
    """Each from its own weights, so that they stay as different as they were."""
    made = tuned(After.ENSEMBLE, two(), epochs=1)
    data = inverted(400, 150)
    for number, (start, end) in enumerate(zip(members_of(two()), members_of(made), strict=True)):
        rate = MEMBER_RATES[number] * SHORT.learning_rate
        settings = replace(SHORT, epochs=1, seed=number, learning_rate=rate)
        alone = fine_tune(start, data, settings, memory=old(), validation=validation()).network
        assert same(end, alone)
    assert tuned(After.ENSEMBLE, two(), epochs=1, members=3).config.members == 3


@pytest.mark.parametrize("after", [After.NOTHING, After.INTERPOLATE, After.SOUP])
def test_the_first_member_of_an_ensemble_is_tuned_for_all_else(after: After) -> None:
    """What serves is one network again, as when that member had been champion alone."""
    made = tuned(after, two(), epochs=1)
    assert made.config.members == 1
    assert same(made, tuned(after, members_of(two())[0], epochs=1))


def test_an_ensemble_is_not_tuned_as_one() -> None:
    """The loop refuses it by name."""
    with pytest.raises(TrainingError, match=r"one by one: call sft\.after\.tune"):
        fine_tune(two(), inverted(400, 150), SHORT)


def test_a_new_class_widens_every_member() -> None:
    """Old logits stay to the bit, and the wide ensemble learns the class."""
    wide = widen(two(), (*"0123456789", "x"))
    data = old(650, 50)
    assert wide(data.pixels)[:, :10].equal(two()(data.pixels))
    fresh = inverted(400, 150)
    fresh = replace(fresh, labels=torch.where(fresh.labels == 0, 10, fresh.labels))
    settings = replace(SHORT, after=After.ENSEMBLE)
    made = tune(wide, fresh, settings, memory=old(), anchor=two(), validation=validation()).network
    crosses = inverted(650, 200)
    crosses = crosses.take([i for i, label in enumerate(crosses.labels.tolist()) if label == 0])
    assert answer(made, replace(crosses, labels=crosses.labels + 10)).accuracy > 0.7
    assert ensemble(members_of(made)).config == made.config


def test_a_cached_frozen_part_serves_every_member() -> None:
    """Heads of one backbone: the pictures run through it once for all three."""
    settings = replace(SHORT, after=After.ENSEMBLE, members=3, strategy=Strategy.HEAD)
    seen: list[int] = []
    start = champion()
    hook = start.get_submodule("body.0").register_forward_hook(
        lambda _module, given, _output: seen.append(len(given[0]))
    )
    try:
        tune(start, inverted(400, 150), settings, memory=old(), cache=ActivationCache())
    finally:
        hook.remove()
    assert sum(count for count in seen if count > 2) < 2 * (150 + 150)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"after": "stew"}, "after must be one of nothing, interpolate, soup, greedy_soup"),
        ({"after": After.SOUP, "members": 1}, "after = 'soup' needs members of 2 or more, got 1"),
        ({"members": 0}, "members must be at least 1, got 0"),
    ],
)
def test_what_cannot_follow_is_refused(changes: dict[str, object], message: str) -> None:
    """By the setting's name."""
    with pytest.raises(ValueError, match=message):
        replace(SHORT, **changes)  # type: ignore[arg-type]  # of its fields


@pytest.mark.parametrize("after", [After.INTERPOLATE, After.SOUP])
def test_a_network_that_insists_on_the_versions_of_its_layers_is_tuned(after: After) -> None:
    """MNASNet refuses a state dict without them; its head learns, and what follows mixes it."""
    seen = ModelConfig("mnasnet0_5", ("a", "b"), Preprocessing(16), (0.5,) * 3, (0.5,) * 3)
    data = LabelledPictures(
        ("b/0", "b/1"), torch.arange(2 * 3 * 16 * 16).view(2, 3, 16, 16).to(torch.uint8),
        torch.tensor([0, 1]),
    )  # fmt: skip
    settings = TrainingSettings(epochs=1, strategy=Strategy.HEAD, after=after, members=2)
    start = build(seen)
    assert not same(tune(start, data, settings, validation=(data.take([0, 1] * 3),)).network, start)
