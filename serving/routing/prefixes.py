"""Which prefixes each engine has: remembered from what was sent there, or exact, from what the engines tell of their pages.

A prefix is known by a chain of hashes, one a block of tokens, that begins with what else decides an engine's cache (adapter, salt).
Hashes are 64 bits, and two prefixes of one hash cost a detour, never a wrong token: the engine compares tokens itself.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from typing import Protocol

DEFAULT_BLOCK_TOKENS = 16
MAX_BLOCKS = 65_536
"""Blocks remembered of one engine, about 100 bytes each."""


Hash = bytes | int | tuple[int, bytes]
"""An engine's own name of a block."""


def chain(root: tuple[str | None, ...], tokens: Sequence[int], block_tokens: int) -> list[int]:
    """Hashes of the full blocks that tokens begin with, each over all before it.

    Args:
        root: what else decides whether KV can be shared: adapter, cache salt.
    """
    parent = hash(root)
    found = []
    for start in range(0, len(tokens) - block_tokens + 1, block_tokens):
        parent = hash((parent, *tokens[start : start + block_tokens]))
        found.append(parent)
    return found


class Prefixes(Protocol):
    """What one engine has."""

    block_tokens: int

    def match(self, hashes: Sequence[int]) -> int:
        """How many blocks of a chain, from its beginning, are there."""
        ...

    def sent(self, hashes: Sequence[int]) -> None:
        """A request with these blocks goes there: it will have them."""
        ...

    def ended(self, hashes: Sequence[int], whole: Sequence[int]) -> None:
        """The request is over.

        Args:
            hashes: as they were sent.
            whole: of the prompt and its completion; empty where the engine was lost, or refused.
        """
        ...

    def clear(self) -> None:
        """It has nothing any more."""
        ...

    def __len__(self) -> int: ...


class RememberedPrefixes(Prefixes):
    """What was sent to an engine, in bounded memory: the least recently used block goes first, of a chain its end before its
    beginning, as in the engine's own cache.

    Args:
        max_blocks: what is remembered; the engine's own number of pages is a good bound.
    """

    def __init__(self, block_tokens: int = DEFAULT_BLOCK_TOKENS, max_blocks: int = MAX_BLOCKS) -> None:
        self.block_tokens = block_tokens
        self._max = max(1, max_blocks)
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def match(self, hashes: Sequence[int]) -> int:
        return _leading(hashes, self._blocks)

    def sent(self, hashes: Sequence[int]) -> None:
        blocks = self._blocks
        for one in reversed(hashes[: self._max]):
            blocks[one] = None
            blocks.move_to_end(one)
        while len(blocks) > self._max:
            blocks.popitem(last=False)

    def ended(self, hashes: Sequence[int], whole: Sequence[int]) -> None:
        if whole:
            self.sent(whole)

    def clear(self) -> None:
        self._blocks.clear()

    def __len__(self) -> int:
        return len(self._blocks)


class ToldPrefixes(Prefixes):
    """What an engine says that it has, by its events; and what it computes just now, by what was sent.

    An engine names a block by a hash of its own. Events bring the tokens of stored blocks, so the same blocks are known here by
    ours: `stored` follows the parent. A block whose parent is not known (its event was lost) is left out until it comes again.
    Bounded by the engine's own pages.
    """

    def __init__(self, block_tokens: int = DEFAULT_BLOCK_TOKENS) -> None:
        self.block_tokens = block_tokens
        self._ours: dict[Hash, int] = {}  # the engine's hash -> ours
        self._blocks: Counter[int] = Counter()  # copies: pages of several replicas, media
        self._pending: Counter[int] = Counter()

    def stored(
        self,
        block_hashes: Sequence[Hash],
        parent: Hash | None,
        tokens: Sequence[int],
        root: tuple[str | None, ...],
    ) -> None:
        """The engine has these blocks, which follow one another.

        Args:
            parent: the engine's hash of the block before the first; None: there is none.
            tokens: of all of them.
            root: as for `chain`.
        """
        before = hash(root) if parent is None else self._ours.get(parent)
        if before is None:
            return
        size = self.block_tokens
        for i, name in enumerate(block_hashes):
            before = hash((before, *tokens[i * size : (i + 1) * size]))
            if name not in self._ours:
                self._ours[name] = before
                self._blocks[before] += 1

    def removed(self, block_hashes: Iterable[Hash]) -> None:
        """The engine has these no more."""
        for name in block_hashes:
            ours = self._ours.pop(name, None)
            if ours is not None:
                self._blocks[ours] -= 1
                if self._blocks[ours] <= 0:
                    del self._blocks[ours]

    def match(self, hashes: Sequence[int]) -> int:
        count = 0
        for one in hashes:
            if one not in self._blocks and one not in self._pending:
                break
            count += 1
        return count

    def sent(self, hashes: Sequence[int]) -> None:
        self._pending.update(hashes)

    def ended(self, hashes: Sequence[int], whole: Sequence[int]) -> None:
        pending = self._pending
        for one in hashes:
            pending[one] -= 1
            if pending[one] <= 0:
                del pending[one]

    def clear(self, replica: int | None = None) -> None:
        """Everything is gone; or all of one replica, for an engine whose hashes are (replica, hash)."""
        if replica is None:
            self._ours.clear()
            self._blocks.clear()
        else:
            self.removed([name for name in self._ours if isinstance(name, tuple) and name[0] == replica])

    def __len__(self) -> int:
        return len(self._blocks)


def _leading(hashes: Sequence[int], known: OrderedDict[int, None]) -> int:
    count = 0
    for one in hashes:
        if one not in known:
            break
        count += 1
    return count
