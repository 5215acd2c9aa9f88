"""What a person does in MLflow's and Prefect's own UIs, in a real browser on real servers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from browser import find_chromium, open_tab
from deployed import deployments
from worlds import World, free, make_world

from flows.feed import list_batches
from flows.fresh import fresh_set, gather_labels
from flows.records import CHALLENGER, CHAMPION
from flows.registry import Registry
from flows.retrain import retrain
from flows.servers import start_mlflow, stop, wait_until_healthy
from flows.settings import Settings
from flows.watch import watch

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

NAME = "handwriting"
NO_ASSISTANT = """
    if (window === window.top) {
        localStorage.setItem("mlflow.assistant.fab.autoOpenedOnFirstLoad_v1", "true");
        localStorage.setItem("mlflow.assistant.panelOpen_v1", "false");
    }
"""


@pytest.fixture(scope="session", autouse=True)
def chromium() -> str:
    """Find the installed Chromium, before anything slow is begun."""
    return find_chromium()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, prefect_server: str) -> Iterator[World]:
    """Make a model whose MLflow server runs at the address that its settings name for links."""
    del prefect_server  # only has to be there
    root, port = tmp_path_factory.mktemp(NAME), free()
    address = f"http://127.0.0.1:{port}"
    made = make_world(root, NAME, f'\n[servers]\nmlflow_ui = "{address}"\n')
    logs = root / "logs"
    started = [start_mlflow(made.settings, port, logs)]
    try:
        wait_until_healthy(f"{address}/health", "MLflow", started, logs)
        yield made
    finally:
        stop(started)


@pytest.fixture
def screenshots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder for screenshots: SCREENSHOTS, or a temporary one."""
    folder = Path(os.environ.get("SCREENSHOTS", tmp_path / "screenshots"))
    monkeypatch.delenv("SCREENSHOTS", raising=False)  # it names no setting of a model
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def row_of(page: Page, number: int) -> Locator:
    """Find a version's row in the table of versions."""
    link = page.get_by_role("link", name=f"Version {number}", exact=True)
    return page.get_by_role("row").filter(has=link)


def open_versions(page: Page, settings: Settings) -> None:
    """Open the model's page, by the address that `sustain ui` prints."""
    page.goto(f"{settings.servers.mlflow_ui}/#/models/{NAME}")
    page.get_by_text("Model training", exact=True).click()  # the sidebar knows no registry before
    page.get_by_role("link", name="Model registry", exact=True).wait_for()
    row_of(page, 1).wait_for()
    fold_tags(page)


def fold_tags(page: Page) -> None:
    """Fold the model's own tags up, so that both versions fit on the page."""
    page.get_by_text("Tags", exact=True).first.click()
    page.get_by_text("sustain.champion_seen").wait_for(state="hidden")


def read_story(settings: Settings, screenshots: Path) -> tuple[str, str]:
    """Open a version from the registry, then its drift report; return what both say."""
    with open_tab(1000, NO_ASSISTANT) as page:
        open_versions(page, settings)
        page.get_by_role("link", name="Version 2", exact=True).click()
        story = page.get_by_text("promote against version 1")
        story.wait_for()
        page.screenshot(path=screenshots / "story.png")
        told = page.locator("main").inner_text()
        with page.expect_popup() as opened:
            page.get_by_role("link", name="Drift report", exact=True).click()
        opened.value.get_by_role("tab", name="Artifacts", selected=True).wait_for()
        report = opened.value.frame_locator("iframe[sandbox]")
        report.get_by_text("What next?", exact=True).wait_for()
        opened.value.screenshot(path=screenshots / "drift-report.png")
        return told, report.locator("body").inner_text()


def move_champion_by_hand(settings: Settings, screenshots: Path) -> None:
    """Give the alias to version 1 by clicks and keys, and see where it is before and after."""
    with open_tab(900, NO_ASSISTANT) as page:
        open_versions(page, settings)
        row_of(page, 2).get_by_text("@ champion").wait_for()
        page.screenshot(path=screenshots / "rollback-1.png")

        row_of(page, 1).get_by_role("button", name="Add", exact=True).click()
        dialog = page.get_by_role("dialog")
        dialog.get_by_role("combobox").fill("champion")
        dialog.get_by_role("combobox").press("Enter")
        warning = 'The "champion" alias is also being used on version 2.'
        dialog.get_by_text(warning).wait_for()
        page.screenshot(path=screenshots / "rollback-2.png")
        dialog.get_by_role("button", name="Save aliases").click()
        dialog.wait_for(state="hidden")

        page.reload()  # the table does not follow by itself
        row_of(page, 1).get_by_text("@ champion").wait_for()
        assert row_of(page, 2).get_by_text("@ champion").count() == 0
        fold_tags(page)
        page.screenshot(path=screenshots / "rollback-3.png")


def ask_for_a_run(ui: str, deployment_id: str, who: str, screenshots: Path) -> None:
    """Start a deployment by hand in Prefect's UI, with one parameter filled in."""
    with open_tab(1000) as page:
        page.goto(f"{ui}/deployments/deployment/{deployment_id}")
        page.get_by_role("button", name="Run", exact=True).click()
        page.screenshot(path=screenshots / "approval-1.png")
        page.get_by_text("Custom run", exact=True).click()
        page.locator("form textarea").nth(1).fill(who)  # the path of the settings is the first
        path = page.locator("form textarea").first  # the picture is for README: no path in it
        page.screenshot(path=screenshots / "approval-2.png", mask=[path], mask_color="#1c1c1e")
        page.get_by_role("button", name="Submit", exact=True).click()
        page.get_by_text("scheduled to start now").first.wait_for()


