"""Engines on the cores of one machine: how fast a step goes on depends on who else is in one at that moment, and changes whenever
another begins or ends.

A step is so many seconds of work, those that it takes alone. Between two events of the machine every step goes on at a rate of its
own, so when it ends is known no sooner than at its end; then its engine schedules, as its pipeline does: the step behind it is put
together from what had arrived when the one before was handed out.

A gateway and its clients are on these cores too. What they compute is one thread's work, one piece behind the other: a request
reaches its engine when its piece is done, a token is seen when its own is, and while there is any every step goes on more slowly.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Callable, Sequence

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
            engine included, and those of `front` not; empty: the cost model's.
        front: seconds that a gateway and its clients compute for a request, and for each of its tokens.
        cores: of the machine. A thread counts for so small a part of an engine in a step, which uses all of them.
    """

    prompts: tuple[float, ...]
    tokens: tuple[float, ...] = ()
    way: tuple[float, ...] = ()
    front: tuple[float, float] = (0.0, 0.0)
    cores: int = 2

    def factor(self, prompts: bool, engines: float) -> float:
        """How many times longer a step takes while so many engines are in one; between two whole numbers, in between."""
        known = self.prompts if prompts or not self.tokens else self.tokens
        at = max(1.0, engines)
        if at >= len(known):
            return known[-1] * at / len(known)
        low = int(at)
        return known[low - 1] + (at - low) * (known[low] - known[low - 1])

    def front_factor(self, engines: int) -> float:
        """How many times longer a thread's work takes while so many engines are in a step: each core has as many threads of theirs,
        and this one."""
        return max(1.0, engines + 1 / self.cores)

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


@dataclasses.dataclass(eq=False, slots=True)
class _Errand:
    """What a gateway and its client compute for a request that comes, or for tokens that were made.

    Attributes:
        left: seconds of it that are still to be done.
        seat, request: who gets what when it is done; None for tokens.
    """

    left: float
    seat: _Seat | None = None
    request: tuple[int, TraceRequest, EngineRequest] | None = None


class SharedCores:
    """The engines of a cluster that are on one machine, on its clock."""

    def __init__(self, engines: Sequence[Simulation], sharing: Sharing) -> None:
        self.now = 0.0
        self._sharing = sharing
        self._seats = [_Seat(one) for one in engines]
        self._front: deque[_Errand] = deque()
        for engine in engines:
            engine.coalesce = False
            engine.device.stretch = lambda: sharing.factor(False, 1 + self._in_steps + self._front_share)
            if sharing.way or any(sharing.front):
                engine.delivery = self._delivery(engine)

    def waiting(self, number: int) -> int:
        """Requests of an engine that its scheduler does not know yet."""
        seat = self._seats[number]
        return len(seat.coming) + sum(one.seat is seat for one in self._front)

    def submit(self, number: int, index: int, request: TraceRequest, spec: EngineRequest) -> bool:
        """A request arrives, now. False where its engine refuses it."""
        seat = self._seats[number]
        if seat.engine.refuses(request, self.waiting(number)):
            seat.engine.submit(index, request, spec)  # which says so
            return False
        if self._sharing.front[0]:
            self._front.append(_Errand(self._sharing.front[0], seat, (index, request, spec)))
        else:
            self._reaches(seat, index, request, spec)
        return True

    def _reaches(self, seat: _Seat, index: int, request: TraceRequest, spec: EngineRequest) -> None:
        """A request is at its engine, now."""
        seat.coming.append((self.now, index, request, spec))
        if not seat.in_step:
            seat.engine.device.now = max(seat.engine.now, self.now)
            self._turn(seat)

    def until(self, end: float) -> None:
        """All that happens up to a time."""
        sharing = self._sharing
        while True:
            running = [seat for seat in self._seats if seat.in_step]
            active = [seat for seat in running if seat.begins <= self.now]
            among = len(active) + self._front_share
            rates = [1.0 / sharing.factor(seat.prompts, among) for seat in active]
            ends = [self.now + seat.left / rate for seat, rate in zip(active, rates, strict=True)]
            begins = [seat.begins for seat in running if seat.begins > self.now]
            slower = sharing.front_factor(len(active))
            errand = [self.now + self._front[0].left * slower] if self._front else []
            then = min((*ends, *begins, *errand), default=math.inf)
            if then >= end and end < math.inf:
                then = end
            elif then == math.inf:
                return
            for seat, rate in zip(active, rates, strict=True):
                seat.left = max(0.0, seat.left - rate * (then - self.now))
            if self._front:
                self._front[0].left -= (then - self.now) / slower
            first = ends.index(then) if then in ends else None
            self.now = then
            if then == end:
                return
            if first is not None:
                active[first].engine.device.free = then
                self._turn(active[first])
            elif then in errand:
                self._done(self._front.popleft())

    def _done(self, errand: _Errand) -> None:
        if errand.seat is not None and errand.request is not None:
            self._reaches(errand.seat, *errand.request)

    def _delivery(self, engine: Simulation) -> Callable[[int], float]:
        """Of an engine: in how many seconds tokens are seen that it has made just now, so many of them. What is to be done for them
        is done behind what is to be done already, at the pace of this moment."""

        def seen_in(tokens: int) -> float:
            sharing = self._sharing
            way = sharing.seen_after(self._with_requests) if sharing.way else engine.cost.delivery_s
            if not sharing.front[1] or not tokens:
                return way
            self._front.append(_Errand(tokens * sharing.front[1]))
            return way + sum(one.left for one in self._front) * sharing.front_factor(self._in_steps)

        return seen_in

    @property
    def _front_share(self) -> float:
        """What a gateway and its clients are at this moment, in engines."""
        return 1 / self._sharing.cores if self._front else 0.0

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
