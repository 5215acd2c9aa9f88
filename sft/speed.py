"""How to compute: where, how precisely, and which way of a pass is fastest on this machine.

What is fastest differs from machine to machine and from network to network: a processor with AMX
makes ten times as many products of bfloat16 as of float32, one without it fewer. So a short probe
measures it, once for each, and its findings are kept.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from sft.distributed import whole_batch
from sft.folding import folded, packed
from sft.models import Network
from sft.pixels import Pixels
from sft.ranges import at_least_one, not_negative
from sft.strategies import activations

WORTH = 1.2
"""How many times as fast bfloat16 must be to be taken by "auto": it costs digits."""
BEHIND = 1.5
"""A way that takes so many times the time of the fastest is not measured again."""
PROBE_SECONDS = 4.0
"""Of CPU time; no further round is begun after it. ResNet-50 at 224 pixels takes about as long."""
ROUNDS = 3
STEP_PICTURES = 8
"""In a measured step of training."""
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05}
"""Of the activations' length, by which a way may differ from the plain one. Measured: 1e-6 and
.004 to .007 (ResNet-18, ResNet-50, MobileNetV3 with random weights)."""

T = TypeVar("T", bound=Hashable)
_FOUND: dict[str, dict[str, Any]] = {}
"""What this process has found or read: a folder that cannot be written is no error."""


class Precision(StrEnum):
    """How many digits count."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    AUTO = "auto"


