"""Pages that travel between engines: what a request says of it, what one engine asks another for, and what comes.

One engine computes a prompt and keeps its pages for another (`remote_decode`), which fetches them and goes on (`remote_prefill`).
Whoever fetches asks by content, not by address: the pages that hold these tokens. So what was lost, evicted or restarted meanwhile
is not found, and computed instead.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Protocol

from serving.engine.api.media import Media


@dataclasses.dataclass(frozen=True, slots=True)
class DeviceWay:
    """What a process must have in common with another for arrays to go from device to device.

    Attributes:
        platform: "gpu", "tpu" or "cpu".
        version: of what moves them, and how many pages it moves at once.
    """

    platform: str
    version: str


@dataclasses.dataclass(frozen=True, slots=True)
class Offer:
    """Where a page is to be pulled from, on a device of the peer.

    Attributes:
        address: host:port of the peer's transfer server.
        number: names the arrays there, one of each kind that a page has, with a row a page; nobody can guess it.
        first, rows: of these arrays, the rows that are the page: one for each group that needs it.
    """

    address: str
    number: int
    first: int
    rows: int


@dataclasses.dataclass(frozen=True, slots=True)
class Wanted:
    """What an engine asks another for.

    Attributes:
        identity: of the asking engine: what both must have in common for a page to mean the same (`serving.transfer.identity`).
        token_ids: of the sequence, from its beginning.
        first, tokens: positions [first, tokens) are wanted, whole pages.
        adapter, salt: as in EngineRequest; part of what a page is.
        ticket: names the request that computes them there, which may not have come yet; "" for none: what there is now.
        timeout_s: how long to wait for them at most.
        media: images in the prompt: their digests and places, without pixels; None where there are none.
        device: how the asking engine can pull pages from a device; None where it cannot, or does not want to.
    """

    identity: bytes
    token_ids: tuple[int, ...]
    first: int
    tokens: int
    adapter: str | None = None
    salt: str | None = None
    ticket: str = ""
    timeout_s: float = 30.0
    media: Media | None = None
    device: DeviceWay | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Parcel:
    """Some of what was asked for.

    Attributes:
        page: which page of the sequence; -1 for a recurrent state behind all that was asked for, -2 for a sign of life.
        content: of all groups that need the page, one behind the other, all arrays of each (`serving.transfer.digests`).
        digest: of what the page is and of its content.
        offer: where the content is to be pulled from; None where it is here.
    """

    page: int
    content: bytes = b""
    digest: bytes = b""
    offer: Offer | None = None


STATE, ALIVE = -1, -2


class TransferError(Exception):
    """A transfer that does not happen, or not all of it.

    Attributes:
        reason: one of `stats.REASONS`.
    """

    def __init__(self, reason: str, message: str = "") -> None:
        super().__init__(message or reason)
        self.reason = reason


class PageSource(Protocol):
    """The giving side of an engine. Any thread may call it."""

    @property
    def identity(self) -> bytes: ...

    def fetch(self, wanted: Wanted) -> Iterator[Parcel]:
        """What there is of it, in the order of its pages, as it is computed; ends where it has no more. Blocks: for a thread of
        its own. Closing the iterator gives the ticket's pages free.

        Raises:
            TransferError: `other_model`.
        """
        ...

    def release(self, ticket: str) -> bool:
        """Nobody will fetch what is kept under this ticket. False where nothing is."""
        ...

    def pulled(self, number: int) -> None:
        """What was offered under this number is with whoever asked for it."""
        ...


class Fetching(Protocol):
    """A transfer on its way: an iterator that another thread can end."""

    def __iter__(self) -> Iterator[Parcel]: ...

    def cancel(self) -> None: ...


class Transport(Protocol):
    """How pages come from a peer. Threads call it."""

    def fetch(self, address: str, wanted: Wanted) -> Fetching:
        """Begins a transfer. What goes wrong is raised by the iterator as TransferError."""
        ...

    def release(self, address: str, ticket: str) -> None:
        """Tells a peer that nobody will fetch what it keeps; without waiting for an answer, and without an error."""
        ...

    def pulled(self, address: str, number: int) -> None:
        """Tells a peer that what it offered has come; as `release`."""
        ...

    def close(self) -> None: ...
