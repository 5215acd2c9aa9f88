"""Each recipe runs by the commands that it names, on small real pictures, and does what it says."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner

from flows.cli import main
from flows.demo import Digits, _mnist, _optical, _write_class_folders
from flows.records import Version
from flows.registry import Registry
from flows.settings import load_settings
from sft.dataset import LabelledPictures, Role
from sft.models import Network, build

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "deployments" / "recipes").glob("*.toml"))
SMALL = {
    "MODEL_WEIGHTS": "",  # there is no hub to fetch them from
    "MODEL_IMAGE_SIZE": "32",
    "MODEL_RESIZE_SIZE": "36",
    "BOOTSTRAP_EPOCHS": "2",
    "TRAINING_EPOCHS": "2",
    "POLICY_MIN_LABELS": "20",
    "GATE_MIN_FRESH": "5",
    "NOISE_MAX_WRONG_SHARE": "0.99",
}


@dataclass(frozen=True)
class Made:
    """What the commands of a recipe left behind."""

    folder: Path
    outputs: list[str]

    @property
    def registry(self) -> Registry:
        return Registry(load_settings(self.folder / "sustain.toml"))

    def start(self) -> Network:
        """Build the network that training started from; random weights follow from the seed."""
        registry = self.registry
        return build(registry.network(registry.version(1)).config)

    def params(self, version: Version) -> dict[str, str]:
        return dict(self.registry.client.get_run(version.run_id).data.params)


@pytest.fixture
def follow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefect_server: str
) -> Callable[..., Made]:
    """Return a function that runs a recipe's commands on pictures that `write` puts there."""

    def run(name: str, write: Callable[[Path], None], **changed: str) -> Made:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("PREFECT_API_URL", prefect_server)
        for key, value in {**SMALL, **changed}.items():
            monkeypatch.setenv(f"SUSTAIN_{key}", value)
        Path("deployments").symlink_to(ROOT / "deployments")
        write(tmp_path)
        outputs = []
        for command in commands(name):
            result = CliRunner().invoke(main, shlex.split(command)[1:], catch_exceptions=False)
            assert result.exit_code == 0, result.output
            outputs.append(" ".join(result.output.split()))
        return Made(tmp_path, outputs)

    return run


def commands(name: str) -> list[str]:
    text = (ROOT / "deployments" / "recipes" / f"{name}.toml").read_text()
    return re.findall(r"^#   (sustain .+)$", text, re.MULTILINE)


def of_each(digits: Digits, classes: int, each: int) -> Digits:
    """Take as many of each of the first classes."""
    rows = [np.flatnonzero(digits.labels == label)[:each] for label in range(classes)]
    chosen = np.concatenate(rows)
    return Digits(digits.pictures[chosen], digits.labels[chosen])


def moved(before: Network, after: Network) -> set[str]:
    old, new = before.body.state_dict(), after.body.state_dict()
    return {name for name, value in new.items() if not torch.equal(value, old[name])}


def parameters(network: Network) -> set[str]:
    return {name for name, _ in network.body.named_parameters()}


def test_every_recipe_opens_with_its_commands_and_is_followed_here() -> None:
    """None is without a test; each is explained, makes settings and bootstraps."""
    followed = set(re.findall(r'follow\(\s*"([\w-]+)"', Path(__file__).read_text()))
    assert {recipe.stem for recipe in RECIPES} == followed
    for recipe in RECIPES:
        first, second, *_ = commands(recipe.stem)
        assert recipe.read_text().startswith("# A")
        assert first.endswith(f"--recipe deployments/recipes/{recipe.name}")
        assert second.startswith("sustain bootstrap --data ")


def test_mlp_from_scratch(follow: Callable[..., Made]) -> None:
    """MNIST digits are learned by plain SGD at .01: the same loop by hand gives every bit."""
    digits = _mnist()[:300]
    made = follow(
        "mlp-from-scratch",
        lambda folder: _write_class_folders(folder / "mnist", digits),
        MODEL_IMAGE_SIZE="28",
        MODEL_RESIZE_SIZE="28",
    )
    network = made.registry.network(made.registry.champion())
    ids = [f"mnist/{label}/{place:05d}.png" for place, label in enumerate(digits.labels)]
    order = sorted(range(300), key=ids.__getitem__)  # as a listing has them
    data = LabelledPictures(
        tuple(ids[i] for i in order),
        torch.from_numpy(digits.pictures[order]).unsqueeze(1),
        torch.from_numpy(digits.labels[order]),
    ).with_role(Role.TRAIN)
    by_hand = made.start()
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        for rows in torch.randperm(len(data), generator=generator).split(64):
            loss = torch.nn.functional.cross_entropy(by_hand(data.pixels[rows]), data.labels[rows])
            gradients = torch.autograd.grad(loss, list(by_hand.parameters()))
            with torch.no_grad():
                for weight, gradient in zip(by_hand.parameters(), gradients, strict=True):
                    weight.sub_(0.01 * gradient)
    assert moved(made.start(), network) == parameters(network)
    for name, value in by_hand.body.state_dict().items():
        torch.testing.assert_close(network.body.state_dict()[name], value)


