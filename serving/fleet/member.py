"""One model of a fleet: its engine as it is loaded, put to sleep, woken and forgotten. What blocks runs in threads, one change
of one member at a time; the keeper says which."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from serving import memory
from serving.boot.flags import ModelEntry
from serving.boot.startup import Described, describe
from serving.engine.api.client import EngineClient, Where
from serving.engine.api.types import EngineInfo, EngineStats
from serving.errors import RequestError
from serving.fleet.room import Resident
from serving.fleet.turns import Turns, TurnTaking

if TYPE_CHECKING:
    from serving.boot.start import AnyEngine

log = logging.getLogger(__name__)


class Member:
    """One model.

    Args:
        entry: what the operator says of it.
        described: what its headers say.
        info: what clients are told before it is loaded.
        need: bytes that it takes while loaded, as far as headers say; known exactly once it has been loaded.
        turns: the devices' time, shared with the others.

    Attributes:
        where: belongs to the event loop, as all that is not said to block.
        engine: there while it is loaded or asleep.
        in_use: requests that run with it or wait to.
        idle_s: seconds without requests after which it sleeps; None: only for another's sake.
        switches: how often it was loaded or woken.
    """

    def __init__(self, entry: ModelEntry, described: Described, info: EngineInfo, need: int, turns: Turns) -> None:
        self.entry = entry
        self.info = info
        self.need = need
        self.where = Where.UNLOADED
        self.engine: AnyEngine | None = None
        self.error: str | None = None
        self.pinned = entry.pinned
        self.idle_s = entry.keep_alive
        self.in_use = 0
        self.used = self.since = time.monotonic()
        self.switches = 0
        self.text = described.text
        self.on_loaded: Callable[[AnyEngine], None] = lambda engine: None
        self._described: Described | None = described
        self._turns = turns
        self._turn = turns.join()
        self._resting = 0  # bytes, asleep
        self._stats = EngineStats()
        self._said = ""

    @property
    def name(self) -> str:
        return self.entry.name

    @property
    def ready(self) -> bool:
        """Whether its engine takes requests."""
        return self.where is Where.LOADED and self.engine is not None and self.engine.failure is None

    @property
    def client(self) -> EngineClient:
        """Of its engine, which is there."""
        assert self.engine is not None
        return self.engine.client

    @property
    def stats(self) -> EngineStats:
        """Its engine's, or those that the last one ended with."""
        return self._stats if self.engine is None else self.engine.client.stats()

    @property
    def bytes(self) -> int:
        """What it takes of the memory for models."""
        if self.where in (Where.UNLOADED, Where.FAILED):
            return 0
        return self._resting if self.where is Where.SLEEPING else self.need

    @property
    def missing(self) -> int:
        """What it would take besides, were it loaded."""
        return self.need - self.bytes

    @property
    def said(self) -> str:
        """The last that loading it has told."""
        return self._said

    def resident(self) -> Resident:
        """As who gives way is decided by."""
        gives = self.need - self._rests() if self.where is Where.LOADED else 0
        return Resident(self.name, self.bytes, gives, self.in_use > 0, self.pinned, self.used, self.since)

    @contextlib.contextmanager
    def using(self) -> Iterator[None]:
        """Counts a request."""
        self.in_use += 1
        try:
            yield
        finally:
            self.in_use -= 1
            self.used = time.monotonic()

    # -- what blocks ---------------------------------------------------------------------------------------------------

    def load(self, say: Callable[[str], None]) -> None:
        """Makes an engine, which takes seconds or minutes.

        Raises:
            ValueError, OSError: it cannot be loaded, in a sentence.
        """

        def told(line: str) -> None:
            self._said = " ".join(line.split())  # it goes into headers and comments
            say(f"{self.name}: {line}")

        self.drop()
        described, self._described = self._described, None
        engine = (described or describe(self.entry.config)).begin(told)
        engine.wrap_runner(lambda runner: TurnTaking(runner, self._turn))
        memory.give_back()
        self.need = holder(engine).device_bytes
        self.info = engine.client.info()
        self.engine = engine
        self.on_loaded(engine)

    def wake(self) -> None:
        """Takes the memory again.

        Raises:
            RequestError: the weights cannot be read again, in a sentence.
        """
        assert self.engine is not None
        self.engine.lifecycle.wake()

    def sleep(self) -> None:
        """Gives the memory back; what runs waits."""
        assert self.engine is not None
        self._resting = self._rests()
        self.engine.lifecycle.sleep(self.entry.level(self.info.platform))
        memory.give_back()

    def drop(self) -> None:
        """Ends the engine, where there is one, and gives all back."""
        engine, self.engine = self.engine, None
        if engine is None:
            return
        self._stats = engine.client.stats()
        if engine.failure is None:
            with contextlib.suppress(RequestError):  # asleep already: then there is nothing to give
                engine.lifecycle.sleep(2)
        engine.shutdown()
        self._turns.leave(self._turn)
        self._turn = self._turns.join()
        del engine
        memory.let_go()

    def _rests(self) -> int:
        """Bytes that it takes of the memory for models when it sleeps: weights that are kept, where that memory is the host's."""
        if self.engine is None or self.info.platform != "cpu" or self.entry.level("cpu") == 2:
            return 0
        return holder(self.engine).weight_bytes


def holder(engine: AnyEngine) -> Any:
    """What holds an engine's arrays: `device_bytes` and `weight_bytes` are its."""
    runner = engine.runner
    return getattr(runner, "executor", runner)
