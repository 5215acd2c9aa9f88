"""`sustain retrain`: fine-tune the champion on fresh labels; register and judge the challenger."""

from __future__ import annotations

import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version as installed_version
from pathlib import Path

import pandas as pd
import torch
from prefect import flow

from flows.check import that_rang
from flows.decisions import record_refusal
from flows.doubt import PAGE, Delivery, judge_delivery, suspicious_files
from flows.feed import Batch
from flows.fresh import FreshSet, fresh_set, labels_needed, retrain_key, stated
from flows.intake import About
from flows.kept import Step
from flows.logs import log
from flows.meter import Meter
from flows.notify import tell, tell_of_failure
from flows.package import Lineage, Package, build_reference
from flows.progress import TrainingBar
from flows.promote import promote, promote_on
from flows.records import CHALLENGER, Version
from flows.registry import Registry
from flows.settings import Settings, load_settings, refuse_contradiction
from flows.shadow import SHADOW, batches_left
from flows.storage import FeedError
from monitoring.words import count
from sft import models, processes
from sft.averaging import members_of
from sft.cache import ActivationCache
from sft.dataset import LabelledPictures, Role, role_of
from sft.memory import remember
from sft.models import Network, widen
from sft.pixels import PixelSink
from sft.search import Searched, SearchError, search
from sft.train import FineTuned, TrainingSettings

SERVES = "serves"
"""The outcome where another version came to serve before the training that was due."""


class RetrainError(ValueError):
    """Nothing can be trained; the message names what is missing."""


class LabelsRefusedError(RetrainError):
    """The labels were read and cannot be learned from: the same ones would be refused again.

    `files` (name to text) show the suspicious ones.
    """

    def __init__(self, words: str, files: Mapping[str, str] | None = None) -> None:
        super().__init__(words)
        self.files = files or {}


@dataclass(frozen=True)
class Retrained:
    """What a retraining, or an adaptation, made, and what became of it."""

    version: int
    promoted: bool
    outcome: str
    reason: str
    made_now: bool
    worst: str = ""

    @property
    def words(self) -> str:
        """One sentence."""
        if self.outcome == SERVES:
            return f"version {self.version} serves: {self.reason}"
        what = "was promoted" if self.promoted else f"was not promoted ({self.outcome})"
        made = "" if self.made_now else ", made before,"
        return f"version {self.version}{made} {what}: {self.reason}"


@flow(name="retrain", on_failure=[tell_of_failure], on_crashed=[tell_of_failure])
def retrain(
    settings_path: str,
    cause: str = "asked for by a person",
    check: str = "",
    key: str = "",
) -> Retrained:
    """Make a challenger from the champion and the fresh labels, once, and let it be judged.

    Run again with the same champion, labels and settings it finds the version that it made, and
    goes on where it was interrupted.

    Args:
        settings_path: the model's TOML file.
        cause: why, for the record.
        check: run of the check that caused it, if one did.
        key: of the retraining that was due when this run was asked for, if a check did; it trains
            on what is fresh now, and nothing when another version serves by now.

    Raises:
        RetrainError: too few fresh labels, or of too few classes.
    """
    return retrain_on(Registry(load_settings(Path(settings_path))), cause, check, key)


def retrain_on(registry: Registry, cause: str, check: str = "", key: str = "") -> Retrained:
    """Do what `retrain` does, on a record."""
    registry.observe_moves(registry.now())
    champion = registry.champion()
    if key and check and (against := registry.check_record(check).key.champion) != champion.number:
        reason = f"nothing is due any more: the check was of version {against}"
        return Retrained(champion.number, False, SERVES, reason, made_now=False)
    version, made_now = train_on(registry, champion, cause, check)
    return challenge(registry, version, made_now=made_now)


def train_on(
    registry: Registry, champion: Version, cause: str, check: str = ""
) -> tuple[Version, bool]:
    """Make a challenger, unless it was made before; return it, and whether it was made now.

    Raises:
        RetrainError: too few fresh labels, or of too few classes.
        LabelsRefusedError: they cannot be learned from; the check that caused it then asks for
            others.
    """
    settings = registry.settings
    batches = registry.view.batches()
    config = registry.config(champion)
    refuse_contradiction(settings, config)
    labels = registry.view.labels(batches, config.classes, config.task)
    fresh = fresh_set(labels, registry.learned(champion))
    key = retrain_key(champion.number, fresh, settings)
    version = registry.find_version(key)
    made_now = version is None
    if version is None:
        require_enough(fresh, settings)
        learns = (champion.tags["digest"], stated(fresh, settings))
        rang = names_that_rang(registry, champion, batches)
        try:
            version = registry.made(
                (*learns, settings.checks.max_regimes, sorted(rang)),
                lambda: make_challenger(
                    registry, settings, champion, batches, fresh, rang, key, cause, check
                ),
                {"retrain_key": key, **_origin(champion, cause, check)},
            )
        except LabelsRefusedError as error:
            if check:
                record_refusal(registry, check, fresh, str(error), error.files)
            raise
    else:
        registry.finish_training(version)
    return version, made_now


