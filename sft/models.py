"""Networks: build one with a replaced head, widen its head, save it and load it.

The truth of a saved network is two files: `model.safetensors` and `config.json`. Loading them runs
nobody's code but this package's: no pickle, and a factory of the user's own is called only when the
caller names it as allowed.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib
import json
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call

from sft.batchnorm import BatchNormError, with_domains
from sft.modes import evaluating
from sft.pictures import Preprocessing
from sft.tasks import SINGLE_LABEL, Task, from_json, to_json

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
IMAGENET_SIZE = 224
TIMM = "timm/"
HEAD_NAME = "sustain_head"
"""Attribute of a factory's network with the name of its head, which copies of it keep."""
MANY = 6
"""Layers that are named in an error, the last ones."""
LARGEST_TRIED = 1024
"""Pictures beyond this are not tried when the least that a network takes is looked for."""


class ModelError(ValueError):
    """A network cannot be built or loaded; the message names the thing and the way out."""


@dataclass(frozen=True)
class ModelConfig:
    """All that is needed, beside the weights, to rebuild a network and feed it.

    Attributes:
        architecture: a torchvision name, `timm/NAME`, `small_cnn`, `mlp`, or
            `package.module:function`.
        classes: names in the order of the head's outputs: of classes, labels or targets.
        preprocessing: how a picture becomes a tensor.
        mean, std: per channel, on pixels scaled to [0, 1].
        members: bodies that answer together; more than one make an ensemble.
        domains: sets of batch-norm statistics in each body; more than one make a bank, see
            `sft.batchnorm`.
        task: what the outputs mean.
        made_for: outputs that a factory of the user's was asked for, where its head was replaced
            since: other layers of its may have as many. 0: as many as there are classes.
    """

    architecture: str
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    mean: tuple[float, ...]
    std: tuple[float, ...]
    task: Task = SINGLE_LABEL
    members: int = 1
    domains: int = 1
    made_for: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be a network's configuration."""
        try:
            self.task.refuse(self.classes)
        except ValueError as error:
            raise ModelError(str(error)) from error
        if len(set(self.classes)) != len(self.classes):
            raise ModelError(f"classes are named twice in {list(self.classes)}")
        channels = self.preprocessing.channels
        if not len(self.mean) == len(self.std) == channels:
            raise ModelError(f"mean and std need {channels} values, one a channel")
        if self.members < 1 or self.domains < 1:
            raise ModelError(
                f"members and domains are at least 1, got {self.members} and {self.domains}"
            )
        if self.made_for < 0:
            raise ModelError(f"made_for must not be negative, got {self.made_for}")


class Ensemble(nn.Module):
    """Several bodies of one architecture that answer with the mean of their logits."""

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, scaled: Tensor) -> Tensor:
        """Scaled pictures (n, C, H, W) to logits (n, classes)."""
        return torch.stack([cast("Tensor", member(scaled)) for member in self.members]).mean(0)


