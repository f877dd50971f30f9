"""Which part of a request's sequence need not be computed: the longest prefix of which every group of layers has what the
positions behind it need. A group that sees everything needs all of its pages, one with a window those of the window, a
recurrent group a snapshot of its state at the prefix's very end.

A prefix is known by the digest of its last page: a chain over (parent, tokens), which begins with what else decides what the
layers compute (`root_digest`). Pages of all groups and snapshots are indexed by the same digests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from serving.engine.api.media import Media
from serving.engine.cache.host_tier import HostTier
from serving.engine.cache.kv_windows import first_page
from serving.engine.cache.page_pool import PagePool, chain_digest, root_digest
from serving.engine.cache.snapshots import Partings, Snapshots
from serving.engine.requests.request import Request


class Prefixes:
    """The rules of one replica's prefixes; owns no page.

    Args:
        windows: as in SchedulerConfig.
        snapshots: of the recurrent group, where there is one.
        restore_page_s: seconds that copying a page back from the host tier takes; 0.0 where nobody has measured it.

    Attributes:
        compute_token_s: seconds that computing a prompt token takes, kept up by whoever learns it; 0.0 until then.
    """

    def __init__(
        self,
        pool: PagePool,
        windows: Sequence[int | None],
        host_tier: HostTier | None = None,
        snapshots: Snapshots | None = None,
        restore_page_s: float = 0.0,
    ) -> None:
        self.compute_token_s = 0.0
        self._pool = pool
        self._windows = tuple(windows)
        self._limited = [(group, window) for group, window in enumerate(windows) if window is not None]
        self._tier = host_tier
        self._snapshots = snapshots
        self._partings = Partings() if self._limited or snapshots is not None else None
        self._restore_page_s = restore_page_s
        self._epoch = 0

    def new_epoch(self) -> None:
        """From now on no prefix of before is found."""
        self._epoch += 1
        if self._partings is not None:
            self._partings.clear()

    # ---- identity ----

    def key(self, group: int, digest: bytes) -> bytes:
        """Under which a group's page is indexed."""
        return digest if len(self._windows) == 1 else digest + bytes((group,))

    def page_tokens(self, request: Request, page: int) -> bytes:
        """The content of one full page of the sequence as int32 bytes: its tokens, mostly."""
        size = self._pool.page_size
        return request.content(page * size, (page + 1) * size).tobytes()

    def pages_tokens(self, request: Request, first: int, end: int) -> Iterator[bytes]:
        """`page_tokens` of several, from one conversion: a long prompt has hundreds."""
        size = self._pool.page_size
        raw = request.content(first * size, end * size).tobytes()
        return (raw[at : at + 4 * size] for at in range(0, len(raw), 4 * size))

    @staticmethod
    def content_of(tokens: Sequence[int], first: int, media: Media | None = None) -> bytes:
        """What pages hold, as the pool keeps it: int32 bytes of tokens that begin at `first`, and of images' marks."""
        return (np.array(tokens, np.int32) if media is None else media.standing(tokens, first)).tobytes()

    def extend_digests(self, request: Request, full: int) -> None:
        """Digests of the first `full` pages. Kept: a sequence only ever grows."""
        digests = request.digests
        if len(digests) >= full:
            return
        spec = request.spec
        parent = digests[-1] if digests else self.root(spec.adapter, spec.cache_salt)
        size, media = self._pool.page_size, spec.media
        for i, content in enumerate(self.pages_tokens(request, len(digests), full), len(digests)):
            images = b"" if media is None else media.digests(i * size, (i + 1) * size)
            parent = chain_digest(parent, content + images)
            digests.append(parent)

    def root(self, adapter: str | None, salt: str | None) -> bytes:
        """Where the chains of such sequences begin."""
        return root_digest(adapter, None, salt, str(self._epoch))

    def chain(
        self, tokens: Sequence[int], adapter: str | None, salt: str | None, media: Media | None = None
    ) -> list[bytes]:
        """Digests of a sequence's full pages, as `extend_digests` makes them for a request."""
        size, found = self._pool.page_size, [self.root(adapter, salt)]
        raw = self.content_of(tokens, 0, media)
        for end in range(size, len(tokens) + 1, size):
            images = b"" if media is None else media.digests(end - size, end)
            found.append(chain_digest(found[-1], raw[4 * (end - size) : 4 * end] + images))
        return found[1:]

    def reusable(self, request: Request) -> list[bytes]:
        """Digests of the pages that may come from a cache: never the last token's, which must be computed to sample."""
        if request.spec.media is not None and request.spec.media.lasting:
            return []  # a prompt's first piece, which every one has then, is where it gets hold of what its tokens attend to
        every_position = request.spec.params.prompt_logprobs is not None or request.spec.pooling == "mean"
        if not self._pool.enable_prefix_caching or every_position:
            return []
        full = (len(request.tokens) - 1) // self._pool.page_size
        self.extend_digests(request, full)
        return request.digests[:full]

    # ---- what is there ----

    def cached(self, request: Request) -> int:
        """How long a prefix, in pages, need not be computed, thanks to what is on the device now."""
        return self._verified(request, self._longest(self.reusable(request), self._pool.__contains__))

    def find(self, request: Request, digests: list[bytes]) -> int:
        """The longest prefix, in pages, that the device and, where copying back is cheaper than computing anew, the host
        tier make good."""
        found = self._longest(digests, self._pool.__contains__)
        tier = self._tier
        if tier is not None:
            most = self._longest(digests, lambda key: key in self._pool or key in tier)
            copies = sum(key not in self._pool for _, key in self._needed(digests, most))
            if not copies * self._restore_page_s > (most - found) * self._pool.page_size * self.compute_token_s > 0:
                found = most
        return self._verified(request, found)

    def there(self, request: Request, digests: list[bytes], firsts: Sequence[int]) -> int:
        """How many of a prefix's pages, from the first on, the device has for every group that needs them.

        Args:
            firsts: of each group, the first page of the sequence that it needs.
        """
        for i, digest in enumerate(digests):
            content = self.page_tokens(request, i)
            keys = [self.key(group, digest) for group, first in enumerate(firsts) if first <= i]
            if not all(self._pool.holds(key, content) for key in keys):
                return i
        return len(digests)

    def reach(self, digests: list[bytes], known: int, elsewhere: Callable[[bytes], bool]) -> tuple[int, int]:
        """How long a prefix, in pages, could be with what is kept elsewhere too: (pages, how many of them lie only there).

        Args:
            known: pages of a prefix that the device and the host tier make good.
        """
        tier = self._tier

        def here(key: bytes) -> bool:
            return key in self._pool or (tier is not None and key in tier)

        count = self._longest(digests, lambda key: here(key) or elsewhere(key))
        if count <= known:
            return count, 0
        return count, sum(not here(key) for _, key in self._needed(digests, count))

    def _longest(self, digests: list[bytes], has: Callable[[bytes], bool]) -> int:
        """The longest prefix, in pages, of which every group has what the next position needs."""
        count = len(digests)
        for group, window in enumerate(self._windows):
            if window is None:
                i = 0
                while i < count and has(self.key(group, digests[i])):
                    i += 1
                count = i
        while True:
            longest = count
            for group, window in self._limited:
                first, i = first_page(window, count * self._pool.page_size, self._pool.page_size), count - 1
                while i >= first and has(self.key(group, digests[i])):
                    i -= 1
                if i >= first:  # page i is missing, and every longer prefix up to this one needs it
                    count = i
            if self._snapshots is not None:
                while count and digests[count - 1] not in self._snapshots:
                    count -= 1
            if count == longest:
                return count

    def _needed(self, digests: list[bytes], prefix: int) -> Iterator[tuple[int, bytes]]:
        """(page of the sequence, key) of what a prefix consists of, in all paged groups."""
        for group, window in enumerate(self._windows):
            for i in range(first_page(window, prefix * self._pool.page_size, self._pool.page_size), prefix):
                yield i, self.key(group, digests[i])

    def _verified(self, request: Request, prefix: int) -> int:
        """The prefix if all of it holds the request's tokens; 0 if a digest is that of others."""
        width = 4 * self._pool.page_size
        raw = request.content(0, prefix * self._pool.page_size).tobytes()
        for i, key in self._needed(request.digests, prefix):
            content = raw[i * width : (i + 1) * width]
            if not self._pool.holds(key, content) and not (self._tier and self._tier.holds(key, content)):
                return 0
        return prefix

    # ---- where prefixes are worth keeping ----

    def points(self, request: Request, digests: list[bytes], prefix: int) -> list[int]:
        """Where later sequences may part from this one, in pages, ascending: where earlier ones did, at the end of the first turn
        (a system prompt's, mostly) and of those that the request tells of, at the prompt's last full page, and every so often.
        Groups that do not keep everything keep what
        a prefix up to there needs; a recurrent group does so where that saves enough tokens since the point before.

        Args:
            digests: of the pages that may come from a cache.
            prefix: pages that did.
        """
        if self._partings is None or not self._pool.enable_prefix_caching:
            return []
        size, last = self._pool.page_size, (len(request.tokens) - 1) // self._pool.page_size
        ends = (*request.spec.turn_ends, _end_of_first_turn(request))
        found = {last, prefix, self._partings.shared(digests), *(end // size for end in ends)}
        self._partings.add(digests)
        snapshots = self._snapshots
        if snapshots is None:
            return sorted(p for p in found if 0 < p <= last)
        found |= set(range(snapshots.interval, last, snapshots.interval))
        points: list[int] = []
        before = prefix
        for point in sorted(p for p in found if prefix < p <= last):
            kept_for_others = (
                point == last and request.spec.transfer is not None and request.spec.transfer.remote_decode
            )
            if point - before >= snapshots.worth or kept_for_others:
                points.append(point)
                before = point
        return points

    def needed_at(self, group: int, point: int) -> range:
        """Pages of a group that a prefix of `point` pages needs."""
        size = self._pool.page_size
        return range(first_page(self._windows[group], point * size, size), point)


def _end_of_first_turn(request: Request) -> int:
    """Positions up to the first token of the prompt that ends a turn, that one included; 0 where there is none."""
    ends = request.spec.eos_token_ids
    prompt = enumerate(request.spec.prompt_token_ids, 1)
    return next((length for length, token in prompt if token in ends), 0) if ends else 0
