"""What a check does beside testing the batch as a whole, with real MLflow and Prefect."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from prefect import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterDeploymentId
from prefect.states import Completed, Failed

from flows.ask import LISTED, was_listed
from flows.bootstrap import bootstrap
from flows.cli import main
from flows.demo import Digits, _mnist, _optical
from flows.promote import promote
from flows.registry import Registry
from flows.retrain import LabelsRefusedError, retrain
from flows.settings import load_settings
from flows.watch import make_plan, watch
from sft.dataset import Role, role_of

if TYPE_CHECKING:
    from uuid import UUID

    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun
    from worlds import World


def arrive(world: World, batch: str, digits: Digits, *, camera: list[str] | None = None) -> None:
    """Let digits arrive as one batch, with a camera each if told."""
    elsewhere = world.path.parent / f"{batch}.partial"
    elsewhere.mkdir()
    for place, picture in enumerate(digits.pictures):
        Image.fromarray(picture).save(elsewhere / f"{place}.png")
    if camera is not None:
        rows = [f"{place}.png,{name}" for place, name in enumerate(camera)]
        (elsewhere / "metadata.csv").write_text("\n".join(["file_name,camera", *rows, ""]))
    elsewhere.rename(world.path.parent / "feed" / batch)


def label(world: World, batch: str, digits: Digits) -> None:
    """Drop the true labels of a batch."""
    rows = [f"{batch}/{place}.png,{truth}" for place, truth in enumerate(digits.labels)]
    path = world.path.parent / "labels" / f"{batch}.csv"
    path.write_text("\n".join(["sample_id,label", *rows, ""]))


def test_small_batches_wait_for_one_another(small_world: Callable[[str], World]) -> None:
    """Twelve, twelve and twelve digits: the third check tests all 36, and says so.

    Nothing is filled in for what a batch's name has in braces.
    """
    world = small_world("small")
    with world.path.open("a") as file:
        file.write("\n[checks]\nmin_batch = 30\n")
    optical = _optical()
    for place in range(3):
        arrive(world, f"{{{place}}}", optical[place * 12 : place * 12 + 12])
    watched = watch(str(world.path))
    assert [c.action for c in watched.checked[:2]] == ["pooled", "pooled"]
    assert watched.checked[2].alarm
    first, _, third = Registry(world.settings).checks(1)
    assert "12 pictures in all, fewer than min_batch = 30" in first.reason
    assert "drift.p_value" not in first.metrics
    assert (third.metrics["batch.samples"], third.metrics["batch.tested"]) == (12, 36)
    assert "tested together with 24 pictures of {0}, {1}" in third.tags["sustain.notes"]
    label(world, "{0}", optical[:12])  # a batch that waited is settled like any other
    assert "{0}" in watch(str(world.path)).settled
    arrive(world, "b3", optical[36:40])  # the newest check waits: nothing stumbles over it
    assert [c.action for c in watch(str(world.path)).checked] == ["pooled"]
    registry = Registry(world.settings)
    assert make_plan(registry, world.settings, datetime.now(UTC)).idle
    waits = registry.checks(1)[-1]
    folder = world.path.parent / "mlartifacts" / waits.run_id
    next(folder.rglob("features.parquet")).unlink()  # and its artifacts expire
    arrive(world, "b4", optical[40:80])
    (tested,) = watch(str(world.path)).checked
    assert tested.action != "failed"
    newest = registry.checks(1)[-1]
    assert newest.metrics["batch.tested"] == 40
    assert "the features of b3, which waited, are gone" in newest.tags["sustain.notes"]


def test_a_failed_check_is_tried_again_when_the_settings_change(
    small_world: Callable[[str], World],
) -> None:
    """The way out that its message names works, without touching the batch."""
    world = small_world("settings")
    arrive(world, "b0", _mnist()[1000:1060])
    bad = sorted((world.path.parent / "feed" / "b0").iterdir())[:20]
    for path in bad:
        path.write_bytes(b"no picture")
    (failed,) = watch(str(world.path)).checked
    assert failed.action == "failed"
    plan = make_plan(Registry(world.settings), world.settings, datetime.now(UTC))
    assert plan.idle
    assert plan.failed == 1
    world.path.write_text(world.path.read_text() + "\n[feed]\nmax_bad_share = 0.5\n")
    (checked,) = watch(str(world.path)).checked
    assert (checked.samples, checked.action) == (40, "none")


def test_the_alarm_is_a_fold_over_the_record(small_world: Callable[[str], World]) -> None:
    """Evidence is on record, a repeated watch adds nothing, and charts have steps."""
    world = small_world("fold")
    mnist = _mnist()
    for place in range(3):
        start = 1000 + place * 60
        arrive(world, f"q{place}", mnist[start : start + 60])
    quiet = watch(str(world.path))
    assert not any(c.alarm for c in quiet.checked)
    registry = Registry(world.settings)
    assert "under 10 times the batch" in registry.checks(1)[0].tags["sustain.notes"]
    before = registry.checks(1)
    arrive(world, "r0", mnist[1500:1560])
    watch(str(world.path))
    after = registry.checks(1)
    assert [c.metrics for c in after[:3]] == [c.metrics for c in before]
    assert make_plan(registry, world.settings, datetime.now(UTC)).idle
    again = watch(str(world.path))
    assert again.checked == ()
    assert [c.metrics for c in registry.checks(1)] == [c.metrics for c in after]
    (chart,) = registry._runs("monitoring", {"sustain.champion": "1"})
    points = registry.client.get_metric_history(chart.info.run_id, "drift.p_value")
    assert [point.step for point in points] == [1, 2, 3, 4]
    assert [point.value for point in points] == [c.metrics["drift.p_value"] for c in after]


def test_a_slice_that_drifts_is_found_and_settled(tmp_path: Path, prefect_server: str) -> None:
    """One camera of two sends optical digits: its slice rings, its accuracy is told by itself."""
    from worlds import SETTINGS, World

    assert prefect_server
    (tmp_path / "feed").mkdir()
    (tmp_path / "labels").mkdir()
    path = tmp_path / "sustain.toml"
    path.write_text(
        SETTINGS.format(name="slices").replace("min_labels = 30", "min_labels = 500")
        + '\n[checks]\nslices = ["camera"]\nworkspace = "reports"\n'
    )
    world = World(path)
    mnist, optical = _mnist(), _optical()
    cameras = ["left" if place % 2 else "right" for place in range(500)]
    arrive(world, "first", mnist[:500], camera=cameras)
    first = world.path.parent / "feed" / "first"
    labels = "\n".join(
        ["sample_id,label", *(f"first/{i}.png,{mnist.labels[i]}" for i in range(500)), ""]
    )
    (tmp_path / "first.csv").write_text(labels)
    first.rename(tmp_path / "first")
    bootstrap(str(path), data=str(tmp_path / "first"), labels=str(tmp_path / "first.csv"))

    both = Digits(
        np.concatenate([mnist.pictures[600:660], optical.pictures[:20]]),
        np.concatenate([mnist.labels[600:660], optical.labels[:20]]),
    )
    arrive(world, "mixed", both, camera=["left"] * 60 + ["right"] * 20)
    label(world, "mixed", both)
    watched = watch(str(path))
    assert watched.checked[0].alarm
    (check,) = Registry(world.settings).checks(1)
    assert check.metrics["drift.slices_alarmed"] == 1
    right = float(check.metrics["slice.camera right.settled"])
    assert right < float(check.metrics["slice.camera left.settled"])
    from evidently.ui.workspace import Workspace

    workspace = Workspace.create(str(tmp_path / "reports"))
    (project,) = workspace.list_projects()
    assert project.name == "slices"
    assert len(workspace.list_runs(project.id)) == 1


def test_the_list_of_wanted_labels_comes_back_filled_in(
    small_world: Callable[[str], World],
) -> None:
    """`sustain ask` writes a list; filled in and dropped into labels/, it settles the estimates.

    Only what the list drew at random stands for the batch, although the watch had not asked.
    Withdrawn again, it leaves nothing that looks like the truth.
    """
    world = small_world("ask")
    (batch,) = world.arrive(0)
    world.path.write_text(world.path.read_text().replace("min_labels = 30", "min_labels = 90"))
    watched = watch(str(world.path))
    assert watched.decision.action == "ask_for_labels"
    registry = Registry(world.settings)
    (check,) = registry.checks(1)
    files = {f.path for f in registry.client.list_artifacts(check.run_id)}
    assert {"label_requests.csv", "label_requests.html"} <= files
    assert make_plan(registry, world.settings, datetime.now(UTC)).idle
    for tag in ("sustain.requested", LISTED):
        registry.client.delete_tag(check.run_id, tag)
    assert not was_listed(registry, batch)
    to = world.path.parent / "wanted"
    result = CliRunner().invoke(main, ["ask", "-s", str(world.path), "--to", str(to)])
    assert result.exit_code == 0, result.output
    assert "90 samples are worth labelling" in result.output.replace("\n", " ")
    with (to / "label_requests.csv").open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    digits = _optical()
    for row in rows[:50]:
        row["label"] = str(digits.labels[int(Path(row["sample_id"]).stem)])
    with (to / "half.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    shutil.copy(to / "half.csv", world.path.parent / "labels")
    watched = watch(str(world.path))
    assert set(watched.settled) == {batch}
    assert all("unknown column" not in problem for problem in watched.problems)
    _, n = registry.checks(1)[0].settled
    assert 0 < n == sum(role_of(row["sample_id"]) is not Role.TRAIN for row in rows[:50]) < 50
    assert f"({n})" in CliRunner().invoke(main, ["status", "-s", str(world.path)]).output
    (world.path.parent / "labels" / "half.csv").unlink()
    watch(str(world.path))
    assert registry.checks(1)[0].settled is None
    shown = CliRunner().invoke(main, ["status", "-s", str(world.path)]).output
    assert batch in shown
    assert f"({n})" not in shown
    assert "(0)" not in shown


def test_a_version_that_labels_show_to_be_worse_is_rolled_back(
    small_world: Callable[[str], World],
) -> None:
    """Poisoned, and promoted all the same: labels that come later bring the version before back."""
    world = small_world("probation")
    optical = _optical()
    arrive(world, "poison", optical[:400])
    wrong = Digits(optical.pictures[:400], (optical.labels[:400] + 1) % 10)
    label(world, "poison", wrong)
    watch(str(world.path))
    registry = Registry(world.settings)
    promote(str(world.path), version=2, why="I know better")
    assert registry.alias("champion") == 2
    for place in (4, 5, 6, 7):
        some = optical[place * 100 : place * 100 + 100]
        arrive(world, f"later{place}", some)
        label(world, f"later{place}", some)
    watched = watch(str(world.path))
    assert watched.decision.action == "rollback"
    assert "worse than version 1" in watched.decision.reason
    assert registry.alias("champion") == 1
    assert registry.version(2).rolled_back
    settings = load_settings(world.path)
    assert make_plan(registry, settings, datetime.now(UTC)).champion.number == 1


def runs_of(client: SyncPrefectClient, deployment: UUID) -> list[FlowRun]:
    """List the runs of a deployment."""
    of_it = FlowRunFilter(deployment_id=FlowRunFilterDeploymentId(any_=[deployment]))
    return client.read_flow_runs(flow_run_filter=of_it)


def test_a_delivery_of_wrong_labels_goes_to_a_person(small_world: Callable[[str], World]) -> None:
    """Nothing is trained on labels that make no sense, and the same ones are not tried again.

    A deployment that refuses them tells the watch by the record; one whose run made nothing, since
    another version served meanwhile, is started again.
    """
    world = small_world("wrong")
    text = world.path.read_text().replace("max_wrong_share = 0.99", "max_wrong_share = 0.25")
    world.path.write_text(text)
    optical = _optical()
    arrive(world, "wrong", optical[:300])
    rng = np.random.default_rng(0)
    label(world, "wrong", Digits(optical.pictures[:300], rng.integers(0, 10, 300)))
    with get_client(sync_client=True) as client:
        given = {"settings_path": str(world.path)}
        worker = client.create_deployment(client.create_flow(retrain), "wrong", parameters=given)
        started = {watch(str(world.path)).done}
        (run,) = runs_of(client, worker)
        client.set_flow_run_state(run.id, Completed(), force=True)
        started |= {watch(str(world.path)).done, watch(str(world.path)).done}
        (run,) = (one for one in runs_of(client, worker) if one.id != run.id)
        assert len(started) == 2
        assert all("the deployment retrain/wrong was started" in words for words in started)
        with pytest.raises(LabelsRefusedError):
            retrain.fn(**run.parameters)
        client.set_flow_run_state(run.id, Failed(), force=True)
        watched = watch(str(world.path))
        assert len(runs_of(client, worker)) == 2
        client.delete_deployment(worker)
    assert watched.decision.action == "ask_for_labels"
    assert "let a person look at the labels" in watched.decision.reason
    registry = Registry(world.settings)
    assert [version.number for version in registry.versions()] == [1]
    assert "suspicious_labels.html on the run" in watched.decision.reason
    (asked,) = registry.checks(1)
    shown = {f.path for f in registry.client.list_artifacts(asked.run_id)}
    assert {"suspicious_labels.csv", "suspicious_labels.html"} < shown
    assert make_plan(registry, world.settings, datetime.now(UTC)).idle
    arrive(world, "later", optical[300:400])
    watched = watch(str(world.path))
    assert (watched.decision.action, watched.checked[0].action) == ("ask_for_labels",) * 2
    assert "a retraining has refused these labels" in watched.decision.reason
    assert "are worth labelling" in watched.done
    assert make_plan(registry, world.settings, datetime.now(UTC)).idle
    label(world, "wrong", optical[:300])  # corrected
    text = world.path.read_text() + "\n[memory]\nin_memory_mb = 0\n"
    world.path.write_text(text)
    assert "version 2" in watch(str(world.path)).done
    second = registry.version(2)
    shown = {f.path for f in registry.client.list_artifacts(second.run_id)}
    beside = {f"{name}-against-1" for name in ("confusion", "per-class", "still-wrong")}
    assert {"training", *beside} <= {path.partition(".")[0] for path in shown}
    assert "hold-out: " in second.tags["worst_classes"]
    assert "labels are suspicious" in second.tags["labels"]
