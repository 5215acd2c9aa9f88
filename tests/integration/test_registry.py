"""The book of record on a real SQLite MLflow, with small packages made by hand and no Prefect."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path

import mlflow.pyfunc
import numpy as np
import pandas as pd
import pytest
import torch
from writers import write_at_once

import flows.tracking
from flows.check import Past, settle_check
from flows.fresh import Labels, fresh_set
from flows.manifest import MANIFEST, PARTS, write_manifest
from flows.package import Lineage, Package, build_reference
from flows.records import (
    CHALLENGER,
    CHAMPION,
    ROLLBACK,
    ChampionMovedError,
    CheckKey,
    RegistryError,
    Version,
)
from flows.registry import Registry
from flows.rollback import rollback
from flows.settings import load_settings
from monitoring.sequential import StreamEvidence
from sft.dataset import LabelledPictures, Role
from sft.memory import remember
from sft.models import ModelConfig, build
from sft.pictures import Preprocessing

CLASSES = ("cat", "dog")
NOW = datetime(2026, 11, 21, tzinfo=UTC)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the folder of the one database, which takes MLflow seconds to make."""
    return tmp_path_factory.mktemp("registry")


@pytest.fixture(scope="module")
def package() -> Package:
    size = Preprocessing(image_size=8, resize_size=8, channels=1)
    network = build(ModelConfig("mlp", CLASSES, size, (0.5,), (0.5,)), seed=0)
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (24, 1, 8, 8), np.uint8))
    names = tuple(f"b/{i}.png" for i in range(24))
    labels = torch.arange(24) % 2
    data = LabelledPictures(names, pixels, labels)
    memory = remember(data, CLASSES, [Role.HOLDOUT] * 24, "first")
    lineage = Lineage(None, "a test", {}, "none", "0")
    return Package(
        network, build_reference(network, memory, max_regimes=8), memory, table(), lineage
    )


@pytest.fixture
def registry(folder: Path, request: pytest.FixtureRequest) -> Registry:
    """Give the book of a model of this test's own."""
    path = folder / f"{request.node.name}.toml"
    name = "".join(c if c.isalnum() else "-" for c in request.node.name)
    path.write_text(f'[model]\nname = "{name}"\n')
    return again(path)


@pytest.fixture
def make(registry: Registry, package: Package) -> Callable[..., Version]:
    """Return a function that registers a version; its parent's labels are carried on."""

    def register(parent: Version | None = None, **labels: str) -> Version:
        before = None if parent is None else registry.learned(parent)
        made = replace(package, learned=table(**labels), learned_before=before)
        run_id = registry.begin_training("a test", {})
        tags = {} if parent is None else {"parent": str(parent.number)}
        version = registry.register(made, key=run_id, run_id=run_id, tags=tags)
        registry.end_run(run_id)
        return version

    return register


def again(source: Path | Registry) -> Registry:
    """Open the book anew, as the next command does."""
    path = source if isinstance(source, Path) else source.settings.path
    return Registry(load_settings(path, environ={}))


def table(**labels: str) -> pd.DataFrame:
    rows = [(f"b/{name}.png", label, "train") for name, label in labels.items()]
    return pd.DataFrame(rows, columns=["sample_id", "label", "role"], dtype="object")


def files(registry: Registry, version: Version) -> Path:
    uri = registry.client.get_run(version.run_id).info.artifact_uri
    return Path(uri.removeprefix("file://"))


