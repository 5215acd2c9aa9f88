"""A champion of digits and a feed with a history, made without MLflow or Prefect in a second."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import torch
import worlds

if TYPE_CHECKING:
    from flows.demo import Digits
    from flows.past import Past
    from flows.settings import Settings
    from flows.simulated import Shelf, Start
    from sft.dataset import LabelledPictures
    from sft.models import Network
    from sft.train import TrainingSettings

BEGIN = datetime(2026, 1, 1, tzinfo=UTC)
HOUR = timedelta(hours=1)
SIZE = 60


@dataclass(frozen=True)
class Story:
    """A model folder at `settings.root`, and the version that serves when its history begins."""

    settings: Settings
    shelf: Shelf
    start: Start

    @property
    def past(self) -> Past:
        """Read the history as it lies on disk now."""
        from flows.past import read_past

        return read_past(self.settings)


def make_story(root: Path, kinds: Sequence[str], *, labels: Callable[[int], bool]) -> Story:
    """Make a champion of 300 MNIST digits and a batch an hour, "mnist" or "optical" as named.

    Labels of the batches at the places that `labels` names come half an hour after the batch.
    """
    from flows.grid import prepared
    from flows.settings import load_settings

    (root / "feed").mkdir(parents=True)
    (root / "labels").mkdir()
    path = root / "sustain.toml"
    text = worlds.SETTINGS.format(name="digits").replace("epochs = 40", "epochs = 12")
    path.write_text(text.replace("[policy]", "[memory]\nrehearsal = 100\n\n[policy]"))
    settings = prepared(load_settings(path, environ={}))
    shelf, start = make_start(settings, _mnist()[:300])
    pools = {"mnist": _mnist()[1000:], "optical": _optical()}
    used = dict.fromkeys(pools, 0)
    rows = []
    for place, kind in enumerate(kinds):
        at = BEGIN + place * HOUR
        part = slice(used[kind], used[kind] + SIZE)
        used[kind] += SIZE
        batch = write_batch(root / "feed" / f"{place:02d}-{kind}", pools[kind][part], at)
        if labels(place):
            rows += [f"{one},{(at + HOUR / 2).isoformat()}" for one in batch]
    if rows:
        table = "\n".join(["sample_id,label,labelled_at", *rows, ""])
        (root / "labels" / "late.csv").write_text(table)
    return Story(settings, shelf, start)


def write_batch(folder: Path, digits: Digits, at: datetime) -> list[str]:
    """Write a batch that arrived at a time; return `sample_id,label` of its pictures."""
    from PIL import Image

    folder.mkdir()
    told = []
    for place, (picture, label) in enumerate(zip(digits.pictures, digits.labels, strict=True)):
        file = folder / f"{place:03d}.png"
        Image.fromarray(picture).save(file)
        os.utime(file, (at.timestamp(), at.timestamp()))
        told.append(f"{folder.name}/{file.name},{label}")
    return told


def make_start(settings: Settings, digits: Digits) -> tuple[Shelf, Start]:
    """Train a champion on digits and lay it on a shelf."""
    from flows.package import Lineage, Package, build_reference
    from flows.replay import FOLDER
    from flows.simulated import Shelf, Start
    from sft.dataset import role_of
    from sft.memory import remember

    classes = tuple(map(str, range(10)))
    ids = _pictures(digits).sample_ids
    roles = [role_of(name) for name in ids]
    pictures = _pictures(digits)
    network = _champion(settings.bootstrap)
    memory = remember(pictures, classes, roles, "first").bounded(rehearsal=100, holdout=2000)
    texts = [classes[label] for label in digits.labels]
    learned = pd.DataFrame({"sample_id": ids, "label": texts, "role": [r.value for r in roles]})
    lineage = Lineage(None, "bootstrap", {}, "", "")
    reference = build_reference(network, memory, max_regimes=8)
    shelf = Shelf(settings.root / FOLDER / "steps")
    folder = shelf.path("version/start")
    folder.mkdir(parents=True)
    Package(network, reference, memory, learned, lineage).write(folder)
    created = BEGIN - HOUR
    tags = {"digest": "version/start", "verdict": "first", "promoted_at": created.isoformat()}
    return shelf, Start(1, tags, created)


@functools.cache
def _mnist() -> Digits:
    from flows import demo

    return demo._mnist()


@functools.cache
def _optical() -> Digits:
    from flows import demo

    return demo._optical()


@functools.cache
def _champion(settings: TrainingSettings) -> Network:
    from sft.dataset import Role
    from sft.models import ModelConfig, build
    from sft.pictures import Preprocessing
    from sft.train import fine_tune

    seen = Preprocessing(image_size=28, channels=1)
    network = build(ModelConfig("small_cnn", tuple(map(str, range(10))), seen, (0.13,), (0.31,)))
    learned = _pictures(_mnist()[:300]).with_role(Role.TRAIN)
    return fine_tune(network, learned, settings).network.eval()


def _pictures(digits: Digits) -> LabelledPictures:
    from sft.dataset import LabelledPictures

    return LabelledPictures(
        tuple(f"first/{place}.png" for place in range(len(digits))),
        torch.from_numpy(digits.pictures).unsqueeze(1),
        torch.from_numpy(digits.labels),
    )


def replayed(story: Story, **policies: object) -> dict[str, object]:
    """Replay policies by their `retrain_when`; return what each did, by name."""
    from flows.grid import grid_of
    from flows.replay import expand, replay

    grids = [grid_of(name, {"policy": {"retrain_when": when}}) for name, when in policies.items()]
    past = story.past
    return {
        one.name: replay(past, story.start, story.shelf, one)
        for one in expand(replace(story.settings), grids)
    }