def test_resnet50_full(follow: Callable[..., Made]) -> None:
    """Everything moves, a new head has the classes, and the backbone's rate is a tenth."""
    made = follow(
        "resnet50-full",
        lambda folder: _write_class_folders(folder / "animals", of_each(_optical(), 3, 24)),
    )
    registry = made.registry
    network = registry.network(registry.champion())
    assert network.head.out_features == 3
    assert parameters(network) <= moved(made.start(), network)
    params = made.params(registry.champion())
    assert (params["strategy"], params["backbone_rate"]) == ("full", "0.1")


def test_resnet18_on_a_split_image_folder(follow: Callable[..., Made]) -> None:
    """The owner's split is kept, and SGD with momentum follows a rate that falls in steps."""
    digits = _optical()

    def write(folder: Path) -> None:
        for split, part in (
            ("train", digits[:60]),
            ("val", digits[60:80]),
            ("test", digits[80:110]),
        ):
            _write_class_folders(folder / "bees" / split, part)

    made = follow("resnet18-imagefolder", write)
    registry = made.registry
    champion = registry.champion()
    learned = registry.learned(champion)
    by_split = learned["sample_id"].str.split("/").str[1].to_numpy()
    assert pd.crosstab(by_split, learned["role"].to_numpy()).to_dict() == {
        "holdout": {"test": 30, "train": 0, "val": 0},
        "train": {"test": 0, "train": 60, "val": 0},
        "validation": {"test": 0, "train": 0, "val": 20},
    }
    assert set(registry.reference(champion).regimes[0].features.sample_ids) == set(
        learned[learned["role"] == "holdout"]["sample_id"]
    )
    assert "on 30 held-out samples" in made.outputs[1]
    network = registry.network(champion)
    assert parameters(network) <= moved(made.start(), network)
    params = made.params(champion)
    assert {key: params[key] for key in ("optimiser", "momentum", "schedule", "crop", "flip")} == {
        "optimiser": "sgd",
        "momentum": "0.9",
        "schedule": "step",
        "crop": "0.08",
        "flip": "True",
    }


def test_resnet50_frozen(follow: Callable[..., Made]) -> None:
    """Of a network for ten classes the head alone moves, by Adam."""
    made = follow(
        "resnet50-frozen",
        lambda folder: _write_class_folders(folder / "ten", of_each(_optical(), 10, 8)),
    )
    registry = made.registry
    network = registry.network(registry.champion())
    assert network.head.out_features == 10
    assert moved(made.start(), network) == {"fc.weight", "fc.bias"}
    assert made.params(registry.champion())["optimiser"] == "adam"


def test_resnet50_periodic(follow: Callable[..., Made]) -> None:
    """The first version has a new head alone; the update moves everything, the head first."""
    digits = _optical()

    def write(folder: Path) -> None:
        _write_class_folders(folder / "parts", of_each(digits, 3, 24))
        _write_class_folders(folder / "feed" / "monday", of_each(digits[400:], 3, 20))
        (folder / "labels").mkdir()

    made = follow("resnet50-periodic", write)
    registry = made.registry
    first, second = (registry.network(version) for version in registry.versions())
    assert moved(made.start(), first) == {"fc.weight", "fc.bias"}
    assert parameters(second) <= moved(first, second)
    assert "version 2" in made.outputs[2]
    params = made.params(registry.version(2))
    assert (params["strategy"], params["second_rate"]) == ("two_stage", "0.1")


def test_photographs(follow: Callable[..., Made]) -> None:
    """The first version has a new head alone; the update moves the second half of the network."""
    digits = _optical()

    def write(folder: Path) -> None:
        _write_class_folders(folder / "zoo", of_each(digits, 3, 24))
        _write_class_folders(folder / "feed" / "monday", of_each(digits[400:], 3, 20))
        (folder / "labels").mkdir()

    made = follow("photographs", write, COMPUTE_FINDINGS="findings")
    registry = made.registry
    first, second = (registry.network(version) for version in registry.versions())
    head = {"classifier.1.weight", "classifier.1.bias"}
    assert moved(made.start(), first) == head
    later = ("features.9.", "features.10.", "features.11.", "features.12.")
    assert moved(first, second) == head | {n for n in parameters(first) if n.startswith(later)}
    params = made.params(registry.version(2))
    assert (params["backbone_rate"], params["stop_by"]) == ("0.3", "accuracy")
