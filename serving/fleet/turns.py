"""Taking turns on the devices: the engines of one server step in threads of their own, and none takes more of the devices'
time than another that wants it too.

Each engine has an account of the seconds that its steps took. Before a step it waits while another one that steps as well is behind
it by more than `AHEAD_S`. So of a large model and a small one each has half of the time, and an engine alone never waits.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

AHEAD_S = 0.02
"""How far an engine may be ahead: less, and every step of two engines would wait for the other's thread."""
PAUSE_S = 0.03
"""An engine that has had no step on its way for so long does not step, and nobody waits for it. Between two steps of one that does
there are a few milliseconds of its thread's work."""
LONGEST_STEP_S = 10.0
"""A step that takes longer is not waited for: it may have failed."""
LONGEST_WAIT_S = 1.0
"""A step goes ahead after so long in any case: its requests are waiting, whatever the accounts say."""


class Turns:
    """The accounts of all engines. Their threads call."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._changed = threading.Condition()
        self._turns: set[Turn] = set()
        self._last_read = 0.0

    def join(self) -> Turn:
        """An account for one more engine."""
        turn = Turn(self)
        with self._changed:
            self._turns.add(turn)
        return turn

    def leave(self, turn: Turn) -> None:
        """Forgets an account."""
        with self._changed:
            self._turns.discard(turn)
            self._changed.notify_all()

    def take(self, turn: Turn) -> None:
        """Called before a step is dispatched: returns when it is the engine's turn."""
        with self._changed:
            now = self._clock()
            if not turn.steps(now):  # it comes back: what it left unused is not saved up
                turn.used = max(turn.used, min((other.used for other in self._others(turn, now)), default=0.0))
            turn.waiting = True
            end = now + LONGEST_WAIT_S
            while now < end and self._is_ahead(turn, now):
                self._changed.wait(min(PAUSE_S, end - now))
                now = self._clock()
            turn.waiting = False
            turn.in_flight = min(turn.in_flight, 1) + 1  # one at most is unread by now; a step that failed never is
            turn.last = now

    def done(self, turn: Turn, dispatched: float) -> None:
        """Called when a step has been read that was dispatched at `dispatched`: the devices had it from then on, or from when they
        were done with the one before."""
        with self._changed:
            now = self._clock()
            turn.used += max(0.0, now - max(dispatched, self._last_read))
            turn.in_flight = max(0, turn.in_flight - 1)
            turn.last = self._last_read = now
            self._changed.notify_all()

    def now(self) -> float:
        """Seconds, of the clock that accounts go by."""
        return self._clock()

    def is_ahead(self, turn: Turn) -> bool:
        """Whether an engine would wait now."""
        with self._changed:
            return self._is_ahead(turn, self._clock())

    def _others(self, turn: Turn, now: float) -> list[Turn]:
        return [other for other in self._turns if other is not turn and other.steps(now)]

    def _is_ahead(self, turn: Turn, now: float) -> bool:
        return any(turn.used > other.used + AHEAD_S for other in self._others(turn, now))


class Turn:
    """One engine's account.

    Attributes:
        used: seconds of the devices.
        in_flight: steps that are dispatched and not read.
        waiting: it waits for its turn.
        last: when it last dispatched or read a step.
    """

    def __init__(self, turns: Turns) -> None:
        self.turns = turns
        self.used = 0.0
        self.in_flight = 0
        self.waiting = False
        self.last = float("-inf")

    def steps(self, now: float) -> bool:
        """Whether it wants the devices' time."""
        return self.waiting or now - self.last < (LONGEST_STEP_S if self.in_flight else PAUSE_S)


class TurnTaking:
    """A runner of steps, or of an encoder's batches, that takes turns. Everything else is the runner's."""

    def __init__(self, runner: Any, turn: Turn) -> None:
        self._runner = runner
        self._turn = turn
        self._dispatched: dict[int, float] = {}  # id of a step in flight -> when it was dispatched

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def dispatch_forward(self, plan: Any, slots: Any) -> Any:
        turns = self._turn.turns
        turns.take(self._turn)
        began = turns.now()
        try:
            step = self._runner.dispatch_forward(plan, slots)
        except BaseException:
            turns.done(self._turn, began)
            raise
        self._dispatched[id(step)] = began
        return step

    def collect(self, step: Any) -> Any:
        try:
            return self._runner.collect(step)
        finally:
            began = self._dispatched.pop(id(step), None)
            if began is not None:
                self._turn.turns.done(self._turn, began)

    def run(self, texts: Sequence[Any]) -> Any:
        """An encoder's batch."""
        turns = self._turn.turns
        turns.take(self._turn)
        began = turns.now()
        try:
            return self._runner.run(texts)
        finally:
            turns.done(self._turn, began)
