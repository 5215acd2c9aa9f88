"""`sustain adapt`: make a challenger without labels, from the pictures of the batches that rang."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict
from importlib.metadata import version as installed_version
from pathlib import Path

import pandas as pd
import torch
from prefect import flow

from flows.digest import digest
from flows.feed import Batch
from flows.fresh import FreshSet, Labels, fresh_set, held_out_labels
from flows.notify import tell_of_failure
from flows.package import LEARNED_COLUMNS, Lineage, Package, build_reference
from flows.promote import labels_came
from flows.records import CheckRecord, Version
from flows.registry import Registry
from flows.retrain import Retrained, challenge, names_that_rang, read_window
from flows.settings import Settings, load_settings, refuse_contradiction
from monitoring.policy import Action
from sft.adaptation import adapt as adapted_to
from sft.batchnorm import BatchNormError
from sft.dataset import LabelledPictures, Role, join, role_of
from sft.memory import remember
from sft.pixels import in_memory

ADAPTED = "sustain.adapted"
"""Tag of a check: what came of adapting to the drift that it found."""


class AdaptError(ValueError):
    """Nothing can be adapted; the message names what is missing."""


@flow(name="adapt", on_failure=[tell_of_failure], on_crashed=[tell_of_failure])
def adapt(settings_path: str, cause: str = "asked for by a person") -> Retrained:
    """Give the champion batch-norm statistics of the batches that rang, and let it be judged.

    No label is needed to make the challenger. Whatever labels its held-out pictures have judge it;
    until they suffice it waits with the verdict `inconclusive`, and run again after that it is
    judged again. Run again with the same alarms and settings it finds the version that it made.

    Args:
        settings_path: the model's TOML file.
        cause: why, for the record.

    Raises:
        AdaptError: no batch rang, or the champion cannot be adapted to those that did.
    """
    settings = load_settings(Path(settings_path))
    registry = Registry(settings)
    registry.observe_moves(registry.now())
    champion = registry.champion()
    refuse_contradiction(settings, registry.config(champion))
    batches = registry.view.batches()
    here = {(batch.id, batch.digest) for batch in batches}
    rang = sorted(
        (c.key.batch_id, c.key.digest)
        for c in registry.newest_checks(champion.number, {b.id: b.arrived for b in batches})
        if c.finished and c.alarm and (c.key.batch_id, c.key.digest) in here
    )
    if not rang:
        raise AdaptError(
            f"no batch of the feed rang against version {champion.number}: there is nothing to"
            " adapt to"
        )
    stated = {**asdict(settings.adaptation), "enabled": None}
    key = digest([champion.number, rang, stated, settings.memory.carried])[:32]
    version = registry.find_version(key)
    made_now = version is None
    if version is None:
        names = [name for name, _ in rang]
        version = make_adapted(registry, settings, champion, batches, names, key, cause)
    else:
        registry.finish_training(version)
    return challenge(registry, version, made_now=made_now)


def make_adapted(
    registry: Registry,
    settings: Settings,
    champion: Version,
    batches: Sequence[Batch],
    rang: Collection[str],
    key: str,
    cause: str,
) -> Version:
    """Adapt, build what the version carries, and register it once.

    Pictures whose role is to be held out are never adapted to. The others of the batches that rang
    that were not needed stand in the reference, as they do after a retraining.
    """
    network, memory = registry.network(champion), registry.memory(champion)
    classes, task = network.config.classes, network.config.task
    before = registry.learned(champion)
    found = fresh_set(registry.view.labels(batches, classes, task), before).table
    known_to_it = task.known(task.rows(found["label"], classes))  # more classes need a retraining
    fresh = FreshSet(found[known_to_it.numpy()])
    window_of = names_that_rang(registry, champion, batches)
    labelled, unlabelled, about = read_window(
        registry, settings, champion, batches, fresh, network, window_of
    )
    new = _adapted_to(labelled, unlabelled, rang, settings.adaptation.max_pictures)
    try:
        known = memory.labelled(Role.TRAIN, classes, network.config.preprocessing, task)
        adapted = adapted_to(
            network, in_memory(known.pixels), in_memory(new.pixels), settings.adaptation
        )
    except BatchNormError as error:
        raise AdaptError(f"version {champion.number} cannot be adapted: {error}") from error
    run_id = registry.begin_training(
        f"adapt v{champion.number}",
        {
            "sustain.retrain_key": key,
            "sustain.parent": str(champion.number),
            "sustain.cause": cause,
        },
    )
    registry.log(
        run_id,
        params={**asdict(settings.adaptation), "parent": champion.number, "pictures": len(new)},
    )
    registry.log_text(run_id, "\n".join(["sample_id", *new.sample_ids, ""]), "adapted_to.csv")

    regime, used = f"since v{champion.number}", set(new.sample_ids)
    held = labelled.with_role(Role.HOLDOUT)
    rest = unlabelled.take([i for i, n in enumerate(unlabelled.sample_ids) if n not in used])
    window = join([held, rest])
    carried = memory.extended(
        remember(window, classes, [Role.HOLDOUT] * len(window), regime, about, task)
    ).bounded(rehearsal=settings.memory.rehearsal, holdout=settings.memory.holdout)
    made = Package(
        network=adapted,
        reference=build_reference(
            adapted,
            carried,
            max_regimes=settings.checks.max_regimes,
            learned=frozenset(before[before["role"] != Role.HOLDOUT.value]["sample_id"]),
        ),
        memory=carried,
        learned=pd.DataFrame(columns=list(LEARNED_COLUMNS), dtype="object"),
        learned_before=before,
        lineage=Lineage(
            parent=champion.number,
            cause=cause,
            settings={"adaptation": asdict(settings.adaptation), "memory": settings.memory.carried},
            learned_digest=digest(sorted(used)),
            code_version=installed_version("sustain"),
        ),
    )
    tags = {
        "parent": str(champion.number),
        "cause": cause,
        "adapted": f"{settings.adaptation.method} of {len(new)} pictures",
    }
    version = registry.register(made, key=key, run_id=run_id, tags=tags)
    registry.end_run(run_id)
    return version


def drift_to_adapt_to(
    settings: Settings,
    champion: Version,
    versions: Sequence[Version],
    finished: Sequence[CheckRecord],
) -> CheckRecord | None:
    """Return the newest check that asks for labels, if the settings want it adapted to now.

    One challenger is made, and judged, for each champion; what came of it is on the check.
    """
    asking = [r for r in finished if r.alarm and r.action == Action.ASK_FOR_LABELS.value]
    if not settings.adaptation.enabled or not asking or ADAPTED in asking[-1].tags:
        return None
    children = [v for v in versions if v.parent == champion.number]
    return None if any(v.adapted and v.verdict is not None for v in children) else asking[-1]


def judgeable(
    registry: Registry, champion: Version, versions: Sequence[Version], labels: Labels
) -> Version | None:
    """Return the newest adapted challenger whose verdict can be reached now: its labels came."""
    adapted = [v for v in versions if v.adapted and v.parent == champion.number]
    came = adapted and labels_came(registry, adapted[-1], champion, held_out_labels(labels))
    return adapted[-1] if came else None


def adapt_to(registry: Registry, settings: Settings, drift: CheckRecord) -> str:
    """Adapt to a drift, and put on its check what came of it; return it in words."""
    try:
        done = adapt(str(settings.path), cause=f"drift in batch {drift.key.batch_id}").words
    except AdaptError as error:
        done = f"nothing was adapted: {error}"
    registry.log(drift.run_id, tags={ADAPTED: done})
    return done


def _adapted_to(
    labelled: LabelledPictures, unlabelled: LabelledPictures, rang: Collection[str], most: int
) -> LabelledPictures:
    """Choose what is adapted to: of the batches that rang, and never held out."""
    seen = join([labelled, unlabelled])
    places = [
        place
        for place, name in enumerate(seen.sample_ids)
        if role_of(name) is not Role.HOLDOUT and name.split("/", 1)[0] in rang
    ]
    order = torch.randperm(len(places), generator=torch.Generator().manual_seed(0)).tolist()
    return seen.take(sorted(places[i] for i in order[:most]))
