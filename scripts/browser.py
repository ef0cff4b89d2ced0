"""Chromium without a window, driven by Playwright: what the pictures of the page and its tests share."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from stdit.errors import UserError, install_command

if TYPE_CHECKING:
    from playwright.sync_api import Browser

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
"""Without them it looks for a GPU and for updates of its own."""


def find_chromium() -> str:
    """Return the path of Chromium. Raises UserError if it or Playwright is not installed."""
    try:
        import playwright  # noqa: F401
    except ImportError:
        raise UserError(f"the browser is driven by playwright: {install_command('dev')}") from None
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        raise UserError(
            f"none of {', '.join(NAMES)} is installed: apt-get install chromium, or as your system has it."
        )
    return found


@contextmanager
def open_browser() -> Iterator["Browser"]:
    """Run Chromium during a block. Raises UserError as `find_chromium`."""
    path = find_chromium()
    from playwright.sync_api import sync_playwright

    as_root = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=[*FLAGS, *as_root])
        try:
            yield browser
        finally:
            browser.close()
