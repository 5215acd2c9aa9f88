"""The charts beside a verdict are pictures, whatever the classes are called."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flows.charts import draw_confusions, draw_still_wrong, draw_training
from sft.evaluate import Answers
from sft.gate import Pair
from sft.models import ModelConfig, build
from sft.pictures import Preprocessing
from sft.tasks import MultiLabel, Regression, Task
from sft.train import Epoch, FineTuned


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def pair(n: int, classes: int, *, wrong: int) -> Pair:
    labels = np.arange(n) % classes
    predicted = labels.copy()
    predicted[:wrong] = (predicted[:wrong] + 1) % classes
    probabilities = np.eye(classes, dtype=np.float32)[predicted]
    return Pair(Answers(labels, labels, probabilities), Answers(predicted, labels, probabilities))


@pytest.mark.parametrize("classes", [2, 50])
def test_confusions_of_both_versions(classes: int, tmp_path: Path) -> None:
    """A PNG for both hold-outs, also when one is empty or a name looks like a formula."""
    names = [f"$\\frac{{{i}}}$ <b>" for i in range(classes)]
    pairs = {"fresh": pair(60, classes, wrong=7), "old": pair(0, classes, wrong=0)}
    draw_confusions(tmp_path / "c.png", pairs, names)
    assert min(size(tmp_path / "c.png")) > 300


@pytest.mark.parametrize(("wrong", "channels"), [(1, 1), (40, 3)])
def test_what_is_still_wrong(wrong: int, channels: int, tmp_path: Path) -> None:
    """At most 24 pictures; grey and coloured ones."""
    pixels = torch.zeros(60, channels, 8, 8, dtype=torch.uint8)
    drawn = draw_still_wrong(tmp_path / "w.png", pixels, pair(60, 3, wrong=wrong), ["a", "$", "c"])
    assert drawn == min(wrong, 24)
    assert min(size(tmp_path / "w.png")) > 100


def test_nothing_wrong_draws_nothing(tmp_path: Path) -> None:
    """There is no empty picture."""
    pixels = torch.zeros(6, 1, 8, 8, dtype=torch.uint8)
    assert draw_still_wrong(tmp_path / "w.png", pixels, pair(6, 3, wrong=0), ["a", "b", "c"]) == 0
    assert not (tmp_path / "w.png").exists()


@pytest.mark.parametrize("task", [MultiLabel(), Regression()])
def test_every_task_has_its_charts(task: Task, tmp_path: Path) -> None:
    """Bars of each label, points of each target, and the worst answers, whatever the names."""
    labels = np.random.default_rng(0).integers(0, 2, (40, 3)).astype(np.float32)
    wrong = np.where(np.arange(40)[:, None] < 5, 7 - labels, labels)
    answers = [Answers(said, labels, said, task) for said in (labels, np.clip(wrong, 0, 1))]
    if task == Regression():
        answers[1] = Answers(wrong, labels, wrong, task)
    both = Pair(answers[0], answers[1])
    names = ["$\\frac{1}$", "<b>", "c"]
    draw_confusions(tmp_path / "c.png", {"fresh": both}, names)
    assert min(size(tmp_path / "c.png")) > 300
    pixels = torch.zeros(40, 1, 8, 8, dtype=torch.uint8)
    drawn = draw_still_wrong(tmp_path / "w.png", pixels, both, names)
    assert drawn == int((~answers[1].right).sum()) > 0


@pytest.mark.parametrize("validation", [0.5, float("nan")])
def test_losses_by_epoch(validation: float, tmp_path: Path) -> None:
    """A PNG with and without validation, also of a single epoch; words are no formula."""
    network = build(ModelConfig("mlp", ("a", "b"), Preprocessing(8), (0.5,) * 3, (0.2,) * 3))
    epochs = (Epoch(1, 1.0, validation, validation, 0.1),)
    draw_training(tmp_path / "t.png", FineTuned(network, epochs, 1, "$\\frac{ stopped"))
    assert min(size(tmp_path / "t.png")) > 300
