"""The order in which waiting requests are tried, apart from any accounting of pages.

Order is by priority (policy `priority` only), then by tenant where fair share is on, then by arrival. A preempted request
keeps its arrival, so it comes back first.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Callable, Iterable, Iterator

from serving.engine.requests.request import Request

MAX_PASSED_OVER = 64
"""A request that does not fit may be overtaken this often; after that nothing behind it is admitted before it (ageing)."""

LOOKAHEAD = 64
"""How many waiting requests a step looks at. Bounds the scheduler's work when thousands wait."""

OUTPUT_WEIGHT = 2
"""What a completion token costs a tenant, in prompt tokens: it occupies a step of its own."""

FOREGROUND_S = 60.0
"""How long after the last request of the most urgent priority the next one counts as the most urgent."""

BACKGROUND_SHARE = 4
"""Where there are several priorities, prompts of all but the most urgent lengthen a step to a quarter of the budget at most:
an urgent request that arrives waits for the step that runs and the one behind it, so those must not be long ones."""

MAX_HURRIED = 3
"""Steps in a row that may compute urgent prompts alone, without the running requests' decode rows."""

Key = tuple[int, int]


def fcfs_key(request: Request) -> Key:
    """First come, first served."""
    return (0, request.arrival_order)


def priority_key(request: Request) -> Key:
    """Lower priority value first, then arrival."""
    return (request.spec.priority, request.arrival_order)


KEYS: dict[str, Callable[[Request], Key]] = {"fcfs": fcfs_key, "priority": priority_key}


class Foreground:
    """Which priority is the most urgent of late. All others are background to it.

    Args:
        watches: False where priorities do not count: nobody is background then.
    """

    def __init__(self, watches: bool) -> None:
        self._watches = watches
        self._priority: int | None = None
        self._seen = 0.0
        self._hurried = 0  # steps in a row that left decode rows out

    def arrive(self, priority: int, now: float) -> None:
        """A request came in; `now` in seconds of the clock that all of them use."""
        if not self._watches:
            return
        if self._priority is None or priority <= self._priority or now - self._seen > FOREGROUND_S:
            self._priority, self._seen = priority, now

    def is_background(self, request: Request) -> bool:
        return self._priority is not None and request.spec.priority > self._priority

    def hurries(self, prompts: Iterable[Request], running: Iterable[Request]) -> bool:
        """Whether the step is to be for prompts alone: an urgent one is to be computed while requests that are less urgent
        run, and its first token should not wait for everybody's next one. Never for more than MAX_HURRIED steps in a row."""
        if self._priority is None or self._hurried >= MAX_HURRIED:
            return False
        urgent = any(not self.is_background(r) for r in prompts)
        return urgent and any(self.is_background(r) for r in running)

    def hurried(self, held: bool) -> None:
        """Takes note of whether a step left decode rows out."""
        self._hurried = self._hurried + 1 if held else 0


def longest_prefix_first(
    head: list[Request], key: Callable[[Request], Key], cached: Callable[[Request], int]
) -> list[Request]:
    """Waiting requests with those first whose prefixes, `cached` pages long, are there; within equal priority, and not before
    one that was passed over too often. To be sorted behind later arrivals is to be passed over."""
    pages = {r.request_id: cached(r) for r in head}
    ordered = sorted(head, key=lambda r: (r.passed_over < MAX_PASSED_OVER, key(r)[0], -pages[r.request_id]))
    place = {r.request_id: i for i, r in enumerate(ordered)}
    for i, request in enumerate(head):
        if place[request.request_id] > i:
            request.passed_over += 1
    return ordered


class FairShare:
    """Service received by each tenant: the virtual token counter of Sheng et al., "Fairness in Serving Large Language
    Models", OSDI 2024. A tenant that comes back after idling starts at the least-served active tenant's count, so it
    cannot save up."""

    def __init__(self) -> None:
        self._served: dict[str | None, float] = {}
        self._live: dict[str | None, int] = {}

    def arrive(self, tenant: str | None) -> None:
        if not self._live.get(tenant):
            active = [self._served[t] for t, n in self._live.items() if n]
            self._served[tenant] = max(self._served.get(tenant, 0.0), min(active, default=0.0))
        self._live[tenant] = self._live.get(tenant, 0) + 1

    def leave(self, tenant: str | None) -> None:
        self._live[tenant] -= 1
        if not any(self._live.values()):  # nobody is active: counts mean nothing any more, and must not pile up
            self._live.clear()
            self._served.clear()

    def charge(self, tenant: str | None, prompt_tokens: int = 0, output_tokens: int = 0) -> None:
        self._served[tenant] += prompt_tokens + OUTPUT_WEIGHT * output_tokens

    def served(self, tenant: str | None) -> float:
        return self._served.get(tenant, 0.0)


class WaitingQueue:
    """Waiting requests in policy order.

    Args:
        policy: a name of KEYS.
        fair: keeps tenants apart and serves the least-served first, within equal priority; None: one line for all.
    """

    def __init__(self, policy: str, fair: FairShare | None = None) -> None:
        self.key = KEYS[policy]
        self.num_tokens = 0
        self._fair = fair
        self._lines: dict[str | None, list[Request]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def __iter__(self) -> Iterator[Request]:
        for line in self._lines.values():
            yield from line

    def head(self, count: int) -> list[Request]:
        """The first `count` requests to try."""
        if self._fair is None or len(self._lines) <= 1:
            lines = list(self._lines.values())
            return lines[0][:count] if lines else []
        # What a tenant would have been charged for the requests picked so far counts, or one tenant would fill the head.
        heap = [(self._rank(line[0], self._fair.served(t)), self._fair.served(t), t or "", 0, line)
                for t, line in self._lines.items()]  # fmt: skip
        heapq.heapify(heap)
        picked: list[Request] = []
        while heap and len(picked) < count:
            _, served, name, i, line = heapq.heappop(heap)
            picked.append(line[i])
            if i + 1 < len(line):
                served += len(line[i].tokens)
                heapq.heappush(heap, (self._rank(line[i + 1], served), served, name, i + 1, line))
        return picked

    def push(self, request: Request) -> None:
        bisect.insort(self._lines.setdefault(self._line_of(request), []), request, key=self.key)
        self.num_tokens += len(request.tokens)

    def remove(self, request: Request) -> None:
        """Takes a request out. It must be in."""
        name = self._line_of(request)
        line = self._lines.get(name, [])
        i = bisect.bisect_left(line, self.key(request), key=self.key)
        if i == len(line) or line[i] is not request:
            raise RuntimeError(f"request {request.request_id} is not waiting")
        del line[i]
        if not line:
            del self._lines[name]
        self.num_tokens -= len(request.tokens)

    def _line_of(self, request: Request) -> str | None:
        return request.spec.tenant if self._fair is not None else None

    def _rank(self, request: Request, served: float) -> tuple[int, float, int]:
        priority, arrival = self.key(request)
        return (priority, served, arrival)
