"""Requests straight into the HTTP application, without a socket: a batch's lines, the rehearsal at start, tests."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.middleware.asyncexitstack import AsyncExitStackMiddleware
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send


async def post(
    app: ASGIApp, path: str, payload: bytes, headers: Iterable[tuple[bytes, bytes]], more: Mapping[str, Any] = {}
) -> tuple[int, bytes]:
    """One POST, whose client stays to the end.

    Args:
        more: further entries of the ASGI scope.
    Returns:
        the status (500 where none was sent) and the whole body.
    """
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "", "headers": list(headers),
        "client": None, "server": None, **more,
    }  # fmt: skip
    sent, status, chunks = False, 500, []
    never = asyncio.Event()

    async def receive() -> Message:
        nonlocal sent
        if sent:
            await never.wait()  # no client that could go away
        sent = True
        return {"type": "http.request", "body": payload, "more_body": False}

    async def send(message: Message) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
        else:
            chunks.append(message.get("body", b""))

    await app(scope, receive, send)
    return status, b"".join(chunks)


def inside(app: FastAPI) -> ASGIApp:
    """The application's routes with its failures' replies, without what surrounds requests from outside: no key is asked for, as
    whoever calls has been let in."""
    handled = ExceptionMiddleware(AsyncExitStackMiddleware(app.router), handlers=app.exception_handlers)  # type: ignore[arg-type]

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        request_id = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"").decode("latin-1")
        await handled({**scope, "app": app, "state": {"request_id": request_id}}, receive, send)

    return call
