"""Whatever a user's files hold, only this package's own plain errors come out, of bounded memory.

Half of the input is random; the other half is good input with some bytes changed, which gets far
deeper into a parser.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from safetensors.torch import save as save_safetensors
from samples import LENIENT, SEEN, parquet, picture

from flows.batches import read_batch, read_own_labels
from flows.feed import list_batches
from flows.grid import read_grid
from flows.history import tenures
from flows.labels import read_labels
from flows.manifest import check_loader, stated_in
from flows.preflight import SettingsError
from flows.records import RegistryError, Version, read_move
from flows.settings import SECTIONS, Settings, load_settings
from flows.storage import FeedError
from flows.times import read_moment
from flows.webhook import Gatekeeper, model_of, sign
from flows.webhook import Refused as Unbelieved
from monitoring.features import FeatureTable
from monitoring.sequential import Running, StreamEvidence
from sft.models import ModelConfig, ModelError, build, read_config, read_state_dict
from sft.pictures import BadPicture, Preprocessing, decode
from sft.serving import Classifier

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("a_gigabyte")]
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
POLICY = """
[policy]
min_drop = [0.05, 0.1]
retrain_when = { any = ["drift", { all = [{ drift_distance_above = [0.3, 0.4] }, "schedule"] }] }
[gate]
approval = "auto"
[feed]
url = "elsewhere"
"""
MLMODEL = """
flavors:
  python_function:
    data: data/network
    env: {conda: conda.yaml, virtualenv: python_env.yaml}
    loader_module: sft.serving
mlflow_version: 3.17.2
"""
MOVE = {"before": 1, "after": 2, "by": "promote", "why": "", "at": "2026-11-22T10:00:00+00:00"}
DEEP = [b"[" * 20_000, b'{"a":' * 20_000, b"a = " + b"[" * 20_000]
"""Lists in lists in lists: more than a parser that calls itself can take."""
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
    return st.binary(max_size=200) | broken(good) | st.sampled_from(DEEP)


@given(st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"]).flatmap(
    lambda kind: hostile(picture(1, kind))
))  # fmt: skip
def test_bytes_of_pictures(encoded: bytes) -> None:
    """A picture of the asked size, or a reason in a few words."""
    with refused(BadPicture):
        decoded = decode(encoded, Preprocessing(image_size=8), max_pixels=10_000)
        assert decoded.pixels.shape == (3, 8, 8)


@pytest.mark.parametrize("kind", METADATA)
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


@given(
    hostile(json.dumps(CONFIG).encode())
    | st.tuples(st.sampled_from([*sorted(CONFIG), "task", "members", "domains"]), values).map(
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


@given(data=st.data())
def test_shards_of_pictures(data: st.DataObject) -> None:
    """What can be read of them is read, and the rest is quarantined."""
    good = parquet(
        image=[picture(1), picture(2), None], label=["cat", "dog", None], file_name=["1", "2", "3"]
    )
    footer = len(good) - 8 - int.from_bytes(good[-8:-4], "little")
    ends = broken(good[footer:-8]).map(
        lambda end: good[:footer] + end + len(end).to_bytes(4, "little") + b"PAR1"
    )
    content = data.draw(hostile(good) | ends)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        batch = root / "feed" / "b"
        batch.mkdir(parents=True)
        (batch / "sure.png").write_bytes(picture(3))
        (batch / "shard.parquet").write_bytes(content)
        with refused(FeedError):
            (found,) = list_batches(LENIENT, root)
            labels = read_own_labels(found, LENIENT, root)
            assert all(isinstance(label, str) for label in labels.values())
            assert "b/sure.png" in list(read_batch(found, LENIENT, root, SEEN).samples["sample_id"])


@given(
    hostile(POLICY.encode())
    | st.tuples(st.sampled_from(sorted(SECTIONS)), st.text(max_size=12), values).map(
        lambda one: f"[{one[0]}]\n{json.dumps(one[1])} = {json.dumps(one[2])}\n".encode()
    )
    | values.map(lambda value: f"[policy]\nretrain_when = {json.dumps(value)}\n".encode())
    | st.sampled_from(sorted(SECTIONS)).map(lambda section: f"{section} = 3\n".encode())
)
def test_policies(content: bytes) -> None:
    """Each policy of a grid has settings, or one line says which value is wrong."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "policy.toml"
        path.write_bytes(content)
        with refused(SettingsError, "policy"):
            for candidate in itertools.islice(read_grid(path).candidates(Settings(path)), 5):
                assert candidate.name.startswith("policy")


@given(
    hostile(b'{"entity": "model_version_alias", "data": {"name": "m", "alias": "champion"}}')
    | values.map(lambda value: json.dumps({"data": {"name": value}}).encode())
    | values.map(lambda value: json.dumps({"data": value}).encode()),
    st.text(st.characters(max_codepoint=255), max_size=12) | st.just(""),
)
def test_messages_to_the_webhook(body: bytes, sent: str) -> None:
    """Signed with the secret or not, a message is taken or refused by a status of its own."""
    now = datetime.now(UTC)
    sent = sent or str(int(now.timestamp()))
    headers = {"x-mlflow-delivery-id": "1", "x-mlflow-timestamp": sent}
    headers["x-mlflow-signature"] = sign("secret", "1", sent, body).decode()
    asked: list[str] = []
    for signed in (headers, {**headers, "x-mlflow-signature": sent}):
        with refused(Unbelieved):
            wanted = model_of(Gatekeeper("secret").admit(signed, body, now))
            assert wanted is None or isinstance(wanted, str)
            asked.append(signed["x-mlflow-signature"])
    assert asked in ([], [headers["x-mlflow-signature"]])


