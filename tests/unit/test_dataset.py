"""Roles that never change, and batches that mix fresh with old samples."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sft.dataset import LabelledPictures, Role, batches, join, role_of


def pictures(n: int, *, first: int = 0, prefix: str = "b") -> LabelledPictures:
    """Make pictures whose every pixel, like the label, is the sample's number."""
    numbers = torch.arange(first, first + n)
    pixels = numbers.to(torch.uint8).view(n, 1, 1, 1).expand(n, 1, 2, 2).clone()
    return LabelledPictures(tuple(f"{prefix}/{i}" for i in numbers.tolist()), pixels, numbers)


def one_pass(
    fresh: LabelledPictures,
    memory: LabelledPictures | None,
    *,
    batch_size: int = 16,
    rehearsal: float = 0.5,
    seed: int = 0,
) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    given = batches(fresh, memory, batch_size=batch_size, rehearsal=rehearsal, generator=generator)
    return [(pixels, labels) for pixels, labels, *_ in given]


@pytest.mark.parametrize(
    ("sample_id", "role"),
    [
        ("", Role.TRAIN),
        ("2026-11-21T10/a.jpg", Role.HOLDOUT),
        ("2026-11-21T10/b.jpg", Role.TRAIN),
        ("köln/straße 1.png", Role.TRAIN),
        ("batch-0001/0007.png", Role.TRAIN),
    ],
)
def test_roles_never_change(sample_id: str, role: Role) -> None:
    """These were told at the first release; another answer would train on somebody's hold-out."""
    assert role_of(sample_id) is role


@pytest.mark.parametrize(
    ("split", "roles"),
    [
        ("train", {Role.TRAIN: 400}),
        ("val", {Role.VALIDATION: 400}),
        ("valid", {Role.VALIDATION: 400}),
        ("validation", {Role.VALIDATION: 400}),
        ("test", {Role.HOLDOUT: 400}),
        ("train+val", {Role.TRAIN: 343, Role.VALIDATION: 57}),  # 6 to 1
        ("val+test", {Role.VALIDATION: 100, Role.HOLDOUT: 300}),  # 1 to 3
    ],
)
def test_a_split_decides_the_role(split: str, roles: dict[Role, int]) -> None:
    """A sample of the user's own split has its role; one that stands for two is shared out."""
    counts = Counter(role_of(f"b/{split}//cat/{i}.png") for i in range(400))
    assert counts.keys() == roles.keys()
    assert all(abs(counts[role] - n) <= 30 for role, n in roles.items())


@pytest.mark.parametrize("name", ["train/{}.png", "test/deep/{}.png", "x//test/{}.png", "test//"])
def test_a_class_called_train_is_no_split(name: str) -> None:
    """Without the mark below the batch, a folder's name has no say."""
    ids = [f"b{i}/" * ("{}" not in name) + f"b/{name}".format(i) for i in range(100)]
    assert {role_of(sample_id) for sample_id in ids} == set(Role)


def test_roles_have_their_shares() -> None:
    """Of 10,000 ids, 30 % are held out, 10 % validate and 60 % train, to within 1.5 points."""
    counts = Counter(role_of(f"batch-{i // 100}/{i % 100:04}.jpg") for i in range(10_000))
    assert counts[Role.HOLDOUT] == pytest.approx(3000, abs=150)
    assert counts[Role.VALIDATION] == pytest.approx(1000, abs=100)
    assert counts[Role.TRAIN] == pytest.approx(6000, abs=150)


def test_roles_split_a_set_without_rest() -> None:
    """Each sample is in the set of its own role, in the old order, with its picture and label."""
    data = pictures(200)
    parts = [data.with_role(role) for role in Role]
    assert all(len(part) for part in parts)
    assert sorted(name for part in parts for name in part.sample_ids) == sorted(data.sample_ids)
    for role, part in zip(Role, parts, strict=True):
        assert {role_of(name) for name in part.sample_ids} == {role}
        assert [f"b/{label}" for label in part.labels.tolist()] == list(part.sample_ids)
        assert torch.equal(part.pixels[:, 0, 0, 0].long(), part.labels)
        assert part.labels.tolist() == sorted(part.labels.tolist())


def test_parts_of_unequal_length_are_refused() -> None:
    """The message counts them."""
    with pytest.raises(ValueError, match="2 ids, 3 pictures and 3 labels do not belong together"):
        LabelledPictures(("a", "b"), torch.zeros(3, 1, 2, 2, dtype=torch.uint8), torch.zeros(3))


