"""Which pages a request gets: the longest cached prefix by reference, the host tier's part of it, the rest fresh. And when
they come free: once the last dispatched step that may write them has retired. Where layers have a window, that begins as soon
as no position to come attends to them.

Each group of layers that attend alike has a page table of its own, but all take from one pool, where every page is worth the
same. In a group that sees everything a prompt gets all its pages when it is admitted, in one with a window as its pieces are
computed, so that it never holds more there than `kv_windows.window_pages`. A cached prefix is of use where each group still has
what the positions after it attend to.

Joins requests to the page pool and the host tier; owns the digests' rules, not the pages' accounting.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from serving.engine.cache.host_tier import HostTier
from serving.engine.cache.kv_windows import first_page, pages_of, window_pages
from serving.engine.cache.page_pool import PagePool, chain_digest, root_digest
from serving.engine.requests.request import Request
from serving.engine.requests.scheduler_config import SchedulerConfig
from serving.engine.requests.slots import NULL_PAGE, SlotTable


class KVManager:
    """Page decisions of one scheduler.

    Args:
        slots: kept up with the page tables of requests that have a slot.
        windows: as in SchedulerConfig.
        max_chunk_tokens: tokens of a prompt's pieces for which there are to be pages; matters where a group has a window.
        host_pages: capacity of the host tier; 0 for none.
        restore_page_s: seconds that copying a page back from the host tier takes; 0.0 where nobody has measured it.

    Attributes:
        num_leaving: pages of requests that are gone, but that a step in flight may still write.
        compute_token_s: seconds that computing a prompt token takes, kept up by whoever learns it; 0.0 until then.
    """

    def __init__(
        self,
        pool: PagePool,
        slots: SlotTable,
        windows: Sequence[int | None] = (None,),
        max_chunk_tokens: int = 1,
        host_pages: int = 0,
        restore_page_s: float = 0.0,
    ) -> None:
        self.pool = pool
        self.windows = tuple(windows)
        self.host_tier = HostTier(host_pages, pool) if host_pages else None
        self.num_leaving = 0
        self.compute_token_s = 0.0
        self._slots = slots
        self._max_chunk = max_chunk_tokens
        self._has_windows = any(w is not None for w in self.windows)
        self._restore_page_s = restore_page_s
        self._epoch = 0
        self._restored: list[tuple[int, bytes]] = []
        self._leaving: deque[tuple[int, list[int]]] = deque()  # (last step that may write, pages)
        self._filling: dict[str, Request] = {}  # whose tables do not have all their prompts' pages yet

    @classmethod
    def of(cls, config: SchedulerConfig, slots: SlotTable) -> KVManager:
        """With an empty pool."""
        chunk = min(config.max_chunk_tokens, config.max_num_batched_tokens)
        # The longest sequence must be let in when it is alone: in a small pool its pieces are cut to the pages that there are.
        while chunk > 1 and pages_of(config.max_model_len, config.windows, config.page_size, chunk) >= config.num_pages:
            chunk //= 2
        return cls(
            PagePool(config.num_pages, config.page_size, config.enable_prefix_caching),
            slots,
            config.windows,
            chunk,
            config.host_pages,
            config.restore_page_s,
        )

    # ---- pages for requests ----

    def cached_pages(self, request: Request) -> int:
        """How long a prefix of the request's sequence, in pages, need not be computed, thanks to what is on the device now."""
        return self._verified(request, self._longest(self._reusable(request), self.pool.__contains__))

    def admit(self, request: Request, reserve: int) -> bool:
        """Gives a waiting request its cached prefix, and pages for its whole known sequence, or, in groups with a window, for
        its first piece; or nothing.

        Args:
            reserve: pages to leave free for the growth of those already running.
        """
        pool, size = self.pool, self.pool.page_size
        known = -(-len(request.tokens) // size)
        digests = self._reusable(request)
        prefix = self._prefix(request, digests)
        begun = min(known, -(-(prefix * size + self._max_chunk) // size))
        firsts = [first_page(window, prefix * size, size) for window in self.windows]
        ends = [known if window is None else begun for window in self.windows]
        keys = [[self._key(g, digest) for digest in digests[first:prefix]] for g, first in enumerate(firsts)]
        found = [[pool.find(key) for key in row] for row in keys]
        shared = [page for row in found for page in row if page is not None]
        pool.share(shared)
        needed = sum(ends) - sum(firsts) - len(shared)
        later = self._missing(known, firsts, ends) + sum(map(self._to_come, self._filling.values()))
        if needed + later + reserve > pool.num_free:
            pool.release(shared)
            return False
        copied = [(g, i) for g, row in enumerate(found) for i, page in enumerate(row) if page is None]
        for group, i in copied:
            assert self.host_tier is not None
            self.host_tier.touch(keys[group][i])  # before pages are taken, which may push others out to it
        fresh = pool.allocate(needed) or []
        fresh.reverse()
        request.pages = []
        for row, first, end in zip(found, firsts, ends, strict=True):
            pages = [NULL_PAGE] * first + [fresh.pop() if page is None else page for page in row]
            request.pages.append(pages + [fresh.pop() for _ in range(end - prefix)])
        for group, i in copied:
            self._restore(request, group, firsts[group] + i, keys[group][i])
        request.behind = firsts
        request.reach = min(ends)
        request.cached_pages = prefix
        request.num_computed = prefix * size
        if request.reach < known:
            self._filling[request.request_id] = request
        return True

    def cover(self, request: Request, end: int, step: int) -> int:
        """Takes pages for the request's positions before `end` where it has none, as far as there are any, and gives those
        back that its next position and all later ones do not attend to.

        Args:
            step: the last one dispatched.
        Returns:
            how many positions are covered; may be more than `end`.
        """
        size = self.pool.page_size
        wanted = -(-end // size)
        if wanted > request.reach:
            self._leave_behind(request, step)
            free = self.pool.num_free
            while wanted > request.reach and _lacking(request, wanted) > free:
                wanted -= 1
            if wanted > request.reach:
                self._extend(request, wanted)
        return request.reach * size

    def cover_all(self, requests: Sequence[Request], ends: Sequence[int], step: int) -> bool:
        """`cover` for each of several requests, if there are pages for all of them; else for none."""
        if sum(map(self.lacking, requests, ends)) > self.pool.num_free:
            return False
        for request, end in zip(requests, ends, strict=True):
            self.cover(request, end, step)
        return True

    def lacking(self, request: Request, end: int) -> int:
        """How many pages the request needs before its positions up to `end` are covered."""
        return _lacking(request, -(-end // self.pool.page_size))

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
            content = _page_tokens(request, i, size)
            for group, pages in enumerate(request.pages):
                self.pool.register(pages[i], self._key(group, request.digests[i]), content)
        request.cached_pages = full

    # ---- pages that come free ----

    def leaving_of(self, request: Request) -> int:
        """`num_leaving` of the pool that the request's pages come from."""
        return self.num_leaving

    def leave(self, request: Request, step: int) -> None:
        """Takes the request's pages back: now, or once `step` (the last one dispatched) has retired, if one that may write
        them is in flight."""
        if len(request.pages) == 1:
            pages = request.pages[0][request.behind[0] :]
        else:  # page by page, not group by group: of all tables the ends are evicted first
            pages = [page for column in itertools.zip_longest(*request.pages) for page in column if page]
        request.pages, request.behind = [], []
        request.reach = request.cached_pages = 0
        self._filling.pop(request.request_id, None)
        self._release(request, pages, step)

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

    def take_step(self) -> tuple[tuple[tuple[int, bytes], ...], tuple[tuple[int, bytes], ...], tuple[bytes, ...]]:
        """(spilled, restored, dropped) since the last step; see StepPlan."""
        if self.host_tier is None:
            return (), (), ()
        restored, self._restored = tuple(self._restored), []
        spilled, dropped = self.host_tier.take_step()
        return spilled, restored, dropped

    # ---- tables ----

    def _extend(self, request: Request, wanted: int) -> None:
        """Gives every table of the request as many pages."""
        fresh = self.pool.allocate(_lacking(request, wanted)) or []
        for group, pages in enumerate(request.pages):
            first = len(pages)
            if first < wanted:
                pages += [fresh.pop() for _ in range(wanted - first)]
                self._slots.show(request, group, first, wanted)
        request.reach = wanted
        if self._filling and wanted * self.pool.page_size >= len(request.tokens):
            self._filling.pop(request.request_id, None)

    def _leave_behind(self, request: Request, step: int) -> None:
        """Gives back what is behind every group's window; the null page stands for it. It stays indexed, for as long as nobody
        needs the pages."""
        if not self._has_windows:
            return
        for group, window in enumerate(self.windows):
            past = first_page(window, request.num_computed, self.pool.page_size)
            if self.pool.enable_prefix_caching:
                past = min(past, request.cached_pages)  # what is not indexed yet, its owner will index
            first = request.behind[group]
            if past > first:
                pages = request.pages[group][first:past]
                request.pages[group][first:past] = [NULL_PAGE] * len(pages)
                request.behind[group] = past
                self._slots.show(request, group, first, past)
                self._release(request, pages, step)

    def _release(self, request: Request, pages: list[int], step: int) -> None:
        """Gives up pages that are the request's no more: now, or once `step` has retired, if one in flight may write them."""
        if request.inflight:
            self._leaving.append((step, pages))
            self.num_leaving += len(pages)
        else:
            self.pool.release(pages)

    def _to_come(self, request: Request) -> int:
        """Pages that the rest of a prompt will need at a time, beyond what the request holds."""
        known = -(-len(request.tokens) // self.pool.page_size)
        return self._missing(known, request.behind, [len(pages) for pages in request.pages])

    def _missing(self, known: int, firsts: Sequence[int], ends: Sequence[int]) -> int:
        """What pages [first, end) of each group's table lack of what a sequence of `known` pages will hold at a time."""
        if not self._has_windows:
            return 0
        size = self.pool.page_size
        return sum(
            max(0, min(known - first, window_pages(window, self._max_chunk, size)) - (end - first))
            for window, first, end in zip(self.windows, firsts, ends, strict=True)
            if window is not None
        )

    # ---- prefixes ----

    def _key(self, group: int, digest: bytes) -> bytes:
        """Under which a group's page is indexed."""
        return digest if len(self.windows) == 1 else digest + bytes((group,))

    def _prefix(self, request: Request, digests: list[bytes]) -> int:
        """The longest prefix, in pages, that the device and, where copying back is cheaper than computing anew, the host tier
        make good."""
        found = self._longest(digests, self.pool.__contains__)
        tier = self.host_tier
        if tier is not None:
            most = self._longest(digests, lambda key: key in self.pool or key in tier)
            copies = sum(key not in self.pool for _, key in self._needed(digests, most))
            if not copies * self._restore_page_s > (most - found) * self.pool.page_size * self.compute_token_s > 0:
                found = most
        return self._verified(request, found)

    def _longest(self, digests: list[bytes], has: Callable[[bytes], bool]) -> int:
        """The longest prefix, in pages, of which every group has what the next position attends to: all of it, or, with a
        window, its end."""
        count = len(digests)
        for group, window in enumerate(self.windows):
            if window is None:
                i = 0
                while i < count and has(self._key(group, digests[i])):
                    i += 1
                count = i
        settled = not self._has_windows
        while not settled:
            settled = True
            for group, window in enumerate(self.windows):
                if window is None:
                    continue
                first, i = first_page(window, count * self.pool.page_size, self.pool.page_size), count - 1
                while i >= first and has(self._key(group, digests[i])):
                    i -= 1
                if i >= first:  # page i is missing, and every longer prefix up to this one needs it
                    count, settled = i, False
        return count

    def _needed(self, digests: list[bytes], prefix: int) -> Iterator[tuple[int, bytes]]:
        """(page of the sequence, key) of what a prefix consists of, in all groups."""
        for group, window in enumerate(self.windows):
            for i in range(first_page(window, prefix * self.pool.page_size, self.pool.page_size), prefix):
                yield i, self._key(group, digests[i])

    def _verified(self, request: Request, prefix: int) -> int:
        """The prefix if all of it holds the request's tokens; 0 if a digest is that of others."""
        width = 4 * self.pool.page_size
        raw = np.array(request.tokens[: prefix * self.pool.page_size], np.int32).tobytes()
        for i, key in self._needed(request.digests, prefix):
            content = raw[i * width : (i + 1) * width]
            if not self.pool.holds(key, content) and not (self.host_tier and self.host_tier.holds(key, content)):
                return 0
        return prefix

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

    def _restore(self, request: Request, group: int, index: int, key: bytes) -> None:
        """Has a page of the request's table filled from the host tier, before the step."""
        page = request.pages[group][index]
        self._restored.append((page, key))
        self.pool.register(page, key, _page_tokens(request, index, self.pool.page_size))


def _lacking(request: Request, wanted: int) -> int:
    """Pages that the request's tables need to have `wanted` each."""
    return sum(wanted - len(pages) for pages in request.pages if len(pages) < wanted)


def _page_tokens(request: Request, page: int, size: int) -> bytes:
    """The tokens of one full page as int32 bytes."""
    return np.array(request.tokens[page * size : (page + 1) * size], np.int32).tobytes()
