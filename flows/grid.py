"""Policies to replay: TOML files that change some settings, in which a list stands for a grid."""

from __future__ import annotations

import itertools
import json
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from math import prod
from pathlib import Path
from typing import Any, get_origin, get_type_hints

from flows.preflight import SettingsError
from flows.settings import (
    SECTIONS,
    LogSettings,
    NotifySettings,
    Settings,
    changed,
)

DECIDING = (
    "policy",
    "stream",
    "detection",
    "checks",
    "gate",
    "training",
    "search",
    "noise",
    "memory",
)
"""Sections that a policy may change; the others say where things are."""
TOGETHER = ("all", "any", "of")
"""Keys of a trigger whose list is of triggers that hold together, not of alternatives."""
Overrides = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Candidate:
    """A policy to replay: its name, what it changes, and the settings with that."""

    name: str
    overrides: Overrides
    settings: Settings


@dataclass(frozen=True)
class Grid:
    """What one TOML file asks for: for each setting the values to try."""

    name: str
    axes: Mapping[tuple[str, str], tuple[Any, ...]]

    @property
    def points(self) -> int:
        """How many policies these are."""
        return prod(map(len, self.axes.values()))

    def candidates(self, settings: Settings) -> Iterator[Candidate]:
        """Make every policy of the grid; raises SettingsError for a value out of its range."""
        several = [axis for axis, values in self.axes.items() if len(values) > 1]
        for values in itertools.product(*self.axes.values()):
            chosen = dict(zip(self.axes, values, strict=True))
            overrides: Overrides = {}
            for (section, key), value in chosen.items():
                overrides.setdefault(section, {})[key] = value
            told = ", ".join(f"{axis[1]}={_short(chosen[axis])}" for axis in several)
            name = f"{self.name}: {told}" if told else self.name
            yield Candidate(name, overrides, changed(settings, overrides, self.name))


def read_grid(path: Path) -> Grid:
    """Read a policy, or a grid of them, from a TOML file.

    Raises:
        SettingsError: the file cannot be read, or changes what no policy may.
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SettingsError(f"the policy {path} cannot be read as TOML: {error}") from error
    return grid_of(path.stem, raw)


def grid_of(name: str, raw: Mapping[str, Any]) -> Grid:
    """Take apart what a policy's TOML says; sections that say where things are, are passed over."""
    axes: dict[tuple[str, str], tuple[Any, ...]] = {}
    for section, values in raw.items():
        if section not in SECTIONS:
            allowed = ", ".join(DECIDING)
            raise SettingsError(f"the policy {name} has a section [{section}]; allowed: {allowed}")
        if section not in DECIDING:
            continue
        if not isinstance(values, dict):
            raise SettingsError(f"the policy {name}: write [{section}] on a line of its own")
        for key, value in values.items():
            axes[section, key] = tuple(_alternatives(section, key, value))
    return Grid(name, axes)


def prepared(settings: Settings) -> Settings:
    """Leave out what a replay does not do: it tells nobody, asks nobody, adapts to no alarm."""
    return replace(
        settings,
        notify=NotifySettings(),
        logs=LogSettings(),
        adaptation=replace(settings.adaptation, enabled=False),
        gate=replace(settings.gate, approval="auto"),
    )


def write_toml(raw: Mapping[str, Mapping[str, Any]], comments: str) -> str:
    """Write settings as TOML, comments on top."""
    lines = [f"# {line}".rstrip() for line in comments.splitlines()]
    for section, values in raw.items():
        lines += ["", f"[{section}]", *(f"{key} = {_toml(value)}" for key, value in values.items())]
    return "\n".join([*lines, ""])


def _alternatives(section: str, key: str, value: Any) -> list[Any]:
    """List the values that a setting is to take."""
    if key == "retrain_when":
        return _triggers(value)
    if not isinstance(value, list):
        return [value]
    known = {f.name for f in fields(SECTIONS[section])}
    kind = get_type_hints(SECTIONS[section]).get(key) if key in known else None
    if get_origin(kind) is tuple and not (value and isinstance(value[0], list)):
        return [value]  # a setting that is a list itself
    return list(value)


def _triggers(value: Any) -> list[Any]:
    """List the triggers that a value stands for: alternatives anywhere make a grid."""
    if isinstance(value, list):
        return [one for each in value for one in _triggers(each)]
    if not isinstance(value, dict):
        return [value]
    ways = []
    for key, inner in value.items():
        if key in TOGETHER and isinstance(inner, list):
            ways.append([list(each) for each in itertools.product(*map(_triggers, inner))])
        else:
            ways.append(_triggers(inner))
    return [dict(zip(value, chosen, strict=True)) for chosen in itertools.product(*ways)]


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{key} {_short(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return f"({', '.join(map(_short, value))})"
    return str(value)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(inner)}" for key, inner in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
