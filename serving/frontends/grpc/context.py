"""What a call's metadata says about it: its id, in and out, and the trace that it is part of; and the access log."""

from __future__ import annotations

import logging
import time
from typing import Any

import grpc

from serving.metrics.logs import request_id_of_task, request_id_or_new
from serving.metrics.tracing import TRACE_HEADERS, trace_headers_of_task

REQUEST_ID_KEY = "x-request-id"

access_log = logging.getLogger("serving.access")
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
    level = logging.DEBUG if method in _QUIET else logging.INFO
    if not access_log.isEnabledFor(level):
        return
    code = context.code()
    status = code.name if isinstance(code, grpc.StatusCode) else "CANCELLED" if context.cancelled() else "OK"
    seconds = time.monotonic() - began
    fields = {"method": "gRPC", "path": method, "status": status, "seconds": round(seconds, 4)}
    access_log.log(level, "%s %s %s %.3fs", *fields.values(), extra={"fields": fields})


def outgoing_metadata() -> tuple[tuple[str, str], ...]:
    """What a call to another server says of the request that the running task serves."""
    pairs = tuple((trace_headers_of_task.get() or {}).items())
    request_id = request_id_of_task.get()
    return (*pairs, (REQUEST_ID_KEY, request_id)) if request_id else pairs
