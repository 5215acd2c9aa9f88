"""What the flows see of the feed: all that is there now; in a replay, what was there then."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from flows.feed import Batch, list_batches
from flows.fresh import Labels, gather_labels
from flows.settings import Settings
from sft.tasks import Task


class View(Protocol):
    """Batches and labels that are there."""

    def batches(self) -> list[Batch]:
        """List the batches that are ready, oldest first."""
        ...

    def labels(self, batches: Sequence[Batch], classes: Sequence[str], task: Task) -> Labels:
        """Gather every usable label; see `flows.fresh.gather_labels`."""
        ...


@dataclass(frozen=True)
class Present:
    """All that is there now."""

    settings: Settings

    def batches(self) -> list[Batch]:
        """List the batches that are ready, oldest first."""
        return list_batches(self.settings.feed, self.settings.root)

    def labels(self, batches: Sequence[Batch], classes: Sequence[str], task: Task) -> Labels:
        """Gather every usable label."""
        return gather_labels(self.settings, batches, classes, task)
