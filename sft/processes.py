"""The processes of one fine-tuning: who leads them, what it hands to the others, and their end.

The process that was asked for a fine-tuning leads: it knows the world around it, and the others
only compute. On one machine it starts them itself, and they find each other by a file and speak
over loopback. On several machines `torchrun` starts the same command on each; `join` tells which
one leads. Either way the others get all they need from the leader, so they share no folder with it.

A fine-tuning is handed over as a folder without a pickle: networks as `sft.models` saves them,
pictures as they lie in memory, labels in safetensors, settings in JSON. Pictures are mapped from
their file, so the others hold no more of them in memory than the leader does.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from math import prod
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from sft import models
from sft.after import tune as tune_here
from sft.cache import ActivationCache
from sft.dataset import LabelledPictures
from sft.distributed import Team
from sft.models import Network, is_factory
from sft.speed import ComputeSettings, Device
from sft.train import Epoch, FineTuned, TrainingError, TrainingSettings

WAIT = timedelta(days=1)
"""For the next fine-tuning: the leader reads pictures and searches settings before it."""
START_SECONDS = 300.0
"""For processes of this machine to import torch."""
END_SECONDS = 10.0
STORE = "store"
CHUNK = 64 * 2**20
"""Bytes that are handed over at once."""
PICTURES = 256
"""That are written at once."""

T = TypeVar("T", TrainingSettings, ComputeSettings)


class ProcessError(RuntimeError):
    """A process that shares a fine-tuning is gone; the message says which, and what it said."""


@dataclass
class _Crew:
    """The processes as this one knows them; `started` are those that it has to end."""

    rank: int
    size: int
    orders: Any
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)
    folder: Path | None = None

    def team(self, compute: ComputeSettings) -> Team:
        """Let them speak in the way of the device that they compute on."""
        if compute.start().type == "cpu":
            return Team(self.rank, self.size)
        place = int(os.environ.get("LOCAL_RANK", "0"))
        _refuse_few_devices(place + 1)
        torch.cuda.set_device(place)
        group = dist.new_group(backend="nccl")
        return Team(self.rank, self.size, group, torch.device("cuda", place))


def _refuse_few_devices(processes: int) -> None:
    if processes > (there := torch.cuda.device_count()):
        raise ValueError(
            f"{processes} processes need a CUDA device each, and this machine has {there}: lower"
            ' processes under [compute], or set device = "cpu"'
        )


_JOINED: list[_Crew] = []
"""At most one: that of the command which torchrun started."""


def tune(
    start: Network,
    fresh: LabelledPictures,
    settings: TrainingSettings,
    *,
    memory: LabelledPictures | None = None,
    anchor: Network | None = None,
    validation: tuple[LabelledPictures, ...] = (),
    cache: ActivationCache | None = None,
    on_epoch: Callable[[Epoch], None] | None = None,
    on_batch: Callable[[int], None] | None = None,
    compute: ComputeSettings | None = None,
) -> FineTuned:
    """Fine-tune as `sft.after.tune` does, by `compute.processes`, or by those of `torchrun`.

    The weights are those of one process but for the order in which floating-point numbers are
    added; see `sft.distributed` for what else may differ.

    Raises:
        TrainingError: as `sft.train.fine_tune` does.
        ProcessError: one of the others died.
        ValueError: more processes than CUDA devices.
    """
    compute = compute or ComputeSettings(device=Device.CPU)
    given: dict[str, Any] = {
        "memory": memory,
        "anchor": anchor,
        "validation": validation,
        "cache": cache,
    }
    told: dict[str, Any] = {"on_epoch": on_epoch, "on_batch": on_batch}
    with _crew(compute, start) as crew:
        if crew is None:
            return tune_here(start, fresh, settings, compute=compute, **given, **told)
        if crew.started and not compute.threads:
            threads = max(1, torch.get_num_threads() // crew.size)
            compute = replace(compute, threads=threads)
        compute = replace(compute, device=Device(compute.start().type))
        if crew.started and compute.device == Device.CUDA:
            _refuse_few_devices(crew.size)
        try:
            with tempfile.TemporaryDirectory(prefix="sustain-tuning-") as name:
                _write(Path(name), start, fresh, settings, compute, **given)
                _hand_over(crew, Path(name))
            team = crew.team(compute)
            return tune_here(start, fresh, settings, compute=compute, team=team, **given, **told)
        except RuntimeError as error:
            _explain(crew, error)


def join() -> bool:
    """Join the processes that `torchrun` (or whatever sets the same variables) has started.

    Returns:
        Whether this one leads. It then has to call `leave` when it is done, which lets the others
        go; they call `help_out`.
    """
    if not _JOINED:
        dist.init_process_group("gloo")
        orders = dist.new_group(backend="gloo", timeout=WAIT)
        _JOINED.append(_Crew(dist.get_rank(), dist.get_world_size(), orders))
    return _JOINED[0].rank == 0


def leave() -> None:
    """Let the others go, where there are any."""
    while _JOINED:
        crew = _JOINED.pop()
        if crew.rank == 0:
            with contextlib.suppress(RuntimeError):  # they may be gone
                _hand_over(crew, None)
        dist.destroy_process_group()


def help_out(allowed_factories: Collection[str] = ()) -> None:
    """Share the fine-tunings of the process that leads, until it is done."""
    _help(_JOINED[0], allowed_factories)
    leave()


def work(folder: Path, rank: int, size: int, allowed_factories: Collection[str]) -> None:
    """Be one of the processes that a leader on this machine has started."""
    store = dist.FileStore(str(folder / STORE), size)  # type: ignore[attr-defined]
    store.set(f"ready {rank}", "")
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    _help(_Crew(rank, size, dist.new_group(backend="gloo", timeout=WAIT)), allowed_factories)
    dist.destroy_process_group()


# --- the leader


@contextmanager
def _crew(compute: ComputeSettings, start: Network) -> Iterator[_Crew | None]:
    """Give those who compute together: those that there are, those that are asked for, or none."""
    if _JOINED:
        yield _JOINED[0]
    elif compute.processes == 1:
        yield None
    else:
        threads, patience = torch.get_num_threads(), 0.0
        with tempfile.TemporaryDirectory(prefix="sustain-processes-") as name:
            crew = _Crew(0, compute.processes, None, folder=Path(name))
            try:
                _start(crew, Path(name), start.config.architecture)
                yield crew
                with contextlib.suppress(RuntimeError):  # one that dies now is missed by nobody
                    _hand_over(crew, None)
                patience = END_SECONDS
            finally:
                _end(crew, patience)
                torch.set_num_threads(threads)


def _start(crew: _Crew, folder: Path, architecture: str) -> None:
    """Start the others on this machine, and let all find each other."""
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    environment = {
        **os.environ,
        "GLOO_SOCKET_IFNAME": loopback,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    for rank in range(1, crew.size):
        words = (folder, rank, crew.size, *([architecture] if is_factory(architecture) else []))
        with _log(folder, rank).open("wb") as log:
            process = subprocess.Popen(  # noqa: S603 - our own command
                [sys.executable, "-P", "-m", "sft.processes", *map(str, words)],
                env={**environment, "LOCAL_RANK": str(rank)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        crew.started.append(process)
    store = dist.FileStore(str(folder / STORE), crew.size)  # type: ignore[attr-defined]
    end = time.monotonic() + START_SECONDS
    while not store.check([f"ready {rank}" for rank in range(1, crew.size)]):
        if _dead(crew) or time.monotonic() > end:
            _explain(crew, RuntimeError("they did not start"))
        time.sleep(0.05)
    with _environment("GLOO_SOCKET_IFNAME", loopback):
        dist.init_process_group("gloo", store=store, rank=0, world_size=crew.size)
        crew.orders = dist.new_group(backend="gloo", timeout=WAIT)


def _end(crew: _Crew, patience: float) -> None:
    """End those that were started; none is left, whatever happened."""
    end = time.monotonic() + patience
    for process in crew.started:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, end - time.monotonic()))
        process.kill()
        process.wait()
    if dist.is_initialized():
        dist.destroy_process_group()


def _explain(crew: _Crew, error: RuntimeError) -> NoReturn:
    """Tell which process is gone if that is what happened; else leave the error as it is."""
    if not crew.started and _is_lost(error):
        raise ProcessError(
            f"a process that shared this fine-tuning is gone ({error}): torchrun tells which, and"
            " what it said; run the same command again on every machine"
        ) from error
    end = time.monotonic() + END_SECONDS
    while crew.started and not _dead(crew) and time.monotonic() < end and _is_lost(error):
        time.sleep(0.05)
    if not (dead := _dead(crew)):
        raise error
    code, words, rank = min((*_end_of(crew, rank), rank) for rank in dead)
    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    raise ProcessError(
        f"process {rank} of 0 to {crew.size - 1}, which shared this fine-tuning, {how}"
        f" ({words}): nothing was made; run the same command again, or set processes under"
        " [compute] lower if memory is short"
    ) from error


def _end_of(crew: _Crew, rank: int) -> tuple[int, str]:
    """Tell how a process ended: its exit code and its last words.

    The others end by a lost connection, so of several the one that was killed is the cause.
    """
    assert crew.folder is not None  # noqa: S101 - it was started from there
    said = _log(crew.folder, rank).read_text(errors="replace").strip().splitlines()
    return crew.started[rank - 1].returncode, said[-1] if said else "it said nothing"


def _is_lost(error: RuntimeError) -> bool:
    """Whether a process could not be spoken to, or never could."""
    return isinstance(error, dist.DistError) or "gloo" in str(error) or "did not" in str(error)


def _dead(crew: _Crew) -> list[int]:
    """Name those of the started processes that have ended."""
    return [rank for rank, one in enumerate(crew.started, start=1) if one.poll() is not None]


def _log(folder: Path, rank: int) -> Path:
    return folder / f"{rank}.log"


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name)
        os.environ.update({} if before is None else {name: before})


# --- the others


def _help(crew: _Crew, allowed_factories: Collection[str]) -> None:
    while True:
        with tempfile.TemporaryDirectory(prefix="sustain-tuning-") as name:
            if not _hand_over(crew, Path(name)):
                return
            given = _read(Path(name), allowed_factories)
            with contextlib.suppress(TrainingError):  # the leader has it too, and tells it
                tune_here(**given, team=crew.team(given["compute"]))


# --- a fine-tuning as a folder


def _write(
    folder: Path,
    start: Network,
    fresh: LabelledPictures,
    settings: TrainingSettings,
    compute: ComputeSettings,
    *,
    memory: LabelledPictures | None,
    anchor: Network | None,
    validation: tuple[LabelledPictures, ...],
    cache: ActivationCache | None,
) -> None:
    models.save(start, folder / "start")
    if anchor is not None:
        models.save(anchor, folder / "anchor")
    sets = {"fresh": fresh, **({} if memory is None else {"memory": memory})}
    sets |= {f"validation-{place}": data for place, data in enumerate(validation)}
    told: dict[str, Any] = {
        "settings": asdict(settings),
        "compute": {one.name: getattr(compute, one.name) for one in fields(ComputeSettings)},
        "cache": None
        if cache is None
        else [cache.max_bytes, cache.batch_size, bool(cache.compute)],
        "shapes": {name: list(data.pixels.shape) for name, data in sets.items()},
    }
    (folder / "job.json").write_text(json.dumps(told))
    for name, data in sets.items():
        weights = {} if data.weights is None else {"weights": data.weights}
        save_file({"labels": data.labels, **weights}, folder / f"{name}.safetensors")
        with (folder / f"{name}.pixels").open("wb") as file:
            for some in data.pixels.split(PICTURES):
                file.write(some.contiguous().numpy().tobytes())


def _read(folder: Path, allowed_factories: Collection[str]) -> dict[str, Any]:
    """Give the arguments of `sft.after.tune`."""
    told = json.loads((folder / "job.json").read_text())
    sets = {name: _read_set(folder, name, shape) for name, shape in told["shapes"].items()}
    networks = {
        name: models.load(folder / name, allowed_factories=allowed_factories)
        for name in ("start", "anchor")
        if (folder / name).exists()
    }
    compute, cache = _typed(ComputeSettings, told["compute"]), None
    if told["cache"] is not None:
        most, size, measured = told["cache"]
        cache = ActivationCache(most, batch_size=size, compute=compute if measured else None)
    return {
        **networks,
        "settings": _typed(TrainingSettings, told["settings"]),
        "compute": compute,
        "cache": cache,
        "fresh": sets.pop("fresh"),
        "memory": sets.pop("memory", None),
        "validation": tuple(sets.values()),
    }


def _read_set(folder: Path, name: str, shape: list[int]) -> LabelledPictures:
    size = prod(shape)
    pixels = torch.empty(0, dtype=torch.uint8)
    if size:
        path = str(folder / f"{name}.pixels")
        pixels = torch.from_file(path, shared=False, size=size, dtype=torch.uint8)
    table = load_file(folder / f"{name}.safetensors")
    ids = tuple(map(str, range(shape[0])))  # a training asks nothing of them
    return LabelledPictures(ids, pixels.view(shape), table["labels"], table.get("weights"))


def _typed(kind: type[T], values: dict[str, Any]) -> T:
    """Make settings of what JSON kept of them: each value has the type of its default."""
    default = kind()
    return kind(**{name: type(getattr(default, name))(value) for name, value in values.items()})


def _hand_over(crew: _Crew, folder: Path | None) -> bool:
    """Copy the leader's folder to the others' folders; without one, tell them to go.

    Returns:
        Whether there is a folder.
    """
    leads = crew.rank == 0
    names: list[tuple[str, int]] = []
    if leads and folder is not None:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        names = [(str(path.relative_to(folder)), path.stat().st_size) for path in files]
    told = bytearray(json.dumps(names).encode())
    size = torch.tensor(len(told))
    dist.broadcast(size, src=0, group=crew.orders)
    told = told if leads else bytearray(int(size))
    _broadcast(crew, told)
    for name, length in json.loads(told):
        assert folder is not None  # noqa: S101 - the others have one
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        with path.open("rb" if leads else "wb") as file:
            for start in range(0, length, CHUNK):
                n = min(CHUNK, length - start)
                some = bytearray(file.read(n)) if leads else bytearray(n)
                _broadcast(crew, some)
                if not leads:
                    file.write(some)
    return bool(json.loads(told))


def _broadcast(crew: _Crew, data: bytearray) -> None:
    """Give the leader's bytes to all, in place."""
    dist.broadcast(torch.frombuffer(data, dtype=torch.uint8), src=0, group=crew.orders)


if __name__ == "__main__":
    _folder, _rank, _size, *_factories = sys.argv[1:]
    work(Path(_folder), int(_rank), int(_size), _factories)
