"""Runs the lines of a batch file over an HTTP application: bounded at once, gone on with where an earlier run was cut."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from starlette.types import ASGIApp

from serving.frontends.http.direct import post

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")
MAX_LINE_BYTES = 64 * 2**20
RETRIES = 5


@dataclasses.dataclass(frozen=True)
class Line:
    """One request of the input. `error` tells why it cannot be run."""

    number: int
    custom_id: str | None = None
    url: str = ""
    body: dict[str, Any] = dataclasses.field(default_factory=dict)
    error: str | None = None

    @property
    def key(self) -> str:
        """What marks it as done in the output: its place and its name."""
        return f"batch_req_{self.number}:{self.custom_id}"


@dataclasses.dataclass
class Summary:
    """What a run came to. `failures` has (line number, custom_id, why)."""

    total: int = 0
    skipped: int = 0
    succeeded: int = 0
    failures: list[tuple[int, str | None, str]] = dataclasses.field(default_factory=list)


def read_lines(path: pathlib.Path) -> Iterator[Line]:
    """The requests of a batch file. Lines that are no request come with `error`; blank ones not at all.

    Raises:
        OSError: the file cannot be read.
    """
    seen: set[str] = set()
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if not raw.strip():
                continue
            line = _read_line(number, raw)
            if line.error is None and line.custom_id in seen:
                line = dataclasses.replace(line, error=f"custom_id {line.custom_id!r} was used by an earlier line.")
            seen.add(line.custom_id or "")
            yield line


def _read_line(number: int, raw: bytes) -> Line:
    if len(raw) > MAX_LINE_BYTES:
        return Line(number, error=f"The line has {len(raw)} bytes; at most {MAX_LINE_BYTES} are taken.")
    try:
        entry = json.loads(raw)
    except (ValueError, RecursionError) as error:
        return Line(number, error=f"Not valid JSON: {error}.")
    if not isinstance(entry, dict):
        return Line(number, error="Not a JSON object.")
    custom_id = entry.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        return Line(number, error="custom_id is missing: give each line a name of its own.")
    url, body = entry.get("url"), entry.get("body")
    line = Line(number, custom_id)
    if entry.get("method", "POST") != "POST":
        return dataclasses.replace(line, error=f"method must be POST, got {entry['method']!r}.")
    if url not in URLS:
        return dataclasses.replace(line, error=f"url must be one of {', '.join(URLS)}; got {url!r}.")
    if not isinstance(body, dict):
        return dataclasses.replace(line, error="body must be a JSON object.")
    if body.get("stream"):
        return dataclasses.replace(line, error="stream is not for batches: leave it out.")
    return Line(number, custom_id, url, body)


def finished_keys(path: pathlib.Path) -> set[str]:
    """The keys of lines that an earlier run finished. Cuts off a half-written last line, and drops the lines of
    failures that were the server's (status 500 and up), which are worth another try.

    Raises:
        ValueError: the file is there but is not the output of a batch.
        OSError: it cannot be read or rewritten.
    """
    if not path.exists():
        return set()
    raw = path.read_bytes()
    whole, _, cut = raw.rpartition(b"\n")
    keys: set[str] = set()
    kept: list[bytes] = []
    for number, line in enumerate(whole.split(b"\n") if whole else (), 1):
        try:
            entry = json.loads(line)
            key = f"{entry['id']}:{entry['custom_id']}"
            status = (entry["response"] or {}).get("status_code", 0)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(
                f"{path}, line {number}, is not the output of a batch. Name another file or move it away."
            ) from None
        if status < 500:
            keys.add(key)
            kept.append(line)
    if cut or len(kept) < whole.count(b"\n") + bool(whole):
        fresh = path.with_name(path.name + ".tmp")
        fresh.write_bytes(b"".join(line + b"\n" for line in kept))
        os.replace(fresh, path)
    return keys


async def call_app(app: ASGIApp, url: str, body: dict[str, Any], request_id: str) -> tuple[int, Any]:
    """One POST of JSON. Returns status and decoded reply."""
    headers = ((b"content-type", b"application/json"), (b"x-request-id", request_id.encode()))
    status, reply = await post(app, url, json.dumps(body).encode(), headers)
    return status, json.loads(reply or b"null")


async def run_batch(
    app: ASGIApp,
    source: pathlib.Path,
    target: pathlib.Path,
    *,
    concurrency: int,
    on_done: Callable[[Summary], None] = lambda summary: None,
) -> Summary:
    """Runs the lines of `source` that `target` does not have yet, at most `concurrency` at a time.

    Args:
        on_done: called after each line, for progress.
    Raises:
        OSError, ValueError: a file cannot be used.
    """
    done = finished_keys(target)
    summary = Summary()
    lines = read_lines(source)
    with target.open("a", encoding="utf-8") as out:

        async def worker() -> None:
            # Workers share one iterator: at most `concurrency` lines of the input are in memory.
            for line in lines:
                summary.total += 1
                if line.key in done:
                    summary.skipped += 1
                else:
                    await _one(app, line, out, summary)
                on_done(summary)

        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(worker())
    summary.failures.sort()
    return summary


async def _one(app: ASGIApp, line: Line, out: TextIO, summary: Summary) -> None:
    entry: dict[str, Any] = {"id": f"batch_req_{line.number}", "custom_id": line.custom_id}
    if line.error is not None:
        entry |= {"response": None, "error": {"code": "invalid_line", "message": line.error}}
        summary.failures.append((line.number, line.custom_id, line.error))
    else:
        status, reply = 0, None
        for attempt in range(RETRIES):
            status, reply = await call_app(app, line.url, line.body, f"batch-{line.number}")
            if status not in (429, 503):
                break
            await asyncio.sleep(0.1 * 2**attempt)
        entry |= {
            "response": {"status_code": status, "request_id": f"batch-{line.number}", "body": reply},
            "error": None,
        }
        if status == 200:
            summary.succeeded += 1
        else:
            why = reply.get("error", {}).get("message", "") if isinstance(reply, dict) else ""
            summary.failures.append((line.number, line.custom_id, f"{status} {why}"))
    out.write(json.dumps(entry, ensure_ascii=False) + "\n")
    out.flush()  # what a kill leaves behind is whole lines, and at most one that is not
