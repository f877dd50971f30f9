"""What tests of the page do over and over."""

from __future__ import annotations

import base64

import pytest

from tests.serving.frontends.conftest import Running
from tests.serving.frontends.page import browser

needs_browser = pytest.mark.skipif(browser.missing() is not None, reason=f"{browser.missing()} is not installed")

TEXTS = "[...document.querySelectorAll('.message .body')].map((node) => node.textContent)"
GIVE = """
    const bytes = Uint8Array.from(atob(arguments[1]), (one) => one.charCodeAt(0));
    const data = new DataTransfer();
    data.items.add(new File([bytes], arguments[2], { type: arguments[3] }));
    const target = document.querySelector(arguments[4]);
    const how = { bubbles: true, cancelable: true };
    target.dispatchEvent(arguments[0] === "paste"
      ? new ClipboardEvent("paste", { ...how, clipboardData: data }) : new DragEvent(arguments[0], { ...how, dataTransfer: data }));
"""
"""Pastes or drops a file: (event, its bytes in base64, name, type, where)."""


async def opened(page: browser.Browser, running: Running) -> None:
    """The page of a server, with its first pane there."""
    await page.open(running.server.url + "/")
    await page.wait("document.querySelector('.pane')")


async def answered(page: browser.Browser, count: int) -> None:
    """Waits for as many answers as there are to be, in all."""
    await page.wait(
        f"!document.body.classList.contains('running') && document.querySelectorAll('.assistant').length === {count}"
    )


async def said(page: browser.Browser, text: str, count: int = 1) -> None:
    """Sends a message and waits for its answer."""
    await page.type("#prompt", text + "\n")
    await answered(page, count)


async def act(page: browser.Browser, selector: str, name: str) -> None:
    """Presses one of a message's buttons."""
    await page.run(
        f"[...document.querySelectorAll('{selector} button')].find((b) => b.textContent === '{name}').click()"
    )


async def give(page: browser.Browser, event: str, data: bytes, name: str, kind: str, where: str = "#chat") -> None:
    """Pastes or drops a file."""
    await page.run_async(GIVE, event, base64.b64encode(data).decode(), name, kind, where)
