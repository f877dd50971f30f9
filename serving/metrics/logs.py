"""Logs for people or for machines, each line with its request's id. No prompt text is ever logged here."""

from __future__ import annotations

import contextlib
import contextvars
import json
import logging
import os
import pathlib
import subprocess
import sys
import time
import uuid
from typing import Literal, TextIO

from serving.metrics import stderr_json

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


_access_log = logging.getLogger("serving.access")


def log_access(
    method: str, route: str, status: int | str, seconds: float, client: str | None, key: str | None, quiet: bool
) -> None:
    """One line about a request that is over, over whichever protocol.

    Args:
        route: its pattern, never the path that was asked for.
        status: an HTTP status, or gRPC's name of one.
        client: the address it came from, where it is known.
        key: the name of the API key it brought; None where none was asked for, or the request was refused for it.
        quiet: log at debug level: probes, scrapes and gateways come every few seconds.
    """
    level = logging.DEBUG if quiet else logging.INFO
    if not _access_log.isEnabledFor(level):
        return
    fields = {"method": method, "path": route, "status": status, "seconds": round(seconds, 4)}
    text = f"{method} {route} {status} {seconds:.3f}s"
    for name, value in (("client", client), ("key", key)):
        if value:
            fields[name] = value
            text += f" {name}={value}"
    _access_log.log(level, "%s", text, extra={"fields": fields})


class _JsonStderr(logging.StreamHandler):
    """Writes our lines to the process's own standard error, while a small process beside us makes JSON of whatever anybody else
    writes there: `print`, C++ libraries (gRPC, XLA), tracebacks, last words of a crash. See `stderr_json`.

    `close` (which `logging.shutdown` calls) waits until the other one has written everything.
    """

    def __init__(self) -> None:
        sys.stderr.flush()
        self._own = os.dup(STDERR)
        script = pathlib.Path(stderr_json.__file__)
        # Isolated and without site-packages: it starts in some 20 ms, and imports nothing of ours.
        command = [sys.executable, "-I", "-S", str(script)]
        self._beside = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=self._own, start_new_session=True)
        assert self._beside.stdin is not None
        os.dup2(self._beside.stdin.fileno(), STDERR)
        self._beside.stdin.close()
        super().__init__(os.fdopen(os.dup(self._own), "w", buffering=1, encoding="utf-8", errors="replace"))

    def close(self) -> None:
        if self._own >= 0:
            sys.stderr.flush()
            with contextlib.suppress(OSError):  # the other one may be gone
                os.write(STDERR, f"\n{stderr_json.END}".encode())
            os.dup2(self._own, STDERR)
            os.close(self._own)
            self._own = -1
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._beside.wait(LAST_LINES_S)
            self.stream.close()
        super().close()


STDERR = 2
LAST_LINES_S = 10.0


def setup_logging(
    style: Literal["human", "json"] = "human", level: str = "info", stream: TextIO | None = None
) -> logging.Handler:
    """Sends the process's logs to `stream` in one style. Returns the handler, for removal; closing it gives standard error back.

    Args:
        style: with "json" and no stream, all of standard error is JSON, whoever writes it.
        stream: standard error without.
    """
    if stream is None and style == "json":
        handler: logging.Handler = _JsonStderr()
    else:
        handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(_Json() if style == "json" else _Human())
    root = logging.getLogger()
    root.addHandler(handler)
    logging.captureWarnings(True)
    logging.getLogger("serving").setLevel(level.upper())
    return handler
