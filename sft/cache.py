"""A frozen part runs once: activations at the freezing boundary, kept by weights and pictures.

Head training, search and evaluation then start from them instead of from pictures. Augmented
pictures are other pictures, so each needs a pass of its own: `cut` makes a fixed number of views,
which the epochs take in turn.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from sft.batchnorm import DomainNorm
from sft.dataset import LabelledPictures
from sft.distributed import ALONE, Team
from sft.models import Network
from sft.modes import evaluating
from sft.speed import ComputeSettings, fastest_way, frozen_pass
from sft.strategies import Phase, Stage, activations, boundary, stages

BATCH_SIZE = 64
"""Pictures in a pass of the frozen part."""
LEAST_BATCH = 16
"""Fewer are filled up with copies: passes of 16 and more gave the same bits for a picture whatever
came with it (small_cnn, ResNet-18, SqueezeNet), passes of 1 to 7 did not."""
CHANGED_TOGETHER = 1024
"""Pictures that are augmented at once."""
MEMORY_BYTES = 2**30
"""For instance 10,000 pictures of 128 pixels in front of SqueezeNet's head (100 kB each), or half a
million in front of ResNet-18's (2 kB)."""
FOLDER_BYTES = 4 * 2**30
SUFFIX = ".safetensors"


def frozen_part_digest(network: Network, at: str) -> str:
    """Tell by which weights, statistics and preprocessing the activations at `at` are made.

    What comes after the boundary does not count, so a new head finds the old activations.

    Args:
        network: whose.
        at: the module that opens a stage, as `sft.strategies.boundary` names it.

    Raises:
        ValueError: no stage but the first opens with that module.
    """
    _, after = _split(network, at)
    later = tuple(f"{name}." for stage in after for name in stage.modules)
    config = network.config
    known = (
        torch.__version__, at, config.architecture, config.preprocessing, config.mean, config.std,
    )  # fmt: skip
    digest = hashlib.sha256(repr(known).encode())
    for name, value in network.state_dict().items():
        if not name.startswith(later):
            digest.update(f"\0{name} {value.dtype} {tuple(value.shape)}\0".encode())
            digest.update(_bytes(value))
    return digest.hexdigest()


