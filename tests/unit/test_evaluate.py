"""Answers and scores by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from sft.dataset import LabelledPictures
from sft.evaluate import Answers, answer, confusion, mean_loss
from sft.models import ModelConfig, build
from sft.pictures import Preprocessing

CONFIG = ModelConfig("small_cnn", ("a", "b", "c"), Preprocessing(8, channels=1), (0.5,), (0.2,))


def answers(predicted: list[int], labels: list[int]) -> Answers:
    probabilities = np.eye(4, dtype=np.float32)[predicted]
    return Answers(np.array(predicted, dtype=int), np.array(labels, dtype=int), probabilities)


def test_scores_by_hand() -> None:
    """Accuracy, each class that occurs or is answered, and the counts of (true, predicted)."""
    given = answers([0, 1, 1, 2, 0, 0], [0, 0, 1, 1, 1, 0])
    assert given.right.tolist() == [True, False, True, False, False, True]
    assert given.accuracy == pytest.approx(3 / 6)
    scores = given.per_class(("x", "y", "z", "never"))
    assert [(name, s.support) for name, s in scores.items()] == [("x", 3), ("y", 3), ("z", 0)]
    assert [s.precision for s in scores.values()] == pytest.approx([2 / 3, 1 / 2, 0])
    assert [scores[name].recall for name in "xy"] == pytest.approx([2 / 3, 1 / 3])
    assert math.isnan(scores["z"].recall)
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


def test_a_loss_counts_samples_by_their_weights() -> None:
    """With weight 0 for some, loss and accuracy are those of the others alone."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (9, 1, 8, 8), dtype=torch.uint8, generator=generator)
    data = LabelledPictures(tuple(map(str, range(9))), pixels, torch.arange(9) % 3)
    network = build(CONFIG).eval()
    weighted = replace(data, weights=torch.tensor([1.0] * 4 + [0.0] * 5))
    alone = mean_loss(network, [data.take(range(4))])
    assert mean_loss(network, [weighted]) == pytest.approx(alone, rel=1e-5)
    assert mean_loss(network, [data]) != pytest.approx(alone, rel=1e-3)