def test_nothing_taken_is_an_empty_set() -> None:
    """An empty choice keeps the shape of the pictures, so that sets can be joined."""
    none = pictures(3).take([])
    assert none.pixels.shape == (0, 1, 2, 2)
    both = join([none, pictures(3).take([2, 0]), pictures(1, first=9)])
    assert both.sample_ids == ("b/2", "b/0", "b/9")
    assert both.labels.tolist() == both.pixels[:, 0, 0, 0].tolist() == [2, 0, 9]
    with pytest.raises(ValueError, match="nothing to join"):
        join([])


def test_a_small_memory_is_repeated_to_its_share() -> None:
    """Three old samples fill a half of eight, each two or three times."""
    [(_, labels), *_] = one_pass(pictures(8), pictures(3, first=100))
    assert sorted(Counter(labels[labels >= 100].tolist()).values()) == [2, 3, 3]


@pytest.mark.parametrize("memory", [None, pictures(0)])
def test_without_memory_a_batch_is_full_of_fresh_samples(memory: LabelledPictures | None) -> None:
    """No room is kept for old samples that there are not."""
    assert [len(labels) for _, labels in one_pass(pictures(40), memory)] == [16, 16, 8]


def test_old_samples_are_drawn_uniformly() -> None:
    """Over many batches each old sample is rehearsed about as often as any other."""
    given = one_pass(pictures(200).take([0] * 4000), pictures(20, first=100), batch_size=16)
    counts = Counter(label for _, labels in given for label in labels.tolist() if label >= 100)
    mean = 4000 / 20
    assert sum(counts.values()) == 4000
    chi_square = sum((counts[label] - mean) ** 2 / mean for label in range(100, 120))
    assert chi_square < 43.8  # p = .001 at 19 degrees of freedom


def test_the_order_is_the_seeds() -> None:
    """The same seed gives the same batches, and another seed another order."""
    one, same, other = (
        torch.cat([labels for _, labels in one_pass(pictures(50), pictures(50), seed=seed)])
        for seed in (1, 1, 2)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_a_share_near_one_still_learns() -> None:
    """At least one sample of a batch is fresh."""
    given = one_pass(pictures(3), pictures(100, first=100), batch_size=4, rehearsal=0.99)
    assert [int((labels < 100).sum()) for _, labels in given] == [1, 1, 1]


@pytest.mark.parametrize(("size", "share"), [(1, 0.5), (2, 0.2), (4, 0.1)])
def test_a_small_share_still_rehearses(size: int, share: float) -> None:
    """A sample of each batch is old, where its share of the batch is less than half a one."""
    given = one_pass(pictures(4), pictures(9, first=100), batch_size=size, rehearsal=share)
    assert {int((labels >= 100).sum()) for _, labels in given} == {1}
    none = one_pass(pictures(4), pictures(9, first=100), batch_size=size, rehearsal=0.0)
    assert all((labels < 100).all() for _, labels in none)


def test_a_last_batch_of_one_joins_the_one_before() -> None:
    """Batch norm cannot learn from a single sample, so no batch has one."""
    data = LabelledPictures(
        tuple(map(str, range(9))), torch.zeros(9, 1, 2, 2, dtype=torch.uint8), torch.arange(9)
    )
    generator = torch.Generator().manual_seed(0)
    sizes = [
        len(labels)
        for _, labels, *_ in batches(data, None, batch_size=4, rehearsal=0.0, generator=generator)
    ]
    assert sizes == [4, 5]


def test_weights_go_with_their_samples() -> None:
    """Chosen, joined and in batches, a sample keeps its weight; where none was given it is 1."""
    data = replace(pictures(6), weights=torch.arange(6) / 10)
    assert data.take([5, 0]).shares.tolist() == pytest.approx([0.5, 0])
    both = join([data, pictures(2, first=100)])
    generator = torch.Generator().manual_seed(0)
    given = batches(both, pictures(4, first=200), batch_size=4, rehearsal=0.5, generator=generator)
    told = {
        label: share
        for _, labels, _, shares in given
        for label, share in zip(labels.tolist(), shares.tolist(), strict=True)
    }
    assert {label: told[label] for label in range(6)} == pytest.approx(
        {label: label / 10 for label in range(6)}
    )
    assert all(share == 1 for label, share in told.items() if label >= 100)
    with pytest.raises(ValueError, match="6 labels, but 5 weights"):
        replace(data, weights=torch.ones(5))
