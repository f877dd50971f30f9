"""A device of which only the time passes: its steps take what a cost model says, on a virtual clock that it keeps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from serving.engine.requests.buckets import Bucket
from serving.engine.requests.plan import StepPlan, StepResult
from serving.engine.requests.slots import SlotTable
from serving.simulator.cost import CostModel, StepShape


@dataclasses.dataclass(frozen=True, slots=True)
class VirtualStep:
    """A step on its way, or several decode steps that were dispatched as one.

    Attributes:
        seconds: that it takes, all of them together.
        end: of the virtual clock, in seconds; infinite where others use the same cores: it is known when it comes.
        first, last: seconds of the first and of the last of them.
    """

    plan: StepPlan
    bucket: Bucket
    seconds: float
    end: float
    first: float
    last: float
    constrained: tuple[()] = ()


class VirtualDevice:
    """A `scheduling.pipeline.Device`.

    Args:
        cost: how long each step takes.
        answer: the tokens of a step's rows, int32 [rows, 1], when it is read; [rows, N] of one with drafts.
        on_dispatch: told each step as it begins.

    Attributes:
        now: the clock, in seconds. Dispatching moves it on by the host's work, reading to the end of the step.
        free: when what it was given is done.
        reading: the step that was collected last.
        stretch: how many times longer the host's work takes now, where others use the same cores; None where nobody does. Whoever
            shares the cores out says in `free` when a step has ended, before it is collected.
    """

    def __init__(
        self,
        cost: CostModel,
        answer: Callable[[StepPlan], np.ndarray],
        on_dispatch: Callable[[VirtualStep], None] | None = None,
        replicas: int = 1,
    ) -> None:
        self.now = 0.0
        self.stretch: Callable[[], float] | None = None
        self._cost = cost
        self._answer = answer
        self._on_dispatch = on_dispatch
        self._replicas = replicas
        self.free = 0.0
        self.reading: VirtualStep | None = None
        self._finite = np.ones((cost.max_num_seqs, 1), bool)

    def dispatch_forward(self, plan: StepPlan, slots: SlotTable) -> VirtualStep:
        alone = self.stretch is None
        self.now += self._cost.host_s * (1.0 if self.stretch is None else self.stretch())
        shape = StepShape.of(plan, self._replicas)
        bucket, first = self._cost.price(shape)
        seconds = last = first
        if plan.num_steps > 1:
            growth = self._cost.growth(shape)
            last = first + growth * (plan.num_steps - 1)
            seconds = plan.num_steps * (first + last) / 2
        if alone:
            self.free = max(self.now, self.free) + seconds
        step = VirtualStep(plan, bucket, seconds, self.free if alone else math.inf, first, last)
        if self._on_dispatch is not None:
            self._on_dispatch(step)
        return step

    def new_mask(self, step: VirtualStep) -> np.ndarray:
        raise NotImplementedError("nothing is constrained here")

    def guesses(self, step: VirtualStep) -> np.ndarray:
        raise NotImplementedError("nothing is constrained here")

    def dispatch_sample(self, step: VirtualStep, mask_SW: np.ndarray | None) -> None:
        pass

    def collect(self, step: VirtualStep) -> StepResult:
        self.now = max(self.now, step.end if step.end < math.inf else self.free)
        self.reading = step
        tokens = self._answer(step.plan)
        if tokens.shape[1] > 1:
            return StepResult(tokens, np.ones(tokens.shape, bool))
        if len(tokens) > len(self._finite):
            self._finite = np.ones((len(tokens), 1), bool)
        return StepResult(tokens, self._finite[: len(tokens)])
