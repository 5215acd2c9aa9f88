"""A record in memory, at a time that is set: the flows write on it as they write on MLflow.

What is decided on such a record is decided by the very code of production (`flows.watch.watch_on`
and all that it calls). Only the storage differs, and that steps which take time are taken once for
all policies: their results lie on a shelf, named by all that they follow from.
"""

from __future__ import annotations

import json
import operator
import re
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pandas as pd

from flows import package
from flows.digest import digest
from flows.feed import Batch
from flows.intake import BatchData
from flows.kept import Step, T, as_read
from flows.meter import Cost, Meter, total
from flows.package import Package
from flows.records import CheckKey, CheckRecord, RegistryError, Version
from flows.registry import Registry
from flows.settings import Settings
from flows.storage import FeedError
from flows.view import View
from monitoring.features import FeatureTable
from monitoring.reference import Reference
from sft import models
from sft.memory import Memory
from sft.models import Network
from sft.pictures import Preprocessing

IN_MEMORY = 64
"""Results that are kept in memory too: the tables of some sixty batches."""
VERSION = "version"
DECIDED = "decided"
"""Tag of a version: the reason for which it was made, as the decision said it then."""
Costs = dict[str, Cost]


class Shelf:
    """Results of steps, in files that processes share; each with what it cost to make.

    A result is written beside its place and renamed, so another process sees it whole or not.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._recent: OrderedDict[str, Any] = OrderedDict()

    def path(self, name: str) -> Path:
        """Return the place of a result."""
        return self.folder / name

    def costs(self, name: str) -> Costs | None:
        """Read what a result cost, with all that it needed; None if it was not made yet."""
        try:
            told = json.loads(self.path(f"{name}.costs").read_text())
        except FileNotFoundError:
            return None
        return {part: Cost(*figures) for part, figures in told.items()}

    def put(self, name: str, write: Callable[[Path], object], costs: Costs) -> None:
        """Write a result, and then what it cost: only that makes it count."""
        place = self.path(name)
        place.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.folder / f".partial-{uuid4().hex}"
        try:
            write(scratch)
            if not place.exists():  # else another process was faster
                try:
                    scratch.rename(place)
                except OSError:
                    if not place.exists():
                        raise
        finally:
            if scratch.is_dir():
                shutil.rmtree(scratch, ignore_errors=True)
            scratch.unlink(missing_ok=True)
        self.told(name, costs)

    def told(self, name: str, costs: Costs) -> None:
        """Write what a result that is there cost."""
        figures = {n: [c.cpu_seconds, c.gpu_seconds, c.energy_wh] for n, c in costs.items()}
        with tempfile.NamedTemporaryFile("w", dir=self.folder, delete=False) as file:
            json.dump(figures, file)
        Path(file.name).replace(self.path(f"{name}.costs"))

    def get(self, name: str, load: Callable[[Path], T]) -> T:
        """Read a result."""
        if name not in self._recent:
            self._recent[name] = load(self.path(name))
            if len(self._recent) > IN_MEMORY:
                self._recent.popitem(last=False)
        self._recent.move_to_end(name)
        found: T = self._recent[name]
        return found


@dataclass(frozen=True)
class Start:
    """The version that serves when a history begins; its parts lie on the shelf."""

    number: int
    tags: Mapping[str, str]
    created: datetime


@dataclass
class _Run:
    kind: str
    tags: dict[str, str]
    started: datetime
    ended: datetime
    metrics: dict[str, float] = field(default_factory=dict)
    status: str = "RUNNING"


@dataclass
class _Ledger:
    """What MLflow's registry keeps, by the calls of its client that move an alias."""

    tags: dict[str, str] = field(default_factory=dict)
    aliases: dict[str, int] = field(default_factory=dict)

    def set_registered_model_tag(self, name: str, key: str, value: str) -> None:
        del name
        self.tags[key] = value

    def delete_registered_model_tag(self, name: str, key: str) -> None:
        del name
        self.tags.pop(key, None)

    def set_registered_model_alias(self, name: str, alias: str, version: str) -> None:
        del name
        self.aliases[alias] = int(version)

    def delete_registered_model_alias(self, name: str, alias: str) -> None:
        del name
        self.aliases.pop(alias, None)


