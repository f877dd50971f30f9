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
    return extended([], root, tokens, block_tokens)


def extended(known: Sequence[int], root: tuple[str | None, ...], tokens: Sequence[int], block_tokens: int) -> list[int]:
    """As `chain`, of tokens whose first hashes are `known`."""
    parent = known[-1] if known else hash(root)
    found = list(known)
    for start in range(len(known) * block_tokens, len(tokens) - block_tokens + 1, block_tokens):
        parent = hash((parent, *tokens[start : start + block_tokens]))
        found.append(parent)
    return found


class Holders:
    """Which targets have a block: for each a set of targets, as a sum of their bits. So who has the longest prefix is found by
    going along one chain, however many targets there are."""

    def __init__(self) -> None:
        self._of: dict[int, int] = {}

    def gained(self, block: int, bit: int) -> None:
        """A target has this block now."""
        self._of[block] = self._of.get(block, 0) | bit

    def lost(self, block: int, bit: int) -> None:
        """It has it no more."""
        left = self._of.get(block, 0) & ~bit
        if left:
            self._of[block] = left
        else:
            self._of.pop(block, None)

    def longest(self, hashes: Sequence[int], among: int) -> tuple[int, int]:
        """How many blocks of a chain, from its beginning, those of `among` have that have the most of it, and who they are. Nobody
        has any: 0, and all of them."""
        of = self._of
        for count, block in enumerate(hashes):
            fewer = among & of.get(block, 0)
            if not fewer:
                return count, among
            among = fewer
        return len(hashes), among

    def __len__(self) -> int:
        return len(self._of)


class Prefixes(Protocol):
    """What one engine has."""

    block_tokens: int

    def join(self, holders: Holders, bit: int) -> None:
        """Keeps `holders` told of what is here, from now on, as the target of this bit."""
        ...

    def leave(self) -> None:
        """Takes all of it out of those holders again, and tells them nothing more."""
        ...

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


class _Joined:
    """What both kinds do for the holders that they are told to keep."""

    def __init__(self) -> None:
        self._holders = Holders()
        self._bit = 0

    def _all(self) -> Iterable[int]:
        raise NotImplementedError

    def join(self, holders: Holders, bit: int) -> None:
        """See Prefixes."""
        self.leave()
        self._holders, self._bit = holders, bit
        for block in self._all():
            holders.gained(block, bit)

    def leave(self) -> None:
        """See Prefixes."""
        if self._bit:
            for block in self._all():
                self._holders.lost(block, self._bit)
        self._bit = 0

    def _gained(self, block: int) -> None:
        if self._bit:
            self._holders.gained(block, self._bit)

    def _lost(self, block: int) -> None:
        if self._bit:
            self._holders.lost(block, self._bit)


class RememberedPrefixes(_Joined, Prefixes):
    """What was sent to an engine, in bounded memory: the least recently used block goes first, of a chain its end before its
    beginning, as in the engine's own cache.

    Args:
        max_blocks: what is remembered; the engine's own number of pages is a good bound.
    """

    def __init__(self, block_tokens: int = DEFAULT_BLOCK_TOKENS, max_blocks: int = MAX_BLOCKS) -> None:
        super().__init__()
        self.block_tokens = block_tokens
        self._max = max(1, max_blocks)
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def _all(self) -> Iterable[int]:
        return self._blocks

    def match(self, hashes: Sequence[int]) -> int:
        return _leading(hashes, self._blocks)

    def sent(self, hashes: Sequence[int]) -> None:
        blocks = self._blocks
        for one in reversed(hashes[: self._max]):
            if one in blocks:
                blocks.move_to_end(one)
            else:
                blocks[one] = None
                self._gained(one)
        while len(blocks) > self._max:
            self._lost(blocks.popitem(last=False)[0])

    def ended(self, hashes: Sequence[int], whole: Sequence[int]) -> None:
        if whole:
            self.sent(whole)

    def clear(self) -> None:
        for one in self._blocks:
            self._lost(one)
        self._blocks.clear()

    def __len__(self) -> int:
        return len(self._blocks)


class ToldPrefixes(_Joined, Prefixes):
    """What an engine says that it has, by its events; and what it computes just now, by what was sent.

    An engine names a block by a hash of its own. Events bring the tokens of stored blocks, so the same blocks are known here by
    ours: `stored` follows the parent. A block whose parent is not known (its event was lost) is left out until it comes again.
    Bounded by the engine's own pages.
    """

    def __init__(self, block_tokens: int = DEFAULT_BLOCK_TOKENS) -> None:
        super().__init__()
        self.block_tokens = block_tokens
        self._ours: dict[Hash, int] = {}  # the engine's hash -> ours
        self._blocks: Counter[int] = Counter()  # copies: pages of several replicas, media
        self._pending: Counter[int] = Counter()

    def _all(self) -> Iterable[int]:
        return self._blocks.keys() | self._pending.keys()

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
                self._gained(before)

    def removed(self, block_hashes: Iterable[Hash]) -> None:
        """The engine has these no more."""
        for name in block_hashes:
            ours = self._ours.pop(name, None)
            if ours is not None:
                self._blocks[ours] -= 1
                if self._blocks[ours] <= 0:
                    del self._blocks[ours]
                    if ours not in self._pending:
                        self._lost(ours)

    def match(self, hashes: Sequence[int]) -> int:
        count = 0
        for one in hashes:
            if one not in self._blocks and one not in self._pending:
                break
            count += 1
        return count

    def sent(self, hashes: Sequence[int]) -> None:
        self._pending.update(hashes)
        for one in hashes:
            self._gained(one)

    def ended(self, hashes: Sequence[int], whole: Sequence[int]) -> None:
        pending = self._pending
        for one in hashes:
            pending[one] -= 1
            if pending[one] <= 0:
                del pending[one]
                if one not in self._blocks:
                    self._lost(one)

    def clear(self, replica: int | None = None) -> None:
        """Everything is gone; or all of one replica, for an engine whose hashes are (replica, hash)."""
        if replica is None:
            gone = self._blocks.keys() - self._pending.keys()
            self._ours.clear()
            self._blocks.clear()
            for one in gone:
                self._lost(one)
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
