"""What is thought of a delivery's labels, and how it is shown to a person."""

import io
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
import torch
from samples import optical_digits
from sklearn.datasets import load_digits

from flows.doubt import (
    FILE,
    PAGE,
    Delivery,
    adapted_answers,
    judge_delivery,
    see,
    stretches,
    suspicious_files,
)
from sft.alignment import aligned_answers
from sft.averaging import ensemble
from sft.dataset import LabelledPictures
from sft.evaluate import answer
from sft.models import ModelConfig, build
from sft.noise import NoiseAction, NoiseSettings, mixed_up_classes
from sft.pictures import Preprocessing
from sft.train import TrainingSettings, fine_tune

CLASSES = ("<script>alert(0)</script>", *map(str, range(1, 10)))
CONFIG = ModelConfig("mlp", CLASSES, Preprocessing(8, channels=1), (0.3,), (0.37,))
WRONG = 30


def judged(action: NoiseAction) -> tuple[LabelledPictures, Delivery]:
    """Judge 300 optical digits, of which 30 have the next digit's label."""
    digits = load_digits()
    pixels = torch.from_numpy(digits.images[:300] * 15.9).to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(digits.target[:300].astype(np.int64))
    labels[:WRONG] = (labels[:WRONG] + 1) % 10
    data = LabelledPictures(tuple(f"<b>/{i}" for i in range(300)), pixels, labels)
    old = data.take([])
    return data, judge_delivery(build(CONFIG), data, old, CLASSES, NoiseSettings(action=action))


@pytest.mark.parametrize("action", list(NoiseAction))
def test_doubted_labels_are_learned_from_as_the_setting_says(action: NoiseAction) -> None:
    """Kept as they are, counting for 1 less their doubt, or left out; the others count fully."""
    _, delivery = judged(action)
    doubted = dict(zip(delivery.usable.sample_ids, delivery.doubt.suspicious, strict=True))
    assert sum(doubted.values()) > 5
    learned = dict(
        zip(delivery.believed.sample_ids, delivery.believed.shares.tolist(), strict=True)
    )
    for place, (name, suspicious) in enumerate(doubted.items()):
        if not suspicious or action is NoiseAction.KEEP:
            assert learned[name] == 1
        elif action is NoiseAction.LEAVE_OUT:
            assert name not in learned
        else:
            assert learned[name] == pytest.approx(1 - delivery.doubt.doubt[place], abs=1e-6)


def test_wrong_labels_of_a_new_world_do_not_hide_among_known_ones() -> None:
    """150 random labels of negatives beside 450 right ones: seen only where the batch is named."""
    digits = load_digits()
    pixels = torch.from_numpy(digits.images[:600] * 15.9).to(torch.uint8).unsqueeze(1)
    pixels[450:] = 255 - pixels[450:]
    labels = torch.from_numpy(digits.target[:600].astype(np.int64))
    right = labels.clone()
    labels[450:] = torch.from_numpy(np.random.default_rng(0).integers(0, 10, 150))
    names = tuple(f"{'new' if i >= 450 else 'known'}/{i}" for i in range(600))
    network, settings = build(CONFIG), NoiseSettings()
    data = LabelledPictures(names, pixels, labels)
    assert not judge_delivery(network, data, data.take([]), CLASSES, settings).verdict.stop
    found = judge_delivery(network, data, data.take([]), CLASSES, settings, {"new"})
    assert found.verdict.stop
    assert found.verdict.words.startswith("the 150 labels of the batches that changed: ")
    assert found.judged.sample_ids == names[450:]
    assert len(found.verdict.doubt) == 150
    clean = LabelledPictures(names, pixels, right)
    assert not judge_delivery(
        network, clean, clean.take([]), CLASSES, settings, {"new"}
    ).verdict.stop


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, _: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_suspicious_labels_are_shown_most_doubtful_first() -> None:
    """Table and page agree: a picture each, both labels, and names that are text, not HTML."""
    data, delivery = judged(NoiseAction.KEEP)
    files = suspicious_files(delivery.usable, delivery.doubt, CLASSES)
    table = pd.read_csv(io.StringIO(files[FILE]), dtype={"label": str, "likely": str})
    assert len(table) == delivery.doubt.suspicious.sum()
    assert table["doubt"].is_monotonic_decreasing
    given = dict(zip(data.sample_ids, data.labels.tolist(), strict=True))
    assert [CLASSES[given[name]] for name in table["sample_id"]] == table["label"].tolist()
    page = Page(files[PAGE])
    assert "script" not in page.tags
    assert "b" in page.tags
    assert page.tags.count("img") == len(table)
    places = [page.text.index(f" {name}labelled") for name in table["sample_id"]]
    assert places == sorted(places)
    assert f"labelled {table['label'][0]}, likelier {table['likely'][0]}" in page.text


