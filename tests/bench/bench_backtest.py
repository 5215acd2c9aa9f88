"""Policies replayed on streams of real pictures: `make bench-backtest`, some ten CPU minutes.

Three streams, a batch an hour, every picture's label 1.5 hours after it:

- digits: MNIST, optical digits coming and going, and both at once.
- PACS: photos, then art, then sketches, in steps; photos come back, mixed ever more with sketches.
  A picture here is its SqueezeNet embedding (512 values in 8 bits), and the network a linear head.
- harmless: MNIST with .7 of its contrast, which the champion answers as well as before (.915 of
  1,000, .919 without) and which every drift test finds.

The policies are those of Modyn's grid (Böther et al. 2025) as far as the product has them: every so
many batches or samples, a drift test with a fixed threshold on each batch or summed up over the
stream, a drift distance above a fixed threshold or one that rolls with the last 15, and true
accuracy below a limit; beside ours as it is by default, never, and the oracle.
"""

from __future__ import annotations

import single_thread  # noqa: F401 - numpy and torch read what it sets when they are imported

# isort: split

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import realdata
import torch
from PIL import Image
from results import FOLDER, Figure, publish, write
from torch import nn

from flows.grid import Grid, grid_of, prepared
from flows.meter import total
from flows.package import Lineage, Package, build_reference
from flows.past import read_past
from flows.replay import Backtest, expand, find_ideal, replay
from flows.replay_page import write_page
from flows.settings import load_settings
from flows.simulated import Costs, Shelf, Start
from monitoring.replay import Replayed
from sft.dataset import LabelledPictures, Role, role_of
from sft.memory import remember
from sft.models import ModelConfig, build
from sft.pictures import Preprocessing
from sft.train import TrainingSettings, fine_tune

BEGIN = datetime(2026, 1, 1, tzinfo=UTC)
HOUR = timedelta(hours=1)
SIZE = 60
SIDE = 23
"""Pixels of the square that holds an embedding of 512 values."""
COST = 20.0
"""Wrong answers that a retraining costs: a third of a batch."""
SETTINGS = """\
[model]
name = "{name}"
architecture = "{architecture}"
channels = 1

[training]
epochs = 8
{training}

[memory]
rehearsal = 300
holdout = 400

[policy]
min_labels = 100

[gate]
min_fresh = 50
"""
TEN = 10
EVERY = (1, 3, 5, 15)
SAMPLES = (500, 1000, 2000)
BELOW = (0.70, 0.80, 0.85, 0.90, 0.95)
SCHEDULES = (*(f"every {n} batches" for n in EVERY), *(f"every {n} samples" for n in SAMPLES))
ABOVE = (0.1, 0.2, 0.4)
QUANTILES = (0.8, 0.95)
DISTANCE = (
    *(f"drift distance > {limit:g}" for limit in ABOVE),
    *(f"drift distance > quantile {share:g}" for share in QUANTILES),
)
DRIFT = ("drift test, p < .05", "drift test, p < .01", "drift, CUSUM", *DISTANCE)


def head(num_classes: int) -> nn.Module:
    """Build the linear head on embeddings; a factory for `sft.models.build`."""
    return nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, num_classes))


@dataclass(frozen=True)
class Pool:
    """Pictures uint8 (n, h, w) and their labels (n,), names of classes."""

    pictures: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Stream:
    """What a champion learned, and for each batch which pools it is drawn from, in which shares."""

    name: str
    architecture: str
    first: Pool
    pools: dict[str, Pool]
    batches: tuple[dict[str, float], ...]
    mean: float
    std: float
    training: str = ""


def digits() -> Stream:
    """Let optical digits come, go, come back, and stay beside MNIST."""
    pixels, labels = realdata.mnist()
    mnist = Pool(pixels[:, 0].numpy(), labels.astype(str))
    first = Pool(mnist.pictures[:1500], mnist.labels[:1500])
    rest = Pool(mnist.pictures[3000:6000], mnist.labels[3000:6000])
    old, new, both = {"mnist": 1.0}, {"optical": 1.0}, {"mnist": 0.5, "optical": 0.5}
    order = [old] * 6 + [new] * 6 + [old] * 4 + [new] * 4 + [both] * 6
    pools = {"mnist": rest, "optical": _optical()}
    return Stream("digits", "small_cnn", first, pools, tuple(order), 0.1307, 0.3081)


