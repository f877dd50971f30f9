"""What pausing, sleeping and new weights are to an engine that generates."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from serving.engine.device.executor import Executor
from serving.engine.device.programs.compiling import starting
from serving.engine.loop import EngineLoop
from serving.engine.scheduling.scheduler import Scheduler


class Resting:
    """A loop with its scheduler and its executor, as `serving.engine.api.lifecycle.Restable`: all is done on the engine's thread,
    between two steps."""

    def __init__(self, loop: EngineLoop, scheduler: Scheduler, executor: Executor) -> None:
        self._loop = loop
        self._scheduler = scheduler
        self._executor = executor

    @property
    def alone(self) -> bool:
        return self._executor.alone

    def hold(self) -> None:
        self._loop.call(lambda: self._pause(True))
        while self._loop.call(lambda: self._loop.in_flight):
            time.sleep(0.002)

    def go_on(self) -> None:
        self._loop.call(lambda: self._pause(False))

    def give_back(self, keep_weights: bool) -> int:
        def give_back() -> int:
            self._scheduler.requeue()
            return self._executor.sleep(keep_weights=keep_weights)

        return self._loop.call(give_back)

    def take_back(self, leaves: Any) -> None:
        self._loop.call(lambda: self._executor.wake(leaves), timeout=600.0)

    def read(self, load: Callable[[], Any]) -> Any:
        with starting():  # reading may compile conversions, which is no defect
            return self._executor.leaves_of(load())

    def replace(self, leaves: Any) -> None:
        def swap() -> None:
            self._executor.replace_weights(leaves)
            self._scheduler.kv.forget()

        self._loop.call(swap)

    def forget(self) -> None:
        self._loop.call(self._scheduler.kv.forget)

    def _pause(self, paused: bool) -> None:
        self._loop.paused = paused