class ActivationCache:
    """Activations by (digest of the frozen part, digest of the picture), least recently used out.

    The bounds are of what is kept between calls; a set that is asked for is returned whole.

    Args:
        max_bytes: kept in memory.
        folder: kept on disk too, one file for the pictures that were computed together. Each file
            appears whole and is named by its digest, so that a torn one is recomputed. A folder
            that cannot be written is no error: the activations are computed again another time.
        max_folder_bytes: kept there.
        batch_size: pictures in a pass.
        compute: how precisely; the frozen part is then run in the way that is fastest on this
            machine. Without it, as the network itself would.
    """

    def __init__(
        self,
        max_bytes: int = MEMORY_BYTES,
        *,
        folder: Path | None = None,
        max_folder_bytes: int = FOLDER_BYTES,
        batch_size: int = BATCH_SIZE,
        compute: ComputeSettings | None = None,
    ) -> None:
        for name, value in (("max_bytes", max_bytes), ("max_folder_bytes", max_folder_bytes)):
            if value < 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.max_bytes = max_bytes
        self.folder = folder
        self.max_folder_bytes = max_folder_bytes
        self.batch_size = batch_size
        self.compute = compute
        self.bytes = 0
        self._rows: OrderedDict[tuple[str, bytes], Tensor] = OrderedDict()

    def get(self, network: Network, at: str, pictures: LabelledPictures) -> Tensor:
        """Give what the module `at` is given for these pictures, (n, …).

        Only pictures that are new to this frozen part are run through it.

        Raises:
            ValueError: the network has no such boundary, or it cannot be cut there.
        """
        way = None if self.compute is None else fastest_way(network, at, self.compute)
        part = frozen_part_digest(network, at)
        if way is not None:  # each rounds in its own way
            part = hashlib.sha256(f"{part} {way}".encode()).hexdigest()
        samples = [_sample_digest(pixels) for pixels in pictures.pixels]
        found = {key: self._rows[part, key] for key in samples if (part, key) in self._rows}
        found |= self._read(part, set(samples) - found.keys())
        places = {key: place for place, key in enumerate(samples) if key not in found}
        if places:
            missing = torch.tensor(list(places.values()))
            run = frozen_pass(network, at, way) if way is not None else None
            run = run or partial(activations, network, at)
            size, least = (
                (self.batch_size, LEAST_BATCH) if way is None else (way.batch_size, way.batch_size)
            )
            computed = [
                row.clone()
                for chosen in missing.split(size)
                for row in run(_filled(pictures.pixels[chosen], least))[: len(chosen)].cpu()
            ]
            new = dict(zip(places, computed, strict=True))
            self._write(part, new)
            found |= new
        self._keep(part, found)
        if not samples:
            return activations(network, at, _empty_picture(network))[:0]
        return _stacked([found[key] for key in samples])

    def put(self, network: Network, at: str, pictures: LabelledPictures, known: Tensor) -> None:
        """Take activations (n, …) that were computed elsewhere, such as by a check of a batch."""
        if len(known) != len(pictures):
            raise ValueError(f"{len(known)} activations for {len(pictures)} pictures")
        part = frozen_part_digest(network, at)
        rows = {
            _sample_digest(pixels): row.detach().clone()
            for pixels, row in zip(pictures.pixels, known, strict=True)
        }
        new = {key: row for key, row in rows.items() if (part, key) not in self._rows}
        self._write(part, new)
        self._keep(part, rows)

    def _keep(self, part: str, rows: Mapping[bytes, Tensor]) -> None:
        for sample, row in rows.items():
            key = (part, sample)
            if key not in self._rows:
                self.bytes += row.nbytes
            self._rows[key] = row
            self._rows.move_to_end(key)
        while self.bytes > self.max_bytes:
            self.bytes -= self._rows.popitem(last=False)[1].nbytes

    def _read(self, part: str, wanted: set[bytes]) -> dict[bytes, Tensor]:
        """Read those of the wanted samples that the folder holds."""
        found: dict[bytes, Tensor] = {}
        if self.folder is None or not wanted:
            return found
        for path in sorted((self.folder / part).glob(f"*{SUFFIX}")):
            if not wanted.isdisjoint(_index(path)):
                found |= {key: row for key, row in _load(path).items() if key in wanted}
        return found

    def _write(self, part: str, rows: Mapping[bytes, Tensor]) -> None:
        size = sum(row.nbytes for row in rows.values())
        if self.folder is None or not rows or size > self.max_folder_bytes:
            return
        samples = torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.uint8)
        table = {
            "samples": samples.view(len(rows), -1),
            "activations": torch.stack([row.contiguous() for row in rows.values()]),
        }
        encoded = save_safetensors(table)
        path = self.folder / part / f"{hashlib.sha256(encoded).hexdigest()}{SUFFIX}"
        unfinished = path.with_suffix(f".{os.getpid()}.tmp")
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished.write_bytes(encoded)
            unfinished.replace(path)
            self._trim(self.folder)

    def _trim(self, folder: Path) -> None:
        """Remove what was used longest ago until the folder is within its bound."""
        files = [(path.stat(), path) for path in folder.glob("*/*") if path.is_file()]
        total = sum(about.st_size for about, _ in files)
        for about, path in sorted(files, key=lambda file: (file[0].st_mtime_ns, file[1].name)):
            if total <= self.max_folder_bytes:
                return
            path.unlink(missing_ok=True)
            total -= about.st_size


