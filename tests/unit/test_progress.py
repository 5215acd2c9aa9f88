"""Bars tell how far a training or a check is, how fast it goes, and how long it takes."""

import io
import math

from rich.console import Console

from flows.progress import CheckBar, TrainingBar
from sft.train import Epoch


def console() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=140)


def shown(bar: TrainingBar | CheckBar, on: Console) -> str:
    with on.capture() as captured:
        on.print(bar._progress.get_renderable())
    return captured.get()


def test_a_training_shows_epoch_rate_and_validation_loss() -> None:
    """The epoch that runs, the loss of the last one, and pictures per second."""
    on = console()
    with TrainingBar("fine-[tuning]", samples=100, epochs=3, console=on) as bar:
        assert "epoch 1/3" in shown(bar, on)
        assert "pictures/s" not in shown(bar, on)
        bar.on_batch(60)
        bar.on_batch(40)
        bar.on_epoch(Epoch(1, 1.0, 0.5, 0.9))
        text = shown(bar, on)
        assert "fine-[tuning]" in text
        assert "epoch 2/3, validation loss 0.500" in text
        assert "pictures/s" in text
        bar.on_batch(200)
        bar.on_epoch(Epoch(3, 1.0, math.nan, math.nan))
        assert "epoch 3/3 " in shown(bar, on)
        (task,) = bar._progress.tasks
        assert task.finished


def test_checks_show_batches_and_rate() -> None:
    """Batches of all, and pictures per second; one that could not be read counts as done."""
    on = console()
    with CheckBar(2, console=on) as bar:
        bar.on_check(0)
        assert "pictures/s" not in shown(bar, on)
        bar.on_check(100)
        text = shown(bar, on)
        assert "2/2" in text
        assert "pictures/s" in text
