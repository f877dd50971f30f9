"""python -m serving.batch -i in.jsonl -o out.jsonl: OpenAI batch files, without a server.

A line of the input names a request: {"custom_id", "method": "POST", "url": "/v1/chat/completions", "body": {...}}.
Each becomes a line of the output, in order of completion. Killed and started again, it goes on where it was.
https://platform.openai.com/docs/guides/batch
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TextIO

from starlette.types import ASGIApp

from serving import event_loop
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


def _count_lines(path: pathlib.Path) -> int:
    try:
        with path.open("rb") as file:
            return sum(1 for raw in file if raw.strip())
    except OSError as error:
        raise ValueError(f"--input {path}: cannot be read ({error.strerror}).") from None


def _check_writable(path: pathlib.Path) -> None:
    """Raises ValueError for an output that cannot be written; leaves no trace."""
    fresh = not path.exists()
    try:
        path.open("ab").close()
    except OSError as error:
        raise ValueError(f"--output {path}: cannot be written ({error.strerror}).") from None
    if fresh:
        path.unlink()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a batch file. Returns 0 when every line succeeded, 1 when some failed, 2 for wrong flags or files."""
    from serving.boot.engine_flags import add_engine_flags, engine_config, in_flags
    from serving.boot.flags import Parser

    parser = Parser(prog="python -m serving.batch", description=__doc__, allow_abbrev=False)
    parser.add_argument("-i", "--input", required=True, type=pathlib.Path, help="batch file, one JSON object a line")
    parser.add_argument("-o", "--output", required=True, type=pathlib.Path, help="results; gone on with when there")
    parser.add_argument("--concurrency", type=int, default=None, help="requests at once (default: twice what runs)")
    add_engine_flags(parser)
    args = parser.parse_args(argv)
    try:
        config = engine_config(args)
        total = _count_lines(args.input)
        finished_keys(args.output)  # a wrong file is told before the model is loaded
        _check_writable(args.output)
    except (OSError, ValueError) as error:
        parser.error(in_flags(str(error), vars(args).keys()))
    from serving.boot.startup import start

    try:
        started = start(config, say=lambda line: print(line, file=sys.stderr, flush=True))
    except (OSError, ValueError) as error:
        print(f"error: {in_flags(str(error), vars(args).keys())}", file=sys.stderr)
        return 2
    try:
        summary = event_loop.run(_run(started, args, total))
    except KeyboardInterrupt:
        print("interrupted; start it again to go on", file=sys.stderr)
        return 130
    finally:
        started.engine.shutdown()
    again = f", {summary.skipped} were there already" if summary.skipped else ""
    print(f"{summary.succeeded} succeeded, {len(summary.failures)} failed{again}: {args.output}", file=sys.stderr)
    for number, custom_id, why in summary.failures:
        print(f"  line {number} ({custom_id}): {why}", file=sys.stderr)
    return 1 if summary.failures else 0


async def _run(started: Any, args: Any, total: int) -> Summary:
    from tqdm import tqdm

    from serving.frontends.app import create_app

    service = started.service()
    concurrency = args.concurrency or 2 * service.info.max_num_seqs
    with contextlib.closing(tqdm(total=total, unit="req", disable=not args.progress)) as bar:

        def progress(summary: Summary) -> None:
            bar.update(summary.total - bar.n)
            bar.set_postfix(failed=len(summary.failures), refresh=False)

        return await run_batch(
            create_app(service, page=False), args.input, args.output, concurrency=concurrency, on_done=progress
        )


if __name__ == "__main__":
    sys.exit(main())
