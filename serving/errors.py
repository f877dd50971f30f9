"""The one error type that a request's author sees, whatever entry it came through.

Front ends translate `ErrorKind` to their protocol (gRPC status, HTTP code); nothing else about a failure
leaves the server.
"""

from __future__ import annotations

import enum


class ErrorKind(enum.Enum):
    """What went wrong, in the vocabulary of gRPC's status codes. The value is (gRPC status name, HTTP code)."""

    INVALID_ARGUMENT = ("INVALID_ARGUMENT", 400)
    UNAUTHENTICATED = ("UNAUTHENTICATED", 401)
    PERMISSION_DENIED = ("PERMISSION_DENIED", 403)
    NOT_FOUND = ("NOT_FOUND", 404)
    FAILED_PRECONDITION = ("FAILED_PRECONDITION", 409)
    RESOURCE_EXHAUSTED = ("RESOURCE_EXHAUSTED", 429)
    DEADLINE_EXCEEDED = ("DEADLINE_EXCEEDED", 504)
    UNIMPLEMENTED = ("UNIMPLEMENTED", 501)
    UNAVAILABLE = ("UNAVAILABLE", 503)
    INTERNAL = ("INTERNAL", 500)

    @property
    def grpc_status(self) -> str:
        return self.value[0]

    @property
    def http_status(self) -> int:
        return self.value[1]


DIED = "engine_died"
"""`RequestError.code` of requests that were running when the engine died: where nothing of an answer is out yet, another
replica may be asked."""


class RequestError(Exception):
    """A request that cannot be served, with a sentence for the person who sent it.

    Args:
        kind: the class of failure.
        message: what was wrong, the value, the limit, what to do. Never internal text (paths, addresses, stacks).
        param: the request field at fault, as the client spells it, or None.
        code: a short machine-readable word for clients (OpenAI's `error.code`), or None.
        retry_after_s: seconds after which trying again makes sense (queue full, draining), or None.
    """

    def __init__(
        self,
        kind: ErrorKind,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s


def invalid(message: str, param: str | None = None) -> RequestError:
    """An INVALID_ARGUMENT error about `param`."""
    return RequestError(ErrorKind.INVALID_ARGUMENT, message, param=param)
