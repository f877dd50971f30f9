"""The order in which waiting requests are tried, apart from any accounting."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator

from serving.engine.request import Request

MAX_PASSED_OVER = 64
"""A request that does not fit may be overtaken this often; after that nothing behind it is admitted before it (ageing)."""

LOOKAHEAD = 64
"""How many waiting requests a step looks at. Bounds the scheduler's work when thousands wait."""


def fcfs_key(request: Request) -> tuple[int, int]:
    """First come, first served. A preempted request keeps its arrival, so it comes back first."""
    return (0, request.arrival_order)


def priority_key(request: Request) -> tuple[int, int]:
    """Lower priority value first, then arrival."""
    return (request.spec.priority, request.arrival_order)


KEYS: dict[str, Callable[[Request], tuple[int, int]]] = {"fcfs": fcfs_key, "priority": priority_key}


class WaitingQueue:
    """Waiting requests in policy order."""

    def __init__(self, policy: str) -> None:
        self.key = KEYS[policy]
        self._items: list[Request] = []
        self.num_tokens = 0

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._items)

    def head(self, count: int) -> list[Request]:
        return self._items[:count]

    def push(self, request: Request) -> None:
        bisect.insort(self._items, request, key=self.key)
        self.num_tokens += len(request.tokens)

    def remove(self, request: Request) -> None:
        """Takes a request out. It must be in."""
        i = bisect.bisect_left(self._items, self.key(request), key=self.key)
        if i == len(self._items) or self._items[i] is not request:
            raise RuntimeError(f"request {request.request_id} is not waiting")
        del self._items[i]
        self.num_tokens -= len(request.tokens)
