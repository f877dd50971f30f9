"""The requests that are being generated: how many, whose, and which of them somebody asked to end."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from serving import memory
from serving.errors import ErrorKind, RequestError
from serving.service.requests.limits import Limits

if TYPE_CHECKING:
    from serving.access.keys import Caller
    from serving.service.requests.prepare import PreparedRequest

SEQUENCE_BYTES = 64 * 1024
"""About what a completion takes while it is live, on the text side and in the engine's queues."""


class LiveRequest:
    """One request while it runs.

    Attributes:
        asked_to_end: by `abort`: then its reason to finish, ABORT, is an answer. Otherwise the server cut it, which is an error.
    """

    def __init__(self, prepared: PreparedRequest) -> None:
        self.prepared = prepared
        self.asked_to_end = False


class LiveRequests:
    """Counts requests in and out, within the bounds on all of them together. Belongs to one event loop."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._by_id: dict[str, dict[int, LiveRequest]] = {}
        self._keys = itertools.count()
        self._num = 0
        self._num_extra = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def __len__(self) -> int:
        return self._num

    def check_room(self, n: int) -> None:
        """Refuses a request of `n` completions that the server has no room for.

        Raises:
            RequestError: RESOURCE_EXHAUSTED.
        """
        limits = self._limits
        full = self._num >= limits.max_live
        if full or (n > 1 and self._num_extra + n - 1 > limits.max_live_extra and self._num_extra):
            count = f"{self._num} requests" if full else f"{self._num_extra + self._num} completions"
            message = f"{count} run or wait; there is no room for more. Try again later."
            raise RequestError(ErrorKind.RESOURCE_EXHAUSTED, message, code="queue_full", retry_after_s=1.0)

    def enter(self, prepared: PreparedRequest) -> tuple[LiveRequest, Callable[[], None]]:
        """Counts a request in; returns it and what counts it out.

        Raises:
            RequestError: as `check_room`.
        """
        n = len(prepared.children)
        self.check_room(n)
        key, live = next(self._keys), LiveRequest(prepared)
        self._by_id.setdefault(prepared.request_id, {})[key] = live
        self._num += 1
        self._num_extra += n - 1
        self._idle.clear()

        def leave() -> None:
            same = self._by_id[prepared.request_id]
            del same[key]
            if not same:
                del self._by_id[prepared.request_id]
            self._num -= 1
            self._num_extra -= n - 1
            memory.note_peak(n * SEQUENCE_BYTES if n > 8 else 0)
            if not self._num:
                self._idle.set()

        return live, leave

    def named(self, request_id: str, caller: Caller | None) -> list[LiveRequest]:
        """Those of an id that the caller may end."""
        found = self._by_id.get(request_id, {}).values()
        return [live for live in found if caller is None or caller.may_end(live.prepared.owner)]

    def __iter__(self) -> Iterator[LiveRequest]:
        return iter([live for same in self._by_id.values() for live in same.values()])

    async def wait_idle(self, timeout_s: float) -> bool:
        """Waits until none is left; False when some still are after `timeout_s` seconds."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True
