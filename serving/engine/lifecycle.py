"""Pausing, sleeping and new weights, while the process and its connections stay.

Every method blocks (for a step, or for as long as loading weights takes) and may be called from any thread but the engine's.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from serving.errors import ErrorKind, RequestError

if TYPE_CHECKING:
    from serving.engine.device.executor import Executor
    from serving.engine.loop import EngineLoop
    from serving.engine.scheduling.scheduler import Scheduler

log = logging.getLogger(__name__)

LoadModel = Callable[[str | None], Any]
"""A checkpoint's name (None: the served one) to a model on the devices, as the engine's own was loaded."""


class Lifecycle:
    """What an engine is doing besides serving.

    Attributes:
        refusal: why new requests are refused, or None.
    """

    def __init__(
        self, loop: EngineLoop, scheduler: Scheduler, executor: Executor, load_model: LoadModel | None = None
    ) -> None:
        self._loop = loop
        self._scheduler = scheduler
        self._executor = executor
        self._load_model = load_model
        self._lock = threading.Lock()  # one change at a time
        self._level = 0  # of sleep
        self._paused = False
        self.refusal: str | None = None

    @property
    def paused(self) -> bool:
        return self._paused or self._level > 0

    @property
    def asleep(self) -> bool:
        return self._level > 0

    def pause(self) -> None:
        """Starts no further steps. What runs keeps its pages and its stream, new requests wait."""
        with self._lock:
            self._settle()
            self._paused = True

    def resume(self) -> None:
        """Goes on after `pause`."""
        with self._lock:
            if self._level:
                raise _failed("The server is asleep: wake it up first.")
            self._paused = False
            self._loop.call(self._go_on)

    def sleep(self, level: int = 1) -> int:
        """Gives the devices' memory back. What runs stays, waits, and is computed anew afterwards; new requests are refused.

        Args:
            level: 1 keeps the weights in host memory; 2 reads them again on waking.
        Returns:
            bytes freed.
        Raises:
            RequestError: INVALID_ARGUMENT (level), FAILED_PRECONDITION (asleep already, or an engine that cannot).
        """
        if level not in (1, 2):
            raise RequestError(ErrorKind.INVALID_ARGUMENT, f"level must be 1 or 2, got {level!r}.", param="level")
        with self._lock:
            if self._level:
                raise _failed("The server is asleep already.")
            self._check_alone()
            if level == 2 and self._load_model is None:
                raise _failed("This engine cannot read its weights again: sleep at level 1.")
            self._settle()
            self.refusal = "The server is asleep; wake it up, or ask another replica."

            def give_back() -> int:
                self._scheduler.requeue()
                return self._executor.sleep(keep_weights=level == 1)

            freed = self._loop.call(give_back)
            self._level = level
            log.info("asleep: %.1f MiB of device memory given back", freed / 2**20)
            return freed

    def wake(self) -> None:
        """Takes the memory again and goes on (unless paused before)."""
        with self._lock:
            if not self._level:
                raise _failed("The server is not asleep.")
            leaves = self._read(None) if self._level == 2 else None
            self._loop.call(lambda: self._executor.wake(leaves), timeout=600.0)
            self._level, self.refusal = 0, None
            if not self._paused:
                self._loop.call(self._go_on)

    def reset_prefix_cache(self) -> None:
        """Forgets every cached prefix."""
        self._loop.call(self._scheduler.kv.forget)

    def update_weights(self, source: str) -> None:
        """Swaps to another checkpoint of the same shape, between two steps. Running streams go on: what they have computed
        stays, what comes is the new model's. No prefix that the old one computed is found again.

        Both checkpoints are in memory for a moment.

        Args:
            source: as `EngineConfig.model`.
        Raises:
            RequestError: a checkpoint that cannot be read or has another shape; the old one goes on serving.
        """
        with self._lock:
            if self._level:
                raise _failed("The server is asleep: wake it up first.")
            self._check_alone()
            leaves = self._read(source)

            def swap() -> None:
                self._executor.replace_weights(leaves)
                self._scheduler.kv.forget()

            self._loop.call(swap)
            log.info("serving the weights of %s", source)

    # -- inside ------------------------------------------------------------------------------------------------------

    def _read(self, source: str | None) -> tuple[Any, ...]:
        from serving.engine.device.compiling import starting

        if self._load_model is None:
            raise _failed("This engine cannot read other weights.")
        try:
            with starting():  # reading may compile conversions, which is no defect
                return self._executor.leaves_of(self._load_model(source))
        except (ValueError, OSError) as error:
            raise _failed(f"The weights cannot be used: {error}") from error

    def _check_alone(self) -> None:
        if not self._executor.alone:
            raise _failed("An engine of several processes can neither sleep nor change its weights: restart it.")

    def _settle(self) -> None:
        """No further steps, and none in flight."""
        self._loop.call(self._hold)
        while self._loop.call(lambda: self._loop.in_flight):
            time.sleep(0.002)

    def _hold(self) -> None:
        self._loop.paused = True

    def _go_on(self) -> None:
        self._loop.paused = False


def _failed(message: str) -> RequestError:
    return RequestError(ErrorKind.FAILED_PRECONDITION, message)