class _Played(nn.Module):
    """A frozen layer that gives what it once gave, whatever it is fed."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = (output,)  # in a tuple, so that it is no buffer

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.output[0]


class Tail(Network):
    """The part of a network after the boundary: cached activations (n, …) to logits (n, classes).

    It shares what may move with the network, under the same names: training one trains the other.
    A copy of it stands by itself. Of the frozen part it holds what each layer gave for one empty
    picture, in whose place the cached activations step at the boundary.

    Raises:
        ValueError: the network cannot be cut there.
    """

    def __init__(self, network: Network, at: str) -> None:
        before, after = _split(network, at)
        later = [network.get_submodule(name) for stage in after for name in stage.modules]
        if any(isinstance(part, DomainNorm) for module in later for part in module.modules()):
            raise ValueError(
                f"the network routes pictures to domains before {at} and needs the routes after it:"
                " activations there cannot be cached"
            )
        given = _outputs(network, [name for stage in before for name in stage.modules])
        played = {name.removeprefix("body."): _Played(output) for name, output in given.items()}
        super().__init__(network.config, _replaced(network.body, played))
        self.at = at
        self.training = network.training
        self.to(network.mean.device)
        self.register_buffer("empty", self.scaled(_empty_picture(self)), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Cached activations (n, …) to logits (n, classes)."""
        cached = pixels.to(self.mean.device, non_blocking=True)
        if not torch.is_autocast_enabled(cached.device.type):
            cached = cached.float()
        if cached.ndim == 4:  # noqa: PLR2004 - pictures: in the order that the layers before leave
            cached = cached.contiguous(memory_format=torch.channels_last)
        module = self.get_submodule(self.at)
        hook = module.register_forward_pre_hook(lambda _, given: (cached, *given[1:]), prepend=True)
        try:
            return cast("Tensor", self.body(self.empty))
        finally:
            hook.remove()


@dataclass(frozen=True)
class Cut:
    """What a phase trains when its frozen part has run already.

    Attributes:
        network: takes activations; shares what moves with the whole network.
        views: fresh samples and those to rehearse, with activations in the place of pixels; one
            pair for each augmented view, which the epochs take in turn.
        validation: likewise, never augmented.
    """

    network: Tail
    views: tuple[tuple[LabelledPictures, LabelledPictures | None], ...]
    validation: tuple[LabelledPictures, ...]


def cut(
    network: Network,
    phase: Phase,
    cache: ActivationCache,
    fresh: LabelledPictures,
    *,
    memory: LabelledPictures | None = None,
    validation: Sequence[LabelledPictures] = (),
    change: Callable[[LabelledPictures, torch.Generator], Tensor] | None = None,
    views: int = 1,
    seed: int = 0,
    team: Team = ALONE,
) -> Cut | None:
    """Run the frozen part of a phase once, over all samples.

    Do not ask for it with mixup: a blend of activations is not what a blended picture gives.

    Args:
        network: what the phase tunes.
        phase: what moves.
        cache: where activations come from and go to.
        fresh: pictures to learn.
        memory: pictures to rehearse.
        validation: sets of pictures; empty ones stay as they are.
        change: augmentation of fresh and rehearsed pictures, if any.
        views: how many times it is drawn for each picture, instead of anew in every batch; 0: then
            nothing is cached.
        seed: of these draws, so that another training with it finds the views in the cache.
        team: processes that share these passes out; each keeps all that they give.

    Returns:
        None when the phase has to train from pictures: nothing before what moves is frozen, the
        network cannot be cut there, the activations would not fit into the cache's memory, or it is
        augmented without views.
    """
    at = boundary(network, phase)
    count = views if change is not None else 1
    if at is None or not count:
        return None
    try:
        tail = Tail(network, at)
        row = activations(network, at, _empty_picture(network))
    except ValueError:
        return None
    learned = [fresh, *([] if memory is None else [memory])]
    rows = count * sum(map(len, learned)) + sum(map(len, validation))
    if rows * row.nbytes > cache.max_bytes:
        return None
    if not team.agree([float(agrees(network, tail, fresh.pixels[:2]))])[0]:
        return None

    def run(data: LabelledPictures) -> Tensor:
        n = len(data)
        if team.size == 1:
            return cache.get(network, tail.at, data)
        return team.gathered(cache.get(network, tail.at, data.take(team.rows(n).tolist())), n)

    def given(data: LabelledPictures) -> LabelledPictures:
        return replace(data, pixels=run(data)) if len(data) else data

    def view(number: int, data: LabelledPictures) -> LabelledPictures:
        if change is None:
            return given(data)
        generator = torch.Generator().manual_seed(seed + number)
        changed = [
            run(replace(part, pixels=change(part, generator)))
            for part in data.split(CHANGED_TOGETHER)
        ]
        return replace(data, pixels=torch.cat(changed))

    pairs = tuple(
        (view(number, fresh), None if memory is None else view(number, memory))
        for number in range(count)
    )
    return Cut(tail, pairs, tuple(map(given, validation)))


