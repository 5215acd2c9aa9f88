"""Speed of fine-tuning on real pictures beside the loop that tutorials write; one thread, CPU time.

Weights are random: they do not change the work. Pictures are decoded beforehand, and findings of
the probe are there, as in all but a machine's first run. Repeats are interleaved, medians are told.
"""

from __future__ import annotations

import single_thread  # isort: skip  # noqa: F401 - before torch

import copy
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from realdata import PACS_CLASSES, SHARED
from results import Figure, write
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from sft.cache import ActivationCache
from sft.dataset import LabelledPictures
from sft.models import IMAGENET_MEAN, IMAGENET_STD, ModelConfig, Network, build
from sft.objectives import class_weights
from sft.pictures import Preprocessing, decode
from sft.speed import ComputeSettings, Precision, Way, fastest_way, frozen_pass
from sft.strategies import Strategy, stages
from sft.train import TrainingSettings, fine_tune

SIDE = 224
PICTURES = 32
STAGE = 140
"""Labels of a stage of PACS, as in the table of recovery."""
EPOCHS = 10
REPEATS = 3
PEAK_SIDE = 2048
NETWORKS = ("resnet18", "resnet50", "mobilenet_v3_large")
PLAIN: dict[str, Any] = {"batch_size": 32, "rehearsal": 0.0, "l2_sp": 0.0, "class_weights": False}
"""The steps of the tutorials' loop, without what keeps the old world known."""
KINDS: dict[str, tuple[dict[str, Any], int]] = {
    "head": ({"strategy": Strategy.HEAD}, EPOCHS),
    "last stage": ({"train_last": 1}, EPOCHS),
    "everything": ({}, 1),
}
"""Settings and epochs; nothing is cached where everything moves, so one epoch tells the rate."""
TUNED = tuple(itertools.product(NETWORKS, KINDS))


def seconds(action: Callable[[], object]) -> float:
    """Measure the CPU seconds of this process."""
    began = time.process_time()
    action()
    return time.process_time() - began


def interleaved(repeats: int, *actions: Callable[[], object]) -> list[list[float]]:
    """Measure each action once a repeat, in turn, so that a busy machine hits all alike."""
    rows = [[seconds(action) for action in actions] for _ in range(repeats)]
    return [list(column) for column in zip(*rows, strict=True)]


def ratio(slow: Sequence[float], quick: Sequence[float]) -> float:
    """Give the median of the ratios within a repeat."""
    return statistics.median(a / b for a, b in zip(slow, quick, strict=True))


