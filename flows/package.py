"""What a version carries: its network, its reference, its memory, and what it learned from."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from monitoring.features import FeatureTable, Integers, Kind, extract
from monitoring.reference import NO_LABEL, RIGHT, WRONG, Reference, Regime, bounded
from sft import models
from sft.memory import Memory
from sft.models import Network
from sft.tasks import SINGLE_LABEL

NETWORK, REFERENCE = "network", "reference"
MEMORY, LEARNED, LINEAGE = "memory.parquet", "learned.parquet", "lineage.json"
LEARNED_COLUMNS = ("sample_id", "label", "role")


@dataclass(frozen=True)
class Lineage:
    """Where a version comes from, for people and for the record.

    Attributes:
        parent: version number it was tuned from; None for the first.
        cause: why it was made, in words.
        settings: what it was trained with, by section.
        learned_digest: digest of the labels it learned from and was judged on.
        code_version: of this package.
    """

    parent: int | None
    cause: str
    settings: dict[str, dict[str, object]]
    learned_digest: str
    code_version: str


@dataclass(frozen=True)
class Package:
    """The parts of a version.

    Attributes:
        network: weights and configuration.
        reference: what "no drift" looks like to it.
        memory: what later versions rehearse and are judged on.
        learned: `sample_id`, `label`, `role`, a row a new label.
        lineage: where it comes from.
        learned_before: the same columns, what its parents used, newest first. It is written below
            `learned`, so that a version's history does not depend on its parents' files.
    """

    network: Network
    reference: Reference
    memory: Memory
    learned: pd.DataFrame
    lineage: Lineage
    learned_before: pd.DataFrame | None = None

    def write(self, folder: Path) -> None:
        """Write every part into the folder."""
        models.save(self.network, folder / NETWORK)
        self.reference.save(folder / REFERENCE)
        self.memory.save(folder / MEMORY)
        tables = [self.learned, *([] if self.learned_before is None else [self.learned_before])]
        learned = pd.concat([table[list(LEARNED_COLUMNS)] for table in tables])
        learned.to_parquet(folder / LEARNED, index=False)
        lineage = json.dumps(asdict(self.lineage), indent=2, sort_keys=True, default=str)
        (folder / LINEAGE).write_text(lineage + "\n")


def build_reference(
    network: Network, memory: Memory, *, max_regimes: int, learned: Collection[str] = ()
) -> Reference:
    """Let the network embed the held-out samples of every regime in its memory.

    A regime with too few samples for a test (under 20) is left out; of more than `max_regimes` the
    nearest are merged.
    """
    classes, preprocessing = network.config.classes, network.config.preprocessing
    task = network.config.task
    regimes = []
    for name in memory.regimes:
        data = memory.held_out(name, classes, preprocessing, learned=learned, task=task)
        if len(data) >= 20:  # noqa: PLR2004 - what `monitoring.reference` asks for
            about = memory.about(data.sample_ids)
            sizes = [tuple(one["size"]) for one in about if "size" in one]
            features = see(
                network,
                data.sample_ids,
                data.pixels,
                sizes=sizes if len(sizes) == len(data) else None,
                metadata=pd.DataFrame(
                    [one.get("metadata", {}) for one in about], index=range(len(about))
                ),
            )
            truth = _truth(network, features, data.labels)
            regimes.append(Regime(name, features, truth))
    return bounded(Reference(tuple(regimes), classes), max_regimes)


def see(
    network: Network,
    sample_ids: Sequence[str],
    pixels: torch.Tensor,
    *,
    sizes: Sequence[tuple[int, int, int]] | None = None,
    metadata: pd.DataFrame | None = None,
) -> FeatureTable:
    """Let a network see pictures, as the monitoring keeps what it saw."""
    kind = Kind(network.config.task.name)
    return extract(network, sample_ids, pixels, sizes=sizes, metadata=metadata, kind=kind)


def _truth(network: Network, features: FeatureTable, labels: torch.Tensor) -> Integers:
    """Give what a regime's `labels` are: the classes, or of other tasks who was right."""
    task = network.config.task
    if task == SINGLE_LABEL:
        return labels.numpy()
    predicted = task.predicted(torch.from_numpy(features.probabilities))
    truth = np.where(task.right(predicted, labels), RIGHT, WRONG)
    return np.asarray(np.where(task.known(labels), truth, NO_LABEL), dtype=np.int64)
