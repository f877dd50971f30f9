"""`RequestError` as a gRPC status, and back."""

from __future__ import annotations

import grpc

from serving.errors import ErrorKind, RequestError

PARAM_KEY = "jaxserve-error-param"
CODE_KEY = "jaxserve-error-code"
RETRY_KEY = "jaxserve-retry-after-ms"
MAX_MESSAGE_CHARS = 2048  # a status travels in HTTP/2 headers, which peers bound at 8 or 16 KiB

_KINDS = {kind.grpc_status: kind for kind in ErrorKind}


def status_of(error: RequestError) -> tuple[grpc.StatusCode, str, tuple[tuple[str, str], ...]]:
    """(status, message, trailing metadata)."""
    trailing = []
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


def error_of(error: grpc.aio.AioRpcError) -> RequestError:
    """What a call to another jaxserve failed with. Statuses that are not ours (a lost connection) are UNAVAILABLE."""
    trailing = {key: value for key, value in error.trailing_metadata() or () if isinstance(value, str)}
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
