"""Are the labels of a delivery right? Asked before anything is trained on them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from flows.settings import Settings
from sft.dataset import LabelledPictures, Role, role_of
from sft.memory import Memory
from sft.models import Network
from sft.noise import LabelVerdict, judge_labels

OLD = 200
"""Old samples beside the delivery's own; more say little about a new world."""
FILE = "suspicious_labels.csv"


def judge_delivery(
    champion: Network,
    labelled: LabelledPictures,
    memory: Memory,
    classes: Sequence[str],
    settings: Settings,
) -> LabelVerdict:
    """Judge fresh labels by what the champion sees in their pictures, one forward pass.

    Args:
        champion: whose embeddings and answers are used.
        labelled: the delivery; labels are places in `classes`.
        memory: the champion's, whose rehearsed samples stand beside it.
        classes: those of the champion, and new ones after them.
        settings: section [noise].
    """
    known = champion.config
    old = memory.without(labelled.sample_ids).labelled(
        Role.TRAIN, known.classes, known.preprocessing
    )
    drawn = np.random.default_rng(0).permutation(len(old))[:OLD]
    old = old.take(drawn.tolist())
    embedding, probabilities = _see(champion, labelled)
    return judge_labels(
        embedding,
        labelled.labels.numpy(),
        probabilities,
        classes,
        settings=settings.noise,
        old_embeddings=_see(champion, old)[0] if len(old) else None,
        old_labels=old.labels.numpy() if len(old) else None,
    )


def to_learn(
    champion: Network,
    labelled: LabelledPictures,
    memory: Memory,
    classes: Sequence[str],
    settings: Settings,
) -> tuple[LabelledPictures, LabelVerdict]:
    """Return what is learned from, and what was thought of it.

    The hold-out is left as it is and judges nothing here: its labels must not choose what is
    learned.
    """
    usable = labelled.take(
        [i for i, name in enumerate(labelled.sample_ids) if role_of(name) is not Role.HOLDOUT]
    )
    verdict = judge_delivery(champion, usable, memory, classes, settings)
    believed = np.flatnonzero(verdict.believed(settings.noise))
    return usable.take(believed.tolist()), verdict


def write_suspicious(
    folder: Path, labelled: LabelledPictures, verdict: LabelVerdict, classes: Sequence[str]
) -> None:
    """Write `suspicious_labels.csv`, the most doubtful first; nothing where there are none."""
    rows = np.flatnonzero(verdict.suspicious)
    if not len(rows):
        return
    rows = rows[np.argsort(-verdict.doubt[rows], kind="stable")]
    pd.DataFrame(
        {
            "sample_id": [labelled.sample_ids[i] for i in rows],
            "label": [classes[int(labelled.labels[i])] for i in rows],
            "likely": [classes[int(verdict.likely[i])] for i in rows],
            "doubt": verdict.doubt[rows].round(3),
        }
    ).to_csv(folder / FILE, index=False)


def _see(
    network: Network, data: LabelledPictures
) -> tuple[np.ndarray[tuple[int, ...], np.dtype[np.float32]], ...]:
    """Give embeddings and probabilities of every picture."""
    seen = [network.embed(pixels) for pixels in data.pixels.split(256)]
    return tuple(torch.cat(part).numpy() for part in zip(*seen, strict=True))
