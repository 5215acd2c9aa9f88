"""Replays a feed and its late labels for every policy, as they came.

For each policy a record in memory (`flows.simulated`) goes through the history, moment by moment,
and `flows.watch.watch_on`, which production runs, decides on what could be seen then. Steps that
policies agree on are taken once.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from flows.check import Look, load_champion, look_once
from flows.digest import digest
from flows.feed import Batch, BatchNotReady
from flows.fresh import Labels
from flows.grid import Candidate, Grid, grid_of, prepared
from flows.history import champion_at, read_history
from flows.intake import TooManyBad
from flows.meter import total
from flows.past import Past, read_past
from flows.records import ROLLBACK, CheckRecord, RegistryError, Version
from flows.registry import Registry
from flows.retrain import RetrainError, train_on
from flows.settings import Settings
from flows.simulated import DECIDED, Costs, Shelf, SimulatedRegistry, Start, lay_out
from flows.watch import watch_on
from monitoring.features import FeatureTable
from monitoring.policy import describe
from monitoring.replay import Oracle, Replayed, Retraining, Served, frontier, oracle
from sft.tasks import rightly

FOLDER = "backtest"
"""Below the folder of the settings: what the steps of all replays made, and the page."""
MANY = 200
"""Policies that are replayed without asking."""
ORACLE_TIMES = 8
"""Times at most at which the oracle may train on what had come by then."""


class BacktestError(ValueError):
    """Nothing can be replayed as asked; the message says why, and the way out."""


@dataclass(frozen=True)
class Ideal:
    """What the oracle did: its loss, and how each batch would have been answered.

    Attributes:
        found: the path and its loss.
        served: each batch, as the version of the path answers it.
        candidates: versions that it could choose from.
    """

    found: Oracle
    served: tuple[Served, ...]
    candidates: int

    @property
    def accuracy(self) -> float:
        """Mean accuracy, over pictures."""
        return Replayed("", "", self.served, (), (), 0, 0, 0.0).accuracy


@dataclass(frozen=True)
class Backtest:
    """What every policy did, and what the oracle would have done.

    Attributes:
        replays: in the order of the policies.
        ideal: None where no label tells who was right.
        cost: of a retraining, in wrong answers.
        floor: accuracy under which days are counted; None for none.
        cpu_seconds: what all replays together took, with what they shared.
        notes: what could not be replayed or told, in words.
    """

    replays: tuple[Replayed, ...]
    ideal: Ideal | None
    cost: float
    floor: float | None
    cpu_seconds: float
    notes: tuple[str, ...]

    def regret(self, replay: Replayed) -> float | None:
        """Say by how many wrong answers a policy did worse than the oracle."""
        return None if self.ideal is None else replay.loss(self.cost) - self.ideal.found.loss

    @property
    def frontier(self) -> tuple[Replayed, ...]:
        """The policies that none beats in both accuracy and CPU seconds, cheapest first."""
        points = [(one.cpu_seconds, one.accuracy) for one in self.replays]
        return tuple(self.replays[place] for place in frontier(points))

    def choose(self, name: str = "") -> Replayed:
        """Choose the policy called so; else, on the frontier, one above the floor with least loss.

        Raises:
            BacktestError: there is none of this name, or no accuracy is known.
        """
        if name:
            found = next((one for one in self.replays if one.name == name), None)
            if found is None:
                names = "; ".join(one.name for one in self.replays)
                raise BacktestError(f"no policy is called {name!r}; there are: {names}")
            return found
        if not self.frontier:
            raise BacktestError("without labels no policy can be chosen: name one with --choose")
        above = [p for p in self.frontier if self.floor is None or p.accuracy >= self.floor]
        return min(above or self.frontier, key=lambda p: (p.loss(self.cost), len(p.retrainings)))


def usual() -> list[Grid]:
    """Give the policies to compare when none is named: the settings' own, never and always."""
    never, always = ({"policy": {"retrain_when": sign}} for sign in ("never", "always"))
    return [grid_of("as set", {}), grid_of("never", never), grid_of("always", always)]


def expand(settings: Settings, grids: Iterable[Grid]) -> Iterator[Candidate]:
    """Make the policies of some grids, each once."""
    seen = set()
    for grid in grids:
        for candidate in grid.candidates(prepared(settings)):
            if candidate.name not in seen:
                seen.add(candidate.name)
                yield candidate


