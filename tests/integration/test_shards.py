"""A check in shards: by Prefect's threads, and on a Ray cluster of two nodes."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import psutil
import pytest
from deployed import ask

from flows.batches import Contents
from flows.feed import list_batches
from flows.registry import Registry
from flows.settings import Settings
from flows.shards import see_batch
from flows.storage import FeedError
from flows.watch import watch

if TYPE_CHECKING:
    from worlds import World


def in_shards(world: World, more: str = "") -> None:
    """Let a batch of 100 be read in four shards from now on."""
    with world.path.open("a") as file:
        file.write(f"\n[compute]\nshard_pictures = 30\nshard_workers = 2\n{more}")


def same_as_whole(settings: Settings) -> None:
    """Hold the features that the only check has on record against those of a whole reading."""
    registry = Registry(settings)
    (record,) = registry.checks(1)
    (batch,) = list_batches(settings.feed, settings.root)
    whole = replace(settings, compute=replace(settings.compute, shard_pictures=10_000))
    (wanted,) = see_batch(batch, whole, [registry.network(registry.version(1))], ()).tables
    found = registry.features(record)
    assert found.sample_ids == wanted.sample_ids
    assert len(found) == 100
    np.testing.assert_allclose(found.embedding, wanted.embedding, rtol=1e-5, atol=1e-6)
    assert found.statistics.equals(wanted.statistics)


def test_a_shard_that_the_storage_fails_is_read_again_alone(
    small_world: Callable[[str], World], monkeypatch: pytest.MonkeyPatch, prefect_server: str
) -> None:
    """Four shards are four tasks in other threads; one is tried twice, the others once."""
    world = small_world("shards")
    world.arrive(0)
    in_shards(world)
    names = sorted(path.name for path in (world.path.parent / "feed/optical-01").iterdir())
    calls: Counter[str] = Counter()
    here, read = threading.get_ident(), Contents.read

    def fails_once(self: Contents, *given: object) -> None:
        first = next(iter(self.pictures))
        if threading.get_ident() != here:  # pictures for the report are read here
            calls[first] += 1
            if first == names[30] and calls[first] == 1:
                raise FeedError("the bucket did not answer")
        read(self, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(Contents, "read", fails_once)
    (checked,) = watch(str(world.path)).checked
    assert checked.samples == 100
    assert checked.alarm
    assert calls == {names[0]: 1, names[30]: 2, names[60]: 1, names[90]: 1}
    monkeypatch.setattr(Contents, "read", read)
    same_as_whole(world.settings)
    body = {"task_runs": {"name": {"like_": "see shard"}}}
    runs = ask(prefect_server, "/task_runs/filter", body)
    assert [run["state_name"] for run in runs] == ["Completed"] * 4


def nodes_that_embed(done: threading.Event) -> set[int]:
    """Name the nodes of Ray's with a worker that loaded torch, which only our task makes it do."""
    found = set()
    while not done.wait(0.5):
        with suppress(psutil.Error):  # a worker that ended meanwhile
            for node in psutil.Process().children(recursive=True):
                if node.name() == "raylet":
                    maps = [m.path for one in node.children() for m in one.memory_maps()]
                    found |= {node.pid} if any("libtorch" in path for path in maps) else set()
    return found


@pytest.mark.nightly
def test_a_ray_cluster_of_two_nodes_reads_the_shards(small_world: Callable[[str], World]) -> None:
    """Each node has one CPU, so both take shards; the features are those of a whole reading."""
    ray = pytest.importorskip("ray")
    pytest.importorskip("prefect_ray")
    from ray.cluster_utils import Cluster

    world = small_world("ray")
    world.arrive(0)
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "include_dashboard": False, "object_store_memory": 10**8},
    )
    try:
        cluster.add_node(num_cpus=1, object_store_memory=10**8)
        in_shards(world, f'task_runner = "ray"\nray_address = "{cluster.address}"\n')
        with ThreadPoolExecutor() as beside:
            done = threading.Event()
            nodes = beside.submit(nodes_that_embed, done)
            try:
                (checked,) = watch(str(world.path)).checked
            finally:
                done.set()
        assert checked.samples == 100
        assert len(nodes.result()) == 2
    finally:
        ray.shutdown()
        cluster.shutdown()
    same_as_whole(world.settings)
