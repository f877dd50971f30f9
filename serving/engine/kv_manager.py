"""Which pages a request gets: the longest cached prefix by reference, the host tier's continuation of it, the rest fresh.
And when they come free: once the last dispatched step that may write them has retired. Where every layer has a window, that
begins as soon as no position to come attends to them.

Joins requests to the page pool and the host tier; owns the digests' rules, not the pages' accounting.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

from serving.engine.host_tier import HostTier
from serving.engine.page_pool import NULL_PAGE, PagePool, chain_digest, root_digest
from serving.engine.request import Request


class KVManager:
    """Page decisions of one scheduler.

    Args:
        host_pages: capacity of the host tier; 0 for none.
        restore_page_s: seconds that copying a page back from the host tier takes; 0.0 where nobody has measured it.
        window: positions that a token attends to, itself included, where that is limited in every layer; None where some
            layer sees all.

    Attributes:
        num_leaving: pages of requests that are gone, but that a step in flight may still write.
        compute_token_s: seconds that computing a prompt token takes, kept up by whoever learns it; 0.0 until then.
    """

    def __init__(
        self, pool: PagePool, host_pages: int = 0, restore_page_s: float = 0.0, window: int | None = None
    ) -> None:
        self.pool = pool
        self.window = window
        self.host_tier = HostTier(host_pages, pool) if host_pages else None
        self.num_leaving = 0
        self.compute_token_s = 0.0
        self._restore_page_s = restore_page_s
        self._epoch = 0
        self._restored: list[tuple[int, bytes]] = []
        self._leaving: deque[tuple[int, list[int]]] = deque()  # (last step that may write, pages)

    def cached_pages(self, request: Request) -> int:
        """How many pages of the request's sequence are on the device now."""
        return len(self.pool.match(self._reusable(request), request.tokens))

    def admit(self, request: Request, reserve: int) -> bool:
        """Gives a waiting request pages for its whole known sequence, or nothing.

        Args:
            reserve: pages to leave free for the growth of those already running.
        """
        size = self.pool.page_size
        digests = self._reusable(request)
        found = self.pool.match(digests, request.tokens)
        self.pool.share(found)
        needed = -(-len(request.tokens) // size) - len(found)
        fresh = self.pool.allocate(needed) if needed + reserve <= self.pool.num_free else None
        if fresh is None:
            self.pool.release(found)
            return False
        request.pages = found + fresh
        request.cached_pages = len(found) + self._restore(request, digests, len(found))
        request.num_computed = request.cached_pages * size
        return True

    def more(self, requests: Sequence[Request], counts: Sequence[int]) -> list[list[int]] | None:
        """Pages for running requests to grow into, so many for each, or None when there are not that many."""
        pages = self.pool.allocate(sum(counts))
        return None if pages is None else [[pages.pop() for _ in range(count)] for count in counts]

    def leaving_of(self, request: Request) -> int:
        """`num_leaving` of the pool that the request's pages come from."""
        return self.num_leaving

    def leave(self, request: Request, step: int) -> None:
        """Takes the request's pages back: now, or once `step` (the last one dispatched) has retired, if one that may write
        them is in flight."""
        pages, request.pages = request.pages[request.pages_behind :], []
        request.cached_pages = request.pages_behind = 0
        self._release(request, pages, step)

    def leave_behind(self, request: Request, position: int, step: int) -> int:
        """Takes back the pages that neither `position` nor any later one attends to, as `leave` does; the null page stands for
        them. They stay indexed, for as long as nobody needs them.

        Returns:
            how many of the request's first pages are the null page now.
        """
        if self.window is None:
            return 0
        past = max(0, position - self.window + 1) // self.pool.page_size
        if self.pool.enable_prefix_caching:
            past = min(past, request.cached_pages)  # what is not indexed yet, its owner will index
        if past > request.pages_behind:
            pages = request.pages[request.pages_behind : past]
            request.pages[request.pages_behind : past] = [NULL_PAGE] * len(pages)
            request.pages_behind = past
            self._release(request, pages, step)
        return request.pages_behind

    def retired(self, step: int) -> None:
        """Every step up to this one has been read: frees what only they could write."""
        while self._leaving and self._leaving[0][0] <= step:
            _, pages = self._leaving.popleft()
            self.num_leaving -= len(pages)
            self.pool.release(pages)

    def forget(self, step: int | None = None) -> None:
        """Begins a new epoch: no prefix of the old one, on the device or the host, is found again. For weights or pages that
        are others now.

        Args:
            step: the last one dispatched, where its results will never come; frees what only it could write.
        """
        self._epoch += 1
        self._restored = []
        if step is not None:
            self.retired(step)
        self.pool.reset_cache()

    def register(self, request: Request) -> None:
        """Indexes pages that are full of known tokens and whose KV is dispatched: later steps may share them."""
        if not self.pool.enable_prefix_caching:
            return
        size = self.pool.page_size
        full = min(request.num_computed, len(request.tokens)) // size
        if full <= request.cached_pages:
            return
        self._extend_digests(request, full)
        for i in range(request.cached_pages, full):
            self.pool.register(request.pages[i], request.digests[i], _page_tokens(request, i, size))
        request.cached_pages = full

    def take_step(self) -> tuple[tuple[tuple[int, bytes], ...], tuple[tuple[int, bytes], ...], tuple[bytes, ...]]:
        """(spilled, restored, dropped) since the last step; see StepPlan."""
        if self.host_tier is None:
            return (), (), ()
        restored, self._restored = tuple(self._restored), []
        spilled, dropped = self.host_tier.take_step()
        return spilled, restored, dropped

    def _release(self, request: Request, pages: list[int], step: int) -> None:
        """Gives up pages that are the request's no more: now, or once `step` has retired, if one in flight may write them."""
        if request.inflight:
            self._leaving.append((step, pages))
            self.num_leaving += len(pages)
        else:
            self.pool.release(pages)

    def _reusable(self, request: Request) -> list[bytes]:
        """Digests of the pages that may come from a cache: never the last token's, which must be computed to sample."""
        every_position = request.spec.params.prompt_logprobs is not None or request.spec.pooling == "mean"
        if not self.pool.enable_prefix_caching or every_position:
            return []
        full = (len(request.tokens) - 1) // self.pool.page_size
        self._extend_digests(request, full)
        return request.digests[:full]

    def _extend_digests(self, request: Request, full: int) -> None:
        """Digests of the first `full` pages. Kept: a sequence only ever grows."""
        digests = request.digests
        if len(digests) >= full:
            return
        parent = (
            digests[-1]
            if digests
            else root_digest(request.spec.adapter, None, request.spec.cache_salt, str(self._epoch))
        )
        for i in range(len(digests), full):
            parent = chain_digest(parent, _page_tokens(request, i, self.pool.page_size))
            digests.append(parent)

    def _restore(self, request: Request, digests: list[bytes], found: int) -> int:
        """Continues a cached prefix with pages of the host tier, where copying them back is cheaper than computing them
        anew; how many. Their content is copied in before the step."""
        tier = self.host_tier
        if tier is None or self._restore_page_s > self.pool.page_size * self.compute_token_s > 0:
            return 0
        for i in range(found, len(digests)):
            content = _page_tokens(request, i, self.pool.page_size)
            if not tier.has(digests[i], content):
                return i - found
            tier.touch(digests[i])
            self._restored.append((request.pages[i], digests[i]))
            self.pool.register(request.pages[i], digests[i], content)
        return len(digests) - found


def _page_tokens(request: Request, page: int, size: int) -> bytes:
    """The tokens of one full page as int32 bytes."""
    return np.array(request.tokens[page * size : (page + 1) * size], np.int32).tobytes()
