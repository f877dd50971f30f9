"""Pausing, sleeping and new weights, while the process and its connections stay. The same for every kind of engine.

Every method blocks (for a step, or for as long as loading weights takes) and may be called from any thread but the engine's.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any, Protocol

from serving.errors import ErrorKind, RequestError

log = logging.getLogger(__name__)

LoadModel = Callable[[str | None], Any]
"""A checkpoint's name (None: the one that the engine was started with) to a `models.loading.load.LoadedModel`, loaded as the
engine's own was."""


class Restable(Protocol):
    """What a lifecycle asks of an engine. Calls come one at a time, and never on the engine's thread."""

    @property
    def alone(self) -> bool:
        """Whether the engine is one process: several cannot sleep or change their weights."""
        ...

    def hold(self) -> None:
        """Starts no further steps; returns when none is in flight."""
        ...

    def go_on(self) -> None:
        """Starts steps again."""
        ...

    def give_back(self, keep_weights: bool) -> int:
        """Gives the devices' memory back; what runs will be computed anew. While held. Returns bytes freed."""
        ...

    def take_back(self, new: Any) -> None:
        """Takes the memory again. `new` is from `read`, or None where the weights were kept."""
        ...

    def read(self, load: Callable[[], Any]) -> Any:
        """What `replace` and `take_back` take of the model that `load` gives: its weights, and what its checkpoint says of how its
        results are read (labels, steps behind the pooling).

        Raises:
            ValueError: it is of another shape.
        """
        ...

    def replace(self, new: Any) -> None:
        """Uses other weights, from `read`, from the next step on, and forgets whatever the old ones computed."""
        ...

    def forget(self) -> None:
        """Forgets what was computed for requests to come (cached prefixes)."""
        ...


class Lifecycle:
    """What an engine is doing besides serving.

    Attributes:
        refusal: why new requests are refused, or None.
    """

    def __init__(self, engine: Restable, load_model: LoadModel | None = None) -> None:
        self._engine = engine
        self._load_model = load_model
        self._lock = threading.Lock()  # one change at a time
        self._level = 0  # of sleep
        self._paused = False
        self._source: str | None = None  # what is served since `update_weights`
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
            self._engine.hold()
            self._paused = True

    def resume(self) -> None:
        """Goes on after `pause`."""
        with self._lock:
            if self._level:
                raise _failed("The server is asleep: wake it up first.")
            self._paused = False
            self._engine.go_on()

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
            self._engine.hold()
            self.refusal = "The server is asleep; wake it up, or ask another replica."
            freed = self._engine.give_back(keep_weights=level == 1)
            self._level = level
            log.info("asleep: %.1f MiB of device memory given back", freed / 2**20)
            return freed

    def wake(self) -> None:
        """Takes the memory again and goes on (unless paused before)."""
        with self._lock:
            if not self._level:
                raise _failed("The server is not asleep.")
            self._engine.take_back(self._read(self._source) if self._level == 2 else None)
            self._level, self.refusal = 0, None
            if not self._paused:
                self._engine.go_on()

    def reset_prefix_cache(self) -> None:
        """Forgets every cached prefix."""
        self._engine.forget()

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
            self._engine.replace(self._read(source))
            self._source = source
            log.info("serving the weights of %s", source)

    def _read(self, source: str | None) -> Any:
        load_model = self._load_model
        if load_model is None:
            raise _failed("This engine cannot read other weights.")
        try:
            return self._engine.read(lambda: load_model(source))
        except (ValueError, OSError) as error:
            raise _failed(f"The weights cannot be used: {error}") from error

    def _check_alone(self) -> None:
        if not self._engine.alone:
            raise _failed("An engine of several processes can neither sleep nor change its weights: restart it.")


def _failed(message: str) -> RequestError:
    return RequestError(ErrorKind.FAILED_PRECONDITION, message)
