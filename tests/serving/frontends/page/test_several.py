"""The page of a server of several models: each can be chosen, and it is told which of them are loaded."""

from __future__ import annotations

import os
import pathlib

import pytest

from serving.frontends.app import serve_http
from tests.serving.fleet.fakes import FakeMember, fleet_of
from tests.serving.frontends.page import browser


@pytest.mark.skipif(browser.missing() is not None, reason=f"{browser.missing()} is not installed")
async def test_models_are_chosen_and_it_is_told_which_are_loaded(tmp_path):
    members = [FakeMember(name) for name in ("chat", "code", "embed")]
    fleet = fleet_of(*members)
    server = await serve_http(fleet, port=0)
    labels = "[...document.querySelectorAll('.model option')].map((one) => one.label)"
    shots = os.environ.get("JAXSERVE_SHOTS")
    try:
        async with browser.Browser(str(tmp_path)) as page:
            await page.open(server.url + "/")
            await page.wait("document.querySelector('#health').textContent.includes('0 of 3 models loaded')")
            assert await page.run(labels) == ["chat (unloaded)", "code (unloaded)", "embed (unloaded)"]
            await page.run("(document.querySelector('.model').value = 'code')")
            await page.type("#prompt", "Hello\n")
            await page.wait(
                "[...document.querySelectorAll('.assistant')].some((one) => one.textContent.includes('I am code.'))"
            )
            await page.wait("document.querySelector('#health').textContent.includes('1 of 3 models loaded')")
            assert await page.run(labels) == ["chat (unloaded)", "code", "embed (unloaded)"]
            assert not [line for line in await page.console() if line.startswith("SEVERE")]
            for width in (1280, 400):
                for theme in ("light", "dark"):
                    await page.resize(width, 860)
                    await page.run(f"document.documentElement.dataset.theme = '{theme}'")
                    await page.wait("document.getAnimations().length === 0")
                    assert await page.run("document.documentElement.scrollWidth <= innerWidth"), f"wider than {width}"
                    if shots:
                        (pathlib.Path(shots) / f"several_{width}_{theme}.png").write_bytes(await page.screenshot())
    finally:
        await fleet.abort_all()
        await server.stop(1.0)
