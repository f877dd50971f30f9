"""Batches while they run: two at a time, each with the key of who sent it, gone on with after a restart."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import pathlib
import time
from collections.abc import Sequence
from typing import Any

from starlette.types import ASGIApp

from serving.access.keys import Caller, Role, caller_of_task
from serving.errors import ErrorKind, RequestError
from serving.frontends.openai.batches.files import Files
from serving.frontends.openai.batches.runner import Line, Summary, read_lines, run_batch
from serving.storage import Entry, Store

log = logging.getLogger(__name__)

BATCH = "batch"
AT_ONCE = 2
MAX_OPEN = 256
MAX_LINES = 50_000
MAX_ERRORS = 100
ENDED = ("completed", "failed", "cancelled", "expired")


class Batches:
    """The batches of everybody.

    Args:
        app: takes the lines; see `serving.frontends.http.direct.inside`.
        concurrency: lines of one batch at once: some of what the engine runs, so that others find room.
    """

    def __init__(self, store: Store, files: Files, concurrency: int) -> None:
        self.app: ASGIApp | None = None
        self._store = store
        self._files = files
        self._concurrency = concurrency
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._live: dict[str, dict[str, Any]] = {}
        self._stopping = False
        self._slots = asyncio.Semaphore(AT_ONCE)

    async def start(self, batch: dict[str, Any]) -> None:
        """Keeps a batch, and runs it when its turn comes.

        Raises:
            RequestError: RESOURCE_EXHAUSTED: too many are open.
        """
        if len(self._tasks) >= MAX_OPEN:
            message = f"{MAX_OPEN} batches run or wait, which is all that may. Try again later."
            raise RequestError(ErrorKind.RESOURCE_EXHAUSTED, message, code="queue_full", retry_after_s=60.0)
        caller = caller_of_task.get()
        who = None if caller is None else {"name": caller.name, "role": caller.role.value, "scope": caller.cache_scope}
        await self._save(caller.name if caller else "", batch, who)
        self._begin(batch, caller, who)

    async def resume(self) -> None:
        """Goes on with what an earlier run of the server did not end."""
        for _, entry in await self._store.everyones(BATCH):
            if entry.body["status"] not in ENDED and entry.id not in self._tasks:
                who = entry.data["who"]
                caller = None if who is None else Caller(who["name"], Role(who["role"]), who["scope"])
                self._begin(entry.body, caller, who)

    async def cancel(self, batch_id: str) -> None:
        """Ends one that runs; what it has done is kept."""
        task = self._tasks.get(batch_id)
        if task is not None:
            task.cancel()
            await asyncio.wait({task})

    async def stop(self) -> None:
        """Lets all go: the next run of the server goes on with them."""
        self._stopping = True
        tasks = set(self._tasks.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def _begin(self, batch: dict[str, Any], caller: Caller | None, who: Any) -> None:
        token = caller_of_task.set(caller)  # a task keeps what is set when it is made
        try:
            task = asyncio.create_task(self._run(batch, who), name="jaxserve-batch")
        finally:
            caller_of_task.reset(token)
        self._tasks[batch["id"]], self._live[batch["id"]] = task, batch
        task.add_done_callback(lambda _: self._forget(batch["id"]))

    def _forget(self, batch_id: str) -> None:
        del self._tasks[batch_id], self._live[batch_id]

    def live(self, batch_id: str) -> dict[str, Any] | None:
        """A batch as it stands while it runs or waits; whose it is was asked before."""
        return self._live.get(batch_id)

    async def _run(self, batch: dict[str, Any], who: Any) -> None:
        tenant = who["name"] if who else ""
        try:
            async with asyncio.timeout(max(0.0, batch["expires_at"] - time.time())):
                async with self._slots:
                    if not await self._validated(tenant, batch, who):
                        return
                    await self._run_lines(tenant, batch, who)
            status = "completed"
        except TimeoutError:
            status = "expired"
        except asyncio.CancelledError:
            if self._stopping:
                return
            status = "cancelled"
        except Exception as error:
            log.exception("the batch %s failed", batch["id"])
            batch["errors"] = _errors([(None, f"The server failed to run it: {type(error).__name__}.")])
            status = "failed"
        await self._end(tenant, batch, who, status)

    async def _validated(self, tenant: str, batch: dict[str, Any], who: Any) -> bool:
        """Whether its lines are requests of its endpoint; a batch that is not so has failed."""
        lines = await asyncio.to_thread(_read, self._files.path(batch["input_file_id"]))
        wrong: list[tuple[int | None, str]] = []
        wrong += [(line.number, line.error) for line in lines if line.error is not None]
        wrong += [
            (line.number, f"url must be the batch's endpoint, {batch['endpoint']}; got {line.url!r}.")
            for line in lines
            if line.error is None and line.url != batch["endpoint"]
        ]
        if not lines or len(lines) > MAX_LINES:
            wrong.append((None, f"The file has {len(lines)} requests; it takes 1 to {MAX_LINES}."))
        batch["request_counts"]["total"] = len(lines)
        if wrong:
            batch["errors"] = _errors(sorted(wrong, key=lambda one: one[0] or 0)[:MAX_ERRORS])
            await self._end(tenant, batch, who, "failed")
            return False
        batch |= {"status": "in_progress", "in_progress_at": int(time.time())}
        await self._save(tenant, batch, who)
        return True

    async def _run_lines(self, tenant: str, batch: dict[str, Any], who: Any) -> None:
        assert self.app is not None
        counts = batch["request_counts"]

        def count(summary: Summary) -> None:
            done = summary.skipped + summary.succeeded
            counts.update(completed=done, failed=len(summary.failures))

        source, target = self._files.path(batch["input_file_id"]), self._working(batch)
        await run_batch(self.app, source, target, concurrency=self._concurrency, on_done=count)
        batch |= {"status": "finalizing", "finalizing_at": int(time.time())}

    async def _end(self, tenant: str, batch: dict[str, Any], who: Any, status: str) -> None:
        """Parts the results into those that are answers and those that are errors, and keeps both."""
        working, ids = self._working(batch), (self._files.make_id(), self._files.make_id())
        paths = [self._files.path(one) for one in ids]
        numbers = await asyncio.to_thread(_part, working, *paths)
        for number, file_id, field in zip(numbers, ids, ("output_file_id", "error_file_id"), strict=True):
            if number:
                await self._files.add(tenant, file_id, f"{batch['id']}_{field.split('_')[0]}.jsonl", "batch_output")
                batch[field] = file_id
        batch["request_counts"].update(completed=numbers[0], failed=numbers[1])
        batch |= {"status": status, f"{status}_at": int(time.time())}
        await self._save(tenant, batch, who)

    def _working(self, batch: dict[str, Any]) -> pathlib.Path:
        """Where results lie until the batch has ended."""
        return self._files.path(f"{batch['id']}.working")

    async def _save(self, tenant: str, batch: dict[str, Any], who: Any) -> None:
        await self._store.put(tenant, Entry(BATCH, batch["id"], batch, {"who": who}))


def _read(path: pathlib.Path) -> list[Line]:
    """The lines of a batch's input without their bodies. Raises OSError: it is gone."""
    return [Line(line.number, line.custom_id, line.url, {}, line.error) for line in read_lines(path)]


def _part(working: pathlib.Path, good: pathlib.Path, bad: pathlib.Path) -> tuple[int, int]:
    """Writes the answers and the errors of a results file to files of their own, and removes it; how many of each."""
    numbers = [0, 0]
    if not working.exists():
        return 0, 0
    with contextlib.ExitStack() as stack, working.open("rb") as file:
        outs: list[Any] = [None, None]
        for line in file:
            entry = json.loads(line)
            which = 0 if entry["response"] is not None and entry["response"]["status_code"] == 200 else 1
            if outs[which] is None:
                path = (good, bad)[which]
                descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
                outs[which] = stack.enter_context(open(descriptor, "wb"))
            outs[which].write(line)
            numbers[which] += 1
    working.unlink()
    return numbers[0], numbers[1]


def _errors(found: Sequence[tuple[int | None, str]]) -> dict[str, Any]:
    data = [{"code": "invalid_line", "line": line, "message": text, "param": None} for line, text in found]
    return {"object": "list", "data": data}