@cache
def pictures(n: int, domain: str = "photo", side: int = SIDE) -> LabelledPictures:
    """Decode the first pictures of each class in turn."""
    folders = [
        sorted((SHARED / "pacs" / domain / name).iterdir())[: n // len(PACS_CLASSES) + 1]
        for name in PACS_CLASSES
    ]
    pairs = [(path, label) for label, paths in enumerate(folders) for path in paths][:n]
    seen = Preprocessing(side)
    return LabelledPictures(
        tuple(f"{domain}/{path.parent.name}/{path.name}" for path, _ in pairs),
        torch.stack([decode(path.read_bytes(), seen).pixels for path, _ in pairs]),
        torch.tensor([label for _, label in pairs]),
    )


@cache
def network(name: str, side: int = SIDE) -> Network:
    """Build one with random weights for the seven classes."""
    config = ModelConfig(
        name, tuple(PACS_CLASSES), Preprocessing(side), IMAGENET_MEAN, IMAGENET_STD
    )
    return build(config).to(memory_format=torch.channels_last).eval()


@dataclass
class Naive:
    """The loop that tutorials write: the whole network in each epoch, channels first, float32."""

    body: nn.Module
    pixels: Tensor
    labels: Tensor

    @classmethod
    def of(cls, name: str, moving: Sequence[str], data: LabelledPictures) -> Naive:
        """Freeze all but the parameters that begin like these."""
        of = network(name)
        body = copy.deepcopy(of.body).to(memory_format=torch.contiguous_format).train()
        for parameter, value in body.named_parameters():
            value.requires_grad_(parameter.startswith(tuple(moving)))
        return cls(body, of.scaled(data.pixels).contiguous(), data.labels)

    def epoch(self) -> None:
        """Go through the pictures once, in order."""
        moving = [value for value in self.body.parameters() if value.requires_grad]
        optimiser = torch.optim.AdamW(moving, lr=1e-3)
        for pixels, labels in zip(self.pixels.split(32), self.labels.split(32), strict=True):
            optimiser.zero_grad()
            functional.cross_entropy(self.body(pixels), labels).backward()
            optimiser.step()

    def answer(self) -> None:
        """Only answer, in evaluation mode."""
        self.body.eval()
        with torch.no_grad():
            for pixels in self.pixels.split(32):
                self.body(pixels)


def moving(name: str, kind: str) -> list[str]:
    """Tell how the names of the parameters begin that move."""
    found = stages(network(name))
    last = {"head": found[-1:], "last stage": found[-2:], "everything": found}[kind]
    return [module.removeprefix("body.") for stage in last for module in stage.modules]


def ours(name: str, kind: str, compute: ComputeSettings, data: LabelledPictures) -> None:
    """Fine-tune with nothing known before."""
    settings, epochs = KINDS[kind]
    fine_tune(
        network(name),
        data,
        TrainingSettings(**{**PLAIN, **settings, "epochs": epochs}),
        cache=ActivationCache(compute=compute),
        compute=compute,
    )


def settings_of(findings: str, precision: Precision) -> ComputeSettings:
    """Give settings whose findings are those of this run."""
    return ComputeSettings(precision=precision, findings=findings)


def rates(findings: str) -> list[Figure]:
    """Give images per CPU-second, naive against ours, and three of the targets."""
    half, full = (settings_of(findings, one) for one in (Precision.AUTO, Precision.FLOAT32))
    data, figures = pictures(PICTURES), []
    took: dict[tuple[str, str], list[list[float]]] = {}
    for name, kind in TUNED:
        epochs = KINDS[kind][1]
        naive = Naive.of(name, moving(name, kind), data)
        both = partial(ours, name, kind, half, data), partial(ours, name, kind, full, data)
        ours(name, kind, half, data)  # measures what the probe has not found yet
        columns = interleaved(REPEATS, naive.epoch, *both)
        took[name, kind] = columns
        rate = [PICTURES / statistics.median(columns[0])]
        rate += [PICTURES * epochs / statistics.median(column) for column in columns[1:]]
        figures.append(
            Figure(
                f"{name}, {kind}, {epochs} epoch(s), {PICTURES} pictures of {SIDE} pixels,"
                " images/CPU s",
                rate[1],
                "above naive",
                rate[1] > rate[0],
                {"naive": rate[0], "ours, float32": rate[2], "times naive": rate[1] / rate[0]},
            )
        )
    head = took["resnet50", "head"]
    stage, all_of_it = took["resnet18", "last stage"], took["resnet18", "everything"]
    whole = statistics.median(all_of_it[0])
    rested = [EPOCHS * whole / statistics.median(column) for column in stage]
    return [
        _least("head only, 10 epochs, ResNet-50, times the naive loop", EPOCHS, head, 20),
        Figure(
            "last stage only, 10 epochs, ResNet-18, float32, times naive full fine-tuning",
            rested[2],
            "≥ 4",
            rested[2] >= 4,
            {"naive last stage": rested[0]},
        ),
        Figure(
            "the same, precision auto",
            rested[1],
            "≥ 8",
            rested[1] >= 8,
            {"our full fine-tuning, auto": ratio(all_of_it[0], all_of_it[1])},
        ),
        *figures,
    ]


def _least(figure: str, epochs: int, columns: list[list[float]], least: float) -> Figure:
    value = epochs * ratio(columns[0], columns[1])
    beside = {"float32": epochs * ratio(columns[0], columns[2])}
    return Figure(figure, value, f"≥ {least:g}", value >= least, beside)


def known_before(findings: str) -> list[Figure]:
    """Give the speed of a head's update when the old pictures' activations are there."""
    name, fresh, old = "squeezenet1_1", pictures(STAGE), pictures(STAGE, "sketch")
    both = LabelledPictures(
        fresh.sample_ids + old.sample_ids,
        torch.cat([fresh.pixels, old.pixels]),
        torch.cat([fresh.labels, old.labels]),
    )
    naive = Naive.of(name, moving(name, "head"), both)
    settings = TrainingSettings(
        **{**PLAIN, "rehearsal": 0.5}, strategy=Strategy.HEAD, epochs=EPOCHS
    )

    def update(compute: ComputeSettings, known: ActivationCache) -> None:
        mine = copy.copy(known)
        mine._rows = known._rows.copy()
        fine_tune(network(name), fresh, settings, memory=old, cache=mine, compute=compute)

    updates = []
    for precision in (Precision.AUTO, Precision.FLOAT32):
        compute = settings_of(findings, precision)
        known = ActivationCache(compute=compute)
        known.get(network(name), stages(network(name))[-1].modules[0], old)
        updates.append(partial(update, compute, known))
        updates[-1]()
    columns = interleaved(REPEATS, naive.epoch, *updates)
    return [
        _least(
            f"head-only update, 10 epochs, {STAGE} new and {STAGE} old cached, SqueezeNet,"
            " times the naive loop",
            EPOCHS,
            columns,
            50,
        )
    ]


def overhead() -> list[Figure]:
    """Compare fine_tune() with a bare loop of the same steps, where steps are short."""
    name, side, batch = "small_cnn", 32, 32
    data, old = pictures(160, "photo", side), pictures(320, "art", side)
    start = network(name, side)
    weights = class_weights(torch.cat([data.labels, old.labels]), len(PACS_CLASSES))
    settings = TrainingSettings(epochs=2, batch_size=2 * batch)

    def bare() -> None:
        torch.manual_seed(0)
        tuned = copy.deepcopy(start).train()
        moving = list(tuned.parameters())
        before = [value.detach().clone() for value in moving]
        optimiser = torch.optim.AdamW(moving, lr=1e-3, weight_decay=1e-4, fused=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 2 * len(data) // batch)
        for _ in range(2):
            total = 0.0
            for new in torch.randperm(len(data)).split(batch):
                rehearsed = torch.randint(len(old), (len(new),))
                pixels = torch.cat([data.pixels[new], old.pixels[rehearsed]])
                labels = torch.cat([data.labels[new], old.labels[rehearsed]])
                loss = functional.cross_entropy(tuned(pixels), labels, weights)
                pairs = zip(moving, before, strict=True)
                loss = loss + 0.005 * sum((now - then).square().sum() for now, then in pairs)
                optimiser.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(moving, 5.0)
                optimiser.step()
                schedule.step()
                total += loss.item()

    def tuned() -> None:
        fine_tune(start, data, settings, memory=old)

    bare()
    tuned()
    columns = interleaved(3 * REPEATS, tuned, bare)
    value = ratio(*columns)
    return [
        Figure(
            "fine_tune() beside a bare loop of the same steps, small CNN, batches of 64",
            value,
            "≤ 1.03",
            value <= 1.03,
            {"ms a step": 100 * statistics.median(columns[0])},
        )
    ]


def shares(findings: str) -> list[Figure]:
    """Give the share of the machine's peak that embedding reaches."""
    one = torch.randn(PEAK_SIDE, PEAK_SIDE)
    two = one.bfloat16()
    work = 2 * PEAK_SIDE**3
    figures = []
    for name in NETWORKS[:2]:
        of, data = network(name), pictures(PICTURES)
        at = stages(of)[-1].modules[0]
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            of(data.pixels[:1])
        flops = counter.get_total_flops() * PICTURES
        way = fastest_way(of, at, settings_of(findings, Precision.BFLOAT16))
        exact = fastest_way(of, at, settings_of(findings, Precision.FLOAT32))
        columns = interleaved(
            REPEATS,
            partial(torch.mm, two, two),
            partial(_embed, of, at, way),
            partial(torch.mm, one, one),
            Naive.of(name, ["fc"], data).answer,
            partial(_embed, of, at, exact),
        )
        shares = {
            place: flops / work * ratio(columns[peak], columns[place])
            for place, peak in ((1, 0), (3, 2), (4, 2))
        }
        figures.append(
            Figure(
                f"embedding, {name}, share of the bf16 peak of a {PEAK_SIDE}² product",
                shares[1],
                "≥ .70",
                shares[1] >= 0.7,
                {
                    "naive, of the fp32 peak": shares[3],
                    "ours in float32, of the fp32 peak": shares[4],
                    "bf16 peak, TFLOP/s": work / min(columns[0]) / 1e12,
                    "fp32 peak, TFLOP/s": work / min(columns[2]) / 1e12,
                    "images/CPU s": PICTURES / statistics.median(columns[1]),
                    "naive images/CPU s": PICTURES / statistics.median(columns[3]),
                },
            )
        )
    return figures


_RUNS: dict[tuple[str, Way], Callable[[Tensor], Tensor]] = {}


def _embed(of: Network, at: str, way: Way) -> None:
    key = of.config.architecture, way
    if key not in _RUNS:
        run = frozen_pass(of, at, way)
        assert run is not None
        _RUNS[key] = run
    for chunk in pictures(PICTURES).pixels.split(way.batch_size):
        _RUNS[key](chunk)


def trials() -> list[Figure]:
    """Measure all of it."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as findings:
        return [*known_before(findings), *overhead(), *shares(findings), *rates(findings)]


if __name__ == "__main__":
    write("sft-speed", trials())
