"""What happened in a feed, and what could be seen of it at any time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from flows.batches import read_own_labels
from flows.feed import Batch, list_batches
from flows.fresh import Labels, gather_labels
from flows.labels import LabelFiles, read_all
from flows.settings import Settings
from flows.storage import FeedError
from flows.words import shown_uri
from sft.tasks import Task

MANY_TIMES = 20
"""So many times of labels a batch are too many to watch at each: they count at the next batch."""


class PastError(ValueError):
    """The history cannot be replayed; the message says why, and the way out."""


@dataclass(frozen=True)
class Seen:
    """What was there at one time. It holds nothing that came later, and leads to nothing."""

    settings: Settings
    there: tuple[Batch, ...]
    late: LabelFiles
    own: Mapping[str, Mapping[str, str]]
    _gathered: dict[tuple[object, ...], Labels] = field(default_factory=dict, repr=False)

    def batches(self) -> list[Batch]:
        """List the batches that had arrived, oldest first."""
        return list(self.there)

    def labels(self, batches: Sequence[Batch], classes: Sequence[str], task: Task) -> Labels:
        """Gather the labels that had come."""
        key = (tuple(b.id for b in batches), tuple(classes), task)
        if key not in self._gathered:
            late = self.late.settled()
            self._gathered[key] = gather_labels(
                self.settings, batches, classes, task, late=late, own=self.own
            )
        return self._gathered[key]


@dataclass(frozen=True)
class Past:
    """All batches and labels of a feed, with the times at which they came.

    Attributes:
        settings: of the model.
        batches: oldest first.
        late: every file of labels.
        own: labels that came with their batch, by batch.
        notes: what cannot be replayed as it was, in words.
    """

    settings: Settings
    batches: tuple[Batch, ...]
    late: LabelFiles
    own: Mapping[str, Mapping[str, str]]
    notes: tuple[str, ...] = ()
    _seen: dict[datetime, Seen] = field(default_factory=dict, repr=False)

    @property
    def moments(self) -> tuple[datetime, ...]:
        """Times at which something came, oldest first: a watch run is replayed at each."""
        first = _arrival(self.batches[0])
        arrivals = {_arrival(batch) for batch in self.batches}
        labels = {max(time, first) for time in self.late.times if time < _NEVER}
        if len(labels) > MANY_TIMES * len(arrivals):
            labels = {max(labels)}
        return tuple(sorted(arrivals | labels))

    def at(self, moment: datetime) -> Seen:
        """Give what was there at a time; a label for a batch that had not come is not used."""
        if moment not in self._seen:
            there = tuple(batch for batch in self.batches if _arrival(batch) <= moment)
            own = {batch.id: self.own.get(batch.id, {}) for batch in there}
            self._seen[moment] = Seen(self.settings, there, self.late.until(moment), own)
        return self._seen[moment]

    def first(self, batches: int) -> Past:
        """Keep the first batches, and the labels that came before the next one."""
        if batches >= len(self.batches):
            return self
        seen = self.at(_arrival(self.batches[batches]) - timedelta(microseconds=1))
        return Past(self.settings, seen.there, seen.late, seen.own)


_NEVER = datetime.max.replace(tzinfo=UTC)


def read_past(settings: Settings, since: datetime | None = None) -> Past:
    """Read a feed and its labels, in one walk.

    Raises:
        PastError: there is no batch, or one whose time nobody knows.
        FeedError: the storage failed.
    """
    batches = [b for b in list_batches(settings.feed, settings.root) if b.arrived is not None]
    if since is not None:
        batches = [batch for batch in batches if _arrival(batch) >= since]
    if not batches:
        after = "" if since is None else f" that arrived after {since:%Y-%m-%d %H:%M} UTC"
        raise PastError(
            f"there is nothing to replay: {shown_uri(settings.feed.url)} holds no batch{after}"
            " whose time of arrival is known"
        )
    own, notes = {}, []
    for batch in batches:
        try:
            own[batch.id] = read_own_labels(batch, settings.feed, settings.root)
        except FeedError as error:
            notes.append(str(error))
    late = read_all(settings.feed, settings.root)
    notes += list(late.problems)
    if not late.files and not any(own.values()):
        notes.append(
            "there is not one label, so nothing can be retrained, and neither accuracy, days below"
            " a floor, regret nor a frontier can be had: only how often the alarm rings"
        )
    names = [batch.id for batch in batches]
    if names != sorted(names):
        notes.append(
            "the batches arrived in another order than that of their names: replayed as they"
            " arrived, by the newest modification time in each"
        )
    same: dict[str, list[str]] = {}
    for batch in batches:
        same.setdefault(batch.digest, []).append(batch.id)
    notes += [
        f"the batches {', '.join(ids)} hold files of the same names and sizes: each is replayed"
        for ids in same.values()
        if len(ids) > 1
    ]
    if any(time == _NEVER for time in late.times):
        notes.append("some labels have no known time: they count for the accuracy, and came never")
    return Past(settings, tuple(batches), late, own, tuple(notes))


def _arrival(batch: Batch) -> datetime:
    return batch.arrived or _NEVER
