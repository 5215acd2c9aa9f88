"""After a promotion: does the champion still do better than the version before it?

Labels that come are answered by both, and what each had right stands on the check's run. The test
may be looked at after every label; if it shows that the version before is better, that one comes
back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields

from flows.check import representative
from flows.feed import Batch, BatchNotReady
from flows.fresh import Labels
from flows.intake import TooManyBad
from flows.kept import ANSWERED
from flows.package import see
from flows.records import CheckRecord, RegistryError, Version
from flows.registry import Registry
from monitoring.features import FeatureTable
from monitoring.probation import Comparison, Pairs, compare_pairs, count_pairs
from sft.tasks import rightly


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
    champion: Version,
    before: Version,
    batch: Batch,
    record: CheckRecord,
    labels: Labels,
    *,
    asked: bool,
) -> None:
    """Let the version before answer a check's labelled samples, and count who had which right.

    Samples that either learned from or was judged on are left out: they would favour it; and so are
    those that were chosen for a list (see `flows.check.representative`).

    Raises:
        FeedError: the storage failed.
    """
    learned = {*registry.learned(champion)["sample_id"], *registry.learned(before)["sample_id"]}
    told = labels.of_batch(record.key.batch_id)
    try:
        features, network = registry.features(record), registry.network(before)
    except RegistryError:
        return  # what is gone cannot be compared; nothing comes back by itself then
    counted = representative(features.sample_ids, told) if asked else set(told)
    wanted = counted.intersection(features.sample_ids) - learned

    def answer() -> FeatureTable | None:
        read = registry.read(batch, network.config.preprocessing, only=wanted)
        ids = list(read.samples["sample_id"])
        return see(network, ids, read.pixels) if ids else None

    try:
        key = (before.tags["digest"], batch.id, batch.digest, sorted(wanted))
        seen = registry.once(ANSWERED, key, answer)
    except (BatchNotReady, TooManyBad):
        return  # the batch has gone; the counts that are there stay
    if seen is None:
        registry.log_anew(record.run_id, {"before.n": 0.0}, always="before.n")
        return
    ours, theirs = registry.config(champion), network.config
    names = seen.sample_ids
    texts = [told[name] for name in names]
    place = {name: i for i, name in enumerate(features.sample_ids)}
    answered = features.probabilities[[place[name] for name in names]]
    now = rightly(ours.task, answered, texts, ours.classes).tolist()
    then = rightly(theirs.task, seen.probabilities, texts, theirs.classes).tolist()
    pairs = count_pairs(before.number, now, then)
    counts = {f"before.{name}": float(count) for name, count in asdict(pairs).items()}
    counts["before.version"] = float(before.number)
    registry.log_anew(record.run_id, counts, always="before.n")


def compare(before: Version, records: Sequence[CheckRecord]) -> Comparison | None:
    """Sum up what the checks against the champion say of it and the version before."""
    newest = {record.key.batch_id: record.metrics for record in records}  # of one that grew
    asked = [
        metrics
        for metrics in newest.values()
        if metrics.get("before.version") == before.number and metrics["before.n"] > 0
    ]
    if not asked:
        return None
    totals = {
        one.name: int(sum(metrics[f"before.{one.name}"] for metrics in asked))
        for one in fields(Pairs)
    }
    return compare_pairs(before.number, Pairs(**totals))