def challenge(registry: Registry, version: Version, *, made_now: bool) -> Retrained:
    """Give a version the alias of the challenger, and let it be judged."""
    if registry.alias(CHALLENGER) != version.number and not version.rolled_back:
        registry.set_alias(CHALLENGER, version)
    if left := batches_left(registry, version):
        batches = count(left, "more batch", "more batches")
        words = f"it answers {batches} beside the champion before it is judged"
        return Retrained(version.number, False, SHADOW, words, made_now=made_now)
    if registry.live:
        path = str(registry.settings.path)
        result = promote(path, version=version.number, approved=False)
        tell(registry, registry.settings, registry.now())
    else:
        result = promote_on(registry, version.number, approved=False)
    log(
        registry.settings,
        "challenger.judged",
        version=version.number,
        outcome=result.outcome,
        promoted=result.promoted,
        reason=result.reason,
    )
    return Retrained(
        version.number,
        result.promoted,
        result.outcome,
        result.reason,
        made_now=made_now,
        worst=registry.version(version.number).tags.get("worst_classes", ""),
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
    rang: Collection[str],
    key: str,
    cause: str,
    check: str,
) -> Version:
    """Fine-tune, build what the version carries, and register it once."""
    network = champion_network = registry.network(champion)
    classes, task = tuple(network.config.classes), network.config.task
    told = task.names_in(fresh.table["label"]) if task.grows else ()
    if new := [c for c in settings.model.classes if c not in classes and c in told]:
        network = widen(network, (*classes, *new), seed=settings.training.seed)
        classes = network.config.classes
    memory = registry.memory(champion)
    labelled, unlabelled, about = read_window(
        registry, settings, champion, batches, fresh, network, rang
    )
    try:
        require_enough(fresh.of(labelled.sample_ids), settings)
    except RetrainError as error:
        raise LabelsRefusedError(f"of the pictures that can be read: {error}") from error
    kept = memory.without(labelled.sample_ids)  # a corrected label replaces the old one
    old = kept.labelled(Role.TRAIN, classes, network.config.preprocessing, task)
    delivery = judge_delivery(champion_network, labelled, old, classes, settings.noise, rang)
    if delivery.verdict.stop:
        raise _refused(registry, champion, delivery, classes)
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

    def fine_tune() -> Network:
        with Meter(energy=registry.live) as meter:
            tuned = tune(
                network,
                champion_network,
                delivery.believed,
                old,
                old_validation,
                settings,
                training,
            )
        registry.log(run_id, metrics=meter.cost.metrics)
        if registry.live:
            log_training(registry, run_id, tuned)
        return tuned.network

    load = partial(models.load, allowed_factories=settings.allowed_factories)
    learns = (champion.tags["digest"], stated(fresh, settings))
    tuned = registry.once(Step("tuned", models.save, load), learns, fine_tune)
    # nobody looks at those of a replay
    files = suspicious_files(delivery.usable, delivery.doubt, classes) if registry.live else {}
    for name, text in files.items():
        registry.log_text(run_id, text, name)
    doubts = delivery.verdict.words + (f"; {PAGE} shows those to learn from" if files else "")
    registry.log(run_id, tags={"sustain.labels": doubts})

    regime = f"since v{champion.number}"
    roles = [role_of(name) for name in labelled.sample_ids]
    held = [Role.HOLDOUT] * len(unlabelled)
    window = remember(labelled, classes, roles, regime, about, task, encode=False).extended(
        remember(unlabelled, classes, held, regime, about, task, encode=False)
    )
    carried = (
        memory.extended(window)
        .bounded(rehearsal=settings.memory.rehearsal, holdout=settings.memory.holdout)
        .with_pictures(labelled, unlabelled)
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
        network=tuned,
        reference=build_reference(
            tuned, carried, max_regimes=settings.checks.max_regimes, learned=trained
        ),
        memory=carried,
        learned=learned,
        learned_before=before,
        lineage=Lineage(
            parent=champion.number,
            cause=cause,
            settings={"training": asdict(training), "memory": settings.memory.carried},
            learned_digest=fresh.digest,
            code_version=installed_version("sustain"),
        ),
    )
    tags = {**_origin(champion, cause, check), "labels": doubts}
    version = registry.register(made, key=key, run_id=run_id, tags=tags)
    registry.end_run(run_id)
    return version


def _refused(
    registry: Registry,
    champion: Version,
    delivery: Delivery,
    classes: Sequence[str],
) -> LabelsRefusedError:
    """Put the suspicious labels of a refused delivery on a run of their own."""
    verdict = delivery.verdict
    files = suspicious_files(delivery.judged, verdict, classes, all_doubted=True)
    words = f"{verdict.words} (or raise max_wrong_share under [noise])"
    if files:
        run = f"refused labels v{champion.number}"
        run_id = registry.begin_training(run, {"sustain.labels": verdict.words})
        for name, text in files.items():
            registry.log_text(run_id, text, name)
        registry.end_run(run_id, failed=True)
        words += f"; {PAGE} on the run {run!r} in MLflow shows them"
    return LabelsRefusedError(words, files)


