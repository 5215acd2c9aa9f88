"""`sustain ask`: which samples are worth labelling next, as a list to fill in, with thumbnails."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from flows.batches import read_batch
from flows.check import that_rang
from flows.digest import digest
from flows.feed import Batch
from flows.fresh import FreshSet, Labels, labels_needed
from flows.records import CheckRecord, RegistryError, Version, of_batches_now
from flows.registry import Registry
from flows.settings import Settings
from flows.storage import FeedError
from monitoring.labelling import Request, choose, write_requests
from sft.dataset import Role, role_of
from sft.pictures import Preprocessing, thumbnail

MAX_BATCHES = 20
"""The newest drifted batches are chosen from; older ones show an older world."""

LEAST = 50
"""Fewer are not worth a person's while."""

LISTED = "sustain.listed"
"""Tag of a check: names its batch, of which a list asked for samples."""


def was_listed(registry: Registry, batch_id: str) -> bool:
    """Whether a list asked for samples of a batch, whatever champion it was written for.

    Its labels are then not all drawn at random: see `flows.check.representative`.
    """
    return registry.has_check(None, f"tags.`{LISTED}` = '{digest(batch_id)}'")


def write_list(
    registry: Registry,
    settings: Settings,
    champion: Version,
    batches: Sequence[Batch],
    finished: Sequence[CheckRecord],
    labels: Labels,
    fresh: FreshSet,
    folder: Path,
) -> tuple[Request, ...]:
    """Write `label_requests.csv` and `.html` for the batches that rang; return what they ask for.

    As many as `labels_wanted`, or as a retraining lacks. Nothing is written, and nothing returned,
    where no batch rang or every sample has its label. Which batches are in it goes on record first.
    """
    here = {batch.id: batch for batch in batches}
    rang = that_rang(of_batches_now(finished))
    drifted = [r for r in rang if r.key.batch_id in here][-MAX_BATCHES:]
    if not drifted:
        return ()
    tables = []
    for record in drifted:
        with suppress(RegistryError):  # its artifacts have expired
            tables.append(registry.features(record))
    if not tables:
        return ()
    requests = choose(
        registry.reference(champion),
        tables,
        settings.checks.labels_wanted or max(LEAST, labels_needed(fresh, settings) - len(fresh)),
        holdout=lambda name: role_of(name) is not Role.TRAIN,
        labelled=set(labels.table["sample_id"]),
    )
    if requests:
        named = {request.sample_id.split("/", 1)[0] for request in requests}
        for record in finished:
            if (batch_id := record.key.batch_id) in named:
                registry.log(record.run_id, tags={LISTED: digest(batch_id)})
        seen = registry.config(champion).preprocessing
        write_requests(folder, requests, _thumbnails(requests, here, settings, seen))
    return requests


def _thumbnails(
    requests: Sequence[Request],
    batches: dict[str, Batch],
    settings: Settings,
    preprocessing: Preprocessing,
) -> dict[str, bytes]:
    wanted: dict[str, set[str]] = defaultdict(set)
    for request in requests:
        wanted[request.sample_id.split("/", 1)[0]].add(request.sample_id)
    shown: dict[str, bytes] = {}
    for batch_id, names in wanted.items():
        try:
            read = read_batch(
                batches[batch_id], settings.feed, settings.root, preprocessing, only=names
            )
        except FeedError:
            continue  # a list without a picture is still a list
        shown |= {
            name: thumbnail(pixels)
            for name, pixels in zip(read.samples["sample_id"], read.pixels, strict=True)
        }
    return shown
