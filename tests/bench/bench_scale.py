"""What grows with what: pictures in a batch, batches that wait, checks, labels, versions, models.

`make bench-scale`, or `python tests/bench/bench_scale.py PART...`. Each part makes a small world of
digits by the real flows in a process of its own, lets one thing grow, and measures CPU time and
memory of what the product does with it. Checks, versions and other models that are only there to be
many are copies of real ones, row by row in MLflow's database; everything that is measured is real.
"""

from __future__ import annotations

import single_thread  # isort: skip -- before numpy and torch

import itertools
import os
import random
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from PIL import Image
from results import Figure, write

if TYPE_CHECKING:
    from flows.registry import Registry
    from flows.settings import Settings

assert single_thread
SETTINGS = """\
[model]
name = "scale"
architecture = "small_cnn"
channels = 1

[servers]
prefect_home = "prefect"

[bootstrap]
epochs = 5  # how well it answers is no matter here

[policy]
min_labels = 1_000_000  # nothing is retrained: checks are the subject

[feed]
max_bad_share = 0.5
"""
SMALL = 20
"""Pictures of a batch where batches are counted, not pictures."""
REPEATS = 5
SETTLE_SECONDS, MINUTE = 90.0, 60.0
FLAT = 1.25
"""What is called flat grows by less than a quarter from the least to the most."""


@dataclass(frozen=True)
class World:
    """A model folder with a champion that learned 2,000 of MNIST's digits."""

    root: Path

    @property
    def path(self) -> Path:
        return self.root / "sustain.toml"

    @property
    def settings(self) -> Settings:
        from flows.settings import load_settings

        return load_settings(self.path, environ={})

    @property
    def registry(self) -> Registry:
        from flows.registry import Registry

        return Registry(self.settings)

    def arrive(self, name: str, size: int) -> None:
        """Let a batch of MNIST's digits arrive, the same ones again after 3,000."""
        from flows import demo

        digits = demo._mnist()[2000:]
        elsewhere = self.root / f"{name}.partial"
        elsewhere.mkdir()
        for place in range(size):
            picture = digits.pictures[place % len(digits)]
            Image.fromarray(picture).save(elsewhere / f"{place:06d}.png")
        elsewhere.rename(self.root / "feed" / name)

    def clear(self) -> None:
        """Move every batch out of the feed, as whoever owns it does with old ones."""
        kept = self.root / "kept"
        kept.mkdir(exist_ok=True)
        for batch in (self.root / "feed").iterdir():
            batch.rename(kept / f"{batch.name}-{uuid.uuid4().hex[:6]}")

    def watch(self) -> float:
        """Run a watch in this process; return its CPU seconds."""
        from flows.watch import watch

        return cpu(lambda: watch(str(self.path)))

    def plan(self) -> float:
        """Return the CPU seconds of finding out what there is to do, the median of several."""
        from flows.watch import make_plan

        registry, settings = self.registry, self.settings

        def look() -> None:
            make_plan(registry, settings, datetime.now(UTC))

        look()
        return statistics.median(cpu(look) for _ in range(REPEATS))

    def scrape(self) -> float:
        """Return the CPU seconds of telling Prometheus, once the record was read whole."""
        from flows.metrics import FRESH_SECONDS, Exporter

        exporter = Exporter([self.registry], itertools.count(step=FRESH_SECONDS).__next__)
        exporter.text()
        return statistics.median(cpu(exporter.text) for _ in range(REPEATS))


def cpu(action: Callable[[], object]) -> float:
    """Return the CPU seconds that an action takes in this process."""
    began = time.process_time()
    action()
    return time.process_time() - began


