"""Logs for people or for machines, each line with its request's id. No prompt text is ever logged here."""

from __future__ import annotations

import contextvars
import json
import logging
import sys
import time
import uuid
from typing import Literal, TextIO

request_id_of_task: contextvars.ContextVar[str | None] = contextvars.ContextVar("jaxserve_request_id", default=None)
"""The id of the request that the running task serves; front ends set it."""

MAX_REQUEST_ID_CHARS = 128


def request_id_or_new(asked: str) -> str:
    """The id that a client gives its request, where it is printable ASCII and short; else a new one."""
    if 0 < len(asked) <= MAX_REQUEST_ID_CHARS and asked.isascii() and asked.isprintable():
        return asked
    return uuid.uuid4().hex


class _Human(logging.Formatter):
    """`12:34:56 INFO serving.access [req] POST /v1/chat/completions 200 0.123s`"""

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        request_id = request_id_of_task.get()
        where = f" [{request_id}]" if request_id else ""
        text = f"{clock} {record.levelname} {record.name}{where} {record.getMessage()}"
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


class _Json(logging.Formatter):
    """One JSON object a line, for log collectors. A record's `fields` are merged in."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        request_id = request_id_of_task.get()
        if request_id:
            entry["request_id"] = request_id
        entry.update(getattr(record, "fields", {}))
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False, default=str)


def setup_logging(
    style: Literal["human", "json"] = "human", level: str = "info", stream: TextIO | None = None
) -> logging.Handler:
    """Sends the process's logs to `stream` (standard error) in one style. Returns the handler, for removal."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(_Json() if style == "json" else _Human())
    root = logging.getLogger()
    root.addHandler(handler)
    logging.getLogger("serving").setLevel(level.upper())
    return handler
