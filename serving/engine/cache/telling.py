"""Says in events what happens to one replica's index of prefixes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from serving.engine.api.page_events import PageEvent, PagesCleared, PagesRemoved, PagesStored
from serving.engine.cache.page_pool import PagePool
from serving.engine.cache.prefixes import Prefixes
from serving.engine.requests.request import Request


class Teller:
    """Sits between a pool and a log; there only where somebody wants to know."""

    def __init__(
        self,
        sink: Callable[[PageEvent], None],
        pool: PagePool,
        prefixes: Prefixes,
        windows: Sequence[int | None],
        replica: int,
    ) -> None:
        self._sink = sink
        self._prefixes = prefixes
        self._windows = tuple(windows)
        self._page_size = pool.page_size
        self._replica = replica
        pool.on_removed = self._removed
        pool.on_cleared = lambda: sink(PagesCleared(replica))

    def stored(self, request: Request, group: int, index: int, content: bytes) -> None:
        """A page of the request's sequence is indexed.

        Args:
            index: which page of the sequence.
            content: its tokens as bytes.
        """
        key, digests = self._prefixes.key, request.digests
        parent = key(group, digests[index - 1]) if index else None
        spec = request.spec
        self._sink(
            PagesStored(
                (key(group, digests[index]),), parent, content, self._page_size, spec.adapter, spec.cache_salt, group,
                self._windows[group], self._replica,
            )
        )  # fmt: skip

    def _removed(self, digest: bytes) -> None:
        group = digest[16] if len(digest) > 16 else 0  # see Prefixes.key
        self._sink(PagesRemoved((digest,), group, self._replica))