class Network(nn.Module):
    """A body, one of whose layers is the head, fed with uint8 pictures.

    `forward` gives logits (n, classes), or what stands for them in another task; `embed` gives what
    the head sees and what the outputs mean, in one pass.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: ModelConfig, body: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.body = body
        shape = (1, len(config.mean), 1, 1)
        self.register_buffer("mean", torch.tensor(config.mean).view(shape), persistent=False)
        self.register_buffer("std", torch.tensor(config.std).view(shape), persistent=False)

    @property
    def bodies(self) -> tuple[nn.Module, ...]:
        """The members of an ensemble; else the body alone."""
        return tuple(self.body.members) if isinstance(self.body, Ensemble) else (self.body,)

    @property
    def head(self) -> nn.Linear | nn.Conv2d:
        """The layer whose outputs are the classes; of an ensemble, the last member's."""
        return _head(self.bodies[-1])[1]

    def forward(self, pixels: Tensor) -> Tensor:
        """Uint8 pictures (n, C, H, W) to logits (n, classes)."""
        return cast("Tensor", self.body(self.scaled(pixels)))

    def scaled(self, pixels: Tensor) -> Tensor:
        """Uint8 pictures (n, C, H, W) to what the body is given, float32, on its device."""
        given = pixels.to(self.mean.device, non_blocking=True)
        floats = given.to(torch.float32, memory_format=torch.channels_last, copy=True)
        return floats.div_(255.0).sub_(self.mean).div_(self.std)

    def features(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Uint8 pictures (n, C, H, W) to embeddings (n, d), averaged over places, and logits.

        An ensemble's is the mean of its members', which share one start and so their axes: as wide
        as that of one, so that references and drift tests cost what they cost with one.
        """
        seen: list[Tensor] = []
        heads = [_head(body)[1] for body in self.bodies]
        hooks = [h.register_forward_pre_hook(lambda _, given: seen.append(given[0])) for h in heads]
        try:
            logits = self(pixels)
        finally:
            for hook in hooks:
                hook.remove()
        embedding = seen[0] if len(seen) == 1 else torch.stack(seen[-len(heads) :]).mean(0)
        if isinstance(heads[0], nn.Conv2d):
            embedding = embedding.mean(dim=(2, 3))
        return embedding.flatten(1), logits

    def embed(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Uint8 pictures to embeddings (n, d) and answers (n, classes), both float32.

        Answers are probabilities, or the values of a regression.
        """
        with evaluating(self), torch.inference_mode():
            embedding, logits = self.features(pixels)
            return embedding.float().cpu(), self.config.task.answers(logits.float()).cpu()

    def answers(self, pixels: Tensor) -> Tensor:
        """Uint8 pictures to the answers of `embed` alone.

        Threads may call it at once on a network in evaluation mode; what `embed` hooks they share.
        """
        with evaluating(self), torch.inference_mode():
            return self.config.task.answers(self(pixels).float()).cpu()


def small_cnn(num_classes: int, preprocessing: Preprocessing) -> nn.Module:
    """Build two convolutions and a 128-d layer, for pictures of 16 to 64 pixels."""
    return nn.Sequential(
        nn.Conv2d(preprocessing.channels, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(64 * 16, 128),
        nn.ReLU(),
        nn.Linear(128, num_classes),
    )


def mlp(num_classes: int, preprocessing: Preprocessing) -> nn.Module:
    """Build a multi-layer perceptron with hidden layers of 256 and 128 units."""
    inputs = preprocessing.channels * preprocessing.image_size**2
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(inputs, 256),
        nn.ReLU(),
        nn.Linear(256, 128),
        nn.ReLU(),
        nn.Linear(128, num_classes),
    )


BUILT_IN: Mapping[str, Callable[[int, Preprocessing], nn.Module]] = {
    "small_cnn": small_cnn,
    "mlp": mlp,
}


def is_factory(architecture: str) -> bool:
    """Whether an architecture's name points to code of the user's: `package.module:function`."""
    return ":" in architecture


def build(
    config: ModelConfig,
    *,
    weights: str | Path | None = None,
    keep_head: bool = False,
    allowed_factories: Collection[str] = (),
    seed: int = 0,
) -> Network:
    """Build a network whose head has one output a class.

    Args:
        config: what to build.
        weights: None for random ones; the path of a state dict (`.safetensors`, or `.pt`/`.pth`,
            read without running code); else the name of torchvision's weights, such as `DEFAULT`,
            which is timm's only one: its tags are part of an architecture's name.
        keep_head: take the head from the weights too (adopting a finished model) instead of
            replacing it.
        allowed_factories: `package.module:function` names that may be imported and called.
        seed: for the random weights.

    Raises:
        ModelError: an unknown architecture, a factory that is not allowed, weights that do not fit
            (the first mismatches are listed), or pictures that are too small for the network.
    """
    network = _built(config, weights, allowed_factories, keep_head=keep_head, seed=seed)
    _refuse_small_pictures(network)
    if is_factory(config.architecture):
        _refuse_auxiliary_outputs(network)
    return network


def _built(
    config: ModelConfig,
    weights: str | Path | None,
    allowed_factories: Collection[str],
    *,
    keep_head: bool,
    seed: int,
) -> Network:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if weights is None:
            body = _body(config, len(config.classes), None, allowed_factories)
            return Network(config, _with_outputs(body, len(config.classes)))
        if isinstance(weights, str) and not _looks_like_path(weights):
            body = _body(config, None, weights, allowed_factories)
        else:
            state = read_state_dict(Path(weights))
            outputs = _head_rows(config, state, allowed_factories)
            body = _with_outputs(_body(config, outputs, None, allowed_factories), outputs)
            _load_strictly(body, state, f"weights {weights}", config.architecture)
        if keep_head:
            outputs = _outputs(_head(body)[1])
            if outputs != len(config.classes):
                raise ModelError(
                    f"weights {weights} have a head of {outputs} outputs, but {len(config.classes)}"
                    " classes are named: name the classes of the model, in its order"
                )
            return Network(config, body)
        config = _with_classes(replace(config, made_for=_outputs(_head(body)[1])), config.classes)
        return Network(config, _with_outputs(body, len(config.classes), anew=True))


def _with_classes(config: ModelConfig, classes: tuple[str, ...]) -> ModelConfig:
    """Give a configuration other classes, and keep what a factory's body was made for."""
    made_for = (config.made_for or len(config.classes)) if is_factory(config.architecture) else 0
    made_for = 0 if made_for == len(classes) else made_for
    return replace(config, classes=classes, made_for=made_for)


def widen(network: Network, classes: Sequence[str], *, seed: int = 0) -> Network:
    """Return a copy with a head for more classes; the rows of the old classes keep their weights.

    Raises:
        ModelError: when an old class is missing from `classes`, or the task has none that grow.
    """
    old = network.config.classes
    if not network.config.task.grows:
        raise ModelError(
            f"the targets of a {network.config.task.name} cannot grow: bootstrap a new model with"
            f" {list(classes)}"
        )
    if missing := [name for name in old if name not in classes]:
        raise ModelError(f"a widened head keeps every old class; missing: {missing}")
    config = _with_classes(network.config, (*old, *(c for c in classes if c not in old)))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        bodies = [_widened(body, len(old), len(config.classes)) for body in _copy(network).bodies]
    return Network(config, _together(bodies)).train(network.training)


def _widened(body: nn.Module, old: int, outputs: int) -> nn.Module:
    before = _head(body)[1]
    body = _with_outputs(body, outputs, anew=True)
    after = _head(body)[1]
    after.weight[:old] = before.weight
    if before.bias is not None and after.bias is not None:
        after.bias[:old] = before.bias
    return body


def save(network: Network, folder: Path) -> None:
    """Write `model.safetensors` and `config.json`, which holds the digest of the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    # a clone each, because safetensors refuses weights that two layers share
    state = {
        name: value.detach().clone(memory_format=torch.contiguous_format)
        for name, value in network.body.state_dict().items()
    }
    save_file(state, folder / WEIGHTS_FILE)
    config = asdict(network.config)
    config["task"] = to_json(network.config.task)
    config["weights_sha256"] = _sha256(folder / WEIGHTS_FILE)
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def read_config(folder: Path) -> ModelConfig:
    """Read `config.json`; raises ModelError when it is missing or is not one of ours."""
    try:
        raw = json.loads((folder / CONFIG_FILE).read_text())
        return ModelConfig(
            architecture=str(raw["architecture"]),
            classes=tuple(str(name) for name in raw["classes"]),
            preprocessing=Preprocessing(**raw["preprocessing"]),
            mean=tuple(float(value) for value in raw["mean"]),
            std=tuple(float(value) for value in raw["std"]),
            members=int(raw.get("members", 1)),  # versions from before ensembles and banks lack it
            domains=int(raw.get("domains", 1)),
            made_for=int(raw.get("made_for", 0)),
            task=from_json(raw.get("task")),
        )
    except (
        OSError, KeyError, TypeError, AttributeError,
        ValueError, OverflowError, RecursionError,  # not JSON, or refused
    ) as error:  # fmt: skip
        raise ModelError(
            f"{folder / CONFIG_FILE} is not the configuration of a model: {error}"
        ) from error


def load(folder: Path, *, allowed_factories: Collection[str] = ()) -> Network:
    """Load what `save` wrote, after its digest has been checked.

    Raises:
        ModelError: a file is missing or altered, or the model asks for a factory that is not
            allowed.
    """
    config = read_config(folder)
    expected = json.loads((folder / CONFIG_FILE).read_text()).get("weights_sha256")
    try:
        encoded = (folder / WEIGHTS_FILE).read_bytes()
    except OSError as error:
        raise ModelError(f"the weights are missing: {error}") from error
    if hashlib.sha256(encoded).hexdigest() != expected:
        raise ModelError(
            f"{folder / WEIGHTS_FILE} is not what was saved (its digest differs): take another"
            " version, or restore the file"
        )
    body = _empty(config, allowed_factories)
    try:
        state = load_safetensors(encoded)
    except SafetensorError as error:
        raise ModelError(f"{folder / WEIGHTS_FILE} is not in safetensors' form: {error}") from error
    _load_strictly(body, state, WEIGHTS_FILE, config.architecture)
    # as fine_tune leaves it: another order of the weights in memory rounds differently
    return Network(config, body).to(memory_format=torch.channels_last).eval()


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read a state dict from `.safetensors` or a torch file, without running code from it."""
    try:
        if path.suffix == ".safetensors":
            state = load_safetensors(path.read_bytes())
        else:
            _refuse_zip_bomb(path)
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ModelError(f"no weights at {path}") from error
    except Exception as error:
        raise ModelError(
            f"{path} is not a state dict of tensors: save it with"
            f" torch.save(model.state_dict(), ...) or as safetensors ({error})"
        ) from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ModelError(f"{path} does not hold a state dict of tensors")
    if all(name.startswith("module.") for name in state):  # saved from a DataParallel
        return {name.removeprefix("module."): value for name, value in state.items()}
    return dict(state)


def _refuse_zip_bomb(path: Path) -> None:
    """Refuse a file that unpacks to more than it holds; torch writes zip files uncompressed."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as packed:
            entries = packed.infolist()
        odd = [one.filename for one in entries if one.file_size > one.compress_size]
        if odd:
            raise ValueError(f"{odd[0]} in it is compressed, which torch never writes")
        if sum(one.file_size for one in entries) > path.stat().st_size:
            raise ValueError("its parts overlap, which torch never writes")


@dataclass(frozen=True)
class PublishedInput:
    """What an architecture's published weights were trained on: pixels, and a value a channel."""

    image_size: int = IMAGENET_SIZE
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD


def published_input(architecture: str) -> PublishedInput:
    """Tell what to feed an architecture of torchvision's, or by its data configuration of timm's.

    Raises:
        ModelError: timm is not installed, or has no such model.
    """
    if not architecture.startswith(TIMM):
        return PublishedInput()
    timm = _import_timm(architecture)
    known = timm.data.resolve_data_config(
        pretrained_cfg=timm.get_pretrained_cfg(architecture.removeprefix(TIMM)).to_dict()
    )
    return PublishedInput(known["input_size"][-1], tuple(known["mean"]), tuple(known["std"]))


def architectures() -> list[str]:
    """Name every architecture that can be built: the two built in, then torchvision's."""
    from torchvision import models

    return [*BUILT_IN, *models.list_models(module=models)]


def require_known(architecture: str) -> None:
    """Refuse a name of no architecture; a factory of the user's own is asked when it is called.

    Raises:
        ModelError: names those that are spelled alike.
    """
    if architecture.startswith(TIMM):
        _import_timm(architecture)
    elif not is_factory(architecture) and architecture not in architectures():
        near = _did_you_mean(architecture, architectures())
        raise ModelError(
            f"unknown architecture {architecture!r}: give a torchvision classification name,"
            f" timm/NAME, small_cnn, mlp, or package.module:function{near}"
        )


def _empty(config: ModelConfig, allowed_factories: Collection[str]) -> nn.Module:
    """Build what a configuration describes, members and domains too, to be filled with weights."""
    outputs = len(config.classes)
    bodies = [
        _with_outputs(_body(config, config.made_for or outputs, None, allowed_factories), outputs)
        for _ in range(config.members)
    ]
    if config.domains > 1:
        try:
            bodies = [with_domains(body, config.domains) for body in bodies]
        except BatchNormError as error:
            raise ModelError(f"{CONFIG_FILE} asks for {config.domains} domains: {error}") from error
    return _together(bodies)


def _together(bodies: Sequence[nn.Module]) -> nn.Module:
    return bodies[0] if len(bodies) == 1 else Ensemble(bodies)


def _body(
    config: ModelConfig,
    outputs: int | None,
    weights: str | None,
    allowed_factories: Collection[str],
) -> nn.Module:
    name = config.architecture
    if name.startswith(TIMM):
        return _timm_body(config, outputs, weights)
    if is_factory(name):
        if weights is not None:
            raise ModelError(f"{name} is your own factory: give its weights as a file, not by name")
        body = _call_factory(name, outputs or len(config.classes), allowed_factories)
        return _with_named_head(_without_auxiliaries(body), config)
    if name in BUILT_IN:
        if weights is not None:
            raise ModelError(f"{name} has no published weights ({weights!r}): leave weights empty")
        return BUILT_IN[name](outputs or len(config.classes), config.preprocessing)
    return _torchvision_body(config, outputs, weights)


def _torchvision_body(config: ModelConfig, outputs: int | None, weights: str | None) -> nn.Module:
    from torchvision import models

    name = config.architecture
    require_known(name)
    if config.preprocessing.channels != 3:  # noqa: PLR2004 - RGB
        raise ModelError(f"{name} takes pictures of 3 channels: set channels = 3")
    size = config.preprocessing.image_size
    # these are built for pictures of one size, and 224 unless told
    sized: dict[str, int | tuple[int, int]] = (
        {"image_size": size}
        if name.startswith("vit_")
        else {"input_size": (size, size)}
        if name.startswith("maxvit")
        else {}
    )
    if weights is not None:
        known = models.get_model_weights(name).__members__
        if weights not in known:
            raise ModelError(
                f"{name} has no weights called {weights!r}: torchvision has {', '.join(known)}"
            )
    try:
        if weights is not None:
            body = models.get_model(name, weights=weights, **sized)
        else:
            body = models.get_model(name, weights=None, num_classes=outputs, **sized)
    except (ValueError, AssertionError) as error:
        raise ModelError(
            f"{name} cannot be built for pictures of {size} pixels: {error}"
        ) from error
    except OSError as error:
        raise _not_fetched(name, error) from error
    return _as_loaded(body)


def _as_loaded(body: nn.Module) -> nn.Module:
    """Take off a torchvision network what its state dict would not bring back."""
    # torchvision sets this only when it fetches the weights itself, and a state dict does not hold
    # it: left alone, the network would answer otherwise once it was saved and loaded
    if hasattr(body, "transform_input"):
        setattr(body, "transform_input", True)  # noqa: B010 - as below
    return _without_auxiliaries(body)


def _without_auxiliaries(body: nn.Module) -> nn.Module:
    """Take GoogLeNet's and Inception's training heads off."""
    from torchvision import models

    if isinstance(body, models.GoogLeNet | models.Inception3):
        for auxiliary in ("aux1", "aux2", "AuxLogits"):
            if getattr(body, auxiliary, None) is not None:
                setattr(body, auxiliary, None)
        setattr(body, "aux_logits", False)  # noqa: B010 - torch types every attribute as a module
    return body


def _timm_body(config: ModelConfig, outputs: int | None, weights: str | None) -> nn.Module:
    timm = _import_timm(config.architecture)
    name = config.architecture.removeprefix(TIMM)
    seen = config.preprocessing
    if weights not in (None, "DEFAULT"):
        tags = ", ".join(timm.list_pretrained(f"{name.split('.')[0]}.*")) or "none"
        raise ModelError(
            f"{config.architecture} has no weights called {weights!r}: give DEFAULT, a file, or one"
            f" of timm's as the architecture ({tags}) with DEFAULT"
        )
    published = timm.get_pretrained_cfg(name)
    asked: dict[str, Any] = {"in_chans": seen.channels, "pretrained": weights is not None}
    if published.fixed_input_size:
        asked["img_size"] = seen.image_size
    if weights is None:
        asked["num_classes"] = outputs
    try:
        body = timm.create_model(name, **asked)
    except Exception as error:  # timm, and the hub's client, raise nearly everything
        if weights is not None:
            raise _not_fetched(config.architecture, error) from error
        raise ModelError(
            f"{config.architecture} cannot be built for pictures of {seen.image_size} pixels and"
            f" {seen.channels} channels: {error}"
        ) from error
    classifier, last = body.get_classifier(), _head(body)[1]
    inside = set(classifier.modules()) if isinstance(classifier, nn.Module) else set()
    heads = [
        layer
        for place, layer in body.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
        and _outputs(layer) == _outputs(last)
        and (layer in inside or "head" in place)
    ]
    if heads != [last] or last not in inside:
        raise ModelError(
            f"{config.architecture} answers by several heads, or by one that is not its last linear"
            " layer: take another architecture, or wrap it in a factory of your own"
        )
    return cast("nn.Module", body)


def _import_timm(architecture: str) -> Any:
    try:
        import timm
    except ImportError as error:
        raise ModelError(
            f"{architecture} needs timm, which is not installed: pip install 'sustain[timm]'"
        ) from error
    name = architecture.removeprefix(TIMM)
    if not timm.is_model(name):
        near = _did_you_mean(name, timm.list_models())
        raise ModelError(f"timm has no model called {name!r}{near}")
    return timm


def _did_you_mean(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3)
    return f"; did you mean {', '.join(near)}?" if near else ""


def _not_fetched(architecture: str, error: Exception) -> ModelError:
    return ModelError(
        f"the published weights of {architecture} cannot be fetched ({error}): check the network,"
        " or give them as a file"
    )


def _refuse_small_pictures(network: Network) -> None:
    """Try one picture of the network's own size; if it fails, say the least that would pass."""
    size = network.config.preprocessing.image_size
    error = _fails(network, size)
    if error is None:
        return
    too_small, enough = size, 2 * size
    while enough <= LARGEST_TRIED and _fails(network, enough):
        too_small, enough = enough, 2 * enough
    if enough > LARGEST_TRIED:
        raise ModelError(
            f"{network.config.architecture} cannot take pictures of {size} pixels:"
            f" {str(error) or type(error).__name__}"
        ) from error
    while enough - too_small > 1:
        middle = (too_small + enough) // 2
        if _fails(network, middle):
            too_small = middle
        else:
            enough = middle
    raise ModelError(
        f"{network.config.architecture} takes pictures of at least {enough} pixels, but image_size"
        f" is {size}: set image_size = {enough} or more under [model]"
    ) from error


def _refuse_auxiliary_outputs(network: Network) -> None:
    """Pass the shape of two pictures through a network in training mode."""
    size, channels = network.config.preprocessing.image_size, network.config.preprocessing.channels
    answers: object = torch.empty(0)
    with evaluating(network), torch.no_grad(), contextlib.suppress(Exception):
        network.train()  # what a layer cannot tell by shapes alone is left to the training
        answers = _shape_passed(network, torch.zeros(2, channels, size, size, dtype=torch.uint8))
    if not isinstance(answers, Tensor):
        raise ModelError(
            f"{network.config.architecture} answers with {_what(answers)} while it is trained: let"
            " it return one tensor (pictures, classes) then too, without auxiliary outputs"
        )


def _fails(network: Network, size: int) -> Exception | None:
    """Pass one picture through."""
    shape = (1, network.config.preprocessing.channels, size, size)
    with evaluating(network), torch.no_grad():
        try:
            _passed(network, torch.zeros(shape, dtype=torch.uint8))
        except Exception as error:  # noqa: BLE001 - torch has no kind of error for shapes
            return error
    return None


def _passed(module: nn.Module, given: Tensor) -> Any:
    """Pass a tensor through; first its shape alone, since a network may compute for long."""
    try:
        return _shape_passed(module, given)
    except Exception:  # noqa: BLE001 - also where a layer looks at numbers, not only at shapes
        return module(given)


def _shape_passed(module: nn.Module, given: Tensor) -> Any:
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    shapes = {key: value.to("meta") for key, value in state.items()}
    # with ties, a layer that occurs twice would not get its own weights back
    return functional_call(module, shapes, (given.to("meta"),), tie_weights=False)


def _call_factory(name: str, outputs: int, allowed: Collection[str]) -> nn.Module:
    if name not in allowed:
        raise ModelError(
            f"the model asks for the factory {name}, which is not allowed: only the settings can"
            f' allow it, with architecture = "{name}" under [model], or a process that serves it'
            f" with SUSTAIN_MODEL_ARCHITECTURE={name} in its environment"
        )
    module_name, _, function_name = name.partition(":")
    try:
        factory = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise ModelError(f"the factory {name} cannot be imported: {error}") from error
    body = factory(num_classes=outputs)
    if not isinstance(body, nn.Module):
        raise ModelError(f"the factory {name} returned {type(body).__name__}, not a torch module")
    return body


def _head(body: nn.Module) -> tuple[str, nn.Linear | nn.Conv2d]:
    """Give the layer that was found to be the head, or the last one, as in all of torchvision's."""
    layers = _layers(body)
    name = getattr(body, HEAD_NAME, None) or list(layers)[-1]
    return name, layers[name]


def _layers(body: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """Give the linear layers and convolutions, in the order in which they were registered."""
    layers = {
        name: module
        for name, module in body.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }
    if not layers:
        raise ModelError(f"{type(body).__name__} has no linear layer that could be its head")
    return layers


def _with_named_head(body: nn.Module, config: ModelConfig) -> nn.Module:
    """Note which layer of a network that nobody knows is the head: the one that gives its answers.

    Two empty pictures are passed through. A network that does not take them is left as it is, for
    the trial of its picture size to tell.

    Raises:
        ModelError: it does not answer with one tensor (n, outputs), or not by one layer.
    """
    name, layers = config.architecture, _layers(body)
    size = config.preprocessing.image_size
    given = torch.zeros(2, config.preprocessing.channels, size, size)
    with evaluating(body), torch.enable_grad(), _cut_open(layers) as outputs:
        try:
            answers = _passed(body, given)
        except Exception:  # noqa: BLE001 - as above
            return body
        if not isinstance(answers, Tensor) or answers.ndim != 2:  # noqa: PLR2004 - (n, outputs)
            raise ModelError(
                f"{name} answers two pictures with {_what(answers)}: let it return one tensor"
                " (pictures, classes)"
            )
        reached = _reached(answers, outputs)
    heads = [one for one in reached if _outputs(layers[one]) == answers.shape[1]]
    if len(heads) != 1:
        raise ModelError(
            f"{name} answers by {', '.join(heads) if heads else 'none'} of its linear layers and"
            f" convolutions ({_few(list(layers))}), and its head must be one of them: let one"
            f" nn.Linear or nn.Conv2d give the {answers.shape[1]} outputs, with no other after it"
        )
    setattr(body, HEAD_NAME, heads[0])
    return body


@contextlib.contextmanager
def _cut_open(
    layers: Mapping[str, nn.Linear | nn.Conv2d],
) -> Iterator[list[tuple[str, Tensor]]]:
    """Collect what layers give, each cut off from what it was made of.

    So the gradient of an answer leads back to those layers only that no other one follows.
    """
    outputs: list[tuple[str, Tensor]] = []
    with contextlib.ExitStack() as stack:
        for name, layer in layers.items():

            def cut(_layer: nn.Module, _given: Any, output: Tensor, name: str = name) -> Tensor:
                leaf = output.detach().requires_grad_()
                outputs.append((name, leaf))
                return leaf.clone()  # what follows may change it in place

            stack.callback(layer.register_forward_hook(cut).remove)
        yield outputs


def _reached(answers: Tensor, outputs: Sequence[tuple[str, Tensor]]) -> list[str]:
    """Name the layers whose outputs an answer is made of."""
    if not answers.requires_grad or not outputs:
        return []
    leaves = [leaf for _, leaf in outputs]
    found = torch.autograd.grad(answers.sum(), leaves, allow_unused=True)
    return list(
        dict.fromkeys(
            name for (name, _), gradient in zip(outputs, found, strict=True) if gradient is not None
        )
    )


def _what(answers: object) -> str:
    if isinstance(answers, Tensor):
        return f"a tensor {tuple(answers.shape)}"
    return f"a {type(answers).__name__}"


def _few(names: Sequence[str]) -> str:
    return ", ".join(names if len(names) <= MANY else ["…", *names[-MANY:]])


def _outputs(head: nn.Linear | nn.Conv2d) -> int:
    return head.out_features if isinstance(head, nn.Linear) else head.out_channels


def _with_outputs(body: nn.Module, outputs: int, *, anew: bool = False) -> nn.Module:
    """Give the body a head with that many outputs; `anew` replaces one that already fits."""
    name, head = _head(body)
    if _outputs(head) == outputs and not anew:
        return body
    fresh: nn.Linear | nn.Conv2d
    if isinstance(head, nn.Linear):
        fresh = nn.Linear(head.in_features, outputs, bias=head.bias is not None)
    else:
        size = cast("tuple[int, int]", head.kernel_size)
        fresh = nn.Conv2d(head.in_channels, outputs, size, bias=head.bias is not None)
    parent, _, attribute = name.rpartition(".")
    setattr(body.get_submodule(parent), attribute, fresh)
    if hasattr(body, "num_classes"):  # SqueezeNet and GoogLeNet keep the number
        setattr(body, "num_classes", outputs)  # noqa: B010 - torch types every attribute as a module
    return body


def _head_rows(
    config: ModelConfig, state: Mapping[str, Tensor], allowed_factories: Collection[str]
) -> int:
    name, _ = _head(_body(config, len(config.classes), None, allowed_factories))
    weight = state.get(f"{name}.weight")
    if weight is None:
        raise ModelError(
            f"the weights do not fit {config.architecture}: they have no {name}.weight, but"
            f" {', '.join(list(state)[:3])}, …"
        )
    return int(weight.shape[0])


def _load_strictly(
    body: nn.Module, state: Mapping[str, Tensor], what: str, architecture: str
) -> None:
    # files from before torch 0.4.1, torchvision's own among them, lack batch norm's step counters
    own = {
        name: value
        for name, value in body.state_dict().items()
        if name in state or not name.endswith(".num_batches_tracked")
    }
    wrong = [f"missing {name}" for name in own if name not in state]
    # the weights of a torchvision file may hold the auxiliary heads that were taken off
    wrong += [
        f"unexpected {name}"
        for name in state
        if name not in own and not name.lower().startswith("aux")
    ]
    wrong += [
        f"{name}: {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""  # noqa: PLR2004 - a few
        raise ModelError(f"{what} do not fit {architecture}: {'; '.join(wrong[:3])}{more}")
    fill(body, {name: state[name] for name in own})


def fill(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Take weights by their names; those that are not given stay."""
    full = module.state_dict()  # with versions of its layers, which MNASNet insists on
    full.update(weights)
    module.load_state_dict(full)


def _copy(network: Network) -> Network:
    import copy

    return copy.deepcopy(network)


def _looks_like_path(weights: str) -> bool:
    return "/" in weights or weights.endswith((".safetensors", ".pt", ".pth", ".bin"))


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
