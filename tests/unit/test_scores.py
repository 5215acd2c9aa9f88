"""Scores by class of champion and challenger, and which classes are worst."""

import numpy as np
import pandas as pd

from flows.scores import per_class, worst_classes
from sft.evaluate import Answers
from sft.gate import Pair
from sft.tasks import MultiLabel, Regression

CLASSES = ("cat", "dog", "new")


def answers(predicted: list[int], labels: list[int]) -> Answers:
    probabilities = np.eye(3, dtype=np.float32)[predicted]
    return Answers(np.array(predicted, dtype=int), np.array(labels, dtype=int), probabilities)


def test_recall_and_precision_before_and_after() -> None:
    """By hand: a class that only the champion answers is there, with no recall to count."""
    labels = [0, 0, 0, 0, 1, 1]
    pairs = {
        "fresh": Pair(answers([0, 0, 2, 2, 1, 0], labels), answers([0, 0, 0, 1, 1, 1], labels)),
        "old": Pair(answers([], []), answers([], [])),
    }
    table = per_class(pairs, CLASSES)
    assert table["class"].tolist() == ["cat", "dog", "new"]
    assert table["support"].tolist() == [4, 2, 0]
    assert table["recall_champion"].tolist()[:2] == [0.5, 0.5]
    assert table["recall_challenger"].tolist()[:2] == [0.75, 1]
    assert table["precision_champion"].tolist() == [2 / 3, 1, 0]
    assert table["precision_challenger"].tolist()[:2] == [1, 2 / 3]
    assert pd.isna(table["precision_challenger"][2])
    assert worst_classes(table) == ("fresh hold-out: cat 75% of 4 (champion 50%), precision 100%")


def test_the_worst_three_of_each_hold_out_are_named() -> None:
    """Lowest recall first; of equal ones the class with more samples; "" when all is right."""
    names = tuple("abcde")
    labels = [0] * 4 + [1] * 2 + [2] * 8 + [3] + [4]
    wrong = [1] * 4 + [0, 1] + [2] * 4 + [0] * 4 + [4] + [4]
    eye = np.eye(5, dtype=np.float32)
    right = Answers(np.array(labels), np.array(labels), eye[labels])
    tried = Answers(np.array(wrong), np.array(labels), eye[wrong])
    words = worst_classes(per_class({"old": Pair(right, tried)}, names))
    assert [part.split()[0] for part in words.removeprefix("old hold-out: ").split("; ")] == [
        "a", "d", "c",
    ]  # fmt: skip
    assert worst_classes(per_class({"old": Pair(right, right)}, names)) == ""


def test_other_tasks_have_the_classes_that_they_have() -> None:
    """Several labels are scored label by label; a regression has no class, and no worst one."""
    labels = np.array([[1, 1], [1, 0], [0, 0]], dtype=np.float32)
    said = np.array([[1, 0], [0, 1], [1, 0]], dtype=np.float32)
    both = Answers(said, labels, said, MultiLabel())
    table = per_class({"old": Pair(both, both)}, ("red", "blue"))
    assert table["support"].tolist() == [2, 1]
    assert table["recall_challenger"].tolist() == [0.5, 0]
    assert table["precision_challenger"].tolist() == [0.5, 0]
    values = Answers(said, labels, said, Regression())
    empty = per_class({"old": Pair(values, values)}, ("x", "y"))
    assert empty.empty
    assert worst_classes(empty) == ""
