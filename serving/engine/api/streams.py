"""Outputs on their way from the engine thread to whoever awaits them."""

from __future__ import annotations

import asyncio
import dataclasses
from collections import deque
from collections.abc import AsyncIterator

from serving.engine.api.types import EngineOutput
from serving.errors import RequestError

MAX_ITEMS = 64


class OutputStream:
    """Single-producer, single-consumer stream of one request's outputs, living on one event loop.

    A consumer that falls behind gets what piled up as one merged output. What waits is merged every `MAX_ITEMS` outputs, so a
    consumer that reads nothing costs the token ids of one completion (and their logprobs, where asked for), not an object a
    token, and never more than a completion may have. Whether to go on for it is the front end's to decide
    (`Limits.stalled_reader_s`).
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._items: deque[EngineOutput] = deque()
        self._error: RequestError | None = None
        # Not an asyncio.Event: 64 streams wait once a step each, and a bare future costs a third of one.
        self._waiter: asyncio.Future[None] | None = None

    def put(self, output: EngineOutput) -> None:
        """On the event loop's thread."""
        self._items.append(output)
        if len(self._items) >= MAX_ITEMS:
            merged = merge(self._items)
            self._items.clear()
            self._items.append(merged)
        self._wake()

    def fail(self, error: RequestError) -> None:
        """On the event loop's thread. The consumer gets what came before, then the error."""
        self._error = error
        self._wake()

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():  # done: its consumer was cancelled
            waiter.set_result(None)

    async def __aiter__(self) -> AsyncIterator[EngineOutput]:
        while True:
            while not self._items:
                if self._error:
                    raise self._error
                self._waiter = self.loop.create_future()
                await self._waiter
            output = merge(self._items)
            self._items.clear()
            yield output
            if output.finish_reason is not None:
                return


def merge(outputs: deque[EngineOutput]) -> EngineOutput:
    """Consecutive outputs of one request as one."""
    if len(outputs) == 1:
        return outputs[0]
    first, last = outputs[0], outputs[-1]
    logprobs = None
    if any(o.logprobs is not None for o in outputs):
        logprobs = tuple(entry for o in outputs for entry in o.logprobs or ())
    return dataclasses.replace(
        last,
        token_ids=tuple(token for o in outputs for token in o.token_ids),
        logprobs=logprobs,
        prompt_logprobs=first.prompt_logprobs if first.prompt_logprobs is not None else last.prompt_logprobs,
        times=last.times if last.finish_reason else first.times,
    )
