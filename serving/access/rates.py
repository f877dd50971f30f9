"""How often a key may ask: a token bucket each, filled evenly over the minute and at most one minute's worth."""

from __future__ import annotations

import contextlib
import time
from typing import Protocol

from serving.errors import ErrorKind, RequestError


class Rates(Protocol):
    """Where the service asks whether a key may send more."""

    async def ask(self, name: str, count: int = 1) -> None:
        """Counts `count` requests of `name`, or raises RESOURCE_EXHAUSTED."""
        ...


class RateMeter(Rates):
    """Counts requests by key. Belongs to one event loop.

    Args:
        per_minute: requests of one key in a minute; None: no bound.
    """

    def __init__(self, per_minute: int | None) -> None:
        self._per_minute = per_minute
        self._buckets: dict[str, tuple[float, float]] = {}  # key's name -> (requests left, when that was); one a key

    def take(self, name: str, count: int = 1, now: float | None = None) -> None:
        """Counts `count` requests of `name`. A count beyond the minute's worth passes when the bucket is full, and is
        paid back by waiting: `n` completions of one prompt cannot come in parts.

        Args:
            now: seconds of a monotonic clock.
        Raises:
            RequestError: RESOURCE_EXHAUSTED, with the seconds until there is room.
        """
        if self._per_minute is None:
            return
        now = time.monotonic() if now is None else now
        most, a_second = float(self._per_minute), self._per_minute / 60
        left, then = self._buckets.get(name, (most, now))
        left = min(most, left + (now - then) * a_second)
        needed = min(float(count), most)
        if left < needed:
            self._buckets[name] = (left, now)
            raise refusal(self._per_minute, (needed - left) / a_second)
        self._buckets[name] = (left - count, now)

    async def ask(self, name: str, count: int = 1) -> None:
        """`take`, as a meter that has to ask somebody does it."""
        self.take(name, count)

    def note(self, name: str, count: int = 1) -> None:
        """Counts requests that somebody else let through."""
        with contextlib.suppress(RequestError):
            self.take(name, count)


def refusal(per_minute: int, wait_s: float) -> RequestError:
    """What a key is told that has asked too often."""
    return RequestError(
        ErrorKind.RESOURCE_EXHAUSTED,
        f"This key may send {per_minute} requests a minute. Try again later.",
        code="rate_limit_exceeded",
        retry_after_s=wait_s,
    )