@given(
    st.text(max_size=30)
    | broken(b"2026-11-22T14:30+01:00").map(lambda text: text.decode(errors="replace"))
    | st.datetimes(timezones=st.timezones()).map(datetime.isoformat)
    | st.sampled_from(["0001-01-01T00:00+14:00", "9999-12-31T23:59-12:00"])
)
def test_moments(text: str) -> None:
    """`sustain history --at` takes a date or a time of ISO 8601, and says what else is no such."""
    with refused(ValueError, "is no ISO date or time"):
        assert read_moment(text).utcoffset() == timedelta(0)


@cache
def classifier() -> Classifier:
    """Build a network of no training."""
    config = ModelConfig("mlp", ("a", "b"), Preprocessing(8), (0.5,) * 3, (0.5,) * 3)
    return Classifier(build(config))


@given(
    st.one_of(
        st.lists(values | st.binary(max_size=20), max_size=3),
        hostile(picture(1, "JPEG")).map(lambda one: [one, base64.b64encode(one).decode()]),
        hostile(base64.b64encode(picture(1))).map(lambda one: [one.decode(errors="replace")]),
        st.lists(values, max_size=2).map(lambda some: pd.DataFrame({"image": some})),
        st.just(pd.DataFrame()),
        st.just(pd.DataFrame([["a", "b"]], columns=["image", "image"])),
        st.tuples(
            st.lists(st.integers(0, 4), max_size=5), st.sampled_from(["u1", "i8", "f4", "?", "O"])
        ).map(lambda one: np.zeros(*one)),
    )
)
def test_pictures_that_are_served(given: object) -> None:
    """Each picture gets an answer, or one line says which one cannot be read."""
    with refused(ValueError):
        answers = classifier().predict(given)  # type: ignore[arg-type]
        assert answers["class"].isin(["a", "b"]).all()


@given(
    broken(MLMODEL.encode())
    | st.binary(max_size=200)
    | st.just(b"flavors: " + b"[" * 1500)
    | values.map(lambda value: json.dumps({"flavors": value}).encode())
    | values.map(lambda value: json.dumps({"flavors": {"python_function": value}}).encode())
)
def test_files_called_mlmodel(content: bytes) -> None:
    """Only one that names this package's loader, without code, is let through."""
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "MLmodel").write_bytes(content)
        with refused(RegistryError, "version 7"):
            check_loader(Path(name), 7)
            flavor = yaml.safe_load(content)["flavors"]["python_function"]
            assert (flavor["loader_module"], flavor.get("code") or "") == ("sft.serving", "")


@given(
    hostile(json.dumps({"model/MLmodel": "ab"}).encode())
    | values.map(lambda value: json.dumps(value).encode())
)
def test_manifests(content: bytes) -> None:
    """A manifest is digests by file, or it is refused, even with the digest that was registered."""
    digest = hashlib.sha256(content).hexdigest()
    version = Version(7, "run", {"digest": digest}, datetime.now(UTC))
    with tempfile.NamedTemporaryFile() as file:
        path = Path(file.name)
        path.write_bytes(content)
        with refused(RegistryError, "version 7"):
            assert all(isinstance(one, str) for one in stated_in(path, version).values())


@given(
    hostile(json.dumps(MOVE).encode()).map(lambda text: text.decode(errors="replace"))
    | st.tuples(st.sampled_from(sorted(MOVE)), values).map(
        lambda one: json.dumps({**MOVE, one[0]: one[1]})
    )
)
def test_tags_that_people_can_edit(text: str) -> None:
    """A move on record is one, and a number is one, or the tag is named that was edited."""
    with refused(RegistryError, "the tag sustain.move.x"):
        (tenure,) = tenures([read_move(text, "sustain.move.x")])
        assert tenure.words
    version = Version(7, "run", {"parent": text, "verdict_against": text}, datetime.now(UTC))
    with refused(RegistryError, "of version 7"):
        assert isinstance(version.parent or 0, int)
    with refused(RegistryError, "of version 7"):
        assert isinstance(version.verdict_against or 0, int)


@given(
    hostile(b'{"p": 0.5, "log_e": {"joint": 0.1}, "sums": {"joint": 0.1}, "since": 3}')
    | values.map(lambda value: json.dumps({"p": 0.5, "log_e": value}).encode())
    | values.map(lambda value: json.dumps({"since": value, "sums": {"a": 1}}).encode())
)
def test_evidence_of_checks(content: bytes) -> None:
    """What a check left in its tags is read, or is no evidence."""
    text = content.decode(errors="replace")
    with refused(ValueError, "no evidence of a check"):
        assert 0 <= StreamEvidence.from_json(text).p_value <= 1
    with refused(ValueError, "no running sum"):
        assert isinstance(Running.from_json(text).since, int)
