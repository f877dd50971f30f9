"""What a step copies besides computing: pages to host memory and back, states of recurrent layers to snapshots and back.

Decided by the scheduler, carried out by the device in this order: pages out, pages in, pages dropped, states cleared, states
loaded, images encoded, the step's forward pass, states saved.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from serving.engine.api.media import MediaItem


class PageMove(NamedTuple):
    """One page of a replica's pool, and the key under which its content is kept elsewhere."""

    replica: int
    page: int
    key: bytes


class StateMove(NamedTuple):
    """The state of one of a replica's slots, and the row of a snapshot; -1 where there is none."""

    replica: int
    slot: int
    row: int = -1


class Encoding(NamedTuple):
    """An image to encode: into which rows of a replica's store its embeddings go."""

    replica: int
    item: MediaItem
    rows: np.ndarray


@dataclasses.dataclass(frozen=True, slots=True)
class Landing:
    """Where a prefix that another engine computed is to be put.

    Attributes:
        replica: whose pages these are.
        tokens: positions that are expected, whole pages.
        pages: of each paged group, one page for each page of the sequence; 0 where none is needed.
        first: positions that are there already: their pages are others', and not to be written.
        row: of the snapshot for the recurrent state behind them; None where there is no recurrent group, or no room.
    """

    replica: int
    tokens: int
    pages: tuple[tuple[int, ...], ...]
    row: int | None = None
    first: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Moves:
    """Of one step.

    Attributes:
        pages_out: to copy to host memory before anything of the step is written.
        pages_in: to copy back from it, after that and before the forward pass.
        pages_dropped: (replica, key) of pages that host memory may forget.
        states_cleared: slots whose state is to be that before the first token.
        states_loaded: slots whose state is to be a snapshot's. Row by row, before anything is saved.
        states_saved: slots whose state behind this step is to be copied to a snapshot.
        encodings: images whose embeddings this step reads first.
    """

    pages_out: tuple[PageMove, ...] = ()
    pages_in: tuple[PageMove, ...] = ()
    pages_dropped: tuple[tuple[int, bytes], ...] = ()
    states_cleared: tuple[StateMove, ...] = ()
    states_loaded: tuple[StateMove, ...] = ()
    states_saved: tuple[StateMove, ...] = ()
    encodings: tuple[Encoding, ...] = ()

    @classmethod
    def joined(cls, parts: Iterable[Moves]) -> Moves:
        """Those of several replicas, each in its order."""
        found = [part for part in parts if part is not NO_MOVES]
        if len(found) < 2:
            return found[0] if found else NO_MOVES
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(*(tuple(move for part in found for move in getattr(part, name)) for name in names))


NO_MOVES = Moves()
"""The only one that is empty: most steps have it."""
