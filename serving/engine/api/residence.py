"""Where the model of an engine is, on a server that has several and not the memory for all of them."""

from __future__ import annotations

import enum
from typing import Protocol


class Where(enum.Enum):
    """The states of a model; the values are what clients read."""

    UNLOADED = "unloaded"
    LOADING = "loading"
    LOADED = "loaded"
    SLEEPING = "sleeping"
    WAKING = "waking"
    FAILED = "failed"


class Residence(Protocol):
    """One model's place among those of its server. Belongs to the server's event loop."""

    @property
    def where(self) -> Where:
        """FAILED: it could not be loaded, or its engine died; the next request tries again."""
        ...

    @property
    def progress(self) -> str | None:
        """What a request for it waits for now, in a few words; None where it waits for nothing."""
        ...

    @property
    def error(self) -> str | None:
        """Why it failed, in a sentence."""
        ...

    @property
    def pinned(self) -> bool:
        """It never gives way to another one."""
        ...

    @property
    def aliases(self) -> tuple[str, ...]:
        """Further names that it answers to."""
        ...

    @property
    def device_bytes(self) -> int:
        """What it takes of the memory for models now."""
        ...

    @property
    def idle_until_s(self) -> float | None:
        """Seconds after which it goes to sleep unless somebody asks for it; None where it stays for as long as there is room."""
        ...

    async def load(self) -> None:
        """Returns once it takes requests.

        Raises:
            RequestError: RESOURCE_EXHAUSTED (it does not fit), UNAVAILABLE (the wait is over, or it could not be loaded).
        """
        ...

    async def sleep(self) -> None:
        """Gives its memory back, and can be woken soon. What runs waits, and is computed anew. Nothing where it has none."""
        ...

    async def unload(self) -> None:
        """Gives all back: engine, programs, weights.

        Raises:
            RequestError: FAILED_PRECONDITION: requests run with it.
        """
        ...

    def pin(self, pinned: bool) -> None:
        """Whether it may give way from now on."""
        ...

    def keep(self, seconds: float | None) -> None:
        """Has it sleep after so many seconds without requests from now on; None: not for idling."""
        ...
