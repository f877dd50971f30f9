"""Engines on the cores of one machine: how fast a step goes on depends on who else is in one at that moment, and changes whenever
another begins or ends.

A step is so many seconds of work, those that it takes alone. Between two events of the machine every step goes on at a rate of its
own, so when it ends is known no sooner than at its end; then its engine schedules, as its pipeline does: the step behind it is put
together from what had arrived when the one before was handed out.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Sequence

from serving.engine.api.types import EngineRequest
from serving.simulator.simulate import Simulation
from serving.simulator.trace import TraceRequest


@dataclasses.dataclass(frozen=True)
class Sharing:
    """What scripts/bench_sharing.py measures.

    Attributes:
        prompts: how many times longer a step that computes prompts takes while 1, 2, ... engines are in a step; beyond the last it
            grows in proportion.
        tokens: of a step without prompts, and of an engine's own work around its steps; empty: as `prompts`.
        way: seconds from a step's end until its tokens are seen, while 1, 2, ... engines have requests, those of the way to the
            engine included; empty: the cost model's.
    """

    prompts: tuple[float, ...]
    tokens: tuple[float, ...] = ()
    way: tuple[float, ...] = ()

    def factor(self, prompts: bool, engines: int) -> float:
        """How many times longer a step takes while so many engines are in one."""
        known = self.prompts if prompts or not self.tokens else self.tokens
        at = max(1, engines)
        return known[min(at, len(known)) - 1] * max(1.0, at / len(known))

    def seen_after(self, engines: int) -> float:
        """The way, while so many have requests."""
        return self.way[min(max(1, engines), len(self.way)) - 1]


@dataclasses.dataclass(eq=False)
class _Seat:
    """One engine.

    Attributes:
        coming: requests that have arrived and are not known to the scheduler yet: it had put its next step together before.
        begins: when the step in flight begins; NaN: there is none.
        seconds, left: of work, all of it and what is still to be done.
        prompts: whether it computes some.
    """

    engine: Simulation
    coming: deque[tuple[float, int, TraceRequest, EngineRequest]] = dataclasses.field(default_factory=deque)
    begins: float = math.nan
    left: float = 0.0
    seconds: float = 0.0
    prompts: bool = False

    @property
    def in_step(self) -> bool:
        return not math.isnan(self.begins)


class SharedCores:
    """The engines of a cluster that are on one machine, on its clock."""

    def __init__(self, engines: Sequence[Simulation], sharing: Sharing) -> None:
        self.now = 0.0
        self._sharing = sharing
        self._seats = [_Seat(one) for one in engines]
        for engine in engines:
            engine.coalesce = False
            engine.device.stretch = lambda: sharing.factor(False, 1 + self._in_steps)
            if sharing.way:
                engine.delivery = lambda: sharing.seen_after(self._with_requests)

    def waiting(self, number: int) -> int:
        """Requests of an engine that its scheduler does not know yet."""
        return len(self._seats[number].coming)

    def submit(self, number: int, index: int, request: TraceRequest, spec: EngineRequest) -> bool:
        """A request arrives, now. False where its engine refuses it."""
        seat = self._seats[number]
        if seat.engine.refuses(request, len(seat.coming)):
            seat.engine.submit(index, request, spec)  # which says so
            return False
        seat.coming.append((request.arrival, index, request, spec))
        if not seat.in_step:
            seat.engine.device.now = max(seat.engine.now, request.arrival)
            self._turn(seat)
        return True

    def until(self, end: float) -> None:
        """All that happens up to a time."""
        while True:
            running = [seat for seat in self._seats if seat.in_step]
            active = [seat for seat in running if seat.begins <= self.now]
            rates = [1.0 / self._sharing.factor(seat.prompts, len(active)) for seat in active]
            ends = [self.now + seat.left / rate for seat, rate in zip(active, rates, strict=True)]
            begins = [seat.begins for seat in running if seat.begins > self.now]
            then = min((*ends, *begins), default=math.inf)
            if then >= end and end < math.inf:
                then = end
            elif then == math.inf:
                return
            for seat, rate in zip(active, rates, strict=True):
                seat.left = max(0.0, seat.left - rate * (then - self.now))
            first = ends.index(then) if then in ends else None
            self.now = then
            if first is not None and then < end:
                active[first].engine.device.free = then
                self._turn(active[first])
            elif then == end:
                return

    @property
    def _in_steps(self) -> int:
        return sum(seat.in_step and seat.begins <= self.now for seat in self._seats)

    @property
    def _with_requests(self) -> int:
        return sum(seat.engine.num_live > 0 or bool(seat.coming) for seat in self._seats)

    def _turn(self, seat: _Seat) -> None:
        """An engine's step has ended, or it has had none: what it does then, up to having one in flight or nothing to do."""
        engine = seat.engine
        if seat.in_step:
            engine.totals.busy += self.now - seat.begins - seat.seconds
        while True:
            seat.begins, at = math.nan, engine.schedules_at(self.now)
            while seat.coming and seat.coming[0][0] <= at:
                _, index, request, spec = seat.coming.popleft()
                engine.submit(index, request, spec)
            step = engine.turn(at)
            if step is not None:
                seat.begins, seat.prompts = max(engine.now, self.now), bool(step.plan.chunks)
                seat.seconds = seat.left = step.seconds
                return
            if seat.coming:
                engine.device.now = max(engine.now, seat.coming[0][0])
            elif not engine.scheduler.has_work:
                return
