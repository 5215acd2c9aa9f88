"""A torchvision model with pretrained weights from a file, on real photos and paintings."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from flows.bootstrap import bootstrap
from flows.registry import Registry
from flows.settings import load_settings
from flows.watch import watch

SHARED = Path(__file__).parents[3] / "shared" / "data"
pytestmark = pytest.mark.skipif(
    not SHARED.exists(), reason="the PACS pictures and the weights are not shipped with the product"
)


def test_photos_are_known_and_paintings_ring(tmp_path: Path, prefect_server: str) -> None:
    """SqueezeNet at 128 px: photos pass, and paintings ring."""
    assert prefect_server
    for folder in sorted((SHARED / "pacs" / "photo").iterdir()):
        paintings = sorted((SHARED / "pacs" / "art" / folder.name).iterdir())
        photos = sorted(folder.iterdir())
        parts = {
            "first": (photos[:50], folder.name + "/"),
            "feed/photos": (photos[50:62], folder.name + "-"),
            "feed/paintings": (paintings[:12], folder.name + "-"),
        }
        for target, (pictures, prefix) in parts.items():
            for picture in pictures:
                copy = tmp_path / target / f"{prefix}{picture.name}"
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(picture, copy)
    (tmp_path / "labels").mkdir()
    path = tmp_path / "sustain.toml"
    weights = SHARED / "weights" / "squeezenet1_1-imagenet.safetensors"
    path.write_text(
        f'[model]\nname = "pacs"\narchitecture = "squeezenet1_1"\nweights = "{weights}"\n'
        "image_size = 128\n[bootstrap]\nepochs = 3\nlearning_rate = 0.0003\n"
    )
    first = bootstrap(str(path), data=str(tmp_path / "first"))
    assert first.accuracy > 0.7  # of 7 classes
    checked = {c.batch_id: c for c in watch(str(path)).checked}
    assert not checked["photos"].alarm
    assert checked["paintings"].alarm
    assert checked["paintings"].action in ("watch", "ask_for_labels")  # 84 tell no more
    registry = Registry(load_settings(path))
    assert registry.network(registry.champion()).config.preprocessing.image_size == 128
