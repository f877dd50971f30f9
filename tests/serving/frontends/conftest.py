"""A real HTTP server over the mock engine, and the official client against it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import openai
import pytest

from serving.frontends.app import serve_http
from serving.frontends.http.server import HttpServer
from serving.metrics import MeteredClient
from serving.service import TextService
from tests.mock_engine import MockEngine, mock_service

HI = [{"role": "user", "content": "hi"}]


@dataclasses.dataclass
class Running:
    """A server with what tests reach into."""

    engine: Any
    service: TextService
    server: HttpServer
    client: openai.AsyncOpenAI
    http: httpx.AsyncClient

    @property
    def app(self) -> Any:
        """The application that it serves."""
        return self.server._server.config.app

    async def chat(self, **fields: Any) -> httpx.Response:
        """A raw chat request."""
        return await self.http.post("/v1/chat/completions", json={"messages": HI, **fields})

    async def events(self, path: str, **fields: Any) -> list[str]:
        """The data lines of a raw stream."""
        async with self.http.stream("POST", path, json={"stream": True, **fields}) as reply:
            assert reply.status_code == 200, await reply.aread()
            assert reply.headers["content-type"].startswith("text/event-stream")
            return [line.removeprefix("data: ") async for line in reply.aiter_lines() if line.startswith("data: ")]

    async def chunks(self, path: str = "/v1/chat/completions", **fields: Any) -> list[dict[str, Any]]:
        """The chunks of a raw stream, which must end with [DONE]."""
        if path.endswith("chat/completions"):
            fields = {"messages": HI, **fields}
        lines = await self.events(path, **fields)
        assert lines[-1] == "[DONE]"
        return [json.loads(line) for line in lines[:-1]]


Start = Callable[..., Any]


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    """Starts servers and stops them after the test: `running = await start(MockEngine(...), app={...}, **service)`."""
    running: list[Running] = []

    async def make(engine: Any = None, app: dict[str, Any] | None = None, **options: Any) -> Running:
        engine = engine or MockEngine(reply="Hello wörld!")
        service = options.pop("service", None) or mock_service(MeteredClient(engine), **options)  # type: ignore[arg-type]
        server = await serve_http(service, port=0, **(app or {}))
        client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
        one = Running(engine, service, server, client, httpx.AsyncClient(base_url=server.url, timeout=30))
        running.append(one)
        return one

    yield make
    for one in running:
        await one.client.close()
        await one.http.aclose()
        await one.server.stop(grace_s=1.0)


@pytest.fixture
async def running(start: Start) -> Running:
    """A server that answers "Hello wörld!"."""
    return await start()
