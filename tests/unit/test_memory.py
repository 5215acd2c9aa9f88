"""What a version carries of its past."""

from pathlib import Path

import pandas as pd
import pytest
import torch

from sft.dataset import LabelledPictures, Role
from sft.memory import COLUMNS, Memory, remember
from sft.pictures import Preprocessing

CLASSES = ("cat", "dog", "eel")
GREY = Preprocessing(4, resize_size=9, channels=1)


def pictures(n: int, *, first: int = 0, channels: int = 1, seed: int = 0) -> LabelledPictures:
    generator = torch.Generator().manual_seed(seed + first)
    pixels = torch.randint(0, 256, (n, channels, 4, 4), dtype=torch.uint8, generator=generator)
    labels = torch.arange(n) % 4 - 1  # every fourth has no label
    return LabelledPictures(tuple(f"b/{first + i:04}" for i in range(n)), pixels, labels)


def memory(n: int, role: Role = Role.HOLDOUT, regime: str = "first", *, first: int = 0) -> Memory:
    return remember(pictures(n, first=first), CLASSES, [role] * n, regime)


def ids(part: Memory) -> set[str]:
    return set(part.table["sample_id"])


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_come_back_without_loss(channels: int, tmp_path: Path) -> None:
    """Through PNG and Parquet every pixel, label and id stays, and the resize is not done twice."""
    data = pictures(9, channels=channels)
    preprocessing = Preprocessing(4, resize_size=9, channels=channels)
    kept = remember(data, CLASSES, [Role.HOLDOUT] * 9, "first")
    kept.save(tmp_path / "m.parquet")
    again = Memory.load(tmp_path / "m.parquet").held_out("first", CLASSES, preprocessing)
    assert again.sample_ids == data.sample_ids
    assert torch.equal(again.pixels, data.pixels)
    assert torch.equal(again.labels, data.labels)


@pytest.mark.parametrize("n", [0, 1, 8])
def test_saved_and_loaded_it_is_the_same(n: int, tmp_path: Path) -> None:
    """A memory without rows, or without any label, makes the round trip too."""
    before = memory(n)
    before.save(tmp_path / "m.parquet")
    after = Memory.load(tmp_path / "m.parquet")
    assert tuple(after.table.columns) == COLUMNS
    assert len(after) == n
    assert after.table["label"].isna().tolist() == before.table["label"].isna().tolist()
    for column in ("sample_id", "role", "regime", "image"):
        assert after.table[column].tolist() == before.table[column].tolist()
    assert after.regimes == before.regimes
    assert len(after.extended(memory(2, first=90))) == n + 2
    assert len(after.bounded(rehearsal=1, holdout=1)) == min(n, 1)


def test_another_table_is_refused() -> None:
    """The message gives the columns."""
    with pytest.raises(ValueError, match=r"a memory has the columns .*got \['sample_id'\]"):
        Memory(pd.DataFrame({"sample_id": ["a"]}))


def test_only_labelled_samples_of_the_role_are_rehearsed() -> None:
    """No unlabelled sample, none of another role, and none of a class that is not asked for."""
    both = memory(8, Role.TRAIN).extended(memory(8, Role.VALIDATION, first=100))
    train = both.labelled(Role.TRAIN, CLASSES, GREY)
    assert train.sample_ids == ("b/0001", "b/0002", "b/0003", "b/0005", "b/0006", "b/0007")
    assert train.labels.tolist() == [0, 1, 2, 0, 1, 2]
    turned = both.labelled(Role.TRAIN, ("eel", "cat"), GREY)
    assert turned.sample_ids == ("b/0001", "b/0003", "b/0005", "b/0007")
    assert turned.labels.tolist() == [1, 0, 1, 0]
    none = both.labelled(Role.HOLDOUT, CLASSES, GREY)
    assert len(none) == 0
    assert none.pixels.shape == (0, 1, 4, 4)


def test_what_was_learned_does_not_stand_for_a_regime() -> None:
    """Held-out samples of the regime, labelled or not, without those that a version learned."""
    both = memory(4).extended(memory(4, regime="second", first=100))
    both = both.extended(memory(4, Role.TRAIN, first=200))
    held = both.held_out("first", CLASSES, GREY, learned={"b/0001", "b/0100"})
    assert held.sample_ids == ("b/0000", "b/0002", "b/0003")
    assert held.labels.tolist() == [-1, 1, 2]
    assert both.regimes == ("first", "second")