def resident() -> float:
    """Return the memory that this process holds now, in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def make_world(root: Path) -> World:
    """Make the champion by the real flow."""
    from flows import demo
    from flows.settings import export_to_environment, load_settings

    (root / "feed").mkdir()
    (root / "labels").mkdir()
    world = World(root)
    world.path.write_text(SETTINGS)
    export_to_environment(load_settings(world.path, environ={}))

    from flows.bootstrap import bootstrap

    demo._write_class_folders(root / "first", demo._mnist()[:2000])
    bootstrap(str(world.path), data=str(root / "first"))
    return world


# ---- copies, row by row


class Book:
    """MLflow's database, opened for copying rows of it."""

    def __init__(self, world: World) -> None:
        self.path = world.root / "mlflow.db"

    def copy(self, table: str, where: str, numbers: range, **columns: str) -> None:
        """Copy rows of a table, once for each number, with some columns changed.

        Args:
            table: its name.
            where: a condition in SQL on the rows, which are called `r`.
            numbers: consecutive ones.
            columns: name, and an expression in SQL, in which `i` is the number.
        """
        with closing(sqlite3.connect(self.path)) as base, base:
            names = [row[1] for row in base.execute(f"PRAGMA table_info({table})")]
            cells = ", ".join(columns.get(name, f"r.{name}") for name in names)
            base.execute(
                f"INSERT INTO {table} ({', '.join(names)})"  # noqa: S608 - our own words
                f" WITH RECURSIVE n(i) AS (SELECT ? UNION ALL SELECT i + 1 FROM n WHERE i < ?)"
                f" SELECT {cells} FROM {table} r, n WHERE {where}",
                (numbers[0], numbers[-1]),
            )

    def run(self, statement: str, *values: object) -> list[Any]:
        """Execute one statement; return what it answers."""
        with closing(sqlite3.connect(self.path)) as base, base:
            return base.execute(statement, values).fetchall()


def copy_checks(world: World, total: int) -> None:
    """Put so many copies of a check on record, ten minutes apart, older than all real ones."""
    book = Book(world)
    copies = "SELECT run_uuid FROM tags WHERE key = 'sustain.batch' AND value LIKE 'copy-%'"
    for table in ("latest_metrics", "metrics", "runs", "tags"):
        book.run(f"DELETE FROM {table} WHERE run_uuid IN ({copies})")  # noqa: S608 - our own words
    real = world.registry.checks(1)
    one, numbers = f"r.run_uuid = '{real[0].run_id}'", range(1, total + 1)
    new = {"run_uuid": "printf('%032x', i)"}
    began = f"r.start_time - {total + 1} * 600000 + i * 600000"
    book.copy("runs", one, numbers, **new, start_time=began, end_time=f"{began} + 1000")
    for table in ("latest_metrics", "metrics"):
        book.copy(table, one, numbers, **new)
    value = (
        "CASE r.key WHEN 'sustain.batch' THEN 'copy-' || i WHEN 'sustain.number' THEN '' || i"
        " ELSE r.value END"
    )
    book.copy("tags", one, numbers, **new, value=value)
    for number, check in enumerate(real, start=total + 1):
        book.run(
            "UPDATE tags SET value = ? WHERE run_uuid = ? AND key = 'sustain.number'",
            str(number),
            check.run_id,
        )


# ---- the parts


def pictures(world: World) -> Iterable[Figure]:
    """One batch of 100, 1,000 and 10,000 pictures."""
    took, held = {}, {}
    world.arrive("warm", 100)
    world.watch()
    for size in (100, 1000, 10_000):
        world.clear()
        world.arrive(f"size-{size}", size)
        took[size] = world.watch()
        held[size] = resident()
    slope = (took[10_000] - took[100]) / 9_900
    yield Figure(
        "a watch with one new batch of 10,000 pictures, CPU s",
        took[10_000],
        "linear: ≤ 12 times that of 1,000",
        took[10_000] <= 12 * took[1000],
        {"100 pictures": took[100], "1,000": took[1000], "CPU ms for each more": 1000 * slope},
    )
    yield Figure(
        "memory after it, MB",
        held[10_000],
        "≤ 1,000 more than after 100",
        held[10_000] <= held[100] + 1000,
        {"after 100": held[100], "after 1,000": held[1000]},
    )


