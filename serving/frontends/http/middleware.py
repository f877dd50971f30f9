"""What surrounds every request: its id in and out, the access log, and no stack traces."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence

from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.frontends.http.errors import failure_of, shape_for
from serving.metrics.logs import log_access, request_id_of_task, request_id_or_new
from serving.metrics.tracing import TRACE_HEADERS, trace_headers_of_task

QUIET_PATHS = frozenset({"/health", "/ready", "/metrics"})
"""Probes and scrapes come every few seconds: logged at debug level."""

_TRACE_HEADERS = frozenset(name.encode() for name in TRACE_HEADERS)

OnRequest = Callable[[str, str, int, float], None]
"""Called with method, route, status and seconds when a reply is complete."""


class RequestContext:
    """Gives each request an id (the client's `X-Request-Id` where it is sane), sends it back, logs one line.

    A failure that nothing else caught becomes a plain 500 here, so that it carries the id and no stack trace.
    """

    def __init__(self, app: ASGIApp, on_request: OnRequest | None = None, routes: Sequence[BaseRoute] = ()) -> None:
        self.app = app
        self._on_request = on_request
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        request_id = _request_id(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        header = (b"x-request-id", request_id.encode("latin-1"))
        start, status = time.monotonic(), 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = shape_for(scope).id_header
                message["headers"] = [*message.get("headers", ()), header, *([(own, header[1])] if own else ())]
            await send(message)

        token = request_id_of_task.set(request_id)
        trace = {k.decode(): v.decode("latin-1") for k, v in scope["headers"] if k in _TRACE_HEADERS}
        trace_token = trace_headers_of_task.set(trace or None)
        try:
            await self.app(scope, receive, send_with_id)
        except Exception as error:
            failure, shape = failure_of(error), shape_for(scope)
            body = json.dumps(shape.body(failure, request_id)).encode()
            if not status:
                headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
                start_of = {"type": "http.response.start", "status": shape.status(failure), "headers": headers}
                await send_with_id(start_of)
                await send({"type": "http.response.body", "body": body})
        finally:
            self._done(scope, status or 499, time.monotonic() - start)
            request_id_of_task.reset(token)
            trace_headers_of_task.reset(trace_token)

    def _done(self, scope: Scope, status: int, seconds: float) -> None:
        route = self._route(scope)
        client = scope.get("client")
        caller = scope["state"].get("caller")
        log_access(scope["method"], route, status, seconds, client and client[0], caller, route in QUIET_PATHS)
        if self._on_request is not None:
            self._on_request(scope["method"], route, status, seconds)

    def _route(self, scope: Scope) -> str:
        """The pattern of the route that a request was for: the router's choice, or what it would have chosen for what was
        refused before it. Never the path itself, of which there are as many as clients like."""
        route = scope.get("route")
        if route is None:
            route = next((one for one in self._routes if one.matches(scope)[0] is not Match.NONE), None)
        return getattr(route, "path", None) or "unmatched"


def _request_id(scope: Scope) -> str:
    asked = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
    return request_id_or_new(asked.decode("latin-1"))
