"""What the flows do with real MLflow and Prefect, beside the demo's story."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import Image

from flows.bootstrap import BootstrapError, bootstrap
from flows.promote import promote
from flows.records import RegistryError
from flows.registry import Registry
from flows.retrain import retrain
from flows.settings import load_settings
from flows.storage import FeedError
from flows.watch import make_plan, watch
from monitoring.policy import reference_needed, smallest_fall
from sft.models import ModelError

if TYPE_CHECKING:
    from worlds import World


def test_a_check_is_on_record_in_mlflow_and_prefect(small_world: Callable[[str], World]) -> None:
    """Metrics, tags, report and features are in MLflow; Prefect has an artifact with links."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey

    world = small_world("record")
    (batch,) = world.arrive(0)
    folder = world.path.parent / "feed" / batch
    next(iter(folder.iterdir())).write_bytes(b"\x89PNG\r\n\x1a\n half a picture")
    watched = watch(str(world.path))
    registry = Registry(world.settings)
    (check,) = registry.checks(1)
    assert watched.checked[0].quarantined == 1
    assert check.metrics["batch.samples"] == 99
    assert check.metrics["drift.alarm"] == 1
    assert check.tags["mlflow.note.content"] == check.reason
    files = {f.path for f in registry.client.list_artifacts(check.run_id)}
    requests = {"label_requests.csv", "label_requests.html"}
    assert files == {"features.parquet", "quarantine.csv", "report.html"} | requests
    assert len(registry.features(check)) == 99
    with get_client(sync_client=True) as client:
        found = client.read_artifacts(
            artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=["check-record"]))
        )
    shown = str(found[0].data)
    assert registry.run_url(check.run_id, artifact="report.html") in shown
    assert check.reason in shown
    (report,) = Path(registry.client.download_artifacts(check.run_id, "")).glob("report.html")
    assert "as accuracy.settled" in report.read_text()


def test_a_batch_that_cannot_be_read_is_tried_again_when_it_changes(
    small_world: Callable[[str], World],
) -> None:
    """Too many bad pictures: the check fails by name, once; mended, the batch is checked."""
    world = small_world("mended")
    (batch,) = world.arrive(0)
    good = [*(world.path.parent / "feed" / batch).iterdir()][:40]
    kept = {path: path.read_bytes() for path in good}
    for path in good:
        path.write_bytes(b"no picture")
    (failed,) = watch(str(world.path)).checked
    assert failed.action == "failed"
    assert "40 of 100 pictures could not be read" in failed.reason
    registry = Registry(world.settings)
    plan = make_plan(registry, world.settings, datetime.now(UTC))
    assert plan.idle
    for path, content in kept.items():
        path.write_bytes(content)
    (checked,) = watch(str(world.path)).checked
    assert checked.samples == 100


def test_labels_that_come_with_their_batch_retrain_at_once(
    small_world: Callable[[str], World],
) -> None:
    """Class folders in a batch are labels: one watch run checks, settles, retrains and promotes."""
    from flows.demo import _optical, _write_class_folders

    world = small_world("at-once")
    _write_class_folders(world.path.parent / "incoming", _optical()[:200])
    (world.path.parent / "incoming").rename(world.path.parent / "feed" / "labelled")
    watched = watch(str(world.path))
    assert watched.checked[0].alarm
    assert watched.settled["labelled"] < 0.6
    assert watched.decision.action == "retrain"
    registry = Registry(world.settings)
    assert [v.verdict for v in registry.versions()] == ["first", "promote"]
    assert registry.alias("champion") == 2
    assert registry.alias("challenger") is None
    second = registry.version(2)
    assert "| better on fresh data | yes |" in str(
        registry.client.get_model_version("at-once", "2").description
    )
    learned = registry.learned(second)
    trained = set(learned[learned["role"] != "holdout"]["sample_id"])
    held = {name for r in registry.reference(second).regimes for name in r.features.sample_ids}
    assert not trained & held
    assert [r.name for r in registry.reference(second).regimes] == ["first", "since v1"]


def test_a_challenger_that_is_no_better_is_refused_once(
    small_world: Callable[[str], World],
) -> None:
    """Random labels make a version that the gate refuses; the same labels never make another."""
    world = small_world("poison")
    (batch,) = world.arrive(0)
    rng = np.random.default_rng(0)
    names = sorted(p.name for p in (world.path.parent / "feed" / batch).iterdir())
    rows = [f"{batch}/{name},{rng.integers(10)}" for name in names]
    text = "\n".join(["sample_id,label", *rows, ""])
    (world.path.parent / "labels" / "wrong.csv").write_text(text)
    watched = watch(str(world.path))
    registry = Registry(world.settings)
    second = registry.version(2)
    assert second.verdict in ("refuse", "inconclusive")
    assert registry.alias("champion") == 1
    assert "was not promoted" in watched.done
    again = watch(str(world.path))
    assert again.decision.action == "ask_for_labels"
    assert "already made version 2, which got the verdict" in again.decision.reason
    assert make_plan(registry, world.settings, datetime.now(UTC)).idle
    assert not retrain(str(world.path)).made_now
    assert [v.number for v in registry.versions()] == [1, 2]
    assert not promote(str(world.path), version=2).promoted
    assert promote(str(world.path), version=2, why="I know better").promoted  # a person may
    assert registry.version(2).tags["promoted_why"] == "I know better"


