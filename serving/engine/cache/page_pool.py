"""Pages of the KV cache: who owns them, which prefix they hold, which is evicted first.

Plain Python. A page is in exactly one of three places:

- *referenced*: ref_count > 0, held by that many requests (read-only when more than one, and always when indexed);
- *cached*: ref_count 0 but indexed by its prefix, in the LRU list; a hit revives it, an allocation may evict it;
- *free*: ref_count 0 and not indexed; taken before any cached page is evicted.

Page 0 is the null page: never allocated, never indexed.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

from serving.engine.requests.slots import NULL_PAGE


def root_digest(*parts: str | None) -> bytes:
    """Where a chain of prefixes starts: adapter, media and cache salt, each length-prefixed so that none runs into another."""
    h = hashlib.blake2b(digest_size=16)
    for part in parts:
        raw = b"\xff" if part is None else b"\x00" + part.encode()
        h.update(len(raw).to_bytes(4, "little") + raw)
    return h.digest()


def chain_digest(parent: bytes, tokens: bytes) -> bytes:
    """Digest of a page: that of the page before it and its own tokens (int32 bytes)."""
    return hashlib.blake2b(parent + tokens, digest_size=16).digest()


class PagePool:
    """Reference-counted pages with an index of prefixes and least-recently-used eviction.

    Contract: `allocate` gives pages with ref_count 1; `share` adds a reference; `release` drops one. Only the owner of a
    page with ref_count 1 that is not indexed may write it. Pages are released tail first, so that of a chain the tail is
    evicted before the root.
    """

    def __init__(self, num_pages: int, page_size: int, enable_prefix_caching: bool = True) -> None:
        if num_pages < 2:
            raise ValueError(f"a page pool needs at least 2 pages (one is the null page), got {num_pages}.")
        self.num_pages = num_pages
        self.page_size = page_size
        self.enable_prefix_caching = enable_prefix_caching
        self._ref = [0] * num_pages
        self._free = list(range(num_pages - 1, 0, -1))
        self._lru: OrderedDict[int, None] = OrderedDict()
        self._index: dict[bytes, int] = {}  # digest -> page
        self._held: dict[int, tuple[bytes, bytes]] = {}  # indexed page -> (digest, its tokens as bytes)
        self.on_evict: Callable[[int, bytes, bytes], None] | None = (
            None  # told (page, digest, tokens) before it is reused
        )
        self.on_removed: Callable[[bytes], None] | None = None  # told the digest of what is indexed no more
        self.on_cleared: Callable[[], None] | None = None  # told when nothing is indexed any more

    @property
    def num_free(self) -> int:
        """Pages that an allocation could get, evicting where needed."""
        return len(self._free) + len(self._lru)

    @property
    def num_cached(self) -> int:
        """Unreferenced pages that still hold an indexed prefix."""
        return len(self._lru)

    def ref_count(self, page: int) -> int:
        return self._ref[page]

    def allocate(self, count: int) -> list[int] | None:
        """Takes `count` pages, or none at all when there are not that many."""
        if count > self.num_free:
            return None
        pages: list[int] = []
        for _ in range(count):
            page = self._free.pop() if self._free else self._evict()
            self._ref[page] = 1
            pages.append(page)
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Adds a reference to pages found by `match`."""
        for page in pages:
            if self._ref[page] == 0:
                del self._lru[page]
            self._ref[page] += 1

    def release(self, pages: Sequence[int], spare: bool = False) -> None:
        """Drops one reference of each page of a request, given in sequence order: the last ones are evicted first.

        Args:
            spare: nobody is expected to look for these; evict them before all others.
        """
        for page in reversed(pages):
            count = self._ref[page]
            if count <= 0:
                raise RuntimeError(f"page {page} released while nobody holds it")
            self._ref[page] = count - 1
            if count == 1:
                if page in self._held:
                    self._lru[page] = None
                    if spare:
                        self._lru.move_to_end(page, last=False)
                else:
                    self._free.append(page)

    def touch(self, digest: bytes) -> None:
        """Makes a cached page the most recently used one, if there is one under this digest."""
        page = self._index.get(digest)
        if page is not None and self._ref[page] == 0:
            self._lru.move_to_end(page)

    def __contains__(self, digest: bytes) -> bool:
        """Whether a page is indexed under this digest."""
        return digest in self._index

    def find(self, digest: bytes) -> int | None:
        """The page that is indexed under a digest. Changes nothing: `share` what you take."""
        return self._index.get(digest)

    def holds(self, digest: bytes, tokens: bytes) -> bool:
        """Whether the page under this digest holds these tokens (int32 bytes): a collision of digests is a miss."""
        page = self._index.get(digest)
        return page is not None and self._held[page][1] == tokens

    def register(self, page: int, digest: bytes, tokens: bytes) -> bool:
        """Indexes a full page that its owner will not write again; whether it is indexed now that was not. The first page of equal
        content stays the indexed one."""
        if not self.enable_prefix_caching or digest in self._index or page in self._held:
            return False
        if page == NULL_PAGE or self._ref[page] < 1:
            raise RuntimeError(f"page {page} cannot be indexed: it has no owner")
        self._index[digest] = page
        self._held[page] = (digest, tokens)
        return True

    def reset_cache(self) -> None:
        """Forgets every prefix; unreferenced pages become free."""
        self._index.clear()
        self._held.clear()
        self._free.extend(self._lru)
        self._lru.clear()
        if self.on_cleared is not None:
            self.on_cleared()

    def check(self) -> None:
        """Raises AssertionError when the accounting is broken. For tests."""
        free = set(self._free)
        cached = set(self._lru)
        live = {p for p in range(self.num_pages) if self._ref[p] > 0}
        assert NULL_PAGE not in free | cached | live, "the null page is never owned"
        assert len(free) == len(self._free), "a page is free twice"
        assert not free & cached and not free & live and not cached & live, "a page is in two places"
        assert len(free) + len(cached) + len(live) == self.num_pages - 1, "a page is lost"
        assert cached <= set(self._held), "a cached page is not indexed"
        assert not free & set(self._held), "a free page is indexed"
        assert {self._held[p][0] for p in self._held} == set(self._index), "index and pages disagree"
        assert len(self._held) == len(self._index)

    def _evict(self) -> int:
        page, _ = self._lru.popitem(last=False)
        digest, tokens = self._held.pop(page)
        del self._index[digest]
        if self.on_evict is not None:
            self.on_evict(page, digest, tokens)
        if self.on_removed is not None:
            self.on_removed(digest)
        return page