def harmless() -> Stream:
    """Let contrast become weaker."""
    pixels, labels = realdata.mnist()
    first = Pool(pixels[:1500, 0].numpy(), labels[:1500].astype(str))
    rest, truth = pixels[3000:6000], labels[3000:6000].astype(str)
    weak = realdata.SHIFTS["mild-contrast"](rest)[:, 0].numpy()
    pools = {"mnist": Pool(rest[:, 0].numpy(), truth), "weak": Pool(weak[::-1], truth[::-1])}
    order = [{"mnist": 1.0}] * 6 + [{"weak": 1.0}] * 10
    return Stream("harmless", "small_cnn", first, pools, tuple(order), 0.1307, 0.3081)


def pacs() -> Stream:
    """Let art come after photos, then sketches; then photos with ever more sketches among them."""
    names = np.array(realdata.PACS_CLASSES)
    learned = realdata.LEARNED["pacs"]
    seen, labels = (part[:learned] for part in realdata.pacs("photo"))
    embedded = _embed(seen)
    scale = 255 / np.quantile(embedded, 0.999)
    pools = {}
    for domain in realdata.DOMAINS:
        pool = realdata.pictures(domain)
        pools[domain] = Pool(_as_pictures(pool.features.embedding, scale), names[pool.labels])
    order = [{"photo": 1.0}] * 3 + [{"art": 1.0}] * 6 + [{"sketch": 1.0}] * 6
    order += [{"photo": 1 - share, "sketch": share} for share in np.linspace(0.1, 0.9, 7)]
    first = Pool(_as_pictures(embedded, scale), names[labels])
    mean, std = first.pictures.mean() / 255, first.pictures.std() / 255
    training = "learning_rate = 0.01"
    return Stream("PACS", "bench_backtest:head", first, pools, tuple(order), mean, std, training)


def policies() -> list[Grid]:
    """Give the grid, ours first."""
    when = "retrain_when"
    grids = [grid_of("ours, by default", {}), grid_of("never", {"policy": {when: "never"}})]
    grids += [
        grid_of(name, {"policy": {when: {"batches_since_training": n}}})
        for name, n in zip(SCHEDULES, EVERY, strict=False)
    ]
    grids += [
        grid_of(name, {"policy": {when: {"samples_since_training": n}}})
        for name, n in zip(SCHEDULES[len(EVERY) :], SAMPLES, strict=True)
    ]
    per_batch = {"method": "per_batch"}
    for name, alpha in zip(DRIFT, (0.05, 0.01), strict=False):
        drift = {"policy": {when: "drift"}, "stream": per_batch, "detection": {"alpha": alpha}}
        grids.append(grid_of(name, drift))
    grids.append(grid_of(DRIFT[2], {"policy": {when: "drift"}, "stream": {"method": "cusum"}}))
    distances = [("drift_distance_above", limit) for limit in ABOVE]
    distances += [("drift_distance_quantile", share) for share in QUANTILES]
    grids += [
        grid_of(name, {"policy": {when: {key: limit}}})
        for name, (key, limit) in zip(DISTANCE, distances, strict=True)
    ]
    grids += [
        grid_of(f"accuracy < {limit:.2f}", {"policy": {when: {"accuracy_below": limit}}})
        for limit in BELOW
    ]
    return grids


def make(stream: Stream, root: Path) -> tuple[Shelf, Start, Path]:
    """Write a stream as a feed with labels, and train its champion."""
    path, shelf = root / "sustain.toml", Shelf(root / "backtest" / "steps")
    created = BEGIN - HOUR
    tags = {"digest": "version/start", "verdict": "first", "promoted_at": created.isoformat()}
    start = Start(1, tags, created)
    if shelf.path("version/start").exists():  # an earlier run was stopped: it goes on
        return shelf, start, path
    (root / "feed").mkdir(parents=True)
    (root / "labels").mkdir()
    path.write_text(
        SETTINGS.format(
            name=stream.name, architecture=stream.architecture, training=stream.training
        )
    )
    rows, taken = [], dict.fromkeys(stream.pools, 0)
    for place, shares in enumerate(stream.batches):
        at = BEGIN + place * HOUR
        batch = root / "feed" / f"{place:02d}-{'-'.join(shares)}"
        batch.mkdir()
        left = SIZE
        for pool, share in shares.items():
            n = left if pool == list(shares)[-1] else round(SIZE * share)
            left -= n
            told = stream.pools[pool]
            for _ in range(n):
                i = taken[pool] % len(told.labels)
                taken[pool] += 1
                file = batch / f"{pool}-{i:05d}.png"
                Image.fromarray(told.pictures[i]).save(file)
                os.utime(file, (at.timestamp(), at.timestamp()))
                came = (at + 1.5 * HOUR).isoformat()
                rows.append(f"{batch.name}/{file.name},{told.labels[i]},{came}")
    (root / "labels" / "late.csv").write_text(
        "\n".join(["sample_id,label,labelled_at", *dict.fromkeys(rows), ""])
    )
    folder = shelf.path("version/start")
    folder.mkdir(parents=True)
    _champion(stream).write(folder)
    return shelf, start, path


