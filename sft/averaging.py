"""After training: interpolation with the champion, soups, and ensembles."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import torch
from torch import Tensor

from sft.dataset import LabelledPictures
from sft.evaluate import mean_loss
from sft.models import Ensemble, ModelError, Network, fill
from sft.ranges import at_least_one

GRID = (0.0, 0.25, 0.5, 0.75, 1.0)
"""It must hold 1.0: a blind .5 hurts networks with batch norm."""


class After(StrEnum):
    """What is made of a fine-tuning, or of several."""

    NOTHING = "nothing"
    INTERPOLATE = "interpolate"
    SOUP = "soup"
    GREEDY_SOUP = "greedy_soup"
    ENSEMBLE = "ensemble"


@dataclass(frozen=True)
class AfterSettings:
    """What follows a fine-tuning.

    Attributes:
        after: `nothing`; `interpolate`: mix the result with the champion, by the share that
            validates best; `soup`: the mean of the weights of several fine-tunings; `greedy_soup`:
            of those that make it no worse on validation samples; `ensemble`: all of them answer
            together, which costs as many passes.
        members: fine-tunings for a soup or an ensemble.
    """

    after: After = After.NOTHING
    members: int = 3

    def __post_init__(self) -> None:
        """Refuse values outside their range, by name."""
        if self.after not in list(After):
            raise ValueError(f"after must be one of {', '.join(After)}, got {self.after!r}")
        at_least_one(self, "members")
        if self.members == 1 and self.runs_several:
            raise ValueError(f"after = {str(self.after)!r} needs members of 2 or more, got 1")

    @property
    def runs_several(self) -> bool:
        """Whether more than one fine-tuning is made."""
        return self.after in {After.SOUP, After.GREEDY_SOUP, After.ENSEMBLE}

    @property
    def runs(self) -> int:
        """How many fine-tunings are made."""
        return self.members if self.runs_several else 1


@dataclass(frozen=True)
class Tried:
    """A share of the tuned weights, and its mean validation loss and accuracy over the sets."""

    alpha: float
    loss: float
    accuracy: float


@dataclass(frozen=True)
class Choice:
    """The interpolation that validated best, and all that were tried, by alpha."""

    network: Network
    alpha: float
    tried: tuple[Tried, ...]


@dataclass(frozen=True)
class Soup:
    """An average of networks: which of them are in it, and its score."""

    network: Network
    members: tuple[int, ...]
    score: float


def interpolate(champion: Network, tuned: Network, alpha: float) -> Network:
    """Return champion + alpha · (tuned - champion), for weights and batch-norm statistics.

    0 gives the champion's weights and 1 the tuned ones, to the bit (Wortsman et al. 2022, WiSE-FT).
    Rows of a widened head that the champion lacks come from `tuned`, and so do counters.

    Raises:
        ValueError: an alpha outside 0 to 1.
        ModelError: networks of different architectures, or classes that were reordered.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie between 0 and 1, got {alpha}")
    _check_related(champion, tuned)
    before = champion.state_dict()
    mixed = copy.deepcopy(tuned)
    state = {name: value.clone() for name, value in tuned.state_dict().items()}
    for name, value in state.items():
        old = before[name]
        if value.is_floating_point():
            place = value if value.shape == old.shape else value[: len(old)]
            place.copy_(_mix(old, place, alpha))
    fill(mixed, state)
    return mixed.eval()


def choose_alpha(
    champion: Network,
    tuned: Network,
    validation: Sequence[LabelledPictures],
    *,
    grid: Sequence[float] = GRID,
) -> Choice:
    """Interpolate by the alpha with the lowest validation loss.

    Args:
        champion: where the tuning started.
        tuned: where it ended.
        validation: sets whose mean losses are averaged, each with the same weight, as in early
            stopping: fresh and old. Without any sample, alpha is 1.
        grid: what to try; it must hold 1.

    Raises:
        ValueError: a grid without 1.0, or with values outside 0 to 1.

    Of equal losses the larger alpha wins: without evidence, what was trained stays as it is.
    """
    if 1.0 not in grid or not all(0 <= alpha <= 1 for alpha in grid):
        raise ValueError(f"the grid of alpha must hold 1.0 and lie within 0 to 1, got {list(grid)}")
    sets = [data for data in validation if len(data)]
    if not sets:
        return Choice(tuned, 1.0, ())
    tried = []
    for alpha in sorted(set(grid)):
        network = interpolate(champion, tuned, alpha)
        tried.append(Tried(alpha, *mean_loss(network, sets)))
    best = min(tried, key=lambda one: (_or_infinite(one.loss), -one.alpha))
    return Choice(interpolate(champion, tuned, best.alpha), best.alpha, tuple(tried))


