"""What moved, and which pictures are farthest from what is known."""

import numpy as np
import pandas as pd
import pytest

from monitoring.explain import farthest, moved_columns, moved_dimensions
from monitoring.features import FeatureTable, concatenate
from monitoring.reference import Reference, Regime, portions

CLASSES = ("a", "b", "c")


def table(seed: int, n: int, place: float = 0.0, name: str = "b") -> FeatureTable:
    rng = np.random.default_rng(seed)
    embedding = (rng.standard_normal((n, 4)) * [4, 3, 2, 1]).astype(np.float32)
    embedding[:, 3] += place
    p = rng.dirichlet(np.ones(3), n).astype(np.float32)
    statistics = pd.DataFrame({"brightness": rng.random(n)})
    return FeatureTable(tuple(f"{name}/{i}" for i in range(n)), embedding, p, statistics)


def reference(n: int = 300) -> Reference:
    worlds = [
        Regime(name, table(i, n, place, name), np.full(n, -1))
        for i, (name, place) in enumerate({"photo": 0.0, "sketch": 40.0}.items())
    ]
    return Reference(tuple(worlds), CLASSES)


def one_world(n: int = 300) -> Reference:
    return Reference(reference(n).regimes[:1], CLASSES)


def test_the_dimensions_that_moved_are_named_with_their_moves() -> None:
    """A move along the second axis of variance is that dimension's, in standard deviations."""
    batch = table(5, 100)
    batch.embedding[:, 1] += 6
    moved = moved_dimensions(one_world(), batch)[0]
    assert moved.name == "dimension 2"
    assert moved.index == 1
    assert abs(moved.move) == pytest.approx(2, abs=0.5)


def test_the_largest_part_is_the_one_described() -> None:
    """In a batch of two worlds, the moves are those of the larger part, and k at most."""
    sketches = table(6, 80, place=40.0)
    sketches.embedding[:, :3] += [8, 9, 2]
    moved = moved_dimensions(reference(), concatenate([table(5, 40), sketches]), k=2)
    assert [m.index for m in moved] == [1, 0]


def test_quiet_batches_move_no_dimension() -> None:
    """Batches of the reference's own world name next to nothing."""
    known = one_world()
    assert sum(len(moved_dimensions(known, table(i, 50))) for i in range(10, 30)) <= 1


def test_the_farthest_come_first_with_their_regime_and_likeness() -> None:
    """Planted strays are named with their world and the reference row that they are nearest to."""
    known = reference()
    known.regimes[1].features.embedding[123, 0] += 60
    batch = concatenate([table(7, 50), table(8, 50, 40.0, "new")])
    batch.embedding[10, 0] += 60
    batch.embedding[70] = known.regimes[1].features.embedding[123]
    batch.embedding[70, 0] += 30
    strays = farthest(known, batch, k=3)
    assert {(s.sample_id, s.regime) for s in strays[:2]} == {
        ("new/20", "sketch"),
        ("b/10", "photo"),
    }
    nearest = {s.sample_id: s.nearest_id for s in strays}
    assert nearest["new/20"] == "sketch/123"
    assert nearest["b/10"].startswith("photo/")
    assert [s.distance for s in strays] == sorted((s.distance for s in strays), reverse=True)


def test_copies_are_shown_once() -> None:
    """Of twenty copies of the farthest picture one is named, before the others of the batch."""
    batch = table(9, 60)
    batch.embedding[:20] = [50, 0, 0, 0]
    batch.embedding[20:23, 1] += [30, -30, 60]
    named = {s.sample_id for s in farthest(one_world(), batch, k=6)}
    assert len(named & {f"b/{i}" for i in range(20)}) == 1
    assert {"b/20", "b/21", "b/22"} <= named


def test_fewer_samples_than_wanted_are_all_named() -> None:
    """Five pictures give five strays, also against a reference of ten rows."""
    assert len(farthest(one_world(10), table(3, 5), k=12)) == 5
    assert len(moved_dimensions(one_world(10), table(3, 5))) <= 1


def test_moved_columns_reads_the_parts() -> None:
    """Confidence that fell is named with its fall in standard deviations."""
    known, batch = one_world(), table(4, 100)
    batch.probabilities[:] = [0.34, 0.33, 0.33]
    words = moved_columns(CLASSES, batch, portions(known, batch))
    assert any(word.startswith("confidence -") and word.endswith(" sd") for word in words)
