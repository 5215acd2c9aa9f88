"""Two writers of the same rows of MLflow, at the same moment."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

from mlflow.entities import Param

from flows.records import Version
from flows.registry import Registry

ROUNDS = 30
"""Of the first writes of a tag by two of MLflow's clients, some 40 % meet."""


def write_at_once(one: Registry, other: Registry, version: Version) -> None:
    """Write tags, aliases and parameters that are not there yet, each twice at once."""
    barrier = Barrier(2, timeout=60)

    def write(book: Registry) -> None:
        writes: list[Callable[[str], object]] = [
            lambda name: book.tag(version, **{name: "same"}),
            lambda name: book.client.set_registered_model_tag(book.name, name, "same"),
            lambda name: book.set_alias(name, version),
            lambda name: book.client.set_tag(version.run_id, name, "same"),
            lambda name: book.client.log_batch(version.run_id, params=[Param(name, "same")]),
        ]
        for number in range(ROUNDS):
            for each in writes:
                barrier.wait()
                each(f"twice{number}")

    with ThreadPoolExecutor(2) as pool:
        for written in [pool.submit(write, book) for book in (one, other)]:
            written.result()
    tags = one.version(version.number).tags
    assert [tags.get(f"twice{number}") for number in range(ROUNDS)] == ["same"] * ROUNDS