class Device(StrEnum):
    """Where."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


@dataclass(frozen=True)
class ComputeSettings:
    """Where training runs, and how precisely.

    Checks are no matter of these: a batch is embedded in float32, as its reference was, so that no
    p-value moves with the machine's speed.

    Attributes:
        precision: of training and of what a frozen part answers: `float32`; `bfloat16` (autocast:
            the weights stay float32); `auto`: the second where it is measured to be faster by more
            than a fifth.
        device: `cpu`, `cuda`, or `auto`: the second where there is one.
        threads: of PyTorch, for the whole process; 0 leaves them as they are.
        processes: of this machine that share a retraining's batches; each takes its part of the
            threads, or a CUDA device of its own. Under torchrun its processes count instead.
        findings: folder in which what the probe found is kept for the next process.
    """

    precision: Precision = Precision.FLOAT32
    device: Device = Device.AUTO
    threads: int = 0
    processes: int = 1
    findings: str = "~/.cache/sustain/speed"

    def __post_init__(self) -> None:
        """Refuse values outside their range, by name."""
        for name, kind in (("precision", Precision), ("device", Device)):
            if getattr(self, name) not in list(kind):
                raise ValueError(
                    f"{name} must be one of {', '.join(kind)}, got {getattr(self, name)!r}"
                )
        not_negative(self, "threads")
        at_least_one(self, "processes")

    def start(self) -> torch.device:
        """Set the number of threads, and tell the device.

        Raises:
            ValueError: CUDA is asked for and there is none.
        """
        if self.threads:
            torch.set_num_threads(self.threads)
        there = torch.cuda.is_available()
        if self.device == Device.CUDA and not there:
            raise ValueError('device = "cuda", but PyTorch finds none: set it to "auto" or "cpu"')
        return torch.device("cuda" if there and self.device != Device.CPU else "cpu")


class Kind(StrEnum):
    """What a pass runs."""

    PLAIN = "plain"
    CONTIGUOUS = "contiguous"
    FOLDED = "folded"
    PACKED = "packed"


@dataclass(frozen=True)
class Way:
    """A way to run a frozen part.

    Attributes:
        kind: `plain`: the network as it is, channels last. `contiguous`, `folded`: a graph that
            ends at the boundary, batch norm folded, in either order of the channels. `packed`:
            also with convolution, sum and activation in one call.
        precision: float32 or bfloat16.
        batch_size: pictures in a pass; always as many, since the rounding may depend on it.
    """

    kind: Kind = Kind.PLAIN
    precision: Precision = Precision.FLOAT32
    batch_size: int = 16


Pass = Callable[[Tensor], Tensor]


def frozen_pass(network: Network, at: str, way: Way) -> Pass | None:
    """Give what runs the frozen part: uint8 pictures (n, C, H, W) to what `at` is given (n, …).

    Its answers are bfloat16 where the way is: they hold no more digits.

    Returns:
        None when the network cannot be run like this, or answers otherwise than within `TOLERANCE`.
    """
    pixels = _noise(network, 2)
    try:
        run = _built(network, at, way)
        exact, answered = activations(network, at, pixels), run(pixels).float()
        error = float((answered - exact).norm() / exact.norm().clamp(min=1e-12))
    except Exception:  # noqa: BLE001 - whatever fails in it, there are other ways
        return None
    return run if error <= TOLERANCE[way.precision] else None


def fastest_way(network: Network, at: str, settings: ComputeSettings) -> Way:
    """Measure, or recall, the fastest way to run a frozen part, of those that answer alike.

    Args:
        network: its architecture counts, its weights do not.
        at: where the frozen part ends.
        settings: which precisions are allowed, and where findings are kept.
    """
    if network.mean.device.type != "cpu":
        half = settings.precision != Precision.FLOAT32
        return Way(Kind.PLAIN, Precision.BFLOAT16 if half else Precision.FLOAT32, batch_size=64)

    def measure() -> dict[str, Any]:
        calls = {way: _call(network, at, way) for way in _ways(settings.precision)}
        running = {way: call for way, call in calls.items() if call is not None}
        seconds = race(running, {way: way.batch_size for way in running})
        for way in _ranked(seconds):
            if frozen_pass(network, at, way) is not None:
                return asdict(way)
        return asdict(Way())

    known = "frozen", network.config.architecture, network.config.preprocessing, at
    found = _recall(settings, known, measure)
    return Way(Kind(found["kind"]), Precision(found["precision"]), int(found["batch_size"]))


def trains_in_half(network: Network, pixels: Pixels, settings: ComputeSettings) -> bool:
    """Tell, after a measurement or from memory, whether to train in bfloat16.

    Args:
        network: in training mode, with what moves set free; it is not changed.
        pixels: some of what it will be given, (n, …): pictures or activations.
        settings: a precision that is not `auto` is the answer.
    """
    if settings.precision != Precision.AUTO:
        return settings.precision == Precision.BFLOAT16
    device = network.mean.device
    if device.type != "cpu":
        return bool(torch.cuda.is_bf16_supported())
    some = pixels[torch.arange(min(len(pixels), STEP_PICTURES))]
    moving = [name for name, value in network.named_parameters() if value.requires_grad]

    def measure() -> dict[str, Any]:
        trained = copy.deepcopy(network)

        def step(half: bool) -> None:
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                trained(some).float().logsumexp(1).sum().backward()

        with torch.random.fork_rng(devices=[]):
            seconds = race({half: partial(step, half) for half in (False, True)})
        return {"half": WORTH * seconds[True] <= seconds[False]}

    known = "trained", network.config.architecture, tuple(some.shape), moving
    return bool(_recall(settings, known, measure)["half"])


def race(
    calls: Mapping[T, Callable[[], object]], sizes: Mapping[T, int] | None = None
) -> dict[T, float]:
    """Measure the CPU seconds of some calls, in turn, so that a busy machine hits all alike.

    The first round is for warming up. What is far behind is not measured again.

    Args:
        calls: what to measure.
        sizes: what to divide the seconds of each by.

    Returns:
        For each, the fewest seconds.
    """
    seconds = dict.fromkeys(calls, math.inf)
    running, began = list(calls), time.process_time()
    for number in range(ROUNDS):
        for one in running:
            start = time.process_time()
            calls[one]()
            took = (time.process_time() - start) / (sizes[one] if sizes else 1)
            seconds[one] = min(seconds[one], took)
        if time.process_time() - began > PROBE_SECONDS:
            break
        # the first call of each also plans and packs
        behind = BEHIND * (2 if number == 0 else 1)
        running = [one for one in running if seconds[one] <= behind * min(seconds.values())]
    return seconds


@contextmanager
def faster_dropout(network: nn.Module) -> Iterator[None]:
    """Let a network's dropout layers drop by `dropout`."""
    layers = [layer for layer in network.modules() if type(layer) is nn.Dropout]
    for layer in layers:
        setattr(layer, "forward", partial(_dropped, layer))  # noqa: B010 - it hides the method
    try:
        yield
    finally:
        for layer in layers:
            delattr(layer, "forward")


