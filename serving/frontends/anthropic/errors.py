"""Failures as Anthropic's clients expect them: `{"type": "error", "error": {"type", "message"}, "request_id"}`."""

from __future__ import annotations

import json
from typing import Any

from starlette.types import Scope

from serving.errors import ErrorKind
from serving.frontends.anthropic.protocol import MessagesErrorReply
from serving.frontends.http.errors import ErrorShape, Failure, failure_of, path_below_root

OVERLOADED = 529
"""Their status for a server that has no room: their clients wait and try again."""
VERSION_HEADER = b"anthropic-version"

_BY_KIND = {
    ErrorKind.UNAUTHENTICATED: (401, "authentication_error"),
    ErrorKind.PERMISSION_DENIED: (403, "permission_error"),
    ErrorKind.NOT_FOUND: (404, "not_found_error"),
    ErrorKind.FAILED_PRECONDITION: (409, "conflict_error"),
    ErrorKind.DEADLINE_EXCEEDED: (504, "timeout_error"),
    ErrorKind.UNIMPLEMENTED: (400, "invalid_request_error"),  # a 501 their clients would send again
    ErrorKind.UNAVAILABLE: (OVERLOADED, "overloaded_error"),
    ErrorKind.INTERNAL: (500, "api_error"),
}
_BY_STATUS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "request_too_large"}
QUEUE_FULL = "queue_full"

RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": MessagesErrorReply, "description": text}
    for status, text in {
        400: "A field is wrong.",
        401: "The API key is missing or wrong, where the server asks for one.",
        403: "The key may not do this.",
        404: "No such model.",
        413: "The body is too large.",
        429: "The key sends too many requests; see Retry-After.",
        500: "The server failed.",
        504: "The request's deadline passed.",
        OVERLOADED: "The queue is full, or the server is starting or stopping.",
    }.items()
}
"""For the API document."""


def speaks_anthropic(scope: Scope) -> bool:
    """Whether a request is one of Anthropic's clients: by its path, or by the header that all of them send."""
    path = path_below_root(scope)
    return path.startswith("/v1/messages") or any(name == VERSION_HEADER for name, _ in scope["headers"])


def _told(failure: Failure) -> tuple[int, str]:
    """The status and the type of error."""
    kind = failure.kind
    if kind is None and failure.status >= 500:
        return (OVERLOADED, "overloaded_error") if failure.status == 503 else (failure.status, "api_error")
    if kind is None:
        return failure.status, _BY_STATUS.get(failure.status, "invalid_request_error")
    if kind is ErrorKind.RESOURCE_EXHAUSTED:
        return (OVERLOADED, "overloaded_error") if failure.code == QUEUE_FULL else (429, "rate_limit_error")
    return _BY_KIND.get(kind, (400, "invalid_request_error"))


def body(failure: Failure, request_id: str) -> dict[str, Any]:
    """The body of an error reply."""
    return {
        "type": "error",
        "error": {"type": _told(failure)[1], "message": failure.message},
        "request_id": request_id,
    }


SHAPE = ErrorShape(body, status=lambda failure: _told(failure)[0], id_header=b"request-id")


def error_event(error: BaseException) -> bytes:
    """The end of a stream that failed after its status line was sent: their clients raise on it."""
    found = {key: value for key, value in body(failure_of(error), "").items() if key != "request_id"}
    return f"event: error\ndata: {json.dumps(found)}\n\n".encode()