def waiting(world: World, most: int = 1000) -> Iterable[Figure]:
    """Batches that wait while the worker is away: 10, then very many, in one watch."""
    import flows.check
    import flows.watch

    for number in range(10):
        world.arrive(f"few-{number}", SMALL)
    few = world.watch() / 10
    world.clear()
    for number in range(most):
        world.arrive(f"many-{number:04d}", SMALL)
    held: list[float] = []
    ended: list[float] = []
    show = flows.check._show_in_prefect

    def note(*args: Any) -> None:
        show(*args)
        ended.append(time.process_time())
        held.append(resident())

    flows.check._show_in_prefect = note
    whole = world.watch()
    flows.check._show_in_prefect = show
    tenth = most // 10
    first = (ended[tenth] - ended[0]) / tenth
    last = (ended[-1] - ended[-1 - tenth]) / tenth
    checked = sum(c.finished for c in world.registry.checks(1))
    yield Figure(
        f"{most:,} batches waiting: CPU s for each of the last tenth",
        last,
        "≤ 1.25 times the first tenth",
        last <= FLAT * first,
        {"of the first": first, "of 10 waiting": few, "in all": whole},
    )
    yield Figure(
        "memory after the last of them, MB",
        held[-1],
        "≤ 100 more than after the first tenth",
        held[-1] <= held[tenth] + 100,
        {"after the first tenth": held[tenth], "after half": held[most // 2]},
    )
    yield Figure("batches lost of those", most + 10 - checked, "0", checked == most + 10, {})


def checks(world: World) -> Iterable[Figure]:
    """Checks on record, while the feed holds one new batch."""
    world.arrive("first", SMALL)
    world.watch()
    world.clear()
    plans, watches, scrapes = {}, {}, {}
    for total in (100, 1000, 10_000):
        copy_checks(world, total)
        scrapes[total] = world.scrape()
        world.arrive(f"new-{total}", SMALL)
        plans[total] = world.plan()
        took = []
        for number in range(REPEATS):
            took.append(world.watch())
            world.clear()
            world.arrive(f"new-{total}-{number}", SMALL)
        world.clear()
        watches[total] = statistics.median(took)
    yield Figure(
        "a watch with one new batch, 10,000 checks on record, CPU s",
        watches[10_000],
        "≤ 1.25 times with 1,000",
        watches[10_000] <= FLAT * watches[1000],
        {"with 100": watches[100], "with 1,000": watches[1000]},
    )
    yield Figure(
        "finding out what there is to do, 10,000 checks on record, CPU s",
        plans[10_000],
        "≤ 1.25 times with 1,000, and 0.05",
        plans[10_000] <= FLAT * plans[1000] + 0.05,
        {"with 100": plans[100], "with 1,000": plans[1000]},
    )
    yield Figure(
        "telling Prometheus, 10,000 checks on record, CPU s",
        scrapes[10_000],
        "≤ 1.25 times with 1,000, and 0.05",
        scrapes[10_000] <= FLAT * scrapes[1000] + 0.05,
        {"with 100": scrapes[100], "with 1,000": scrapes[1000]},
    )


def labels(world: World) -> Iterable[Figure]:
    """Labels, in one file for each thousand, of samples that lie in shards."""
    from flows import demo

    digits = demo._mnist()
    content = BytesIO()
    Image.fromarray(digits.pictures[0]).save(content, format="png")
    took, held = {}, {}
    draw = random.Random(0)
    for total in (1000, 10_000, 100_000):
        batch = world.root / "feed" / f"shard-{total}"
        batch.mkdir()
        cells = [{"bytes": content.getvalue(), "path": f"{i:06d}.png"} for i in range(SMALL)]
        pd.DataFrame({"image": cells}).to_parquet(batch / "part.parquet")
        for path in (world.root / "labels").iterdir():
            path.unlink()
        for start in range(0, total, 1000):
            rows = [
                f"{batch.name}/part.parquet#{i},{draw.randrange(10)}"
                for i in range(start, start + 1000)
            ]
            path = world.root / "labels" / f"{start:06d}.csv"
            path.write_text("\n".join(["sample_id,label", *rows, ""]))
        took[total] = world.plan()
        held[total] = resident()
    slope = (took[100_000] - took[10_000]) / 90_000
    yield Figure(
        "finding out what there is to do, 100,000 labels, CPU s",
        took[100_000],
        "linear: ≤ 12 times with 10,000",
        took[100_000] <= 12 * took[10_000],
        {"1,000": took[1000], "10,000": took[10_000], "CPU µs for each more": 1e6 * slope},
    )
    yield Figure(
        "memory with them, MB",
        held[100_000],
        "≤ 300 more than with 1,000",
        held[100_000] <= held[1000] + 300,
        {"with 1,000": held[1000], "with 10,000": held[10_000]},
    )


def versions(world: World) -> Iterable[Figure]:
    """Versions of one model, all but the champion tuned from it and refused."""
    book = Book(world)
    took, known = {}, 1
    for total in (10, 100, 1000):
        new = range(known + 1, total + 1)
        book.copy("model_versions", "r.version = 1", new, version="i")
        tags = "r.version = 1 AND r.key NOT IN ('verdict', 'parent', 'retrain_key')"
        book.copy("model_version_tags", tags, new, version="i")
        for key, value in (("verdict", "refuse"), ("parent", "1"), ("retrain_key", "copy")):
            told = {"version": "i", "key": f"'{key}'", "value": f"'{value}'"}
            book.copy("model_version_tags", "r.version = 1 AND r.key = 'verdict'", new, **told)
        known = total
        world.arrive(f"versions-{total}", SMALL)
        took[total] = world.plan()
        world.clear()
    yield Figure(
        "finding out what there is to do, 1,000 versions, CPU s",
        took[1000],
        "≤ 1 more than with 10",
        took[1000] <= took[10] + 1,
        {"with 10": took[10], "with 100": took[100]},
    )


def models(world: World) -> Iterable[Figure]:
    """Other models on the same server: 50, with 1,000 checks each."""
    world.arrive("first", SMALL)
    world.watch()
    world.clear()
    copy_checks(world, 1000)
    world.arrive("new", SMALL)
    alone = world.plan()
    book = Book(world)
    ((experiment,),) = book.run(
        "SELECT experiment_id FROM experiments WHERE name = 'sustain/scale'"
    )
    others = range(1, 50)
    mine = f"r.experiment_id = {experiment}"
    new = {"experiment_id": "1000 + i", "name": "'sustain/other-' || i"}
    book.copy("experiments", mine, others, **new)
    for table in ("registered_models", "model_versions"):
        book.copy(table, "r.name = 'scale'", others, name="'other-' || i")
    run = {"run_uuid": "printf('%04x', i) || substr(r.run_uuid, 5)"}
    inside = f"r.run_uuid IN (SELECT run_uuid FROM runs WHERE experiment_id = {experiment})"  # noqa: S608 - our own words
    for table in ("tags", "latest_metrics"):
        book.copy(table, inside, others, **run)
    book.copy("runs", mine, others, **run, experiment_id="1000 + i")
    crowd = world.plan()
    yield Figure(
        "finding out what there is to do, 50 models with 1,000 checks each on one server, CPU s",
        crowd,
        "≤ 1.25 times of one model alone, and 0.05",
        crowd <= FLAT * alone + 0.05,
        {"alone": alone},
    )


def spent(process: int) -> float:
    """Return the CPU seconds that a process has spent."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory(process: int) -> float:
    """Return the memory of a process in MB, with its part of what it shares."""
    text = Path(f"/proc/{process}/smaps_rollup").read_text()
    return int(text.partition("\nPss:")[2].split()[0]) / 1024


def fleet(world: World, most: int = 50) -> Iterable[Figure]:
    """Models whose flows are deployed on one Prefect server, each with its schedules."""
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from flows.deploy import deploy
    from flows.servers import start_prefect, stop, wait_until_healthy
    from flows.settings import load_settings

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    home, url = world.root / "fleet", f"http://127.0.0.1:{port}/api"
    server = start_prefect(port, home, environment={**os.environ, "PREFECT_HOME": str(home)})
    models = []
    for number in range(most):
        path = world.root / f"model-{number}" / "sustain.toml"
        path.parent.mkdir()
        path.write_text(SETTINGS.replace('"scale"', f'"model-{number}"'))
        models.append(load_settings(path, environ={}))
    try:
        wait_until_healthy(f"{url}/health", "Prefect", [server], home)
        with temporary_settings({PREFECT_API_URL: url}):
            idle, held = {}, {}
            for total in (1, most):
                first = cpu(lambda: deploy(models[:total]))  # noqa: B023 - called at once
                time.sleep(SETTLE_SECONDS)  # the server schedules the coming runs
                before = spent(server.pid)
                time.sleep(MINUTE)
                idle[total], held[total] = spent(server.pid) - before, memory(server.pid)
            again = cpu(lambda: deploy(models))
    finally:
        stop([server])
    yield Figure(
        f"Prefect's server with {most} models deployed, CPU s a minute",
        idle[most],
        "≤ 6, a tenth of a core",
        idle[most] <= 6,
        {"with one": idle[1]},
    )
    yield Figure(
        f"its memory with {most} models, MB",
        held[most],
        "≤ 100 more than with one",
        held[most] <= held[1] + 100,
        {"with one": held[1]},
    )
    yield Figure(
        f"deploying {most} models when nothing changed, CPU s",
        again,
        "≤ a quarter of the first time",
        again <= first / 4,
        {"the first time": first},
    )


def processes(world: World) -> Iterable[Figure]:
    """A ResNet-18 fine-tuned whole by one process and by two, with a thread each, by the clock."""
    import torch

    from flows import demo
    from sft import after
    from sft import processes as several
    from sft.dataset import LabelledPictures
    from sft.models import ModelConfig, build
    from sft.pictures import Preprocessing
    from sft.speed import ComputeSettings, Device
    from sft.strategies import Strategy
    from sft.train import TrainingSettings

    del world
    two = ComputeSettings(device=Device.CPU, processes=2)
    one_alone = ComputeSettings(device=Device.CPU)
    threaded = ComputeSettings(device=Device.CPU, threads=2)
    for size, n, epochs, batch_size in ((56, 512, 2, 64), (224, 128, 1, 32)):
        digits, times = demo._mnist()[:n], size // 28
        pixels = torch.from_numpy(digits.pictures)[:, None].repeat_interleave(times, 2)
        pixels = pixels.repeat_interleave(times, 3).repeat(1, 3, 1, 1)
        known = tuple("0123456789")
        ids = tuple(f"digit-{number}" for number in range(len(digits)))
        labels = torch.tensor([int(label) for label in digits.labels])
        fresh = LabelledPictures(ids, pixels, labels)
        config = ModelConfig("resnet18", known, Preprocessing(size), (0.3,) * 3, (0.3,) * 3)
        start = build(config)
        settings = TrainingSettings(
            epochs=epochs, batch_size=batch_size, strategy=Strategy.FULL, l2_sp=0.0
        )

        def clock(tune: Callable[..., object], compute: ComputeSettings) -> float:
            began = time.perf_counter()
            tune(start, fresh, settings, compute=compute)  # noqa: B023 - called before the next
            return time.perf_counter() - began

        with several._crew(two, start) as crew:
            several._JOINED.append(crew)
            clock(several.tune, two)
            took = [(clock(after.tune, one_alone), clock(several.tune, two)) for _ in range(3)]
            several._JOINED.clear()
        threads = statistics.median(clock(after.tune, threaded) for _ in range(3))
        alone, both = (statistics.median(column) for column in zip(*took, strict=True))
        yield Figure(
            "fine-tuning all of a ResNet-18 by two processes, times as fast as by one"
            + ("" if size == 56 else f", pictures of {size} pixels"),
            alone / both,
            "≥ 1.6",
            alone / both >= 1.6,
            {"by one with two threads": alone / threads, "s by one": alone},
        )


PARTS: dict[str, Callable[[World], Iterable[Figure]]] = {
    part.__name__: part
    for part in (pictures, waiting, checks, labels, versions, models, fleet, processes)
}


def main() -> None:
    """Measure the named parts, each in a process of its own."""
    for name in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI"):
        os.environ.pop(name, None)
    wanted = sys.argv[1:] or list(PARTS)
    if len(wanted) > 1:
        for part in wanted:
            subprocess.run([sys.executable, __file__, part], check=True)
        return
    with tempfile.TemporaryDirectory() as name:
        write("scale", list(PARTS[wanted[0]](make_world(Path(name)))), merge=True)


if __name__ == "__main__":
    main()
