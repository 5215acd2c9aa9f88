"""`sustain backtest --suggest`: search thresholds on the past, validate on what came after it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime
from importlib.util import find_spec
from math import isnan
from typing import TYPE_CHECKING, Any

from rich.console import Console

from flows.grid import Grid, Overrides, grid_of
from flows.past import Past
from flows.replay import BacktestError, expand, prepare, replay
from flows.settings import Settings
from flows.simulated import Shelf, Start
from monitoring.replay import Replayed

if TYPE_CHECKING:
    import optuna

SEARCHED = 2 / 3
"""Share of the batches, the oldest, that the search may look at."""
LEAST = 6
"""Batches without which there is nothing to search on and to validate with."""
KINDS = ("drift and damage", "drift", "accuracy_below", "batches_since_training", "fresh_labels")
NAME = "suggested"


@dataclass(frozen=True)
class Suggestion:
    """What a search found, and how it did on what the search never saw.

    Attributes:
        overrides: the settings of the policy.
        searched: on the earlier part.
        later: on the later part alone, after living through the earlier one.
    """

    overrides: Overrides
    searched: Replayed
    later: Replayed

    def words(self, floor: float) -> str:
        """Say it in a few sentences."""
        held = "and so it held" if self.later.accuracy >= floor else "so it did NOT hold"
        return (
            f"{self.searched.said} On the first {len(self.searched.served)} batches:"
            f" accuracy {self.searched.accuracy:.3f}, {len(self.searched.retrainings)} retrainings."
            f" On the {len(self.later.served)} later ones, which the search never saw: accuracy"
            f" {self.later.accuracy:.3f} (at least {floor:g} is asked for, {held}),"
            f" {len(self.later.retrainings)} retrainings."
        )


def suggest(
    settings: Settings,
    floor: float | None,
    trials: int,
    since: datetime | None,
    console: Console,
) -> Grid:
    """Tell what a search found, and return it as a policy to replay beside others.

    Raises:
        BacktestError: optuna is not installed, no accuracy is asked for, the history is too short
            or has no labels, or nothing stays above the floor.
    """
    if floor is None:
        raise BacktestError(
            "--suggest needs --floor: the accuracy that the policy is to stay above"
        )
    past, start, shelf = prepare(settings, since)
    found = search(past, start, shelf, floor, trials)
    console.print(found.words(floor), markup=False, soft_wrap=True)
    return grid_of(NAME, found.overrides)


def search(past: Past, start: Start, shelf: Shelf, floor: float, trials: int) -> Suggestion:
    """Search for the policy with the least cost whose mean accuracy is at least `floor`.

    The cost is CPU seconds, as if the policy ran alone. What a policy would do is known exactly, so
    a try costs only the versions that no earlier try made.
    """
    if find_spec("optuna") is None:
        raise BacktestError("--suggest searches with optuna: pip install 'sustain[backtest]'")
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    settings = past.settings
    if len(past.batches) < LEAST:
        raise BacktestError(
            f"{len(past.batches)} batches are too few to search on some and validate with others:"
            f" at least {LEAST} are needed"
        )
    cut = round(len(past.batches) * SEARCHED)
    earlier = past.first(cut)
    tried: dict[int, tuple[Overrides, Replayed]] = {}

    def cost(trial: optuna.Trial) -> float:
        overrides = draw(trial)
        [candidate] = expand(settings, [grid_of(NAME, overrides)])
        found, _ = replay(earlier, start, shelf, candidate)
        if isnan(found.accuracy):
            raise BacktestError("without labels in its earlier part a history tells no accuracy")
        tried[trial.number] = overrides, found
        # under the floor, accuracy comes first, however cheap
        short = max(0.0, floor - found.accuracy)
        return found.cpu_seconds + (1e6 * (1 + short) if short else 0.0)

    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0))
    study.enqueue_trial({"kind": KINDS[0], "min_drop": settings.policy.min_drop})
    study.optimize(cost, n_trials=trials)
    overrides, searched = tried[study.best_trial.number]
    if searched.accuracy < floor:
        best = max(one.accuracy for _, one in tried.values())
        raise BacktestError(
            f"none of {trials} policies stays above {floor:g}: the best reaches {best:.3f}; lower"
            " --floor, or raise --trials"
        )
    [candidate] = expand(settings, [grid_of(NAME, overrides)])
    whole, _ = replay(past, start, shelf, candidate)
    begins = whole.served[cut].at
    later = replace(
        whole,
        served=whole.served[cut:],
        retrainings=tuple(made for made in whole.retrainings if made.at >= begins),
    )
    return Suggestion(overrides, searched, later)


def draw(trial: optuna.Trial) -> Overrides:
    """Draw a policy: what it looks at, and from where on."""
    kind = trial.suggest_categorical("kind", KINDS)
    when: Any = kind
    policy: dict[str, Any] = {}
    if kind == "drift and damage":
        when = {"all": ["drift", {"any": ["estimated_damage", "true_damage"]}]}
        policy["min_drop"] = round(trial.suggest_float("min_drop", 0.01, 0.3, log=True), 3)
    elif kind == "accuracy_below":
        when = {kind: round(trial.suggest_float(kind, 0.5, 0.99), 3)}
    elif kind == "batches_since_training":
        when = {kind: trial.suggest_int(kind, 1, 30, log=True)}
    elif kind == "fresh_labels":
        when = {kind: trial.suggest_int(kind, 50, 5000, log=True)}
    overrides: Overrides = {"policy": {"retrain_when": when, **policy}}
    if "drift" in kind:
        overrides["stream"] = {"run_length": trial.suggest_int("run_length", 100, 10_000, log=True)}
    return overrides
