"""Where the last tokens of one sequence stood in it before: chains of equal n-grams, as in Lempel and Ziv's compression."""

from __future__ import annotations

from collections.abc import Iterator

MOST_TOKENS = 1 << 16
"""Positions of a sequence that are indexed: its last ones when it begins. About 150 bytes each."""

MOST_TRIED = 16
"""Earlier places that are compared for one lookup, the latest first."""

Place = tuple[list[int], int]
"""A sequence, and the position in it that follows some n-gram."""


class History:
    """The index of a growing sequence.

    Args:
        tokens: the sequence; whoever owns it appends to it.
        n: how many tokens must be equal for a place to be found.
    """

    def __init__(self, tokens: list[int], n: int) -> None:
        self._tokens = tokens
        self._n = n
        self._first = max(0, len(tokens) - MOST_TOKENS)
        self._newest: dict[tuple[int, ...], int] = {}  # n-gram -> the position after its newest place
        self._older: list[int] = []  # of each indexed position, that after the place before; -1 for none
        self._end = self._first  # n-grams that end before this position are indexed

    def grow(self) -> None:
        """Indexes the tokens that were appended, but for the n-gram that the sequence ends with: it has no next token."""
        tokens, n, newest, older = self._tokens, self._n, self._newest, self._older
        start = max(self._end, self._first + n - 1)  # of an n-gram's last token
        if start >= len(tokens) - 1:
            return
        older.extend([-1] * (start - self._first - len(older)))
        part = tokens[start - n + 1 : len(tokens) - 1]
        for position, key in enumerate(zip(*(part[i:] for i in range(n)), strict=False), start + 1):
            older.append(newest.get(key, -1))
            newest[key] = position
        self._end = len(tokens) - 1

    def places(self) -> Iterator[Place]:
        """Positions after earlier places of the sequence's last n tokens, the latest first; some of them, if there are many."""
        tokens = self._tokens
        if len(tokens) <= self._n:
            return
        position = self._newest.get(tuple(tokens[-self._n :]), -1)
        for _ in range(MOST_TRIED):
            if position < 0:
                return
            yield tokens, position
            position = self._older[position - 1 - self._first]


def matched(tokens: list[int], place: Place, most: int) -> int:
    """How many of the last tokens are equal to those before a place, at most `most`."""
    other, position = place
    count = 0
    limit = min(most, position, len(tokens))
    while count < limit and tokens[-1 - count] == other[position - 1 - count]:
        count += 1
    return count
