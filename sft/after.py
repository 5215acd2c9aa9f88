"""A fine-tuning and what follows it: interpolation with the champion, a soup, an ensemble."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from sft.averaging import (
    After,
    choose_alpha,
    ensemble,
    greedy_soup,
    members_of,
    uniform_soup,
)
from sft.cache import ActivationCache
from sft.dataset import LabelledPictures
from sft.distributed import ALONE, Team
from sft.evaluate import mean_loss
from sft.models import Network
from sft.speed import ComputeSettings
from sft.train import (
    LEAST_VALIDATION,
    Epoch,
    FineTuned,
    TrainingSettings,
    fine_tune,
)

MEMBER_RATES = (1.0, 0.5)
"""Of the learning rate, for the members in turn. None is larger than the one that was set, so that
no member blows up that a single fine-tuning would not."""


def tune(
    start: Network,
    fresh: LabelledPictures,
    settings: TrainingSettings,
    *,
    memory: LabelledPictures | None = None,
    anchor: Network | None = None,
    validation: tuple[LabelledPictures, ...] = (),
    cache: ActivationCache | None = None,
    on_epoch: Callable[[Epoch], None] | None = None,
    on_batch: Callable[[int], None] | None = None,
    compute: ComputeSettings | None = None,
    team: Team = ALONE,
) -> FineTuned:
    """Fine-tune as often as `settings.after` wants, and make one network of the results.

    Members differ by their seed and, in turn, by `MEMBER_RATES`; the first is what a single
    fine-tuning gives. What serves follows from `after` alone, whatever the champion is: of an
    ensemble, every member is tuned in turn for a new ensemble, and the first one for all else,
    since an average needs one start.

    All arguments are those of `fine_tune`, but `start` and `anchor` may be ensembles. The epochs
    are those of all fine-tunings behind one another. Without enough validation samples nothing can
    be chosen: an interpolation keeps what was trained, and a greedy soup is its first member.

    Raises `TrainingError` as `fine_tune` does.
    """
    starts, anchors = members_of(start), members_of(start if anchor is None else anchor)
    several = settings.after == After.ENSEMBLE
    runs = []
    for number in range(settings.runs):
        place = number % len(starts) if several else 0
        runs.append(
            fine_tune(
                starts[place],
                fresh,
                _of_member(settings, number),
                memory=memory,
                anchor=anchors[place],
                validation=validation,
                cache=cache,
                on_epoch=on_epoch,
                on_batch=on_batch,
                compute=compute,
                team=team,
            )
        )
    if any(len(data) < LEAST_VALIDATION for data in validation):
        validation = ()
    if settings.after == After.INTERPOLATE:
        choice = choose_alpha(anchors[0], runs[0].network, validation)
        return replace(runs[0], network=choice.network, alpha=choice.alpha)
    return _together(runs, settings, validation) if settings.runs_several else runs[0]


def _of_member(settings: TrainingSettings, number: int) -> TrainingSettings:
    rate = settings.learning_rate * MEMBER_RATES[number % len(MEMBER_RATES)]
    return replace(settings, seed=settings.seed + number, learning_rate=rate)


def _together(
    runs: Sequence[FineTuned],
    settings: TrainingSettings,
    validation: Sequence[LabelledPictures],
) -> FineTuned:
    """Make a soup or an ensemble; tell the history of all runs as one."""
    networks = [run.network for run in runs]
    kept = tuple(range(len(runs)))
    if settings.after == After.ENSEMBLE:
        made = ensemble(networks)
    elif settings.after == After.SOUP:
        made = uniform_soup(networks)
    else:
        soup = greedy_soup(networks, lambda network: -mean_loss(network, validation)[0])
        made, kept = soup.network, soup.members
    scores = [mean_loss(network, validation) for network in networks]
    first = min(kept, key=lambda place: (scores[place][0], place))
    before = [sum(len(run.epochs) for run in runs[:place]) for place in range(len(runs))]
    told = [
        f"{place + 1}: validation {_words(scores[place])}{'' if place in kept else ', left out'}"
        for place in range(len(runs))
    ]
    epochs = [
        replace(epoch, number=at + epoch.number)
        for at, run in zip(before, runs, strict=True)
        for epoch in run.epochs
    ]
    return FineTuned(
        network=made,
        epochs=tuple(epochs),
        best_epoch=before[first] + runs[first].best_epoch,
        stopped=runs[first].stopped,
        notes=tuple(dict.fromkeys(note for run in runs for note in run.notes)),
        members=(*told, f"together: validation {_words(mean_loss(made, validation))}"),
    )


def _words(score: tuple[float, float]) -> str:
    return f"loss {score[0]:.4g}, accuracy {score[1]:.3f}"