def _origin(champion: Version, cause: str, check: str) -> dict[str, str]:
    tags = {"parent": str(champion.number), "cause": cause}
    return tags | ({"cause_check": check} if check else {})


def names_that_rang(registry: Registry, champion: Version, batches: Sequence[Batch]) -> set[str]:
    """Name the batches that differed from the champion's reference, all of these among them."""
    checks = registry.newest_checks(champion.number, {b.id: b.arrived for b in batches})
    return {c.key.batch_id for c in that_rang(c for c in checks if c.saw_something)}


def read_window(
    registry: Registry,
    settings: Settings,
    champion: Version,
    batches: Sequence[Batch],
    fresh: FreshSet,
    network: Network,
    rang: Collection[str],
) -> tuple[LabelledPictures, LabelledPictures, About]:
    """Read the fresh labelled samples, and the unlabelled ones of the batches that `rang`, by id.

    The first are learned from and judged on; the second, with the held-out part of the first,
    become the new regime of the reference. What came with each of them is told beside.
    """
    label_of = dict(zip(fresh.table["sample_id"], fresh.table["label"], strict=True))
    wanted: dict[str, set[str]] = defaultdict(set)
    for name in label_of:
        wanted[name.split("/", 1)[0]].add(name)
    known = set(registry.learned(champion)["sample_id"])
    labelled, unlabelled = _Window(network, settings), _Window(network, settings)
    about: About = {}
    for batch in reversed(batches):  # the newest first: the window is bounded
        whole = batch.id in rang and len(unlabelled) < settings.memory.holdout
        if not whole and batch.id not in wanted:
            continue
        only = None if whole else wanted[batch.id]
        try:
            read = registry.read(batch, network.config.preprocessing, only)
        except FeedError as error:
            if batch.id not in wanted:
                continue  # it would only have added to the reference
            raise RetrainError(f"the fresh labels of a batch cannot be used: {error}") from error
        about |= read.about
        for name, pixels in zip(read.samples["sample_id"], read.pixels, strict=True):
            if name in label_of:
                labelled.add(name, pixels, label_of[name])
            elif name not in known and len(unlabelled) < settings.memory.holdout:
                unlabelled.add(name, pixels, None)
    return labelled.sorted(), unlabelled.sorted(), about


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
    settings: Settings,
    training: TrainingSettings,
) -> FineTuned:
    """Fine-tune with rehearsal; stop early on fresh and old validation data together."""
    train = labelled.with_role(Role.TRAIN)
    bar = TrainingBar("fine-tuning", len(train), training.epochs * training.runs)
    with bar:
        return processes.tune(
            network,
            train,
            training,
            memory=old,
            anchor=champion,
            cache=ActivationCache(compute=settings.compute),
            compute=settings.compute,
            validation=(labelled.with_role(Role.VALIDATION), old_validation),
            on_epoch=bar.on_epoch,
            on_batch=bar.on_batch,
        )


def log_training(registry: Registry, run_id: str, tuned: FineTuned) -> None:
    """Put the loss curves, as figures and as a picture, and the reason for stopping on the run."""
    from flows.charts import draw_training  # matplotlib takes a second

    for epoch in tuned.epochs:
        registry.log(
            run_id,
            metrics={
                "train.loss": epoch.train_loss,
                "validation.loss": epoch.validation_loss,
                "validation.accuracy": epoch.validation_accuracy,
                "learning_rate": epoch.learning_rate,
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
    with tempfile.TemporaryDirectory(prefix="sustain-") as name:
        path = Path(name) / "training.png"
        draw_training(path, tuned)
        registry.log_file(run_id, path)


class _Window:
    """Collects the samples of several batches."""

    def __init__(self, network: Network, settings: Settings) -> None:
        self._config = network.config
        seen = self._config.preprocessing
        shape = (seen.channels, seen.image_size, seen.image_size)
        self._pixels = PixelSink(shape, settings.memory.in_memory_bytes)
        self._names: list[str] = []
        self._labels: list[str | None] = []

    def __len__(self) -> int:
        return len(self._names)

    def add(self, name: str, pixels: torch.Tensor, label: str | None) -> None:
        self._names.append(name)
        self._labels.append(label)
        self._pixels.add(pixels)

    def sorted(self) -> LabelledPictures:
        """Give the samples by their ids, whatever the order of their batches."""
        labels = self._config.task.rows(self._labels, self._config.classes)
        data = LabelledPictures(tuple(self._names), self._pixels.finish(), labels)
        return data.take(sorted(range(len(data)), key=self._names.__getitem__))
