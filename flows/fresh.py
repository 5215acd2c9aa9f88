"""Which labels are fresh: those that neither the champion nor its parents have learned from.

Nothing is stored for this: it follows from the labels, the feed and the champion's lineage, so the
labels that only a rolled-back version had learned from are fresh again by themselves.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from math import ceil

import numpy as np
import pandas as pd

from flows.batches import read_own_labels
from flows.digest import digest
from flows.feed import Batch
from flows.labels import LabelTable, read_labels
from flows.settings import Settings
from flows.storage import FeedError
from sft.dataset import HOLDOUT_SHARE, Role, role_of
from sft.gate import samples_for_power
from sft.tasks import SINGLE_LABEL, LabelError, Task

LOST_SHARE = 0.05
"""Of a hold-out, that a challenger loses while it gains elsewhere, for planning."""


@dataclass(frozen=True)
class Labels:
    """Every usable label of the feed: `sample_id`, `label`; and what was not usable, in words."""

    table: pd.DataFrame
    problems: tuple[str, ...]

    def of_batch(self, batch_id: str) -> dict[str, str]:
        """Return sample id to label for one batch."""
        return self._by_batch.get(batch_id, {})

    @cached_property
    def pairs(self) -> list[tuple[str, str]]:
        """Sample id and label of each."""
        return list(
            zip(self.table["sample_id"].tolist(), self.table["label"].tolist(), strict=True)
        )

    @cached_property
    def _by_batch(self) -> dict[str, dict[str, str]]:
        found: dict[str, dict[str, str]] = {}
        for name, label in self.pairs:
            found.setdefault(name.split("/", 1)[0], {})[name] = label
        return found


@dataclass(frozen=True)
class FreshSet:
    """Labels that the champion has yet to learn: `sample_id`, `label`, sorted by id."""

    table: pd.DataFrame

    def __len__(self) -> int:
        return len(self.table)

    @cached_property
    def classes(self) -> int:
        """How many classes they cover."""
        return int(self.table["label"].nunique())

    @cached_property
    def held_out(self) -> int:
        """How many of them no version ever trains on."""
        return sum(role_of(name) is Role.HOLDOUT for name in self.table["sample_id"].tolist())

    def of(self, sample_ids: Iterable[str]) -> FreshSet:
        """Return the labels of these samples only."""
        kept = self.table["sample_id"].isin(list(sample_ids))
        return FreshSet(self.table[kept].reset_index(drop=True))

    def outside(self, batches: Collection[str]) -> FreshSet:
        """Return the labels of samples of other batches than these."""
        kept = [name.split("/", 1)[0] not in batches for name in self.table["sample_id"]]
        return FreshSet(self.table[np.array(kept, dtype=bool)].reset_index(drop=True))

    @cached_property
    def digest(self) -> str:
        """Digest of the set: the same labels give the same digest, whatever file they came in."""
        pairs = zip(self.table["sample_id"].tolist(), self.table["label"].tolist(), strict=True)
        rows = "\n".join(json.dumps(pair) for pair in pairs)
        return hashlib.sha256(rows.encode()).hexdigest()


def gather_labels(
    settings: Settings,
    batches: Sequence[Batch],
    classes: Sequence[str],
    task: Task = SINGLE_LABEL,
    *,
    late: LabelTable | None = None,
    own: Mapping[str, Mapping[str, str]] | None = None,
) -> Labels:
    """Gather the labels that came late and those that came with their batch.

    A late label corrects one that came with the batch, and late labels that contradict one another
    leave the sample without any. Labels for samples that the feed does not
    hold, of classes that nobody named, and what cannot be a label of the task are reported, never
    guessed. Each label is written as the task writes it ("b|a" as "a|b", "7.0" as "7").

    `late` and `own` (by batch) are labels that were read before; a replay has them.
    """
    late = late or read_labels(settings.feed, settings.root)
    problems = list(late.problems)
    own_labels: dict[str, str] = {}
    for batch in batches:
        try:
            own_labels |= (
                read_own_labels(batch, settings.feed, settings.root)
                if own is None
                else own[batch.id]
            )
        except FeedError as error:  # one batch that cannot be read must not silence the others
            problems.append(str(error))
    by_id = {batch.id: batch for batch in batches}

    def id_of(name: str) -> str:
        return found.id_of(name) if (found := by_id.get(name.split("/", 1)[0])) else name

    late_labels = {
        id_of(name): label
        for name, label in zip(late.labels["sample_id"], late.labels["label"], strict=True)
    }
    for name in late.disputed:
        own_labels.pop(id_of(name), None)
    merged = {**own_labels, **late_labels}
    names = tuple(dict.fromkeys((*classes, *settings.model.classes)))
    written, odd = _written(merged.values(), names, task)

    lost = [
        name
        for name in merged
        if not ((found := by_id.get(name.split("/", 1)[0])) and found.holds(name))
    ]
    if lost:
        problems.append(
            f"{len(lost)} labels are for samples that the feed does not hold (first: {lost[0]})"
        )
    if odd:
        count = sum(label in odd for label in merged.values())
        problems.append(
            f"{count} labels are of classes that the champion does not know:"
            f" {', '.join(sorted(odd)[:5])}; if they are right, add these to classes under [model]"
            if task == SINGLE_LABEL
            else f"{count} labels cannot be used (first: {odd[min(odd)]})"
        )
    gone = set(lost)
    usable = {
        name: written[label]
        for name, label in merged.items()
        if name not in gone and label in written
    }
    table = pd.DataFrame(
        {
            "sample_id": pd.Series(list(usable), dtype="object"),
            "label": pd.Series(list(usable.values()), dtype="object"),
        }
    )
    return Labels(table.sort_values("sample_id", ignore_index=True), tuple(problems))


def _written(
    labels: Iterable[str], names: Sequence[str], task: Task
) -> tuple[dict[str, str], dict[str, str]]:
    """Write each distinct label as the task does; of those that cannot be one, say why."""
    written, odd = {}, {}
    for label in set(labels):
        try:
            written[label] = task.text(task.row(label, names), names)
        except LabelError as error:
            odd[label] = str(error)
    return written, odd


def last_labels(learned: pd.DataFrame) -> dict[str, str]:
    """Return sample id to its last label; `learned` lists newest versions first."""
    ids, labels = (learned[name].tolist()[::-1] for name in ("sample_id", "label"))
    return dict(zip(ids, labels, strict=True))


def fresh_set(labels: Labels, learned: pd.DataFrame) -> FreshSet:
    """Select the labels that are not among `learned` (`sample_id`, `label`), or correct one.

    `learned` lists newest versions first, so that a sample's last label counts.
    """
    last = last_labels(learned)
    fresh = np.array([last.get(name) != label for name, label in labels.pairs], dtype=bool)
    return FreshSet(labels.table[fresh].reset_index(drop=True))


def held_out_labels(labels: Labels) -> dict[str, str]:
    """Return sample id to label for those that no version ever trains on."""
    return {name: label for name, label in labels.pairs if role_of(name) is Role.HOLDOUT}


def labels_needed(
    fresh: FreshSet, settings: Settings, counted: FreshSet | None = None, fall: float = 0.0
) -> int:
    """Say how many labels a retraining takes of those that count.

    At least `min_labels`, and so many that the gate can decide: with fewer it could only say
    "inconclusive", after a training for nothing. So `min_fresh` of all fresh ones are held out, and
    of those that count `min_fresh` too, or as many as show that half of a known fall was regained.
    Roles are fixed, so what is missing is estimated from their shares.

    Args:
        fresh: all fresh labels, which a challenger is judged on.
        settings: of the model.
        counted: those that count towards a retraining; all of them by default.
        fall: what labels show accuracy to have fallen by; 0 where they show nothing.
    """
    counted = fresh if counted is None else counted
    gained = fall / 2
    shown_by = settings.gate.min_fresh
    if gained > 0:
        enough = samples_for_power(gained, gained + LOST_SHARE, level=settings.gate.level(0))
        shown_by = min(shown_by, enough)
    missing = max(settings.gate.min_fresh - fresh.held_out, shown_by - counted.held_out, 0)
    return max(settings.policy.min_labels, len(counted) + ceil(missing / HOLDOUT_SHARE))


def retrain_key(champion: int, fresh: FreshSet, settings: Settings) -> str:
    """Name a retraining: the same champion, labels and settings never make two versions."""
    return digest({"champion": champion, **stated(fresh, settings)})[:32]


def stated(fresh: FreshSet, settings: Settings) -> dict[str, object]:
    """List all that a retraining depends on, but the champion."""
    return {
        "fresh": fresh.digest,
        "training": asdict(settings.training),
        "search": asdict(settings.search) if settings.search.enabled else None,
        "noise": asdict(settings.noise),
        "memory": settings.memory.carried,
        "classes": settings.model.classes,
    }
