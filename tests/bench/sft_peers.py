"""Avalanche beside ours, in an environment of its own: the same data, network, steps and batch.

Avalanche brings some 60 packages that this project has no use for, so `.peers-sft-venv` beside this
file is made when it is missing: `avalanche-lib`, and `safetensors` to hand networks over. This file
is both sides: here `ask`, there a script. The champion and its memory go there, the networks after
each stage come back, and are scored here like all others.

The champion's memory is Avalanche's first experience, which is trained for no epoch: its plugins
then keep what they keep of a past experience (a buffer, importances, the old network).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sft.models import Network, load, save

if TYPE_CHECKING:
    from sft_methods import Outcome
    from sft_worlds import World

ENVIRONMENT = Path(__file__).parent / ".peers-sft-venv"
PACKAGES = ("avalanche-lib==0.6.0", "safetensors>=0.4.5")
STRATEGIES = ("Naive", "Replay", "EWC", "LwF")
MEMORY = 500
LEARNING_RATE = 1e-3
"""Of a small network; a pretrained one is destroyed by it."""


# --- this side


def make(python: str = sys.executable) -> str | None:
    """Make the environment if it is missing or of other packages; give why it could not be made."""
    mark = ENVIRONMENT / ".installed"
    wanted = "\n".join(PACKAGES)
    if mark.exists() and mark.read_text() == wanted:
        return None
    there = str(ENVIRONMENT / "bin" / "python")
    for command in (
        [python, "-m", "venv", "--clear", str(ENVIRONMENT)],
        [there, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *PACKAGES],
        [there, "-c", "import avalanche.training.supervised"],
    ):
        try:
            run = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            return f"{command[0]}: {error}"
        if run.returncode:
            return " ".join([*run.stderr.strip().splitlines(), f"exit {run.returncode}"][-2:])
    mark.write_text(wanted)
    return None


def ask(
    world: World,
    strategies: Sequence[str],
    steps: Sequence[int],
    batch: int,
    seed: int,
    learning_rate: float = LEARNING_RATE,
) -> dict[str, Outcome]:
    """Let Avalanche follow a world, with so many steps a stage.

    Raises:
        RuntimeError: with the last lines of its errors, if it fails.
    """
    from sft_methods import Outcome, after_stage, before
    from sft_networks import FACTORIES

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save(world.champion, folder / "champion")
        sets = [world.memory, *(one.fresh for one in world.arrivals)]
        arrays = {f"pixels{i}": one.pixels.numpy() for i, one in enumerate(sets)}
        arrays |= {f"labels{i}": one.labels.numpy() for i, one in enumerate(sets)}
        np.savez(folder / "given.npz", **arrays)
        asked = {
            "strategies": list(strategies),
            "steps": list(steps),
            "batch": batch,
            "seed": seed,
            "learning_rate": learning_rate,
        }
        (folder / "asked.json").write_text(json.dumps(asked))
        run = subprocess.run(
            [str(ENVIRONMENT / "bin" / "python"), str(Path(__file__)), str(folder)],
            capture_output=True,
            text=True,
            check=False,
            env={
                **os.environ,
                "PYTHONPATH": str(Path(__file__).parents[2]),
                "CUDA_VISIBLE_DEVICES": "",
            },
        )
        if run.returncode:
            raise RuntimeError(f"{ENVIRONMENT.name}: {run.stderr[-2000:]}")
        seconds = json.loads((folder / "seconds.json").read_text())
        found = {}
        for strategy in strategies:
            stages = [
                load(folder / f"{strategy}-{i}", allowed_factories=FACTORIES)
                for i in range(len(world.arrivals))
            ]
            found[strategy] = Outcome(
                tuple(world.tests),
                before(world),
                tuple(after_stage(network, world, place) for place, network in enumerate(stages)),
                tuple(seconds[strategy]),
                tuple(steps),
            )
        return found


# --- the other side


def _answer(folder: Path) -> None:
    asked = json.loads((folder / "asked.json").read_text())
    with np.load(folder / "given.npz") as stored:
        arrays = dict(stored)
    sets = [
        (torch.from_numpy(arrays[f"pixels{i}"]), torch.from_numpy(arrays[f"labels{i}"]))
        for i in range(len(arrays) // 2)
    ]
    seconds = {strategy: _follow(folder, strategy, sets, asked) for strategy in asked["strategies"]}
    (folder / "seconds.json").write_text(json.dumps(seconds))


def _follow(folder: Path, strategy: str, sets: list[Any], asked: dict[str, Any]) -> list[float]:
    """Train on one experience after another; leave the networks in the folder."""
    from avalanche.benchmarks import benchmark_from_datasets
    from avalanche.benchmarks.utils.classification_dataset import (
        _make_taskaware_classification_dataset as with_task,  # LwF asks for tasks; there is one
    )
    from avalanche.training.plugins import EvaluationPlugin
    from sft_networks import FACTORIES
    from torch.utils.data import TensorDataset

    torch.manual_seed(asked["seed"])
    network = load(folder / "champion", allowed_factories=FACTORIES)
    data = []
    for pixels, labels in sets:
        plain: Any = TensorDataset(pixels, labels)
        plain.targets = labels.tolist()
        data.append(with_task(plain, task_labels=[0] * len(labels)))
    learner = _strategy(strategy, network, asked, EvaluationPlugin())
    seconds = []
    for place, experience in enumerate(benchmark_from_datasets(train=data).train_stream):
        began = time.process_time()
        learner.train_epochs = 10_000 if place else 0
        learner.most_steps = asked["steps"][place - 1] if place else 0
        learner.train(experience)
        if place:
            seconds.append(time.process_time() - began)
            save(network, folder / f"{strategy}-{place - 1}")
    return seconds


def _strategy(name: str, network: Network, asked: dict[str, Any], evaluator: Any) -> Any:
    """Make a strategy as its documentation shows it, that stops after `most_steps` of a stage."""
    from avalanche.core import SupervisedPlugin
    from avalanche.training import supervised
    from avalanche.training.plugins import ReplayPlugin

    class Steps(SupervisedPlugin):
        """Stops when the stage has had its steps."""

        done = 0

        def before_training_exp(self, strategy: Any, **_: Any) -> None:
            del strategy
            self.done = 0

        def after_training_iteration(self, strategy: Any, **_: Any) -> None:
            self.done += 1
            if self.done >= strategy.most_steps:
                strategy.stop_training()

    plugins: list[Any] = [Steps()]
    batch = asked["batch"]
    given: dict[str, Any] = {
        "model": network,
        "optimizer": torch.optim.Adam(network.parameters(), lr=asked["learning_rate"]),
        "criterion": torch.nn.CrossEntropyLoss(),
        "train_mb_size": batch,
        "evaluator": evaluator,
    }
    if name == "EWC":
        return supervised.EWC(ewc_lambda=1.0, plugins=plugins, **given)
    if name == "LwF":
        return supervised.LwF(alpha=1.0, temperature=2.0, plugins=plugins, **given)
    if name == "Replay":
        half = batch // 2
        given["train_mb_size"] = batch - half
        plugins.append(ReplayPlugin(mem_size=MEMORY, batch_size_mem=half))
    return supervised.Naive(plugins=plugins, **given)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    _answer(Path(sys.argv[1]))