def test_a_new_class_widens_the_head(small_world: Callable[[str], World]) -> None:
    """A class that the settings name and the champion lacks is learned; old answers stay known."""
    world = small_world("wider")
    ids = world.arrive(0, 1)
    from flows.demo import _optical

    digits = _optical()
    paths = [p for batch in ids for p in (world.path.parent / "feed" / batch).iterdir()]
    labels = [digits.labels[int(path.stem)] for path in paths]
    rows = [
        f"{path.parent.name}/{path.name},{'nine' if label == 9 else label}"
        for path, label in zip(paths, labels, strict=True)
    ]
    text = "\n".join(["sample_id,label", *rows, ""])
    (world.path.parent / "labels" / "1.csv").write_text(text)
    registry = Registry(world.settings)
    plan = make_plan(registry, world.settings, datetime.now(UTC))
    assert any("nine" in problem for problem in plan.labels.problems)
    classes = [str(digit) for digit in range(10)] + ["nine"]
    world.path.write_text(
        world.path.read_text().replace("[model]", f"[model]\nclasses = {classes}")
    )
    retrain(str(world.path))
    newest = registry.versions()[-1]
    assert registry.config(newest).classes == tuple(classes)
    assert "nine" in set(registry.learned(newest)["label"])


def test_a_model_that_brings_its_own_loader_is_refused(
    small_world: Callable[[str], World],
) -> None:
    """An edited MLmodel that names other code is not loaded, even with a digest that fits."""
    world = small_world("loader")
    registry = Registry(world.settings)
    version = registry.version(1)
    (model,) = (world.path.parent / "mlartifacts" / version.run_id).rglob("MLmodel")
    model.write_text(model.read_text().replace("sft.serving", "os"))
    from flows.manifest import PARTS, write_manifest

    folder = world.path.parent / "mlartifacts" / version.run_id / "artifacts"
    assert all((folder / part).exists() for part in PARTS)
    registry.tag(version, digest=write_manifest(folder))
    with pytest.raises(RegistryError, match=r"asks for the loader 'os'; only 'sft.serving'"):
        Registry(world.settings).network(registry.version(1))


def test_adopting_a_model_of_ones_own(tmp_path: Path, prefect_server: str) -> None:
    """A state dict becomes champion as it is; it is not trained, and answers as before."""
    from safetensors.torch import save_file

    from flows.demo import _mnist, _write_class_folders
    from sft.dataset import LabelledPictures
    from sft.models import ModelConfig, build
    from sft.pictures import Preprocessing
    from sft.train import TrainingSettings, fine_tune

    assert prefect_server
    classes = tuple(str(digit) for digit in range(10))
    config = ModelConfig("mlp", classes, Preprocessing(28, 28, 1), (0.5,), (0.5,))
    digits = _mnist()
    known = LabelledPictures(
        tuple(map(str, range(600))),
        torch.from_numpy(digits.pictures[:600]).unsqueeze(1),
        torch.from_numpy(digits.labels[:600]),
    )
    theirs = fine_tune(build(config), known, TrainingSettings(epochs=3)).network
    save_file(theirs.body.state_dict(), tmp_path / "theirs.safetensors")
    adopt = str(tmp_path / "theirs.safetensors")
    path = tmp_path / "sustain.toml"
    text = '[model]\nname = "own"\narchitecture = "mlp"\nchannels = 1\n'
    path.write_text(text)
    _write_class_folders(tmp_path / "held", digits[600:800])
    with pytest.raises(BootstrapError, match="name its classes under"):
        bootstrap(str(path), data=str(tmp_path / "held"), adopt=adopt)
    shuffled = f"classes = {list(classes[1:] + classes[:1])}\n"
    path.write_text(text + shuffled)
    with pytest.raises(BootstrapError, match="state the mean and std"):
        bootstrap(str(path), data=str(tmp_path / "held"), adopt=adopt)
    normal = "mean = [0.5]\nstd = [0.5]\n"
    path.write_text(text + shuffled + normal)
    with pytest.raises(BootstrapError, match="no better than a guess among 10 classes"):
        bootstrap(str(path), data=str(tmp_path / "held"), adopt=adopt)
    path.write_text(text + f"classes = {list(classes)}\n" + normal)
    made = bootstrap(str(path), data=str(tmp_path / "held"), adopt=adopt)
    least = f"{smallest_fall(made.accuracy, made.holdout) * 100:.1f} points"
    assert f"cannot show a fall of accuracy under {least}, and min_drop" in made.warning
    assert f"with some {reference_needed(made.accuracy, 0.05)} held out" in made.warning
    registry = Registry(load_settings(path))
    ours = registry.network(registry.champion())
    pixels = torch.from_numpy(_mnist().pictures[:4]).unsqueeze(1)
    assert torch.equal(ours.embed(pixels)[1], theirs.embed(pixels)[1])
    again = bootstrap(str(path), data=str(tmp_path / "held"), adopt=adopt)
    assert (made.version, again.version) == (1, 1)
    with pytest.raises(BootstrapError, match="has a champion already"):
        bootstrap(str(path), data=str(tmp_path / "held"))


