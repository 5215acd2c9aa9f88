"""A batch that is read in shards is the batch that is read whole, whatever is in it."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from samples import SEEN, bomb, parquet, picture, write

from flows import shards
from flows.batches import Contents
from flows.feed import FeedSettings, list_batches
from flows.intake import TooManyBad
from flows.settings import MachineSettings, Settings
from flows.shards import Seen, Shard, see_batch
from sft.models import ModelConfig, Network, build

WHOLE = 10_000


@cache
def networks() -> list[Network]:
    """A champion and a challenger in the shadow."""
    config = ModelConfig("small_cnn", ("cat", "dog"), SEEN, (0.5,) * 3, (0.5,) * 3)
    return [build(config, seed=seed) for seed in (0, 1)]


def seen(root: Path, size: int, without: Sequence[str] = (), bad: float = 0.9) -> Seen:
    (batch,) = list_batches(FeedSettings(), root)
    settings = Settings(
        root / "sustain.toml",
        feed=FeedSettings(max_bad_share=bad),
        compute=MachineSettings(shard_pictures=size),
    )
    return see_batch(batch, settings, networks(), without)


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let shards go to another process and back, as Ray sends them; notes how many there were.

    What runs them is shown with a real task runner among the integration tests.
    """
    counts = []

    def mapped(
        work: Callable[[Contents], Shard], parts: Sequence[Contents], machine: MachineSettings
    ) -> list[Shard]:
        del machine
        counts.append(len(parts))
        told = [pickle.loads(pickle.dumps((work, part))) for part in parts]  # noqa: S301
        return [pickle.loads(pickle.dumps(call(part))) for call, part in told]  # noqa: S301

    monkeypatch.setattr(shards, "_mapped", mapped)
    return counts


def batch_with_everything(root: Path) -> None:
    """Labels, columns, bad files, copies within and across shards, and one id for two pictures."""
    rows = [f"{i}.png,{'cat' if i % 2 else 'dog'},{i if i < 5 else 'x'}" for i in range(9)]
    write(
        root / "feed/b",
        {
            **{f"{i}.png": picture(i) for i in range(9)},
            "broken.png": b"nothing",
            "bomb.png": bomb(),
            "empty.png": b"",
            "metadata.csv": "\n".join(["file_name,label,camera", *rows, ""]),
            "notes.txt": "x",
            "one.parquet": parquet(
                file_name=["p.png", "3.png", "4.png"],
                image=[picture(20), picture(3), picture(99)],
                label=["dog", "dog", "cat"],
            ),
            "two.parquet": parquet(
                file_name=["p.png", "q.png", None],
                image=[picture(20), b"nothing", picture(21)],
                label=["dog", "cat", "cat"],
            ),
            "torn.parquet": b"PAR1",
        },
    )


@pytest.mark.parametrize("size", [1, 4])
def test_shards_say_what_the_whole_says(root: Path, elsewhere: list[int], size: int) -> None:
    """Samples, labels, columns, quarantine, notes and features are those of a whole reading."""
    batch_with_everything(root)
    without = ["b/2.png", "b/q.png"]
    whole, parts = seen(root, WHOLE, without), seen(root, size, without)
    assert elsewhere == [-(-11 // size) + 3]
    pd.testing.assert_frame_equal(whole.read.samples, parts.read.samples)
    assert sorted(map(str, whole.read.quarantined)) == sorted(map(str, parts.read.quarantined))
    assert len(whole.read.quarantined) >= 5
    assert sorted(whole.read.notes) == sorted(parts.read.notes)
    assert whole.read.sizes == parts.read.sizes
    for one, other in zip(whole.tables, parts.tables, strict=True):
        assert one.sample_ids == other.sample_ids
        assert not {"b/2.png", "b/4.png"} & set(one.sample_ids)
        np.testing.assert_allclose(one.embedding, other.embedding, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(one.probabilities, other.probabilities, rtol=1e-5, atol=1e-6)
        pd.testing.assert_frame_equal(one.statistics, other.statistics)
        pd.testing.assert_frame_equal(one.metadata, other.metadata)
    wanted = {"b/0.png", "b/p.png", "elsewhere/1.png"}
    ours, theirs = whole.pictures(wanted), parts.pictures(wanted)
    assert ours.keys() == theirs.keys() == {"b/0.png", "b/p.png"}
    assert all(torch.equal(pixels, theirs[name]) for name, pixels in ours.items())


def test_large_shards_give_the_same_bits(root: Path, elsewhere: list[int]) -> None:
    """Passes of 16 pictures and more round alike."""
    write(root / "feed/b", {f"{i:03}.png": picture(i) for i in range(64)})
    whole, parts = seen(root, WHOLE), seen(root, 16)
    assert elsewhere == [4]
    for one, other in zip(whole.tables, parts.tables, strict=True):
        assert np.array_equal(one.embedding, other.embedding)
        assert np.array_equal(one.probabilities, other.probabilities)


def test_a_small_batch_stays_whole(root: Path, elsewhere: list[int]) -> None:
    """Nothing is sent anywhere."""
    batch_with_everything(root)
    assert len(seen(root, 11).tables) == 2
    assert elsewhere == []


def test_shards_are_judged_together(root: Path, elsewhere: list[int]) -> None:
    """A shard of nothing but bad pictures is no reason by itself; too many in all are one."""
    good = {f"{i}.png": picture(i) for i in range(8)}
    write(root / "feed/b", {**good, "x.png": b"nothing", "y.png": b"nothing"})
    assert len(seen(root, 2, bad=0.2).tables[0]) == 8
    assert elsewhere == [5]
    with pytest.raises(TooManyBad, match="2 of 10 pictures"):
        seen(root, 2, bad=0.1)


def test_what_is_known_already_is_not_looked_at(root: Path, elsewhere: list[int]) -> None:
    """With every sample known there is no table, as with a whole reading."""
    write(root / "feed/b", {f"{i}.png": picture(i) for i in range(4)})
    known = [f"b/{i}.png" for i in range(4)]
    assert seen(root, 2, known).tables == ()
    assert len(seen(root, 2, known[:3]).tables[0]) == 1
    assert elsewhere == [2, 2]
