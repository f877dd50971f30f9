"""`RequestError` as a gRPC status, and back."""

from __future__ import annotations

import logging

import grpc

from serving.errors import ErrorKind, RequestError

log = logging.getLogger(__name__)

OURS_KEY = "jaxserve-error"
"""In the trailing metadata of every status that a server of ours sends: gRPC makes statuses too, in words of its own."""

PARAM_KEY = "jaxserve-error-param"
CODE_KEY = "jaxserve-error-code"
RETRY_KEY = "jaxserve-retry-after-ms"
MAX_MESSAGE_CHARS = 2048  # a status travels in HTTP/2 headers, which peers bound at 8 or 16 KiB

LOST = "The engine that this request was with is lost. Try again."
_GRPC_SAYS = {
    grpc.StatusCode.DEADLINE_EXCEEDED: (ErrorKind.DEADLINE_EXCEEDED, "The engine did not answer in time."),
    grpc.StatusCode.UNAUTHENTICATED: (
        ErrorKind.UNAUTHENTICATED,
        "The engine, or what stands before it, asks for a key.",
    ),
    grpc.StatusCode.PERMISSION_DENIED: (
        ErrorKind.PERMISSION_DENIED,
        "The engine, or what stands before it, refuses us.",
    ),
    grpc.StatusCode.UNIMPLEMENTED: (ErrorKind.UNIMPLEMENTED, "What answers there is no engine of this kind."),
}

_KINDS = {kind.grpc_status: kind for kind in ErrorKind}


def status_of(error: RequestError) -> tuple[grpc.StatusCode, str, tuple[tuple[str, str], ...]]:
    """(status, message, trailing metadata)."""
    trailing = [(OURS_KEY, error.kind.name.lower())]
    if error.param:
        trailing.append((PARAM_KEY, _ascii(error.param)))
    if error.code:
        trailing.append((CODE_KEY, _ascii(error.code)))
    if error.retry_after_s is not None:
        trailing.append((RETRY_KEY, str(int(error.retry_after_s * 1000))))
    message = error.message
    if len(message) > MAX_MESSAGE_CHARS:
        message = message[:MAX_MESSAGE_CHARS] + " ..."
    return grpc.StatusCode[error.kind.grpc_status], message, tuple(trailing)


def error_of(error: grpc.aio.AioRpcError, quiet: bool = False) -> RequestError:
    """What a call to another jaxserve failed with. What the other one said is passed on; what gRPC says itself (a lost
    connection, a time that is up) is for the log, and becomes a sentence for whoever asked.

    Args:
        quiet: log nothing.
    """
    trailing = {key: value for key, value in error.trailing_metadata() or () if isinstance(value, str)}
    if OURS_KEY not in trailing:
        log.log(
            logging.DEBUG if quiet else logging.WARNING,
            "a call to the engine failed: %s: %s",
            error.code().name,
            error.details(),
        )
        kind, words = _GRPC_SAYS.get(error.code(), (ErrorKind.UNAVAILABLE, LOST))
        return RequestError(kind, words, retry_after_s=2.0 if kind is ErrorKind.UNAVAILABLE else None)
    retry = trailing.get(RETRY_KEY)
    return RequestError(
        _KINDS.get(error.code().name, ErrorKind.UNAVAILABLE),
        error.details() or error.code().name,
        param=trailing.get(PARAM_KEY),
        code=trailing.get(CODE_KEY),
        retry_after_s=int(retry) / 1000 if retry else None,
    )


def _ascii(text: str) -> str:
    """Header values are printable ASCII."""
    return text.encode("ascii", errors="replace").decode()[:256]