def test_bootstrap_says_what_is_missing(tmp_path: Path, prefect_server: str) -> None:
    """No architecture, no labels, one class, too few pictures: each is named."""
    assert prefect_server
    path = tmp_path / "sustain.toml"
    data = tmp_path / "data"
    (data / "cat").mkdir(parents=True)
    for i in range(30):
        Image.new("L", (16, 16), i).save(data / "cat" / f"{i}.png")
    path.write_text('[model]\nname = "m"\n')
    with pytest.raises(BootstrapError, match="architecture is missing"):
        bootstrap(str(path), data=str(data))
    path.write_text('[model]\nname = "m"\narchitecture = "mlp"\n')
    (tmp_path / "labels.csv").write_text("sample_id,label\n0.png,cat\n1.png,dog\n")
    flat = tmp_path / "unlabelled"
    shutil.copytree(data / "cat", flat)
    with pytest.raises(BootstrapError, match=r"none of the 2 .* they are 0.png, 1.png, and pict"):
        bootstrap(str(path), data=str(flat), labels=str(tmp_path / "labels.csv"))
    with path.open("a") as file:
        file.write("[feed]\nmax_table_bytes = 10\n")
    with pytest.raises(FeedError, match="max_table_bytes"):
        bootstrap(str(path), data=str(flat), labels=str(tmp_path / "labels.csv"))
    path.write_text('[model]\nname = "m"\narchitecture = "mlp"\n')
    with pytest.raises(BootstrapError, match=r"all 30 labels .* are of one class \('cat'\)"):
        bootstrap(str(path), data=str(data))
    disputed = "sample_id,label\ndata/cat/0.png,dog\ndata/cat/0.png,eel\n"
    (tmp_path / "labels.csv").write_text(disputed)
    with pytest.raises(BootstrapError, match=r"all 29 labels .* are of one class \('cat'\)"):
        bootstrap(str(path), data=str(data), labels=str(tmp_path / "labels.csv"))
    shutil.copytree(data / "cat", data / "dog")
    for i in range(5, 30):
        (data / "dog" / f"{i}.png").unlink()
    (data / "cat" / "extra").mkdir()
    with pytest.raises(BootstrapError, match="to hold out"):
        bootstrap(str(path), data=str(data))
    (data / "eel").mkdir()  # a class with one sample
    shutil.copyfile(data / "cat" / "0.png", data / "eel" / "0.png")
    for i in range(5, 30):
        shutil.copyfile(data / "cat" / f"{i}.png", data / "dog" / f"{i}.png")
    path.write_text('[model]\nname = "m"\narchitecture = "mlp"\n[bootstrap]\nepochs = 1\n')
    assert bootstrap(str(path), data=str(data)).version == 1
    path.write_text('[model]\nname = "n"\narchitecture = "mlp"\nclasses = ["cat", "dog"]\n')
    with pytest.raises(BootstrapError, match=r"classes does not name: \['eel'\]"):
        bootstrap(str(path), data=str(data))
    path.write_text('[model]\nname = "n"\narchitecture = "squeezenet1_1"\nimage_size = 8\n')
    with pytest.raises(ModelError, match=r"squeezenet1_1 takes pictures of at least 17 pixels"):
        bootstrap(str(path), data=str(data))
    flat = tmp_path / "flat"
    flat.mkdir()
    Image.new("L", (16, 16)).save(flat / "1.png")
    with pytest.raises(BootstrapError, match=r"no picture in .* has a label"):
        bootstrap(str(path), data=str(flat))


def test_bootstrap_says_what_a_folder_without_pictures_should_hold(
    tmp_path: Path, prefect_server: str
) -> None:
    """It names the folder, what it found in it, and the forms that it takes."""
    assert prefect_server
    path, words = tmp_path / "sustain.toml", tmp_path / "words"
    path.write_text('[model]\nname = "m"\narchitecture = "mlp"\n')
    words.mkdir()
    (words / "read.me").write_text("elsewhere")
    with pytest.raises(BootstrapError, match=rf"^{words}: .* no pictures; .*read.me; --data takes"):
        bootstrap(str(path), data=str(words))
