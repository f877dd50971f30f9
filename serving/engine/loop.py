"""The engine thread: the only place where scheduler and runner meet, and the owner of all their state."""

from __future__ import annotations

import dataclasses
import logging
import queue
import threading
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol

from serving.engine.api.peers.stats import TransferStats
from serving.engine.api.types import STEP_TOKEN_BOUNDS, EngineOutput, EngineRequest, EngineStats, FinishReason
from serving.engine.device.runner import InFlight, StepRunner
from serving.engine.scheduling.pipeline import Flight, StepPipeline
from serving.engine.scheduling.recovery import StepFailedError, Suspects, is_out_of_memory
from serving.engine.scheduling.scheduler import Scheduler
from serving.errors import ErrorKind, RequestError

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

PAUSED_LOOK_S = 0.2
"""How often a loop that does not step looks for requests whose time is up."""

ALIVE_LOOK_S = 0.5
"""How often whoever waits for the engine's thread looks whether there is one still."""

TRACE_STEPS = 32
"""Steps that a crash report tells of."""


@dataclasses.dataclass(frozen=True)
class StepTrace:
    """What a step was, without a word of anybody's text. `seconds`: that the device had it."""

    step_id: int
    decode_rows: int
    chunk_tokens: int
    num_steps: int
    seconds: float


class Peers(Protocol):
    """What an engine's loop tells those who move pages between engines; all on the engine's thread."""

    def submitted(self, request: EngineRequest) -> None:
        """A request was taken."""
        ...

    def emitted(self, outputs: list[EngineOutput]) -> list[EngineOutput]:
        """Outputs on their way out; what is to go out instead."""
        ...

    def give_way(self) -> bool:
        """Requests wait and none can run: gives up pages that are kept for others. Whether there is anything to wait for."""
        ...

    def look(self) -> float | None:
        """Ends what is late. Seconds until it wants to look again; None while there is nothing to look after."""
        ...

    def weights_changed(self) -> None:
        """Pages from before mean nothing any more."""
        ...

    @property
    def stats(self) -> TransferStats: ...


