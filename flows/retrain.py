"""`sustain retrain`: fine-tune the champion on fresh labels; register and judge the challenger."""

from __future__ import annotations

import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version as installed_version
from operator import itemgetter
from pathlib import Path

import pandas as pd
import torch
from prefect import flow
from rich.progress import Progress

from flows.batches import read_batch
from flows.doubt import judge_delivery, write_suspicious
from flows.feed import Batch, list_batches
from flows.fresh import FreshSet, fresh_set, gather_labels, labels_needed, retrain_key
from flows.intake import About
from flows.notify import tell, tell_of_failure
from flows.package import Lineage, Package, build_reference
from flows.promote import promote
from flows.registry import CHALLENGER, Registry, Version
from flows.settings import Settings, load_settings, refuse_contradiction
from flows.storage import FeedError
from sft.after import tune as fine_tune
from sft.averaging import members_of
from sft.cache import ActivationCache
from sft.dataset import LabelledPictures, Role, role_of
from sft.memory import remember
from sft.models import Network, widen
from sft.search import Searched, SearchError, search
from sft.train import FineTuned, TrainingSettings


class RetrainError(ValueError):
    """Nothing can be trained; the message names what is missing."""


class LabelsRefusedError(RetrainError):
    """The labels were read and cannot be learned from: the same ones would be refused again."""


@dataclass(frozen=True)
class Retrained:
    """What a retraining, or an adaptation, made, and what became of it."""

    version: int
    promoted: bool
    outcome: str
    reason: str
    made_now: bool

    @property
    def words(self) -> str:
        """One sentence."""
        what = "was promoted" if self.promoted else f"was not promoted ({self.outcome})"
        made = "" if self.made_now else ", made before,"
        return f"version {self.version}{made} {what}: {self.reason}"


@flow(name="retrain", on_failure=[tell_of_failure], on_crashed=[tell_of_failure])
def retrain(settings_path: str, cause: str = "asked for by a person") -> Retrained:
    """Make a challenger from the champion and the fresh labels, once, and let it be judged.

    Run again with the same champion, labels and settings it finds the version that it made, and
    goes on where it was interrupted.

    Args:
        settings_path: the model's TOML file.
        cause: why, for the record.

    Raises:
        RetrainError: too few fresh labels, or of too few classes.
    """
    settings = load_settings(Path(settings_path))
    registry = Registry(settings)
    registry.observe_moves(datetime.now(UTC))
    champion = registry.champion()
    batches = list_batches(settings.feed, settings.root)
    config = registry.config(champion)
    refuse_contradiction(settings, config)
    labels = gather_labels(settings, batches, config.classes, config.task)
    fresh = fresh_set(labels, registry.learned(champion))
    key = retrain_key(champion.number, fresh, settings)
    version = registry.find_version(key)
    made_now = version is None
    if version is None:
        require_enough(fresh, settings)
        version = make_challenger(registry, settings, champion, batches, fresh, key, cause)
    else:
        registry.finish_training(version)
    return challenge(registry, version, settings_path, made_now=made_now)


def challenge(
    registry: Registry, version: Version, settings_path: str, *, made_now: bool
) -> Retrained:
    """Give a version the alias of the challenger, and let it be judged."""
    if registry.alias(CHALLENGER) != version.number and not version.rolled_back:
        registry.set_alias(CHALLENGER, version)
    result = promote(settings_path, version=version.number)
    tell(registry, registry.settings, datetime.now(UTC))
    return Retrained(
        version.number, result.promoted, result.outcome, result.reason, made_now=made_now
    )


def require_enough(fresh: FreshSet, settings: Settings) -> None:
    """Refuse too few labels, and labels of too few classes."""
    needed, least = labels_needed(fresh, settings), settings.policy.min_classes
    if len(fresh) < needed:
        raise RetrainError(
            f"{len(fresh)} fresh labels, and {needed} are needed before a retraining (min_labels ="
            f" {settings.policy.min_labels}, and min_fresh = {settings.gate.min_fresh} of them held"
            f" out): {needed - len(fresh)} are missing"
        )
    if fresh.classes < least:
        raise RetrainError(
            f"the {len(fresh)} fresh labels are of {fresh.classes} class(es), and min_classes ="
            f" {least} are needed: label samples of other classes too"
        )


