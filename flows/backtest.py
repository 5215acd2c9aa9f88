"""`sustain backtest`: what would each policy have brought? A table, a page, runs, and settings."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from math import isnan
from pathlib import Path
from time import monotonic
from typing import Any

from prefect import flow
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flows.grid import read_grid, write_toml
from flows.past import read_past
from flows.registry import Registry
from flows.replay import (
    FOLDER,
    MANY,
    ORACLE_TIMES,
    Backtest,
    BacktestError,
    count_points,
    expand,
    foresee,
    run,
    usual,
)
from flows.replay_page import HEAD, cells, columns, write_page
from flows.settings import Settings, load_settings
from flows.times import read_moment
from monitoring.replay import Replayed

LISTED = 40
"""Policies in the table of the terminal; the page has all."""
EVERY_SECONDS = 5.0
"""How often more policies than that are told of, at most."""


@dataclass(frozen=True)
class Asked:
    """What a person asks of `sustain backtest`; see its options."""

    policies: tuple[Path, ...] = ()
    since: str | None = None
    jobs: int = 1
    floor: float | None = None
    cost: float = 20.0
    page: Path | None = None
    emit: Path | None = None
    choose: str = ""
    suggest: bool = False
    trials: int = 30
    oracle_times: int = ORACLE_TIMES
    yes: bool = False


class Progress:
    """A line for each policy that is done, of many one every few seconds: a log shows them, too."""

    def __init__(self, console: Console, total: int) -> None:
        self._console, self._total, self._done = console, total, 0
        self._began = self._last = monotonic()

    def tell(self, one: Replayed) -> None:
        """Count a policy."""
        self._done, now = self._done + 1, monotonic()
        many = self._total > LISTED and self._done < self._total
        if many and now - self._last < EVERY_SECONDS:
            return
        self._last = now
        self._console.print(
            f"replayed {self._done} of {self._total} policies after {now - self._began:.0f} s:"
            f" {one.name}: accuracy {one.accuracy:.3f}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )


@flow(name="backtest")
def backtest(
    settings_path: str,
    policies: Sequence[str] = (),
    since: datetime | None = None,
    cost: float = 20.0,
    floor: float | None = None,
    times: int = ORACLE_TIMES,
) -> list[str]:
    """Replay policies and put them on record; return a sentence about each.

    Args:
        settings_path: the model's TOML file.
        policies: TOML files; none for the settings' own policy beside never and always.
        since: replay from then on, with the champion of then.
        cost: of a retraining, in wrong answers.
        floor: accuracy under which days are counted.
        times: moments at most at which the oracle trains by itself.
    """
    settings = load_settings(Path(settings_path))
    grids = [read_grid(Path(path)) for path in policies] or usual()
    found = run(
        settings, list(expand(settings, grids)), since=since, cost=cost, floor=floor, times=times
    )
    chosen = found.choose() if found.frontier else None
    record(Registry(settings), found, lay_page(settings, found, chosen), chosen)
    return [f"{one.name}: accuracy {one.accuracy:.3f}" for one in found.replays]


def tell(settings: Settings, asked: Asked, console: Console) -> Backtest | None:
    """Replay what is asked for and tell of it; None when only the cost of it was told.

    Raises:
        BacktestError: it cannot be done as asked.
    """
    since = None if asked.since is None else read_moment(asked.since)
    if asked.emit is not None and asked.emit.resolve().parent != settings.root:
        raise BacktestError(
            f"--emit {asked.emit}: relative paths in settings start at their folder, so write them"
            f" into {settings.root}"
        )
    grids = [read_grid(path) for path in asked.policies] or usual()
    registry = Registry(settings)
    if asked.suggest:
        from flows.suggest import suggest

        grids = [suggest(settings, asked.floor, asked.trials, since, console), *usual()]
    points = count_points(grids)
    if points > MANY and not asked.yes:
        console.print(foresee(registry, read_past(settings, since), points), markup=False)
        console.print("with --yes it is done", markup=False)
        return None
    candidates = list(expand(settings, grids))
    found = run(
        settings,
        candidates,
        since=since,
        cost=asked.cost,
        floor=asked.floor,
        jobs=asked.jobs,
        times=asked.oracle_times,
        on_replay=Progress(console, len(candidates)).tell,
    )
    chosen = found.choose(asked.choose) if asked.choose or found.frontier else None
    console.print(table(found, chosen))
    for note in found.notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    page = lay_page(settings, found, chosen, asked.page)
    record(registry, found, page, chosen)
    console.print(f"the page: {page}; MLflow: the experiment sustain/{registry.name}/backtest")
    if asked.emit is not None:
        emit(settings, found, found.choose(asked.choose), asked.emit)
        console.print(f"wrote {asked.emit}: {found.choose(asked.choose).said}", markup=False)
    return found


def lay_page(
    settings: Settings, found: Backtest, chosen: Replayed | None, page: Path | None = None
) -> Path:
    """Write the page, by default beside the steps of the replay; return where it is."""
    page = page or settings.root / FOLDER / "backtest.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(write_page(found, settings.model.name, chosen), encoding="utf-8")
    return page


def table(found: Backtest, chosen: Replayed | None) -> Table:
    """Lay the policies out; the chosen one stands out."""
    head, rows = columns(found)
    told = Table(title="what each policy would have brought", title_justify="left")
    for column in head:
        told.add_column(column, justify="left" if column == "policy" else "right")
    for one, row in list(zip(found.replays, rows, strict=True))[:LISTED]:
        told.add_row(*map(Text, row), style="bold green" if one is chosen else "")
    if found.ideal is not None:
        known = {
            "policy": "oracle",
            "mean accuracy": f"{found.ideal.accuracy:.3f}",
            "retrainings": str(found.ideal.found.retrainings),
            "regret": "0",
        }
        told.add_row(*(known.get(column, "") for column in head), style="dim")
    return told


def record(registry: Registry, found: Backtest, page: Path, chosen: Replayed | None) -> None:
    """Put a replay on record: a run with the page, and below it one a policy."""
    first, last = found.replays[0].served[0], found.replays[0].served[-1]
    name = f"replay of {first.at:%Y-%m-%d} to {last.at:%Y-%m-%d}"
    parent = registry.log_replay(name, {"policies": float(len(found.replays))}, (), {}, page)
    for one in found.replays:
        regret = found.regret(one)
        metrics = {
            "accuracy": one.accuracy,
            "retrainings": float(len(one.retrainings)),
            "rollbacks": float(len(one.rollbacks)),
            "labels_used": float(one.labels_used),
            "suppressed": float(one.suppressed),
            "cost.cpu_seconds": one.cpu_seconds,
            "cost.gpu_seconds": one.gpu_seconds,
        }
        metrics |= {} if one.energy_wh is None else {"cost.energy_wh": one.energy_wh}
        metrics |= {} if regret is None else {"regret": regret}
        metrics |= {} if found.floor is None else {"days_below": one.days_below(found.floor)}
        tags = {
            "mlflow.parentRunId": parent,
            "sustain.said": one.said,
            "sustain.chosen": str(one is chosen).lower(),
            "mlflow.note.content": "\n\n".join(
                [one.said, *(f"{m.at:%Y-%m-%d %H:%M}: {m.reason}" for m in one.retrainings)]
            )[:4000],
            **{
                f"sustain.set.{section}.{key}": str(value)
                for section, values in one.overrides.items()
                for key, value in values.items()
            },
        }
        curve = [served.accuracy for served in one.served]
        registry.log_replay(one.name, metrics, curve, tags)


def emit(settings: Settings, found: Backtest, chosen: Replayed, path: Path) -> None:
    """Write the settings of a policy, ready to deploy, with the evidence as comments."""
    raw: dict[str, dict[str, Any]] = tomllib.loads(settings.path.read_text(encoding="utf-8"))
    for section, values in chosen.overrides.items():
        raw[section] = {**raw.get(section, {}), **values}
    path.write_text(write_toml(raw, evidence(found, chosen, settings.path.name)), encoding="utf-8")


def evidence(found: Backtest, chosen: Replayed, file: str) -> str:
    """Say what speaks for a policy."""
    first, last = chosen.served[0], chosen.served[-1]
    lines = [
        (
            f"{file} with the policy “{chosen.name}”, written by `sustain backtest`"
            f" on {datetime.now(UTC):%Y-%m-%d %H:%M} UTC."
        ),
        f"{chosen.said}",
        "",
        (
            f"Replayed on {len(chosen.served)} batches, {first.at:%Y-%m-%d %H:%M} to"
            f" {last.at:%Y-%m-%d %H:%M} UTC, it would have brought:"
        ),
        *(f"  {figure}: {value}" for figure, value in _figures(found, chosen).items()),
        "",
        "beside:",
    ]
    for one in (other for other in found.replays[:LISTED] if other is not chosen):
        told = ", ".join(f"{figure} {value}" for figure, value in _figures(found, one).items())
        lines.append(f"  {one.name}: {told}")
    if found.ideal is not None:
        ideal = found.ideal
        lines.append(
            f"  the oracle, which knows the future: mean accuracy {ideal.accuracy:.3f},"
            f" {ideal.found.retrainings} retrainings"
        )
    lines += ["", "Its retrainings:"] if chosen.retrainings else []
    lines += [
        f"  {made.at:%Y-%m-%d %H:%M} at {made.batch_id}:"
        f" {'promoted' if made.promoted else 'not promoted'}. {made.reason}"
        for made in chosen.retrainings
    ]
    return "\n".join(line.replace("\n", " ") for line in lines)


def _figures(found: Backtest, one: Replayed) -> Mapping[str, str]:
    return {
        column: cell
        for column, cell in zip(HEAD[1:], cells(found, one)[1:], strict=True)
        if cell and not (column == "mean accuracy" and isnan(one.accuracy))
    }
