"""Asks every HTTP request for its key, but for the probes."""

from __future__ import annotations

from collections.abc import Callable

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from serving.access import Access, caller_of_task
from serving.errors import RequestError
from serving.frontends.http.errors import error_response

PROBES = frozenset({"/health", "/ready"})
"""Answer without a key: an orchestrator asks them, and they tell nothing but yes or no."""


_KEY_HEADERS = (b"authorization", b"x-api-key")


def _as_bearer(name: bytes, value: bytes) -> bytes:
    """A key as `Authorization` has it: Anthropic's clients send it in a header of its own."""
    return value if name == b"authorization" else b"Bearer " + value


class RequireKey:
    """Refuses what has no key with 401, and tells the task on whose behalf it works.

    It decides by the path that the router goes by (`scope["path"]`, decoded once, compared whole), not by a URL put
    together from headers; and what is not known to be open is closed, so that another spelling opens nothing.
    """

    def __init__(self, app: ASGIApp, access: Access, open_paths: frozenset[str] = frozenset()) -> None:
        self.app = app
        self._open = PROBES | open_paths
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or (scope["path"] in self._open and scope["method"] in ("GET", "HEAD")):
            return await self.app(scope, receive, send)
        given = {_as_bearer(name, value) for name, value in scope["headers"] if name in _KEY_HEADERS}
        try:
            # Two that differ: a proxy in front may have looked at the other one.
            caller = self._access.check(given.pop().decode("latin-1") if len(given) == 1 else None)
        except RequestError as error:
            reply = error_response(error, scope)
            reply.headers["WWW-Authenticate"] = "Bearer"
            return await reply(scope, receive, send)
        if caller is not None:
            scope["state"]["caller"] = caller.name  # for the access log, which is written outside of us
        token = caller_of_task.set(caller)
        try:
            await self.app(scope, receive, send)
        finally:
            caller_of_task.reset(token)


def control_check(access: Access) -> Callable[[Request], None]:
    """A dependency for routes that change the server."""

    def check(request: Request) -> None:
        access.check_control(caller_of_task.get())

    return check


def figures_check(access: Access) -> Callable[[Request], None]:
    """A dependency for routes that tell what the server does for everybody together."""

    def check(request: Request) -> None:
        access.check_figures(caller_of_task.get())

    return check
