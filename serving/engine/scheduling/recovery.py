"""What becomes of a step that failed: everybody tries again in smaller company, until one alone is left to blame.

A failed step has lost its results, and, since programs take the KV cache over, perhaps every page. So all requests go back
to waiting and are computed anew, which gives the same tokens: what each samples depends on its own seed and position. Then
the requests of the failed step are tried in halves. Whoever fails alone, twice, is ended; the others only lost time.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence

from serving.engine.requests.plan import StepPlan

MAX_IN_A_ROW = 12
"""Failures without a step between that went well: more than halving any batch takes, so the device itself is broken."""

MAX_IN_WINDOW = 60
WINDOW_S = 60.0
"""So many failures in so many seconds: going on would be a crash loop in slow motion."""


class StepFailedError(Exception):
    """A step could not be carried out. Its cause says why."""

    def __init__(self, plan: StepPlan) -> None:
        super().__init__(f"step {plan.step_id} failed")
        self.plan = plan


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether a device (or XLA's CPU client) had no memory for a program's buffers."""
    text = str(error)
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower()


class Suspects:
    """Finds the request that makes steps fail.

    Attributes:
        only: ids that may be admitted next, or None for everybody.
        failures: steps that failed, since start.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.failures = 0
        self._clock = clock
        self._suspects: list[tuple[str, ...]] = []
        self._in_a_row = 0
        self._alone: str | None = None  # who failed alone last
        self._recent: deque[float] = deque()

    @property
    def only(self) -> frozenset[str] | None:
        return frozenset(self._suspects[-1]) if self._suspects else None

    def failed(self, ids: Sequence[str]) -> str | None:
        """Takes note of a failed step.

        Args:
            ids: the requests that it computed.
        Returns:
            the request to end, when it failed alone twice.
        """
        now = self._clock()
        self.failures += 1
        self._in_a_row += 1
        self._recent.append(now)
        while self._recent and self._recent[0] < now - WINDOW_S:
            self._recent.popleft()
        if self._suspects:
            # Others ran beside the suspects: they have passed before, so it is one of those.
            suspects = self._suspects.pop()
            rest = tuple(i for i in suspects if i not in ids)
            if rest:
                self._suspects.append(rest)
            ids = [i for i in suspects if i in ids] or list(ids)
        if not ids:
            return None
        if len(ids) == 1:
            if self._alone == ids[0]:
                self._alone = None
                return ids[0]
            self._alone = ids[0]  # once more: what failed may have been the device's bad moment
            self._suspects.append((ids[0],))
            return None
        middle = (len(ids) + 1) // 2
        self._suspects += [tuple(ids[middle:]), tuple(ids[:middle])]
        return None

    def passed(self, ids: Sequence[str]) -> None:
        """A step with these requests went well."""
        self._in_a_row = 0
        if self._alone in ids:
            self._alone = None
        if self._suspects:
            left = tuple(i for i in self._suspects.pop() if i not in ids)
            if left:
                self._suspects.append(left)

    def gone(self, live: Callable[[str], bool]) -> None:
        """Forgets requests that are not live any more, so that nobody waits for them."""
        while self._suspects:
            left = tuple(i for i in self._suspects[-1] if live(i))
            if left:
                self._suspects[-1] = left
                return
            self._suspects.pop()

    @property
    def hopeless(self) -> bool:
        """Whether going on makes no sense."""
        return self._in_a_row > MAX_IN_A_ROW or len(self._recent) > MAX_IN_WINDOW
