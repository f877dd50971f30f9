"""How many decode steps a dispatch holds.

With a number given (`num_scheduler_steps`), as many while nothing waits. By default one; several where nobody looks at any
running request before it has ended (`EngineRequest.whole`), because between steps the host then has nothing to say: on a CPU it
works on the cores that compute. What comes meanwhile (a newcomer, an abort, a deadline) waits for the end of the dispatch that
runs and of the one behind it, so a long one takes MOST_S at most, and the one behind it is a single step. That one also keeps the
device busy while the long one's tokens are read, and those whose completions have ended leave.
"""

from __future__ import annotations

from collections.abc import Sequence

from serving.engine.cache.replicas import Replicas
from serving.engine.requests.plan import StepPlan
from serving.engine.requests.request import Request
from serving.engine.requests.scheduler_config import SchedulerConfig
from serving.engine.scheduling.masks import needs_host

MOST_STEPS = 8
"""Of a dispatch, by default: what more would save is lost on completions that end within it."""

MOST_S = 0.1
"""Seconds that a dispatch of several steps takes at most, by default."""


class Lengths:
    """Chooses how many steps the next dispatch has.

    Attributes:
        given: steps of a dispatch while nothing waits; None: the default.
        step_s: seconds that a decode step took of late; 0.0 until one was seen.
    """

    def __init__(self, config: SchedulerConfig, kv: Replicas) -> None:
        self.given = config.num_scheduler_steps
        self._max_len = config.max_model_len
        # Under priorities an urgent request is promised the next step but one; drafts need every step's tokens.
        self._adapts = self.given is None and config.policy != "priority" and config.speculative_config is None
        self._kv = kv
        self._was_long = False
        self.step_s = 0.0

    def choose(self, decode: Sequence[Request], waits: bool, step_id: int) -> int:
        """Steps for these rows, and pages for all of them: more than 1 only while nothing waits for the next one, and while
        every row has the tokens and the pages for them.

        Args:
            decode: the rows of the next dispatch, which has nothing else.
            waits: whether a request waits for its turn.
            step_id: of the last dispatch.
        """
        most = self.given or self._most(decode)
        if most > 1 and not waits and not any(needs_host(r) or r.adapter_slot for r in decode):
            steps = min(most, *(r.tokens_left(self._max_len) for r in decode))
            ends = [r.num_computed + steps for r in decode]
            if steps > 1 and self._kv.cover_all(decode, ends, step_id):
                self._was_long = True
                return steps
        self._was_long = False
        return 1

    def observe(self, plan: StepPlan, seconds: float) -> None:
        """Learns what a step takes from a dispatch that the device had for so long."""
        if not plan.chunks:
            self.step_s = seconds / plan.num_steps

    def _most(self, decode: Sequence[Request]) -> int:
        if not self._adapts or self._was_long or not self.step_s or not all(r.spec.whole for r in decode):
            return 1
        return min(MOST_STEPS, int(MOST_S / self.step_s))
