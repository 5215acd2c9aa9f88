"""The alias `champion` moved by a click in MLflow's own UI, in a real browser."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from browser import find_chromium, open_tab

from flows.feed import list_batches
from flows.fresh import fresh_set, gather_labels
from flows.registry import CHALLENGER, CHAMPION, Registry
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


@contextmanager
def mlflow_server(settings: Settings, port: int) -> Iterator[str]:
    """Run MLflow's server on the database that the flows write to; give its address."""
    logs = settings.root / "logs"
    started = [start_mlflow(settings, port, logs)]
    try:
        wait_until_healthy(f"http://127.0.0.1:{port}/health", "MLflow", started, logs)
        yield f"http://127.0.0.1:{port}"
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


def open_versions(page: Page, address: str) -> None:
    """Open the model's page, by the address that `sustain ui` prints."""
    page.goto(f"{address}/#/models/{NAME}")
    page.get_by_text("Model training", exact=True).click()  # the sidebar knows no registry before
    page.get_by_role("link", name="Model registry", exact=True).wait_for()
    row_of(page, 2).wait_for()
    fold_tags(page)


def fold_tags(page: Page) -> None:
    """Fold the model's own tags up, so that both versions fit on the page."""
    page.get_by_text("Tags", exact=True).first.click()
    page.get_by_text("sustain.champion_seen").wait_for(state="hidden")


def move_champion_by_hand(address: str, screenshots: Path) -> None:
    """Give the alias to version 1 by clicks and keys, and see where it is before and after."""
    with open_tab(900, NO_ASSISTANT) as page:
        open_versions(page, address)
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


def read_report(url: str, path: Path) -> str:
    """Open a check's report in the UI's Artifacts tab; return the text of its frame."""
    with open_tab(900, NO_ASSISTANT) as page:
        page.goto(url)
        page.get_by_role("tab", name="Artifacts", selected=True).wait_for()
        report = page.frame_locator("iframe[sandbox]")
        report.get_by_text("What next?", exact=True).wait_for()
        text = report.locator("body").inner_text()
        page.screenshot(path=path)
    return text


def fresh_labels(registry: Registry, settings: Settings) -> set[str]:
    """Name the samples whose labels the champion of now has yet to learn."""
    champion = registry.champion()
    batches = list_batches(settings.feed, settings.root)
    labels = gather_labels(settings, batches, registry.config(champion).classes)
    return set(fresh_set(labels, registry.learned(champion)).table["sample_id"])


def test_a_move_of_the_alias_in_mlflows_ui_is_a_rollback(
    small_world: Callable[[str], Any], free_port: int, screenshots: Path
) -> None:
    """A click moves the champion; the next watch checks against it and keeps the loser down."""
    world = small_world(NAME)
    settings = world.settings
    labelled = world.arrive(0, 1, labelled=True)
    promoted = watch(str(world.path))
    registry = Registry(settings)
    assert registry.alias(CHAMPION) == 2, promoted
    assert "version 2 was promoted" in promoted.done
    assert not fresh_labels(registry, settings)
    learned = set(registry.learned(registry.version(2))["sample_id"])

    with mlflow_server(settings, free_port) as address:
        move_champion_by_hand(address, screenshots)
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

        path = registry.run_url(checked.run_id, artifact="report.html").partition("/#/")[2]
        report = read_report(f"{address}/#/{path}", screenshots / "report.png")
    assert f"Batch {batch} against version 1" in report
    for heading in ("Did it change?", "Does it hurt?", "What changed?", "Column by column"):
        assert heading in report
    assert checked.reason in report