def dropout(inputs: Tensor, p: float) -> Tensor:
    """Drop a share p of the inputs, in training; p is rounded to 1/256.

    On the CPU PyTorch's own takes 13 ns an element, this one 2: it draws one byte an element. Where
    several processes share a batch, each draws for all of it and takes its rows.
    """
    if inputs.device.type != "cpu":
        return functional.dropout(inputs, p)
    dropped = round(p * 256)
    if dropped == 256:  # noqa: PLR2004
        return inputs * 0
    flat, part = inputs.numel(), whole_batch(inputs)
    if part is not None:
        flat = flat // len(part.rows) * part.n
    words = torch.empty((flat + 7) // 8, dtype=torch.int64).random_(-(2**63), None)
    drawn = words.view(torch.uint8)[:flat]
    if part is not None:
        drawn = drawn.view(part.n, -1)[part.rows].flatten()
    kept = drawn >= dropped
    scaled = kept.to(inputs.dtype).mul_(256 / (256 - dropped))
    dense = torch.empty_like(inputs, device="meta").stride()  # a part of a tensor leaves places out
    return inputs * scaled.as_strided(inputs.shape, dense)


def _dropped(layer: nn.Dropout, inputs: Tensor) -> Tensor:
    return dropout(inputs, layer.p) if layer.training else inputs


def _ways(precision: Precision) -> list[Way]:
    precisions = {
        Precision.AUTO: (Precision.FLOAT32, Precision.BFLOAT16),
    }.get(precision, (precision,))
    return [
        Way(kind, one, size)
        for one in precisions
        for kind, size in (
            (Kind.PLAIN, 8),
            (Kind.CONTIGUOUS, 4),
            (Kind.FOLDED, 4),
            (Kind.PACKED, 4),
            (Kind.PACKED, 16),
        )
    ]


def _ranked(seconds: Mapping[Way, float]) -> list[Way]:
    """Order by speed, where bfloat16 has to be worth its loss of digits."""
    both = len({way.precision for way in seconds}) > 1

    def cost(way: Way) -> float:
        return seconds[way] * (WORTH if both and way.precision == Precision.BFLOAT16 else 1)

    return sorted(seconds, key=cost)


def _call(network: Network, at: str, way: Way) -> Callable[[], Tensor] | None:
    """Give what runs a batch of noise, unless that fails."""
    pixels = _noise(network, way.batch_size)
    try:
        run = _built(network, at, way)
        run(pixels[:1])
    except Exception:  # noqa: BLE001 - whatever fails in it, there are other ways
        return None
    return partial(run, pixels)


def _built(network: Network, at: str, way: Way) -> Pass:
    dtype = getattr(torch, way.precision)
    autocast = partial(
        torch.autocast,
        network.mean.device.type,
        torch.bfloat16,
        enabled=way.precision == Precision.BFLOAT16,
    )
    if way.kind == Kind.PLAIN:

        def plain(pixels: Tensor) -> Tensor:
            with autocast():
                return activations(network, at, pixels).to(dtype)

        return plain
    within = at.removeprefix("body.")
    if way.kind == Kind.PACKED:
        graph = packed(network.body, within, dtype)
    else:
        graph = folded(network.body, within)
    order = torch.contiguous_format if way.kind == Kind.CONTIGUOUS else torch.channels_last
    graph = graph.to(memory_format=order)

    def run(pixels: Tensor) -> Tensor:
        with torch.no_grad(), autocast():  # not inference_mode: what comes out is trained on
            answered: Tensor = graph(network.scaled(pixels).contiguous(memory_format=order))
            return answered.to(dtype)

    return run


def _noise(network: Network, n: int) -> Tensor:
    seen = network.config.preprocessing
    shape = n, seen.channels, seen.image_size, seen.image_size
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return pixels.to(network.mean.device)


def _recall(
    settings: ComputeSettings, known: tuple[object, ...], measure: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """Read what was found for this on this machine, or find it; the first to find it decides."""
    about = [*map(str, known), settings.precision.value, *_machine()]
    digest = hashlib.sha256("\0".join(about).encode()).hexdigest()
    if digest in _FOUND:
        return _FOUND[digest]
    path = Path(settings.findings).expanduser() / f"{digest}.json"
    found = _read(path)
    if found is None:
        measured = measure()
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_suffix(f".{os.getpid()}.tmp")
            unfinished.write_text(json.dumps({**measured, "about": about}, indent=1))
            with contextlib.suppress(FileExistsError):
                path.hardlink_to(unfinished)  # unlike a renaming, it leaves what is there
            unfinished.unlink()
        found = _read(path) or measured
    _FOUND[digest] = found
    return found


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError):
        return None


@cache
def _machine() -> tuple[str, ...]:
    """Tell the processor and what it can do, and PyTorch."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        cpu = "".join(line for line in lines if line.startswith(("model name", "flags")))
    except OSError:
        cpu = platform.processor()
    return torch.__version__, hashlib.sha256(cpu.encode()).hexdigest()