def make_challenger(
    registry: Registry,
    settings: Settings,
    champion: Version,
    batches: Sequence[Batch],
    fresh: FreshSet,
    key: str,
    cause: str,
) -> Version:
    """Fine-tune, build what the version carries, and register it once."""
    network = champion_network = registry.network(champion)
    classes, task = tuple(network.config.classes), network.config.task
    told = task.names_in(fresh.table["label"]) if task.grows else ()
    if new := [c for c in settings.model.classes if c not in classes and c in told]:
        network = widen(network, (*classes, *new), seed=settings.training.seed)
        classes = network.config.classes
    memory = registry.memory(champion)
    labelled, unlabelled, about = read_window(registry, settings, champion, batches, fresh, network)
    try:
        require_enough(fresh.of(labelled.sample_ids), settings)
    except RetrainError as error:
        raise LabelsRefusedError(f"of the pictures that can be read: {error}") from error
    kept = memory.without(labelled.sample_ids)  # a corrected label replaces the old one
    old = kept.labelled(Role.TRAIN, classes, network.config.preprocessing, task)
    delivery = judge_delivery(champion_network, labelled, old, classes, settings.noise)
    if delivery.verdict.stop:
        raise LabelsRefusedError(
            f"{delivery.verdict.words} (or raise max_wrong_share under [noise])"
        )
    run_id = registry.begin_training(
        f"retrain v{champion.number}",
        {
            "sustain.retrain_key": key,
            "sustain.parent": str(champion.number),
            "sustain.cause": cause,
        },
    )
    counts = Counter(fresh.table["label"])
    training = search_settings(registry, run_id, network, delivery.believed, old, settings)
    registry.log(
        run_id,
        params={**asdict(training), "parent": champion.number, "fresh": dict(counts)},
    )
    old_validation = kept.labelled(Role.VALIDATION, classes, network.config.preprocessing, task)
    tuned = tune(network, champion_network, delivery.believed, old, old_validation, training)
    log_training(registry, run_id, tuned)
    with tempfile.TemporaryDirectory(prefix="sustain-") as name:
        write_suspicious(Path(name), delivery.usable, delivery.doubt, classes)
        for path in sorted(Path(name).iterdir()):
            registry.log_file(run_id, path)
    registry.log(run_id, tags={"sustain.labels": delivery.verdict.words})

    regime = f"since v{champion.number}"
    roles = [role_of(name) for name in labelled.sample_ids]
    window = remember(labelled, classes, roles, regime, about, task).extended(
        remember(unlabelled, classes, [Role.HOLDOUT] * len(unlabelled), regime, about, task)
    )
    carried = memory.extended(window).bounded(
        rehearsal=settings.memory.rehearsal, holdout=settings.memory.holdout
    )
    learned = pd.DataFrame(
        {
            "sample_id": list(labelled.sample_ids),
            "label": task.texts(labelled.labels, classes),
            "role": [role.value for role in roles],
        }
    )
    before = registry.learned(champion)
    used = pd.concat([before, learned])
    trained = frozenset(used[used["role"] != Role.HOLDOUT.value]["sample_id"])
    made = Package(
        network=tuned.network,
        reference=build_reference(
            tuned.network, carried, max_regimes=settings.checks.max_regimes, learned=trained
        ),
        memory=carried,
        learned=learned,
        learned_before=before,
        lineage=Lineage(
            parent=champion.number,
            cause=cause,
            settings={"training": asdict(training), "memory": asdict(settings.memory)},
            learned_digest=fresh.digest,
            code_version=installed_version("sustain"),
        ),
    )
    version = registry.register(
        made, key=key, run_id=run_id, tags={"parent": str(champion.number), "cause": cause}
    )
    registry.end_run(run_id)
    return version