def see_run(ui: str, run_id: str, path: Path) -> None:
    """Open a flow run's page in Prefect's UI, and see that it is done."""
    with open_tab(900) as page:
        page.goto(f"{ui}/runs/flow-run/{run_id}")
        page.get_by_text("Completed", exact=True).first.wait_for()
        page.screenshot(path=path)


def see_champion(settings: Settings, number: int, path: Path) -> None:
    """Open the registry in MLflow's UI, and see which version has the alias."""
    with open_tab(900, NO_ASSISTANT) as page:
        open_versions(page, settings)
        row_of(page, number).get_by_text("@ champion").wait_for()
        page.screenshot(path=path)


def fresh_labels(registry: Registry, settings: Settings) -> set[str]:
    """Name the samples whose labels the champion of now has yet to learn."""
    champion = registry.champion()
    batches = list_batches(settings.feed, settings.root)
    labels = gather_labels(settings, batches, registry.config(champion).classes)
    return set(fresh_set(labels, registry.learned(champion)).table["sample_id"])


def test_a_move_of_the_alias_in_mlflows_ui_is_a_rollback(world: World, screenshots: Path) -> None:
    """A person reads why version 2 serves, moves the alias back, and the next watch follows."""
    settings = world.settings
    labelled = world.arrive(0, 1, labelled=True)
    promoted = watch(str(world.path))
    registry = Registry(settings)
    assert registry.alias(CHAMPION) == 2, promoted
    assert "version 2 was promoted" in promoted.done
    assert not fresh_labels(registry, settings)
    learned = set(registry.learned(registry.version(2))["sample_id"])

    story, report = read_story(settings, screenshots)
    assert "no worse on old data" in story
    assert "within the budget" in story
    assert "Tuned from version 1: drift in batch" in story
    cause = registry.check_record(registry.version(2).tags["cause_check"])
    assert f"Batch {cause.key.batch_id} against version 1" in report
    for heading in ("Did it change?", "Does it hurt?", "What changed?", "Column by column"):
        assert heading in report

    move_champion_by_hand(settings, screenshots)
    assert registry.alias(CHAMPION) == 1
    assert not registry.version(2).rolled_back  # nobody of ours has seen the move yet

    (batch,) = world.arrive(2)
    watched = watch(str(world.path))

    assert watched.move is not None
    assert (watched.move.before, watched.move.after) == (2, 1)
    assert watched.move.by == "a person"
    loser = registry.version(2)
    assert loser.rolled_back
    assert loser.tags["rolled_back_at"] == watched.move.at
    assert loser.tags["reason"] == "the alias 'champion' was moved by hand"

    own = registry.reference(registry.version(1))
    others = registry.reference(registry.version(2))
    assert watched.champion == 1
    (checked,) = watched.checked  # the other batches' checks against version 1 still stand
    assert (checked.batch_id, checked.champion) == (batch, 1)
    assert checked.reference == pytest.approx(own.accuracy)
    assert own.accuracy != pytest.approx(others.accuracy)
    assert checked.regime == "first"  # the one regime that version 1 knows
    assert checked.alarm  # version 2 knows these digits, version 1 does not

    fresh = fresh_labels(registry, settings)
    assert len(fresh) == 200
    assert fresh == {name for name in learned if name.split("/")[0] in labelled}

    assert watched.decision.action == "ask_for_labels"
    assert "version 2, which was rolled back" in watched.decision.reason
    assert "are worth labelling" in watched.done
    again = retrain(str(world.path))  # even when asked for
    assert (again.version, again.made_now, again.promoted) == (2, False, False)
    assert again.outcome == "rolled back"
    assert watch(str(world.path)).move is None
    assert registry.alias(CHAMPION) == 1
    assert registry.alias(CHALLENGER) is None
    assert [version.number for version in registry.versions()] == [1, 2]


def test_a_run_in_prefects_ui_is_an_approval(
    world: World, prefect_server: str, tmp_path: Path, screenshots: Path
) -> None:
    """A challenger waits; a person runs `promote` by its form, a worker does it, the alias moves.

    In the world that the test before leaves, or in a new one.
    """
    world.path.write_text(
        world.path.read_text().replace("[gate]", '[gate]\napproval = "manual"', 1)
    )
    settings = world.settings
    registry = Registry(settings)
    champion = registry.champion().number
    world.arrive(4, 5, labelled=True)
    made = retrain(str(world.path))
    assert made.outcome == "waiting"
    assert registry.alias(CHALLENGER) == made.version
    assert registry.alias(CHAMPION) == champion

    ours = deployments(prefect_server, tmp_path, NAME, world.path)
    ours.make_pool()
    ours.deploy("--name", f"promote/{NAME}")
    (promote,) = ours.found().values()
    ui = prefect_server.removesuffix("/api")
    ask_for_a_run(ui, promote["id"], "ada", screenshots)
    assert registry.alias(CHAMPION) == champion  # not before a worker has judged and load-tested it

    run = ours.work(promote["id"])
    see_run(ui, run["id"], screenshots / "approval-3.png")
    see_champion(settings, made.version, screenshots / "approval-4.png")
    move = registry.moves()[-1]
    assert (move.before, move.after, move.by, move.who) == (
        champion,
        made.version,
        "a person",
        "ada",
    )
