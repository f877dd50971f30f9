"""The engine thread: the only place where scheduler and runner meet, and the owner of all their state."""

from __future__ import annotations

import dataclasses
import logging
import queue
import threading
import time
from collections.abc import Callable

import numpy as np

from serving.engine.masks import fill_rows
from serving.engine.pacing import Pacer
from serving.engine.runner import InFlight, ModelRunner
from serving.engine.scheduler import Scheduler
from serving.engine.types import EngineOutput, EngineRequest, EngineStats, FinishReason
from serving.errors import RequestError

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Submit:
    request: EngineRequest


@dataclasses.dataclass(frozen=True)
class Abort:
    request_id: str
    reason: FinishReason = FinishReason.ABORT


@dataclasses.dataclass(frozen=True)
class Call:
    """Runs a function on the engine thread between steps."""

    function: Callable[[], None]


Message = Submit | Abort | Call | None  # None: stop


class EngineLoop:
    """Takes messages, steps, hands outputs over.

    Args:
        deliver: called on the engine thread with the outputs of a step (and of aborts).
        reject: called with a submission that the scheduler refuses.
        on_death: called once with the exception that ended the loop.
        asynchronous: dispatch a step before the one before it has been read.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: ModelRunner,
        deliver: Callable[[list[EngineOutput]], None],
        reject: Callable[[str, RequestError], None],
        on_death: Callable[[BaseException], None],
        asynchronous: bool = True,
    ) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self.stats = EngineStats(num_pages_total=scheduler.pool.num_pages - 1)
        self._deliver = deliver
        self._reject = reject
        self._on_death = on_death
        self._asynchronous = asynchronous
        self._pacer = Pacer() if asynchronous and scheduler.config.policy == "priority" else None
        self._stopping = False
        self._host_seconds = 0.0  # of the last step
        self._host_total = 0.0
        self._waited_total = 0.0
        self._scheduled_tokens = 0
        self._bucket_tokens = 0
        self._last_read = 0.0
        self._thread = threading.Thread(target=self._run, name="jaxserve-engine", daemon=True)

    def start(self) -> None:
        self._publish(0.0)
        self._thread.start()

    def stop(self, timeout: float | None = None) -> None:
        """Ends the loop after the step in flight. What still runs is aborted by the owner."""
        self.inbox.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout)

    def _run(self) -> None:
        try:
            self._loop()
        except BaseException as e:
            log.exception("the engine died")
            self._on_death(e)

    def _loop(self) -> None:
        previous: InFlight | None = None
        while True:
            idle = previous is None and not self.scheduler.has_work
            if self._pacer is not None and previous is not None:
                self._wait_for_arrivals(previous, self._pacer)
            self._take_messages(block=idle)
            if self._stopping:
                return
            began = time.perf_counter()
            waited = self._waited_total
            self._emit(self.scheduler.expire(time.monotonic()))
            plan = self.scheduler.schedule()
            current = None
            if plan is not None:
                current = self.runner.dispatch_forward(plan, self.scheduler.slots)
                self._scheduled_tokens += plan.num_tokens
                self._bucket_tokens += current.bucket.tokens * plan.num_steps
                if current.constrained and previous is not None:
                    self._retire(previous)  # a mask needs the token before it; forward is running meanwhile
                    previous = None
                self.runner.dispatch_sample(current, self._mask(current) if current.constrained else None)
                if not self._asynchronous:
                    previous, current = current, None
            if previous is not None:
                self._retire(previous)
            elif plan is None and self.scheduler.has_work:
                # Everything waits for pages that nobody holds in flight: cannot happen while limits hold.
                raise RuntimeError("the scheduler has work, but nothing can run")
            previous = current
            took = time.perf_counter() - began
            self._host_seconds = took - (self._waited_total - waited)
            self._host_total += self._host_seconds
            self._publish(took)

    def _retire(self, step: InFlight) -> None:
        """Waits for a step, reads it and hands out its tokens."""
        began = time.perf_counter()
        result = self.runner.collect(step)
        now = time.perf_counter()
        self._waited_total += now - began
        # The device took this step up when it was dispatched, or when it was done with the one before.
        seconds = now - max(step.dispatched_at, self._last_read)
        self.scheduler.observe(step.plan, seconds)
        if self._pacer is not None:
            self._pacer.observe((step.bucket, step.plan.num_steps), seconds)
        self._last_read = now
        self._emit(self.scheduler.retire(step.plan, result))

    def _wait_for_arrivals(self, step: InFlight, pacer: Pacer) -> None:
        """Waits while `step` runs, so that urgent requests that arrive meanwhile are in the next one; see pacing.py."""
        began = max(step.dispatched_at, self._last_read)
        time.sleep(max(0.0, began + pacer.wait((step.bucket, step.plan.num_steps)) - time.perf_counter()))

    def _mask(self, step: InFlight) -> np.ndarray:
        mask = self.runner.new_mask(step)
        live = [(row, request) for row, request in step.constrained if not request.finished]
        for row, reason in fill_rows(live, mask).items():
            request = step.plan.sampled[row]
            log.warning("request %s: its grammar cannot go on: %s", request.request_id, reason)
            mask[row] = -1
            output = self.scheduler.abort(request.request_id, FinishReason.ERROR)
            if output is not None:
                self._emit([dataclasses.replace(output, error="the grammar became too complex to go on.")])
        return mask

    def _emit(self, outputs: list[EngineOutput]) -> None:
        if outputs:
            self._deliver(outputs)

    def _take_messages(self, block: bool) -> None:
        while True:
            try:
                message = self.inbox.get(block=block)
            except queue.Empty:
                return
            block = False
            match message:
                case None:
                    self._stopping = True
                    return
                case Submit(request):
                    try:
                        self.scheduler.add(request)
                    except RequestError as e:
                        self._reject(request.request_id, e)
                case Abort(request_id, reason):
                    output = self.scheduler.abort(request_id, reason)
                    if output is not None:
                        self._emit([output])
                case Call(function):
                    function()

    def _publish(self, step_seconds: float) -> None:
        s, c = self.scheduler, self.scheduler.counters
        self.stats = EngineStats(
            num_running=len(s.running),
            num_waiting=len(s.waiting),
            num_pages_free=s.pool.num_free,
            num_pages_total=s.pool.num_pages - 1,
            num_preemptions=c.preemptions,
            prefix_queries=c.prefix_queries,
            prefix_hits=c.prefix_hits,
            prompt_tokens=c.prompt_tokens,
            generation_tokens=c.generation_tokens,
            num_steps=c.steps,
            num_scheduled_tokens_total=self._scheduled_tokens,
            num_bucket_tokens_total=self._bucket_tokens,
            num_recompilations=self.runner.guard.count,
            expert_loads=self.runner.expert_loads,
            last_step_s=step_seconds,
            host_step_s=self._host_seconds,
            host_time_s_total=self._host_total,
            device_wait_time_s_total=self._waited_total,
        )
