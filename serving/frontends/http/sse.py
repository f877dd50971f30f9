"""Server-sent events, and not working for a client that has gone.

A stream writes chunks of a few hundred bytes many thousand times a second, so this stays close to ASGI: no pydantic,
no per-chunk tasks, and strings encoded by json's C function (0.3 us against 3 us of json.dumps for a dict).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Callable, Coroutine
from json.encoder import encode_basestring_ascii
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serving.frontends.sockets.stalled import ReaderStalledError, StallWatch

T = TypeVar("T")
EVENTS = "text/event-stream"
PING = b": still working\n\n"
"""A comment, which readers of events skip. Other media types may have no such thing."""
HEADERS_AFTER_S = 5.0
"""A stream's status is decided by its first event (a full queue is a 429). One that waits longer than this gets its
headers, so that proxies and clients see life, and its failure then comes inside the stream."""
PING_EVERY_S = 15.0
TOLD_EVERY_S = 1.0
"""A stream that waits for its model says so this often."""

quote = encode_basestring_ascii
"""A string as JSON, quotes included. In ASCII: clients that split a stream with Python's splitlines (httpx does) would
otherwise cut it at U+2028, U+2029 and U+0085."""

dumps = json.JSONEncoder(separators=(",", ":")).encode
"""Compact JSON, for what goes into streams many times."""


class ClientGoneError(Exception):
    """The client closed the connection before its reply was complete."""


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Awaits `work`; cancels it when the client disconnects, which aborts the requests it is reading.

    Raises:
        ClientGoneError: the client went first.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGoneError
    finally:
        for one in (task, watch):
            if not one.done():
                one.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


class EventStream(Response):
    """A reply that comes event by event. Its generator is closed when the client goes, whatever it was waiting for.

    Args:
        events: yields whole events as bytes. It handles its own failures: by then the status line is sent.
        media_type: what its events are written in.
    """

    def __init__(self, events: AsyncGenerator[bytes, None], media_type: str = EVENTS) -> None:
        self._events = events
        self.media_type = media_type
        self.status_code = 200
        self.background = None
        self.body = b""
        # X-Accel-Buffering: nginx would otherwise collect the whole reply first.
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

    def init_headers(self, headers: Any = None) -> None:
        super().init_headers(headers)
        self.raw_headers = [(k, v) for k, v in self.raw_headers if k != b"content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        limit_s = getattr(scope["app"].state, "stalled_reader_s", None)
        writer = asyncio.ensure_future(self._write(send, limit_s))
        watch = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait({writer, watch}, return_when=asyncio.FIRST_COMPLETED)
            if writer.done():
                writer.result()
        finally:
            for one in (writer, watch):
                if not one.done():
                    one.cancel()
            await asyncio.gather(writer, watch, return_exceptions=True)

    async def _write(self, send: Send, limit_s: float | None) -> None:
        """Raises ClientGoneError when the client has taken nothing for `limit_s` seconds: its request would otherwise keep a slot
        and pages for as long as it likes."""
        watch = StallWatch(limit_s)
        try:
            await watch.write(
                send, {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
            )
            async with contextlib.aclosing(self._events) as events:
                async for event in events:
                    await watch.write(send, {"type": "http.response.body", "body": event, "more_body": True})
            await watch.write(send, {"type": "http.response.body", "body": b"", "more_body": False})
        except ReaderStalledError:
            raise ClientGoneError from None
        finally:
            watch.close()


async def open_stream(
    request: Request,
    events: AsyncGenerator[bytes, None],
    on_error: Callable[[Exception], bytes],
    media_type: str = EVENTS,
    ping: bytes = PING,
    waits_for: Callable[[], str | None] | None = None,
) -> EventStream:
    """Starts `events` and waits for the first, so that a refusal is an HTTP status rather than an event.

    Args:
        on_error: the last events of a stream that failed after its status line was sent.
        ping: what is written while the first event is awaited; empty for nothing.
        waits_for: tells what the first event waits for besides its turn (a model that is being loaded), or None. Then the headers
            go out sooner, with `X-Model-Status`, and comments say it.
    Raises:
        ClientGoneError: the client went before the first event.
        Exception: what `events` raised before its first event.
    """
    first: asyncio.Task[bytes] = asyncio.ensure_future(anext(events))  # type: ignore[arg-type]
    watch = asyncio.ensure_future(_gone(request.receive))
    try:
        waiting = None
        if waits_for is not None:
            await asyncio.wait({first, watch}, timeout=TOLD_EVERY_S, return_when=asyncio.FIRST_COMPLETED)
            waiting = waits_for()
        if waiting is None:
            await asyncio.wait({first, watch}, timeout=HEADERS_AFTER_S, return_when=asyncio.FIRST_COMPLETED)
        if first.done():
            first.result()
        elif watch.done():
            raise ClientGoneError
    except BaseException:
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        await events.aclose()
        raise
    finally:
        watch.cancel()
    stream = EventStream(_continue(first, events, on_error, ping, waits_for if ping else None), media_type)
    if waiting is not None and not first.done():
        stream.raw_headers.append((b"x-model-status", waiting.encode("ascii", "replace")))
    return stream


async def _continue(
    first: asyncio.Task[bytes],
    events: AsyncGenerator[bytes, None],
    on_error: Callable[[Exception], bytes],
    ping: bytes,
    waits_for: Callable[[], str | None] | None,
) -> AsyncGenerator[bytes, None]:
    try:
        while not first.done():
            told = waits_for() if waits_for is not None else None
            if told is not None:
                yield f": {told}\n\n".encode()
            await asyncio.wait({first}, timeout=PING_EVERY_S if told is None else TOLD_EVERY_S)
            if ping and told is None and not first.done():
                yield ping
        yield first.result()
        async for event in events:
            yield event
    except Exception as error:
        yield on_error(error)
    finally:
        if not first.done():
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)
        await events.aclose()
