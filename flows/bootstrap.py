"""`sustain bootstrap`: a first champion, trained from labelled data or adopted as it is."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version as installed_version
from pathlib import Path

import pandas as pd
import torch
from prefect import flow
from scipy.stats import binomtest

from flows.batches import read_batch
from flows.digest import digest
from flows.feed import BatchEmpty, describe_batch
from flows.history import show_in_prefect
from flows.intake import About
from flows.labels import read_label_file
from flows.package import Lineage, Package, build_reference
from flows.preflight import (
    BootstrapError,
    expected,
    require_architecture,
    require_weights,
)
from flows.progress import TrainingBar
from flows.records import CHAMPION, Version
from flows.registry import Registry
from flows.retrain import log_training
from flows.settings import Settings, load_settings
from flows.story import first_story
from flows.words import first_few, shown_uri
from monitoring.policy import reference_needed, smallest_fall
from sft.after import tune
from sft.cache import ActivationCache
from sft.dataset import LabelledPictures, Role, role_of
from sft.evaluate import answer
from sft.memory import remember
from sft.models import (
    BUILT_IN,
    ModelConfig,
    Network,
    build,
    is_factory,
    published_input,
)
from sft.pictures import Preprocessing
from sft.pixels import channel_statistics, take
from sft.tasks import SINGLE_LABEL, TASKS, LabelError, Regression, Task

FIRST_REGIME = "first"


@dataclass(frozen=True)
class Bootstrapped:
    """The first champion: its version, its accuracy on held-out samples, and their number.

    `made_now` is false where the same data and settings had made it before; `warning` says what few
    held-out samples cost, and is empty where they suffice.
    """

    version: int
    accuracy: float
    holdout: int
    notes: tuple[str, ...]
    made_now: bool
    warning: str = ""


@flow(name="bootstrap")
def bootstrap(
    settings_path: str, data: str, labels: str | None = None, adopt: str | None = None
) -> Bootstrapped:
    """Make the first champion.

    Args:
        settings_path: the model's TOML file.
        data: folder or URL of labelled pictures, in any of the forms of a batch.
        labels: CSV or Parquet with `sample_id,label`, when the data has no labels of its own.
        adopt: a state dict of a finished model, which becomes champion untrained. The data should
            then be samples that it was not trained on.

    Raises:
        BootstrapError: there is a champion already, or data or settings do not suffice.
    """
    settings = load_settings(Path(settings_path))
    registry = Registry(settings)
    registry.observe_moves(datetime.now(UTC))
    if adopt is not None:
        _require_adoptable(settings, adopt)
    pictures, classes, about, notes = _labelled_pictures(settings, data, labels)
    key = _key(settings, pictures, adopt)
    existing = registry.find_version(key)
    champion = registry.alias(CHAMPION)
    if champion is not None and "digest" not in registry.version(champion).tags:
        champion = None  # somebody else's: this is how it is replaced
    if champion is not None and (existing is None or existing.number != champion):
        raise BootstrapError(
            f"model {settings.model.name!r} has a champion already (version {champion}): retrain it"
            " with `sustain retrain`, or choose another name under [model]"
        )
    made_now = existing is None
    if existing is None:
        existing = _make(settings, registry, pictures, classes, about, key, adopt)
    else:
        registry.finish_training(existing)
    if "verdict" not in existing.tags:
        registry.describe(existing, first_story(registry, existing))
        registry.tag(
            existing, verdict_reason="the first version: nothing to compare with", verdict="first"
        )
    if champion is None:
        registry.move_champion(
            existing, by="bootstrap", why="the first version", now=datetime.now(UTC)
        )
        show_in_prefect(registry)
    reference = registry.reference(existing)
    accuracy, n = reference.accuracy, reference.n
    warning = too_few(accuracy, n, settings.policy.min_drop)
    return Bootstrapped(existing.number, accuracy, n, tuple(notes), made_now, warning)


def too_few(accuracy: float, holdout: int, min_drop: float) -> str:
    """Say which falls of accuracy so few held-out samples can never show; empty if none matters."""
    least = smallest_fall(accuracy, holdout)
    if least <= min_drop or least == 1:
        return ""
    needed = reference_needed(accuracy, min_drop)
    return (
        f"{holdout} held-out samples are few: labels, however many come, cannot show a fall of"
        f" accuracy under {least * 100:.1f} points, and min_drop under [policy] is"
        f" {min_drop * 100:g}; with some {needed} held out they can"
    )


def _labelled_pictures(
    settings: Settings, data: str, labels: str | None
) -> tuple[LabelledPictures, tuple[str, ...], About, list[str]]:
    """Read the data and settle which classes there are."""
    preprocessing = _preprocessing(settings)
    batch = describe_batch(data, settings.feed, Path.cwd())
    try:
        read = read_batch(
            batch,
            settings.feed,
            Path.cwd(),
            preprocessing,
            in_memory_bytes=settings.memory.in_memory_bytes,
        )
    except BatchEmpty as error:
        where, forms = shown_uri(batch.url), expected(settings.feed.label_column)
        raise BootstrapError(f"{where}: {error}; {forms}") from error
    notes = [f"{q.sample_id}: {q.reason}" for q in read.quarantined] + list(read.notes)
    given = dict(zip(read.samples["sample_id"], read.samples["label"], strict=True))
    names: list[str] = []
    if labels is not None:
        late = read_label_file(labels, Path.cwd(), settings.feed)
        names = [read.batch.id_of(name) for name in late.labels["sample_id"]]
        for name in late.disputed:
            given.pop(read.batch.id_of(name), None)
        given |= dict(zip(names, late.labels["label"], strict=True))
        notes += late.problems
    known = {name: str(label) for name, label in given.items() if not pd.isna(label)}
    kept = [place for place, name in enumerate(read.samples["sample_id"]) if name in known]
    if not kept and names:
        raise BootstrapError(
            f"none of the {len(names)} sample_ids that --labels names is of a picture in {data}:"
            f" they are {first_few(names)}, and pictures {first_few(list(given))}"
        )
    if not kept:
        raise BootstrapError(
            f"no picture in {data} has a label: put the pictures into one folder a class, add a"
            f" metadata file with the column {settings.feed.label_column!r}, or name a file of"
            " labels with --labels"
        )
    ids = [read.samples["sample_id"].iloc[place] for place in kept]
    counts = Counter(known[name] for name in ids)
    task = _task(settings)
    classes = settings.model.classes or task.names_in(counts)
    if task == SINGLE_LABEL and (odd := sorted(set(counts) - set(classes))):
        raise BootstrapError(
            f"{data} has labels of classes that [model] classes does not name: {odd[:5]}"
        )
    if len(counts) < 2:  # noqa: PLR2004 - one class leaves nothing to learn
        raise BootstrapError(
            f"all {len(ids)} labels in {data} are of one class ({next(iter(counts))!r}): a"
            " classifier needs at least two"
            if task == SINGLE_LABEL
            else f"all {len(ids)} labels in {data} are {next(iter(counts))!r}: nothing can be"
            " learned from them"
        )
    for text, n in counts.items():
        try:
            task.row(text, classes)
        except LabelError as error:
            raise BootstrapError(f"{n} labels in {data} cannot be used: {error}") from error
    return (
        LabelledPictures(
            tuple(ids),
            take(read.pixels, torch.tensor(kept)),
            task.rows([known[name] for name in ids], classes),
        ),
        classes,
        read.about,
        notes,
    )


def _make(
    settings: Settings,
    registry: Registry,
    pictures: LabelledPictures,
    classes: tuple[str, ...],
    about: About,
    key: str,
    adopt: str | None,
) -> Version:
    train, holdout = pictures.with_role(Role.TRAIN), pictures.with_role(Role.HOLDOUT)
    task = _task(settings)
    if len(holdout) < 20 or task.unlearnable(train.labels):  # noqa: PLR2004 - said below
        raise BootstrapError(
            f"{len(pictures)} labelled pictures leave {len(train)} to train on and {len(holdout)}"
            " to hold out (at least 20, better ten times a batch): give more"
        )
    # an adopted model answers in the labels' own unit
    config = _config(settings, train, classes, task if adopt else task.fitted(train.labels))
    network = _network(settings, config, adopt)
    run_id = registry.begin_training(
        f"bootstrap {settings.model.architecture}",
        {"sustain.retrain_key": key, "sustain.cause": "bootstrap"},
    )
    registry.log(run_id, params={**asdict(settings.bootstrap), **asdict(settings.model)})
    if adopt is None:
        total = settings.bootstrap.epochs * settings.bootstrap.runs
        bar = TrainingBar("training the first champion", len(train), total)
        with bar:
            tuned = tune(
                network,
                train,
                settings.bootstrap,
                cache=ActivationCache(compute=settings.compute),
                validation=(pictures.with_role(Role.VALIDATION),),
                on_epoch=bar.on_epoch,
                on_batch=bar.on_batch,
                compute=settings.compute,
            )
        network = tuned.network
        log_training(registry, run_id, tuned)
    network.eval()
    roles = [role_of(name) for name in pictures.sample_ids]
    carried = settings.memory
    memory = (
        replace(
            remember(pictures, classes, roles, FIRST_REGIME, about, task, encode=False),
            in_memory_bytes=carried.in_memory_bytes,
        )
        .bounded(rehearsal=carried.rehearsal, holdout=carried.holdout)
        .with_pictures(pictures)
    )
    labels = task.texts(pictures.labels, classes)
    learned = pd.DataFrame(
        {"sample_id": list(pictures.sample_ids), "label": labels, "role": [r.value for r in roles]}
    )
    accuracy = answer(network, holdout).accuracy
    if adopt is not None:
        _require_better_than_chance(accuracy, holdout, classes, task)
    made = Package(
        network=network,
        reference=build_reference(network, memory, max_regimes=settings.checks.max_regimes),
        memory=memory,
        learned=learned,
        lineage=Lineage(
            parent=None,
            cause="bootstrap" if adopt is None else f"adopted from {Path(adopt).name}",
            settings={"bootstrap": asdict(settings.bootstrap), "model": asdict(settings.model)},
            learned_digest=key,
            code_version=installed_version("sustain"),
        ),
    )
    registry.log(run_id, metrics={"holdout.accuracy": accuracy, "holdout.samples": len(holdout)})
    version = registry.register(made, key=key, run_id=run_id, tags={"cause": made.lineage.cause})
    registry.end_run(run_id)
    return version


def _require_adoptable(settings: Settings, adopt: str) -> None:
    """Refuse to guess what a finished model was trained with."""
    model = settings.model
    require_weights(adopt, named=bool(model.classes))
    if (model.architecture in BUILT_IN or is_factory(model.architecture)) and not model.mean:
        raise BootstrapError(
            f"to adopt a model on {model.architecture}, state the mean and std under [model] that"
            " its pictures were normalised with (pixels in [0, 1])"
        )


def _require_better_than_chance(
    accuracy: float, holdout: LabelledPictures, classes: tuple[str, ...], task: Task
) -> None:
    """Refuse an adopted model that answers no better than a guess: something about it is wrong."""
    n, chance = len(holdout), task.chance(holdout.labels, len(classes))
    right = round(accuracy * n)
    if binomtest(right, n, chance, alternative="greater").pvalue > 0.05:  # noqa: PLR2004 - the usual level
        raise BootstrapError(
            f"the adopted model is right on {right} of {n} held-out samples, no better than a guess"
            f" among {len(classes)} {'classes' if task.grows else 'targets'} ({chance:.0%}): are"
            " the classes in the order of its head's outputs, and are mean, std, image_size,"
            " resize_size and channels those it was trained with?"
        )


def _preprocessing(settings: Settings) -> Preprocessing:
    model = settings.model
    require_architecture(model.architecture)
    size = model.image_size or (
        28 if model.architecture in BUILT_IN else published_input(model.architecture).image_size
    )
    return Preprocessing(
        image_size=size, resize_size=model.resize_size or size, channels=model.channels or 3
    )


def _task(settings: Settings) -> Task:
    """Make the task that the settings name."""
    model = settings.model
    if model.task != Regression.name:
        return TASKS[model.task]() if model.task else SINGLE_LABEL
    if not model.tolerance:
        raise BootstrapError(
            "a regression needs tolerance under [model]: the largest error that still counts as"
            " right, in the unit of the labels"
        )
    return Regression(model.regression_loss or "mse", model.tolerance)


def _config(
    settings: Settings, train: LabelledPictures, classes: tuple[str, ...], task: Task
) -> ModelConfig:
    preprocessing = _preprocessing(settings)
    architecture = settings.model.architecture
    if settings.model.mean:
        return ModelConfig(
            architecture, classes, preprocessing, settings.model.mean, settings.model.std, task
        )
    if architecture in BUILT_IN or (is_factory(architecture) and not settings.model.weights):
        mean, spread = channel_statistics(train.pixels)
        std = [max(value, 1e-3) for value in spread]
    else:
        published = published_input(architecture)
        mean, std = list(published.mean), list(published.std)
        if preprocessing.channels == 1:
            mean, std = [sum(mean) / 3], [sum(std) / 3]
    rounded = [tuple(round(value, 6) for value in values) for values in (mean, std)]
    return ModelConfig(architecture, classes, preprocessing, rounded[0], rounded[1], task)


def _network(settings: Settings, config: ModelConfig, adopt: str | None) -> Network:
    weights: str | Path | None = adopt or settings.model.weights or None
    if adopt is None and weights is not None:
        local = settings.root / str(weights)
        weights = local if local.is_file() else weights
    return build(
        config,
        weights=Path(adopt) if adopt is not None else weights,
        keep_head=adopt is not None,
        allowed_factories=settings.allowed_factories,
        seed=settings.bootstrap.seed,
    )


def _key(settings: Settings, pictures: LabelledPictures, adopt: str | None) -> str:
    stated = {
        "bootstrap": asdict(settings.bootstrap),
        "model": asdict(replace(settings.model, name="")),
        "memory": settings.memory.carried,
        "data": list(zip(pictures.sample_ids, pictures.labels.tolist(), strict=True)),
        "adopt": hashlib.sha256(Path(adopt).read_bytes()).hexdigest() if adopt else None,
    }
    return digest(stated)[:32]
