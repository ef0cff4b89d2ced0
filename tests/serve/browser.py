"""The page in a browser: what its tests share. Without Chromium or Playwright they are skipped."""

from collections.abc import Mapping
from typing import Any

import pytest

from scripts.browser import find_chromium
from stdit.errors import UserError
from tests.waiting import seconds_left

try:
    find_chromium()
    from playwright.sync_api import Browser, Locator, Page, ViewportSize, expect
except UserError as missing:
    pytest.skip(f"the tests in a browser are skipped: {missing}", allow_module_level=True)

__all__ = ["DESKTOP", "PHONE", "Browser", "Locator", "Page", "expect"]

DESKTOP: ViewportSize = {"width": 1280, "height": 900}
PHONE: ViewportSize = {"width": 380, "height": 800}


def open_page(browser: Browser, url: str, view: str = "make", **options: Any) -> Page:
    """Open a view in a context of its own, as another person's browser would."""
    page = browser.new_context(**({"viewport": DESKTOP} | options)).new_page()
    patience = 1000 * (seconds_left() or 3600)
    page.set_default_timeout(patience)
    expect.set_options(timeout=patience)
    page.goto(f"{url}/#{view}")
    expect(page.locator("#model option")).not_to_have_count(0)
    return page


def show(page: Page, view: str) -> None:
    """Switch to another view by its link."""
    page.get_by_role("navigation", name="Views").get_by_role("link", name=view).click()
    expect(page.locator(f"#view-{view.lower()}")).to_be_visible()


def ask(page: Page, prompt: str, steps: int = 4) -> Locator:
    """Ask for a video by the form; return its card."""
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.get_by_label("Steps", exact=True).first.fill(str(steps))
    page.locator("#make-button").click()
    return card(page, prompt)


def cards(page: Page, prompt: str) -> Locator:
    """Return the cards of the videos of a prompt, newest first."""
    return page.get_by_role("article", name=prompt, exact=True)


def card(page: Page, prompt: str) -> Locator:
    """Return the card of the newest video of a prompt."""
    return cards(page, prompt).first


def has_status(one: Locator, words: str) -> None:
    """Wait until a card says something about its video; unlike `expect`, this looks at each frame of the page."""
    one.locator(".status", has_text=words).wait_for()


def drop_file(target: Locator, name: str, content: bytes) -> None:
    """Drop a file on an element."""
    transfer = target.page.evaluate_handle(
        """([name, bytes]) => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([new Uint8Array(bytes)], name, { type: 'video/mp4' }));
            return transfer;
        }""",
        [name, list(content)],
    )
    target.dispatch_event("drop", {"dataTransfer": transfer})


def focused(page: Page) -> Mapping[str, Any]:
    """Return the tag, id and text of the control that has the focus, and how thick its outline is drawn."""
    found: Mapping[str, Any] = page.evaluate(
        """() => {
            const element = document.activeElement;
            const { outlineStyle, outlineWidth } = getComputedStyle(element);
            const drawn = outlineStyle === 'none' ? 0 : parseFloat(outlineWidth);
            return { tag: element.localName, id: element.id, text: element.textContent.trim(), outline: drawn };
        }"""
    )
    return found


def tab_to(page: Page, wanted: str, most: int = 80) -> None:
    """Press Tab until the control of an id or a text has the focus; each control on the way must show it.

    The browser's own controls of a video do so in a way of their own.
    """
    seen = []
    for _ in range(most):
        page.keyboard.press("Tab")
        one = focused(page)
        assert one["outline"] >= 2 or one["tag"] == "video", f"{one}: the focus is not visible"
        seen.append(one["id"] or one["text"])
        if wanted in (one["id"], one["text"]):
            return
    raise AssertionError(f"Tab does not reach {wanted}, but {seen}")


def milliseconds_of_clicks(page: Page, clicks: list[tuple[str, str]], times: int) -> list[float]:
    """Return how long each of some clicks takes, from its event until the frame that shows what it does.

    Args:
        clicks: selectors of what is clicked, and of what is on the page afterwards.
    """
    found: list[float] = page.evaluate(
        """async ([clicks, times]) => {
            const frame = () => new Promise(requestAnimationFrame);
            const pause = (time) => new Promise((done) => setTimeout(done, time));
            const milliseconds = [];
            for (let turn = 0; turn < times; turn += 1) {
                for (const [clicked, shown] of clicks) {
                    const began = performance.now();
                    document.querySelector(clicked).click();
                    do await frame(); while (!document.querySelector(shown));
                    milliseconds.push(performance.now() - began);
                    await pause(30 + 40 * Math.random());
                }
            }
            return milliseconds;
        }""",
        [clicks, times],
    )
    return found