def downloads(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """List what is fetched from now on."""
    fetched: list[str] = []
    plain = registry.client.download_artifacts

    def download(run_id: str, path: str, target: str) -> str:
        fetched.append(path)
        return str(plain(run_id, path, target))

    monkeypatch.setattr(registry.client, "download_artifacts", download)
    return fetched


def promote(registry: Registry, version: Version, by: str = "the gate") -> None:
    registry.move_champion(version, by=by, why="better", now=NOW)


def lost(registry: Registry) -> list[int]:
    return [v.number for v in registry.versions() if "rolled_back_at" in v.tags]


# --- the files of a version


def test_a_champion_that_mlflow_loaded_is_still_ours(
    registry: Registry, make: Callable[..., Version], monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow writes a file of its own beside a model that it loads by alias; it is let be."""
    version = make()
    promote(registry, version)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registry.uri)
    mlflow.pyfunc.load_model(f"models:/{registry.name}@champion")
    written = files(registry, version) / "model" / "registered_model_meta"
    assert written.is_file()
    assert again(registry).network(version).config.classes == CLASSES
    shutil.copy(written, written.with_name("registered_model_meta2"))
    with pytest.raises(RegistryError, match=r"registered \(model/registered_model_meta2 differs\)"):
        again(registry).network(version)


@pytest.mark.parametrize("part", [*PARTS, MANIFEST])
@pytest.mark.parametrize("what", ["altered", "gone"])
def test_a_version_whose_files_changed_is_not_loaded(
    registry: Registry, make: Callable[..., Version], part: str, what: str
) -> None:
    """Any file of any part, changed or missing, and the manifest itself."""
    version = make()
    path = files(registry, version) / part
    path = path if path.is_file() else max(p for p in path.rglob("*") if p.is_file())
    if what == "altered":
        path.write_bytes(path.read_bytes() + b" ")
    else:
        path.unlink()
    with pytest.raises(RegistryError, match=r"are not what was registered|cannot be fetched"):
        registry.verified_folder(version)


def test_classes_and_labels_are_read_without_the_weights(
    registry: Registry, make: Callable[..., Version], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two small files are fetched, each once and against the manifest, and nothing else."""
    version = make(x="cat")
    fetched = downloads(registry, monkeypatch)
    for _ in range(2):
        assert registry.config(version).classes == CLASSES
        assert registry.learned(version)["label"].tolist() == ["cat"]
    assert sorted(fetched) == [
        "learned.parquet",
        "manifest.json",
        "manifest.json",
        "model/data/network/config.json",
    ]
    path = files(registry, version)
    weights = path / "model/data/network/model.safetensors"
    weights.write_bytes(b"altered")
    assert again(registry).config(version).classes == CLASSES
    with pytest.raises(RegistryError, match=r"model\.safetensors differs"):
        again(registry).network(version)
    for name in ("learned.parquet", "model/data/network/config.json", "manifest.json"):
        (path / name).write_bytes((path / name).read_bytes() + b" ")
    with pytest.raises(RegistryError, match=r"manifest\.json differs"):
        again(registry).config(version)
    whole = (path / "manifest.json").read_bytes()[:-1]
    (path / "manifest.json").write_bytes(whole)
    with pytest.raises(RegistryError, match=r"config\.json differs"):
        again(registry).config(version)
    with pytest.raises(RegistryError, match=r"learned\.parquet differs"):
        again(registry).learned(version)


def test_a_deleted_parent_is_not_needed(registry: Registry, make: Callable[..., Version]) -> None:
    """Each version has its whole history of labels, newest first; the chain of parents just ends.

    Nor does the deletion of the champion itself, or of the one before it, stop anything.
    """
    first = make(x="cat", y="cat")
    second = make(first, x="dog")
    third = make(second, z="dog")
    for version in (first, second):
        promote(registry, version)
    for version in (first, second):
        registry.client.delete_model_version(registry.name, str(version.number))
        shutil.rmtree(files(registry, version))
    registry = again(registry)
    assert [v.number for v in registry.ancestry(third)] == [3]
    learned = registry.learned(third)
    assert learned["sample_id"].tolist() == ["b/z.png", "b/x.png", "b/x.png", "b/y.png"]
    assert learned["label"].tolist() == ["dog", "dog", "cat", "cat"]
    now = pd.DataFrame({"sample_id": ["b/x.png", "b/y.png"], "label": ["dog", "dog"]})
    assert fresh_set(Labels(now, ()), learned).table["sample_id"].tolist() == ["b/y.png"]
    assert registry.observe_moves(NOW) is None
    with pytest.raises(RegistryError, match="version 2 was the last, and it was deleted: make a"):
        registry.champion()
    registry.tag(third, verdict="promote")
    with pytest.raises(
        RegistryError, match=r"it was deleted: name one of \[3\] with `sustain roll"
    ):
        registry.champion()
    promote(registry, third, ROLLBACK)
    assert registry.champion().number == 3
    assert not lost(registry)
    with pytest.raises(RegistryError, match=r"has no version 2; there are \[3\]"):
        registry.version(2)


# --- checks


def test_the_last_failed_check_of_a_batch_counts_and_a_finished_one_more(
    registry: Registry,
) -> None:
    """So a batch that fails again after it was touched is not tried for ever."""

    def check(stamp: str, *, failed: bool) -> None:
        registry.end_run(registry.begin_check(CheckKey(1, "b", "digest"), stamp), failed=failed)
        time.sleep(0.002)  # MLflow orders by milliseconds

    check("touched once", failed=True)
    check("touched twice", failed=True)
    (record,) = registry.checks(1)
    assert (record.finished, record.stamp) == (False, "touched twice")
    check("mended", failed=False)
    check("touched later", failed=True)
    check("finished twice", failed=False)
    (record,) = registry.checks(1)
    assert (record.finished, record.stamp) == (True, "mended")


def test_an_interrupted_check_is_taken_up_with_the_stamp_of_now(registry: Registry) -> None:
    """The batch may have been touched since; its record says which state failed."""
    key = CheckKey(1, "b", "digest")
    run_id = registry.begin_check(key, "then")
    assert registry.begin_check(key, "now") == run_id
    registry.end_run(run_id, failed=True)
    assert [record.stamp for record in registry.checks(1)] == ["now"]


def test_the_newest_checks_are_enough(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of twelve checks a window is read, and the stream stands where all twelve leave it."""
    monkeypatch.setattr(flows.tracking, "WINDOW", 4)
    past = Past(registry.settings, [])
    for place in range(12):
        run_id = registry.begin_check(CheckKey(1, f"b{place}", "digest"), "")
        evidence = StreamEvidence(0.4, {"novelty": 0.05 * place})
        tags = {"sustain.stream": evidence.to_json(), **past.place(past.step(evidence)[0])}
        registry.log(run_id, tags=tags)
        registry.end_run(run_id)
        past.append(registry.check_record(run_id))
        time.sleep(0.002)  # MLflow orders by milliseconds
    newest = registry.newest_checks(1)
    assert [check.number for check in newest] == [9, 10, 11, 12]
    read = Past(registry.settings, newest)
    assert read.number == past.number == 13
    assert read.running.since == past.running.since == 12
    assert read.running.sums == pytest.approx(past.running.sums, abs=2e-3)

    def found(**batches: datetime | None) -> int:
        return len(registry.newest_checks(1, batches))

    now = datetime.now(UTC)
    long_ago = now - timedelta(days=1)
    assert found(b11=long_ago) == 4
    assert found(b5=long_ago) == 8  # the page that has it, and no more
    assert found(new=long_ago) == found(new=None) == 12  # it may have been checked before all
    assert found(new=now + timedelta(hours=2)) == 12  # whose clock is wrong says nothing
    monkeypatch.setattr(flows.tracking, "SKEW", timedelta(seconds=-10))
    assert found(new=now) == 4


class Behind(datetime):
    """A clock that is put back."""

    hours = 0

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> datetime:
        return datetime.now(tz) - timedelta(hours=cls.hours)


def test_the_last_labels_count_although_the_clock_was_put_back(
    registry: Registry, make: Callable[..., Version], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong labels, "an hour earlier" right ones, before those none, and then right ones again."""
    monkeypatch.setattr(flows.tracking, "datetime", Behind)
    version = make()
    seen = registry.reference(version).regimes[0].features
    run_id = registry.begin_check(CheckKey(version.number, "b", "digest"), "")
    registry.log_features(run_id, seen)
    registry.end_run(run_id)
    right = seen.words(CLASSES)
    wrong = [CLASSES[label == CLASSES[0]] for label in right]
    expected = [(wrong, (0, 24)), (right, (1, 24)), ([], (1, 0)), (right, (1, 24))]
    for hours, (labels, told) in enumerate(expected):
        monkeypatch.setattr(Behind, "hours", hours)
        given = pd.DataFrame({"sample_id": seen.sample_ids[: len(labels)], "label": labels})
        settle_check(registry, registry.check_record(run_id), Labels(given, ()), asked=False)
        metrics = registry.check_record(run_id).metrics
        assert (metrics["accuracy.settled"], metrics["accuracy.settled_n"]) == told


# --- the champion's moves


def test_a_promotion_down_the_line_and_a_rollback(
    registry: Registry, make: Callable[..., Version]
) -> None:
    """A descendant succeeds; going back marks all that are given up, until promoted anew."""
    first = make()
    second = make(first)
    third = make(second)
    assert registry.unobserved_move() is False
    promote(registry, first, "bootstrap")
    registry.set_alias(CHALLENGER, third)
    promote(registry, third)
    assert registry.version(3).tags["promoted_from"] == "1"
    assert registry.version(3).tags["promoted_by"] == "the gate"
    assert registry.alias(CHALLENGER) is None
    assert not lost(registry)
    assert registry.observe_moves(NOW) is None
    later = NOW + timedelta(hours=1)
    move = registry.move_champion(first, by=ROLLBACK, why="worse", now=later)
    assert (move.before, move.after, move.promotes) == (3, 1, False)
    assert lost(registry) == [2, 3]
    assert registry.version(3).tags["reason"] == "worse"
    registry.move_champion(third, by="a person", why="after all", now=later + timedelta(hours=1))
    assert not registry.version(3).rolled_back
    assert registry.version(2).rolled_back


@pytest.mark.parametrize("by", ["the gate", "a person"])
@pytest.mark.parametrize("killed", [False, True])
def test_a_sideways_promotion_gives_nobody_up(
    registry: Registry,
    make: Callable[..., Version],
    monkeypatch: pytest.MonkeyPatch,
    by: str,
    killed: bool,
) -> None:
    """A sibling that was judged better succeeds, also if its promotion was killed halfway."""
    first = make()
    second, sibling = make(first), make(first)
    promote(registry, first)
    promote(registry, second)
    if killed:
        monkeypatch.setattr(registry, "_complete", lambda move: move)
    promote(registry, sibling, by)
    registry = again(registry)
    assert registry.unobserved_move() is killed
    move = registry.observe_moves(NOW)
    assert (move is not None) is killed
    assert registry.version(3).tags["promoted_from"] == "2"
    assert not lost(registry)
    registry.move_champion(registry.version(2), by=ROLLBACK, why="worse", now=NOW)
    assert lost(registry) == [3]  # and back is a rollback, though they are siblings


def test_a_verdict_against_a_champion_that_moved_moves_nothing(
    registry: Registry, make: Callable[..., Version]
) -> None:
    """Of two that were judged against version 1 the first succeeds; the second is told so."""
    first = make()
    second, third = make(first), make(first)
    promote(registry, first)
    registry.move_champion(second, by="the gate", why="better", now=NOW, instead_of=1)
    with pytest.raises(ChampionMovedError, match=r"version 1 of .* is champion no more"):
        registry.move_champion(third, by="the gate", why="better", now=NOW, instead_of=1)
    assert registry.alias(CHAMPION) == 2
    assert registry.observe_moves(NOW) is None  # the announcement is forgotten
    assert not registry.unobserved_move()
    assert "promoted_at" not in registry.version(3).tags
    assert registry.moves()[-1].after == 2


def test_moves_of_the_same_champion_keep_their_order_and_reasons(
    registry: Registry, make: Callable[..., Version]
) -> None:
    """There and back, and there again: each move stays, though the tags tell only the last."""
    first = make()
    second = make(first)
    for hour, (version, by) in enumerate(
        [(first, "bootstrap"), (second, "the gate"), (first, ROLLBACK), (second, "a person")]
    ):
        at = NOW + timedelta(hours=hour)
        registry.move_champion(version, by=by, why=f"why {hour}", now=at, who="ada")
    moves = again(registry).moves()
    assert [(m.before, m.after, m.why, m.promotes) for m in moves] == [
        (None, 1, "why 0", True),
        (1, 2, "why 1", True),
        (2, 1, "why 2", False),
        (1, 2, "why 3", True),
    ]
    assert {m.who for m in moves} == {"ada"}


REFUSED = {
    "missing": r"has no version 7; there are \[1, 2\]",
    "never judged": r"version 1 was never judged.* `sustain promote --version 1`",
    "altered": r"version 1 are not what was registered \(model/.*safetensors differs\)",
    "gone": "the files of version 1 cannot be fetched",
    "unknown": "version 1 does not load",
    "first": "version 1 is the first champion: there is none to go back to",
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_rollback_to_what_cannot_serve_moves_nothing(
    registry: Registry, make: Callable[..., Version], what: str
) -> None:
    """No such version, never judged, tampered with, deleted, or no network of ours: refused."""
    first = make()
    second = make(first)
    if what != "never judged":
        registry.tag(first, verdict="first")
    promote(registry, first)
    if what != "first":
        promote(registry, second)
    folder = files(registry, first)
    weights = folder / "model/data/network/model.safetensors"
    if what == "altered":
        weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    if what == "gone":
        shutil.rmtree(folder)
    if what == "unknown":  # and the record was altered to fit
        config = folder / "model/data/network/config.json"
        config.write_text(config.read_text().replace('"mlp"', '"no such network"'))
        registry.tag(first, digest=write_manifest(folder))
    champion, moves = registry.alias(CHAMPION), registry.moves()
    to = {"missing": 7, "first": None}.get(what, 1)
    with pytest.raises(RegistryError, match=REFUSED[what]):
        rollback.fn(str(registry.settings.path), to=to)
    assert registry.alias(CHAMPION) == champion
    assert registry.moves() == moves
    assert not registry.unobserved_move()
    assert not lost(registry)


def test_promoting_a_parent_gives_its_child_up(
    registry: Registry, make: Callable[..., Version]
) -> None:
    """Whatever command moved the alias, going back along the line is a rollback."""
    first = make()
    second = make(first)
    promote(registry, first)
    promote(registry, second)
    promote(registry, first, "a person")
    assert lost(registry) == [2]


@pytest.mark.parametrize("way", ["rollback", "by hand"])
def test_a_sideways_move_that_is_no_promotion_gives_up(
    registry: Registry, make: Callable[..., Version], way: str
) -> None:
    """The loser and its parents are marked, up to the one that both come from."""
    first = make()
    second = make(first)
    third = make(second)
    sibling = make(first)
    promote(registry, first)
    promote(registry, third)
    if way == "rollback":
        promote(registry, sibling, ROLLBACK)
    else:
        registry.client.set_registered_model_alias(registry.name, CHAMPION, "4")
        move = registry.observe_moves(NOW)
        assert move is not None
        assert (move.before, move.after, move.by, move.promotes) == (3, 4, "a person", False)
    assert lost(registry) == [2, 3]
    assert "promoted_from" not in registry.version(4).tags
    assert registry.observe_moves(NOW) is None


def test_an_announced_move_that_never_happened_is_forgotten(
    registry: Registry, make: Callable[..., Version], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the announcement and the alias, nothing has moved."""
    first = make()
    second = make(first)
    promote(registry, first)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(registry.client, "set_registered_model_alias", die)
        with pytest.raises(KeyboardInterrupt):
            promote(registry, second)
    assert registry.unobserved_move()
    assert registry.observe_moves(NOW) is None
    assert not registry.unobserved_move()
    assert "promoted_at" not in registry.version(2).tags


def test_a_version_of_somebody_elses_moves_nothing(
    registry: Registry, make: Callable[..., Version], folder: Path
) -> None:
    """Their version is refused, and ours are judged as if it had never had the alias."""
    first = make()
    second = make(first)
    promote(registry, first)
    promote(registry, second)
    theirs = registry.client.create_model_version(registry.name, source=f"{folder}/theirs")
    registry.client.set_registered_model_alias(registry.name, CHAMPION, theirs.version)
    assert registry.observe_moves(NOW) is None
    assert not lost(registry)
    with pytest.raises(RegistryError, match="sustain did not write it"):
        registry.champion()
    move = registry.move_champion(second, by=ROLLBACK, why="theirs does not load", now=NOW)
    assert (move.before, move.after) == (None, 2)
    assert not lost(registry)
    registry.client.set_registered_model_alias(registry.name, CHAMPION, theirs.version)
    registry.client.set_registered_model_alias(registry.name, CHAMPION, "1")
    seen = registry.observe_moves(NOW)
    assert seen is not None
    assert (seen.before, seen.after) == (2, 1)
    assert lost(registry) == [2]
    assert "promoted_at" not in registry.version(3).tags


def test_a_clock_that_goes_back_changes_no_order(
    registry: Registry, make: Callable[..., Version]
) -> None:
    """A rollback an hour "before" the promotion is still the later of the two."""
    first = make()
    second = make(first)
    registry.move_champion(first, by="bootstrap", why="first", now=NOW)
    registry.move_champion(second, by="promote", why="better", now=NOW + timedelta(hours=2))
    registry.move_champion(first, by=ROLLBACK, why="worse", now=NOW + timedelta(hours=1))
    assert registry.version(2).rolled_back
    assert [move.after for move in registry.moves()] == [1, 2, 1]


def test_two_write_the_same_tag_and_alias_at_once(
    registry: Registry, make: Callable[..., Version]
) -> None:
    """MLflow's store refuses the later of two first writers of a row; both succeed here."""
    write_at_once(registry, again(registry), make())