def test_a_bounded_memory_is_bounded_by_role_and_regime() -> None:
    """Train and validation have one bound each, and every regime its own hold-out."""
    whole = memory(40, Role.TRAIN).extended(memory(40, Role.VALIDATION, first=100))
    whole = whole.extended(memory(40, first=200)).extended(memory(5, regime="new", first=300))
    kept = whole.bounded(rehearsal=12, holdout=9)
    counts = kept.table.groupby(["role", "regime"]).size().to_dict()
    assert counts == {
        ("train", "first"): 12,
        ("validation", "first"): 12,
        ("holdout", "first"): 9,
        ("holdout", "new"): 5,
    }
    assert kept.regimes == whole.regimes
    places = [list(whole.table["sample_id"]).index(name) for name in kept.table["sample_id"]]
    assert places == sorted(places)
    assert tuple(kept.table.columns) == COLUMNS


def test_labelled_samples_are_kept_first() -> None:
    """Of 40 held-out samples 30 have a label: a bound of 30 keeps just these."""
    kept = memory(40).bounded(rehearsal=0, holdout=30)
    assert kept.table["label"].notna().all()
    more = memory(40).bounded(rehearsal=0, holdout=33)
    assert ids(kept) < ids(more)
    assert more.table["label"].isna().sum() == 3


def test_a_bounded_memory_changes_little_from_version_to_version() -> None:
    """Bounding twice is bounding once, the order does not matter, and newcomers push out few."""
    whole = memory(300, Role.TRAIN)
    kept = whole.bounded(rehearsal=100, holdout=0)
    assert ids(kept.bounded(rehearsal=40, holdout=0)) == ids(whole.bounded(rehearsal=40, holdout=0))
    turned = Memory(whole.table.iloc[::-1].reset_index(drop=True))
    assert ids(turned.bounded(rehearsal=100, holdout=0)) == ids(kept)
    grown = whole.extended(memory(30, Role.TRAIN, first=900))
    after = grown.bounded(rehearsal=100, holdout=0)
    assert ids(kept.extended(memory(30, Role.TRAIN, first=900)).bounded(rehearsal=100, holdout=0))
    stayed = len(ids(kept) & ids(after))
    assert 80 <= stayed < 100
    assert ids(after) - ids(kept) <= {f"b/{i:04}" for i in range(900, 930)}


def test_a_bounded_memory_is_a_uniform_sample() -> None:
    """Of 2,000 samples the kept 500 come evenly from all ten parts of the order."""
    kept = Memory(
        pd.DataFrame(
            {
                "sample_id": [f"b/{i:04}" for i in range(2000)],
                "label": "cat",
                "role": "train",
                "regime": "first",
                "image": b"",
                "about": "{}",
            }
        )
    ).bounded(rehearsal=500, holdout=0)
    tenths = (kept.table["sample_id"].str[2:].astype(int) // 200).value_counts()
    assert len(tenths) == 10
    assert ((tenths - 50) ** 2 / (50 * 0.75)).sum() < 27.9  # p = .001 at 9 degrees of freedom


def test_a_newer_sample_replaces_the_older() -> None:
    """A sample in both memories has the newer label and role, in the regime that it came from."""
    old = memory(3)
    newer = remember(pictures(2, first=2, seed=9), ("x", "y"), [Role.TRAIN] * 2, "second")
    table = old.extended(newer).table
    assert table["sample_id"].tolist() == ["b/0000", "b/0001", "b/0002", "b/0003"]
    assert table["role"].tolist() == ["holdout", "holdout", "train", "train"]
    assert table["regime"].tolist() == ["first", "first", "first", "second"]
    assert table["image"].tolist()[2:] == newer.table["image"].tolist()
    assert len(old) == 3
    empty = memory(0)
    assert ids(old.extended(empty)) == ids(empty.extended(old)) == ids(old)


def test_pixels_by_id() -> None:
    """Those that it holds, and nothing for those that it does not."""
    kept = memory(3)
    found = kept.pixels(["b/0002", "gone"], Preprocessing(4, channels=1))
    assert list(found) == ["b/0002"]
    assert torch.equal(found["b/0002"], pictures(3).pixels[2])


def test_what_came_with_a_sample_stays_with_it() -> None:
    """Whatever JSON can hold, through growing and bounding."""
    told = {"b/0001": {"size": [7, 5, 3], "metadata": {"camera": "Ä"}}}
    kept = remember(pictures(3), CLASSES, [Role.HOLDOUT] * 3, "first", told)
    grown = kept.extended(memory(2, first=50)).bounded(rehearsal=1, holdout=9)
    assert grown.about(["b/0001", "b/0002"]) == [told["b/0001"], {}]


def test_late_labels_fill_what_has_none() -> None:
    """A label that is there already stays, and one for a sample that is not there adds nothing."""
    told = memory(8).told({"b/0000": "eel", "b/0001": "eel", "elsewhere/1": "cat"})
    labels = dict(zip(told.table["sample_id"], told.table["label"], strict=True))
    assert labels["b/0000"] == "eel"
    assert labels["b/0001"] == "cat"
    assert pd.isna(labels["b/0004"])
    assert len(told) == 8
    assert len(memory(0).told({"b/0000": "eel"})) == 0
