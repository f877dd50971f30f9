"""Failures on their way out: the status, the headers, and a body in the shape that a route's clients expect."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import Scope

from serving.errors import ErrorKind, RequestError, invalid
from serving.frontends.http.sse import ClientGoneError

logger = logging.getLogger(__name__)

INTERNAL_MESSAGE = "The server failed to handle this request. Its log tells why, under the request id."
_HTTP_CODES = {404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}


@dataclasses.dataclass(frozen=True)
class Failure:
    """What a client is told, before it has a dialect's shape.

    Attributes:
        kind: None for what HTTP itself refuses (no such path, a body too large): `status` says all.
        param: the field at fault, as the client wrote it.
        code: a word for programs; None leaves it to the dialect.
    """

    status: int
    message: str
    kind: ErrorKind | None = None
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] | None = None


Shape = Callable[[Failure], dict[str, Any]]
"""A dialect's body for a failure."""


def failure_of(error: BaseException) -> Failure:
    """What to tell of a failure while serving. Unexpected ones are logged and tell the client nothing internal."""
    if not isinstance(error, RequestError):
        logger.error("unexpected failure", exc_info=error)
        return Failure(500, INTERNAL_MESSAGE, ErrorKind.INTERNAL)
    headers = {}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    elif error.kind is ErrorKind.RESOURCE_EXHAUSTED:
        headers["Retry-After"] = "1"
    return Failure(error.kind.http_status, error.message, error.kind, error.param, error.code, headers)


def reply(failure: Failure, shape: Shape) -> JSONResponse:
    """The whole reply: Retry-After in whole seconds where it makes sense."""
    return JSONResponse(shape(failure), failure.status, failure.headers)


def path_below_root(scope: Scope) -> str:
    """A request's path without what a proxy in front puts before it."""
    path, root = scope["path"], scope.get("root_path", "")
    return path.removeprefix(root) if root and path.startswith(root) else path


def shape_for(scope: Scope) -> Shape:
    """The shape of the dialect that a request's path belongs to."""
    path = path_below_root(scope)
    state = scope["app"].state
    found = (shape for prefix, shape in state.error_shapes.items() if path == prefix or path.startswith(f"{prefix}/"))
    return next(found, state.error_shape)


def error_response(error: RequestError, scope: Scope) -> JSONResponse:
    """The reply for a request that cannot be served."""
    return reply(failure_of(error), shape_for(scope))


def install(app: FastAPI, default: Shape, shapes: Mapping[str, Shape] = {}) -> None:
    """Makes every failure of `app` answer in a dialect's shape.

    Args:
        default: the shape of every path that `shapes` does not name.
        shapes: path -> the shape of what lies at it and below it.
    """
    app.state.error_shape, app.state.error_shapes = default, dict(shapes)
    app.add_exception_handler(RequestError, _on_request_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(ClientGoneError, _on_client_gone)


async def _on_request_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestError)
    return error_response(error, request.scope)


async def _on_validation_error(request: Request, error: Exception) -> JSONResponse:
    """Of queries; bodies are read by `bodies.py`."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    param = ".".join(str(part) for part in first["loc"] if part != "query")[:256] or None
    return error_response(invalid(f"Invalid value for '{param}'.", param, "invalid_value"), request.scope)


async def _on_http_exception(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    text = error.detail if isinstance(error.detail, str) else "Refused."
    if error.status_code == 404:
        text = f"There is no {request.scope['path']} here."
    elif error.status_code == 405:
        text = f"{request.scope['path']} does not take {request.method}."
    failure = Failure(error.status_code, text, code=_HTTP_CODES.get(error.status_code), headers=error.headers)
    return reply(failure, shape_for(request.scope))


async def _on_client_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nginx's code; nobody reads it but the access log
