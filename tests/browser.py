"""The installed Chromium, for tests that look at pages as a person does."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Page

ARGUMENTS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]


def find_chromium() -> str:
    """Return its path; where there is none the test is skipped, or fails if one is demanded."""
    found = shutil.which("chromium")
    if found is None:
        said = "this test needs a browser on PATH: apt-get install chromium"
        if os.environ.get("REQUIRE_BROWSER"):
            pytest.fail(said)
        pytest.skip(said)
    return found


@contextmanager
def open_tab(height: int = 800, script: str = "") -> Iterator[Page]:
    """Open a tab, 1280 wide; `script` runs in every page that it opens, before the page's own.

    No flow may run inside: Playwright keeps an event loop in this thread, and Prefect would use it.
    """
    from playwright.sync_api import sync_playwright

    chromium = find_chromium()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        try:
            tab = browser.new_page(viewport={"width": 1280, "height": height})
            if script:
                tab.context.add_init_script(script)
            tab.context.set_default_timeout(30_000)
            yield tab
        finally:
            browser.close()
