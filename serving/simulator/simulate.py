"""Runs a trace through the real scheduler, step by step, with a virtual clock and a cost model in place of a device.

The engine's own pipeline steps (serving/engine/scheduling/pipeline.py); here is what arrives, and what became of it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from serving.engine.api.sampling_params import SamplingParams
from serving.engine.api.types import EngineOutput, EngineRequest, FinishReason
from serving.engine.requests.plan import StepPlan
from serving.engine.scheduling.pipeline import StepPipeline
from serving.engine.scheduling.scheduler import Scheduler, SchedulerConfig
from serving.simulator.cost import CostModel, StepShape
from serving.simulator.device import VirtualDevice, VirtualStep
from serving.simulator.drafts import AssumedDrafts, tokens_of_rows
from serving.simulator.trace import TraceRequest, prompt_token_ids, segment_tokens

OWN_TOKEN = 50_000
"""What a request without an output id generates: no prompt holds it, so nothing is shared by accident."""


@dataclasses.dataclass(slots=True)
class Progress:
    """What is known of a live request."""

    request: TraceRequest
    answer: tuple[int, ...] | None
    first: float = 0.0
    last: float = 0.0
    worst_gap: float = 0.0
    tokens: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one request. Times in seconds of the virtual clock; NaN where there is none."""

    arrival: float
    priority: int
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    ttft: float
    tpot: float
    worst_gap: float
    e2e: float
    reason: str
    tenant: str | None = None


@dataclasses.dataclass
class RunTotals:
    """Sums over a run.

    Attributes:
        seconds: virtual time from the first arrival to the last token.
        busy: of it, with the device at work.
        wall: real seconds that the simulation took.
        kv_used, kv_allocated, kv_contiguous: position-seconds: with KV in them, in allocated pages, and what giving each
            running request max_model_len positions would have taken.
    """

    steps: int = 0
    seconds: float = 0.0
    busy: float = 0.0
    wall: float = 0.0
    refused: int = 0
    computed_tokens: int = 0
    preemptions: int = 0
    kv_used: float = 0.0
    kv_allocated: float = 0.0
    kv_contiguous: float = 0.0


