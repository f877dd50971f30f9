"""Which requests run in the next step, how many tokens each, and which pages they own. Plain Python; no jax.

There are no phases: a request's computed positions chase its existing ones under one token budget a step. Running requests
go first (decode rows, then unfinished prompts), then waiting ones. See request.py for the positions and states.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections import deque
from collections.abc import Callable

import numpy as np

from serving.engine.chunks import ChunkBuilder
from serving.engine.deadlines import Deadlines
from serving.engine.kv_manager import KVManager
from serving.engine.masks import needs_host
from serving.engine.page_pool import PagePool
from serving.engine.plan import Chunk, StepPlan, StepResult
from serving.engine.policy import LOOKAHEAD, MAX_PASSED_OVER, FairShare, WaitingQueue
from serving.engine.request import Request, RequestState
from serving.engine.slots import SlotTable
from serving.engine.types import EngineOutput, EngineRequest, FinishReason, RequestTimes, TokenLogprobs
from serving.errors import invalid


@dataclasses.dataclass(frozen=True)
class SchedulerConfig:
    """Sizes the scheduler keeps to.

    Attributes:
        max_num_seqs: slots.
        max_num_batched_tokens: tokens a step may compute, decode and chunks together.
        max_chunk_tokens: capacity of the chunk part, alignment included.
        max_chunk_rows: prompts that may have a piece in one step.
        max_model_len: tokens a sequence may have.
        policy: see policy.KEYS.
        num_scheduler_steps: decode steps in one dispatch while nothing waits.
        prefix_first: among waiting requests of equal priority, try those with the longest cached prefix first.
        fair_share: serve the least-served tenant first, within equal priority.
        host_pages: capacity of the host tier; 0 for none.
        max_waiting_time, max_running_time: seconds after which a request that waits for its first slot, or has had one,
            is ended.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_chunk_tokens: int
    max_chunk_rows: int
    max_model_len: int
    page_size: int
    num_pages: int
    policy: str = "fcfs"
    enable_prefix_caching: bool = True
    seed: int = 0
    num_scheduler_steps: int = 1
    prefix_first: bool = False
    fair_share: bool = False
    host_pages: int = 0
    max_waiting_time: float | None = None
    max_running_time: float | None = None


@dataclasses.dataclass(slots=True)
class Counters:
    """Totals since start."""

    preemptions: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    steps: int = 0


