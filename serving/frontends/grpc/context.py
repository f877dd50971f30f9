"""What a call's metadata says about it: its id, in and out, and the trace that it is part of; and the access log."""

from __future__ import annotations

import time
import urllib.parse
from typing import Any

import grpc

from serving.access import caller_of_task
from serving.metrics.logs import log_access, request_id_of_task, request_id_or_new
from serving.metrics.tracing import TRACE_HEADERS, trace_headers_of_task

REQUEST_ID_KEY = "x-request-id"

_QUIET = frozenset({"GetServerInfo"})
"""Gateways ask every second: logged at debug level."""


def begin_call(context: Any) -> float:
    """Gives the call an id (the client's where it is sane) and takes in its trace. Both belong to the running task, which
    is the call's own.

    Returns:
        time.monotonic() now, for `end_call`.
    """
    metadata = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
    request_id_of_task.set(request_id_or_new(metadata.get(REQUEST_ID_KEY, "")))
    trace_headers_of_task.set({key: metadata[key] for key in TRACE_HEADERS if key in metadata} or None)
    return time.monotonic()


def id_metadata() -> tuple[tuple[str, str], ...]:
    """The call's id, for its initial metadata, or for the trailing one of a call that failed before its first message:
    initial metadata sent with nothing behind it would keep clients from trying again."""
    return ((REQUEST_ID_KEY, request_id_of_task.get() or ""),)


def end_call(context: Any, method: str, began: float) -> None:
    """One line in the log. A call that its client dropped says CANCELLED."""
    code = context.code()
    status = code.name if isinstance(code, grpc.StatusCode) else "CANCELLED" if context.cancelled() else "OK"
    caller = caller_of_task.get()
    log_access(
        "gRPC", method, status, time.monotonic() - began, _address(context), caller and caller.name, method in _QUIET
    )


def _address(context: Any) -> str | None:
    """The client's address, from gRPC's `ipv4:10.0.0.1:5000` or `ipv6:%5B::1%5D:5000`."""
    kind, _, rest = (context.peer() or "").partition(":")
    return urllib.parse.unquote(rest).rpartition(":")[0].strip("[]") if kind in ("ipv4", "ipv6") else kind or None


def outgoing_metadata() -> tuple[tuple[str, str], ...]:
    """What a call to another server says of the request that the running task serves."""
    pairs = tuple((trace_headers_of_task.get() or {}).items())
    request_id = request_id_of_task.get()
    return (*pairs, (REQUEST_ID_KEY, request_id)) if request_id else pairs
