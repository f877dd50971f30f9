"""When requests run out of time, and when they can no longer make it."""

from __future__ import annotations

import heapq

from serving.engine.requests.plan import StepPlan
from serving.engine.requests.request import Request, RequestState


class Deadlines:
    """Watches requests' own deadlines and the server's limits on waiting and running.

    Args:
        max_waiting_time, max_running_time: seconds, or None.

    Attributes:
        seconds_per_token: what a prompt token costs, learned; 0.0 until a step has told.
        watches_first_tokens: whether a request had a deadline for its first token, ever.
    """

    def __init__(self, max_waiting_time: float | None, max_running_time: float | None) -> None:
        self._max_waiting = max_waiting_time
        self._max_running = max_running_time
        self._heap: list[tuple[float, int, Request]] = []
        self.seconds_per_token = 0.0
        self.watches_first_tokens = False

    def add(self, request: Request) -> None:
        """Starts watching a request that has just arrived."""
        spec = request.spec
        self._watch(request, spec.deadline)
        self._watch(request, spec.ttft_deadline)
        self.watches_first_tokens |= spec.ttft_deadline is not None
        self._watch(request, None if self._max_waiting is None else spec.arrival_time + self._max_waiting)

    def started(self, request: Request, now: float) -> None:
        """The request got its first slot."""
        self._watch(request, None if self._max_running is None else now + self._max_running)

    def due(self, now: float) -> dict[Request, str]:
        """Requests whose time is up, and which limit that was, in a few words."""
        late: dict[Request, str] = {}
        while self._heap and self._heap[0][0] <= now:
            request = heapq.heappop(self._heap)[2]
            why = self._passed(request, now)
            if why is not None:
                late[request] = why
        return late

    def hopeless(self, request: Request, now: float) -> bool:
        """Whether a waiting request's first token would be late even if it had the machine to itself from now on."""
        limit = request.spec.ttft_deadline
        if limit is None or request.num_output:
            return False
        return now + (len(request.tokens) - request.num_computed) * self.seconds_per_token > limit

    def observe(self, plan: StepPlan, seconds: float) -> None:
        """Learns what a prompt token costs, from steps that had little else in them."""
        tokens = sum(c.length for c in plan.chunks)
        if tokens >= 4 * max(1, len(plan.decode)) and tokens >= 16:
            rate = seconds / tokens
            self.seconds_per_token += (rate - self.seconds_per_token) * (0.2 if self.seconds_per_token else 1.0)

    def _watch(self, request: Request, deadline: float | None) -> None:
        if deadline is not None:
            heapq.heappush(self._heap, (deadline, request.arrival_order, request))

    def _passed(self, request: Request, now: float) -> str | None:
        spec, started = request.spec, request.scheduled_time
        if request.finished:
            return None
        if spec.deadline is not None and spec.deadline <= now:
            return "it was not finished in time."
        if spec.ttft_deadline is not None and spec.ttft_deadline <= now and request.num_output == 0:
            return "its first token did not come in time."
        if self._max_waiting is not None and request.state is RequestState.WAITING:
            waited = spec.arrival_time + self._max_waiting <= now
            return (
                f"it waited {self._max_waiting:g} s for its turn (the server's max_waiting_time)." if waited else None
            )
        if self._max_running is not None and started > 0 and started + self._max_running <= now:
            return f"it ran for {self._max_running:g} s (the server's max_running_time)."
        return None
