"""The frozen part runs once: hits, misses, bounds, torn files, and training from activations."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sft.cache import ActivationCache, Tail, cut, frozen_part_digest
from sft.dataset import LabelledPictures
from sft.models import ModelConfig, Network, build
from sft.pictures import Preprocessing
from sft.strategies import Strategy, StrategySettings, activations, boundary, phases
from sft.train import TrainingSettings, fine_tune

HEAD = "body.10"
SETTINGS = TrainingSettings(
    epochs=3, batch_size=16, learning_rate=1e-2, strategy=Strategy.HEAD, distillation=0.5
)


def network(seed: int = 0) -> Network:
    config = ModelConfig("small_cnn", ("a", "b", "c"), Preprocessing(8, channels=1), (0.4,), (0.3,))
    return build(config, seed=seed).eval()


def pictures(n: int = 24, seed: int = 0) -> LabelledPictures:
    """Make noise whose brightness tells the class."""
    labels = torch.arange(n) % 3
    noise = torch.randint(0, 60, (n, 1, 8, 8), generator=torch.Generator().manual_seed(seed))
    pixels = (noise + labels.view(-1, 1, 1, 1) * 80).to(torch.uint8)
    return LabelledPictures(tuple(f"{seed}/{i}" for i in range(n)), pixels, labels)


@contextmanager
def counting(of: Network) -> Iterator[list[int]]:
    """Note how many pictures each pass of the first layer sees."""
    seen: list[int] = []
    hook = of.get_submodule("body.0").register_forward_hook(
        lambda _module, given, _output: seen.append(len(given[0]))
    )
    yield seen
    hook.remove()


def test_a_hit_does_no_pass() -> None:
    """Known pictures are not run again, whatever their order; new ones are, in batches."""
    of, data, cache = network(), pictures(), ActivationCache(batch_size=20)
    with counting(of) as seen:
        first = cache.get(of, HEAD, data)
        assert seen == [20, 16]
        again = cache.get(of, HEAD, data.take(range(23, -1, -1)))
        assert seen == [20, 16]
        cache.get(of, HEAD, pictures(27))
        assert seen == [20, 16, 16]  # the first 24 are the same, and 3 are filled up
    assert torch.equal(first, again.flip(0))
    torch.testing.assert_close(first, activations(of, HEAD, data.pixels))


def test_the_same_picture_twice_runs_once() -> None:
    """What counts is the picture, not its id."""
    of, data = network(), pictures(3).take([0, 1, 0, 2, 0])
    with counting(of) as seen:
        found = ActivationCache().get(of, HEAD, data)
    assert seen == [16]  # three, filled up
    assert torch.equal(found[0], found[4])


def test_the_bits_do_not_depend_on_what_was_known() -> None:
    """A picture has the same activations alone, after others, and among others."""
    of, data = network(), pictures(40)
    whole = ActivationCache().get(of, HEAD, data)
    piecewise = ActivationCache()
    for places in ([3], [9, 4], range(20), range(40)):
        piecewise.get(of, HEAD, data.take(places))
    assert torch.equal(piecewise.get(of, HEAD, data), whole)


def test_other_weights_miss_and_a_new_head_hits() -> None:
    """Weights, statistics and preprocessing before the boundary count, those after it do not."""
    of, data, cache = network(), pictures(), ActivationCache()
    cache.get(of, HEAD, data)
    with torch.no_grad():
        of.head.weight.zero_()
    with counting(of) as seen:
        cache.get(of, HEAD, data)
        assert seen == []
        with torch.no_grad():
            of.get_submodule("body.8").bias[0] += 1  # type: ignore[union-attr]
        changed = cache.get(of, HEAD, data)
        assert seen == [24]
    torch.testing.assert_close(changed, activations(of, HEAD, data.pixels))
    other = Network(replace(of.config, mean=(0.5,)), of.body)
    assert frozen_part_digest(other, HEAD) != frozen_part_digest(of, HEAD)
    assert frozen_part_digest(of, "body.8") != frozen_part_digest(of, HEAD)


def test_the_memory_is_bounded_and_the_least_recently_used_goes() -> None:
    """A set is returned whole even when little of it can be kept."""
    of, data = network(), pictures(4)
    row = 128 * 4
    cache = ActivationCache(3 * row)
    cache.get(of, HEAD, data.take([0, 1, 2]))
    cache.get(of, HEAD, data.take([0]))
    assert len(cache.get(of, HEAD, data.take([3]))) == 1  # in the place of 1
    assert cache.bytes == 3 * row
    with counting(of) as seen:
        cache.get(of, HEAD, data.take([0, 2, 3]))
        assert seen == []
        assert len(cache.get(of, HEAD, data)) == 4
        assert seen == [16]  # one, filled up
    nothing = ActivationCache(0)
    assert len(nothing.get(of, HEAD, data)) == 4
    assert nothing.bytes == 0


def test_a_folder_serves_another_process(tmp_path: Path) -> None:
    """A second cache on the same folder does no pass, and gives the same bits."""
    of, data = network(), pictures()
    first = ActivationCache(folder=tmp_path).get(of, HEAD, data)
    with counting(of) as seen:
        again = ActivationCache(folder=tmp_path).get(of, HEAD, data.take([5, 3]))
    assert seen == []
    assert torch.equal(again, first[[5, 3]])
    assert [path.suffix for path in tmp_path.glob("*/*")] == [".safetensors"]


@pytest.mark.parametrize("damage", ["cut", "empty", "zeros", "flipped"])
def test_a_torn_file_is_computed_again(tmp_path: Path, damage: str) -> None:
    """Whatever a crash left in the file, nothing of it is used, and a whole one takes its place."""
    of, data = network(), pictures()
    first = ActivationCache(folder=tmp_path).get(of, HEAD, data)
    path = next(tmp_path.glob("*/*"))
    whole = path.read_bytes()
    path.write_bytes(
        {
            "cut": whole[:-7],
            "empty": b"",
            "zeros": bytes(len(whole)),
            "flipped": whole[:-1] + bytes([whole[-1] ^ 1]),
        }[damage]
    )
    with counting(of) as seen:
        again = ActivationCache(folder=tmp_path).get(of, HEAD, data)
    assert seen == [24]
    assert torch.equal(again, first)
    assert path.read_bytes() == whole


def test_the_folder_is_bounded(tmp_path: Path) -> None:
    """The file that was used longest ago goes; one that is too large is not written."""
    of = network()
    cache = ActivationCache(0, folder=tmp_path, max_folder_bytes=30_000)
    cache.get(of, HEAD, pictures(seed=1))
    oldest = set(tmp_path.glob("*/*"))
    cache.get(of, HEAD, pictures(seed=2))
    assert oldest < set(tmp_path.glob("*/*"))
    cache.get(of, HEAD, pictures(seed=3))
    kept = set(tmp_path.glob("*/*"))
    assert len(kept) == 2
    assert not oldest & kept
    cache.get(of, HEAD, pictures(90, seed=4))
    assert set(tmp_path.glob("*/*")) == kept


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    """A file stands where the folder should be: the activations come anyway."""
    (tmp_path / "cache").write_text("")
    cache = ActivationCache(folder=tmp_path / "cache")
    assert len(cache.get(network(), HEAD, pictures())) == 24


def test_what_a_check_has_computed_is_taken() -> None:
    """Activations that are put in are found, and must be as many as the pictures."""
    of, data, cache = network(), pictures(), ActivationCache()
    cache.put(of, HEAD, data, of.embed(data.pixels)[0])
    with counting(of) as seen:
        found = cache.get(of, HEAD, data)
    assert seen == []
    torch.testing.assert_close(found, activations(of, HEAD, data.pixels))
    with pytest.raises(ValueError, match="3 activations for 24 pictures"):
        cache.put(of, HEAD, data, torch.zeros(3, 128))


def test_an_empty_set_has_the_shape_of_a_row() -> None:
    """No picture, no row, but the right width."""
    assert ActivationCache().get(network(), HEAD, pictures(0)).shape == (0, 128)


def test_a_module_that_ends_no_frozen_part_is_refused() -> None:
    """The message names those that do."""
    with pytest.raises(ValueError, match=r"no frozen part ends at body\.9: .*body\.10"):
        ActivationCache().get(network(), "body.9", pictures())


@pytest.mark.parametrize(
    ("name", "value"), [("max_bytes", -1), ("max_folder_bytes", -1), ("batch_size", 0)]
)
def test_bounds_out_of_range_are_named(name: str, value: int) -> None:
    """Each by its name."""
    with pytest.raises(ValueError, match=name):
        ActivationCache(**{name: value})


@pytest.mark.parametrize("at", ["body.3", "body.8", HEAD])
def test_the_tail_answers_as_the_network_does(at: str) -> None:
    """It runs nothing of the frozen part, and shares the weights that follow."""
    of, data = network(), pictures()
    given = ActivationCache().get(of, at, data)
    tail = Tail(of, at)
    with counting(of) as seen, torch.no_grad():
        answers = tail(given)
    assert seen == []
    torch.testing.assert_close(answers, of(data.pixels))
    assert tail.head is of.head
    assert {name for name, _ in tail.named_parameters()} < {n for n, _ in of.named_parameters()}


def tune(start: Network, fresh: LabelledPictures, memory: LabelledPictures) -> dict[str, Tensor]:
    return fine_tune(start, fresh, SETTINGS, memory=memory).network.state_dict()


def test_tuning_the_head_from_activations_is_tuning_the_head() -> None:
    """The one loop ends at the same head, with rehearsal, L2-SP and distillation."""
    of, fresh, memory = network(), pictures(seed=1), pictures(40, seed=2)
    phase = phases(of, SETTINGS)[0]
    part = cut(of, phase, ActivationCache(), fresh, memory=memory)
    assert part is not None
    ((given, old),) = part.views
    assert old is not None
    whole, rest = tune(of, fresh, memory), tune(part.network, given, old)
    assert not torch.equal(whole["body.10.weight"], of.state_dict()["body.10.weight"])
    for name, value in rest.items():
        torch.testing.assert_close(value, whole[name], rtol=1e-5, atol=1e-5)


def test_the_whole_network_learns_what_its_tail_learns() -> None:
    """They are the same weights: nothing has to be copied back."""
    of, data = network(), pictures()
    before = of.head.weight.detach().clone()
    tail = Tail(of, HEAD)
    tail(ActivationCache().get(of, HEAD, data)).sum().backward()
    torch.optim.SGD(tail.parameters(), lr=0.1).step()
    assert not torch.equal(of.head.weight, before)


def test_augmented_views_are_drawn_once_for_each_turn() -> None:
    """Each view has its own activations; validation has none; another training finds them again."""
    of, data, held, cache = network(), pictures(), pictures(6, seed=9), ActivationCache()
    phase = phases(of, SETTINGS)[0]

    def noisy(given: LabelledPictures, generator: torch.Generator) -> Tensor:
        return given.pixels ^ torch.randint(
            0, 8, given.pixels.shape, generator=generator, dtype=torch.uint8
        )

    def made(views: int) -> list[Tensor] | None:
        part = cut(of, phase, cache, data, validation=(held,), change=noisy, views=views)
        if part is None:
            return None
        torch.testing.assert_close(part.validation[0].pixels, activations(of, HEAD, held.pixels))
        return [fresh.pixels for fresh, _ in part.views]

    views = made(3)
    assert views is not None
    assert len({tuple(view[0].tolist()) for view in views}) == 3
    with counting(of) as seen:
        again = made(2)
    assert max(seen) <= 6  # a check of the cut and this test's own pass, but no view
    assert again is not None
    assert all(torch.equal(one, other) for one, other in zip(again, views, strict=False))
    assert made(0) is None


def test_nothing_is_cut_where_it_would_be_wrong() -> None:
    """Everything moves; no room; or something else than the boundary leads to the rest."""
    of, data = network(), pictures()
    full = phases(of, StrategySettings())[0]
    head = phases(of, SETTINGS)[0]
    assert cut(of, full, ActivationCache(), data) is None
    assert cut(of, head, ActivationCache(24 * 128 * 4 - 1), data) is None
    assert cut(of, head, ActivationCache(24 * 128 * 4), data) is not None

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(64, 8), nn.Linear(8, 3)

        def forward(self, scaled: Tensor) -> Tensor:
            hidden = self.first(scaled.flatten(1))
            return self.last(hidden.relu()) + hidden[:, :3]

    class Asks(Around):
        def forward(self, scaled: Tensor) -> Tensor:
            hidden = self.first(scaled.flatten(1))
            return self.last(hidden.view(-1, self.first.out_features))

    for body in (Around(), Asks()):
        around = Network(of.config, body)
        phase = phases(around, SETTINGS)[0]
        assert boundary(around, phase) == "body.last"
        assert cut(around, phase, ActivationCache(), data) is None

    class CountsPictures(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.middle = nn.Linear(64, 8), nn.Linear(8, 8)
            self.last = nn.Linear(8, 3)

        def forward(self, scaled: Tensor) -> Tensor:
            hidden = self.middle(self.first(scaled.flatten(1)).relu())
            return self.last(hidden.view(len(scaled), -1))

    counts = Network(of.config, CountsPictures())
    phase = phases(counts, StrategySettings(train_last=1))[0]
    assert boundary(counts, phase) == "body.middle"
    assert cut(counts, phase, ActivationCache(), data) is None