@dataclass(frozen=True)
class Together:
    """CPU seconds of the first ten policies, and of these those that made their versions."""

    all: float
    versions: float


def run(stream: Stream, root: Path, times: int) -> tuple[Backtest, Together]:
    """Replay all policies; tell also what the first ten took together."""
    shelf, start, path = make(stream, root)
    settings = prepared(load_settings(path, environ={}))
    past, done, costs, ten = read_past(settings), [], Costs(), Together(0.0, 0.0)
    for candidate in expand(settings, policies()):
        began = time.process_time()
        found, spent = replay(past, start, shelf, candidate)
        done.append(found)
        costs |= spent
        if len(done) == TEN:
            made = [cost for name, cost in costs.items() if name.startswith(("tuned", "version"))]
            ten = Together(total(costs.values()).cpu_seconds, total(made).cpu_seconds)
        print(  # noqa: T201 - a bench tells how far it is
            f"{stream.name} | {found.name} | accuracy {found.accuracy:.3f} |"
            f" {len(found.retrainings)} retrainings | {found.cpu_seconds:.1f} CPU s, of which"
            f" {time.process_time() - began:.1f} new",
            flush=True,
        )
    ideal = find_ideal(past, start, shelf, done, COST, times=times)
    return Backtest(tuple(done), ideal, COST, None, total(costs.values()).cpu_seconds, ()), ten


def best_schedule(found: Backtest, floor: float) -> list[Replayed]:
    """List the schedules that are at least as accurate, fewest retrainings first."""
    able = [one for one in found.replays if one.name in SCHEDULES and one.accuracy >= floor]
    return sorted(able, key=lambda one: len(one.retrainings))


def figures(found: dict[str, Backtest], together: dict[str, Together]) -> list[Figure]:
    """Hold what was measured against the targets of the issue."""
    told = []
    for name in ("digits", "PACS"):
        one = found[name]
        ours = one.replays[0]
        equal = best_schedule(one, ours.accuracy - 0.005)
        fewest = len(equal[0].retrainings) if equal else float("nan")
        told.append(
            Figure(
                f"{name}: retrainings of ours, of those of the best schedule as accurate (±.005)",
                len(ours.retrainings) / fewest if equal else 0.0,
                "≤ 1/3",
                not equal or len(ours.retrainings) <= fewest / 3,
                {"ours": len(ours.retrainings), "schedule": fewest, "accuracy": ours.accuracy},
            )
        )
        schedules = [p for p in one.replays if p.name in SCHEDULES]
        best = min(map(one.regret, schedules))
        told.append(
            Figure(
                f"{name}: regret of ours against the oracle, wrong answers",
                one.regret(ours),
                "≤ half of the best schedule's",
                one.regret(ours) <= best / 2,
                {"best schedule": best, "never": one.regret(one.replays[1])},
            )
        )
    quiet = found["harmless"]
    tests = {p.name: len(p.retrainings) for p in quiet.replays if p.name in DRIFT}
    ours = len(quiet.replays[0].retrainings)
    told.append(Figure("harmless: retrainings of ours", ours, "0", ours == 0, tests))
    for name, one in found.items():
        ten = one.replays[:TEN]
        dearest = max(p.cpu_seconds for p in ten)
        shared, versions = together[name].all, together[name].versions
        told.append(
            Figure(
                f"{name}: CPU s of ten policies together, of those of the dearest one",
                shared / dearest,
                "≤ 2.5",
                shared <= 2.5 * dearest,
                {
                    "of the mean one": shared / np.mean([p.cpu_seconds for p in ten]),
                    "one by one": sum(p.cpu_seconds for p in ten) / dearest,
                    "of making their distinct versions": shared / versions,
                },
            )
        )
    return told


