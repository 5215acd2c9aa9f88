"""References: halves, whitening, routing, and the way to disk."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from monitoring.features import FeatureTable, concatenate
from monitoring.reference import (
    Reference,
    Regime,
    assign,
    bounded,
    halves,
    portions,
    route,
    whiten,
)


def table(seed: int, n: int, shift: float = 0.0, d: int = 6, start: int = 0) -> FeatureTable:
    rng = np.random.default_rng(seed)
    embedding = rng.standard_normal((n, d)).astype(np.float32)
    embedding[:, 0] += shift
    probabilities = rng.dirichlet(np.ones(3), n).astype(np.float32)
    statistics = pd.DataFrame({"brightness": rng.random(n)})
    ids = tuple(f"b/{start + i}" for i in range(n))
    return FeatureTable(ids, embedding, probabilities, statistics)


def regime(name: str, seed: int, n: int = 100, shift: float = 0.0) -> Regime:
    features = table(seed, n, shift)
    labels = features.predicted.copy()
    labels[: n // 4] = (labels[: n // 4] + 1) % 3
    labels[-10:] = -1
    return Regime(name, features, labels)


def two_worlds() -> Reference:
    return Reference((regime("photo", 0), regime("sketch/ä", 1, 140, shift=12.0)), ("a", "b", "c"))


def test_halves_are_disjoint_and_fixed() -> None:
    """The two halves cover the regime, do not overlap, and are the same every time."""
    fit, compare = halves(regime("photo", 0, 101))
    assert sorted([*fit, *compare]) == list(range(101))
    assert abs(len(fit) - len(compare)) <= 1
    np.testing.assert_array_equal(halves(regime("other", 5, 101))[0], fit)


@pytest.mark.parametrize("n", [40, 300])
def test_whitening_gives_unit_covariance(n: int) -> None:
    """Fitted rows become uncorrelated with variance one, more rows than dimensions or fewer."""
    rows = np.random.default_rng(0).standard_normal((n, 60)) @ np.diag(np.linspace(1, 3, 60))
    whitening = whiten(rows.astype(np.float32), 20)
    assert whitening.axes.shape == (60, 20)
    np.testing.assert_allclose(np.cov(whitening.apply(rows).T), np.eye(20), atol=1e-3)


def test_gram_and_covariance_agree() -> None:
    """Both ways to the axes give the same whitened distances."""
    rows = np.random.default_rng(1).standard_normal((30, 29)) * np.geomspace(10, 1, 29)
    wide = np.concatenate([rows, np.zeros((30, 5))], axis=1)
    one, other = whiten(rows, 8).apply(rows), whiten(wide, 8).apply(wide)
    np.testing.assert_allclose(np.abs(one), np.abs(other), atol=1e-8)


def test_dead_dimensions_are_left_out() -> None:
    """Constant and nearly constant dimensions give no axis; constant rows give none at all."""
    rows = np.random.default_rng(2).standard_normal((200, 10)).astype(np.float32)
    rows[:, 4:] *= 1e-4
    rows[:, 7] = 3
    assert whiten(rows, 10).axes.shape == (10, 4)
    assert whiten(np.full((50, 10), 0.1, np.float32), 10).axes.shape == (10, 0)
    assert whiten(np.full((5, 10), 1e6, np.float32), 10).axes.shape == (10, 0)


def test_accuracy_and_n_count_what_is_labelled() -> None:
    """Unlabelled rows count as rows, not as mistakes."""
    reference = two_worlds()
    assert reference.n == 240
    assert reference.accuracy == pytest.approx(1 - (25 + 35) / (90 + 130))
    unlabelled = Regime("u", table(0, 30), np.full(30, -1))
    with pytest.raises(ValueError, match="no row of the reference has a label"):
        _ = Reference((unlabelled,), ("a", "b", "c")).accuracy


def test_round_trip_is_exact(tmp_path: Path) -> None:
    """A reference is loaded as it was saved, names of regimes and classes included."""
    reference = two_worlds()
    reference.save(tmp_path / "reference")
    loaded = Reference.load(tmp_path / "reference")
    assert loaded.classes == reference.classes
    for one, other in zip(loaded.regimes, reference.regimes, strict=True):
        assert one.name == other.name
        assert one.labels.dtype == np.int64
        np.testing.assert_array_equal(one.labels, other.labels)
        assert one.features.sample_ids == other.features.sample_ids
        assert one.features.embedding.tobytes() == other.features.embedding.tobytes()


def test_load_names_what_is_wrong(tmp_path: Path) -> None:
    """A missing file and a format of the future are errors that say so."""
    two_worlds().save(tmp_path)
    (tmp_path / "regime-1.parquet").unlink()
    with pytest.raises(FileNotFoundError, match=r"regime-1\.parquet"):
        Reference.load(tmp_path)
    content = json.loads((tmp_path / "reference.json").read_text(encoding="utf-8"))
    (tmp_path / "reference.json").write_text(json.dumps(content | {"format": 2}))
    with pytest.raises(ValueError, match="format 2"):
        Reference.load(tmp_path)


def test_one_regime_takes_everything() -> None:
    """With one regime there is nothing to route."""
    reference = Reference((regime("photo", 0),), ("a", "b", "c"))
    assert route(reference, table(3, 9, shift=50)).tolist() == [0] * 9


def test_samples_go_to_the_world_they_came_from() -> None:
    """Two separate worlds are told apart sample by sample, in any order."""
    batch = concatenate([table(5, 30), table(6, 20, shift=12.0)])
    expected = np.repeat([0, 1], [30, 20])
    np.testing.assert_array_equal(route(two_worlds(), batch), expected)
    order = np.random.default_rng(0).permutation(50)
    np.testing.assert_array_equal(route(two_worlds(), batch.take(order)), expected[order])


@pytest.mark.parametrize(
    ("photos", "sketches", "parts"), [(30, 3, 2), (30, 2, 1), (300, 3, 1), (300, 14, 2), (3, 2, 1)]
)
def test_small_parts_go_with_the_largest(photos: int, sketches: int, parts: int) -> None:
    """A part needs three rows, and more than photos are likely to send there."""
    batch = concatenate([table(5, photos), table(6, sketches, shift=12.0)])
    assert len(np.unique(assign(two_worlds(), batch))) == parts


def test_regimes_that_cannot_be_told_apart_are_one_world() -> None:
    """The same world again joins the first; the halves and the files stay those of the regimes."""
    again = regime("since v1", 7, 140)
    reference = Reference((*two_worlds().regimes, again), ("a", "b", "c"))
    assert reference.members == ((0, 2), (1,))
    assert [world.name for world in reference.worlds] == ["photo + since v1", "sketch/ä"]
    assert [r.name for r in reference.regimes] == ["photo", "sketch/ä", "since v1"]
    one = reference.worlds[0]
    for place in (0, 1):
        rows = [halves(r)[place] for r in (reference.regimes[0], again)]
        np.testing.assert_array_equal(halves(one)[place], np.concatenate([rows[0], 100 + rows[1]]))
    assert route(reference, table(8, 50)).tolist() == [0] * 50


def test_a_part_is_compared_with_rows_routed_as_it_was() -> None:
    """Where worlds overlap, the home and the candidates hold only rows of the part's own side."""
    reference = Reference((regime("a", 0, 400), regime("b", 1, 400, shift=2.0)), ("a", "b", "c"))
    batch = concatenate([table(5, 100), table(6, 100, shift=2.0)])
    for portion in portions(reference, batch):
        assert len(portion.home.features) < 400
        assert len(portion.candidates) > 1
        for candidate in portion.candidates:
            assert set(route(reference, candidate.features)) == {portion.world}


