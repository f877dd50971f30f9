"""Failures as OpenAI's clients expect them: `{"error": {"message", "type", "param", "code"}}` with the right status."""

from __future__ import annotations

import json
import logging
import math
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from serving.errors import ErrorKind, RequestError, invalid
from serving.frontends.openai.protocol.common import ErrorReply
from serving.frontends.openai.sse import DONE, ClientGoneError

logger = logging.getLogger(__name__)

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
_HTTP_TYPES = {404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}
INTERNAL_MESSAGE = "The server failed to handle this request. Its log tells why, under the request id."

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


def error_info(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The body of an error reply."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_body(error: BaseException) -> dict[str, Any]:
    """The body for a failure while serving. Unexpected ones are logged and tell the client nothing internal."""
    if not isinstance(error, RequestError):
        logger.error("unexpected failure", exc_info=error)
        return error_info(INTERNAL_MESSAGE, "server_error", code="internal_error")
    kind, code = _TYPES[error.kind]
    return error_info(error.message, kind, error.param, error.code or code)


def error_response(error: RequestError) -> JSONResponse:
    """The reply for a request that cannot be served; Retry-After in whole seconds where it makes sense."""
    headers = {}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    elif error.kind is ErrorKind.RESOURCE_EXHAUSTED:
        headers["Retry-After"] = "1"
    return JSONResponse(error_body(error), error.kind.http_status, headers)


def error_event(error: BaseException) -> bytes:
    """The end of a stream that failed after its status line was sent: OpenAI's clients raise on `error`."""
    return b"data: " + json.dumps(error_body(error)).encode() + b"\n\n" + DONE


def install(app: FastAPI) -> None:
    """Makes every failure of `app` answer in OpenAI's shape."""
    app.add_exception_handler(RequestError, _on_request_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(ClientGoneError, _on_client_gone)


async def _on_request_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestError)
    return error_response(error)


async def _on_validation_error(request: Request, error: Exception) -> JSONResponse:
    """Of queries; bodies are read by `bodies.py`."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    param = ".".join(str(part) for part in first["loc"] if part != "query")[:256] or None
    return error_response(invalid(f"Invalid value for '{param}'.", param, "invalid_value"))


async def _on_http_exception(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    kind = "server_error" if error.status_code >= 500 else "invalid_request_error"
    text = error.detail if isinstance(error.detail, str) else "Refused."
    if error.status_code == 404:
        text = f"There is no {request.scope['path']} here."
    elif error.status_code == 405:
        text = f"{request.scope['path']} does not take {request.method}."
    code = _HTTP_TYPES.get(error.status_code)
    return JSONResponse(error_info(text, kind, code=code), error.status_code, error.headers)


async def _on_client_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nginx's code; nobody reads it but the access log
