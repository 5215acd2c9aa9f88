"""What a command refuses before torch, MLflow and Prefect, which take seconds, are imported."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from flows.preflight import BootstrapError, refuse_bootstrap

RUN = """
import json, sys
from click.testing import CliRunner
from flows.cli import main
for command in json.loads(sys.argv[1]):
    done = CliRunner(env={"COLUMNS": "200"}).invoke(main, command)
    slow = sorted({"torch", "mlflow", "prefect", "evidently", "pandas"} & set(sys.modules))
    print(json.dumps([done.exit_code, " ".join(done.output.split()), slow]))
"""


def settings(folder: Path, more: str = 'architecture = "small_cnn"') -> Path:
    path = folder / "sustain.toml"
    path.write_text(f'[model]\nname = "m"\n{more}\n')
    return path


def picture(folder: Path) -> Path:
    (folder / "cat").mkdir(parents=True)
    (folder / "cat" / "1.png").write_bytes(b"x")
    return folder


def test_cheap_mistakes_are_told_before_anything_slow_is_imported(tmp_path: Path) -> None:
    """No settings, settings that are no TOML, an empty folder: each is named, and at once."""
    (tmp_path / "wrong.toml").write_text("[model")
    good, empty = settings(tmp_path), tmp_path / "empty"
    empty.mkdir()
    nowhere = str(tmp_path / "nowhere.toml")
    commands = [
        ["watch", "-s", nowhere],
        ["status", "-s", str(tmp_path / "wrong.toml")],
        ["deploy", "-s", nowhere],
        ["bootstrap", "-s", str(good), "--data", str(empty)],
    ]
    told = [
        f"error: there are no settings at {nowhere}: write them with `sustain init NAME`",
        "error: wrong.toml cannot be read as TOML: ",
        f"error: there are no settings at {nowhere}",
        f"error: the folder {empty} is empty: --data takes a folder with one folder a class",
    ]
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(commands)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(code, slow) for code, _, slow in lines] == [(1, [])] * len(commands)
    for (_, said, _), words in zip(lines, told, strict=True):
        assert words in said


@pytest.mark.parametrize(
    ("model", "data", "more", "words"),
    [
        ("", "data", {}, r"\[model\] architecture is missing: name a torchvision one"),
        (None, "nowhere", {}, "there is no folder at .*nowhere: --data takes a folder"),
        (None, "sustain.toml", {}, "sustain.toml is a file, not a folder"),
        (None, "data", {"labels": "no.csv"}, "there is no file of labels at no.csv"),
        (None, "data", {"adopt": "no.pt"}, "there are no weights to adopt at no.pt"),
        (None, "data", {"adopt": "{}/sustain.toml"}, r"name its classes under \[model\]"),
        (
            'architecture = "resnet18"\nweights = "w/mine.pt"', "data", {},
            r"there is no file at w/mine.pt, which \[model\] weights names",
        ),
    ],
)  # fmt: skip
def test_what_no_first_champion_can_be_made_from(
    tmp_path: Path, model: str | None, data: str, more: dict[str, str], words: str
) -> None:
    """Each missing thing is named with the way out."""
    path = settings(tmp_path) if model is None else settings(tmp_path, model)
    picture(tmp_path / "data")
    given = {"labels": None, "adopt": None} | {k: v.format(tmp_path) for k, v in more.items()}
    with pytest.raises(BootstrapError, match=words):
        refuse_bootstrap(path, str(tmp_path / data), **given, environ={})


def test_what_only_the_storage_or_the_environment_knows_is_left_to_later(tmp_path: Path) -> None:
    """An address is not looked up, and a variable stands for a setting that the file leaves out."""
    path = settings(tmp_path, "")
    environ = {"SUSTAIN_MODEL_ARCHITECTURE": "mlp", "SUSTAIN_MODEL_CLASSES": '["a", "b"]'}
    refuse_bootstrap(path, "s3://bucket/data", "s3://bucket/labels.csv", str(path), environ)
    data = str(picture(tmp_path / "data"))
    refuse_bootstrap(
        settings(tmp_path, 'architecture = "x"\nweights = "DEFAULT"'), data, None, None
    )


def test_linked_classes_are_left_to_who_reads_them(tmp_path: Path) -> None:
    """A folder of links is not empty: that they lead out of it is told of each, later."""
    path, data = settings(tmp_path), tmp_path / "data"
    data.mkdir()
    (data / "cat").symlink_to(picture(tmp_path / "elsewhere") / "cat")
    refuse_bootstrap(path, str(data), None, None, environ={})
