"""The order of a step: expire, schedule, dispatch, retire the one before. Whoever steps does it with this: the engine's loop,
the rehearsal, the simulator (a device with a virtual clock), tests (one that keeps tokens in pages).

The step before is read while the new one runs, so that the device never waits for the host, unless a token mask needs the
token before it: then it is read between the two halves of the new step, while the first one runs. Drafts need it sooner: where
the scheduler awaits it, it is read before anything is scheduled.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from serving.engine.api.types import EngineOutput
from serving.engine.requests.buckets import Bucket
from serving.engine.requests.plan import ON_DEVICE, StepPlan, StepResult
from serving.engine.requests.request import Request
from serving.engine.requests.slots import SlotTable
from serving.engine.scheduling.masks import fill_rows
from serving.engine.scheduling.outputs import grammar_failure
from serving.engine.scheduling.pacing import Pacer
from serving.engine.scheduling.recovery import StepFailedError
from serving.engine.scheduling.scheduler import Scheduler

log = logging.getLogger(__name__)


class DispatchedStep(Protocol):
    """What a device says of a step that it has taken.

    Attributes:
        bucket: what the step was padded to.
        constrained: (row of its mask, request) of rows whose next token the host limits.
    """

    @property
    def bucket(self) -> Bucket: ...

    @property
    def constrained(self) -> Sequence[tuple[int, Request]]: ...


S = TypeVar("S", bound=DispatchedStep)


class Device(Protocol[S]):
    """Carries plans out, in the order in which they are given. `device.runner.StepRunner` is one."""

    def dispatch_forward(self, plan: StepPlan, slots: SlotTable) -> S:
        """Starts the first half of a step. Does not wait; reads `slots` and the plan's requests before it returns."""
        ...

    def new_mask(self, step: S) -> np.ndarray:
        """int32 [rows, words] that allows everything, for the rows of `step.constrained`."""
        ...

    def guesses(self, step: S) -> np.ndarray:
        """int32 [decode rows, K]: what a draft model has guessed for the step; waits for that."""
        ...

    def dispatch_sample(self, step: S, mask_SW: np.ndarray | None) -> None:
        """Starts the second half of the step dispatched last; with a mask where it has constrained rows."""
        ...

    def collect(self, step: S) -> StepResult:
        """Waits for a step and reads what it sampled. Steps are collected in their order, each once."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class Flight(Generic[S]):
    """A step on its way.

    Attributes:
        dispatched_at: of the pipeline's clock, in seconds.
        host_s: seconds that the device had waited for it by then; None where it had the step before to do.
    """

    plan: StepPlan
    step: S
    dispatched_at: float
    host_s: float | None = None


class _CarryingOut:
    """Failures within it are the step's, not the scheduler's, whose state they leave whole. A class: a generator's context costs
    four times as much, and a step has three."""

    __slots__ = ("_plan",)

    def __init__(self, plan: StepPlan) -> None:
        self._plan = plan

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Exception):
            raise StepFailedError(self._plan) from error


class StepPipeline(Generic[S]):
    """One scheduler's steps on one device, one of them in flight.

    Args:
        emit: given outputs as they come, in the order of a request's tokens.
        asynchronous: dispatch a step before the one before it has been read.
        clock: seconds, of the same clock as requests' times.

    Attributes:
        device: may be replaced between two steps.
        in_flight: the step that is dispatched and not read.
        pacer: when to schedule, where policy and stepping call for it.
        waited_s: seconds in which the pipeline waited for the device, since start.
        prepare: called between what ends requests and what schedules.
        on_read: told each step that was read, and how many seconds the device had it.
        stuck: asked where requests wait and none can run: whether that is going to change by itself.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        device: Device[S],
        emit: Callable[[list[EngineOutput]], Any],
        *,
        asynchronous: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.scheduler = scheduler
        self.device = device
        self.pacer = Pacer() if asynchronous and scheduler.config.policy == "priority" else None
        self.in_flight: Flight[S] | None = None
        self.waited_s = 0.0
        self.prepare: Callable[[], None] | None = None
        self.on_read: Callable[[Flight[S], float], None] | None = None
        self.stuck: Callable[[], bool] = lambda: False
        self._asynchronous = asynchronous
        self._emit = emit
        self._clock = clock
        self._last_read = 0.0

    def step(self, schedule: bool = True) -> StepPlan | None:
        """Dispatches a step and reads the one before it.

        Args:
            schedule: False to only end what is late and read what is in flight.
        Returns:
            what was dispatched, if anything.
        Raises:
            StepFailedError: the device could not carry a step out.
            RuntimeError: requests wait, but none can ever run: the scheduler's fault.
        """
        scheduler = self.scheduler
        self._give(scheduler.expire(self._clock()))
        if self.prepare is not None:
            self.prepare()
        previous, waited = self.in_flight, False
        if schedule and previous is not None and scheduler.awaits(previous.plan):
            self._read(previous)
            previous = self.in_flight = None
            waited = True
        plan = scheduler.schedule(self._clock()) if schedule else None
        current = None
        if plan is not None:
            with _CarryingOut(plan):
                step = self.device.dispatch_forward(plan, scheduler.slots)
            now = self._clock()
            current = Flight(plan, step, now, now - self._last_read if waited else None)
            mask = None
            if step.constrained:
                if previous is not None:
                    self._read(previous)  # a mask needs the token before it; the forward pass is running meanwhile
                    previous = self.in_flight = None
                mask = self._mask(step, plan)
            with _CarryingOut(plan):
                self.device.dispatch_sample(step, mask)
            if not self._asynchronous:
                previous, current = current, None
        if previous is not None:
            self._read(previous)
        elif plan is None and schedule and scheduler.has_work and not self.stuck():
            raise RuntimeError(f"{len(scheduler.requests)} requests are left, but nothing can run")
        self.in_flight = current
        return plan

    def forget(self) -> None:
        """Drops the step in flight, whose results will never come."""
        self.in_flight = None

    def pause_s(self) -> float:
        """Seconds until the next step is to be scheduled, so that urgent requests that arrive meanwhile are in it; see
        pacing.py."""
        flight = self.in_flight
        if self.pacer is None or flight is None:
            return 0.0
        began = max(flight.dispatched_at, self._last_read)
        return max(0.0, began + self.pacer.wait((flight.step.bucket, flight.plan.num_steps)) - self._clock())

    def _read(self, flight: Flight[S]) -> None:
        """Waits for a step, and hands out what it sampled."""
        began = self._clock()
        with _CarryingOut(flight.plan):
            result = self.device.collect(flight.step)
        now = self._clock()
        self.waited_s += now - began
        # The device took this step up when it was dispatched, or when it was done with the one before.
        seconds = now - max(flight.dispatched_at, self._last_read)
        self._last_read = now
        self.scheduler.observe(flight.plan, seconds, flight.step.bucket, flight.host_s)
        if self.pacer is not None:
            self.pacer.observe((flight.step.bucket, flight.plan.num_steps), seconds)
        if self.on_read is not None:
            self.on_read(flight, seconds)
        self._give(self.scheduler.retire(flight.plan, result, now))

    def _mask(self, step: S, plan: StepPlan) -> np.ndarray:
        """The step's mask, from the tokens known now and the drafts behind them. A grammar that cannot go on ends its request."""
        mask = self.device.new_mask(step)
        live = [(row, request) for row, request in step.constrained if not request.finished]
        request_of = dict(live)
        limited = {request.request_id for _, request in live}
        rows = plan.drafts
        if any(ON_DEVICE in rows[i] for i, r in enumerate(plan.decode[: len(rows)]) if r.request_id in limited):
            told = self.device.guesses(step).tolist()
            rows = [told[i][: len(row)] for i, row in enumerate(rows)]
        drafts = {r.request_id: row for r, row in zip(plan.decode, rows, strict=False) if row}
        for row, error in fill_rows(live, mask, drafts).items():
            request = request_of[row]
            mask[row : row + 1 + len(drafts.get(request.request_id, ()))] = -1
            reason, sentence = grammar_failure(request, error)
            output = self.scheduler.abort(request.request_id, reason)
            if output is not None:
                self._give([dataclasses.replace(output, error=sentence)])
        return mask

    def _give(self, outputs: list[EngineOutput]) -> None:
        if outputs:
            self._emit(outputs)
