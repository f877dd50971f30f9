"""The replicas of the model behind one scheduler: which one a request goes to, and their pages as if they were one pool.

A request's pages and its slot are all in one replica (`Request.replica`), which it gets when it is admitted and may change
only by being preempted. Each replica has its own pool, prefix index and null page; page ids count within it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from serving.engine.api.page_events import PageEvent
from serving.engine.cache.kv_manager import KVManager
from serving.engine.cache.media import whole
from serving.engine.cache.telling import Teller
from serving.engine.requests.moves import Landing, Moves, PageMove
from serving.engine.requests.request import Request
from serving.engine.requests.scheduler_config import SchedulerConfig
from serving.engine.requests.slots import SlotTable

ROW_TOKENS = 64
"""What a running request more than elsewhere weighs against prompt tokens to compute. A step lasts as long as its fullest
replica's, for as many steps as the request has tokens; a prefix that is not there is computed once, and is there then."""


class Replicas:
    """The faces of `KVManager` and `PagePool` that a scheduler uses, over those of every replica; mostly there is one.

    Attributes:
        managers: of each replica.
    """

    def __init__(self, managers: Sequence[KVManager]) -> None:
        self.managers = tuple(managers)

    @classmethod
    def of(cls, config: SchedulerConfig, slots: SlotTable) -> Replicas:
        """With empty pools."""
        return cls([KVManager.of(config, slots, replica) for replica in range(config.replicas)])

    def tell(self, sink: Callable[[PageEvent], None]) -> None:
        """Tells of every page that is indexed, or no more, from now on."""
        for manager in self.managers:
            manager.teller = Teller(sink, manager.pool, manager.prefixes, manager.windows, manager.replica)

    # ---- placement ----

    def best(self, request: Request, running: Callable[[int], int], usable: Callable[[int], bool]) -> list[int]:
        """Replicas that a waiting request may go to, the best first: few tokens left to compute, few requests running.

        Args:
            running: how many requests a replica runs.
            usable: whether a replica can take one more at all.
        """

        def cost(replica: int) -> int:
            manager = self.managers[replica]
            cached = manager.cached_pages(request) * manager.pool.page_size
            return len(request.tokens) - cached + ROW_TOKENS * running(replica)

        found = list(filter(usable, range(len(self.managers))))
        return sorted(found, key=cost) if len(found) > 1 else found

    # ---- PagePool ----

    @property
    def pool(self) -> Replicas:
        return self

    @property
    def num_cached(self) -> int:
        """Unreferenced pages that still hold an indexed prefix."""
        return sum(manager.pool.num_cached for manager in self.managers)

    @property
    def num_free(self) -> int:
        """Pages that allocations could get, in all replicas together."""
        return sum(manager.pool.num_free for manager in self.managers)

    @property
    def num_pages(self) -> int:
        """Pages of all replicas together, and one for the null page."""
        return sum(manager.pool.num_pages - 1 for manager in self.managers) + 1

    def check(self) -> None:
        for manager in self.managers:
            manager.pool.check()

    def reset_cache(self) -> None:
        """Forgets every prefix."""
        for manager in self.managers:
            manager.pool.reset_cache()

    # ---- KVManager ----

    @property
    def media_queries(self) -> int:
        """Images that pieces of prompts needed so far."""
        return sum(m.media.hits + m.media.misses for m in self.managers if m.media is not None)

    @property
    def media_hits(self) -> int:
        """Of them, those whose embeddings were there."""
        return sum(m.media.hits for m in self.managers if m.media is not None)

    @property
    def num_leaving(self) -> int:
        return sum(manager.num_leaving for manager in self.managers)

    def leaving_of(self, request: Request) -> int:
        return self._of(request).num_leaving

    def cached_pages(self, request: Request) -> int:
        return max(manager.cached_pages(request) for manager in self.managers)

    def admit(self, request: Request, reserve: int) -> bool:
        return self._of(request).admit(request, reserve)

    def cover(self, request: Request, end: int, step: int) -> int:
        return self._of(request).cover(request, end, step)

    def cover_all(self, requests: Sequence[Request], ends: Sequence[int], step: int) -> bool:
        needed: Counter[int] = Counter()
        for request, end in zip(requests, ends, strict=True):
            needed[request.replica] += self._of(request).lacking(request, end)
        if any(count > self.managers[replica].pool.num_free for replica, count in needed.items()):
            return False
        for request, end in zip(requests, ends, strict=True):
            self.cover(request, end, step)
        return True

    def expect(self, request: Request, tokens: int) -> Landing | None:
        """Room for what others have computed, in the replica with the most; the request is of that one then."""
        request.replica = max(range(len(self.managers)), key=lambda replica: self.managers[replica].pool.num_free)
        return self._of(request).expect(request, tokens)

    def arrived(self, request: Request, tokens: int, step: int) -> None:
        self._of(request).arrived(request, tokens, step)

    def register(self, request: Request) -> None:
        self._of(request).register(request)

    def leave(self, request: Request, step: int) -> None:
        self._of(request).leave(request, step)

    def retired(self, step: int) -> None:
        for manager in self.managers:
            manager.retired(step)

    def forget(self, step: int | None = None) -> None:
        for manager in self.managers:
            manager.forget(step)

    def piece(self, request: Request, length: int) -> int:
        """How long the next piece of the request's prompt may be, of at most `length` tokens, before there are pages: it ends where
        a state is to be copied, and where an image's embeddings are not there yet."""
        manager = self._of(request)
        cut = None if manager.snapshots is None else manager.snapshots.next_cut(request)
        if cut is not None:
            length = min(length, cut - request.num_computed)
        return length if manager.media is None else manager.media.reach(request, length)

    def uncut(self, request: Request, length: int) -> int:
        """See `cache.media.whole`."""
        return whole(request, length)

    def reached(self, request: Request, decoding: bool) -> None:
        """The step that is being put together leaves the request behind `num_computed` positions. Before `register`, with
        the request's slot."""
        manager = self._of(request)
        if manager.snapshots is not None:
            manager.snapshots.reached(request, decoding)
        if manager.media is not None:
            manager.media.reached(request)

    def rests(self, request: Request) -> None:
        """The step that is being put together leaves the request's state as it is, behind `num_computed` positions, until it is
        known how many it computes."""
        snapshots = self._of(request).snapshots
        if snapshots is not None:
            snapshots.reached(request, True)
            snapshots.register(request, request.indexed_pages)

    def take_back(self, request: Request) -> None:
        """Fewer positions of the request were computed than its steps could have."""
        snapshots = self._of(request).snapshots
        if snapshots is not None:
            snapshots.take_back(request)

    def take_spilled(self) -> list[PageMove]:
        """Pages that were evicted since the last step and are to be copied to host memory before others write them."""
        return [
            PageMove(manager.replica, page, key)
            for manager in self.managers
            if manager.host_tier is not None
            for page, key in manager.host_tier.take_spilled()
        ]

    def take_step(self) -> Moves:
        if len(self.managers) == 1:
            return self.managers[0].take_step()
        return Moves.joined(manager.take_step() for manager in self.managers)

    def observe(self, compute_token_s: float) -> None:
        """Takes note of how many seconds a prompt token takes to compute."""
        for manager in self.managers:
            manager.prefixes.compute_token_s = compute_token_s

    def _of(self, request: Request) -> KVManager:
        return self.managers[request.replica]
