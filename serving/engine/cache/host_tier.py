"""Second tier of the prefix index: pages evicted from the device live on in host memory until they are hit or forgotten.

The scheduler decides and keeps this index; the runner moves the bytes (`StepPlan.moves`). The order
within a step makes it safe: spilled pages are read before anything of the step writes, restored ones are written next.
"""

from __future__ import annotations

from collections import OrderedDict

from serving.engine.cache.page_pool import PagePool


class HostTier:
    """Least-recently-used index of `capacity` pages by prefix digest, each with its tokens to compare."""

    def __init__(self, capacity: int, pool: PagePool) -> None:
        self.capacity = capacity
        pool.on_evict = self._keep
        self._pages: OrderedDict[bytes, bytes] = OrderedDict()
        self._spilled: list[tuple[int, bytes]] = []  # (device page, digest) of this step
        self._dropped: list[bytes] = []  # digests the runner may forget
        self.num_spilled = 0
        self.num_restored = 0

    def __len__(self) -> int:
        return len(self._pages)

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._pages

    def holds(self, digest: bytes, tokens: bytes) -> bool:
        """Whether the page under this digest holds these tokens."""
        return self._pages.get(digest) == tokens

    def touch(self, digest: bytes) -> None:
        """A restored page stays here too: it may be evicted again before it is written again."""
        self._pages.move_to_end(digest)
        self.num_restored += 1

    def take_spilled(self) -> list[tuple[int, bytes]]:
        """What of that the device is to keep now, because somebody is about to write those pages between two steps."""
        spilled, self._spilled = self._spilled, []
        return spilled

    def take_step(self) -> tuple[list[tuple[int, bytes]], list[bytes]]:
        """What the device is to keep, and then what it may forget, since the last call. A page may be in both, when the
        tier is smaller than a step's evictions: a request of the same step may still restore it in between."""
        spilled, dropped = self._spilled, self._dropped
        self._spilled, self._dropped = [], []
        return spilled, list(dict.fromkeys(digest for digest in dropped if digest not in self._pages))

    def _keep(self, page: int, digest: bytes, tokens: bytes) -> None:
        if digest in self._pages:
            self._pages.move_to_end(digest)
            return
        self._pages[digest] = tokens
        self._spilled.append((page, digest))
        self.num_spilled += 1
        if len(self._pages) > self.capacity:
            oldest, _ = self._pages.popitem(last=False)
            self._dropped.append(oldest)
