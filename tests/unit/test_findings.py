"""What is plainly different about a batch is said in words."""

import numpy as np
import pandas as pd

from monitoring.features import FeatureTable, tidy
from monitoring.findings import findings
from monitoring.reference import Reference, Regime


def table(n: int, channels: list[int] | int = 3, **columns: list[object]) -> FeatureTable:
    return FeatureTable(
        tuple(f"b/{i}" for i in range(n)),
        np.zeros((n, 2), np.float32),
        np.full((n, 2), 0.5, np.float32),
        pd.DataFrame({"channels": np.broadcast_to(np.asarray(channels, float), n)}),
        tidy(pd.DataFrame(columns, index=range(n))),
    )


def reference(features: FeatureTable) -> Reference:
    labels = np.zeros(len(features), dtype=np.int64)
    return Reference((Regime("first", features, labels),), ("cat", "dog"))


def test_grey_and_transparent_pictures_among_colours_are_a_finding() -> None:
    """Another number of channels than any reference picture's is said, with how many."""
    known = reference(table(5))
    assert findings(known, table(4)) == ()
    assert findings(known, table(4, [3, 1, 4, 1])) == (
        "2 of 4 pictures have 1 channel; the reference's have 3",
        "1 of 4 pictures have 4 channels; the reference's have 3",
    )


def test_columns_that_appear_vanish_and_change_type_are_findings() -> None:
    """Each is named; a column without a value counts as absent."""
    known = reference(table(2, camera=["a", "b"], hour=[1, 2], gone=[1, None]))
    now = table(2, camera=["a", "c"], hour=["x", 3], site=["s", None], empty=[None, None])
    assert findings(known, now) == (
        "metadata column 'site' not in the reference",
        "metadata column 'gone' in the reference, but not in the batch",
        "metadata column 'hour' (numbers before, now text) of another type",
    )


def test_many_columns_are_cut_short() -> None:
    """Five names, and how many more."""
    now = table(1, **{f"c{i}": [1] for i in range(9)})
    (words,) = findings(reference(table(2)), now)
    assert words.endswith("'c3', 'c4' and 4 more not in the reference")


def test_what_lost_its_sizes_has_no_finding() -> None:
    """Features without channels, as in old references, are compared in what both have."""
    bare = table(3)
    bare = FeatureTable(
        bare.sample_ids, bare.embedding, bare.probabilities, pd.DataFrame(index=range(3))
    )
    assert findings(reference(bare), table(2, 1)) == ()
