"""When to schedule the next step while one is running.

As soon as possible keeps the device busy whatever happens. But what is scheduled so early is late for a request that arrives
while the step runs: it waits for that step and for the whole of the next, where one that is put together shortly before the
device needs it would have had it. Under policy `priority` that is worth a wait: 100 ms of 300 on a CPU for an urgent request.
"""

from __future__ import annotations

from collections.abc import Hashable

SHARE = 0.85
"""Of a step's least expected time, how much may pass before the next one is scheduled: steps of one bucket differ."""

RESERVE_S = 0.010
"""For scheduling and dispatching the next step: 2 ms, or several times that when the step's own threads have all the cores."""

MIN_STEP_S = 0.040
"""Shorter steps are not worth waiting in."""

FORGET = 0.05
"""How fast an estimate follows steps that take longer than it. One that takes less is believed at once."""


class Pacer:
    """Learns what steps take, by bucket, and says how long to wait."""

    def __init__(self) -> None:
        self._least: dict[Hashable, float] = {}

    def observe(self, bucket: Hashable, seconds: float) -> None:
        """A step of this bucket took the device that long."""
        least = self._least.get(bucket, seconds)
        self._least[bucket] = min(seconds, least + FORGET * (seconds - least))

    def wait(self, bucket: Hashable) -> float:
        """Seconds from the start of a step of this bucket to when the next one is to be scheduled; 0.0 for at once."""
        least = self._least.get(bucket, 0.0)
        return SHARE * least - RESERVE_S if least >= MIN_STEP_S else 0.0
