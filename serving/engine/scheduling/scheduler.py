"""Which requests run in the next step, how many tokens each, and which pages they own. Plain Python; no jax.

There are no phases: a request's computed positions chase its existing ones under one token budget a step. Running requests
go first (decode rows, then unfinished prompts), then waiting ones. See request.py for the positions and states.
"""

from __future__ import annotations

import math
import time

import numpy as np

from serving.engine.api.types import EngineOutput, EngineRequest, FinishReason, TokenLogprobs
from serving.engine.cache.adapters import AdapterSlots
from serving.engine.cache.replicas import Replicas
from serving.engine.requests.buckets import Bucket
from serving.engine.requests.chunks import CHUNK_ALIGN, ChunkBuilder
from serving.engine.requests.moves import Landing
from serving.engine.requests.plan import Chunk, StepPlan, StepResult
from serving.engine.requests.request import Request, RequestState, by_replica
from serving.engine.requests.scheduler_config import Counters, SchedulerConfig
from serving.engine.requests.slots import SlotTable
from serving.engine.scheduling.admission import Admission
from serving.engine.scheduling.deadlines import Deadlines
from serving.engine.scheduling.drafts.planner import DraftRows, Drafts
from serving.engine.scheduling.lengths import Lengths
from serving.engine.scheduling.outputs import Outputs, add_pooled, verdict
from serving.engine.scheduling.policy import (
    BACKGROUND_SHARE,
    LOOKAHEAD,
    MAX_PASSED_OVER,
    FairShare,
    Foreground,
    WaitingQueue,
)
from serving.engine.scheduling.receiving import Receiving
from serving.errors import invalid

__all__ = ["Scheduler", "SchedulerConfig"]