def count_points(grids: Sequence[Grid]) -> int:
    """Count the policies of some grids."""
    return sum(grid.points for grid in grids)


def foresee(registry: Registry, past: Past, points: int) -> str:
    """Say what a grid may cost, from what trainings took so far."""
    took = [registry.training_seconds(v) for v in registry.versions()]
    known = [seconds for seconds in took if seconds is not None]
    one = max(known[1:] or known or [60.0])
    batches = len(past.batches)
    decided, most = points * len(past.moments) * DECIDING_SECONDS, points * batches * one
    return (
        f"{points:,} policies over {batches} batches: at least {decided / 3600:.1f} hours to decide"
        f" ({DECIDING_SECONDS:g} s a policy and moment), and a training of about {one:.0f} s for"
        f" each distinct version, of which there may be {points * batches:,} at most"
        f" ({most / 3600:,.0f} hours)"
    )


DECIDING_SECONDS = 0.03
"""Of a CPU, for what a policy does at one moment when all steps were taken by others before."""


def run(
    settings: Settings,
    candidates: Sequence[Candidate],
    *,
    since: datetime | None = None,
    batches: int | None = None,
    cost: float = 20.0,
    floor: float | None = None,
    jobs: int = 1,
    times: int = ORACLE_TIMES,
    on_replay: Callable[[Replayed], None] | None = None,
) -> Backtest:
    """Replay policies on the history of a model.

    Args:
        settings: of the model.
        candidates: the policies.
        since: replay from then on, with the champion of then.
        batches: only so many, the oldest.
        cost: of a retraining, in wrong answers.
        floor: accuracy under which days are counted.
        jobs: processes.
        times: moments at most at which the oracle trains by itself.
        on_replay: told of each policy when it is done, in their order.
    """
    past, start, shelf = prepare(settings, since)
    if batches is not None:
        past = past.first(batches)
    done = replay_all(past, start, shelf, candidates, jobs, on_replay)
    replays = tuple(found for found, _ in done)
    spent = {name: cost for _, costs in done for name, cost in costs.items()}
    labelled = any(one.labelled for found in replays for one in found.served)
    return Backtest(
        replays=replays,
        ideal=find_ideal(past, start, shelf, replays, cost, times) if labelled else None,
        cost=cost,
        floor=floor,
        cpu_seconds=total(spent.values()).cpu_seconds,
        notes=(*past.notes, *_unlabelled(replays)),
    )


def _unlabelled(replays: Sequence[Replayed]) -> tuple[str, ...]:
    """Say how many batches nobody labelled, for they count for nothing."""
    served = replays[0].served if replays else ()
    n = sum(not one.labelled for one in served)
    if not 0 < n < len(served):
        return ()
    words = f"{n} of {len(served)} batches have no label: they count for no accuracy and no regret"
    return (words,)


def prepare(settings: Settings, since: datetime | None = None) -> tuple[Past, Start, Shelf]:
    """Read the history, and lay the champion that it begins with on the shelf."""
    settings = prepared(settings)
    past = read_past(settings, since)
    registry = Registry(settings)
    champion = _first_champion(registry, since)
    shelf = Shelf(_steps_folder(settings))
    start = lay_out(registry, champion, shelf)
    before = past.moments[0] - timedelta(microseconds=1)
    tags = dict(start.tags)
    if since is None and start.created > before:  # adopted later than the feed began
        tags |= {"promoted_at": before.isoformat(timespec="microseconds")}
    return past, replace(start, created=min(start.created, before), tags=tags), shelf


def replay_all(
    past: Past,
    start: Start,
    shelf: Shelf,
    candidates: Sequence[Candidate],
    jobs: int = 1,
    on_replay: Callable[[Replayed], None] | None = None,
) -> list[tuple[Replayed, Costs]]:
    """Replay each policy, in so many processes; they share the shelf.

    `on_replay` is told of each when it is done.

    Raises:
        BacktestError: a process died.
    """

    def told(found: Iterable[tuple[Replayed, Costs]]) -> Iterator[tuple[Replayed, Costs]]:
        for one, costs in found:
            if on_replay is not None:
                on_replay(one)
            yield one, costs

    if jobs == 1:
        return list(told(replay(past, start, shelf, one) for one in candidates))
    alone = partial(replay, past, start, Shelf(shelf.folder))
    try:
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
            return list(told(pool.map(alone, candidates)))
    except BrokenProcessPool as error:
        raise BacktestError(
            "a process of the replay was killed, or ran out of memory: take fewer --jobs; the steps"
            " that were finished are kept"
        ) from error