def test_no_suspicion_no_files() -> None:
    """There is no empty page."""
    _, delivery = judged(NoiseAction.KEEP)
    sure = [i for i, one in enumerate(delivery.doubt.suspicious) if not one]
    verdict = delivery.doubt
    clean = type(verdict)(**{**vars(verdict), "suspicious": np.zeros(len(sure), dtype=bool)})
    assert suspicious_files(delivery.usable.take(sure), clean, CLASSES) == {}


def test_a_champion_adapted_to_a_delivery_answers_it_better() -> None:
    """Through a drifted sensor; one without batch norm has no such answers to give."""
    factory = "samples:batch_norm_net"
    config = ModelConfig(
        factory, tuple("0123456789"), Preprocessing(8, channels=1), (0.3,), (0.35,)
    )
    settings = TrainingSettings(epochs=5, learning_rate=4e-3, l2_sp=0.0, freeze_batch_norm=False)
    start = build(config, allowed_factories=[factory])
    champion = fine_tune(start, optical_digits().take(range(400)), settings).network
    fresh = optical_digits().take(range(400, 600))
    drifted = replace(fresh, pixels=(0.3 * fresh.pixels + 150).to(torch.uint8))
    adapted = adapted_answers(champion, drifted.pixels)
    assert adapted is not None
    right = (adapted().argmax(1) == drifted.labels.numpy()).mean()
    assert right > answer(champion, drifted).accuracy + 0.2
    assert adapted_answers(build(CONFIG), drifted.pixels) is None


def test_classes_mixed_up_in_a_world_that_blinds_the_champion_are_seen() -> None:
    """Bleached digits: a champion that misreads them tells next-class labels from right ones."""
    settings = TrainingSettings(epochs=15, learning_rate=4e-3, l2_sp=0.0)
    champion = fine_tune(build(CONFIG), optical_digits().take(range(400)), settings).network.eval()
    old, fresh = optical_digits().take(range(200)), optical_digits().take(range(400, 600))
    bleached = replace(fresh, pixels=(0.15 * fresh.pixels + 150).to(torch.uint8))
    asked = NoiseSettings()
    assert answer(champion, bleached).accuracy < 0.5, "blinded"
    aligned = aligned_answers(
        champion, see(champion, bleached.pixels)[0], see(champion, old.pixels)[0]
    )
    assert aligned is not None
    assert (aligned.argmax(1) == bleached.labels.numpy()).mean() > 0.75
    assert not judge_delivery(champion, bleached, old, CLASSES, asked).verdict.stop
    wrong = replace(bleached, labels=(bleached.labels + 1) % 10)
    found = judge_delivery(champion, wrong, old, CLASSES, asked).verdict
    assert found.stop
    assert "classes seem mixed up" in found.words
    unseen = judge_delivery(champion, wrong, old.take([]), CLASSES, asked).verdict
    assert not unseen.stop, "without a known world nothing tells it"
    assert (
        aligned_answers(ensemble([champion, champion]), *[np.ones((2, 9), np.float32)] * 2) is None
    )
    several_worlds = LabelledPictures(
        tuple(f"{'wrong' if i < 70 else 'right'}/{i}" for i in range(400)),
        torch.cat([bleached.pixels[:70], optical_digits().pixels[600:930]]),
        torch.cat([wrong.labels[:70], optical_digits().labels[600:930]]),
    )
    found = judge_delivery(champion, several_worlds, old, CLASSES, asked).verdict
    assert found.stop
    assert found.words.startswith("the 70 labels of batch wrong: classes seem mixed up")


def test_a_delivery_is_cut_into_stretches_of_whole_batches() -> None:
    """Of 60 labels or more; what is left over joins the stretch before."""
    ids = [
        f"{batch}/{i}" for batch, n in (("a", 70), ("b", 30), ("c", 40), ("d", 9)) for i in range(n)
    ]
    rows = stretches(ids)
    assert [sorted({ids[i][0] for i in stretch}) for stretch in rows] == [["a"], ["b", "c", "d"]]
    assert sorted(i for stretch in rows for i in stretch) == list(range(len(ids)))
    assert stretches(["a/1", "b/2"]) == [[0, 1]]


def test_few_classes_are_not_taken_for_mixed_up() -> None:
    """Labels of 2 of 10 classes that are answered as two others: any few can be renamed."""
    labels = np.arange(100) % 2
    answers = np.eye(10)[labels + 5]
    assert not mixed_up_classes(answers, labels, CLASSES)
    assert "mixed up" in mixed_up_classes(
        np.eye(10)[(np.arange(100) + 1) % 10], np.arange(100) % 10, CLASSES
    )
