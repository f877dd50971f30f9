"""The requests that are being served: how many, whose, and which of them somebody asked to end."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

from serving import memory
from serving.engine.api.types import EngineOutput, FinishReason
from serving.errors import ErrorKind, RequestError, invalid
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

    def failure(self, output: EngineOutput) -> RequestError | None:
        """What a completion ended with, where that is no answer."""
        reason = output.finish_reason
        if reason is FinishReason.DEADLINE:
            return RequestError(
                ErrorKind.DEADLINE_EXCEEDED,
                f"The request's deadline passed (or could no longer be met); {output.error or 'raise the timeout.'}",
                code="deadline_exceeded",
            )
        if reason is FinishReason.REFUSED:
            return invalid(output.error or "The request cannot go on.", code="constraint_too_complex")
        if reason is FinishReason.ERROR:
            return RequestError(ErrorKind.INTERNAL, output.error or "The request failed in the engine.")
        if reason is FinishReason.ABORT and not self.asked_to_end:
            return RequestError(
                ErrorKind.UNAVAILABLE,
                "The server is shutting down and cut this answer: ask another replica.",
                code="server_shutting_down",
                retry_after_s=5.0,
            )
        return None


class _Count:
    """Requests, and completions beyond the first of each."""

    def __init__(self) -> None:
        self.requests = self.extra = 0

    def add(self, requests: int, extra: int) -> None:
        self.requests += requests
        self.extra += extra

    def full(self, n: int, max_requests: int, max_extra: int) -> str | None:
        """What there are too many of for one more of `n` completions, or None. One alone may have as many as it likes."""
        if self.requests >= max_requests:
            return f"{self.requests} requests"
        if n > 1 and self.extra and self.extra + n - 1 > max_extra:
            return f"{self.extra + self.requests} completions"
        return None


class LiveRequests:
    """Counts requests in and out, within the bounds on all of them together. Belongs to one event loop."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._by_id: dict[str, dict[int, LiveRequest]] = {}
        self._keys = itertools.count()
        self._all = _Count()
        self._by_key: dict[str, _Count] = {}
        self._idle = asyncio.Event()
        self._idle.set()

    def __len__(self) -> int:
        return self._all.requests

    def check_room(self, n: int, share: str | None) -> None:
        """Refuses a request of `n` completions that the server has no room for.

        Args:
            share: whose share it takes; None where it is nobody's by name.
        Raises:
            RequestError: RESOURCE_EXHAUSTED.
        """
        limits = self._limits
        if full := self._all.full(n, limits.max_live, limits.max_live_extra):
            message = f"{full} run or wait; there is no room for more. Try again later."
            raise RequestError(ErrorKind.RESOURCE_EXHAUSTED, message, code="queue_full", retry_after_s=1.0)
        if share is None:
            return
        most = limits.max_live // 2 if limits.max_live_per_key is None else limits.max_live_per_key
        if full := self._by_key.get(share, _Count()).full(n, most, limits.max_live_extra // 2):
            message = f"{full} of this key run or wait; it has no room for more. Try again later."
            raise RequestError(ErrorKind.RESOURCE_EXHAUSTED, message, code="rate_limit_exceeded", retry_after_s=1.0)

    @contextlib.contextmanager
    def counted(self, n: int, share: str | None) -> Iterator[None]:
        """Counts a request of `n` completions (1 for what is only read) for as long as it takes.

        Raises:
            RequestError: as `check_room`.
        """
        self.check_room(n, share)
        counts = [self._all] if share is None else [self._all, self._by_key.setdefault(share, _Count())]
        for count in counts:
            count.add(1, n - 1)
        self._idle.clear()
        try:
            yield
        finally:
            for count in counts:
                count.add(-1, 1 - n)
            if share is not None and not counts[1].requests:
                self._by_key.pop(share, None)
            if not self._all.requests:
                self._idle.set()

    @contextlib.contextmanager
    def enter(self, prepared: PreparedRequest) -> Iterator[LiveRequest]:
        """Counts a request that is generated, and keeps it for whoever ends it by its name.

        Raises:
            RequestError: as `check_room`.
        """
        n = len(prepared.children)
        with self.counted(n, prepared.share):
            key, live = next(self._keys), LiveRequest(prepared)
            self._by_id.setdefault(prepared.request_id, {})[key] = live
            try:
                yield live
            finally:
                same = self._by_id[prepared.request_id]
                del same[key]
                if not same:
                    del self._by_id[prepared.request_id]
                memory.note_peak(n * SEQUENCE_BYTES if n > 8 else 0)

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
