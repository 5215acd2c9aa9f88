"""What is plainly different about a batch, and needs no test: other channels, other columns."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

    from monitoring.features import FeatureTable
    from monitoring.reference import Reference

MAX_NAMED = 5


def findings(reference: Reference, batch: FeatureTable) -> tuple[str, ...]:
    """Say in words what a batch has that no regime had, and the other way round.

    Channels of the pictures as they arrived (the network always sees its own number of them), and
    metadata columns that appeared, vanished or changed between numbers and text.
    """
    tables = [regime.features for regime in reference.regimes]
    return (*_channels(tables, batch), *_columns(tables, batch))


def _channels(tables: list[FeatureTable], batch: FeatureTable) -> list[str]:
    if any("channels" not in table.statistics.columns for table in (*tables, batch)):
        return []
    known = np.unique(np.concatenate([table.statistics["channels"] for table in tables]))
    now, counts = np.unique(batch.statistics["channels"], return_counts=True)
    before = " or ".join(f"{channels:.0f}" for channels in known)
    return [
        f"{count} of {len(batch)} pictures have {channels:.0f} "
        f"channel{'' if channels == 1 else 's'}; the reference's have {before}"
        for channels, count in zip(now, counts, strict=True)
        if channels not in known
    ]


def _columns(tables: list[FeatureTable], batch: FeatureTable) -> list[str]:
    kinds: dict[str, set[str]] = {}
    for table in tables:
        for name, values in table.metadata.items():
            if values.notna().any():
                kinds.setdefault(str(name), set()).add(_kind(values))
    now = {
        str(name): _kind(values) for name, values in batch.metadata.items() if values.notna().any()
    }
    new = [name for name in now if name not in kinds]
    gone = [name for name in kinds if name not in now]
    changed = [
        f"{name!r} ({' and '.join(sorted(kinds[name]))} before, now {kind})"
        for name, kind in now.items()
        if name in kinds and kind not in kinds[name]
    ]
    return [
        f"metadata column{'s' if len(names) > 1 else ''} {_some(names)} {verb}"
        for names, verb in (
            ([repr(name) for name in new], "not in the reference"),
            ([repr(name) for name in gone], "in the reference, but not in the batch"),
            (changed, "of another type"),
        )
        if names
    ]


def _kind(values: pd.Series) -> str:
    return "numbers" if values.dtype == np.float64 else "text"


def _some(names: list[str]) -> str:
    more = len(names) - MAX_NAMED
    return ", ".join(names[:MAX_NAMED]) + (f" and {more} more" if more > 0 else "")
