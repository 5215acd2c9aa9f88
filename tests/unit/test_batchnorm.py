"""Batch-norm statistics without labels: what moves, what it wins on real digits, and where not."""

import gzip
import importlib.util
import threading
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn import functional

from sft.batchnorm import (
    BatchNormError,
    DomainNorm,
    add_domain,
    open_bank,
    reestimate,
    route,
    with_domains,
    without_bank,
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """For networks this small, threads cost more than they bring."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def network(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1, stride=2), nn.BatchNorm2d(32, momentum=0.03),
            nn.ReLU(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(512, 10),
        )  # fmt: skip


class Doubled(nn.BatchNorm2d):
    """Does more than normalise."""

    def forward(self, given: Tensor) -> Tensor:
        return 2 * super().forward(given)


def test_what_a_batch_norm_of_timms_does_besides_stays() -> None:
    """Its activation is applied in a bank, kept in its state, and given back."""
    timm = pytest.importorskip("timm")
    plain = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        timm.layers.BatchNormAct2d(4, act_layer=nn.PReLU),
        timm.layers.BatchNormAct2d(4, apply_act=False, drop_layer=nn.Tanh),
    ).eval()
    bank = add_domain(open_bank(plain, noise()), noise(seed=1) * 3).eval()
    back = without_bank(bank).eval()
    with torch.no_grad():
        before = plain(noise())
        torch.testing.assert_close(bank(noise()), before)
        assert back(noise()).equal(before)
    assert bank.state_dict().keys() - plain.state_dict().keys() == {
        "1.centroids", "1.covariances", "1.whitening"
    }  # fmt: skip
    assert type(back[1]) is timm.layers.BatchNormAct2d


def test_a_batch_norm_that_does_something_unknown_is_refused() -> None:
    """What it does would be lost; the message names the layer and the way out."""
    with pytest.raises(BatchNormError, match=r'Doubled may do more .* method = "reestimate"'):
        open_bank(nn.Sequential(Doubled(1)), noise())


def noise(n: int = 40, seed: int = 0) -> Tensor:
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


@cache
def digits() -> tuple[Tensor, Tensor]:
    """Give scikit-learn's 1,797 optical digits in [0, 1], (n, 1, 8, 8), in one random order."""
    pytest.importorskip("sklearn", reason="scikit-learn ships the optical digits")
    spec = importlib.util.find_spec("sklearn")
    assert spec is not None
    assert spec.origin is not None
    with gzip.open(Path(spec.origin).parent / "datasets/data/digits.csv.gz", "rt") as lines:
        table = np.loadtxt(lines, delimiter=",", dtype=np.float32)
    table = table[np.random.default_rng(0).permutation(len(table))]
    pixels = torch.from_numpy(table[:, :-1] / 16).view(-1, 1, 8, 8)
    return pixels, torch.from_numpy(table[:, -1]).long()


@cache
def champion() -> nn.Sequential:
    """Train on the first 800 digits."""
    pixels, labels = digits()
    trained = network().train()
    optimiser = torch.optim.Adam(trained.parameters(), 3e-3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for _ in range(5):
            for chosen in torch.randperm(800).split(50):
                loss = functional.cross_entropy(trained(pixels[chosen]), labels[chosen])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
    return trained.eval()


def accuracy(of: nn.Module, world: Callable[[Tensor], Tensor]) -> float:
    """Share of right answers to the last 797 digits."""
    pixels, labels = digits()
    with torch.inference_mode():
        return (of(world(pixels[1000:])).argmax(1) == labels[1000:]).float().mean().item()


def clean(pixels: Tensor) -> Tensor:
    return pixels


def sensor(pixels: Tensor) -> Tensor:
    """Low contrast on a bright ground."""
    return 0.3 * pixels + 0.6


def dim(pixels: Tensor) -> Tensor:
    """A fifth of the light."""
    return 0.2 * pixels


def turned(pixels: Tensor) -> Tensor:
    return pixels.rot90(1, (2, 3))


def state(of: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in of.state_dict().items()}


def test_only_statistics_are_re_estimated() -> None:
    """They are the pictures' own; weights, counters, momentum and mode stay; the start is whole."""
    start = network().train()
    start[4].eval()
    before = state(start)
    tuned = reestimate(start, noise(), batch_size=40)
    after = state(tuned)
    moved = {name for name in after if not after[name].equal(before[name])}
    assert moved == {f"{i}.running_{what}" for i in (1, 4) for what in ("mean", "var")}
    stem = start[0](noise())
    torch.testing.assert_close(tuned[1].running_mean, stem.mean((0, 2, 3)))
    torch.testing.assert_close(tuned[1].running_var, stem.var((0, 2, 3)))
    assert [tuned[i].momentum for i in (1, 4)] == [0.1, 0.03]
    assert [part.training for part in tuned] == [part.training for part in start]
    assert all(value.equal(before[name]) for name, value in start.state_dict().items())


def test_pictures_of_all_batches_count_the_same() -> None:
    """Batches are of equal size, so the last ones are no lonely few; their order says nothing."""
    tuned = reestimate(network(), noise(81), batch_size=40)
    with torch.no_grad():
        stem = network()[0](noise(81))
    means = [part.mean((0, 2, 3)) for part in stem.split(27)]
    torch.testing.assert_close(tuned[1].running_mean, torch.stack(means).mean(0))


def test_a_share_keeps_some_of_the_old_statistics() -> None:
    """A quarter of the new ones is a quarter of the way."""
    start, whole = network(), reestimate(network(), noise())
    part = reestimate(start, noise(), share=0.25)
    expected = start[4].running_var + 0.25 * (whole[4].running_var - start[4].running_var)
    torch.testing.assert_close(part[4].running_var, expected)


def test_what_cannot_be_re_estimated_is_said() -> None:
    """No batch norm, no pictures, a share outside its range."""
    with pytest.raises(BatchNormError, match="Linear has no batch-norm layer"):
        reestimate(nn.Linear(2, 2), torch.zeros(3, 2))
    with pytest.raises(BatchNormError, match="at least 2 pictures, got 1"):
        reestimate(network(), noise(1))
    with pytest.raises(BatchNormError, match="share must be above 0 and at most 1, got 0"):
        reestimate(network(), noise(), share=0.0)
    with pytest.raises(BatchNormError, match="no batch-norm layer to keep a bank of"):
        open_bank(nn.Linear(2, 2), torch.zeros(3, 2))
    with pytest.raises(BatchNormError, match="a domain needs at least 2 pictures, got 1"):
        open_bank(network(), noise(1))
    with pytest.raises(BatchNormError, match="has no bank: open one with open_bank"):
        route(network(), noise())


def test_a_bank_of_one_domain_answers_as_before() -> None:
    """To rounding; its parameters keep their names and are those of the copy alone."""
    start = network().train()
    start(noise(seed=1))
    start.eval()
    bank = open_bank(start, noise())
    torch.testing.assert_close(bank(noise()), start(noise()), rtol=1e-4, atol=1e-5)
    assert [n for n, _ in bank.named_parameters()] == [n for n, _ in start.named_parameters()]
    with torch.no_grad():
        bank[1].weight.zero_()
    assert start[1].weight.all()


def test_each_picture_is_answered_by_its_own_domain() -> None:
    """In a mixed batch, answers are those of the plain network of each picture's domain."""
    bank = add_domain(open_bank(champion(), digits()[0][:200]), sensor(digits()[0][200:400]))
    mixed = torch.cat([digits()[0][400:420], sensor(digits()[0][420:440])])
    domains = route(bank, mixed)
    assert domains.tolist() == [0] * 20 + [1] * 20
    plain = torch.stack([without_bank(bank, domain)(mixed) for domain in (0, 1)])
    torch.testing.assert_close(bank(mixed), plain[domains, torch.arange(40)], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(bank(mixed[30:31]), bank(mixed)[30:31], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("world", [sensor, dim])
def test_a_changed_sensor_is_followed_without_labels(world: Callable[[Tensor], Tensor]) -> None:
    """Re-estimation wins the new world; the bank does so too, and keeps the old one."""
    pixels, _ = digits()
    bank = add_domain(open_bank(champion(), pixels[:800]), world(pixels[800:1000]))
    tuned = reestimate(champion(), world(pixels[800:1000]))
    before = accuracy(champion(), world)
    assert accuracy(tuned, world) > before + 0.2
    assert accuracy(bank, world) > before + 0.2
    assert accuracy(bank, clean) > accuracy(champion(), clean) - 0.02
    assert accuracy(bank, clean) > accuracy(tuned, clean) + 0.02


def test_a_rotation_is_not_followed() -> None:
    """What turns the pictures leaves the channels' statistics: there is nothing to win."""
    pixels, _ = digits()
    tuned = reestimate(champion(), turned(pixels[800:1000]))
    assert accuracy(tuned, turned) < accuracy(champion(), turned) + 0.1
    assert accuracy(tuned, turned) < 0.5


def test_a_third_domain_leaves_the_first_two_alone() -> None:
    """Their statistics stay to the bit, and each world is routed home."""
    pixels, _ = digits()
    two = add_domain(open_bank(champion(), pixels[:400]), sensor(pixels[400:600]))
    three = add_domain(two, 1 - pixels[600:800])
    for one, other in zip(two.modules(), three.modules(), strict=True):
        if isinstance(one, DomainNorm):
            assert (one.domains, other.domains) == (2, 3)
            assert other.running_mean[:2].equal(one.running_mean)
            assert other.running_var[:2].equal(one.running_var)
    for domain, world in enumerate((clean, sensor, lambda p: 1 - p)):
        home = (route(three, world(pixels[1000:])) == domain).float().mean().item()
        assert home > 0.95


def test_a_bank_survives_being_saved() -> None:
    """Its state is tensors by name; a fresh network with as many domains takes it."""
    bank = add_domain(open_bank(champion(), digits()[0][:200]), sensor(digits()[0][:200]))
    encoded = save(state(bank))
    fresh = with_domains(network(seed=1), 2).eval()
    fresh.load_state_dict(load(encoded))
    mixed = torch.cat([digits()[0][:20], sensor(digits()[0][:20])])
    assert fresh(mixed).equal(bank.eval()(mixed))


def test_a_bank_can_be_trained_on() -> None:
    """Scales, shifts and weights learn; the statistics of no domain move."""
    bank = add_domain(open_bank(champion(), digits()[0][:200]), sensor(digits()[0][:200])).train()
    before = state(bank)
    loss = functional.cross_entropy(bank(digits()[0][:50]), digits()[1][:50])
    loss.backward()
    assert all(value.grad is not None for value in bank.parameters())
    with torch.no_grad():
        for value in bank.parameters():
            value.sub_(0.1 * value.grad)
    moved = {name for name, value in bank.state_dict().items() if not value.equal(before[name])}
    assert moved == {name for name, _ in bank.named_parameters()}


def test_requests_in_threads_do_not_mix_their_domains() -> None:
    """Each thread's pictures are answered as if it were alone."""
    bank = add_domain(open_bank(champion(), digits()[0][:200]), sensor(digits()[0][:200]))
    worlds = [digits()[0][400:464], sensor(digits()[0][400:464])]
    expected = [bank(world) for world in worlds]
    wrong: list[int] = []

    def ask(place: int) -> None:
        found = [bank(worlds[place]) for _ in range(40)]
        if not all(torch.allclose(one, expected[place], atol=1e-4) for one in found):
            wrong.append(place)

    threads = [threading.Thread(target=ask, args=(place,)) for place in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_domain_that_is_not_there() -> None:
    """It is named, with how many there are."""
    with pytest.raises(BatchNormError, match="the bank has 1 domains, so no domain 1"):
        without_bank(open_bank(network(), noise()), 1)


def test_flat_layers_have_domains_too() -> None:
    """A batch norm over features without places keeps its kind."""
    start = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2)).eval()
    old, new = torch.randn(50, 4), torch.randn(50, 4) + 9
    bank = add_domain(open_bank(start, old), new)
    assert route(bank, torch.cat([old, new])).tolist() == [0] * 50 + [1] * 50
    torch.testing.assert_close(without_bank(bank, 1)(new), bank(new), rtol=1e-4, atol=1e-5)
