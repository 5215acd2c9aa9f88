"""What can be told of a command before torch, MLflow and Prefect, which take seconds, are imported.

The flows check the same again, and what only they can know; nothing here may import them.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class SettingsError(ValueError):
    """A setting is unknown or wrong; the message names it and what is allowed."""


class BootstrapError(ValueError):
    """A first champion cannot be made; the message names the thing and the way out."""


def read_toml(path: Path) -> dict[str, Any]:
    """Read a file of settings, as it stands.

    Raises:
        SettingsError: it is missing, or is not TOML.
    """
    path = path.resolve()
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SettingsError(
            f"there are no settings at {path}: write them with `sustain init NAME`, or name the"
            " file with --settings"
        ) from error
    except (ValueError, RecursionError, OSError) as error:
        raise SettingsError(f"{path.name} cannot be read as TOML: {error}") from error


def refuse_bootstrap(
    settings_file: Path,
    data: str,
    labels: str | None,
    adopt: str | None,
    environ: Mapping[str, str] | None = None,
) -> None:
    """Refuse what no first champion can be made from, as far as paths and settings tell.

    Raises:
        SettingsError: there are no settings.
        BootstrapError: something is missing.
    """
    raw = read_toml(settings_file)
    environ = os.environ if environ is None else environ
    section = raw.get("model", {})
    told = section if isinstance(section, dict) else {}

    def stated(key: str) -> Any:
        return environ.get(f"SUSTAIN_MODEL_{key.upper()}") or told.get(key)

    require_architecture(stated("architecture"))
    if adopt is not None:
        require_weights(adopt, named=bool(stated("classes")))
    elif is_file_name(weights := str(stated("weights") or "")):
        require_start(weights, settings_file.resolve().parent)
    require_pictures(data, environ.get("SUSTAIN_FEED_LABEL_COLUMN") or _label_column(raw))
    if labels is not None and is_local(labels) and not Path(labels).expanduser().exists():
        raise BootstrapError(f"there is no file of labels at {labels}, which --labels names")


def require_architecture(architecture: object) -> None:
    """Refuse to guess what is to be trained."""
    if not architecture:
        raise BootstrapError(
            "[model] architecture is missing: name a torchvision one (such as resnet18), timm/NAME,"
            " small_cnn, mlp, or your own package.module:function"
        )


def require_weights(adopt: str, *, named: bool) -> None:
    """Refuse a finished model that is not there, or whose classes are not `named`."""
    if not Path(adopt).is_file():
        raise BootstrapError(f"there are no weights to adopt at {adopt}")
    if not named:
        raise BootstrapError(
            "to adopt a model, name its classes under [model], in the order of its head's outputs:"
            ' classes = ["cat", "dog"]'
        )


def require_start(weights: str, root: Path) -> None:
    """Refuse weights to start from that are named as a file and are in neither of two places."""
    if not (root / weights).is_file() and not Path(weights).is_file():
        raise BootstrapError(
            f"there is no file at {weights}, which [model] weights names (from {root}): correct it,"
            " or leave it empty for random weights, or take \"DEFAULT\" for torchvision's or timm's"
        )


def require_pictures(data: str, label_column: str) -> None:
    """Refuse a local folder that is not there, or in which there is no file."""
    if not is_local(data):
        return
    folder = Path(data).expanduser()
    if not folder.exists():
        raise BootstrapError(f"there is no folder at {data}: {expected(label_column)}")
    if not folder.is_dir():
        raise BootstrapError(f"{data} is a file, not a folder: {expected(label_column)}")
    # what is linked, or may not be opened, is told of when it is read
    closed: list[OSError] = []
    found = any(
        files or any((Path(at) / name).is_symlink() for name in folders)
        for at, folders, files in os.walk(folder, onerror=closed.append)
    )
    if not found and not closed:
        raise BootstrapError(f"the folder {data} is empty: {expected(label_column)}")


def expected(label_column: str) -> str:
    """Say in what forms labelled pictures may come."""
    return (
        "--data takes a folder with one folder a class and pictures in these, with pictures beside"
        f" a metadata.csv of file_name,{label_column}, or with Parquet shards of image,"
        f"{label_column}"
    )


def is_local(address: str) -> bool:
    """Whether it is a path, and no URL."""
    return "://" not in address and "::" not in address


def is_file_name(weights: str) -> bool:
    """Whether weights are named as a file, and not as published ones are."""
    return "/" in weights or weights.endswith((".safetensors", ".pt", ".pth", ".bin"))


def _label_column(raw: Mapping[str, Any]) -> str:
    section = raw.get("feed", {})
    return str(section.get("label_column", "label")) if isinstance(section, dict) else "label"
