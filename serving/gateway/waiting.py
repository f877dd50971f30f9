"""What a gateway answers before there is an engine behind it: that it lives, that it is not ready, and for whom it waits."""

from __future__ import annotations

from collections.abc import Callable

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from serving.errors import ErrorKind, RequestError
from serving.frontends.dialects import ERROR_SHAPES
from serving.frontends.http.errors import failure_of, reply

RETRY_AFTER_S = 2.0


class Doorway:
    """An ASGI application that answers for the real one until that is there.

    Attributes:
        app: the real one; None while there is none.
    """

    def __init__(self, waits_for: Callable[[], str]) -> None:
        self.app: ASGIApp | None = None
        self._waits_for = waits_for

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.app is not None:
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return
        if scope["path"] == "/health":
            answer = JSONResponse({"status": "ok"})
        else:
            # Addresses of engines are the operator's to know: /ready is for orchestrators, everything else for clients.
            why = self._waits_for() if scope["path"] == "/ready" else "The gateway waits for its engine. Try again."
            error = RequestError(ErrorKind.UNAVAILABLE, why, retry_after_s=RETRY_AFTER_S)
            answer = reply(failure_of(error), ERROR_SHAPES.of(scope))
        await answer(scope, receive, send)
