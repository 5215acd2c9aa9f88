"""Refuses settings that are out of their range, by name."""

from __future__ import annotations

import math
from collections.abc import Callable


def at_least_one(settings: object, *names: str) -> None:
    """Refuse values below 1."""
    _require(settings, names, lambda value: value >= 1, "must be at least 1")


def positive(settings: object, *names: str) -> None:
    """Refuse zero, and values below it."""
    _require(settings, names, lambda value: value > 0, "must be positive")


def not_negative(settings: object, *names: str) -> None:
    """Refuse values below zero."""
    _require(settings, names, lambda value: value >= 0, "must not be negative")


def below_one(settings: object, *names: str) -> None:
    """Refuse values below zero, and from 1 on."""
    _require(settings, names, lambda value: 0 <= value < 1, "must be at least 0 and below 1")


def _require(
    settings: object, names: tuple[str, ...], allowed: Callable[[float], bool], words: str
) -> None:
    for name in names:
        value = getattr(settings, name)
        if not allowed(value) or value == math.inf:  # NaN is in no range
            raise ValueError(f"{name} {words}{', nor infinite' * (value == math.inf)}, got {value}")
