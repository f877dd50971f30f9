"""Responses that run without a client: their events are kept while they run, to be followed from any of them on."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

from serving.errors import ErrorKind, RequestError
from serving.frontends.openai.responses.events import ResponseWriter
from serving.frontends.openai.responses.state import tenant_of_task

log = logging.getLogger(__name__)

MAX_RUNNING = 256
"""At one time, of everybody: each keeps its events in memory."""

Save = Callable[[dict[str, Any], list[str] | None], Awaitable[None]]
"""Keeps a response with its events."""


class _Running:
    """One of them."""

    def __init__(self, writer: ResponseWriter, tenant: str) -> None:
        self.writer = writer
        self.tenant = tenant
        self.events: list[str] = []  # by sequence number
        self.ended = False
        self.task: asyncio.Task[None] | None = None
        self._news = asyncio.Event()

    def add(self, events: bytes) -> None:
        """Takes in events, several in one piece."""
        self.events += [f"{event}\n\n" for event in events.decode().split("\n\n") if event]
        self._tell()

    def end(self) -> None:
        self.ended = True
        self._tell()

    def _tell(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()

    async def wait(self) -> None:
        """Returns when something is new."""
        await self._news.wait()


class Background:
    """The responses that run in the background."""

    def __init__(self) -> None:
        self._running: dict[str, _Running] = {}

    def find(self, response_id: str) -> _Running | None:
        """One of the running request's tenant."""
        found = self._running.get(response_id)
        return found if found is not None and found.tenant == tenant_of_task() else None

    async def start(self, writer: ResponseWriter, events: AsyncGenerator[bytes, None], save: Save) -> None:
        """Runs a response on. It is kept from now on, as "queued" first.

        Raises:
            RequestError: RESOURCE_EXHAUSTED: too many run.
        """
        if len(self._running) >= MAX_RUNNING:
            raise RequestError(
                ErrorKind.RESOURCE_EXHAUSTED,
                f"{MAX_RUNNING} responses run in the background, which is all that may. Try again later.",
                code="queue_full",
                retry_after_s=5.0,
            )
        one = _Running(writer, tenant_of_task())
        self._running[writer.response["id"]] = one
        one.add(writer.queued())
        await save(writer.response, None)
        one.task = asyncio.create_task(self._run(one, events, save), name="jaxserve-background-response")
        await asyncio.sleep(0)  # a task that is cancelled before it has begun would not even end

    async def _run(self, one: _Running, events: AsyncGenerator[bytes, None], save: Save) -> None:
        writer = one.writer
        try:
            async with contextlib.aclosing(events):
                async for piece in events:
                    one.add(piece)
        except asyncio.CancelledError:
            one.add(writer.cancelled())
        except Exception as error:
            one.add(writer.failed(error))
        finally:
            await asyncio.shield(save(writer.response, one.events))
            one.end()
            del self._running[writer.response["id"]]

    async def cancel(self, response_id: str) -> dict[str, Any] | None:
        """Ends one; returns it, or None where it does not run."""
        one = self.find(response_id)
        if one is None or one.task is None:
            return None
        one.task.cancel()
        await asyncio.wait({one.task})
        return one.writer.response

    async def follow(self, response_id: str, after: int) -> AsyncGenerator[bytes, None]:
        """The events behind number `after`, until the last."""
        one = self.find(response_id)
        at = after + 1
        while one is not None:
            if at < len(one.events):
                new = "".join(one.events[at:])
                at = len(one.events)
                yield new.encode()
            elif one.ended:
                return
            else:
                await one.wait()

    async def stop(self) -> None:
        """Ends all, and waits until they are kept."""
        tasks = {one.task for one in self._running.values() if one.task is not None}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