def _split(network: Network, at: str) -> tuple[tuple[Stage, ...], tuple[Stage, ...]]:
    """Give the stages before and after a boundary."""
    found = stages(network)
    opening = [stage.modules[0] for stage in found]
    if at not in opening[1:]:
        raise ValueError(f"no frozen part ends at {at}: it can at {', '.join(opening[1:])}")
    place = opening.index(at)
    return found[:place], found[place:]


def _outputs(network: Network, units: Sequence[str]) -> dict[str, Any]:
    """Run one empty picture; give what each of these modules gave, of those that ran once."""
    seen: dict[str, list[Any]] = {name: [] for name in units}
    with contextlib.ExitStack() as stack:
        for name in units:
            module = network.get_submodule(name)

            def note(_module: nn.Module, _given: Any, output: Any, name: str = name) -> None:
                seen[name].append(output)

            stack.callback(module.register_forward_hook(note).remove)
        with evaluating(network), torch.no_grad():
            network(_empty_picture(network))
    return {name: given[0] for name, given in seen.items() if len(given) == 1}


def _replaced(module: nn.Module, parts: Mapping[str, nn.Module]) -> nn.Module:
    """Copy the containers on the way to the parts that are replaced; all else is shared."""
    if "" in parts:
        return parts[""]
    if not parts:
        return module
    same = copy.copy(module)
    same._modules = dict(module._modules)  # noqa: SLF001 - a copy shares it with the original
    for name, child in module.named_children():
        inside = {
            path.removeprefix(name).removeprefix("."): part
            for path, part in parts.items()
            if path == name or path.startswith(f"{name}.")
        }
        same._modules[name] = _replaced(child, inside)  # noqa: SLF001
    return same


def agrees(network: Network, tail: Tail, pixels: Tensor) -> bool:
    """Whether nothing but the boundary leads from the frozen part to the rest.

    Args:
        network: the whole.
        tail: its part after the boundary.
        pixels: uint8 (n, C, H, W), which both are to answer alike.
    """
    with evaluating(network, tail), torch.no_grad():
        whole = network(pixels)
        try:
            rest = tail(activations(network, tail.at, pixels))
        except Exception:  # noqa: BLE001 - the code between layers may read anything of them
            return False  # shapes that do not follow: the parts are not called in their order
    return whole.shape == rest.shape and torch.allclose(whole, rest, rtol=1e-3, atol=1e-4)


def _empty_picture(network: Network) -> Tensor:
    preprocessing = network.config.preprocessing
    side = preprocessing.image_size
    return torch.zeros(
        1, preprocessing.channels, side, side, dtype=torch.uint8, device=network.mean.device
    )


def _stacked(rows: Sequence[Tensor]) -> Tensor:
    """Stack rows; maps with their channels last, as the layers that follow want them."""
    if rows[0].ndim != 3:  # noqa: PLR2004 - (C, H, W)
        return torch.stack(list(rows))
    return torch.stack([row.permute(1, 2, 0) for row in rows]).permute(0, 3, 1, 2)


def _filled(pixels: Tensor, least: int) -> Tensor:
    lacking = max(0, least - len(pixels))
    return torch.cat([pixels, pixels[-1:].expand(lacking, -1, -1, -1)]) if lacking else pixels


def _sample_digest(pixels: Tensor) -> bytes:
    return hashlib.sha256(f"{tuple(pixels.shape)}".encode() + _bytes(pixels)).digest()


def _bytes(value: Tensor) -> bytes:
    return value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _index(path: Path) -> set[bytes]:
    """Tell which samples a file is about; none when it is torn or gone."""
    try:
        with safe_open(path, framework="pt") as file:
            return {bytes(row.tolist()) for row in file.get_tensor("samples")}
    except (OSError, SafetensorError):
        return set()


def _load(path: Path) -> dict[bytes, Tensor]:
    """Read a file and mark it as used; a torn one is removed and holds nothing."""
    try:
        encoded = path.read_bytes()
        if hashlib.sha256(encoded).hexdigest() != path.stem:
            path.unlink(missing_ok=True)
            return {}
        os.utime(path)
    except OSError:
        return {}
    table = load_safetensors(encoded)
    return {
        bytes(key.tolist()): row.clone()
        for key, row in zip(table["samples"], table["activations"], strict=True)
    }