class EngineLoop:
    """Takes messages, steps, hands outputs over.

    Args:
        deliver: called on the engine thread with the outputs of a step (and of aborts).
        reject: called with a submission that the scheduler refuses.
        on_death: called once with the exception that ended the loop.
        asynchronous: dispatch a step before the one before it has been read.

    Attributes:
        busy_since: time.monotonic() seconds at which the current round began; None while there is nothing to do. What a
            watchdog looks at, from its own thread.
        paused: take messages, but start no steps. Set on the engine thread.
        recent: the last steps.
        peers: who exchanges pages with other engines; None where nobody does.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: StepRunner,
        deliver: Callable[[list[EngineOutput]], None],
        reject: Callable[[str, RequestError], None],
        on_death: Callable[[BaseException], None],
        asynchronous: bool = True,
    ) -> None:
        self.scheduler = scheduler
        self.pipeline = StepPipeline(scheduler, runner, self._emit, asynchronous=asynchronous)
        self.pipeline.prepare, self.pipeline.on_read = self._prepare, self._note
        self.pipeline.stuck = self._gives_way
        self.peers: Peers | None = None
        self._look_again: float | None = None
        self._waits = False  # requests wait, and none can run before something comes from another engine
        self.inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self.stats = EngineStats(num_pages_total=scheduler.pool.num_pages - 1)
        self._deliver = deliver
        self._reject = reject
        self._on_death = on_death
        self._stopping = False
        self._host_seconds = 0.0  # of the last step
        self._host_total = 0.0
        self._scheduled_tokens = 0
        self._bucket_tokens = 0
        self._step_tokens = [0] * (len(STEP_TOKEN_BOUNDS) + 1)
        self.busy_since: float | None = None
        self.paused = False
        self.recent: deque[StepTrace] = deque(maxlen=TRACE_STEPS)
        self.suspects = Suspects()
        self._thread = threading.Thread(target=self._run, name="jaxserve-engine", daemon=True)

    def start(self) -> None:
        self._publish(0.0)
        self._thread.start()

    def stop(self, timeout: float | None = None) -> None:
        """Ends the loop after the step in flight. What still runs is aborted by the owner."""
        self.inbox.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout)

    def call(self, function: Callable[[], Any], timeout: float = 60.0) -> Any:
        """Runs a function on the engine thread between two steps and returns its result.

        Raises:
            TimeoutError: it had no turn within so many seconds; or what the function raises.
        """
        asked, end = self.ask(function), time.monotonic() + timeout
        while True:
            try:
                return asked.result(min(ALIVE_LOOK_S, max(0.0, end - time.monotonic())))
            except TimeoutError:
                if asked.done():
                    raise  # the function's own
                if not self.answers or time.monotonic() >= end:
                    raise TimeoutError("the engine thread did not answer") from None

    def ask(self, function: Callable[[], Any]) -> Future[Any]:
        """Has a function run on the engine thread between two steps. Its result never comes where `answers` is False."""
        asked: Future[Any] = Future()

        def run() -> None:
            try:
                result = function()
            except Exception as e:
                asked.set_exception(e)
            else:
                asked.set_result(result)

        self.inbox.put(Call(run))
        return asked

    @property
    def answers(self) -> bool:
        """Whether the engine's thread is alive, or was not started yet."""
        return self._thread.ident is None or self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._loop()
        except BaseException as e:
            log.exception("the engine died")
            self._on_death(e)
        finally:
            self.busy_since = None

    @property
    def runner(self) -> StepRunner:
        """What carries steps out."""
        return self.pipeline.device  # pyright: ignore[reportReturnType]

    @runner.setter
    def runner(self, runner: StepRunner) -> None:
        self.pipeline.device = runner

    @property
    def in_flight(self) -> bool:
        """Whether a dispatched step has not been read. Asked on the engine thread."""
        return self.pipeline.in_flight is not None

    def _loop(self) -> None:
        while True:
            idle = not self.in_flight and (self.paused or self._waits or not self.scheduler.has_work)
            self.busy_since = None
            pause = self.pipeline.pause_s()
            if pause:
                time.sleep(pause)
            if self.peers is not None:
                before, self._look_again = self._look_again, self.peers.look()
                if before is not None and self._look_again is None:  # nobody may ask for anything for long
                    self._publish(self.stats.last_step_s)
            self._take_messages(block=idle)
            if self._stopping:
                return
            self.busy_since, self._waits = time.monotonic(), False
            began = time.perf_counter()
            waited = self.pipeline.waited_s
            try:
                self.pipeline.step(schedule=not self.paused)
            except StepFailedError as failure:
                self._recover(failure)
            took = time.perf_counter() - began
            self._host_seconds = took - (self.pipeline.waited_s - waited)
            self._host_total += self._host_seconds
            self._publish(took)

    def _prepare(self) -> None:
        """Between what ends requests and what schedules: who may be admitted while one is under suspicion."""
        self.suspects.gone(self.scheduler.requests.__contains__)
        self.scheduler.only = self.suspects.only

    def _gives_way(self) -> bool:
        """See StepPipeline.stuck."""
        self._waits = self.peers is not None and self.peers.give_way()
        return self._waits

    def _recover(self, failure: StepFailedError) -> None:
        """Goes on after a step that failed; see recovery.py. Raises its cause when that makes no sense."""
        cause = failure.__cause__ or failure
        plan = failure.plan
        log.error("step %d failed, with %d requests; trying again", plan.step_id, len(plan.requests), exc_info=cause)
        self.pipeline.forget()
        ids = [r.request_id for r in plan.requests if not r.finished]
        if is_out_of_memory(cause) and self.scheduler.shrink():
            log.error("steps are now of at most %d tokens; see --max-num-batched-tokens", self.scheduler.max_tokens)
            culprit = None if len(ids) == 1 else self.suspects.failed(ids)
        else:
            culprit = self.suspects.failed(ids)
        if self.suspects.hopeless or not self.runner.executor.alone:
            raise cause
        self.scheduler.requeue()
        self.runner.executor.reset_cache()
        if culprit is not None:
            output = self.scheduler.abort(culprit, FinishReason.ERROR)
            if output is not None:
                self._emit([dataclasses.replace(output, error="the model failed on this request.")])

    def _note(self, flight: Flight[InFlight], seconds: float) -> None:
        """Keeps count of a step that was read."""
        plan = flight.plan
        chunk_tokens = sum(chunk.length for chunk in plan.chunks)
        self.recent.append(StepTrace(plan.step_id, len(plan.decode), chunk_tokens, plan.num_steps, round(seconds, 6)))
        self._scheduled_tokens += plan.num_tokens
        self._step_tokens[bisect_left(STEP_TOKEN_BOUNDS, plan.num_tokens // plan.num_steps)] += plan.num_steps
        self._bucket_tokens += flight.step.bucket.tokens * plan.num_steps * self.scheduler.config.replicas
        if self.suspects.failures:
            self.suspects.passed([r.request_id for r in plan.requests])

    def _emit(self, outputs: list[EngineOutput]) -> None:
        if outputs:
            self._deliver(outputs if self.peers is None else self.peers.emitted(outputs))

    def _take_messages(self, block: bool) -> None:
        while True:
            try:
                message = self.inbox.get(
                    block, PAUSED_LOOK_S if self.paused or self.scheduler.requests else self._look_again
                )
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
                        if self.peers is not None:
                            self.peers.submitted(request)
                    except RequestError as e:
                        self._reject(request.request_id, e)
                    except Exception:
                        log.exception("request %s could not be taken", request.request_id)
                        self._reject(
                            request.request_id,
                            RequestError(ErrorKind.INTERNAL, "the engine failed to take this request."),
                        )
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
            num_deferred=len(s.waiting) if self.paused else min(s.num_deferred, len(s.waiting)),
            num_pages_free=s.pool.num_free,
            num_pages_total=s.pool.num_pages - 1,
            num_preemptions=c.preemptions,
            prefix_queries=c.prefix_queries,
            prefix_hits=c.prefix_hits,
            media_queries=s.kv.media_queries,
            media_hits=s.kv.media_hits,
            media_time_s_total=self.runner.media_time_s,
            prompt_tokens=c.prompt_tokens,
            generation_tokens=c.generation_tokens,
            num_steps=c.steps,
            num_scheduled_tokens_total=self._scheduled_tokens,
            num_bucket_tokens_total=self._bucket_tokens,
            num_recompilations=self.runner.guard.count,
            expert_loads=self.runner.expert_loads,
            num_failed_steps=self.suspects.failures,
            num_nonfinite=c.nonfinite,
            last_step_s=step_seconds,
            host_step_s=self._host_seconds,
            host_time_s_total=self._host_total,
            device_wait_time_s_total=self.pipeline.waited_s,
            step_tokens=tuple(self._step_tokens),
            num_drafts=c.drafts,
            num_draft_tokens=c.draft_tokens,
            num_accepted_tokens=c.accepted_tokens,
            accepted_per_pos=None if s.drafts is None else tuple(c.accepted_per_pos),
            running_adapters=s.adapters.running,
            waiting_adapters=s.adapters.waiting,
            transfers=None if self.peers is None else self.peers.stats,
        )
