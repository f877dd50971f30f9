"""The front-end apps of examples/, driven against a server over the mock engine. Each is skipped without its package."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import pathlib
import socket
import sys
import threading
import uuid
from collections.abc import Iterator

import pytest

from serving.frontends.app import serve_http
from tests.mock_engine import MockEngine, mock_service, until

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"
REPLY = "Hello from the mock."


ENGINE = MockEngine(reply=REPLY, max_model_len=100_000)


def gone(before: int) -> bool:
    """Whether the server has ended one more request than `before`, and runs none."""
    return len(ENGINE.aborted) > before and not ENGINE.live


@pytest.fixture
def slow() -> Iterator[None]:
    """Answers that nobody waits for."""
    ENGINE._reply, ENGINE.step_s = "word " * 10_000, 0.01
    yield
    ENGINE._reply, ENGINE.step_s = REPLY, 0.0


@pytest.fixture
def url(monkeypatch) -> Iterator[str]:
    """The API of a server in a thread of its own: the apps block."""
    ready, stop, found = threading.Event(), None, ""

    async def serve() -> None:
        nonlocal stop, found
        server = await serve_http(mock_service(ENGINE), port=0)
        found, stop = f"{server.url}/v1", asyncio.Event()
        loop[0] = asyncio.get_running_loop()
        ready.set()
        await stop.wait()
        await server.stop()

    loop: list[asyncio.AbstractEventLoop] = [None]  # type: ignore[list-item]
    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert ready.wait(120)
    monkeypatch.setenv("JAXSERVE_URL", found)
    yield found
    assert stop is not None
    loop[0].call_soon_threadsafe(stop.set)
    thread.join(120)


def _load(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_gradio(url: str):
    pytest.importorskip("gradio", reason="gradio is not installed: pip install -e '.[gradio]'")
    from gradio_client import Client

    demo = _load("gradio_app").demo
    _, local, _ = demo.launch(prevent_thread_lock=True, quiet=True, server_port=_free_port(), share=False)
    try:
        answer = Client(local, verbose=False).predict("Hi", api_name="/chat")
        assert REPLY in str(answer)
    finally:
        demo.close()


def test_stop_in_gradio_ends_the_request(url: str, slow: None):
    pytest.importorskip("gradio", reason="gradio is not installed: pip install -e '.[gradio]'")
    from gradio_client import Client

    demo = _load("gradio_app").demo
    _, local, _ = demo.launch(prevent_thread_lock=True, quiet=True, server_port=_free_port(), share=False)
    before = len(ENGINE.aborted)
    try:
        job = Client(local, verbose=False).submit("Hi", api_name="/chat")
        asyncio.run(until(lambda: len(job.outputs()) > 2, "it answers", 60))
        job.cancel()
        asyncio.run(until(lambda: gone(before), "the server ended the request"))
    finally:
        demo.close()


def test_streamlit(url: str):
    pytest.importorskip("streamlit", reason="streamlit is not installed: pip install -e '.[streamlit]'")
    from streamlit.testing.v1 import AppTest

    app = AppTest.from_file(str(EXAMPLES / "streamlit_app.py"), default_timeout=60).run()
    for turn in (1, 2):
        app.chat_input[0].set_value("Hi").run()
        assert not app.exception
        assert [m.markdown[0].value for m in app.chat_message] == ["Hi", REPLY] * turn


async def test_chainlit(url: str, tmp_path):
    pytest.importorskip("chainlit", reason="chainlit is not installed: pip install -e '.[chainlit]'")
    import socketio

    port = _free_port()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "chainlit", "run", str(EXAMPLES / "chainlit_app.py"), "--headless", "--port", str(port),
        cwd=tmp_path, env={**os.environ, "CHAINLIT_APP_ROOT": str(tmp_path)},
    )  # fmt: skip
    ENGINE._reply, ENGINE.step_s = REPLY, 0.0
    shown: list[str] = []
    client = socketio.AsyncClient()
    client.on("update_message", lambda data: shown.append(data.get("output")))
    try:
        async with asyncio.timeout(240):
            while not client.connected:
                try:
                    await client.connect(
                        f"http://127.0.0.1:{port}",
                        socketio_path="/ws/socket.io",
                        auth={"sessionId": "s1", "clientType": "webapp", "userEnv": "{}"},
                    )
                except socketio.exceptions.ConnectionError:
                    await asyncio.sleep(0.5)
            await client.emit("connection_successful")
            message = {
                "id": str(uuid.uuid4()),
                "name": "user",
                "type": "user_message",
                "output": "Hi",
                "createdAt": "2026-01-01T00:00:00Z",
            }
            await client.emit("client_message", {"message": message, "fileReferences": []})
            while REPLY not in shown:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
            ENGINE._reply, ENGINE.step_s = "word " * 10_000, 0.01
            for end in ("stop", "leave"):
                before = len(ENGINE.aborted)
                message |= {"id": str(uuid.uuid4())}
                await client.emit("client_message", {"message": message, "fileReferences": []})
                await until(lambda: ENGINE.live, "it answers", 60)
                await (client.emit("stop") if end == "stop" else client.disconnect())
                await until(lambda before=before: gone(before), f"{end} ended the request")
    finally:
        await client.disconnect()
        process.terminate()
        await process.wait()


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]
