"""Which pages a request gets: the longest cached prefix by reference, the host tier's part of it, the rest fresh. And when
they come free: once the last dispatched step that may write them has retired. Where layers have a window, that begins as soon
as no position to come attends to them.

Each group of layers that attend alike has a page table of its own, but all take from one pool, where every page is worth the
same. In a group that sees everything a prompt gets all its pages when it is admitted, in one with a window as its pieces are
computed, so that it never holds more there than `kv_windows.window_pages`. A cached prefix is of use where each group still has
what the positions after it attend to.

Joins requests to the page pool, the host tier and the snapshots of recurrent layers' states; owns none of their accounting.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence

from serving.engine.cache.host_tier import HostTier
from serving.engine.cache.kv_windows import first_page, pages_of, window_pages
from serving.engine.cache.media import MediaCache
from serving.engine.cache.page_pool import PagePool
from serving.engine.cache.prefixes import Prefixes
from serving.engine.cache.snapshots import Snapshots
from serving.engine.cache.telling import Teller
from serving.engine.requests.moves import NO_MOVES, Landing, Moves, PageMove, StateMove
from serving.engine.requests.request import Request
from serving.engine.requests.scheduler_config import SchedulerConfig
from serving.engine.requests.slots import NULL_PAGE, SlotTable


class KVManager:
    """Page decisions of one scheduler.

    Args:
        slots: kept up with the page tables of requests that have a slot.
        windows: as in SchedulerConfig.
        replica: whose pages these are.
        max_chunk_tokens: tokens of a prompt's pieces for which there are to be pages; matters where a group has a window.
        host_pages: capacity of the host tier; 0 for none.
        restore_page_s: seconds that copying a page back from the host tier takes; 0.0 where nobody has measured it.

    Attributes:
        num_leaving: pages of requests that are gone, but that a step in flight may still write.
        prefixes: which part of a sequence need not be computed.
        snapshots: of the recurrent group's states, where there is one.
        media: embeddings of images, where the engine reads some.
        teller: tells of pages that are indexed; None where nobody wants to know.
    """

    def __init__(
        self,
        pool: PagePool,
        slots: SlotTable,
        windows: Sequence[int | None] = (None,),
        max_chunk_tokens: int = 1,
        host_pages: int = 0,
        restore_page_s: float = 0.0,
        snapshots: Snapshots | None = None,
        replica: int = 0,
        media: MediaCache | None = None,
    ) -> None:
        self.pool = pool
        self.windows = tuple(windows)
        self.host_tier = HostTier(host_pages, pool) if host_pages else None
        self.num_leaving = 0
        self.replica = replica
        self.snapshots = snapshots
        self.media = media
        self.prefixes = Prefixes(pool, self.windows, self.host_tier, snapshots, restore_page_s)
        self.teller: Teller | None = None
        self._slots = slots
        self._max_chunk = max_chunk_tokens
        self._has_windows = any(w is not None for w in self.windows)
        self._restored: list[tuple[int, bytes]] = []
        self._leaving: deque[tuple[int, list[int], bool]] = deque()  # (last step that may write, pages, spare)
        self._filling: dict[str, Request] = {}  # whose tables do not have all their prompts' pages yet

    @classmethod
    def of(cls, config: SchedulerConfig, slots: SlotTable, replica: int = 0) -> KVManager:
        """One replica's, with an empty pool."""
        chunk = min(config.max_chunk_tokens, config.max_num_batched_tokens)
        # The longest sequence must be let in when it is alone: in a small pool its pieces are cut to the pages that there are.
        while chunk > 1 and pages_of(config.max_model_len, config.windows, config.page_size, chunk) >= config.num_pages:
            chunk //= 2
        snapshots = None
        if config.recurrent is not None:
            rows = config.num_snapshots if config.enable_prefix_caching else 0
            snapshots = Snapshots(config.recurrent, rows, config.page_size)
        return cls(
            PagePool(config.num_pages, config.page_size, config.enable_prefix_caching),
            slots,
            config.windows,
            chunk,
            config.host_pages,
            config.restore_page_s,
            snapshots,
            replica,
            MediaCache(config.media_rows, config.max_num_batched_tokens, replica) if config.media_rows else None,
        )

    # ---- pages for requests ----

    def cached_pages(self, request: Request) -> int:
        """How long a prefix of the request's sequence, in pages, need not be computed, thanks to what is on the device now."""
        return self.prefixes.cached(request)

    def admit(self, request: Request, reserve: int) -> bool:
        """Gives a waiting request its cached prefix, and pages for its whole known sequence, or, in groups with a window, for
        its first piece; or nothing.

        Args:
            reserve: pages to leave free for the growth of those already running.
        """
        pool, size = self.pool, self.pool.page_size
        known = -(-len(request.tokens) // size)
        digests = self.prefixes.reusable(request)
        prefix = self.prefixes.find(request, digests)
        begun = min(known, -(-(prefix * size + self._max_chunk) // size))
        firsts = [first_page(window, prefix * size, size) for window in self.windows]
        ends = [known if window is None else begun for window in self.windows]
        keys = [[self.prefixes.key(g, digest) for digest in digests[first:prefix]] for g, first in enumerate(firsts)]
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
        request.reach = min(ends, default=known)
        request.indexed_pages = prefix
        request.num_computed = prefix * size
        request.points = self.prefixes.points(request, digests, prefix)
        if self.snapshots is not None:
            self.snapshots.begin(request, digests[prefix - 1] if prefix else None)
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
        if full <= request.indexed_pages:
            return
        self.prefixes.extend_digests(request, full)
        contents = self.prefixes.pages_tokens(request, request.indexed_pages, full)
        for i, content in enumerate(contents, request.indexed_pages):
            for group, pages in enumerate(request.pages):
                self._index(request, group, i, pages[i], content)
        request.indexed_pages = full
        if self.snapshots is not None:
            self.snapshots.register(request, full)

    # ---- prefixes that come from other engines ----

    def expect(self, request: Request, tokens: int) -> Landing | None:
        """Takes pages, and a snapshot's row, for what others have computed of a request's first `tokens`: whole pages, and
        never the last token. None where there is no room, or nothing to put there."""
        pool, size = self.pool, self.pool.page_size
        count = min(tokens, len(request.tokens) - 1) // size
        digests = self.prefixes.reusable(request)[:count]
        if count <= 0 or not digests:
            return None
        firsts = [first_page(window, count * size, size) for window in self.windows]
        there = self.prefixes.there(request, digests, firsts)
        complete = self.snapshots is None or digests[-1] in self.snapshots
        needed = sum(count - max(first, there) for first in firsts)
        if (there == count and complete) or needed > pool.num_free:
            return None
        request.pages = []
        for group, first in enumerate(firsts):
            found = [pool.find(self.prefixes.key(group, digest)) or NULL_PAGE for digest in digests[first:there]]
            pool.share(found)
            request.pages.append([NULL_PAGE] * first + found)
        row = None if self.snapshots is None or complete else self.snapshots.expect(request, count)
        lacks_row = row is None and not complete
        fresh = None if lacks_row else pool.allocate(needed)
        if fresh is None:  # what is shared now was free before
            for pages, first in zip(request.pages, firsts, strict=True):
                pool.release(pages[first:])
            request.pages = []
            if self.snapshots is not None:
                self.snapshots.leave(request)
            return None
        for pages in request.pages:
            pages += [fresh.pop() for _ in range(len(pages), count)]
        request.behind, request.reach = firsts, count
        return Landing(self.replica, count * size, tuple(map(tuple, request.pages)), row, there * size)

    def arrived(self, request: Request, tokens: int, step: int) -> None:
        """The pages that were expected hold the request's first `tokens`, and the snapshot the state behind all that were
        expected: they are found like any other prefix from now on. The request holds none of them any more."""
        full = min(tokens // self.pool.page_size, request.reach)
        self.prefixes.extend_digests(request, full)
        for group, (pages, first) in enumerate(zip(request.pages, request.behind, strict=True)):
            for i in range(first, full):
                self._index(request, group, i, pages[i], self.prefixes.page_tokens(request, i))
        if self.snapshots is not None:
            self.snapshots.register(request, full)
        self.leave(request, step)

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
        self._touch(request)
        if self.snapshots is not None:
            self.snapshots.leave(request)
        if self.media is not None:
            self.media.leave(request)
        request.pages, request.behind, request.points = [], [], []
        request.reach = request.indexed_pages = 0
        self._filling.pop(request.request_id, None)
        self._release(request, pages, step)

    def retired(self, step: int) -> None:
        """Every step up to this one has been read: frees what only they could write."""
        while self._leaving and self._leaving[0][0] <= step:
            _, pages, spare = self._leaving.popleft()
            self.num_leaving -= len(pages)
            self.pool.release(pages, spare)

    def forget(self, step: int | None = None) -> None:
        """Begins a new epoch: no prefix of the old one, on the device or the host, is found again. For weights or pages that
        are others now.

        Args:
            step: the last one dispatched, where its results will never come; frees what only it could write.
        """
        self.prefixes.new_epoch()
        self._restored = []
        if step is not None:
            self.retired(step)
        self.pool.reset_cache()
        if self.snapshots is not None:
            self.snapshots.reset()
        if self.media is not None:
            self.media.forget()

    def take_step(self) -> Moves:
        """What is to be copied with the next step, since the last one."""
        if self.host_tier is None and self.snapshots is None and self.media is None:
            return NO_MOVES
        replica, spilled, dropped = self.replica, [], []
        restored, self._restored = self._restored, []
        if self.host_tier is not None:
            spilled, dropped = self.host_tier.take_step()
        cleared, loaded, saved = [], [], []
        if self.snapshots is not None:
            cleared, loaded, saved = self.snapshots.take_step()
        encodings = () if self.media is None else self.media.take_step()
        if not (spilled or restored or dropped or cleared or loaded or saved or encodings):
            return NO_MOVES
        own = self._slots.per_replica
        return Moves(
            tuple(PageMove(replica, page, key) for page, key in spilled),
            tuple(PageMove(replica, page, key) for page, key in restored),
            tuple((replica, key) for key in dropped),
            tuple(StateMove(replica, slot % own) for slot in cleared),
            tuple(StateMove(replica, slot % own, row) for row, slot in loaded),
            tuple(StateMove(replica, slot % own, row) for slot, row in saved),
            encodings,
        )

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
                past = min(past, request.indexed_pages)  # what is not indexed yet, its owner will index
            first = request.behind[group]
            if past > first:
                pages = request.pages[group][first:past]
                request.pages[group][first:past] = [NULL_PAGE] * len(pages)
                request.behind[group] = past
                self._slots.show(request, group, first, past)
                near = [p for i, p in enumerate(pages, first) if self._near_point(request, group, i)]
                self._release(request, near, step)
                self._release(request, [p for p in pages if p not in near], step, spare=True)

    def _near_point(self, request: Request, group: int, page: int) -> bool:
        """Whether a prefix up to one of the request's points needs a page of a group with a window."""
        return any(page in self.prefixes.needed_at(group, point) for point in request.points)

    def _touch(self, request: Request) -> None:
        """Makes what is behind windows, and that a prefix up to one of the request's points needs, as recent as the request:
        what is of use together is evicted together."""
        for group, behind in enumerate(request.behind):
            for point in reversed(request.points if behind else ()):
                for i in reversed(self.prefixes.needed_at(group, point)):
                    if i < min(behind, len(request.digests)):
                        self.pool.touch(self.prefixes.key(group, request.digests[i]))

    def _release(self, request: Request, pages: list[int], step: int, spare: bool = False) -> None:
        """Gives up pages that are the request's no more: now, or once `step` has retired, if one in flight may write them.
        `spare`: see PagePool.release."""
        if not pages:
            return
        if request.inflight:
            self._leaving.append((step, pages, spare))
            self.num_leaving += len(pages)
        else:
            self.pool.release(pages, spare)

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

    def _restore(self, request: Request, group: int, index: int, key: bytes) -> None:
        """Has a page of the request's table filled from the host tier, before the step."""
        page = request.pages[group][index]
        self._restored.append((page, key))
        self._index(request, group, index, page, self.prefixes.page_tokens(request, index))

    def _index(self, request: Request, group: int, index: int, page: int, content: bytes) -> None:
        """Indexes one full page of the request's sequence, and tells of it where somebody wants to know."""
        new = self.pool.register(page, self.prefixes.key(group, request.digests[index]), content)
        if new and self.teller is not None:
            self.teller.stored(request, group, index, content)


def _lacking(request: Request, wanted: int) -> int:
    """Pages that the request's tables need to have `wanted` each."""
    return sum(wanted - len(pages) for pages in request.pages if len(pages) < wanted)
