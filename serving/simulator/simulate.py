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
from serving.simulator.cost import CostModel
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
        config: as the engine's; the pool, policy and limits are those of the real scheduler. Always one decode step a
            dispatch, whatever num_scheduler_steps says.
        cost: how long each step takes.
        asynchronous: dispatch a step before the one before it has been read.
        max_num_queued_reqs: requests that may wait; more are refused on arrival. None: no bound.
        sample_every: steps between two looks at how full the pages are.
        acceptance: how likely a draft is to be right where those before it are, if the configuration asks for drafts.
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
        self.on_first: Callable[[str, float], None] | None = None  # told whose first token came, and when
        self._ended: list[Outcome] = []
        self._paused = False
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
            if pipeline.step() is None and not was_busy:
                if until < math.inf:
                    device.now = max(device.now, until)
                return

    def take_ended(self) -> list[Outcome]:
        """What became of the requests that have ended since the last call."""
        ended, self._ended = self._ended, []
        return ended

    def forget_refusal(self) -> None:
        """The request that was refused last is taken elsewhere: it is no outcome here."""
        self.totals.refused -= 1
        self._ended.pop()

    def submit(self, index: int, request: TraceRequest, spec: EngineRequest | None = None) -> bool:
        """A request arrives, now or, while a step runs, when it ends. False where it is refused, which is an outcome too.

        Args:
            index: its place in the trace.
            spec: what `engine_request` made of it, where that is known.
        """
        limit = self.scheduler.config.max_model_len
        full = self._max_queued is not None and len(self.scheduler.waiting) >= self._max_queued
        if full or request.prompt_tokens >= limit:
            self.totals.refused += 1
            self._ended.append(_outcome(Progress(request, None), self.now, 0, "refused"))
            return False
        spec = spec or engine_request(index, request)
        self.scheduler.add(spec)
        self._live[spec.request_id] = Progress(request, answer_of(request))
        return True

    def _note(self, step: VirtualStep) -> None:
        totals = self.totals
        totals.steps += 1
        totals.busy += step.seconds
        totals.computed_tokens += step.plan.num_tokens
        if totals.steps % self._sample_every == 0:
            self._look_at_pages(step.seconds * self._sample_every)

    def _look_at_pages(self, weight: float) -> None:
        running = self.scheduler.running
        size = self.scheduler.config.page_size
        self.totals.kv_used += weight * sum(r.num_computed for r in running)
        self.totals.kv_allocated += (
            weight * size * sum(r.num_held for r in running) / len(self.scheduler.config.windows)
        )
        self.totals.kv_contiguous += weight * self.scheduler.config.max_model_len * len(running)

    def _answer(self, plan: StepPlan) -> np.ndarray:
        rows = len(plan.sampled)
        if plan.drafts:
            return self._answer_with_drafts(plan)
        tokens = self._same[:rows]
        for row, request in enumerate(plan.sampled):
            live = self._live.get(request.request_id)
            if live is not None and live.answer is not None:
                if tokens.base is self._same:
                    tokens = tokens.copy()
                tokens[row] = live.answer[request.num_output]
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
        seen = self.now + self.cost.delivery_s
        for output in outputs:
            live = self._live[output.request_id]
            if output.token_ids:
                if live.tokens:
                    live.worst_gap = max(live.worst_gap, seen - live.last)
                else:
                    live.first = seen
                    if self.on_first is not None:
                        self.on_first(output.request_id, seen)
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