def test_worlds_without_any_variance_can_be_routed() -> None:
    """Constant and identical regimes give an answer instead of a crash."""
    flat = table(0, 40)
    flat.embedding[:] = 1
    labels = np.zeros(40, dtype=np.int64)
    reference = Reference((Regime("a", flat, labels), Regime("b", flat, labels)), ("a", "b", "c"))
    assert set(route(reference, table(1, 5))) <= {0, 1}


def test_bad_references_are_refused() -> None:
    """No regimes, a name twice, other widths, labels that do not match, and NaN are errors."""
    photo = regime("photo", 0)
    with pytest.raises(ValueError, match="at least one regime"):
        Reference((), ("a",))
    with pytest.raises(ValueError, match="names of their own"):
        Reference((photo, photo), ("a", "b", "c"))
    with pytest.raises(ValueError, match="3 probabilities, not 6 and 2"):
        Reference((photo,), ("a", "b"))
    with pytest.raises(ValueError, match="'x': 20 rows and labels of shape"):
        Regime("x", table(0, 20), np.zeros(19, dtype=np.int64))
    broken = table(0, 20)
    broken.embedding[4, 2] = np.inf
    with pytest.raises(ValueError, match="regime 'x': 1 of 20 rows"):
        Regime("x", broken, np.zeros(20, dtype=np.int64))


def test_batches_of_another_version_are_refused() -> None:
    """A batch of another width, or an empty one, is named."""
    with pytest.raises(ValueError, match="different versions"):
        route(two_worlds(), table(0, 5, d=7))
    with pytest.raises(ValueError, match="no rows"):
        route(two_worlds(), table(0, 0))


def test_selected_rows_are_whitened_once() -> None:
    """A second batch is compared with the very same regimes as the first."""
    reference = Reference((regime("a", 0, 400), regime("b", 1, 400, shift=2.0)), ("a", "b", "c"))
    one, other = (
        portions(reference, concatenate([table(i, 100), table(i + 1, 100, shift=2.0)]))
        for i in (5, 7)
    )
    for first, second in zip(one, other, strict=True):
        assert first.home is second.home
        assert all(a is b for a, b in zip(first.candidates, second.candidates, strict=True))


def test_a_single_small_regime_is_a_portion() -> None:
    """With one world nothing is cut, so nothing needs twenty rows."""
    (portion,) = portions(Reference((regime("a", 0, 10),), ("a", "b", "c")), table(1, 7))
    assert portion.rows.tolist() == list(range(7))
    assert len(portion.home.features) == 10


def test_the_number_of_regimes_is_bounded() -> None:
    """The pair that is hardest to tell apart is merged first, until few enough are left."""
    far, near = regime("far", 1, shift=12.0), regime("near", 2, 140, shift=1.0)
    reference = Reference((regime("first", 0), far, near), ("a", "b", "c"))
    two = bounded(reference, 2)
    assert [r.name for r in two.regimes] == ["first + near", "far"]
    assert two.n == reference.n
    assert two.regimes[0].split is None
    np.testing.assert_array_equal(
        two.regimes[0].labels, np.concatenate([reference.regimes[0].labels, near.labels])
    )
    assert [r.name for r in bounded(reference, 1).regimes] == ["first + near + far"]
    assert bounded(reference, 3).regimes == reference.regimes
    with pytest.raises(ValueError, match="max_regimes=0"):
        bounded(reference, 0)
