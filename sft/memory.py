"""What a version carries of its past: samples to rehearse, the old hold-out, and its regimes.

The pictures are kept as the network sees them (after resizing, as lossless PNG), so that a version
stays trainable and can be judged when the feed's old data is gone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from sft.dataset import LabelledPictures, Role
from sft.pictures import Preprocessing, decode_own, encode_png
from sft.pixels import IN_MEMORY_BYTES, PixelSink
from sft.tasks import SINGLE_LABEL, Task

COLUMNS = ("sample_id", "label", "role", "regime", "image", "about")


@dataclass(frozen=True)
class Memory:
    """One row a sample.

    Columns of `table`: `sample_id`; `label` (as people write it: a class name, or as the task has
    it; None for a reference sample whose label never came); `role` (train, validation or holdout);
    `regime` (the world it came from); `image` (PNG bytes); `about` (JSON: what came with the
    picture, such as its size and the user's own columns; this module only carries it). Decoded sets
    larger than `in_memory_bytes` lie in a file.
    """

    table: pd.DataFrame
    in_memory_bytes: int = IN_MEMORY_BYTES

    def __post_init__(self) -> None:
        """Refuse a table of another form."""
        if tuple(self.table.columns) != COLUMNS:
            raise ValueError(f"a memory has the columns {COLUMNS}, got {list(self.table.columns)}")

    def __len__(self) -> int:
        return len(self.table)

    @property
    def regimes(self) -> tuple[str, ...]:
        """Names of the regimes, oldest first."""
        return tuple(dict.fromkeys(self.table["regime"]))

    def labelled(
        self,
        role: Role,
        classes: Sequence[str],
        preprocessing: Preprocessing,
        task: Task = SINGLE_LABEL,
    ) -> LabelledPictures:
        """Decode the samples of one role that have a label which these classes can express."""
        rows = self.table[self.table["role"] == role.value]
        known = task.known(task.rows(_texts(rows["label"]), classes))
        return self._decode(rows[known.numpy()], classes, preprocessing, task)

    def held_out(
        self,
        regime: str,
        classes: Sequence[str],
        preprocessing: Preprocessing,
        *,
        learned: Collection[str] = (),
        task: Task = SINGLE_LABEL,
    ) -> LabelledPictures:
        """Decode what stands for a regime: samples that no version learned from, labelled or not.

        Args:
            regime: its name.
            classes: names, in the order of the labels.
            preprocessing: the network's.
            learned: ids of samples that the version or its parents trained on or chose weights by.
            task: tells what labels mean.
        """
        table = self.table
        rows = table[
            (table["regime"] == regime)
            & (table["role"] == Role.HOLDOUT.value)
            & ~table["sample_id"].isin(list(learned))
        ]
        return self._decode(rows, classes, preprocessing, task)

    def about(self, sample_ids: Sequence[str]) -> list[dict[str, Any]]:
        """Return what came with each of these samples."""
        told = dict(zip(self.table["sample_id"], self.table["about"], strict=True))
        return [json.loads(told[name]) for name in sample_ids]

    def pixels(
        self, sample_ids: Collection[str], preprocessing: Preprocessing
    ) -> dict[str, torch.Tensor]:
        """Decode those of these samples that it holds, by id."""
        rows = self.table[self.table["sample_id"].isin(list(sample_ids))]
        data = self._decode(rows, (), preprocessing)
        return dict(zip(data.sample_ids, data.pixels, strict=True))

    def bounded(self, *, rehearsal: int, holdout: int) -> Memory:
        """Keep at most `rehearsal` train, as many validation, and `holdout` samples a regime.

        Those with the smallest hash of their id stay: a uniform sample that changes little from
        version to version. A held-out sample with a label is kept before one without.
        """
        table = self.table.assign(_place=[_place(name) for name in self.table["sample_id"]])
        table["_unlabelled"] = table["label"].isna()
        parts = []
        for role in (Role.TRAIN, Role.VALIDATION):
            rows = table[table["role"] == role.value]
            parts.append(rows.sort_values("_place").head(rehearsal))
        held = table[table["role"] == Role.HOLDOUT.value]
        parts += [
            held[held["regime"] == name].sort_values(["_unlabelled", "_place"]).head(holdout)
            for name in self.regimes
        ]
        kept = pd.concat(parts).sort_index()
        return replace(self, table=kept[list(COLUMNS)].reset_index(drop=True))

    def extended(self, more: Memory) -> Memory:
        """Return this memory with more samples.

        A sample that is in both is taken from `more` (its label was corrected), but stays in the
        regime that it came from.
        """
        if more.table.empty:
            return self
        old = self.without(more.table["sample_id"])
        came_from = dict(zip(self.table["sample_id"], self.table["regime"], strict=True))
        regimes = [
            came_from.get(name, regime)
            for name, regime in zip(more.table["sample_id"], more.table["regime"], strict=True)
        ]
        new = more.table.assign(regime=pd.Series(regimes, dtype="object"))
        return replace(self, table=pd.concat([old.table, new], ignore_index=True))

    def without(self, sample_ids: Iterable[str]) -> Memory:
        """Return this memory without some samples."""
        kept = ~self.table["sample_id"].isin(list(sample_ids))
        return replace(self, table=self.table[kept].reset_index(drop=True))

    def with_pictures(self, *sets: LabelledPictures) -> Memory:
        """Encode the pictures that `remember` left out, of what is still remembered."""
        places = {name: (data, i) for data in sets for i, name in enumerate(data.sample_ids)}
        images = [
            image if image is not None else _encoded(*places[name])
            for name, image in zip(self.table["sample_id"], self.table["image"], strict=True)
        ]
        return replace(self, table=self.table.assign(image=pd.Series(images, dtype="object")))

    def told(self, labels: Mapping[str, str]) -> Memory:
        """Return this memory with labels, by sample id, for those samples that have none."""
        known = self.table["label"]
        late = self.table["sample_id"].map(labels)
        return Memory(self.table.assign(label=known.where(known.notna(), late)))

    def save(self, path: Path) -> None:
        """Write Parquet."""
        self.table.to_parquet(path, index=False)

    @classmethod
    def load(cls, path: Path, in_memory_bytes: int = IN_MEMORY_BYTES) -> Memory:
        """Read what `save` wrote."""
        return cls(pd.read_parquet(path)[list(COLUMNS)], in_memory_bytes)

    def _decode(
        self,
        rows: pd.DataFrame,
        classes: Sequence[str],
        preprocessing: Preprocessing,
        task: Task = SINGLE_LABEL,
    ) -> LabelledPictures:
        size, channels = preprocessing.image_size, preprocessing.channels
        seen = Preprocessing(image_size=size, resize_size=size, channels=channels)
        sink = PixelSink((channels, size, size), self.in_memory_bytes)
        for image in rows["image"]:
            sink.add(decode_own(image, seen))
        labels = task.rows(_texts(rows["label"]), classes)
        return LabelledPictures(tuple(rows["sample_id"]), sink.finish(), labels)


def remember(
    data: LabelledPictures,
    classes: Sequence[str],
    roles: Sequence[Role],
    regime: str,
    about: Mapping[str, Mapping[str, Any]] | None = None,
    task: Task = SINGLE_LABEL,
    *,
    encode: bool = True,
) -> Memory:
    """Make the memory of decoded samples, labelled or not.

    Args:
        data: n samples.
        classes: names of the classes, in the order of the labels.
        roles: n roles.
        regime: the world that they came from.
        about: sample id to what came with it, which JSON can hold.
        task: tells what labels mean.
        encode: now; otherwise `Memory.with_pictures` does, once it is bounded.
    """
    about = about or {}
    labels = task.texts(data.labels, classes)
    images = [encode_png(p) for p in data.pixels] if encode else [None] * len(data)
    return Memory(
        pd.DataFrame(
            {
                "sample_id": pd.Series(list(data.sample_ids), dtype="object"),
                "label": pd.Series(labels, dtype="object"),
                "role": pd.Series([role.value for role in roles], dtype="object"),
                "regime": pd.Series([regime] * len(data), dtype="object"),
                "image": pd.Series(images, dtype="object"),
                "about": pd.Series(
                    [json.dumps(about.get(name, {})) for name in data.sample_ids], dtype="object"
                ),
            }
        )
    )


def _encoded(data: LabelledPictures, place: int) -> bytes:
    return encode_png(data.pixels[place])


def _texts(labels: pd.Series) -> list[str | None]:
    return [None if pd.isna(label) else str(label) for label in labels]


def _place(sample_id: str) -> str:
    return hashlib.sha256(b"sustain memory\0" + sample_id.encode()).hexdigest()