class Scheduler:
    """Owns every live request, the page pool and the slots. One thread calls it.

    The order of calls is: any number of `add` / `abort`, then `schedule`, then (now or one step later) `retire` with the
    result of that plan, in plan order.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        pages_per_slot = -(-config.max_model_len // config.page_size)
        groups = len(config.windows)
        self.slots = SlotTable(config.max_num_seqs, pages_per_slot, config.seed, config.replicas, groups)
        self.kv = Replicas.of(config, self.slots)
        self.pool = self.kv.pool
        self.fair = FairShare() if config.fair_share else None
        self.foreground = Foreground(config.policy == "priority")
        self.waiting = WaitingQueue(config.policy, self.fair)
        self.adapters = AdapterSlots(config.adapter_slots)
        self.deadlines = Deadlines(config.max_waiting_time, config.max_running_time)
        self.running: list[Request] = []
        self.requests: dict[str, Request] = {}
        self.counters = Counters()
        self._admission = Admission(
            config, self.requests, self.waiting, self.slots, self.kv, self.deadlines, self.fair, self.counters
        )
        self.receiving = Receiving(self.waiting, self.kv)
        self._has_states = config.recurrent is not None
        self.drafts = Drafts.of(config, self.kv, self.counters)
        self._arrivals = 0
        self._step_id = 0
        self.only: frozenset[str] | None = None  # ids that may be admitted, while one of them is under suspicion
        self.max_tokens = config.max_num_batched_tokens
        self.lengths = Lengths(config, self.kv)
        self._short_of_pages: Request | None = None
        self.num_deferred = 0  # waiting requests that the last pass could not take whatever there was room for
        self._outputs = Outputs()

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
        self.adapters.arrive(request)
        self.waiting.push(request)
        if self.fair is not None:
            self.fair.arrive(spec.tenant)
        self.foreground.arrive(spec.priority, spec.arrival_time)
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
        if self.deadlines.watches_first_tokens:
            hopeless = [r for r in self.waiting.head(LOOKAHEAD) if self.deadlines.hopeless(r, now)]
            late |= {r: "its first token cannot come in time any more." for r in hopeless if r not in late}
        return [self._end(request, FinishReason.DEADLINE, error=why) for request, why in late.items()]

    @property
    def has_work(self) -> bool:
        """Whether a step could do something for anybody."""
        return bool(self.running) or len(self.waiting) > 0

    # ---- prefixes that come from other engines ----

    def receive(self, request_id: str, tokens: int) -> Landing | None:
        """Makes room for the first `tokens` of a waiting request, which another engine has computed. The request waits for
        `arrived` then. None where it need not: it has begun, is gone, or there is no room; it computes all by itself."""
        return self.receiving.begin(self.requests.get(request_id), tokens) if self.only is None else None

    def hold(self, request_id: str) -> bool:
        """Has a waiting request wait for `arrived` without room of its own: what it needs is on its way to another one."""
        return self.only is None and self.receiving.hold(self.requests.get(request_id))

    def arrived(self, request_id: str, tokens: int) -> None:
        """So many of the tokens that `receive` made room for are there, verified by whoever wrote them; fewer, or 0, after a
        failure. The request waits for its turn, finds them as its prefix, and computes the rest."""
        request = self.requests.get(request_id)
        if request is not None and request.state is RequestState.RECEIVING:
            self.receiving.end(request, tokens, self._step_id)

    # ---- a step ----

    def schedule(self, now: float | None = None) -> StepPlan | None:
        """The next step, or None when nothing can run before a dispatched step retires."""
        now = time.monotonic() if now is None else now
        budget = self.max_tokens
        self._make_way()
        preemptions = self.counters.preemptions
        decode, rows, unfinished = self._schedule_decode(budget)
        waiting = self.waiting.head(1) if self.slots.num_free else []
        held = decode if self.foreground.hurries((*unfinished, *waiting), self.running) else []
        if held:
            decode, rows = [], [0] * self.config.replicas
        background = max(CHUNK_ALIGN, budget // BACKGROUND_SHARE)
        builders = [
            ChunkBuilder(budget - count, self.config.max_chunk_tokens, self.config.max_chunk_rows, background)
            for count in rows
        ]
        urgent = self._first_waiting_priority()
        self._continue_prompts(builders, [r for r in unfinished if r.spec.priority <= urgent])
        # A step that took pages from somebody gives none to newcomers: they would be preempted in turn.
        admitted = self._admit(builders, now) if preemptions == self.counters.preemptions else []
        self._continue_prompts(builders, [r for r in unfinished if r.spec.priority > urgent])
        if self.config.buckets is not None:  # all replicas are padded to one bucket
            tokens = self.config.buckets.chunk_tokens(max(b.tokens for b in builders), max(rows))
            for builder in builders:
                builder.shorten(tokens)
        chunks = [chunk for builder in builders for chunk in builder.chunks]
        if held and not chunks:  # nobody could be admitted after all
            decode, held = held, []
        self.foreground.hurried(bool(held))
        if not decode and not chunks:
            return None
        drafts = self.drafts.choose(decode, self._step_id) if self.drafts and not chunks else ()
        num_steps = 1
        if not chunks and not drafts:
            num_steps = self.lengths.choose(decode, len(self.waiting) > 0, self._step_id)
        return self._commit(decode, chunks, admitted, num_steps, drafts)

    def awaits(self, plan: StepPlan) -> bool:
        """Whether this plan, the last one dispatched, is to be retired before the next `schedule`: how far its drafts have come
        is open, or the next ones hang on its tokens."""
        prompts = self.slots.num_free and self.waiting.head(1)  # steps that have some have no drafts
        return bool(plan.drafts) or (self.drafts is not None and not prompts and self.drafts.awaits(self.running))

    def retire(self, plan: StepPlan, result: StepResult, now: float | None = None) -> list[EngineOutput]:
        """Takes in what a dispatched step sampled: appends tokens, ends what has ended, frees what nothing writes any more."""
        now = time.monotonic() if now is None else now
        for request in plan.decode:
            request.inflight -= 1
        outputs: list[EngineOutput] = []
        for chunk in plan.chunks:
            request = chunk.request
            request.inflight -= 1
            if result.prompt_logprobs and request.request_id in result.prompt_logprobs:
                self._outputs.keep_prompt_logprobs(chunk, result.prompt_logprobs[request.request_id])
            if result.pooled and request.request_id in result.pooled and not request.finished:
                pooled = add_pooled(chunk, result.pooled[request.request_id])
                if pooled is not None:
                    request.first_token_time = now
                    outputs.append(self._end(request, FinishReason.STOP, now=now, pooled=pooled))
        finite = None if result.finite.all() else result.finite
        ragged = plan.num_steps > 1 or bool(plan.drafts)
        for row, (request, tokens) in enumerate(zip(plan.sampled, result.tokens.tolist(), strict=True)):
            logprobs = result.logprobs[row] if result.logprobs is not None else None
            # First, because what ends a request also registers its pages: as far as its own tokens have come.
            if ragged and request.state is not RequestState.FINISHED:
                self._take_back(plan, row, request, len(tokens) - tokens.count(-1))
            for place, token in enumerate(tokens):
                if token < 0 or request.state is RequestState.FINISHED:
                    break  # it ended before this token was known to be surplus
                request.num_pending -= 1
                if finite is not None and not finite[row, place]:
                    error = "the model's logits are not finite."
                    self.counters.nonfinite += 1
                    outputs.append(self._end(request, FinishReason.ERROR, error=error, now=now))
                    break
                found = None if logprobs is None else logprobs[place]
                output = self._take_token(request, token, found, now)
                if output is not None:
                    outputs.append(output)
        self.kv.retired(plan.step_id)
        return outputs

    def observe(self, plan: StepPlan, seconds: float, bucket: Bucket, host_s: float | None = None) -> None:
        """Learns what a step of a bucket costs from one that took the device `seconds`, having waited `host_s` for it."""
        self.deadlines.observe(plan, seconds)
        self.lengths.observe(plan, seconds)
        self.kv.observe(self.deadlines.seconds_per_token)
        if self.drafts is not None and plan.num_steps == 1:
            self.drafts.costs.observe(bucket, seconds, host_s)

    # ---- the parts of schedule() ----

    def _schedule_decode(self, budget: int) -> tuple[list[Request], list[int], list[Request]]:
        """Rows with exactly one position to compute, given a page where they need one; how many of them each replica has; and
        the requests that have more to compute, whose prompts were begun. One pass without properties: 256 requests come by
        here in a step."""
        decode: list[Request] = []
        unfinished: list[Request] = []
        rows = [0] * self.config.replicas
        page_size, max_len = self.config.page_size, self.config.max_model_len
        preemptions = self.counters.preemptions
        for request in self.running[:]:
            position = request.num_computed
            uncomputed = len(request.tokens) + request.num_pending - position
            if request.state is not RequestState.RUNNING or uncomputed < 1:
                continue
            if uncomputed > 1 or request.spec.pooling:
                if position // page_size < request.reach or self._grow(request):
                    unfinished.append(request)
                continue
            if request.tokens_left(max_len) <= 0:
                self._spare_slot(request)
                continue  # its last token is on its way
            if rows[request.replica] >= budget:
                continue
            if position // page_size >= request.reach and not self._grow(request):
                continue
            decode.append(request)
            rows[request.replica] += 1
        if (
            self.counters.preemptions != preemptions
        ):  # a later row's need of a page may have cost an earlier row its own
            decode = [r for r in decode if r.state is RequestState.RUNNING]
            unfinished = [r for r in unfinished if r.state is RequestState.RUNNING]
            rows = by_replica(decode, self.config.replicas)
        return decode, rows, unfinished

    def _grow(self, request: Request) -> bool:
        """Pages for a running request's next position, preempting the least important other if there are none."""
        end = request.num_computed + 1
        if self.kv.cover(request, end, self._step_id) >= end:
            return True
        if self.kv.leaving_of(request) == 0:
            victim = self._least_important(request.replica)
            if victim is None:
                return False
            self._preempt(victim)
            if victim is request:
                return False
        # If not, the pages are free one step later, when nothing in flight can write them.
        return self.kv.cover(request, end, self._step_id) >= end

    def _make_way(self) -> None:
        """Under the priority policy, takes slots (and pages, when the first in line lacked them) from running requests that are
        strictly less important than waiting ones. They keep their indexed pages for as long as nobody needs those."""
        if self.config.policy != "priority" or self.only is not None:
            return
        free = self.slots.num_free
        for request in self.waiting.head(min(LOOKAHEAD, self.config.max_num_seqs)):
            lacks_pages = request is self._short_of_pages and self.kv.num_leaving == 0
            if free > 0 and not lacks_pages:
                free -= 1
                continue
            victim = self._least_important()
            if victim is None or victim.spec.priority <= request.spec.priority:
                break
            self._preempt(victim)
        self._short_of_pages = None

    def _least_important(self, replica: int | None = None) -> Request | None:
        """Whom to preempt (in one replica): nobody whose last token is on its way, because that gains nothing."""
        candidates = (r for r in self.running if r.slot >= 0 and replica in (None, r.replica))
        return max(candidates, key=self.waiting.key, default=None)

    def _first_waiting_priority(self) -> float:
        """Unfinished prompts less important than this let newcomers go first. Arrival alone never lets one overtake."""
        head = self.waiting.head(1) if self.config.policy == "priority" else []
        return head[0].spec.priority if head else math.inf

    def _continue_prompts(self, builders: list[ChunkBuilder], unfinished: list[Request]) -> None:
        """Gives pieces to prompts that were begun."""
        for request in unfinished:
            if not request.num_pending:
                self._add_piece(builders, request, self.foreground.is_background(request))

    def _add_piece(self, builders: list[ChunkBuilder], request: Request, background: bool) -> None:
        """Gives a prompt as long a piece as the step has room for, and there are pages."""
        builder = builders[request.replica]
        length = self.kv.piece(request, builder.room_for(request, background))
        if length:
            covered = self.kv.cover(request, request.num_computed + length, self._step_id)
            builder.add(request, self.kv.uncut(request, min(length, covered - request.num_computed)))

    def _admit(self, builders: list[ChunkBuilder], now: float) -> list[Request]:
        """Moves waiting requests into the batch: in policy order, passing over those that do not fit, within the ageing bound."""
        admitted: list[Request] = []
        passed: list[Request] = []
        self.num_deferred = 0
        for request in self._admission.candidates(self.only):
            background = self.foreground.is_background(request)
            open_replicas = self._admission.open_replicas(request, builders, background)
            if not open_replicas:
                break
            if request.num_pending:
                self.num_deferred += 1
                continue  # preempted with a token in flight: its sequence is not complete yet
            if not self.adapters.take(request) or not self._admission.take_pages(request, open_replicas):
                self.adapters.leave(request)
                self._short_of_pages = self._short_of_pages or request
                passed.append(request)
                if request.passed_over >= MAX_PASSED_OVER:
                    break
                continue
            self.waiting.remove(request)
            request.move(RequestState.RUNNING)
            if request.num_preemptions == 0:
                self._admission.count_first(request, now)
            self.slots.acquire(request)
            self.running.append(request)
            admitted.append(request)
            self._add_piece(builders, request, background)
            for other in passed:
                other.passed_over += 1
        return admitted

    def _commit(
        self, decode: list[Request], chunks: list[Chunk], admitted: list[Request], num_steps: int, drafts: DraftRows
    ) -> StepPlan:
        """Advances every scheduled request, as if the step had already run."""
        self._step_id += 1
        self.counters.steps += num_steps
        caught_up = self.drafts.committed(decode, chunks, drafts) if self.drafts is not None else ()
        positions = tuple([request.num_computed for request in decode])
        for request, guessed in zip(decode, drafts or [()] * len(decode), strict=True):
            if self._has_states and drafts:
                self.kv.rests(request)
            request.num_computed += num_steps + len(guessed)
            request.num_pending += num_steps + len(guessed)
            request.inflight += 1
            if self._has_states and not drafts:
                self.kv.reached(request, decoding=True)
        for chunk in chunks:
            request = chunk.request
            request.num_computed += chunk.length
            request.inflight += 1
            if chunk.samples:
                request.num_pending += 1
            self.kv.reached(request, decoding=False)
            self.kv.register(request)
        sampled = (*decode, *(c.request for c in chunks if c.samples))
        rest = self.kv.take_step(), num_steps, drafts, self.adapters.take_step(), caught_up
        return StepPlan(self._step_id, tuple(decode), positions, tuple(chunks), tuple(admitted), sampled, *rest)

    def _take_back(self, plan: StepPlan, row: int, request: Request, tokens: int) -> None:
        """A row of a step that gave some tokens each has given so many."""
        missing = plan.most_tokens(row) - tokens
        if missing:
            request.take_back(missing)
            self.kv.take_back(request)
        if self.drafts is not None:
            self.drafts.verified(plan, row, tokens)

    # ---- after a step that failed, or whose pages are gone ----

    def requeue(self) -> None:
        """Puts every request back to waiting, with nothing of it computed: what steps in flight would have given is lost, and
        so is what every page held. Each will sample the tokens that it would have."""
        for request in self.requests.values():
            request.inflight = request.num_pending = 0
        for request in self.running[:]:
            self._preempt(request)
        for request in self.requests.values():
            request.digests.clear()
            self.arrived(request.request_id, 0)
        self.kv.forget(self._step_id)
        self.adapters.clear()
        self._short_of_pages = None

    def shrink(self) -> bool:
        """Halves the tokens of a step from now on. False when it is as small as it can be."""
        smaller = max(self.max_tokens // 2 // CHUNK_ALIGN * CHUNK_ALIGN, self.config.max_num_seqs + CHUNK_ALIGN)
        if smaller >= self.max_tokens:
            return False
        self.max_tokens = smaller
        return True

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
        """Gives slot and pages back, the pages once the last dispatched step that may write them has retired."""
        self.running.remove(request)
        self._spare_slot(request)
        self.adapters.leave(request)
        self.kv.leave(request, self._step_id)

    def _spare_slot(self, request: Request) -> None:
        """Gives the slot back, if it has one still: a request whose last token is on its way needs none."""
        if request.slot >= 0:
            self.slots.release(request)

    # ---- what goes out ----

    def _take_token(
        self, request: Request, token: int, logprobs: TokenLogprobs | None, now: float
    ) -> EngineOutput | None:
        if request.state is RequestState.PREEMPTED:
            self.waiting.num_tokens += 1
        request.tokens.append(token)
        self.counters.generation_tokens += 1
        if self.fair is not None:
            self.fair.charge(request.spec.tenant, output_tokens=1)
        length = len(request.tokens)
        if length == request.prompt_len + 1:
            request.first_token_time = now
        elif length % self.config.page_size == 1 and request.state is RequestState.RUNNING:
            self.kv.register(request)  # the page before this token's is full of known tokens now
        reason, error = verdict(request, self.config.max_model_len)
        if reason is None:
            return self._outputs.token(request, token, logprobs)
        return self._end(request, reason, (token,), logprobs, error, now)

    def _end(
        self,
        request: Request,
        reason: FinishReason,
        tokens: tuple[int, ...] = (),
        logprobs: TokenLogprobs | None = None,
        error: str | None = None,
        now: float | None = None,
        pooled: np.ndarray | None = None,
    ) -> EngineOutput:
        if request.state is RequestState.RUNNING:
            self.kv.register(request)
            self._leave(request)
        elif request.state is RequestState.RECEIVING:
            self.receiving.drop(request, self._step_id)
        else:
            self.waiting.remove(request)
        request.finish(reason, request.stop_reason)
        del self.requests[request.request_id]
        self.adapters.depart(request)
        if self.drafts is not None:
            self.drafts.end(request)
        if self.fair is not None:
            self.fair.leave(request.spec.tenant)
        return self._outputs.last(request, reason, tokens, logprobs, error, now, pooled)
