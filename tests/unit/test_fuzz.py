"""Whatever a user's files hold, only this package's own plain errors come out.

Half of the input is random; the other half is good input with some bytes changed, which gets far
deeper into a parser.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from safetensors.torch import save as save_safetensors
from samples import LENIENT, SEEN, parquet, picture

from flows.batches import read_batch
from flows.feed import list_batches
from flows.labels import read_labels
from flows.settings import SECTIONS, SettingsError, load_settings
from flows.storage import FeedError
from monitoring.features import FeatureTable
from sft.models import ModelError, read_config, read_state_dict
from sft.pictures import BadPicture, Preprocessing, decode

FAST = settings(
    max_examples=30, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
METADATA = {
    "csv": b"file_name,label,camera\n1.png,cat,a\n2.png,dog,\n",
    "jsonl": b'{"file_name": "1.png", "label": "cat"}\n{"file_name": "2.png", "label": 7}\n',
    "parquet": parquet(file_name=["1.png", "2.png"], label=["cat", None]),
}
LABELS = {
    "csv": b"sample_id,label,labelled_at\nb/1.png,cat,2026-11-22T10:00:00Z\nb/2.png,dog,\n",
    "parquet": parquet(sample_id=["b/1.png"], label=["cat"], labelled_at=["2026-11-22"]),
}
SETTINGS = (Path(__file__).parents[2] / "flows" / "template.toml").read_text()
CONFIG = {
    "architecture": "mlp",
    "classes": ["a", "b"],
    "preprocessing": {"image_size": 8, "resize_size": 8, "channels": 3},
    "mean": [0.5] * 3,
    "std": [0.5] * 3,
}
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)


@st.composite
def broken(draw: Callable[[SearchStrategy[object]], object], good: bytes) -> bytes:
    """Cut good bytes off, change some of them, and put something in between."""
    content = bytearray(good)
    for _ in range(draw(st.integers(1, 4))):  # type: ignore[call-overload]
        place = draw(st.integers(0, max(len(content) - 1, 0)))
        what = draw(st.sampled_from(["cut", "flip", "insert", "repeat"]))
        if what == "cut":
            del content[place:]  # type: ignore[misc]
        elif what == "flip" and content:
            content[place] ^= draw(st.integers(1, 255))  # type: ignore[index,operator]
        elif what == "insert":
            content[place:place] = draw(st.binary(max_size=12))  # type: ignore[misc]
        else:
            content += content[place:]  # type: ignore[misc]
    return bytes(content)


@contextmanager
def refused(error: type[Exception], words: str = "") -> Iterator[None]:
    """Let this error pass, if it says something; any other fails the test."""
    said = words or "x"
    try:
        yield
    except error as one:
        said = str(one)
    assert said.strip()
    assert words in said


def hostile(good: bytes) -> SearchStrategy[bytes]:
    return st.binary(max_size=200) | broken(good)


@FAST
@given(st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"]).flatmap(
    lambda kind: hostile(picture(1, kind))
))  # fmt: skip
def test_bytes_of_pictures(encoded: bytes) -> None:
    """A picture of the asked size, or a reason in a few words."""
    with refused(BadPicture):
        decoded = decode(encoded, Preprocessing(image_size=8), max_pixels=10_000)
        assert decoded.pixels.shape == (3, 8, 8)


@pytest.mark.parametrize("kind", METADATA)
@FAST
@given(data=st.data())
def test_metadata_of_a_batch(kind: str, data: st.DataObject) -> None:
    """Both pictures are there all the same, or the batch is refused by name."""
    content = data.draw(hostile(METADATA[kind]))
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        batch = root / "feed" / "b"
        batch.mkdir(parents=True)
        for number in (1, 2):
            (batch / f"{number}.png").write_bytes(picture(number))
        (batch / f"metadata.{kind}").write_bytes(content)
        with refused(FeedError):
            (found,) = list_batches(LENIENT, root)
            read = read_batch(found, LENIENT, root, SEEN)
            assert len(read.samples) + len(read.quarantined) >= 2


@pytest.mark.parametrize("kind", LABELS)
@FAST
@given(data=st.data())
def test_files_of_labels(kind: str, data: st.DataObject) -> None:
    """Labels are texts of named samples; what cannot be used is told."""
    content = data.draw(hostile(LABELS[kind]))
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        (root / "labels").mkdir()
        (root / "labels" / f"a.{kind}").write_bytes(content)
        with refused(FeedError):
            table = read_labels(LENIENT, root)
            assert all(isinstance(one, str) and one.strip() for one in table.labels["label"])
            assert not table.labels["sample_id"].duplicated().any()


@FAST
@given(
    st.binary(max_size=200)
    | broken(SETTINGS.replace('name = ""', 'name = "m"').encode())
    | st.tuples(st.sampled_from(sorted(SECTIONS)), st.text(max_size=12), values).map(
        lambda one: f"[{one[0]}]\n{json.dumps(one[1])} = {json.dumps(one[2])}\n".encode()
    )
)
def test_settings(content: bytes) -> None:
    """They load, or one line says which key is wrong."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "sustain.toml"
        path.write_bytes(content)
        with refused(SettingsError, "sustain.toml"):
            assert load_settings(path, environ={}).model.name


