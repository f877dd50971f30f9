"""What a request is taken for before anything looks at it: HEAD, other spellings of a path, and whose name it was sent to."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.errors import ErrorKind, RequestError
from serving.frontends.http.errors import error_response, path_below_root

UNVERSIONED = frozenset(f"/{path}" for path in ("chat/completions", "completions", "embeddings", "models", "responses"))
"""Paths that clients with a base URL without `/v1` ask for."""

_HOST = re.compile(r"(?:\[([^\[\]]*)\]|([^:]*))(?::\d{0,5})?", re.DOTALL)
_NAME = re.compile(r"[a-z0-9_.-]*")
_PRIVATE_ZONES = (".localhost", ".local", ".internal", ".lan", ".home.arpa", ".svc", ".cluster.local", ".test")


class Spellings:
    """Answers HEAD as GET without a body, and takes a path with a slash behind it, or without its version, for the path itself."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        within = path_below_root(scope)
        known = within.rstrip("/") if len(within) > 1 and not within.startswith("/static") else within
        known = f"/v1{known}" if known in UNVERSIONED else known
        head = scope["method"] == "HEAD"
        if known == within and not head:
            return await self.app(scope, receive, send)
        before = scope["path"].removesuffix(within)
        inner = {**scope, "path": before + (known or "/"), "method": "GET" if head else scope["method"]}
        await self.app(inner, receive, _without_body(send) if head else send)


def _without_body(send: Send) -> Send:
    async def bare(message: Message) -> None:
        if message["type"] == "http.response.body":
            message = {**message, "body": b""}
        await send(message)

    return bare


class LocalNames:
    """Refuses requests that were sent to a name that this server should not have, for servers that ask for no key: a web page
    could otherwise give its own name this machine's address, and then talk to the server as if it were its own (DNS rebinding).

    Addresses are let through, and names that nobody can register: without a dot (`localhost`, a host of the same network, a
    service), or of the zones kept for private networks.

    Args:
        allowed: further names; `*.zone` for all below one, `*` for all.
    """

    def __init__(self, app: ASGIApp, allowed: Sequence[str] = ()) -> None:
        self.app = app
        # As people copy them: with a port, a dot at the end, capitals.
        self._allowed = tuple(re.sub(r":\d*$", "", name.lower()).rstrip(".") for name in allowed)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        given = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
        if len(given) <= 1 and self.allows(given[0] if given else ""):
            return await self.app(scope, receive, send)
        error = RequestError(
            ErrorKind.PERMISSION_DENIED,
            "This server has no keys and answers to local names alone. Start it with --allowed-hosts NAME, or with an API key.",
            code="host_not_allowed",
        )
        await error_response(error, scope)(scope, receive, send)

    def allows(self, host: str) -> bool:
        """Whether a `Host` header names this server."""
        match = _HOST.fullmatch(host)
        if match is None:
            return False
        name = (match[1] if match[1] is not None else match[2]).lower().rstrip(".")
        try:
            ipaddress.ip_address(name.split("%")[0])
            return True
        except ValueError:
            pass
        if not _NAME.fullmatch(name):
            return False
        if "." not in name or name.endswith(_PRIVATE_ZONES):
            return True
        return any(one == "*" or name == one or (one[:2] == "*." and name.endswith(one[1:])) for one in self._allowed)
