"""A challenger without labels: the champion with batch-norm statistics of the new world."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from torch import Tensor

from sft.averaging import ensemble, members_of
from sft.batchnorm import BatchNormError, add_domain, open_bank, reestimate, route
from sft.models import Network
from sft.ranges import at_least_one

LEAST_HOME = 0.75
"""Of new pictures that its statistics were not taken from, a bank must know so many as the new
world's: with less, there is little to win. CIFAR-10, 70 or 256 pictures, 8 draws of each: taken for
a world of their own were 2 of 48 without anything to win (no change, a mix of fewer classes, turned
by 90°, upside down), 2 of 8 inverted, and 71 of 72 of the changes on which the bank won 5 points
and more. Other digits of the same scanner: none."""
LEAST_PICTURES = 10
"""From 10 pictures of a drifted sensor a champion of 18 % came to 51 %."""


class Method(StrEnum):
    """What becomes of the old statistics."""

    BANK = "bank"
    REESTIMATE = "reestimate"


@dataclass(frozen=True)
class AdaptationSettings:
    """Whether drift makes a challenger without labels, and how.

    `sft.batchnorm` tells where it helps and where not: for changes of a sensor, not for turned
    pictures or another mix of classes. It stays off by default, since it is tried on small networks
    only, and what it makes looks at the hold-out that later challengers need.

    Attributes:
        enabled: the first drift that asks for labels makes one, once for each champion.
        method: `bank`: the old statistics stay, and each picture is answered by the set that it is
            nearest to; `reestimate`: the new ones take their place, which a gate that guards the
            old world refuses where they differ much.
        share: of the new statistics; the rest is the old ones'.
        max_pictures: of the batches that rang; 256 are one pass.
    """

    enabled: bool = False
    method: Method = Method.BANK
    share: float = 1.0
    max_pictures: int = 256

    def __post_init__(self) -> None:
        """Refuse values outside their range, by name."""
        if self.method not in list(Method):
            raise ValueError(f"method must be one of {', '.join(Method)}, got {self.method!r}")
        if not 0 < self.share <= 1:
            raise ValueError(f"share must be above 0 and at most 1, got {self.share}")
        at_least_one(self, "max_pictures")


def adapt(champion: Network, known: Tensor, new: Tensor, settings: AdaptationSettings) -> Network:
    """Give a champion the statistics of new pictures; an ensemble, member by member.

    Args:
        champion: stays as it is.
        known: uint8 (n, C, H, W) of the worlds that it knows, for a bank to be opened with.
        new: uint8 (m, C, H, W) of the new world.
        settings: how.

    Raises:
        BatchNormError: too few pictures, a champion without batch norm, a bank that shall be
            re-estimated, or pictures that a bank cannot tell from those that it knows.
    """
    if len(new) < LEAST_PICTURES:
        raise BatchNormError(
            f"{len(new)} pictures, and at least {LEAST_PICTURES} are needed to adapt to"
        )
    adapted = [_adapted(member, known, new, settings) for member in members_of(champion)]
    return ensemble(adapted) if len(adapted) > 1 else adapted[0]


def _adapted(
    champion: Network, known: Tensor, new: Tensor, settings: AdaptationSettings
) -> Network:
    has_bank = champion.config.domains > 1
    if settings.method == Method.REESTIMATE:
        if has_bank:
            raise BatchNormError(
                f"the champion keeps a bank of {champion.config.domains} domains: set method ="
                " 'bank' to add one"
            )
        return reestimate(champion, new, share=settings.share)
    bank = champion if has_bank else open_bank(champion, known)
    domain = champion.config.domains  # counted from 0, it is the new one
    half = add_domain(bank, new[::2])
    home = (route(half, new[1::2]) == domain).float().mean().item()
    if home < LEAST_HOME:
        raise BatchNormError(
            f"the bank takes only {home:.0%} of the new pictures for a world of their own: no"
            " statistics of theirs would help"
        )
    grown = add_domain(bank, new, share=settings.share)
    grown.config = replace(champion.config, domains=domain + 1)
    return grown