@FAST
@given(st.sampled_from(sorted(SECTIONS)), st.data())
def test_known_settings_of_any_value(section: str, data: st.DataObject) -> None:
    """Every key takes, or refuses by name, whatever TOML can write."""
    key = data.draw(st.sampled_from(sorted(SECTIONS[section].__dataclass_fields__)))
    value = data.draw(st.text(max_size=30) | values.map(json.dumps))
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "sustain.toml"
        path.write_text('[model]\nname = "m"\n')
        with refused(SettingsError):
            load_settings(path, environ={f"SUSTAIN_{section}_{key}".upper(): value})


@FAST
@given(
    hostile(json.dumps(CONFIG).encode())
    | st.tuples(st.sampled_from(sorted(CONFIG)), values).map(
        lambda one: json.dumps({**CONFIG, one[0]: one[1]}).encode()
    )
)
def test_configurations_of_a_model(content: bytes) -> None:
    """An edited configuration is a network's, or it is refused; no code is looked for."""
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "config.json").write_bytes(content)
        with refused(ModelError, "config.json"):
            assert read_config(Path(name)).classes


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
@FAST
@given(data=st.data())
def test_files_of_weights(name: str, data: st.DataObject) -> None:
    """A broken file of weights is refused; none is unpickled."""
    good = save_safetensors({"weight": torch.zeros(2, 3)})
    if name == "w.pt":
        with tempfile.NamedTemporaryFile(suffix=".pt") as file:
            torch.save({"weight": torch.zeros(2, 3)}, file.name)
            good = Path(file.name).read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(data.draw(hostile(good)))
        with refused(ModelError, name):
            state = read_state_dict(path)
            assert all(isinstance(value, torch.Tensor) for value in state.values())


def features() -> bytes:
    """Write a table as a check does."""
    two = np.zeros((2, 3), dtype=np.float32)
    table = FeatureTable(("b/1", "b/2"), two, two, pd.DataFrame({"brightness": [0.1, 0.2]}))
    with tempfile.NamedTemporaryFile(suffix=".parquet") as file:
        table.save(Path(file.name))
        return Path(file.name).read_bytes()


@FAST
@given(hostile(features()) | hostile(parquet(sample_id=["a"], embedding=[[0.0]])))
def test_tables_of_features(content: bytes) -> None:
    """What a check left behind is read, or refused by an error that the registry understands."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "features.parquet"
        path.write_bytes(content)
        with suppress(
            ValueError, KeyError, OSError
        ):  # `Registry.features` makes one of them its own
            assert FeatureTable.load(path).embedding.ndim == 2