def replay(past: Past, start: Start, shelf: Shelf, candidate: Candidate) -> tuple[Replayed, Costs]:
    """Let one policy go through the history; tell what it did, and what each of its steps cost."""
    # a shelf of its own, on the same files: what others took later is not even in memory
    registry = SimulatedRegistry(candidate.settings, Shelf(shelf.folder), start)
    serving: dict[str, Version] = {}
    for moment in past.moments:
        registry.move_to(moment, past.at(moment))
        for batch in registry.view.batches():
            serving.setdefault(batch.id, registry.champion())
        watch_on(registry)
    return _sum_up(past, registry, start, candidate, serving), registry.spent


def find_ideal(
    past: Past,
    start: Start,
    shelf: Shelf,
    replays: Sequence[Replayed],
    cost: float,
    times: int = ORACLE_TIMES,
) -> Ideal | None:
    """Ask the oracle: of all versions that could have been had, which should have served when?

    These are the versions that any policy made, each from the moment at which it was first made,
    and, at some `times` moments, the default fine-tuning of the first champion on all labels that
    had come by then. So of chains of fine-tunings only those that a policy made are thought of.
    """
    ready = {start.tags["digest"]: past.moments[0] - timedelta(microseconds=1)}
    for one in replays:
        for made in one.retrainings:
            ready[made.version] = min(made.at, ready.get(made.version, made.at))
    every = -(-len(past.moments) // times) if times else len(past.moments) + 1
    for moment in past.moments[every - 1 :: every]:
        name = _train_alone(past, start, shelf, moment)
        if name is not None:
            ready[name] = min(moment, ready.get(name, moment))
    arrived = [batch.arrived or moment for batch in past.batches]
    first = {name: sum(at <= when for at in arrived) for name, when in ready.items()}
    useful = [name for name, place in first.items() if place < len(arrived)]
    answers = {name: _answers(past, start, shelf, name, first[name]) for name in useful}
    errors = np.array([[one.errors for one in answers[name]] for name in useful])
    best = oracle(errors, [first[name] for name in useful], cost)
    served = tuple(answers[useful[v]][place] for place, v in enumerate(best.path))
    return Ideal(best, served, len(useful))


def _steps_folder(settings: Settings) -> Path:
    """Name the folder of what this very code made; what other code made is of no use, and goes."""
    packages = [Path(__file__).parents[1] / name for name in ("flows", "monitoring", "sft")]
    sources = sorted(path for folder in packages for path in folder.glob("*.py"))
    made_by = digest([path.read_text(encoding="utf-8") for path in sources])[:12]
    parent = settings.root / FOLDER
    for other in parent.glob("steps-*"):
        if other.name != f"steps-{made_by}":
            shutil.rmtree(other, ignore_errors=True)
    return parent / f"steps-{made_by}"


def _first_champion(registry: Registry, since: datetime | None) -> Version:
    versions = registry.versions()
    if not versions:
        return registry.champion()  # says what to do
    if since is None:
        return versions[0]
    tenure = champion_at(read_history(registry), since)
    if tenure is None:
        raise BacktestError(f"nobody was champion at {since:%Y-%m-%d %H:%M} UTC: leave --since out")
    try:
        return registry.version(tenure.version)
    except RegistryError as error:
        raise BacktestError(f"{error}: it was champion then; name another --since") from error


def _truth(past: Past, registry: SimulatedRegistry, version: Version) -> Labels:
    """Gather all labels, as known at the end."""
    config = registry.config(version)
    end = past.at(past.moments[-1])
    everything = replace(end, late=past.late)
    return everything.labels(list(past.batches), config.classes, config.task)


def _sum_up(
    past: Past,
    registry: SimulatedRegistry,
    start: Start,
    candidate: Candidate,
    serving: dict[str, Version],
) -> Replayed:
    versions = registry.versions()
    made = [version for version in versions if version.number != start.number]
    checks = {v.number: {c.key.batch_id: c for c in registry.checks(v.number)} for v in versions}
    truth = _truth(past, registry, versions[0])
    served = []
    for batch in past.batches:
        version = serving[batch.id]
        record = checks[version.number].get(batch.id)
        seen = record is not None and record.metrics.get("batch.samples")
        features = registry.features(record) if record is not None and seen else None
        served.append(_served(registry, version, batch, features, truth, record))
    learned = [set(registry.learned(version)["sample_id"]) for version in (versions[0], *made)]
    every = [record for of in checks.values() for record in of.values()]
    cost = total(registry.spent.values())
    return Replayed(
        name=candidate.name,
        said=describe(candidate.settings.policy),
        served=tuple(served),
        retrainings=tuple(_retraining(registry, version) for version in made),
        rollbacks=tuple(datetime.fromisoformat(m.at) for m in registry.moves() if m.by == ROLLBACK),
        labels_used=len(set().union(*learned) - learned[0]),
        suppressed=sum(bool(record.tags.get("sustain.suppressed")) for record in every),
        cpu_seconds=cost.cpu_seconds,
        gpu_seconds=cost.gpu_seconds,
        energy_wh=cost.energy_wh,
        overrides=candidate.overrides,
    )


def _served(
    registry: SimulatedRegistry,
    version: Version,
    batch: Batch,
    features: FeatureTable | None,
    truth: Labels,
    record: CheckRecord | None = None,
) -> Served:
    """Tell how a version answered a batch; nothing is known of one that could not be read."""
    labelled = right = 0
    if features is not None:
        config, known = registry.config(version), truth.of_batch(batch.id)
        rows = [i for i, name in enumerate(features.sample_ids) if name in known]
        labelled = len(rows)
        if rows:
            texts = [known[features.sample_ids[i]] for i in rows]
            answers = features.probabilities[rows]
            right = int(rightly(config.task, answers, texts, config.classes).sum())
    metrics = {} if record is None else record.metrics
    value, needed = metrics.get("drift.stream", 0.0), metrics.get("drift.stream_threshold", 1.0)
    return Served(
        batch_id=batch.id,
        at=batch.arrived or registry.now(),
        version=version.tags["digest"],
        number=version.number,
        samples=0 if features is None else len(features),
        labelled=labelled,
        right=right,
        alarm=record is not None and record.alarm,
        evidence=value / needed,
    )


def _retraining(registry: SimulatedRegistry, version: Version) -> Retraining:
    parent = registry.version(version.parent or 0)
    new = set(registry.learned(version)["sample_id"]) - set(registry.learned(parent)["sample_id"])
    check = registry.check_record(version.tags["cause_check"])
    return Retraining(
        at=version.created,
        batch_id=check.key.batch_id,
        number=version.number,
        version=version.tags["digest"],
        reason=version.tags[DECIDED],
        outcome=version.tags.get("verdict_reason", ""),
        promoted="promoted_at" in version.tags,
        labels=len(new),
    )


def _train_alone(past: Past, start: Start, shelf: Shelf, moment: datetime) -> str | None:
    """Fine-tune the first champion on all that had come; None where that is not enough."""
    registry = SimulatedRegistry(past.settings, shelf, start)
    registry.move_to(moment, past.at(moment))
    try:
        return train_on(registry, registry.champion(), "the oracle")[0].tags["digest"]
    except RetrainError:
        return None


def _answers(past: Past, start: Start, shelf: Shelf, name: str, first: int) -> tuple[Served, ...]:
    """Let one version answer every batch from the first that it could serve."""
    alone = replace(start, tags={**start.tags, "digest": name})
    registry = SimulatedRegistry(past.settings, shelf, alone)
    registry.move_to(past.moments[-1], past.at(past.moments[-1]))
    version = registry.champion()
    truth = _truth(past, registry, version)
    against = load_champion(registry, version)
    found = []
    for place, batch in enumerate(past.batches):
        features = None
        if place >= first:
            with suppress(BatchNotReady, TooManyBad):
                features = look_once(registry, Look(registry, against, batch))
        found.append(_served(registry, version, batch, features, truth))
    return tuple(found)