class Simulation:
    """One run of one trace under one configuration.

    Args:
        config: as the engine's; the pool, policy and limits are those of the real scheduler. An engine with one decode step a
            dispatch is simulated, whatever num_scheduler_steps says.
        cost: how long each step takes.
        asynchronous: dispatch a step before the one before it has been read.
        max_num_queued_reqs: requests that may wait; more are refused on arrival. None: no bound.
        sample_every: steps between two looks at how full the pages are.
        acceptance: how likely a draft is to be right where those before it are, if the configuration asks for drafts.
        coalesce: decode steps between which nothing happens are scheduled as one, which the scheduler can: the same times for a
            fraction of the work. Where something may happen between any two (deadlines, drafts, urgent requests, shared cores),
            they are not.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        cost: CostModel,
        *,
        asynchronous: bool = True,
        max_num_queued_reqs: int | None = None,
        sample_every: int = 16,
        acceptance: float = 0.0,
        coalesce: bool = True,
    ) -> None:
        self.scheduler = Scheduler(dataclasses.replace(config, num_scheduler_steps=1))
        if self.scheduler.drafts is not None:
            self.scheduler.drafts.source = AssumedDrafts(acceptance)
        self._acceptance, self._rng = acceptance, np.random.default_rng(0)
        self.cost = cost
        self.totals = RunTotals()
        self.device = VirtualDevice(cost, self._answer, self._note, config.replicas)
        self.pipeline = StepPipeline(
            self.scheduler, self.device, self._take, asynchronous=asynchronous, clock=lambda: self.device.now
        )
        self._max_queued = max_num_queued_reqs
        self._sample_every = sample_every
        self._live: dict[str, Progress] = {}
        self.on_end: Callable[[EngineOutput], None] | None = (
            None  # told the last output of each request that was served
        )
        self.delivery: Callable[[int], float] | None = (
            None  # of so many tokens, in place of the cost model's, where that is not always the same
        )
        self.on_first: Callable[[str, float], None] | None = None  # told whose first token came, and when
        self._ended: list[Outcome] = []
        self._paused = False
        self._unseen: list[float] = []  # seconds of each step since somebody looked at how full the pages are
        self.coalesce = (
            coalesce and asynchronous and self.pipeline.pacer is None and self.scheduler.drafts is None
            and config.replicas == 1 and config.max_waiting_time is None and config.max_running_time is None
        )  # fmt: skip
        self._same = np.full((config.replicas * (config.max_num_seqs + config.max_chunk_rows), 1), OWN_TOKEN, np.int32)

    @property
    def now(self) -> float:
        """The virtual clock, in seconds."""
        return self.device.now

    def run(self, trace: Iterable[TraceRequest]) -> Iterator[Outcome]:
        """Yields an outcome as each request ends."""
        began, start = time.perf_counter(), None
        for index, request in enumerate(trace):
            if start is None:
                self.device.now = start = request.arrival
            self.advance(request.arrival)
            self.submit(index, request)
            yield from self.take_ended()
        self.advance(math.inf)
        yield from self.take_ended()
        self.totals.seconds = self.now - (start or 0.0)
        self.totals.preemptions = self.scheduler.counters.preemptions
        self.totals.wall = time.perf_counter() - began

    @property
    def num_live(self) -> int:
        """Requests that have not ended."""
        return len(self._live)

    def advance(self, until: float) -> None:
        """Steps until the clock has reached `until`, or there is nothing to do. The last step may end later."""
        device, pipeline = self.device, self.pipeline
        while True:
            if not self._paused:
                device.now += pipeline.pause_s()
                self._paused = True
            if device.now >= until:
                return
            was_busy, self._paused = pipeline.in_flight is not None, False
            if self.coalesce:
                self.scheduler.lengths.given = self._steps(until)
            plan = pipeline.step()
            if plan is None and not was_busy:
                if until < math.inf:
                    device.now = max(device.now, until)
                return
            if plan is not None and plan.num_steps > 1 and pipeline.in_flight is not None:
                step = pipeline.in_flight.step
                device.now = max(device.now, step.end - step.last)  # when the step behind these would be scheduled

    def schedules_at(self, ended: float) -> float:
        """Of an engine whose steps others time: when its next step is put together, if the one in flight ends at `ended`."""
        flight = self.pipeline.in_flight
        if flight is not None and self.scheduler.awaits(flight.plan):
            return max(self.now, ended)
        return self.now + self.pipeline.pause_s()

    def turn(self, at: float) -> VirtualStep | None:
        """Of the same: puts its next step together at that time, and reads the one in flight, which has ended. The new one."""
        self.device.now = max(self.now, at)
        self.pipeline.step()
        flight = self.pipeline.in_flight
        return None if flight is None else flight.step

    def _rows(self) -> tuple[int, int, int]:
        """Of the running requests: (decode rows, positions that they attend to, tokens until the first of them is done); no rows
        where anything else is to be done."""
        rows = context = 0
        least, longest = math.inf, self.scheduler.config.max_model_len
        if len(self.scheduler.waiting):
            return 0, 0, 0
        for request in self.scheduler.running:
            if len(request.tokens) + request.num_pending - request.num_computed > 1:
                return 0, 0, 0
            left = request.tokens_left(longest)
            if left <= 0:
                continue
            rows += 1
            context += request.num_computed + 1
            least = min(least, left)
        return (rows, context, int(least)) if rows else (0, 0, 0)

    def _steps(self, until: float) -> int:
        """How many decode steps can be one plan so that at `until` all is as if each had been its own: they end before that, and
        the last two before it are by themselves, because one of them is read by then and the other is not."""
        rows, context, most = self._rows()
        room = until - max(self.device.free, self.device.now + self.cost.host_s)
        if most < 2 or room <= 0:
            return 1
        if until == math.inf:
            return most
        shape = StepShape(rows, 0, 0, context, 0.0)
        first, half = self.cost.seconds(shape), self.cost.growth(shape) / 2  # n steps: n first + n (n - 1) half seconds
        linear = first - half
        whole = room / first if not half else (math.sqrt(linear * linear + 4 * half * room) - linear) / (2 * half)
        return max(1, min(most, math.ceil(whole) - 1))

    @property
    def ends_nothing_before(self) -> float:
        """A time before which no request ends here, if none comes."""
        flight, device = self.pipeline.in_flight, self.device
        if not self.coalesce or flight is None or len(self.scheduler.waiting):
            return device.now
        if any(request.tokens_left(self.scheduler.config.max_model_len) <= 0 for request in self.scheduler.running):
            return device.now
        rows, context, most = self._rows()
        if not rows:
            return device.now
        return device.free + (most - 1) * self.cost.seconds(StepShape(rows, 0, 0, context, 0.0))

    def take_ended(self) -> list[Outcome]:
        """What became of the requests that have ended since the last call."""
        ended, self._ended = self._ended, []
        return ended

    def forget_refusal(self) -> None:
        """The request that was refused last is taken elsewhere: it is no outcome here."""
        self.totals.refused -= 1
        self._ended.pop()

    def refuses(self, request: TraceRequest, coming: int = 0) -> bool:
        """Whether a request is refused now, behind so many that are on their way to the scheduler."""
        full = self._max_queued is not None and len(self.scheduler.waiting) + coming >= self._max_queued
        return full or request.prompt_tokens >= self.scheduler.config.max_model_len

    def submit(self, index: int, request: TraceRequest, spec: EngineRequest | None = None) -> bool:
        """A request arrives, now or, while a step runs, when it ends. False where it is refused, which is an outcome too.

        Args:
            index: its place in the trace.
            spec: what `engine_request` made of it, where that is known.
        """
        if self.refuses(request):
            self.totals.refused += 1
            self._ended.append(_outcome(Progress(request, None), self.now, 0, "refused"))
            return False
        spec = spec or engine_request(index, request)
        if request.deadline is not None or request.ttft_deadline is not None:
            self.coalesce, self.scheduler.lengths.given = False, 1
        self.scheduler.add(spec)
        self._live[spec.request_id] = Progress(request, answer_of(request))
        return True

    def _note(self, step: VirtualStep) -> None:
        totals, plan = self.totals, step.plan
        totals.steps += plan.num_steps
        totals.busy += step.seconds
        totals.computed_tokens += plan.num_tokens
        if plan.num_steps > 1:  # which are counted as computed already: half of them are, in the mean
            return self._look_at_pages(step.seconds, len(plan.decode) * (plan.num_steps - 1) / 2)
        self._unseen.append(step.seconds)
        if len(self._unseen) >= self._sample_every:
            self._look_at_pages(sum(self._unseen))
            self._unseen.clear()

    def _look_at_pages(self, weight: float, early: float = 0.0) -> None:
        """How full they are, for so many seconds; `early`: positions without KV yet in the mean."""
        running = self.scheduler.running
        size, totals = self.scheduler.config.page_size, self.totals
        held = size * sum(r.num_held for r in running) / len(self.scheduler.config.windows)
        totals.kv_used += weight * (sum(r.num_computed for r in running) - early)
        totals.kv_allocated += weight * (held - early)
        totals.kv_contiguous += weight * self.scheduler.config.max_model_len * len(running)

    def _answer(self, plan: StepPlan) -> np.ndarray:
        rows = len(plan.sampled)
        if plan.drafts:
            return self._answer_with_drafts(plan)
        if plan.num_steps > 1:
            return self._answer_of_several(plan)
        tokens = self._same[:rows]
        for row, request in enumerate(plan.sampled):
            live = self._live.get(request.request_id)
            if live is not None and live.answer is not None:
                if tokens.base is self._same:
                    tokens = tokens.copy()
                tokens[row] = live.answer[request.num_output]
        return tokens

    def _answer_of_several(self, plan: StepPlan) -> np.ndarray:
        tokens = np.full((len(plan.sampled), plan.num_steps), OWN_TOKEN, np.int32)
        for row, request in enumerate(plan.sampled):
            live, at = self._live.get(request.request_id), request.num_output
            if live is not None and live.answer is not None:
                known = live.answer[at : at + plan.num_steps]
                tokens[row, : len(known)] = known
        return tokens

    def _answer_with_drafts(self, plan: StepPlan) -> np.ndarray:
        counts = tokens_of_rows(plan, self._acceptance, self._rng)
        tokens = np.full((len(counts), plan.queries), -1, np.int32)
        for row, (request, count) in enumerate(zip(plan.sampled, counts.tolist(), strict=True)):
            live, at = self._live.get(request.request_id), request.num_output
            known = None if live is None else live.answer
            tokens[row, :count] = OWN_TOKEN if known is None else known[at : at + count]
        return tokens

    def _take(self, outputs: list[EngineOutput]) -> None:
        seen = self.now + (self.cost.delivery_s if self.delivery is None else self.delivery(len(outputs)))
        step = self.device.reading
        several = step is not None and step.plan.num_steps > 1
        for output in outputs:
            live = self._live[output.request_id]
            if output.token_ids:
                at = seen
                if several and live.last < seen:  # the first of them: it was seen while the others were computed
                    assert step is not None
                    at = seen - step.seconds + step.first
                    live.worst_gap = max(live.worst_gap, step.last)
                if live.tokens:
                    live.worst_gap = max(live.worst_gap, at - live.last)
                else:
                    live.first = at
                    if self.on_first is not None:
                        self.on_first(output.request_id, at)
                live.last = seen
                live.tokens += len(output.token_ids)
            if output.finish_reason is not None:
                del self._live[output.request_id]
                if self.on_end is not None:
                    self.on_end(output)
                self._ended.append(_outcome(live, seen, output.num_cached_tokens, output.finish_reason.value))


@functools.lru_cache(maxsize=8192)
def params_of(output_tokens: int) -> SamplingParams:
    """Greedy, so many tokens, whatever they are."""
    return SamplingParams(temperature=0.0, max_tokens=output_tokens, ignore_eos=True, detokenize=False)


def engine_request(index: int, request: TraceRequest) -> EngineRequest:
    """A request of a trace as engines and routers see it.

    Args:
        index: its place in the trace; its name, too.
    """
    after = request.arrival
    return EngineRequest(
        str(index),
        prompt_token_ids(request, index),
        params_of(request.output_tokens),
        priority=request.priority,
        tenant=request.tenant,
        arrival_time=request.arrival,
        deadline=None if request.deadline is None else after + request.deadline,
        ttft_deadline=None if request.ttft_deadline is None else after + request.ttft_deadline,
    )


def answer_of(request: TraceRequest) -> tuple[int, ...] | None:
    """The tokens that it generates; None where nobody will ask for them."""
    return None if request.output_id is None else segment_tokens(request.output_id, request.output_tokens)


def _outcome(live: Progress, now: float, cached: int, reason: str) -> Outcome:
    request, nan = live.request, float("nan")
    return Outcome(
        request.arrival,
        request.priority,
        request.prompt_tokens,
        cached,
        live.tokens,
        live.first - request.arrival if live.tokens else nan,
        (live.last - live.first) / (live.tokens - 1) if live.tokens > 1 else nan,
        live.worst_gap if live.tokens > 1 else nan,
        now - request.arrival,
        reason,
        request.tenant,
    )


def finished_well(outcome: Outcome) -> bool:
    """Whether it got all that it asked for."""
    return outcome.reason in (FinishReason.STOP.value, FinishReason.LENGTH.value)
