"""README's commands are run as they stand there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from flows.cli import main
from flows.demo import _arrive, _mnist, _write_class_folders
from sft.dataset import LabelledPictures
from sft.models import ModelConfig, build
from sft.pictures import Preprocessing
from sft.train import TrainingSettings, fine_tune

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^\$ (.+)$", README, re.MULTILINE)


def sustain(command: str) -> str:
    """Run a command of README's in this process, from the working directory."""
    name, *arguments = shlex.split(command)
    assert name == "sustain"
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def told(beginning: str) -> str:
    """Return README's one command with this beginning."""
    (command,) = [command for command in COMMANDS if command.startswith(beginning)]
    return command


def set_up(folder: Path) -> None:
    """Do what README says between its commands: name an architecture; have pictures and a feed."""
    toml = folder / "sustain.toml"
    text = toml.read_text().replace('architecture = "" ', 'architecture = "mlp" ', 1)
    toml.write_text(text.replace("channels = 0 ", "channels = 1 ", 1))
    _write_class_folders(folder / "labelled", _mnist()[:300])
    (folder / "feed").mkdir()
    _arrive(folder / "feed", "batch", _mnist()[300:], (0,))


def test_the_first_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefect_server: str
) -> None:
    """init, bootstrap, watch and status, in README's order."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PREFECT_API_URL", prefect_server)
    sustain(told("sustain init"))
    set_up(tmp_path)
    bootstraps = [c for c in COMMANDS if c.startswith("sustain bootstrap")]
    assert "version 1 is champion" in sustain(bootstraps[0])
    assert "checks against version 1" in sustain(told("sustain watch"))
    assert "nothing to do" in sustain(told("sustain watch"))
    assert "1 ← champion" in sustain(told("sustain status"))


def test_the_other_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefect_server: str
) -> None:
    """A model that somebody has is adopted."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PREFECT_API_URL", prefect_server)
    sustain(told("sustain init"))
    set_up(tmp_path)
    classes = tuple(str(digit) for digit in range(10))
    config = ModelConfig("mlp", classes, Preprocessing(28, 28, 1), (0.5,), (0.5,))
    digits = _mnist()[500:1100]
    known = LabelledPictures(
        tuple(map(str, range(600))),
        torch.from_numpy(digits.pictures).unsqueeze(1),
        torch.from_numpy(digits.labels),
    )
    theirs = fine_tune(build(config), known, TrainingSettings(epochs=3)).network
    save_file(theirs.body.state_dict(), tmp_path / "model.safetensors")
    toml = tmp_path / "sustain.toml"
    text = toml.read_text().replace("classes = [] ", f"classes = {list(classes)} ", 1)
    toml.write_text(
        text.replace("mean = [] ", "mean = [0.5] ", 1).replace("std = [] ", "std = [0.5] ", 1)
    )
    bootstraps = [c for c in COMMANDS if c.startswith("sustain bootstrap")]
    assert "version 1 is champion" in sustain(bootstraps[1])


def test_no_command_is_left_out() -> None:
    """Every command that README shows is run by a test, or is a target of the Makefile."""
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    run = {"init animals", "bootstrap --data labelled/", "watch", "status"}
    run.add("bootstrap --data labelled/ --adopt model.safetensors")
    # tests/integration/test_backtest.py and tests/e2e/test_demo.py, on policies of their own
    run.add("backtest --policy a.toml --policy grid.toml --floor 0.85 --emit best.toml")
    run.add("up -s animals.toml -s plants.toml")  # tests/e2e/test_up.py
    for command in COMMANDS:
        program, _, rest = command.partition(" ")
        if program == "make":
            assert rest in targets
        elif program == "sustain":
            assert rest in run
        elif program == "torchrun":  # tests/integration/test_processes.py
            assert "sustain retrain -s animals.toml" in rest
        else:  # what installs, and the UI on what the demo made (tests/integration/test_browser.py)
            assert command in (
                "pip install -e . -c constraints.txt",
                ".venv/bin/sustain ui -s demo/sustain.toml",
            )


def test_every_verb_is_explained() -> None:
    """The table of commands names each verb, and `--help` of each answers."""
    for verb in main.commands:
        assert f"sustain {verb}" in README
        assert CliRunner().invoke(main, [verb, "--help"]).exit_code == 0


@pytest.mark.parametrize("page", ["README.md", "docs/figures.md", "docs/decisions.md"])
def test_no_link_is_broken(page: str) -> None:
    """What README and its pages name is there: pictures, files, and the headings in them."""
    for target in re.findall(r"\]\((?!http)([^)]+)\)", (ROOT / page).read_text()):
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
            assert anchor in {one.lower().replace(" ", "-") for one in headings}, target
