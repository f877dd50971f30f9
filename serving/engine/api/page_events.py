"""What an engine tells of its prefix cache: which pages it has indexed, and which no more. For routers and external indexes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol


@dataclasses.dataclass(frozen=True, slots=True)
class PagesStored:
    """Pages that follow one another in a sequence are indexed now.

    Attributes:
        hashes: of each; what decides its content: the pages before it, its tokens, adapter and salt.
        parent: hash of the page before the first; None where the sequence begins.
        tokens: ids of all of them, int32 little-endian bytes, `page_size` each.
        adapter: digest of the adapter that computed them, or None.
        salt: of the requests that may share them, or None.
        group: which layers' pages: layers that attend alike are one group.
        window: how far those layers look back, in tokens; None for everything.
        replica: whose pages.
    """

    hashes: tuple[bytes, ...]
    parent: bytes | None
    tokens: bytes
    page_size: int
    adapter: str | None = None
    salt: str | None = None
    group: int = 0
    window: int | None = None
    replica: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class PagesRemoved:
    """Pages are indexed no more: the device gave them to others."""

    hashes: tuple[bytes, ...]
    group: int = 0
    replica: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class PagesCleared:
    """Nothing of a replica's is indexed any more."""

    replica: int = 0


PageEvent = PagesStored | PagesRemoved | PagesCleared


@dataclasses.dataclass(frozen=True, slots=True)
class PageBatch:
    """Events in order.

    Attributes:
        sequence: counts batches from 0; without gaps.
        time: seconds since the epoch when it was put together.
        snapshot: the events say all that is there at `sequence`, instead of what has changed.
    """

    sequence: int
    time: float
    events: tuple[PageEvent, ...]
    snapshot: bool = False


Listener = Callable[[PageBatch], None]
"""Called on the log's own thread, with one batch after the other. It must be quick and not raise."""


class PageEvents(Protocol):
    """Where an engine's page events are to be had.

    Attributes:
        log_id: of this run's log; sequences of others mean nothing.
    """

    log_id: str

    def follow(self, listener: Listener, after: int | None = None) -> None:
        """Tells a listener everything from now on, and at once what came before.

        Args:
            after: the sequence of the last batch that it has; where the ones since are kept, it gets those. Else, and with None, it
                gets a snapshot.
        """
        ...

    def leave(self, listener: Listener) -> None:
        """Tells it nothing more."""
        ...

    def since(self, sequence: int) -> list[PageBatch]:
        """The batches from `sequence` on that are still kept."""
        ...
