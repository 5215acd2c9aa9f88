"""The report's summary columns: which are shown, in which order, and what is said of the others."""

import numpy as np
import pandas as pd

from monitoring.columns import MAX_COLUMNS, OTHER, Columns, summary_columns
from monitoring.features import FeatureTable
from monitoring.reference import Reference, Regime

N = 400
STATISTICS = ["brightness", "contrast", "sharpness", "saturation", "width", "height", "aspect"]
EVIL = "<script>alert(1)</script>"


def table(
    seed: int,
    n: int,
    metadata: pd.DataFrame | None = None,
    statistics: tuple[str, ...] = (),
    classes: int = 3,
) -> FeatureTable:
    rng = np.random.default_rng(seed)
    return FeatureTable(
        tuple(f"b/{i}" for i in range(n)),
        (rng.standard_normal((n, 6)) * [9, 8, 7, 6, 5, 4]).astype(np.float32),
        rng.dirichlet(np.ones(classes), n).astype(np.float32),
        pd.DataFrame({column: rng.random(n) for column in statistics}, index=pd.RangeIndex(n)),
        pd.DataFrame() if metadata is None else metadata,
    )


def chosen(
    now: pd.DataFrame | None = None,
    before: pd.DataFrame | None = None,
    statistics: tuple[str, ...] = (),
    classes: tuple[str, ...] = ("a", "b", "c"),
) -> Columns:
    """Choose the columns of a batch (as many rows as its metadata) against 400 reference rows."""
    known = table(0, N, before, statistics, len(classes))
    batch = table(1, 100 if now is None else len(now), now, statistics, len(classes))
    regime = Regime("first", known, known.predicted)
    return summary_columns(Reference((regime,), classes), regime, batch)


def text(values: list[object], n: int) -> "pd.Series[object]":
    return pd.Series([values[i % len(values)] for i in range(n)], dtype="object")


def test_columns_stand_in_the_documented_order() -> None:
    """Known statistics, two dimensions, metadata by its move, two more, then other statistics."""
    now = pd.DataFrame({"still": np.arange(100) % 4, "moved": np.arange(100) % 4 + 2.0})
    before = pd.DataFrame({"still": np.arange(N) % 4, "moved": np.arange(N) % 4 * 1.0})
    columns = chosen(now, before, ("mine", "contrast", "brightness"))
    assert list(columns.now) == [
        "confidence",
        "predicted class",
        "brightness",
        "contrast",
        "embedding 1",
        "embedding 2",
        "moved",
        "still",
        "embedding 3",
        "embedding 4",
        "mine",
    ]
    assert list(columns.before) == list(columns.now)
    assert columns.categories == {"predicted class"}
    assert columns.notes == ()
    # the half of the reference that fitted no whitening: unit variance, the largest axis first
    assert len(columns.before) == N // 2
    np.testing.assert_allclose(columns.before["embedding 1"].std(), 1, atol=0.15)


def test_at_most_sixteen_columns_are_shown_and_the_rest_named() -> None:
    """Eleven metadata columns beside the statistics: the note names what is not drawn."""
    names = [f"extra {i}" for i in range(11)]
    now = pd.DataFrame({name: np.arange(100.0) for name in names})
    before = pd.DataFrame({name: np.arange(N) / 4 for name in names})
    columns = chosen(now, before, tuple(STATISTICS))
    assert len(columns.now.columns) == MAX_COLUMNS
    (note,) = columns.notes
    assert note.startswith("at most 16 columns are drawn below, so these are not: extra 5, extra 6")
    assert note.endswith("embedding 3, embedding 4")


def test_text_is_a_category_of_fifteen_values() -> None:
    """The frequent values of both sides stay, the rest are one; missing ones are a value."""
    now = pd.DataFrame({"site": text([None, *(f"s{i}" for i in range(30))], 310)})
    before = pd.DataFrame({"site": text([f"s{i}" for i in range(30)], N)})
    columns = chosen(now, before)
    assert "site" in columns.categories
    shown = set(columns.now["site"]) | set(columns.before["site"])
    assert OTHER in shown
    assert len(shown) == 16
    small = chosen(
        pd.DataFrame({"site": text([None, "x"], 10)}), pd.DataFrame({"site": text(["x"], N)})
    )
    assert set(small.now["site"]) == {"no value", "x"}


def test_columns_that_cannot_be_compared_are_named() -> None:
    """New, gone, another kind, a value of its own in every row, or no value at all: no crash."""
    now = pd.DataFrame(
        {
            "new": np.arange(50.0),
            "kind": text(["low", "high"], 50),
            "file": [f"n{i}" for i in range(50)],
            "empty": np.full(50, np.nan),
            "infinite": [np.inf, *np.arange(49.0)],
            "constant": np.ones(50),
        }
    )
    before = pd.DataFrame(
        {
            "gone": np.arange(N),
            "kind": np.arange(N) % 3,
            "file": [f"o{i}" for i in range(N)],
            "empty": np.arange(N),
            "infinite": np.arange(N) % 50,
            "constant": np.ones(N),
        }
    )
    columns = chosen(now, before)
    assert columns.notes == (
        "metadata column new is new",
        "metadata column gone is gone",
        "metadata column empty is gone",
        "metadata column kind had numbers in the reference and has text now",
        "metadata column file has another value in every row, so it is not compared",
    )
    assert {"kind", "infinite"} <= set(columns.now)
    assert not {"new", "gone", "file", "empty", "constant"} & set(columns.now)
    assert np.isnan(columns.now["infinite"][0])


def test_names_are_escaped_clipped_and_unique() -> None:
    """A name taken by a column of ours gets a number; tags and long names do no harm."""
    names = ["confidence", EVIL, "x" * 60 + "1", "x" * 60 + "2"]
    values = {name: text([EVIL, "y" * 99], 100) for name in names}
    columns = chosen(
        pd.DataFrame(values),
        pd.DataFrame({name: text([EVIL], N) for name in names}),
        classes=(EVIL, *(f"{i}" for i in range(40))),
    )
    assert {"confidence (2)", "&lt;script&gt;alert(1)&lt;/script&gt;"} <= set(columns.now)
    assert {"x" * 39 + "…", "x" * 39 + "… (2)"} <= set(columns.now)
    for frame in (columns.now, columns.before):
        words = [str(word) for name in columns.categories for word in frame[name]]
        assert not any("<" in word for word in [*words, *frame])
        assert max(map(len, words)) <= 60
    assert columns.now["predicted class"].nunique() <= 16
    assert "other classes" in set(columns.now["predicted class"])
