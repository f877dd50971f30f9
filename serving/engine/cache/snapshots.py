"""States of recurrent layers: which slot's state is to be copied where, and under which prefix a copy is found.

A running request has one state, in its slot; it is the state behind the last position that was dispatched. A *snapshot* is a
copy of a state behind a whole number of pages, indexed by the digest of the last of them, like a page. Snapshots lie in rows
of arrays of their own; only copies are made from them, so nobody holds one, and the least recently used is given up when a
row is needed.

The order within a step makes that safe: slots are loaded and cleared before anything of the step is computed, and saved after
it. So a row that is given up in a step may still be loaded in it, and a new owner writes it later.
"""

from __future__ import annotations

from collections import OrderedDict

from serving.engine.requests.cache_specs import RecurrentSpec
from serving.engine.requests.request import Request

MOST_SEEN = 1 << 16
"""Digests of pages that are remembered beyond the pages themselves, to see where prompts part. 6 MB."""


SNAPSHOT_SHARE = 0.25
"""Of the memory that running requests' states leave, the part that snapshots get; pages get the rest. A snapshot is worth the
pages before it and nothing without them: a prefix of 1,024 tokens takes 64 pages and one snapshot."""


def budget(memory: int, state: int, slots: int, share: float = SNAPSHOT_SHARE) -> tuple[int, int]:
    """What states take of one replica's memory.

    Args:
        memory: bytes for states, snapshots and pages.
        state: bytes of one.
        share: of what is left beside running requests' states, for snapshots.
    Returns:
        (bytes of states and snapshots together, how many snapshots); no snapshots where not even the states fit.
    """
    states = (slots + 1) * state
    rows = max(0, int((memory - states) * share) // state)
    return states + rows * state, rows


class Partings:
    """Remembers which pages prompts began with, so that a newcomer shows where it parts from those before it."""

    def __init__(self) -> None:
        self._seen: OrderedDict[bytes, None] = OrderedDict()

    def shared(self, digests: list[bytes]) -> int:
        """How many of these pages, from the first on, an earlier sequence had as well."""
        count = 0
        while count < len(digests) and digests[count] in self._seen:
            count += 1
        return count

    def add(self, digests: list[bytes]) -> None:
        for digest in digests:
            self._seen[digest] = None
            self._seen.move_to_end(digest)
        while len(self._seen) > MOST_SEEN:
            self._seen.popitem(last=False)

    def clear(self) -> None:
        self._seen.clear()


class Snapshots:
    """Rows of snapshots of one replica, and what is to be done with them in the next step.

    Args:
        spec: of the group.
        rows: how many snapshots there may be; may be 0.
        page_size: positions a page.

    Attributes:
        interval, tail, worth: the spec's, in pages; `worth` at least one.
    """

    def __init__(self, spec: RecurrentSpec, rows: int, page_size: int) -> None:
        self.num_rows = rows
        self.interval = max(1, -(-spec.interval // page_size))
        self.tail = max(1, -(-spec.tail // page_size))
        self.worth = max(1, -(-spec.worth // page_size))
        self.num_saved = self.num_loaded = 0
        self._size = page_size
        self._free = list(range(rows - 1, -1, -1))
        self._rows: OrderedDict[bytes, int] = OrderedDict()  # digest -> row, least recently used first
        self._begun: dict[str, tuple[Request, int | None]] = {}  # admitted, and the row that its state comes from
        self._saved: list[tuple[Request, int, int]] = []  # (request, its slot, row) of this step

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._rows

    def find(self, digest: bytes) -> int | None:
        """The row of a snapshot, which is the most recently used one then."""
        row = self._rows.get(digest)
        if row is not None:
            self._rows.move_to_end(digest)
        return row

    @property
    def num_free(self) -> int:
        """Rows that hold nothing and that nobody has taken."""
        return len(self._free)

    # ---- a request ----

    def begin(self, request: Request, digest: bytes | None) -> None:
        """The request's slot, which it is about to get, is to hold this snapshot's state; None for an empty one."""
        row = None
        if digest is not None:
            row = self._rows[digest]
            self._rows.move_to_end(digest)
            self.num_loaded += 1
        self._begun[request.request_id] = request, row

    def next_cut(self, request: Request) -> int | None:
        """The next position at which a piece of the request's prompt is to end."""
        pages = request.num_computed // self._size
        point = next((p for p in request.points if p > pages), None)
        return None if point is None else point * self._size

    def reached(self, request: Request, decoding: bool) -> None:
        """The step that is being put together leaves the request's state behind `num_computed` positions: keeps a snapshot
        of it, where there is to be one."""
        pages, rest = divmod(request.num_computed, self._size)
        if rest:
            return
        lasting = pages % self.interval == 0 or pages in request.points
        if not lasting and not (decoding and pages % self.tail == 0):
            return
        row = self._row(None if lasting else self._older(request))
        if row is not None:
            request.tail_snapshot = None if lasting else (pages, row)
            request.snapshots.append((pages, row))
            self._saved.append((request, request.slot, row))
            self.num_saved += 1

    def expect(self, request: Request, pages: int) -> int | None:
        """A row for the state behind the request's first pages, which another engine sends."""
        row = self._row(None)
        if row is not None:
            request.snapshots.append((pages, row))
        return row

    def register(self, request: Request, full: int) -> None:
        """Indexes the request's snapshots of its first `full` pages, whose digests are known."""
        while request.snapshots and request.snapshots[0][0] <= full:
            pages, row = request.snapshots.pop(0)
            digest = request.digests[pages - 1]
            if digest in self._rows:  # somebody was faster; the older one is as good
                self._rows.move_to_end(digest)
                self._give_up(request, row)
            else:
                self._rows[digest] = row

    def take_back(self, request: Request) -> None:
        """Steps in flight compute fewer of the request's positions than was said: snapshots whose tokens were not known are
        of others."""
        while request.snapshots:
            self._give_up(request, request.snapshots.pop()[1])

    def leave(self, request: Request) -> None:
        """The request gives its slot up. Snapshots that cannot be indexed any more are given up too."""
        self._begun.pop(request.request_id, None)
        self.take_back(request)
        request.tail_snapshot = None

    # ---- a step ----

    def take_step(self) -> tuple[list[int], list[tuple[int, int]], list[tuple[int, int]]]:
        """(slots to clear, (row, slot) to load, (slot, row) to save) since the last call. Slots as in SlotTable."""
        cleared = [request.slot for request, row in self._begun.values() if row is None]
        loaded = [(row, request.slot) for request, row in self._begun.values() if row is not None]
        saved = [(slot, row) for _, slot, row in self._saved]
        self._begun.clear()
        self._saved.clear()
        return cleared, loaded, saved

    def reset(self) -> None:
        """Forgets every snapshot."""
        self._free.extend(self._rows.values())
        self._rows.clear()

    def check(self, running: list[Request]) -> None:
        """Raises AssertionError when the accounting is broken. For tests."""
        pending = [row for request in running for _, row in request.snapshots]
        rows = [*self._free, *self._rows.values(), *pending]
        assert sorted(rows) == list(range(self.num_rows)), "a row is lost, or in two places"

    def _row(self, reuse: bytes | None) -> int | None:
        """A row to save to: that of digest `reuse`, a free one, or the least recently used; None where all are written
        in this very step."""
        if reuse is not None:
            return self._rows.pop(reuse)
        if self._free:
            return self._free.pop()
        if not self._rows:
            return None
        digest, row = next(iter(self._rows.items()))
        if any(row == taken for _, _, taken in self._saved):
            return None
        del self._rows[digest]
        return row

    def _older(self, request: Request) -> bytes | None:
        """The digest of the request's tail snapshot, if it is indexed and was not given up for others."""
        if request.tail_snapshot is None:
            return None
        pages, row = request.tail_snapshot
        digest = request.digests[pages - 1] if pages <= len(request.digests) else b""
        return digest if self._rows.get(digest) == row else None

    def _give_up(self, request: Request, row: int) -> None:
        """Makes a row free whose content nobody will find."""
        self._saved = [item for item in self._saved if item[2] != row]
        self._free.append(row)
        if request.tail_snapshot is not None and request.tail_snapshot[1] == row:
            request.tail_snapshot = None