class Scheduler:
    """Owns every live request, the page pool and the slots. One thread calls it.

    The order of calls is: any number of `add` / `abort`, then `schedule`, then (now or one step later) `retire` with the
    result of that plan, in plan order.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.pool = PagePool(config.num_pages, config.page_size, config.enable_prefix_caching)
        self.slots = SlotTable(config.max_num_seqs, -(-config.max_model_len // config.page_size), config.seed)
        self.fair = FairShare() if config.fair_share else None
        self.waiting = WaitingQueue(config.policy, self.fair)
        self.kv = KVManager(self.pool, config.host_pages)
        self.deadlines = Deadlines(config.max_waiting_time, config.max_running_time)
        self.running: list[Request] = []
        self.requests: dict[str, Request] = {}
        self.counters = Counters()
        self._arrivals = 0
        self._step_id = 0
        self._retired_step = 0
        self._leaving: deque[tuple[int, list[int], int]] = deque()  # (last step that writes, pages, slot)
        self._leaving_pages = 0
        self._short_of_pages: Request | None = None
        self._prompt_logprobs: dict[str, list[TokenLogprobs | None]] = {}

    # ---- what comes in ----

    def add(self, spec: EngineRequest) -> None:
        """Puts a request in the waiting queue.

        Raises:
            RequestError: INVALID_ARGUMENT for an id that is live, an empty prompt, or one that leaves no room for a token.
        """
        if spec.request_id in self.requests:
            raise invalid(f"request id {spec.request_id!r} is already in use.", "request_id")
        if not 0 < len(spec.prompt_token_ids) < self.config.max_model_len:
            raise invalid(
                f"the prompt has {len(spec.prompt_token_ids)} tokens; between 1 and {self.config.max_model_len - 1} fit.",
                "prompt",
            )
        request = Request(spec, self._arrivals)
        self._arrivals += 1
        self.requests[spec.request_id] = request
        self.waiting.push(request)
        if self.fair is not None:
            self.fair.arrive(spec.tenant)
        self.deadlines.add(request)

    def abort(self, request_id: str, reason: FinishReason = FinishReason.ABORT) -> EngineOutput | None:
        """Ends a live request; its last output, or None if there is no such request."""
        request = self.requests.get(request_id)
        if request is None:
            return None
        return self._end(request, reason)

    def expire(self, now: float) -> list[EngineOutput]:
        """Ends every request whose time is up, and waiting ones that can no longer make their first token's deadline."""
        late = self.deadlines.due(now)
        late += [r for r in self.waiting.head(LOOKAHEAD) if self.deadlines.hopeless(r, now) and r not in late]
        return [self._end(request, FinishReason.DEADLINE) for request in late]

    @property
    def has_work(self) -> bool:
        return bool(self.requests)

    # ---- a step ----

    def schedule(self, now: float | None = None) -> StepPlan | None:
        """The next step, or None when nothing can run before a dispatched step retires."""
        now = time.monotonic() if now is None else now
        budget = self.config.max_num_batched_tokens
        self._make_way()
        preemptions = self.counters.preemptions
        decode, positions = self._schedule_decode(budget)
        builder = ChunkBuilder(budget - len(decode), self.config.max_chunk_tokens, self.config.max_chunk_rows)
        urgent = self._first_waiting_priority()
        self._schedule_unfinished_prompts(builder, lambda r: r.spec.priority <= urgent)
        # A step that took pages from somebody gives none to newcomers: they would be preempted in turn.
        admitted = self._admit(builder, now) if preemptions == self.counters.preemptions else []
        self._schedule_unfinished_prompts(builder, lambda r: r.spec.priority > urgent and r not in admitted)
        if not decode and not builder.chunks:
            return None
        num_steps = 1 if builder.chunks else self._lengthen(decode)
        return self._commit(decode, positions, builder.chunks, admitted, num_steps)

    def retire(self, plan: StepPlan, result: StepResult, now: float | None = None) -> list[EngineOutput]:
        """Takes in what a dispatched step sampled: appends tokens, ends what has ended, frees what nothing writes any more."""
        now = time.monotonic() if now is None else now
        self._retired_step = plan.step_id
        for request in plan.decode:
            request.inflight -= 1
        for chunk in plan.chunks:
            chunk.request.inflight -= 1
            if result.prompt_logprobs and chunk.request.request_id in result.prompt_logprobs:
                self._keep_prompt_logprobs(chunk, result.prompt_logprobs[chunk.request.request_id])
        outputs = self._take_pooled(plan, result.pooled) if result.pooled else []
        all_finite = bool(result.finite.all())
        steps = np.atleast_2d(result.tokens).tolist()
        for step, tokens in enumerate(steps):
            for row, request in enumerate(plan.sampled):
                if request.finished:
                    continue  # it ended before this token was known to be surplus
                request.num_pending -= 1
                if not all_finite and not np.atleast_2d(result.finite)[step, row]:
                    outputs.append(self._end(request, FinishReason.ERROR, error="the model's logits are not finite."))
                    continue
                logprobs = result.logprobs[row] if result.logprobs is not None else None
                outputs.append(self._take_token(request, tokens[row], logprobs, now))
        self._free_left()
        return outputs

    # ---- the parts of schedule() ----

    def _schedule_decode(self, budget: int) -> tuple[list[Request], list[int]]:
        """Rows with exactly one position to compute, given a page where they need one."""
        decode: list[Request] = []
        positions: list[int] = []
        page_size, max_len = self.config.page_size, self.config.max_model_len
        for request in self.running[:]:
            if request.state is not RequestState.RUNNING or request.num_uncomputed != 1 or request.spec.pooling:
                continue
            if request.tokens_left(max_len) <= 0:
                continue  # its last token is on its way
            if len(decode) >= budget:
                break
            position = request.num_computed
            if position // page_size >= len(request.pages) and not self._grow(request):
                continue
            decode.append(request)
            positions.append(position)
        if any(r.state is not RequestState.RUNNING for r in decode):  # preempted by a later row's need of a page
            kept = [(r, p) for r, p in zip(decode, positions, strict=True) if r.state is RequestState.RUNNING]
            decode, positions = [r for r, _ in kept], [p for _, p in kept]
        return decode, positions

    def _lengthen(self, decode: list[Request]) -> int:
        """How many decode steps to dispatch at once: several only while nothing waits for the next one, and while every row
        has the tokens and the pages for them."""
        most = self.config.num_scheduler_steps
        if most == 1 or len(self.waiting) or any(needs_host(r) for r in decode):
            return 1
        steps = min(most, *(r.tokens_left(self.config.max_model_len) for r in decode))
        size = self.config.page_size
        needed = [-(-(r.num_computed + steps) // size) - len(r.pages) for r in decode]
        pages = self.pool.allocate(sum(needed)) if steps > 1 else None
        if pages is None:
            return 1
        for request, count in zip(decode, needed, strict=True):
            for _ in range(count):
                self.slots.append_page(request, pages.pop())
        return steps

    def _grow(self, request: Request) -> bool:
        """One more page for a running request, preempting the least important other if there is none."""
        pages = self.pool.allocate(1)
        if pages is None:
            if self._leaving_pages == 0:
                victim = max((r for r in self.running if r.state is RequestState.RUNNING), key=self.waiting.key)
                self._preempt(victim)
                if victim is request:
                    return False
            pages = self.pool.allocate(1)
            if pages is None:
                return False  # the pages are free one step later, when nothing in flight can write them
        self.slots.append_page(request, pages[0])
        return True

    def _make_way(self) -> None:
        """Under the priority policy, takes slots (and pages, when the first in line lacked them) from running requests that are
        strictly less important than waiting ones. They keep their indexed pages for as long as nobody needs those."""
        if self.config.policy != "priority":
            return
        free = self.slots.num_free + len(self._leaving)
        for request in self.waiting.head(min(LOOKAHEAD, self.config.max_num_seqs)):
            lacks_pages = request is self._short_of_pages and self._leaving_pages == 0
            if free > 0 and not lacks_pages:
                free -= 1
                continue
            victim = max(self.running, key=self.waiting.key, default=None)
            if victim is None or victim.spec.priority <= request.spec.priority:
                break
            self._preempt(victim)
        self._short_of_pages = None

    def _first_waiting_priority(self) -> float:
        """Unfinished prompts less important than this let newcomers go first. Arrival alone never lets one overtake."""
        head = self.waiting.head(1) if self.config.policy == "priority" else []
        return head[0].spec.priority if head else math.inf

    def _schedule_unfinished_prompts(self, builder: ChunkBuilder, which: Callable[[Request], bool]) -> None:
        """Continues prompts that were begun, those of `which`."""
        for request in self.running:
            if not which(request):
                continue
            least = 1 if request.spec.pooling else 2  # a single position is a decode row, where a token is wanted
            if request.state is RequestState.RUNNING and request.num_uncomputed >= least and not request.num_pending:
                builder.add(request)

    def _admit(self, builder: ChunkBuilder, now: float) -> list[Request]:
        """Moves waiting requests into the batch: in policy order, passing over those that do not fit, within the ageing bound."""
        admitted: list[Request] = []
        passed: list[Request] = []
        for request in self._candidates():
            if not builder.has_room or not self.slots.num_free:
                break
            if request.num_pending:
                continue  # preempted with a token in flight: its sequence is not complete yet
            if not self._take_pages(request):
                self._short_of_pages = self._short_of_pages or request
                passed.append(request)
                if request.passed_over >= MAX_PASSED_OVER:
                    break
                continue
            self.waiting.remove(request)
            request.move(RequestState.RUNNING)
            if request.num_preemptions == 0:
                self._count_first_admission(request, now)
            self.slots.acquire(request)
            self.running.append(request)
            admitted.append(request)
            builder.add(request)
            for other in passed:
                other.passed_over += 1
        return admitted

    def _candidates(self) -> list[Request]:
        """Waiting requests in the order to try them."""
        head = self.waiting.head(LOOKAHEAD)
        if not self.config.prefix_first or len(head) < 2:
            return head
        cached = {r.request_id: self.kv.cached_pages(r) for r in head}
        ordered = sorted(
            head,
            key=lambda r: (r.passed_over < MAX_PASSED_OVER, self.waiting.key(r)[0], -cached[r.request_id]),
        )
        place = {r.request_id: i for i, r in enumerate(ordered)}
        for i, request in enumerate(head):  # to be sorted behind later arrivals is to be passed over
            if place[request.request_id] > i:
                request.passed_over += 1
        return ordered

    def _take_pages(self, request: Request) -> bool:
        # Growth room: without it an admission would be paid for by preempting somebody a few steps later.
        reserve = min(len(self.running), self.pool.num_pages // 32)
        return self.kv.admit(request, reserve)

    def _count_first_admission(self, request: Request, now: float) -> None:
        request.scheduled_time = now
        request.num_cached_tokens = request.num_computed
        self.deadlines.started(request, now)
        self.counters.prefix_queries += request.prompt_len
        self.counters.prefix_hits += request.num_cached_tokens
        self.counters.prompt_tokens += request.prompt_len
        if self.fair is not None:
            self.fair.charge(request.spec.tenant, prompt_tokens=request.prompt_len - request.num_cached_tokens)

    def _commit(
        self,
        decode: list[Request],
        positions: list[int],
        chunks: list[Chunk],
        admitted: list[Request],
        num_steps: int = 1,
    ) -> StepPlan:
        """Advances every scheduled request, as if the step had already run."""
        self._step_id += 1
        self.counters.steps += 1
        for request in decode:
            request.num_computed += num_steps
            request.num_pending += num_steps
            request.inflight += 1
        for chunk in chunks:
            request = chunk.request
            request.num_computed += chunk.length
            request.inflight += 1
            if chunk.samples:
                request.num_pending += 1
            self.kv.register(request)
        sampled = (*decode, *(c.request for c in chunks if c.samples))
        return StepPlan(
            self._step_id,
            tuple(decode),
            tuple(positions),
            tuple(chunks),
            tuple(admitted),
            sampled,
            *self.kv.take_step(),
            num_steps,
        )

    # ---- pages that come free ----

    def _preempt(self, request: Request) -> None:
        """Takes a running request's pages and slot; it comes back by computing its sequence anew (prefix hits aside)."""
        request.move(RequestState.PREEMPTED)
        self._leave(request)
        request.num_computed = 0
        request.num_preemptions += 1
        self.counters.preemptions += 1
        self.waiting.push(request)

    def _leave(self, request: Request) -> None:
        """Gives pages and slot back once the last dispatched step that may write them has retired."""
        self.running.remove(request)
        pages, slot = request.pages, request.slot
        request.pages, request.slot, request.cached_pages = [], -1, 0
        if request.inflight:
            self._leaving.append((self._step_id, pages, slot))
            self._leaving_pages += len(pages)
        else:
            self.pool.release(pages)
            self.slots.release(slot)

    def _free_left(self) -> None:
        while self._leaving and self._leaving[0][0] <= self._retired_step:
            _, pages, slot = self._leaving.popleft()
            self._leaving_pages -= len(pages)
            self.pool.release(pages)
            self.slots.release(slot)

    # ---- what goes out ----

    def _take_token(self, request: Request, token: int, logprobs: TokenLogprobs | None, now: float) -> EngineOutput:
        if request.state is RequestState.PREEMPTED:
            self.waiting.num_tokens += 1
        request.tokens.append(token)
        self.counters.generation_tokens += 1
        if self.fair is not None:
            self.fair.charge(request.spec.tenant, output_tokens=1)
        first = request.num_output == 1
        if first:
            request.first_token_time = now
        elif request.state is RequestState.RUNNING and len(request.tokens) % self.config.page_size == 1:
            self.kv.register(request)  # the page before this token's is full of known tokens now
        reason = request.check_stop(self.config.max_model_len)
        error = None
        constraint = request.spec.constraint
        if constraint is not None and reason is not FinishReason.STOP:
            if not constraint.accept(token):
                reason, error = FinishReason.ERROR, "the grammar does not allow the sampled token."
            elif constraint.finished:
                reason = FinishReason.STOP
        if reason is not None:
            return self._end(request, reason, (token,), logprobs, error, now)
        return EngineOutput(
            request.spec.request_id,
            (token,),
            None if logprobs is None else (logprobs,),
            self._first_prompt_logprobs(request) if first else None,
            num_prompt_tokens=request.prompt_len,
            num_cached_tokens=request.num_cached_tokens,
            times=self._times(request) if first else _NO_TIMES,
        )

    def _end(
        self,
        request: Request,
        reason: FinishReason,
        tokens: tuple[int, ...] = (),
        logprobs: TokenLogprobs | None = None,
        error: str | None = None,
        now: float | None = None,
    ) -> EngineOutput:
        if request.state is RequestState.RUNNING:
            self.kv.register(request)
            self._leave(request)
        else:
            self.waiting.remove(request)
        request.finish(reason, request.stop_reason)
        del self.requests[request.request_id]
        if self.fair is not None:
            self.fair.leave(request.spec.tenant)
        prompt_logprobs = self._first_prompt_logprobs(request)
        return EngineOutput(
            request.spec.request_id,
            tokens,
            None if logprobs is None else (logprobs,),
            prompt_logprobs,
            finish_reason=reason,
            stop_reason=request.stop_reason,
            error=error,
            num_prompt_tokens=request.prompt_len,
            num_cached_tokens=request.num_cached_tokens,
            times=self._times(request, time.monotonic() if now is None else now),
        )

    def _keep_prompt_logprobs(self, chunk: Chunk, entries: list[TokenLogprobs]) -> None:
        if not chunk.request.finished:
            kept = self._prompt_logprobs.setdefault(chunk.request.request_id, [None])
            del kept[chunk.start + 1 :]  # a preempted request computes its prompt again
            kept.extend(entries)

    def _take_pooled(self, plan: StepPlan, pooled: dict[str, np.ndarray]) -> list[EngineOutput]:
        """Adds a step's share to each pooling request; ends those whose prompt is complete."""
        outputs = []
        for chunk in plan.chunks:
            request = chunk.request
            if request.finished or request.request_id not in pooled:
                continue
            first = chunk.start == request.num_cached_tokens or request.pooled is None
            request.pooled = pooled[request.request_id] + (0 if first else request.pooled)
            if chunk.start + chunk.length == request.prompt_len:
                request.first_token_time = time.monotonic()
                count = request.prompt_len if request.spec.pooling == "mean" else 1
                output = self._end(request, FinishReason.STOP)
                outputs.append(dataclasses.replace(output, pooled=request.pooled / count))
        return outputs

    def _first_prompt_logprobs(self, request: Request) -> tuple[TokenLogprobs | None, ...] | None:
        kept = self._prompt_logprobs.pop(request.request_id, None)
        if kept is None:
            # A one-token prompt has no position to report on, but was asked.
            asked = request.spec.params.prompt_logprobs is not None and request.num_output == 1
            return (None,) if asked and request.prompt_len == 1 else None
        return tuple(kept[: request.prompt_len])

    def _times(self, request: Request, finished: float = 0.0) -> RequestTimes:
        return RequestTimes(request.spec.arrival_time, request.scheduled_time, request.first_token_time, finished)


_NO_TIMES = RequestTimes()