def table(found: dict[str, Backtest]) -> str:
    """Lay out every policy on every stream, as Markdown."""
    lines = [
        "| policy | " + " | ".join(f"{name}: accuracy | retrainings | CPU s | regret"
                                    for name in found) + " |",
        "|---|" + "---|" * 4 * len(found),
    ]  # fmt: skip
    for place, one in enumerate(next(iter(found.values())).replays):
        cells = [one.name]
        for backtest in found.values():
            here = backtest.replays[place]
            cells += [f"{here.accuracy:.3f}", str(len(here.retrainings))]
            cells += [f"{here.cpu_seconds:.0f}", f"{backtest.regret(here):.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    cells = ["oracle"]
    for backtest in found.values():
        ideal = backtest.ideal
        cells += [f"{ideal.accuracy:.3f}", str(ideal.found.retrainings), "", "0"]
    return "\n".join([*lines, f"| {' | '.join(cells)} |", ""])


def screenshot(page: Path, to: Path) -> None:
    """Take a picture of the top of a page."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--headless", "--no-sandbox"]
        )
        tab = browser.new_page(viewport={"width": 1280, "height": 1400})
        tab.goto(f"file://{page}")
        tab.wait_for_timeout(3000)
        tab.screenshot(path=to)
        browser.close()


def main() -> None:
    """Replay, and write the tables and the picture."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--streams", nargs="*", default=["digits", "PACS", "harmless"])
    parser.add_argument("--times", type=int, default=8, help="at which the oracle may train alone")
    parser.add_argument("--keep", type=Path, help="folder for what was made")
    asked = parser.parse_args()
    streams = {"digits": digits, "PACS": pacs, "harmless": harmless}
    root = asked.keep or Path(tempfile.mkdtemp(prefix="bench-backtest-"))
    found, together = {}, {}
    for name in asked.streams:
        found[name], together[name] = run(streams[name](), root / name, asked.times)
    docs = Path(__file__).parents[2] / "docs"
    for name, one in found.items():
        page = root / f"{name}.html"
        page.write_text(write_page(one, name, one.choose()))
    write("backtest", figures(found, together))
    path = FOLDER / "backtest.md"
    both = path.read_text() + "\n" + table(found)
    path.write_text(both)
    publish("backtest", both)
    if "digits" in found and shutil.which("chromium"):
        screenshot(root / "digits.html", docs / "backtest.png")
    print(table(found))  # noqa: T201 - the report of a benchmark


def _champion(stream: Stream) -> Package:
    ids = tuple(f"first/{place}.png" for place in range(len(stream.first.labels)))
    roles = [role_of(name) for name in ids]
    classes = tuple(np.unique(stream.first.labels).tolist())
    side = stream.first.pictures.shape[1]
    labels = np.searchsorted(classes, stream.first.labels)
    pictures = LabelledPictures(
        ids,
        torch.from_numpy(np.ascontiguousarray(stream.first.pictures)).unsqueeze(1),
        torch.from_numpy(labels.astype(np.int64)),
    )
    seen = Preprocessing(image_size=side, resize_size=side, channels=1)
    config = ModelConfig(
        stream.architecture, classes, seen, (round(stream.mean, 6),), (round(stream.std, 6),)
    )
    network = build(config, allowed_factories=(stream.architecture,))
    rate = {"learning_rate": 0.01} if stream.training else {}
    settings = TrainingSettings(
        epochs=15, batch_size=64, rehearsal=0, l2_sp=0, freeze_batch_norm=False, **rate
    )
    validation = (pictures.with_role(Role.VALIDATION),)
    train = pictures.with_role(Role.TRAIN)
    network = fine_tune(network, train, settings, validation=validation).network.eval()
    memory = remember(pictures, classes, roles, "first").bounded(rehearsal=300, holdout=400)
    learned = pd.DataFrame(
        {"sample_id": ids, "label": stream.first.labels, "role": [role.value for role in roles]}
    )
    reference = build_reference(network, memory, max_regimes=8)
    return Package(network, reference, memory, learned, Lineage(None, "bench", {}, "", ""))


def _optical() -> Pool:
    from flows.demo import _optical as optical

    found = optical()
    return Pool(found.pictures, found.labels.astype(str))


def _embed(pixels: torch.Tensor) -> np.ndarray:
    network = realdata.pacs_network("squeezenet")
    parts: Sequence[np.ndarray] = [network.embed(part)[0].numpy() for part in pixels.split(64)]
    return np.concatenate(parts)


def _as_pictures(embedding: np.ndarray, scale: float) -> np.ndarray:
    """Write embeddings (n, 512) as pictures (n, 23, 23) of 8 bits."""
    cells = np.zeros((len(embedding), SIDE * SIDE), np.uint8)
    cells[:, : embedding.shape[1]] = np.clip(embedding * scale, 0, 255).round()
    return cells.reshape(-1, SIDE, SIDE)


if __name__ == "__main__":
    main()
