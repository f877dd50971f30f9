"""Requests straight into the HTTP application, without a socket: a batch's lines, the rehearsal at start, tests."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from typing import Any

from starlette.types import ASGIApp, Message


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