def read_window(
    registry: Registry,
    settings: Settings,
    champion: Version,
    batches: Sequence[Batch],
    fresh: FreshSet,
    network: Network,
) -> tuple[LabelledPictures, LabelledPictures, About]:
    """Read the fresh labelled samples, and the unlabelled ones of the batches that rang.

    The first are learned from and judged on; the second, with the held-out part of the first,
    become the new regime of the reference. What came with each of them is told beside.
    """
    label_of = dict(zip(fresh.table["sample_id"], fresh.table["label"], strict=True))
    wanted: dict[str, set[str]] = defaultdict(set)
    for name in label_of:
        wanted[name.split("/", 1)[0]].add(name)
    rang = {c.key.batch_id for c in registry.checks(champion.number) if c.finished and c.alarm}
    known = set(registry.learned(champion)["sample_id"])
    labelled: list[tuple[str, torch.Tensor, str | None]] = []
    unlabelled: list[tuple[str, torch.Tensor, str | None]] = []
    about: About = {}
    for batch in reversed(batches):  # the newest first: the window is bounded
        whole = batch.id in rang and len(unlabelled) < settings.memory.holdout
        if not whole and batch.id not in wanted:
            continue
        only = None if whole else wanted[batch.id]
        try:
            read = read_batch(
                batch, settings.feed, settings.root, network.config.preprocessing, only=only
            )
        except FeedError as error:
            if batch.id not in wanted:
                continue  # it would only have added to the reference
            raise RetrainError(f"the fresh labels of a batch cannot be used: {error}") from error
        about |= read.about
        for name, picture in zip(read.samples["sample_id"], read.pictures, strict=True):
            if name in label_of:
                labelled.append((name, picture.pixels, label_of[name]))
            elif name not in known:
                unlabelled.append((name, picture.pixels, None))
    some = unlabelled[: settings.memory.holdout]
    return (
        _set(sorted(labelled, key=itemgetter(0)), network),
        _set(sorted(some, key=itemgetter(0)), network),
        about,
    )


def search_settings(
    registry: Registry,
    run_id: str,
    network: Network,
    labelled: LabelledPictures,
    old: LabelledPictures,
    settings: Settings,
) -> TrainingSettings:
    """Search what [search] names, if it is enabled; put what was tried on the training run.

    A search that finds nothing to search with, such as too few labels, leaves [training] as it is,
    and says so on the run.
    """
    if not settings.search.enabled:
        return settings.training
    try:
        found = search(
            members_of(network)[0],
            labelled.with_role(Role.TRAIN),
            old,
            settings.training,
            settings.search.grid,
            now=time.monotonic,
            folds=settings.search.folds,
            budget_seconds=settings.search.budget_seconds,
        )
    except SearchError as error:
        registry.log(run_id, tags={"sustain.searched": f"nothing was chosen: {error}"})
        return settings.training
    registry.log_text(run_id, _tried(found), "search.csv")
    told = "; ".join(filter(None, (found.note, found.stopped_by)))
    registry.log(run_id, tags={"sustain.searched": told})
    return found.settings


def _tried(found: Searched) -> str:
    told = [{**asdict(row), "loss": row.loss} for row in found.tried]
    rows = [{**row.pop("values"), **row} for row in told]
    return pd.DataFrame(rows).to_csv(index=False)


def tune(
    network: Network,
    champion: Network,
    labelled: LabelledPictures,
    old: LabelledPictures,
    old_validation: LabelledPictures,
    settings: TrainingSettings,
) -> FineTuned:
    """Fine-tune with rehearsal; stop early on fresh and old validation data together."""
    with Progress(transient=True) as progress:
        bar = progress.add_task("fine-tuning", total=settings.epochs * settings.runs)
        return fine_tune(
            network,
            labelled.with_role(Role.TRAIN),
            settings,
            memory=old,
            anchor=champion,
            cache=ActivationCache(),
            validation=(labelled.with_role(Role.VALIDATION), old_validation),
            on_epoch=lambda _: progress.advance(bar),
        )


def log_training(registry: Registry, run_id: str, tuned: FineTuned) -> None:
    """Put the loss curves and the reason for stopping on the training run."""
    for epoch in tuned.epochs:
        registry.log(
            run_id,
            metrics={
                "train.loss": epoch.train_loss,
                "validation.loss": epoch.validation_loss,
                "validation.accuracy": epoch.validation_accuracy,
            },
            step=epoch.number,
        )
    registry.log(
        run_id,
        metrics={"best_epoch": float(tuned.best_epoch), "interpolation.alpha": tuned.alpha},
        tags={
            "sustain.stopped": tuned.stopped,
            "sustain.corrected": "; ".join(tuned.notes),
            "sustain.members": "; ".join(tuned.members),
        },
    )


def _set(
    samples: Sequence[tuple[str, torch.Tensor, str | None]], network: Network
) -> LabelledPictures:
    config = network.config
    size, channels = config.preprocessing.image_size, config.preprocessing.channels
    pixels = [pixels for _, pixels, _ in samples]
    return LabelledPictures(
        tuple(name for name, _, _ in samples),
        torch.stack([torch.empty(channels, size, size, dtype=torch.uint8), *pixels])[1:],
        config.task.rows([label for _, _, label in samples], config.classes),
    )
