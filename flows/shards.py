"""A batch as networks see it: read and embedded whole, or in shards by Prefect's task runner.

A batch of more than `[compute] shard_pictures` is split into shards, each of which is a Prefect
task that reads its files and embeds them: in threads of this process, or on a Ray cluster. A shard
that the storage failed is tried again by itself. Only features come back, so that a batch need not
fit into anybody's memory; what the shards tell of their samples is put together as if one had read
them all.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner
from prefect.tasks import Task

from flows.batches import Contents, open_batch, read_batch
from flows.feed import Batch, FeedSettings
from flows.intake import BatchData, Intake
from flows.package import see
from flows.preflight import SettingsError
from flows.settings import MachineSettings, Settings
from flows.storage import FeedError, Place
from monitoring.features import FeatureTable, concatenate, tidy
from sft.models import Network
from sft.pictures import Preprocessing
from sft.pixels import take

RETRIES = 2
Shard: TypeAlias = tuple[Intake, list[FeatureTable]]


@dataclass(frozen=True, eq=False)  # tables have no single truth value to compare by
class Seen:
    """What a batch holds, and what each network saw in those samples that were asked for.

    Attributes:
        read: the batch; without pictures where it was read in shards.
        tables: one for each network; none where no sample was asked for.
        pictures: reads pictures, uint8 (C, H, W), of samples by their ids.
    """

    read: BatchData
    tables: tuple[FeatureTable, ...]
    pictures: Callable[[Collection[str]], dict[str, torch.Tensor]]


def see_batch(
    batch: Batch, settings: Settings, networks: Sequence[Network], without: Collection[str]
) -> Seen:
    """Read a batch, and let networks see the samples of it that are not in `without`.

    The features are the same whatever the shards are, up to the rounding of passes of other sizes.

    Raises:
        FeedError: as `flows.batches.read_batch`.
        SettingsError: Ray is asked for and is not installed.
    """
    preprocessing = networks[0].config.preprocessing
    machine, bound = settings.compute, settings.memory.in_memory_bytes
    shared = batch, settings.feed, settings.root, preprocessing
    with open_batch(*shared, in_memory_bytes=bound) as opened:
        parts = opened.contents.parts(machine.shard_pictures)
        if len(parts) == 1:
            parts[0].read(opened.place, settings.feed, opened.intake)
        else:
            empty = opened.intake.beside(bound // machine.shard_workers)
            work = partial(_see, opened.place, settings.feed, empty, list(networks), without)
            shards = _mapped(work, parts, machine)
            for intake, _ in shards:
                opened.intake.add(intake)
    read = opened.intake.finish()
    if len(parts) == 1:
        return see_read(read, networks, without)
    wanted = [name for name in read.samples["sample_id"] if name not in without]
    several = zip(*(tables for _, tables in shards if tables), strict=True)
    tables = [_ordered(concatenate(some), wanted) for some in several] if wanted else []
    return _told(read, tables, without, partial(_read_again, *shared))


def see_read(read: BatchData, networks: Sequence[Network], without: Collection[str]) -> Seen:
    """Let networks see the samples of a batch that was read as a whole, as `see_batch` does."""
    names = list(read.samples["sample_id"])
    places = [i for i, name in enumerate(names) if name not in without]
    tables = _tables(networks, names, read.pixels, read.sizes, places) if places else []
    index = {name: i for i, name in enumerate(names)}
    return _told(read, tables, without, partial(_picked, index, read))


def _told(
    read: BatchData,
    tables: Sequence[FeatureTable],
    without: Collection[str],
    pictures: Callable[[Collection[str]], dict[str, torch.Tensor]],
) -> Seen:
    wanted = [i for i, name in enumerate(read.samples["sample_id"]) if name not in without]
    metadata = tidy(read.metadata.iloc[wanted].reset_index(drop=True))
    return Seen(read, tuple(replace(table, metadata=metadata) for table in tables), pictures)


def _see(
    place: Place,
    settings: FeedSettings,
    empty: Intake,
    networks: Sequence[Network],
    without: Collection[str],
    part: Contents,
) -> Shard:
    """Read and embed a part of a batch."""
    intake = empty.beside()
    part.read(place, settings, intake)
    names, sizes, pixels = intake.settle()
    ids = [f"{intake.batch.id}/{name}" for name in names]
    places = [i for i, name in enumerate(ids) if name not in without]
    if not places:
        return intake, []
    # a copy each: while a network embeds, it is hooked, and other threads would hear it
    return intake, _tables(copy.deepcopy(networks), ids, pixels, sizes, places)


def _tables(
    networks: Sequence[Network],
    names: Sequence[str],
    pixels: Any,
    sizes: Sequence[tuple[int, int, int]],
    places: Sequence[int],
) -> list[FeatureTable]:
    some = take(pixels, torch.tensor(places))
    ids, told = tuple(names[i] for i in places), [sizes[i] for i in places]
    return [see(network, ids, some, sizes=told) for network in networks]


def _ordered(table: FeatureTable, names: Sequence[str]) -> FeatureTable:
    """Choose the rows of these samples; of one that came twice, the first."""
    rows = {name: row for row, name in reversed(list(enumerate(table.sample_ids)))}
    return table.take([rows[name] for name in names])


def _picked(
    index: dict[str, int], read: BatchData, names: Collection[str]
) -> dict[str, torch.Tensor]:
    return {name: read.pixels[index[name]] for name in names if name in index}


def _read_again(
    batch: Batch,
    settings: FeedSettings,
    root: Path,
    preprocessing: Preprocessing,
    names: Collection[str],
) -> dict[str, torch.Tensor]:
    if not names:
        return {}
    read = read_batch(batch, settings, root, preprocessing, only=frozenset(names))
    return dict(zip(read.samples["sample_id"], read.pixels, strict=True))


# --- the task runner


def _failed_by_storage(_task: Task[Any, Any], _run: TaskRun, state: State[Any]) -> bool:
    return isinstance(state.result(raise_on_failure=False), FeedError)


@task(
    name="see shard",
    cache_policy=NO_CACHE,
    retries=RETRIES,
    retry_delay_seconds=[1, 10],
    retry_condition_fn=_failed_by_storage,
)
def see_shard(work: Callable[[], Shard]) -> Shard:
    """Do what a shard takes; a call, so that Prefect looks for no futures among its pictures."""
    return work()


def _mapped(
    work: Callable[[Contents], Shard], parts: Sequence[Contents], machine: MachineSettings
) -> list[Shard]:
    with _runner(machine) as runner:
        futures = [runner.submit(see_shard, {"work": partial(work, part)}) for part in parts]
        return [future.result() for future in futures]


def _runner(machine: MachineSettings) -> TaskRunner[Any]:
    if machine.task_runner == "threads":
        return ThreadPoolTaskRunner(max_workers=machine.shard_workers)
    try:
        from prefect_ray import RayTaskRunner
    except ImportError as error:
        raise SettingsError(
            'task_runner = "ray" needs Ray: pip install "sustain[ray]", or set it to "threads"'
        ) from error
    started = {"num_cpus": machine.shard_workers, "include_dashboard": False}
    address = machine.ray_address
    runner: TaskRunner[Any] = RayTaskRunner(address or None, {} if address else started)
    return runner