class SimulatedRegistry(Registry):
    """One policy's record, beginning with one champion.

    `spent` tells what its steps cost, as if it had taken every one of them itself.
    """

    live = False

    def __init__(self, settings: Settings, shelf: Shelf, start: Start) -> None:
        self.settings = settings
        self.name = settings.model.name
        self.uri = "replay:"
        self.experiment_id = "replay"
        self.shelf = shelf
        self.spent: Costs = {}
        self._now = start.created
        self._view: View | None = None
        self._versions = {start.number: Version(start.number, "start", start.tags, start.created)}
        self._runs_kept: dict[str, _Run] = {}
        self._tables: dict[str, FeatureTable] = {}
        self._making: str | None = None
        self._elapsed = Cost()
        ledger = _Ledger({"sustain.champion_seen": str(start.number)}, {"champion": start.number})
        self.client: Any = ledger

    # ---- the present

    def move_to(self, moment: datetime, view: View) -> None:
        """Let it be another time, at which this is to be seen of the feed."""
        self._now, self._view = moment, view

    def now(self) -> datetime:
        """Return the time that was set."""
        return self._now

    @property
    def view(self) -> View:
        """Show what there was in the feed at this time."""
        if self._view is None:
            raise RegistryError("a replay that was moved to no time sees nothing")
        return self._view

    def read(
        self, batch: Batch, preprocessing: Preprocessing, only: AbstractSet[str] | None = None
    ) -> BatchData:
        """Read a batch as a whole, and take the wanted samples from it."""
        stated = (batch.id, batch.digest, asdict(self.settings.feed), asdict(preprocessing))
        reading = super().read
        try:
            read = self.once(as_read(batch), stated, lambda: reading(batch, preprocessing))
        except FeedError:  # too much of it is bad, but what is wanted may be good
            if only is None:
                raise
            return reading(batch, preprocessing, only)
        return read if only is None else read.of(only)

    def once(self, step: Step[T], key: Sequence[object], make: Callable[[], T]) -> T:
        """Take a step, unless its result lies on the shelf."""
        name = f"{step.name}/{digest(key)[:40]}"
        costs = self.shelf.costs(name)
        if costs is not None:
            self.spent |= costs
            return self.shelf.get(name, step.load)
        made, costs = self._measured(name, make, energy=step.name == "tuned")
        self.shelf.put(name, lambda path: step.save(made, path), costs)
        return made

    def made(
        self, key: Sequence[object], make: Callable[[], Version], tags: Mapping[str, str]
    ) -> Version:
        """Make a version, unless its parts lie on the shelf."""
        name = f"{VERSION}/{digest(key)[:40]}"
        costs = self.shelf.costs(name)
        if costs is None:
            self._making = name
            try:
                version, costs = self._measured(name, make)
            finally:
                self._making = None
            self.shelf.told(name, costs)
        else:
            self.spent |= costs
            run_id = self.begin_training("", {})
            self.end_run(run_id)
            version = self._add(name, run_id, tags)
        run = self._runs_kept[version.run_id]
        run.ended = run.started + timedelta(seconds=total(costs.values()).cpu_seconds)
        return version

    def _measured(
        self, name: str, make: Callable[[], T], *, energy: bool = False
    ) -> tuple[T, Costs]:
        """Take a step and tell what it cost, apart from the steps in it that are told apart."""
        before, elapsed = self.spent, self._elapsed
        self.spent, self._elapsed = {}, Cost()
        meter = Meter(energy=energy)
        try:
            with meter:
                result = make()
            own = replace(
                meter.cost,
                cpu_seconds=meter.cost.cpu_seconds - self._elapsed.cpu_seconds,
                gpu_seconds=meter.cost.gpu_seconds - self._elapsed.gpu_seconds,
            )
            costs = {**self.spent, name: own}
        finally:
            self.spent, self._elapsed = before, elapsed + meter.cost
        self.spent |= costs
        return result, costs

    # ---- versions

    def versions(self) -> list[Version]:
        """List every version, oldest first."""
        return [self._versions[number] for number in sorted(self._versions)]

    def alias(self, alias: str) -> int | None:
        """Return the number of the version that has the alias."""
        found: int | None = self.client.aliases.get(alias)
        return found

    def aliases(self) -> dict[str, int]:
        """Return every alias and the version that has it."""
        return dict(self.client.aliases)

    def register(self, made: Package, *, key: str, run_id: str, tags: Mapping[str, str]) -> Version:
        """Register a package once, and lay its parts on the shelf."""
        existing = self.find_version(key)
        if existing is not None:
            return existing
        name = self._making or f"{VERSION}/{digest([key, self.champion().tags['digest']])[:40]}"
        folder = self.shelf.path(name)
        if not folder.exists():
            scratch = Path(tempfile.mkdtemp(dir=self.shelf.folder, prefix=".partial-"))
            made.write(scratch)
            folder.parent.mkdir(parents=True, exist_ok=True)
            try:
                scratch.rename(folder)
            except OSError:  # another process was faster
                shutil.rmtree(scratch, ignore_errors=True)
        return self._add(name, run_id, {**tags, "retrain_key": key})

    def tag(self, version: Version, **tags: str) -> None:
        """Write tags on a version."""
        known = self._versions[version.number]
        self._versions[version.number] = replace(known, tags={**known.tags, **tags})

    def network(self, version: Version) -> Network:
        """Load a version's network."""
        allowed = self.settings.allowed_factories
        return self._part(
            version, package.NETWORK, lambda path: models.load(path, allowed_factories=allowed)
        )

    def config(self, version: Version) -> models.ModelConfig:
        """Read a version's configuration."""
        return self.network(version).config

    def reference(self, version: Version) -> Reference:
        """Load a version's own reference."""
        return self._part(version, package.REFERENCE, Reference.load)

    def memory(self, version: Version) -> Memory:
        """Load a version's memory."""
        bound = self.settings.memory.in_memory_bytes
        return self._part(version, package.MEMORY, lambda path: Memory.load(path, bound))

    def learned(self, version: Version) -> pd.DataFrame:
        """Return `sample_id, label, role` of all that the version and its parents used."""
        return self._part(version, package.LEARNED, pd.read_parquet)

    # ---- checks and training runs

    def checks(self, champion: int | None, *also: str) -> list[CheckRecord]:
        """List the ended checks against a champion that meet conditions, in their order."""
        conditions = [_condition(words) for words in also]
        records: dict[CheckKey, CheckRecord] = {}
        for run_id, run in self._runs_kept.items():
            of = run.tags.get("sustain.champion")
            if (
                run.kind == "check"
                and run.status != "RUNNING"
                and (champion is None or of == str(champion))
                and all(meets(run) for meets in conditions)
            ):
                record = _record(run_id, run)
                known = records.get(record.key)
                if known is None or not known.finished:
                    records[record.key] = record
        return sorted(records.values(), key=lambda r: (r.number, r.ended, r.run_id))

    def has_check(self, champion: int | None, condition: str) -> bool:
        """Whether any check against a champion, or any at all, meets a condition."""
        return bool(self.checks(champion, condition))

    def newest_checks(
        self, champion: int, batches: Mapping[str, datetime | None] | None = None
    ) -> list[CheckRecord]:
        """List the checks against a champion: in memory, all are as near as the newest."""
        del batches
        return self.checks(champion)

    def check_record(self, run_id: str) -> CheckRecord:
        """Read one check again."""
        return _record(run_id, self._runs_kept[run_id])

    def begin_check(self, key: CheckKey, stamp: str) -> str:
        """Open the run of a check."""
        return self._open(
            "check",
            {
                "sustain.champion": str(key.champion),
                "sustain.batch": key.batch_id,
                "sustain.batch_digest": key.digest,
                "sustain.batch_stamp": stamp,
            },
        )

    def begin_training(self, name: str, tags: Mapping[str, str]) -> str:
        """Open a training run."""
        del name
        return self._open("training", dict(tags))

    def training_seconds(self, version: Version) -> float | None:
        """Return how long the training run of a version took, when it was first made."""
        run = self._runs_kept.get(version.run_id)
        return None if run is None else (run.ended - run.started).total_seconds()

    def finish_training(self, version: Version) -> None:
        """Do nothing: nobody is killed here."""

    def chart(self, champion: int, metrics: Mapping[str, float], step: int) -> None:
        """Draw nothing."""

    def log(
        self,
        run_id: str,
        *,
        metrics: Mapping[str, float] | None = None,
        params: Mapping[str, object] | None = None,
        tags: Mapping[str, str] | None = None,
        step: int = 0,
    ) -> None:
        """Keep metrics and tags; what is not a number is left out."""
        del params, step
        run = self._runs_kept[run_id]
        run.metrics |= {k: v for k, v in (metrics or {}).items() if v == v}  # noqa: PLR0124 - NaN
        run.tags |= tags or {}

    def log_anew(self, run_id: str, metrics: Mapping[str, float], *, always: str) -> None:
        """Keep metrics in the place of those that stand there."""
        del always
        self.log(run_id, metrics=metrics)

    def log_file(self, run_id: str, path: Path) -> None:
        """Keep no files."""

    def log_text(self, run_id: str, text: str, name: str) -> None:
        """Keep no files."""

    def log_features(self, run_id: str, features: FeatureTable) -> None:
        """Keep the feature table of a check."""
        self._tables[run_id] = features

    def features(self, check: CheckRecord) -> FeatureTable:
        """Return the feature table of a check."""
        try:
            return self._tables[check.run_id]
        except KeyError:
            raise RegistryError(f"the check of {check.key.batch_id} kept no features") from None

    def end_run(self, run_id: str, *, failed: bool = False) -> None:
        """Close a run."""
        run = self._runs_kept[run_id]
        run.status, run.ended = ("FAILED" if failed else "FINISHED"), self._now

    # ---- inside

    def _find(self, number: int) -> Version | None:
        return self._versions.get(number)

    def _model_tags(self) -> dict[str, str]:
        return dict(self.client.tags)

    def _add(self, name: str, run_id: str, tags: Mapping[str, str]) -> Version:
        number = max(self._versions) + 1
        if check := tags.get("cause_check"):  # a later decision writes another reason there
            tags = {**tags, DECIDED: self._runs_kept[check].tags.get("sustain.reason", "")}
        version = Version(number, run_id, {**tags, "digest": name}, self._now)
        self._versions[number] = version
        return version

    def _open(self, kind: str, tags: dict[str, str]) -> str:
        run_id = f"{len(self._runs_kept):08d}"
        self._runs_kept[run_id] = _Run(kind, tags, self._now, self._now)
        return run_id

    def _part(self, version: Version, part: str, load: Callable[[Path], T]) -> T:
        return self.shelf.get(f"{version.tags['digest']}/{part}", load)


