"""A challenger in the shadow: it answers the next batches beside the champion, and nobody is told.

`[gate] shadow_batches` says how many, before the gate decides. What came of it stands on the checks
of those batches, so a killed run goes on with the number that was reached.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flows.records import CHALLENGER, Version
from flows.registry import Registry
from monitoring.accuracy import Estimate, estimate_accuracy
from monitoring.features import FeatureTable
from monitoring.reference import Reference
from sft.models import ModelConfig, Network
from sft.tasks import rightly

SHADOW = "shadow"
"""What becomes of a challenger that has batches to answer before it is judged."""


@dataclass(frozen=True)
class Shadow:
    """A challenger that answers beside the champion."""

    version: Version
    network: Network
    reference: Reference


def shadow_of(registry: Registry) -> Version | None:
    """Return the challenger that is in the shadow: it was never judged."""
    asked = registry.settings.gate.shadow_batches > 0
    number = registry.alias(CHALLENGER) if asked else None
    if number is None:
        return None
    version = registry.version(number)
    return version if version.verdict is None else None


def batches_left(registry: Registry, version: Version) -> int:
    """Count the batches that a version has yet to answer beside the champion."""
    asked = registry.settings.gate.shadow_batches
    if not asked or version.verdict is not None:
        return 0
    by_it = f"metrics.`shadow.version` = {version.number}"
    return max(0, asked - len(registry.checks(registry.champion().number, by_it)))


def load_shadow(registry: Registry) -> Shadow | None:
    """Load the challenger that has batches to answer, if there is one."""
    version = shadow_of(registry)
    if version is None or not batches_left(registry, version):
        return None
    return Shadow(version, registry.network(version), registry.reference(version))


def out_of_shadow(registry: Registry) -> Version | None:
    """Return the challenger that has answered its batches, and can be judged."""
    version = shadow_of(registry)
    return None if version is None or batches_left(registry, version) else version


def compare_answers(
    shadow: Shadow, theirs: FeatureTable, champion: ModelConfig, own: FeatureTable, own_is: Estimate
) -> tuple[dict[str, float], str]:
    """Tell how far a challenger agrees with the champion, and what both are estimated at.

    Args:
        shadow: the challenger.
        theirs: n pictures as it sees them.
        champion: the champion's configuration.
        own: the same pictures as the champion sees them.
        own_is: the champion's estimate.

    Returns:
        Figures for the check, and a sentence for its report.
    """
    answers = champion.task.predicted(torch.as_tensor(own.probabilities))
    said = [text or "" for text in champion.task.texts(answers, champion.classes)]
    config = shadow.network.config
    agreement = float(rightly(config.task, theirs.probabilities, said, config.classes).mean())
    estimated = estimate_accuracy(shadow.reference, theirs).value
    number = shadow.version.number
    metrics = {
        "shadow.version": float(number),
        "shadow.agreement": agreement,
        "shadow.estimated": estimated,
    }
    return metrics, (
        f"in the shadow, version {number} agrees with the champion on {agreement:.0%} of the"
        f" pictures; accuracy is estimated at {estimated:.3f}, the champion's at {own_is.value:.3f}"
    )
