"""Failures as OpenAI's clients expect them: `{"error": {"message", "type", "param", "code"}}` with the right status."""

from __future__ import annotations

import json
from typing import Any

from serving.errors import ErrorKind
from serving.frontends.http.errors import ErrorShape, Failure, failure_of
from serving.frontends.openai.protocol.common import ErrorReply

DONE = b"data: [DONE]\n\n"

_TYPES = {
    ErrorKind.INVALID_ARGUMENT: ("invalid_request_error", None),
    ErrorKind.UNAUTHENTICATED: ("authentication_error", "invalid_api_key"),
    ErrorKind.PERMISSION_DENIED: ("permission_error", "permission_denied"),
    ErrorKind.NOT_FOUND: ("invalid_request_error", "not_found"),
    ErrorKind.FAILED_PRECONDITION: ("invalid_request_error", "failed_precondition"),
    ErrorKind.RESOURCE_EXHAUSTED: ("rate_limit_error", "rate_limit_exceeded"),
    ErrorKind.DEADLINE_EXCEEDED: ("timeout_error", "deadline_exceeded"),
    ErrorKind.UNIMPLEMENTED: ("not_implemented_error", "not_implemented"),
    ErrorKind.UNAVAILABLE: ("server_error", "unavailable"),
    ErrorKind.INTERNAL: ("server_error", "internal_error"),
}

RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorReply, "description": text}
    for status, text in {
        400: "A field is wrong.",
        401: "The API key is missing or wrong, where the server asks for one.",
        403: "The key may not do this, or control is closed.",
        404: "No such model.",
        409: "It does not fit the server's state.",
        413: "The body is too large.",
        429: "The queue is full; see Retry-After.",
        500: "The server failed.",
        501: "The served model or engine cannot do this.",
        503: "Draining, starting, or the engine died.",
        504: "The request's deadline passed.",
    }.items()
}
"""For the API document: what every POST endpoint may answer."""


def body(failure: Failure, request_id: str = "") -> dict[str, Any]:
    """The body of an error reply; the id goes in a header alone."""
    if failure.kind is None:
        kind, code = "server_error" if failure.status >= 500 else "invalid_request_error", None
    else:
        kind, code = _TYPES[failure.kind]
    return {
        "error": {"message": failure.message, "type": kind, "param": failure.param, "code": failure.code or code},
    }


SHAPE = ErrorShape(body)


def error_event(error: BaseException) -> bytes:
    """The end of a stream that failed after its status line was sent: OpenAI's clients raise on `error`."""
    return b"data: " + json.dumps(body(failure_of(error))).encode() + b"\n\n" + DONE
