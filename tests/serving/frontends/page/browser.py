"""A headless Chromium over the W3C WebDriver protocol: as much of it as the page's test needs."""

from __future__ import annotations

import asyncio
import base64
import shutil
import socket
from typing import Any

import httpx

from scripts.fetch_axe import axe_file

TIMEOUT_S = 120.0  # for machines that are busy with everything else
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the protocol's name for a reference to an element
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--window-size=1280,860",
    "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream",  # a microphone that beeps, and a reader who allows it
)  # fmt: skip


def missing() -> str | None:
    """What is not installed, or None."""
    return next((name for name in ("chromium", "chromedriver") if shutil.which(name) is None), None)


def axe() -> str | None:
    """The source of axe-core, which scripts/fetch_axe.py puts into the user's cache; None without."""
    path = axe_file()
    return path.read_text(encoding="utf-8") if path.exists() else None


class Browser:
    """One window. Use as an asynchronous context manager."""

    def __init__(self, profile: str) -> None:
        self._profile = profile

    async def __aenter__(self) -> Browser:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            port = sock.getsockname()[1]
        self._driver = await asyncio.create_subprocess_exec(
            "chromedriver", f"--port={port}", stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL
        )
        self._http = httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=TIMEOUT_S)
        async with asyncio.timeout(TIMEOUT_S):
            while True:
                try:
                    if (await self._http.get("/status")).json()["value"]["ready"]:
                        break
                except httpx.TransportError:
                    await asyncio.sleep(0.05)
        options = {"args": [*FLAGS, f"--user-data-dir={self._profile}"]}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        reply = await self._http.post("/session", json={"capabilities": {"alwaysMatch": wanted}})
        self._path = f"/session/{reply.json()['value']['sessionId']}"
        return self

    async def __aexit__(self, *_: Any) -> None:
        await self._http.delete(self._path)
        await self._http.aclose()
        self._driver.terminate()
        await self._driver.wait()

    async def _call(self, path: str, **body: Any) -> Any:
        reply = (await self._http.post(self._path + path, json=body)).json()["value"]
        if isinstance(reply, dict) and "error" in reply:
            raise RuntimeError(f"{reply['error']}: {reply['message']}")
        return reply

    async def open(self, url: str) -> None:
        await self._call("/url", url=url)

    async def run(self, script: str, *args: Any) -> Any:
        """The value of a JavaScript expression; `args` are its `arguments`."""
        return await self._call("/execute/sync", script=f"return {script}", args=list(args))

    async def run_async(self, script: str, *args: Any) -> Any:
        """What the body of an asynchronous function returns; `args` are its `arguments`."""
        wrapped = (
            "const done = arguments[arguments.length - 1];"
            "(async function () {" + script + "}).apply(null, arguments)"
            ".then((value) => done({ value }), (error) => done({ error: `${error}\\n${error.stack}` }));"
        )
        reply = await self._call("/execute/async", script=wrapped, args=list(args))
        if "error" in reply:
            raise RuntimeError(reply["error"])
        return reply.get("value")

    async def resize(self, width: int, height: int) -> None:
        await self._call("/window/rect", width=width, height=height)

    async def wait(self, script: str) -> Any:
        """The value of an expression once it is true."""
        try:
            async with asyncio.timeout(TIMEOUT_S):
                while not (value := await self.run(script)):  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
                return value
        except TimeoutError:
            seen = await self.run("document.body.innerText")
            raise AssertionError(f"not so within {TIMEOUT_S:.0f} s: {script}\nThe page says:\n{seen}") from None

    async def _find(self, selector: str) -> str:
        return (await self._call("/element", using="css selector", value=selector))[ELEMENT]

    async def click(self, selector: str) -> None:
        await self._on(selector, "click")

    async def type(self, selector: str, text: str) -> None:
        await self._on(selector, "value", text=text)

    async def _on(self, selector: str, what: str, **body: Any) -> None:
        while True:  # a page may draw an element anew between its being found and used
            try:
                await self._call(f"/element/{await self._find(selector)}/{what}", **body)
                return
            except RuntimeError as error:
                if not str(error).startswith("stale element reference"):
                    raise

    async def press(self, *keys: str) -> None:
        """Presses keys together, wherever the focus is."""
        actions = [{"type": "keyDown", "value": key} for key in keys]
        actions += [{"type": "keyUp", "value": key} for key in reversed(keys)]
        await self._call("/actions", actions=[{"type": "key", "id": "keyboard", "actions": actions}])

    async def screenshot(self) -> bytes:
        """The window as PNG."""
        reply = await self._http.get(self._path + "/screenshot")
        return base64.b64decode(reply.json()["value"])

    async def console(self) -> list[str]:
        """What the page logged since the last call, by level and text."""
        entries = await self._call("/se/log", type="browser")
        return [f"{entry['level']} {entry['message']}" for entry in entries]