def uniform_soup(networks: Sequence[Network]) -> Network:
    """Average the weights and statistics of networks that were tuned from one start.

    Raises:
        ModelError: no network, or networks that differ in architecture or classes.
    """
    if not networks:
        raise ModelError("a soup needs at least one network")
    first = networks[0]
    for other in networks[1:]:
        _check_same(first, other)
    states = [network.state_dict() for network in networks]
    mean = copy.deepcopy(first)
    means = {
        name: torch.stack([state[name] for state in states]).mean(0)
        for name, value in states[0].items()
        if value.is_floating_point()
    }
    fill(mean, means)
    return mean.eval()


def greedy_soup(networks: Sequence[Network], score: Callable[[Network], float]) -> Soup:
    """Add networks to the soup, best first, as long as it gets no worse (Wortsman et al. 2022).

    Args:
        networks: tuned from one start.
        score: more is better, on validation samples; called once a network and once a soup.
    """
    if not networks:
        raise ModelError("a soup needs at least one network")
    scores = [score(network) for network in networks]
    order = sorted(range(len(networks)), key=lambda i: (math.isnan(scores[i]), -scores[i]))
    members, best = [order[0]], scores[order[0]]
    soup = uniform_soup([networks[order[0]]])
    for place in order[1:]:
        candidate = uniform_soup([networks[i] for i in [*members, place]])
        reached = score(candidate)
        if reached >= best:
            members, best, soup = [*members, place], reached, candidate
    return Soup(soup, tuple(members), best)


def ensemble(networks: Sequence[Network]) -> Network:
    """Let networks of one architecture answer together; it costs as much as all of them.

    Raises:
        ModelError: fewer than two networks, or networks that differ in architecture or classes.
    """
    if len(networks) < 2:  # noqa: PLR2004 - one answers alone
        raise ModelError(f"an ensemble needs at least 2 networks, got {len(networks)}")
    for other in networks[1:]:
        _check_same(networks[0], other)
    bodies = [copy.deepcopy(body) for network in networks for body in network.bodies]
    return Network(replace(networks[0].config, members=len(bodies)), Ensemble(bodies)).eval()


def members_of(network: Network) -> tuple[Network, ...]:
    """Take an ensemble apart into networks that share its weights; any other network is alone."""
    if network.config.members == 1:
        return (network,)
    config = replace(network.config, members=1)
    return tuple(Network(config, body).train(network.training) for body in network.bodies)


def _mix(before: Tensor, after: Tensor, alpha: float) -> Tensor:
    """Interpolate so that both ends are exact."""
    if alpha in {0.0, 1.0}:
        return after if alpha else before
    return torch.lerp(before, after, alpha)


def _check_related(champion: Network, tuned: Network) -> None:
    """Refuse networks of which one did not come from the other."""
    old, new = champion.config, tuned.config
    if old.classes != new.classes[: len(old.classes)]:
        raise ModelError(
            f"the tuned network does not begin with the champion's classes {list(old.classes)}, but"
            f" has {list(new.classes)}"
        )
    _check_shapes(champion.state_dict(), tuned.state_dict(), rows_may_grow=True)


def _check_same(one: Network, other: Network) -> None:
    if one.config != other.config:
        raise ModelError(
            "networks of one soup or ensemble must agree in architecture, classes and"
            f" preprocessing: {one.config.architecture} {list(one.config.classes)} and"
            f" {other.config.architecture} {list(other.config.classes)}"
        )
    _check_shapes(one.state_dict(), other.state_dict(), rows_may_grow=False)


def _check_shapes(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], *, rows_may_grow: bool
) -> None:
    wrong = sorted(before.keys() ^ after.keys())
    wrong += [
        f"{name}: {tuple(before[name].shape)} and {tuple(after[name].shape)}"
        for name in sorted(before.keys() & after.keys())
        if before[name].shape != after[name].shape
        and not (rows_may_grow and before[name].shape[1:] == after[name].shape[1:])
    ]
    if wrong:
        raise ModelError(
            f"the networks do not have the same weights, so no average: {'; '.join(wrong[:3])}"
        )


def _or_infinite(loss: float) -> float:
    return math.inf if math.isnan(loss) else loss
