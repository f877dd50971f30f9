"""Recent completions, in which others' next tokens are looked up: of one tenant, and of no other.

Whoever shares a corpus could learn from how fast its answers come what others were told. So completions are kept apart by
whatever keeps pages apart: the tenant, the salt, and the adapter, which writes otherwise.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from serving.engine.requests.request import Request
from serving.engine.scheduling.drafts.history import MOST_TRIED, Place

MOST_TOKENS = 1 << 17
"""Tokens of completions that all tenants together keep: some 40 MB with their index."""

MOST_OF_ONE = 1 << 13
"""Tokens of one completion that are kept: its last ones."""

Owner = tuple[str | None, str | None, str | None]


class Corpus:
    """The completions of one owner.

    Args:
        n: how many tokens must be equal for a place to be found.
    """

    def __init__(self, n: int) -> None:
        self._n = n
        self._places: dict[tuple[int, ...], list[Place]] = {}
        self._texts: deque[list[int]] = deque()

    def __len__(self) -> int:
        return len(self._texts)

    def add(self, tokens: list[int]) -> int:
        """Takes a completion in; returns how many of its tokens are kept."""
        text = list(tokens[-MOST_OF_ONE:])
        self._texts.append(text)
        for position, key in self._keys(text):
            self._places.setdefault(key, []).append((text, position))
        return len(text)

    def forget_oldest(self) -> int:
        """Drops the oldest completion; returns how many tokens it had."""
        text = self._texts.popleft()
        for _, key in self._keys(text):
            places = self._places[key]
            del places[0]  # they came in the order in which completions did
            if not places:
                del self._places[key]
        return len(text)

    def places(self, tokens: list[int]) -> Iterator[Place]:
        """Positions after the last n of these tokens, in the latest completions first; some of them, if there are many."""
        if len(tokens) < self._n:
            return
        found = self._places.get(tuple(tokens[-self._n :]))
        if found is not None:
            for i in range(1, 1 + min(MOST_TRIED, len(found))):
                yield found[-i]

    def _keys(self, text: list[int]) -> Iterator[tuple[int, tuple[int, ...]]]:
        """(position behind it, n-gram) of each n-gram that has a next token."""
        n = self._n
        return enumerate(zip(*(text[i : len(text) - n + i] for i in range(n)), strict=True), n)


class Corpora:
    """Everybody's completions, within one bound.

    Args:
        most: completions that are kept, of all owners together.
        n: as in Corpus.
    """

    def __init__(self, most: int, n: int) -> None:
        self.num_tokens = 0
        self._most = most
        self._n = n
        self._corpora: dict[Owner, Corpus] = {}
        self._order: deque[Owner] = deque()  # whose completion came, oldest first

    def of(self, request: Request) -> Corpus | None:
        """What a request may look in; None where there is nothing yet."""
        return self._corpora.get(_owner(request))

    def add(self, request: Request) -> None:
        """Takes a request's completion in, and drops the oldest ones of all where that is too much."""
        tokens = request.tokens[request.prompt_len :]
        if len(tokens) <= self._n:
            return
        owner = _owner(request)
        self.num_tokens += self._corpora.setdefault(owner, Corpus(self._n)).add(tokens)
        self._order.append(owner)
        while len(self._order) > self._most or self.num_tokens > MOST_TOKENS:
            oldest = self._order.popleft()
            self.num_tokens -= self._corpora[oldest].forget_oldest()
            if not len(self._corpora[oldest]):
                del self._corpora[oldest]


def _owner(request: Request) -> Owner:
    spec = request.spec
    return spec.tenant, spec.cache_salt, spec.adapter
