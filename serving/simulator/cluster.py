"""Several engines behind a router: the real schedulers and the real router, on one virtual clock.

Engines with machines of their own do not depend on each other, so each is stepped up to the next arrival, and then the router
decides with what it would know. Those that share the cores of one machine are in sharing.py. Some may compute prompts for the
others (apart.py).
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import math
import time
from collections.abc import Iterable, Iterator

from serving.engine.api.types import EngineOutput, EngineRequest, EngineStats
from serving.engine.requests.scheduler_config import SchedulerConfig
from serving.routing.router import Router, Visit, Wish
from serving.routing.targets import Target
from serving.simulator.apart import Helpers, Link
from serving.simulator.cost import CostModel
from serving.simulator.sharing import SharedCores, Sharing
from serving.simulator.simulate import OWN_TOKEN, Outcome, RunTotals, Simulation, answer_of, engine_request
from serving.simulator.trace import TraceRequest

MAX_TRIES = 4
"""Engines that are asked to take a request before it counts as refused."""
LOOK = 64
"""Up to so many engines are compared at every decision."""


@dataclasses.dataclass
class ClusterTotals(RunTotals):
    """Sums over all engines; `seconds` is that of the clock, `busy` of all engines together.

    Attributes:
        worst_imbalance: the largest difference between two engines' requests, at any decision.
        retries: requests that an engine refused and another was asked for.
    """

    worst_imbalance: int = 0
    retries: int = 0


class Cluster:
    """One run of one trace on `count` engines alike.

    Args:
        config, cost, asynchronous, max_num_queued_reqs, acceptance: of each engine, as in Simulation.
        router: decides; its targets are made here.
        sessions: whether requests of one tenant are one session.
        sharing: of engines on the same cores, how they hold each other up; None: each has a machine of its own.
        helpers: further engines, that compute prompts for these; `link`, `helper_policy`: see apart.Helpers.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        cost: CostModel,
        count: int,
        router: Router,
        *,
        asynchronous: bool = True,
        max_num_queued_reqs: int | None = None,
        sessions: bool = False,
        acceptance: float = 0.0,
        sharing: Sharing | None = None,
        helpers: int = 0,
        link: Link | None = None,
        helper_policy: str = "auto",
    ) -> None:
        self.router = router

        def make(queued: int | None) -> Simulation:
            return Simulation(
                config, cost, asynchronous=asynchronous, max_num_queued_reqs=queued, acceptance=acceptance
            )  # fmt: skip

        self.engines = [make(max_num_queued_reqs) for _ in range(count)]
        self.helpers = None
        if helpers:
            link = link or Link(piece=config.max_num_batched_tokens)
            self.helpers = Helpers([make(None) for _ in range(helpers)], link, helper_policy)
        self.targets = [router.add(str(i), config.page_size, config.num_pages - 1) for i in range(count)]
        self.totals = ClusterTotals()
        self._sessions = sessions
        self._busy: list[tuple[float, int]] = []  # (when, engine) of those that have something to do
        self._when = [math.nan] * count  # of each the entry that counts
        self._visits: dict[str, tuple[Visit, TraceRequest]] = {}
        self._pages = config.replicas * (config.num_pages - 1)
        self._shared = None if sharing is None else SharedCores(self.engines, sharing)
        for engine in self.engines:
            engine.on_end = self._on_end
            if self.helpers is not None:
                engine.on_first = self.helpers.begun

    def run(self, trace: Iterable[TraceRequest]) -> Iterator[Outcome]:
        """Yields an outcome as each request ends; those of one engine in order."""
        began, start, last = time.perf_counter(), None, 0.0
        for index, request in enumerate(trace):
            if start is None:
                start = request.arrival
                for engine in self._all:
                    engine.device.now = start
                if self._shared is not None:
                    self._shared.now = start
            yield from self._reach(request.arrival)
            number = self._place(index, request)
            if number is not None and self._shared is None:
                engine = self.engines[number]
                if engine.num_live == 1:
                    engine.device.now = max(engine.device.now, request.arrival)
                self._look_again(number, engine.now)
            last = request.arrival
        yield from self._reach(math.inf)
        last = max(last, *(engine.now for engine in self.engines))
        self._sum(last - (start or 0.0), time.perf_counter() - began)

    @property
    def _all(self) -> list[Simulation]:
        return self.engines if self.helpers is None else [*self.engines, *self.helpers.engines]

    def _reach(self, end: float) -> Iterator[Outcome]:
        """Up to a time, with what helpers send until then. They depend on nobody, so they go first."""
        if self.helpers is not None:
            for at, number, name, tokens in self.helpers.until(end):
                yield from self._until(at)
                yield from self._advance(number, at)
                self.engines[number].scheduler.arrived(name, tokens)
                self._look_again(number, self.engines[number].now)
        yield from self._until(end)

    def _until(self, end: float) -> Iterator[Outcome]:
        """Steps all at which something may happen up to a time."""
        if self._shared is not None:
            self._shared.until(end)
            for number in range(len(self.engines)):
                yield from self._told(number)
            return
        busy = self._busy
        while busy and busy[0][0] < end:
            when, number = heapq.heappop(busy)
            if when != self._when[number]:
                continue  # it was looked at since
            engine = self.engines[number]
            yield from self._advance(number, end)
            self._when[number] = math.nan
            if engine.num_live:
                self._look_again(number, max(engine.now, engine.ends_nothing_before))

    def _look_again(self, number: int, when: float) -> None:
        """Something may happen at an engine at this time, and nothing before."""
        self._when[number] = when
        heapq.heappush(self._busy, (when, number))

    def _advance(self, number: int, until: float) -> list[Outcome]:
        self.engines[number].advance(until)
        return self._told(number)

    def _told(self, number: int) -> list[Outcome]:
        """An engine tells its load: what has ended there meanwhile."""
        engine = self.engines[number]
        free = engine.scheduler.pool.num_free
        running, waiting = len(engine.scheduler.running), len(engine.scheduler.waiting)
        if self._shared is not None:
            waiting += self._shared.waiting(number)
        self.targets[number].told(
            EngineStats(
                num_running=running, num_waiting=waiting, num_pages_free=free, num_pages_total=self._pages
            )
        )  # fmt: skip
        return engine.take_ended()

    def _place(self, index: int, request: TraceRequest) -> int | None:
        """Gives a request to an engine: which one, or None where none takes it."""
        spec = engine_request(index, request)
        wish = Wish(session=request.tenant if self._sessions else None)
        route = self.router.route(spec, self.targets, wish)
        assert route is not None, "all are well"
        self._look_at_loads(route.chosen)
        for attempt, target in enumerate(itertools.islice(route.tries(), MAX_TRIES)):
            number = int(target.name)
            running, matched = target.load, route.matched_tokens if not attempt else 0
            visit = self.router.begin(route, target)
            engine = self.engines[number]
            if self._submit(number, index, request, spec):
                self._visits[spec.request_id] = (visit, request)
                if self.helpers is not None:
                    self.helpers.help(index, request, spec, number, engine, matched, running)
                return number
            self.router.end(visit, None)
            if attempt + 1 < min(MAX_TRIES, len(self.engines)):
                self.engines[number].forget_refusal()
                self.totals.retries += 1
        return None

    def _submit(self, number: int, index: int, request: TraceRequest, spec: EngineRequest) -> bool:
        """An engine gets a request, at its arrival. False where it refuses it."""
        if self._shared is not None:
            return self._shared.submit(number, index, request, spec)
        self.engines[number].advance(request.arrival)
        return self.engines[number].submit(index, request, spec)

    def _look_at_loads(self, chosen: Target) -> None:
        """Of many engines only now and then, and when one has more than ever: each look is at all of them."""
        totals = self.totals
        if len(self.engines) <= LOOK or chosen.load > totals.worst_imbalance or chosen.routed % LOOK == 0:
            totals.worst_imbalance = max(totals.worst_imbalance, self.router.imbalance)

    def _on_end(self, output: EngineOutput) -> None:
        visit, request = self._visits.pop(output.request_id)
        answer = answer_of(request)
        self.router.end(visit, (OWN_TOKEN,) * request.output_tokens if answer is None else answer)

    def _sum(self, seconds: float, wall: float) -> None:
        totals = self.totals
        for field in dataclasses.fields(RunTotals):
            setattr(totals, field.name, sum(getattr(engine.totals, field.name) for engine in self._all))
        totals.seconds, totals.wall = seconds, wall
        totals.preemptions = sum(engine.scheduler.counters.preemptions for engine in self._all)
