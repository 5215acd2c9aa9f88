"""Are the labels of a delivery right? Asked before anything is trained on them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from typing import TypeAlias

import numpy as np
import pandas as pd
import torch

from monitoring.gallery import Shown, gallery
from sft.alignment import aligned_answers
from sft.batchnorm import has_statistics, reestimate
from sft.dataset import LabelledPictures, Role, role_of
from sft.evaluate import collect
from sft.models import Network
from sft.noise import (
    OLD_SAMPLES,
    LabelVerdict,
    NoiseAction,
    NoiseSettings,
    judge_labels,
    mixed_up_classes,
    not_judged,
)
from sft.pictures import thumbnail
from sft.pixels import CHUNK, Pixels
from sft.tasks import SINGLE_LABEL

FILE, PAGE = "suspicious_labels.csv", "suspicious_labels.html"
MAX_SHOWN = 200
"""Pictures on the page: some half a megabyte."""
STRETCH = 60
"""Labels: so many of optical digits, every one the next class, are seen to be mixed up in .93 to
1.00 of 40 deliveries, none of the clean ones."""
ADAPTED_BY = 256
"""Pictures that batch-norm statistics are taken from: one pass."""

Rows: TypeAlias = np.ndarray[tuple[int, ...], np.dtype[np.float32]]


@dataclass(frozen=True, eq=False)
class Delivery:
    """Fresh labels, and what is thought of them.

    Attributes:
        judged: all of them, the hold-out too; or those of the changed world, if only they are
            refused.
        verdict: on those: whether a person should look first.
        usable: those that may be learned from.
        judge_usable: judges the usable ones alone: held-out labels must not choose what is learned.
        believed: the usable ones that are learned from, with how much each counts.
    """

    judged: LabelledPictures
    verdict: LabelVerdict
    usable: LabelledPictures
    judge_usable: Callable[[], LabelVerdict]
    believed: LabelledPictures

    @cached_property
    def doubt(self) -> LabelVerdict:
        """On the usable ones; only worked out where it is asked for."""
        return self.judge_usable()


def judge_delivery(
    champion: Network,
    labelled: LabelledPictures,
    old: LabelledPictures,
    classes: Sequence[str],
    settings: NoiseSettings,
    changed: Collection[str] = (),
) -> Delivery:
    """Judge fresh labels by what the champion sees in their pictures, in one forward pass.

    Only labels that name one class are judged; of other tasks nothing is suspicious. Labels of the
    batches that changed are judged by themselves too: among many labels of a known world, whose
    pictures are the surest, wrong ones of a new world are not seen. And each stretch of batches is
    asked whether its classes are mixed up.

    Args:
        champion: whose embeddings and answers are used.
        labelled: the delivery; labels are places in `classes`.
        old: rehearsed samples, which stand beside it.
        classes: those of the champion, and new ones after them.
        settings: section [noise].
        changed: ids of the batches that rang.
    """
    ids = labelled.sample_ids
    usable = [i for i, name in enumerate(ids) if role_of(name) is not Role.HOLDOUT]
    if champion.config.task != SINGLE_LABEL:
        words = f"the labels were not judged: a {champion.config.task.name} model has no one class"
        nothing, none = (not_judged(np.zeros(len(rows), np.int64), words) for rows in (ids, usable))
        learned = labelled.take(usable)
        return Delivery(labelled, nothing, learned, lambda: none, learned)
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
            adapted=adapted_answers(champion, labelled.take(rows).pixels),
            aligned=None
            if old_embeddings is None
            else aligned_answers(champion, embeddings[rows], old_embeddings),
        )

    believed = labelled.take(usable)
    judge_usable = cache(partial(judge, usable))
    if settings.action is not NoiseAction.KEEP:
        weights = torch.from_numpy(judge_usable().weights(settings)).float()
        believed = replace(believed, weights=weights).take(weights.nonzero().flatten().tolist())
    known = embeddings if old_embeddings is None else old_embeddings
    given = labelled.labels.numpy()
    parts = [
        (rows, _batches(ids, rows))
        for rows in stretches(ids)
        if (answers := aligned_answers(champion, embeddings[rows], known)) is not None
        and mixed_up_classes(answers, given[rows], classes)
    ]
    new = [i for i, name in enumerate(ids) if name.split("/", 1)[0] in changed]
    parts += [(new, "the batches that changed")] if 0 < len(new) < len(ids) else []
    judged, verdict = labelled, judge(range(len(ids)))
    for rows, whose in parts:
        if not verdict.stop and (own := judge(rows)).stop:
            words = f"the {len(rows)} labels of {whose}: {own.words}"
            judged, verdict = labelled.take(rows), replace(own, words=words)
    return Delivery(
        judged=judged,
        verdict=verdict,
        usable=labelled.take(usable),
        judge_usable=judge_usable,
        believed=believed,
    )


def stretches(ids: Sequence[str]) -> list[list[int]]:
    """Cut a delivery, in its order, into stretches of whole batches with STRETCH labels or more.

    Each is likely of one world: among the labels of several, renamed classes of one are not seen.
    """
    of_batch: dict[str, list[int]] = {}
    for row, name in enumerate(ids):
        of_batch.setdefault(name.split("/", 1)[0], []).append(row)
    found: list[list[int]] = []
    for rows in of_batch.values():
        if found and len(found[-1]) < STRETCH:
            found[-1] += rows
        else:
            found.append(list(rows))
    if len(found) > 1 and len(found[-1]) < STRETCH:
        found[-2:] = [found[-2] + found[-1]]
    return found


def suspicious_files(
    labelled: LabelledPictures,
    verdict: LabelVerdict,
    classes: Sequence[str],
    *,
    all_doubted: bool = False,
) -> dict[str, str]:
    """List suspicious labels, the most doubtful first, in a table and on a page with pictures.

    Args:
        labelled: the samples.
        verdict: on their labels.
        classes: names.
        all_doubted: list every label that is doubted at all: of many wrong ones, none may have a
            class that is surely more likely.

    Returns:
        File name to text; nothing where there is none to list.
    """
    rows = np.flatnonzero(verdict.doubt > 0 if all_doubted else verdict.suspicious)
    if not len(rows):
        return {}
    rows = rows[np.argsort(-verdict.doubt[rows], kind="stable")]
    ids = [labelled.sample_ids[i] for i in rows]
    given = [classes[int(labelled.labels[i])] for i in rows]
    likely = [classes[int(verdict.likely[i])] for i in rows]
    doubt = verdict.doubt[rows].round(3)
    table = pd.DataFrame({"sample_id": ids, "label": given, "likely": likely, "doubt": doubt})
    shown = []
    for row, *told in zip(rows[:MAX_SHOWN], ids, given, likely, doubt, strict=False):
        name, label, other, much = told
        said = f"labelled {label}" + (f", likelier {other}" if other != label else "")
        picture = thumbnail(labelled.pixels[int(row)])
        shown.append(Shown(name, (said, f"doubt {much:.2f}"), picture))
    words = (
        f"{verdict.words}. The most doubtful come first. To correct labels, put a file with"
        f" sample_id,label into the labels folder; {FILE} lists all of these."
    )
    heading = f"{len(rows)} labels that may be wrong"
    return {
        FILE: table.to_csv(index=False).encode(errors="backslashreplace").decode(),
        PAGE: gallery("Suspicious labels", heading, words, shown),
    }


def adapted_answers(champion: Network, pixels: Pixels) -> Callable[[], Rows] | None:
    """Give what computes probabilities (n, classes) by batch-norm statistics of these n pictures.

    None for a champion without such statistics of its own.
    """
    if not has_statistics(champion):
        return None

    def answers() -> Rows:
        some = np.random.default_rng(0).permutation(len(pixels))[:ADAPTED_BY]
        return see(reestimate(champion, pixels[torch.from_numpy(some)]), pixels)[1]

    return answers


def _batches(ids: Sequence[str], rows: Sequence[int]) -> str:
    names = list(dict.fromkeys(ids[row].split("/", 1)[0] for row in rows))
    return f"batch {names[0]}" if len(names) == 1 else f"batches {min(names)} to {max(names)}"


def see(network: Network, pixels: Pixels) -> tuple[Rows, ...]:
    """Give embeddings (n, d) and probabilities (n, classes) of n pictures."""
    passes = (network.embed(part) for part in pixels.split(CHUNK))
    return tuple(table.numpy() for table in collect(passes, len(pixels)))
