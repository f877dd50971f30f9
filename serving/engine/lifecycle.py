"""What pausing, sleeping and new weights are to an engine that generates."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from models.embedding_head import EmbeddingHead
from serving.engine.device.executor import Executor
from serving.engine.device.programs.compiling import starting
from serving.engine.loop import EngineLoop
from serving.engine.scheduling.scheduler import Scheduler


class Resting:
    """A loop with its scheduler and its executor, as `serving.engine.api.lifecycle.Restable`: all is done on the engine's thread,
    between two steps.

    Args:
        use_head: told how the weights that serve from now on make embeddings.
    """

    def __init__(
        self, loop: EngineLoop, scheduler: Scheduler, executor: Executor, use_head: Callable[[EmbeddingHead], None]
    ) -> None:
        self._use_head = use_head
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

    def take_back(self, new: tuple[Any, EmbeddingHead] | None) -> None:
        self._loop.call(lambda: self._executor.wake(None if new is None else new[0]), timeout=600.0)

    def read(self, load: Callable[[], Any]) -> tuple[Any, EmbeddingHead]:
        with starting():  # reading may compile conversions, which is no defect
            loaded = load()
            return self._executor.leaves_of(loaded.model), loaded.embedding

    def replace(self, new: tuple[Any, EmbeddingHead]) -> None:
        def swap() -> None:
            self._executor.replace_weights(new[0])
            self._use_head(new[1])
            self._scheduler.kv.forget()
            if self._loop.peers is not None:
                self._loop.peers.weights_changed()

        self._loop.call(swap)

    def forget(self) -> None:
        self._loop.call(self._scheduler.kv.forget)

    def _pause(self, paused: bool) -> None:
        self._loop.paused = paused
