"""Failures as Ollama's clients expect them: `{"error": "a sentence"}`."""

from __future__ import annotations

import json
from typing import Any

from starlette.types import Scope

from serving.frontends.http.errors import ErrorShape, Failure, failure_of, path_below_root
from serving.frontends.ollama.protocol import OllamaErrorReply

RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": OllamaErrorReply, "description": text}
    for status, text in {
        400: "A field is wrong.",
        401: "The API key is missing or wrong, where the server asks for one.",
        403: "The key may not do this.",
        404: "No such model.",
        413: "The body is too large.",
        429: "The queue is full; see Retry-After.",
        500: "The server failed.",
        501: "The served model cannot do this.",
        503: "The server is starting or stopping.",
        504: "The request's deadline passed.",
    }.items()
}
"""For the API document."""


def speaks_ollama(scope: Scope) -> bool:
    """Whether a request is for one of the paths below /api."""
    return path_below_root(scope).startswith("/api/")


def body(failure: Failure, request_id: str) -> dict[str, Any]:
    """The body of an error reply."""
    return {"error": failure.message}


SHAPE = ErrorShape(body)


def error_line(error: BaseException) -> bytes:
    """The end of a stream that failed after its status line was sent: their clients raise on `error`."""
    return json.dumps(body(failure_of(error), "")).encode() + b"\n"
