"""Are the labels of a delivery right? Asked before anything is trained on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from sft.dataset import LabelledPictures, Role, role_of
from sft.models import Network
from sft.noise import OLD_SAMPLES, LabelVerdict, NoiseSettings, judge_labels, not_judged
from sft.tasks import SINGLE_LABEL

FILE = "suspicious_labels.csv"
CHUNK = 256


@dataclass(frozen=True, eq=False)
class Delivery:
    """Fresh labels, and what is thought of them.

    Attributes:
        verdict: on all of them, the hold-out too: whether a person should look first.
        usable: those that may be learned from.
        doubt: on the usable ones alone: held-out labels must not choose what is learned.
        believed: the usable ones that are learned from.
    """

    verdict: LabelVerdict
    usable: LabelledPictures
    doubt: LabelVerdict
    believed: LabelledPictures


def judge_delivery(
    champion: Network,
    labelled: LabelledPictures,
    old: LabelledPictures,
    classes: Sequence[str],
    settings: NoiseSettings,
) -> Delivery:
    """Judge fresh labels by what the champion sees in their pictures, in one forward pass.

    Only labels that name one class are judged; of other tasks nothing is suspicious.

    Args:
        champion: whose embeddings and answers are used.
        labelled: the delivery; labels are places in `classes`.
        old: rehearsed samples, which stand beside it.
        classes: those of the champion, and new ones after them.
        settings: section [noise].
    """
    ids = labelled.sample_ids
    usable = [i for i, name in enumerate(ids) if role_of(name) is not Role.HOLDOUT]
    if champion.config.task != SINGLE_LABEL:
        words = f"the labels were not judged: a {champion.config.task.name} model has no one class"
        nothing = (not_judged(np.zeros(len(rows), np.int64), words) for rows in (ids, usable))
        learned = labelled.take(usable)
        return Delivery(next(nothing), learned, next(nothing), learned)
    beside = old.take(np.random.default_rng(0).permutation(len(old))[:OLD_SAMPLES].tolist())
    embeddings, probabilities = see(champion, labelled.pixels)
    old_embeddings = see(champion, beside.pixels)[0] if len(beside) else None

    def judge(rows: Sequence[int]) -> LabelVerdict:
        return judge_labels(
            embeddings[rows],
            labelled.labels.numpy()[rows],
            probabilities[rows],
            classes,
            settings=settings,
            old_embeddings=old_embeddings,
            old_labels=beside.labels.numpy() if len(beside) else None,
        )

    doubt = judge(usable)
    believed = [row for row, kept in zip(usable, doubt.believed(settings), strict=True) if kept]
    return Delivery(
        verdict=judge(range(len(ids))),
        usable=labelled.take(usable),
        doubt=doubt,
        believed=labelled.take(believed),
    )


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


def see(
    network: Network, pixels: torch.Tensor
) -> tuple[np.ndarray[tuple[int, ...], np.dtype[np.float32]], ...]:
    """Give embeddings (n, d) and probabilities (n, classes) of uint8 pictures (n, C, H, W)."""
    seen = [network.embed(part) for part in pixels.split(CHUNK)]
    return tuple(torch.cat(part).numpy() for part in zip(*seen, strict=True))
