"""What is loaded is what was registered: the files of a version, and their digests.

The manifest lists each file with its SHA-256, and the version's tag `digest` is the manifest's own.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import yaml
from pydantic import TypeAdapter

from flows import package
from flows.records import RegistryError, Version

MANIFEST = "manifest.json"
PARTS = ("model", package.REFERENCE, package.MEMORY, package.LEARNED, package.LINEAGE)
"""Files and folders of a version, beside the manifest."""
LOADER = "sft.serving"
"""The module by which MLflow loads a version."""
# MLflow writes it beside a model that is loaded by its alias; nothing of ours reads it
_NOT_OURS = "model/registered_model_meta"
_FORM = TypeAdapter(dict[str, str])


def write_manifest(folder: Path) -> str:
    """Write the manifest of all parts in a folder into it; return its digest."""
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps(_hashes(folder), indent=2, sort_keys=True) + "\n")
    return _sha256(manifest)


def check_parts(folder: Path, version: Version) -> None:
    """Check all parts and the manifest of a version, before anything of them is loaded.

    Raises:
        RegistryError: a file differs from what was registered, the loader is not this package's, or
            code came with the model.
    """
    stated, found = stated_in(folder / MANIFEST, version), _hashes(folder)
    odd = sorted(path for path in {*stated, *found} if stated.get(path) != found.get(path))
    if odd:
        raise _altered(version, odd[0])
    check_loader(folder / "model", version.number)


def check_file(file: Path, path: str, manifest: Path, version: Version) -> None:
    """Check one file of a version, whose path within it is given; raises RegistryError."""
    if stated_in(manifest, version).get(path) != _sha256(file):
        raise _altered(version, path)


def stated_in(manifest: Path, version: Version) -> dict[str, str]:
    """Read a version's manifest, if it is the one that was registered; raises RegistryError."""
    if _sha256(manifest) != version.tags.get("digest"):
        raise _altered(version, MANIFEST)
    try:
        return _FORM.validate_json(manifest.read_bytes())
    except ValueError as error:
        raise _altered(version, MANIFEST) from error


def check_loader(model: Path, number: int) -> None:
    """Refuse a model folder that would run code other than this package's; raises RegistryError."""
    try:
        content = yaml.safe_load((model / "MLmodel").read_text())
        flavor = dict(content["flavors"]["python_function"])
        loader, code = flavor.get("loader_module"), flavor.get("code")
        if not isinstance(loader, str):  # nor shown: what refers to itself can be without end
            raise TypeError("its loader_module is no text")  # noqa: TRY301
    except (OSError, KeyError, TypeError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise RegistryError(f"version {number} has no readable MLmodel file: {error}") from error
    if loader != LOADER or code:
        raise RegistryError(
            f"version {number} asks for the loader {loader!r}"
            f"{' with code of its own' if code else ''}; only {LOADER!r} is allowed, so it was not"
            " loaded: move the champion to a version that sustain wrote"
        )


def _hashes(folder: Path) -> dict[str, str]:
    files = (
        path
        for part in PARTS
        for path in ([folder / part] if (folder / part).is_file() else (folder / part).rglob("*"))
        if path.is_file()
    )
    named = ((path.relative_to(folder).as_posix(), path) for path in files)
    return {name: _sha256(path) for name, path in named if name != _NOT_OURS}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _altered(version: Version, path: str) -> RegistryError:
    return RegistryError(
        f"the files of version {version.number} are not what was registered ({path} differs), so"
        " it was not loaded: restore them, or move the champion to another version"
    )
