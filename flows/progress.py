"""Bars for what takes its time: how far it is, pictures per second, and the time left."""

from __future__ import annotations

import math
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from sft.train import Epoch


class _Rate(ProgressColumn):
    """Pictures per second since the beginning."""

    def render(self, task: Task) -> Text:
        if not task.elapsed or not task.fields["pictures"]:
            return Text("")
        return Text(f"{task.fields['pictures'] / task.elapsed:,.0f} pictures/s")


class _Bar:
    """One bar that goes when its work is done."""

    def __init__(
        self,
        words: str,
        total: int,
        *columns: ProgressColumn,
        console: Console | None,
        shown: bool = True,
    ) -> None:
        self._pictures = 0
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            *columns,
            _Rate(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not shown,
        )
        self._task = self._progress.add_task(words, total=total, pictures=0, words="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def _advance(self, by: int, pictures: int) -> None:
        self._pictures += pictures
        self._progress.update(self._task, advance=by, pictures=self._pictures)

    def _say(self, words: str) -> None:
        self._progress.update(self._task, words=words)


class TrainingBar(_Bar):
    """Shows a training: the epoch and its validation loss; rate and time left by fresh samples."""

    def __init__(
        self, words: str, samples: int, epochs: int, console: Console | None = None
    ) -> None:
        column = TextColumn("{task.fields[words]}", markup=False)
        super().__init__(words, samples * epochs, column, console=console)
        self._epochs = epochs
        self._say(f"epoch 1/{epochs}")

    def on_batch(self, samples: int) -> None:
        """Count the fresh samples of a step."""
        self._advance(samples, samples)

    def on_epoch(self, epoch: Epoch) -> None:
        """Show the epoch that begins, and how the last one validated."""
        words = f"epoch {min(epoch.number + 1, self._epochs)}/{self._epochs}"
        if not math.isnan(epoch.validation_loss):
            words += f", validation loss {epoch.validation_loss:.3f}"
        self._say(words)


class CheckBar(_Bar):
    """Shows checks: batches that are done, and pictures per second."""

    def __init__(self, batches: int, console: Console | None = None, *, shown: bool = True) -> None:
        column = MofNCompleteColumn()
        super().__init__("checking", batches, column, console=console, shown=shown)

    def on_check(self, pictures: int) -> None:
        """Count a batch."""
        self._advance(1, pictures)
