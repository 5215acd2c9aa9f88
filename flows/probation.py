"""After a promotion: does the champion still do better than the version before it?

Labels that come are answered by both, and what each had right stands on the check's run. The test
may be looked at after every label; if it shows that the version before is better, that one comes
back.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from flows.batches import read_batch
from flows.feed import Batch
from flows.fresh import Labels
from flows.registry import CheckRecord, Registry, RegistryError, Version
from flows.settings import Settings
from flows.storage import FeedError
from monitoring.probation import Comparison, compare_counts


def version_before(registry: Registry, champion: Version) -> Version | None:
    """Return the version that the champion succeeded, unless it is gone or was given up itself."""
    number = champion.tags.get("promoted_from")
    if not number:
        return None
    try:
        before = registry.version(int(number))
    except RegistryError:
        return None
    return None if before.rolled_back or before.verdict is None else before


def answer_with_before(
    registry: Registry,
    settings: Settings,
    champion: Version,
    before: Version,
    batch: Batch,
    record: CheckRecord,
    labels: Labels,
) -> None:
    """Let the version before answer a check's labelled samples, and count who had which right.

    Samples that the champion learned from or was judged on are left out: they would favour it.
    """
    learned = set(registry.learned(champion)["sample_id"])
    features = registry.features(record)
    told = labels.of_batch(record.key.batch_id)
    wanted = {name for name in features.sample_ids if name in told and name not in learned}
    if not wanted:
        return
    network = registry.network(before)
    try:
        read = read_batch(
            batch, settings.feed, settings.root, network.config.preprocessing, only=wanted
        )
    except FeedError:
        return  # the batch has gone; the counts that are there stay
    names = list(read.samples["sample_id"])
    if not names:
        return
    classes = registry.config(champion).classes
    answers = dict(zip(features.sample_ids, features.predicted, strict=True))
    pixels = torch.stack([picture.pixels for picture in read.pictures])
    _, probabilities = network.embed(pixels)
    theirs = [network.config.classes[place] for place in probabilities.argmax(dim=1).tolist()]
    now = [classes[answers[name]] == told[name] for name in names]
    then = [said == told[name] for said, name in zip(theirs, names, strict=True)]
    pairs = list(zip(now, then, strict=True))
    registry.log(
        record.run_id,
        metrics={
            "before.version": float(before.number),
            "before.n": float(len(pairs)),
            "before.right_now": float(sum(now)),
            "before.right_before": float(sum(then)),
            "before.only_now": float(sum(a and not b for a, b in pairs)),
            "before.only_before": float(sum(b and not a for a, b in pairs)),
        },
    )


def compare(before: Version, records: Sequence[CheckRecord]) -> Comparison | None:
    """Sum up what the checks against the champion say of it and the version before."""
    asked = [r.metrics for r in records if r.metrics.get("before.version") == before.number]
    if not asked:
        return None
    totals = {
        name: int(sum(metrics[f"before.{name}"] for metrics in asked))
        for name in ("n", "right_now", "right_before", "only_now", "only_before")
    }
    return compare_counts(before.number, **totals)
