"""Answers and scores by hand."""

import math

import numpy as np
import pytest
import torch

from sft.dataset import LabelledPictures
from sft.evaluate import Answers, answer, confusion
from sft.models import ModelConfig, build
from sft.pictures import Preprocessing

CONFIG = ModelConfig("small_cnn", ("a", "b", "c"), Preprocessing(8, channels=1), (0.5,), (0.2,))


def answers(predicted: list[int], labels: list[int]) -> Answers:
    probabilities = np.eye(4, dtype=np.float32)[predicted]
    return Answers(np.array(predicted, dtype=int), np.array(labels, dtype=int), probabilities)


def test_scores_by_hand() -> None:
    """Accuracy, recall of each class that occurs, and the counts of (true, predicted)."""
    given = answers([0, 1, 1, 2, 0, 0], [0, 0, 1, 1, 1, 0])
    assert given.right.tolist() == [True, False, True, False, False, True]
    assert given.accuracy == pytest.approx(3 / 6)
    assert given.per_class(("x", "y", "z")) == {
        "x": pytest.approx(2 / 3),
        "y": pytest.approx(1 / 3),
    }
    assert confusion(given, ("a", "b", "c")).tolist() == [[2, 1, 0], [1, 1, 1], [0, 0, 0]]


def test_nothing_answered_has_no_accuracy() -> None:
    """An empty set scores NaN, not zero and not an error."""
    given = answers([], [])
    assert math.isnan(given.accuracy)
    assert given.per_class(("x", "y")) == {}
    assert confusion(given, ("a", "b")).tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize("n", [0, 1, 7])
def test_a_network_answers_in_the_order_of_the_set(n: int) -> None:
    """The answers do not depend on the batch size, and the network keeps its mode."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (n, 1, 8, 8), dtype=torch.uint8, generator=generator)
    labels = torch.arange(n) % 3
    data = LabelledPictures(tuple(map(str, range(n))), pixels, labels)
    network = build(CONFIG).train()
    whole, parts = (answer(network, data, batch_size=size) for size in (256, 2))
    assert network.training
    assert whole.probabilities.shape == (n, 3)
    np.testing.assert_allclose(whole.probabilities, parts.probabilities, atol=1e-6)
    np.testing.assert_allclose(whole.probabilities.sum(1), np.ones(n), atol=1e-5)
    np.testing.assert_array_equal(whole.predicted, whole.probabilities.argmax(1))
    np.testing.assert_array_equal(whole.labels, labels.numpy())
    for place in range(n):
        alone = answer(network, data.take([place]))
        np.testing.assert_allclose(alone.probabilities[0], whole.probabilities[place], atol=1e-6)
