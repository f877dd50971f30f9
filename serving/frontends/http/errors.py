"""Failures on their way out: the status, the headers, and a body in the shape that a route's clients expect."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.routing import Match
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


def _same(failure: Failure) -> int:
    return failure.status


@dataclasses.dataclass(frozen=True)
class ErrorShape:
    """How a dialect tells of failures.

    Attributes:
        body: of a failure and the request's id.
        status: HTTP's, where the dialect has others.
        id_header: a further header that carries the request's id, as the dialect's clients know it.
    """

    body: Callable[[Failure, str], dict[str, Any]]
    status: Callable[[Failure], int] = _same
    id_header: bytes | None = None


Speaks = Callable[[Scope], bool]
"""Whether a request is of a dialect's clients."""


@dataclasses.dataclass(frozen=True)
class ErrorShapes:
    """The shapes of all dialects.

    Attributes:
        default: of requests that no other dialect takes for its own.
        others: which requests are a dialect's, and its shape.
    """

    default: ErrorShape
    others: Sequence[tuple[Speaks, ErrorShape]] = ()

    def of(self, scope: Scope) -> ErrorShape:
        """The shape of the dialect that a request speaks."""
        return next((shape for speaks, shape in self.others if speaks(scope)), self.default)


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


def reply(failure: Failure, shape: ErrorShape, request_id: str = "") -> JSONResponse:
    """The whole reply: Retry-After in whole seconds where it makes sense."""
    return JSONResponse(shape.body(failure, request_id), shape.status(failure), failure.headers)


def path_below_root(scope: Scope) -> str:
    """A request's path without what a proxy in front puts before it."""
    path, root = scope["path"], scope.get("root_path", "")
    return path.removeprefix(root) if root and path.startswith(root) else path


def shape_for(scope: Scope) -> ErrorShape:
    """The shape of the dialect that a request speaks, inside an application."""
    return scope["app"].state.error_shapes.of(scope)


def _reply_to(scope: Scope, failure: Failure) -> JSONResponse:
    return reply(failure, shape_for(scope), scope.get("state", {}).get("request_id", ""))


def error_response(error: RequestError, scope: Scope) -> JSONResponse:
    """The reply for a request that cannot be served."""
    return _reply_to(scope, failure_of(error))


def install(app: FastAPI, shapes: ErrorShapes) -> None:
    """Makes every failure of `app` answer in the shape of the request's dialect."""
    app.state.error_shapes = shapes
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
    text, headers = error.detail if isinstance(error.detail, str) else "Refused.", error.headers
    if error.status_code == 404:
        text = f"There is no {request.scope['path']} here."
    elif error.status_code == 405:
        text = f"{request.scope['path']} does not take {request.method}."
        headers = {"Allow": ", ".join(_methods(request))}
    failure = Failure(error.status_code, text, code=_HTTP_CODES.get(error.status_code), headers=headers)
    return _reply_to(request.scope, failure)


def _methods(request: Request) -> list[str]:
    """What a path takes, over all routes that it has: the router tells of the first alone."""
    fitting = [route for route in request.app.state.routes if route.matches(request.scope)[0] is not Match.NONE]
    return sorted({method for route in fitting if route.path == fitting[0].path for method in route.methods or ()})


async def _on_client_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nginx's code; nobody reads it but the access log
