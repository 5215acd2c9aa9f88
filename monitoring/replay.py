"""What a policy would have brought: accuracy over time, retrainings, and regret; all of it pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
DAY = timedelta(days=1)


@dataclass(frozen=True)
class Served:
    """One batch, as the champion of its arrival answered it.

    Args:
        batch_id: the batch.
        at: when it arrived.
        version: names the content of the version, the same in every replay.
        number: of the version in this replay.
        samples: pictures that the version answered.
        labelled: how many of them have a label by the end of the history.
        right: how many of those were answered rightly.
        alarm: whether the stream of batches rang.
        evidence: where the stream stood, as a share of what it takes to ring.

    """

    batch_id: str
    at: datetime
    version: str
    number: int
    samples: int
    labelled: int
    right: int
    alarm: bool
    evidence: float

    @property
    def accuracy(self) -> float:
        """The share that was right; NaN without labels."""
        return self.right / self.labelled if self.labelled else float("nan")

    @property
    def errors(self) -> float:
        """How many of its pictures were answered wrongly, by the share of the labelled ones."""
        return self.samples * (1 - self.accuracy) if self.labelled else 0.0


@dataclass(frozen=True)
class Retraining:
    """A version that a policy made, when, why, and what became of it."""

    at: datetime
    batch_id: str
    number: int
    version: str
    reason: str
    outcome: str
    promoted: bool
    labels: int


@dataclass(frozen=True)
class Replayed:
    """What a policy did with a history, oldest first.

    Args:
        name: of the policy.
        said: the policy in a sentence.
        served: one entry a batch.
        retrainings: versions made from labels.
        rollbacks: times at which a version came back by itself.
        labels_used: distinct labelled samples that any version learned from or was judged on.
        suppressed: checks whose change was not answered by a retraining, for a reason.
        cpu_seconds: of checks, trainings and verdicts, as if nothing had been shared.
        gpu_seconds: of the same.
        energy_wh: of the trainings; None where it is not known.
        overrides: the settings that make this policy, by section and key.

    """

    name: str
    said: str
    served: tuple[Served, ...]
    retrainings: tuple[Retraining, ...]
    rollbacks: tuple[datetime, ...]
    labels_used: int
    suppressed: int
    cpu_seconds: float
    gpu_seconds: float = 0.0
    energy_wh: float | None = None
    overrides: Mapping[str, Mapping[str, object]] = field(default_factory=dict)

    @property
    def accuracy(self) -> float:
        """Mean accuracy of whatever was champion, over pictures; NaN without labels."""
        told = [one for one in self.served if one.labelled]
        samples = sum(one.samples for one in told)
        return 1 - sum(one.errors for one in told) / samples if samples else float("nan")

    def days_below(self, floor: float) -> float:
        """Count the days on which the newest batch with labels was answered under a floor.

        A batch stands for the time until the next one; the last one for the median of these.
        """
        told = [one for one in self.served if one.labelled]
        spans = [after.at - one.at for one, after in pairwise(told)]
        if not spans:
            return 0.0
        spans.append(sorted(spans)[len(spans) // 2])
        below = (span for one, span in zip(told, spans, strict=True) if one.accuracy < floor)
        return sum(below, timedelta(0)) / DAY

    def loss(self, cost: float) -> float:
        """Add wrong answers and retrainings up; one retraining costs as much as `cost` errors."""
        return sum(one.errors for one in self.served) + cost * len(self.retrainings)


@dataclass(frozen=True)
class Oracle:
    """The best that could have been done, knowing the future.

    Args:
        loss: wrong answers, and `cost` for each retraining.
        errors: wrong answers alone.
        path: the version that serves each batch, as a row of what was asked for.

    """

    loss: float
    errors: float
    path: tuple[int, ...]

    @property
    def retrainings(self) -> int:
        """How often another version begins to serve."""
        return sum(a != b for a, b in pairwise(self.path)) + (self.path[:1] > (0,))


def oracle(errors: Floats, ready: Sequence[int], cost: float) -> Oracle:
    """Choose when to retrain, by dynamic programming over the times of retraining.

    Args:
        errors: (versions, batches), wrong answers of each version on each batch; what lies before
            a version is ready counts for nothing. Row 0 is the first champion.
        ready: (versions,), the first batch that each version may serve; 0 for the first champion.
        cost: of putting another version into service, in wrong answers.

    A version may begin to serve at any batch from `ready` on, and an earlier one may come back at
    the same cost. So no policy that makes these versions, and is charged for each of them, does
    better, unless it rolls back.

    Returns:
        The least loss, and one path that has it.

    Raises:
        ValueError: if the first champion is not ready at the first batch.

    """
    versions, batches = errors.shape
    if not batches:
        return Oracle(0.0, 0.0, ())
    if len(ready) != versions or ready[0] != 0:
        raise ValueError("every version needs its first batch, and the first champion batch 0")
    open_ = np.asarray(ready)[:, None] <= np.arange(batches)
    step = np.where(open_, errors, np.inf)
    best = step[:, 0] + np.where(np.arange(versions) > 0, cost, 0.0)
    came = np.empty((versions, batches), dtype=np.int64)
    for batch in range(1, batches):
        cheapest = int(best.argmin())
        switch = best[cheapest] + cost < best
        came[:, batch] = np.where(switch, cheapest, np.arange(versions))
        best = np.minimum(best, best[cheapest] + cost) + step[:, batch]
    path = [int(best.argmin())]
    for batch in range(batches - 1, 0, -1):
        path.append(int(came[path[-1], batch]))
    path.reverse()
    total = float(sum(errors[version, batch] for batch, version in enumerate(path)))
    return Oracle(float(best.min()), total, tuple(path))


def frontier(points: Sequence[tuple[float, float]]) -> tuple[int, ...]:
    """Name the points that no other beats: (cost, accuracy), cheapest first.

    Of equal points the first counts; a point whose accuracy is not known is never on it.
    """
    order = sorted(
        (place for place, (_, accuracy) in enumerate(points) if accuracy == accuracy),  # noqa: PLR0124 - NaN
        key=lambda place: (points[place][0], -points[place][1]),
    )
    kept: list[int] = []
    for place in order:
        if not kept or points[place][1] > points[kept[-1]][1]:
            kept.append(place)
    return tuple(kept)