_CONDITION = re.compile(r"(metrics|tags)\.`([^`]+)` (=|!=|>) (.+)")
_COMPARED: Mapping[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
}


def _condition(words: str) -> Callable[[_Run], bool]:
    """Read a condition in the words of MLflow; a run that lacks what it is about fails it."""
    if (found := _CONDITION.fullmatch(words)) is None:
        raise ValueError(f"no replay can tell whether a run meets {words!r}")
    part, name, sign, text = found.groups()
    value: float | str = float(text) if part == "metrics" else text.strip("'")

    def meets(run: _Run) -> bool:
        kept: Mapping[str, Any] = getattr(run, part)
        return name in kept and _COMPARED[sign](kept[name], value)

    return meets


def _record(run_id: str, run: _Run) -> CheckRecord:
    tags = run.tags
    return CheckRecord(
        run_id=run_id,
        key=CheckKey(
            int(tags["sustain.champion"]), tags["sustain.batch"], tags["sustain.batch_digest"]
        ),
        finished=run.status == "FINISHED",
        stamp=tags["sustain.batch_stamp"],
        tags=tags,
        metrics=run.metrics,
        started=run.started,
        ended=run.ended,
    )


def lay_out(registry: Registry, version: Version, shelf: Shelf) -> Start:
    """Lay the parts of a registered version on the shelf, and describe it as a start."""
    name = f"{VERSION}/start-{version.tags['digest'][:40]}"
    folder = shelf.path(name)
    if not folder.exists():
        found = registry.verified_folder(version)
        shelf.folder.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=shelf.folder, prefix=".partial-"))
        shutil.copytree(found / "model" / "data" / package.NETWORK, scratch / package.NETWORK)
        shutil.copytree(found / package.REFERENCE, scratch / package.REFERENCE)
        for part in (package.MEMORY, package.LEARNED):
            shutil.copy(found / part, scratch / part)
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch.rename(folder)
    tags = {"digest": name, "verdict": version.verdict or "first"}
    tags |= {k: version.tags[k] for k in ("promoted_at", "parent") if k in version.tags}
    return Start(version.number, tags, version.created)
