"""Embeddings of images that are on the devices: which rows of the store hold whose, and who still needs them.

An item is encoded once for all who send it, as long as its rows are there. A request holds an item from the piece of its prompt
that first has some of its places until the piece that has the last; of items that nobody holds, the least recently used gives way.
So a request that holds something never waits for more, and whoever waits gets its turn.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np

from serving.engine.api.media import MediaItem
from serving.engine.requests.moves import Encoding
from serving.engine.requests.request import Request


def whole(request: Request, length: int) -> int:
    """How long a piece of the request's prompt may be, of at most `length` tokens, that ends inside no image whose tokens attend to
    each other."""
    media, first = request.spec.media, request.num_computed
    if media is not None and media.together:
        for _, item in media.overlapping(first, first + length):
            if item.together and first + length < item.end:
                return max(0, item.first - first)
    return length


class _Entry:
    """Where an item's embeddings are, and how many requests need them."""

    __slots__ = ("holders", "rows")

    def __init__(self, rows: np.ndarray) -> None:
        self.rows = rows
        self.holders = 0


class MediaCache:
    """One replica's store of embeddings.

    Args:
        num_rows: embeddings that the store has room for; at least those of the largest item.
        budget: embeddings that are made in one step at most, beyond the first item's: so that images do not hold running
            streams up.

    Attributes:
        hits, misses: items that were found here, and items that were encoded.
    """

    def __init__(self, num_rows: int, budget: int, replica: int = 0) -> None:
        self.num_rows = num_rows
        self.hits = self.misses = 0
        self._budget, self._replica = budget, replica
        self._free = list(range(num_rows - 1, -1, -1))
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()  # by digest and epoch
        self._epoch = 0
        self._to_encode: list[Encoding] = []

    def reach(self, request: Request, length: int) -> int:
        """How long a piece of the request's prompt may be, of at most `length` tokens: as far as its images' embeddings are there,
        or will be before the step. The request holds those from now on."""
        media, first = request.spec.media, request.num_computed
        if media is None:
            return length
        length = whole(request, length)
        for index, item in media.overlapping(first, first + length):
            if index not in request.media_held and not self._take(request, index, item):
                return max(0, item.first - first)
        return length

    def reached(self, request: Request) -> None:
        """The step that is being put together leaves the request behind `num_computed` positions: what lies before is not needed
        again. The rows stay as they are until another item is put there, which is in a later step."""
        media = request.spec.media
        if media is not None and request.media_held:
            for index in [i for i in request.media_held if media.items[i].end <= request.num_computed]:
                self._let_go(request, index)

    def leave(self, request: Request) -> None:
        """The request needs nothing any more, or will ask again."""
        for index in list(request.media_held):
            self._let_go(request, index)

    def take_step(self) -> tuple[Encoding, ...]:
        """What is to be encoded before the next step."""
        found, self._to_encode = tuple(self._to_encode), []
        return found

    def forget(self) -> None:
        """Nothing in the store is found again: other weights, or lost memory. Rows that somebody still reads come free later."""
        self._epoch += 1
        for key in [key for key, entry in self._entries.items() if not entry.holders]:
            self._evict(key)

    def _take(self, request: Request, index: int, item: MediaItem) -> bool:
        key = item.digest + self._epoch.to_bytes(8, "little")
        entry = self._entries.get(key)
        if entry is None:
            begun = sum(one.item.size for one in self._to_encode)
            if begun and begun + item.size > self._budget:
                return False
            rows = self._rows(item.size)
            if rows is None:
                return False
            entry = self._entries[key] = _Entry(rows)
            self._to_encode.append(Encoding(self._replica, item, rows))
            self.misses += 1
        else:
            self.hits += 1
        self._entries.move_to_end(key)
        entry.holders += 1
        request.media_held[index] = key
        request.media_rows[index] = entry.rows
        return True

    def _let_go(self, request: Request, index: int) -> None:
        self._entries[request.media_held.pop(index)].holders -= 1

    def _rows(self, count: int) -> np.ndarray | None:
        """So many rows, if need be of items that nobody holds; None, and nothing is evicted, where there are not enough."""
        spare = [key for key, entry in self._entries.items() if not entry.holders]
        if len(self._free) + sum(len(self._entries[key].rows) for key in spare) < count:
            return None
        for key in spare:
            if len(self._free) >= count:
                break
            self._evict(key)
        return np.array([self._free.pop() for _ in range(count)], np.int32)

    def _evict(self, key: bytes) -> None:
        self._free.extend(reversed(self._entries.pop(key).rows.tolist()))

    def check(self) -> None:
        """Raises AssertionError where the accounting is wrong."""
        taken = [row for entry in self._entries.values() for row in entry.rows.tolist()]
        assert sorted([*taken, *self._free]) == list(range(self.num_rows)), "a row is nobody's, or two items'"
