"""Steps whose results a replay keeps: what each is called, and how its result is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from pydantic import TypeAdapter

from flows.feed import Batch
from flows.intake import BatchData
from monitoring.features import FeatureTable

T = TypeVar("T")


@dataclass(frozen=True)
class Step(Generic[T]):
    """A step that takes time and whose result follows from what it was given.

    Attributes:
        name: of the step.
        save: writes a result into a file.
        load: reads it again.
    """

    name: str
    save: Callable[[T, Path], object]
    load: Callable[[Path], T]


def as_json(name: str, kind: type[T]) -> Step[T]:
    """Describe a step that gives a dataclass of plain values."""
    adapter: TypeAdapter[T] = TypeAdapter(kind)
    return Step(
        name,
        # not by the adapter: it writes null for NaN
        lambda result, path: path.write_text(
            json.dumps(asdict(cast("Any", result)), default=float)
        ),
        lambda path: adapter.validate_python(json.loads(path.read_text())),
    )


def as_read(batch: Batch) -> Step[BatchData]:
    """Describe the step that reads a batch."""
    return Step("read", BatchData.save, partial(BatchData.load, batch=batch))


def _save_table(table: FeatureTable | None, path: Path) -> Any:
    return path.touch() if table is None else table.save(path)


def _load_table(path: Path) -> FeatureTable | None:
    return FeatureTable.load(path) if path.stat().st_size else None


SEEN: Step[FeatureTable | None] = Step("seen", _save_table, _load_table)
"""What a version saw in a batch; None where it knew every sample."""
ANSWERED: Step[FeatureTable | None] = Step("answered", _save_table, _load_table)
"""What the version before saw in a batch's labelled samples."""
