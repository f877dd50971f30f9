"""The playground in a real browser: a conversation, stop, compare, structured output, keys, no complaint."""

from __future__ import annotations

import re

import httpx
import pytest

from serving.frontends.openai.page import STATIC
from tests.mock_engine import MockEngine, until
from tests.serving.frontends.openai import browser
from tests.serving.frontends.openai.conftest import Running, Start

REPLY = "Here is **bold**, `code` and <b>no markup</b>:\n```python\nprint('hi')\n```\nDone."
CONTROL, ESCAPE = "\ue009", "\ue00c"  # WebDriver's names for keys


async def test_the_page_loads_nothing_from_elsewhere(running: Running):
    reply = await running.http.get("/")
    assert reply.status_code == 200 and "default-src 'none'" in reply.headers["content-security-policy"]
    for file in STATIC.iterdir():
        assert not re.findall(r"https?://(?!www\.w3\.org/)", file.read_text()), file.name
    for path in re.findall(r'(?:src|href)="(/[^"]+)"', reply.text):
        assert (await running.http.get(path)).status_code == 200, path
    assert (await running.http.get("/favicon.ico")).headers["content-type"] == "image/svg+xml"
    for path in ("/static/../app.py", "/static/%2e%2e/app.py", "/static/nothing.js"):
        async with httpx.AsyncClient() as client:
            assert (await client.get(running.server.url + path)).status_code == 404


@pytest.mark.skipif(browser.missing() is not None, reason=f"{browser.missing()} is not installed")
async def test_a_conversation_in_a_browser(start: Start, tmp_path):
    running = await start(MockEngine(reply=REPLY, step_s=0.001, max_model_len=4096))
    async with browser.Browser(str(tmp_path)) as page:
        await page.open(running.server.url + "/")
        await page.wait("document.querySelector('.pane')")

        await page.type("#prompt", "Hello\n")
        await page.wait("document.querySelector('.assistant:not(.busy)')")
        assert await page.run("document.querySelector('.assistant pre code').textContent") == "print('hi')\n"
        assert await page.run("document.querySelector('.assistant strong').textContent") == "bold"
        assert await page.run("document.querySelectorAll('.assistant b').length") == 0
        assert "<b>no markup</b>" in await page.run("document.querySelector('.assistant').textContent")
        stats = await page.run("document.querySelector('.stats').textContent")
        assert re.fullmatch(r"\d+ ms TTFT · [\d.]+ tokens/s · \d+ tokens", stats), stats
        assert stats.endswith(f" {len(REPLY) + 1} tokens")

        await page.click(".toggle")
        await page.type("[name=system]", "Be kind.")
        await page.type("[name=temperature]", "0.3")
        await page.type("#prompt", "Again\n")
        await page.wait("document.querySelectorAll('.assistant:not(.busy)').length === 2")
        request = running.engine.requests[-1]
        prompt = bytes(i for i in request.prompt_token_ids if i < 256).decode()
        assert prompt == f"Be kind.Hello{REPLY}Again" and request.params.temperature == 0.3

        running.engine.step_s = 0.02
        await page.type("#prompt", "Long\n")
        await page.wait("document.querySelector('.busy')?.textContent.length > 3")
        await page.click("#stop")
        await page.wait("!document.querySelector('.busy')")
        assert await page.run("document.querySelector('.message:last-child small').textContent") == "stopped"
        await page.type("#prompt", "Once more\n")
        await page.wait("document.querySelector('.busy')?.textContent.length > 3")
        await page.press(ESCAPE)
        await page.wait("!document.querySelector('.busy')")
        # The page is done when it hangs up; the server learns of that a moment later.
        engine = running.engine
        await until(lambda: len(engine.aborted) == 2 and not engine.live, "both were aborted")

        running.engine.step_s = 0.001
        await page.click("#clear")
        await page.press(CONTROL, ".")
        assert await page.run("document.querySelectorAll('.pane').length") == 2
        before = len(running.engine.requests)
        await page.type("#prompt", "Both\n")
        await page.wait("document.querySelectorAll('.assistant:not(.busy)').length === 2")
        assert len(running.engine.requests) == before + 2
        assert [r.params.temperature for r in running.engine.requests[-2:]].count(0.3) == 1

        theme = await page.run("document.documentElement.dataset.theme")
        await page.click("#theme")
        assert await page.run("document.documentElement.dataset.theme") != theme
        assert len(await page.screenshot()) > 10_000
        assert await page.console() == []


@pytest.mark.skipif(browser.missing() is not None, reason=f"{browser.missing()} is not installed")
async def test_a_refusal_is_told_in_the_page(start: Start, tmp_path):
    running = await start(MockEngine(reply="x", max_live=0))
    async with browser.Browser(str(tmp_path)) as page:
        await page.open(running.server.url + "/")
        await page.wait("document.querySelector('.pane')")
        await page.type("#prompt", "Hello\n")
        await page.wait("document.querySelector('.failed')")
        assert "queue is full" in await page.run("document.querySelector('.failed').textContent")
        assert await page.run("document.querySelector('#send').hidden") is False
