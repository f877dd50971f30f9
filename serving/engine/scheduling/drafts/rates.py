"""How often guesses are right, by how much of the text before them matched: what makes them worth verifying or not.

Every token that a request gets is held against what would have been guessed, whether it was verified or not. So a request
whose text repeats nothing costs nothing to find out, and one that begins to copy is noticed within some tokens.
"""

from __future__ import annotations

from bisect import bisect_left

MATCHED = (1, 2, 3, 4, 6, 8, 12, 16, 24)
"""Upper bounds of the classes of guesses, in tokens that matched; one more for those above."""

MEMORY = 256.0
"""Guesses of a class after which the older ones count half as much."""

PRIOR = 4.0
"""Guesses after which what a class was found to be counts as much as what it is taken for: everybody's rate, for a request."""

DOUBT = 0.25
"""What is taken for the rate of the first class before it was seen. That of another one is the rate of the one below it."""


class Rates:
    """Counts of one kind of guess. Those of a request lean on everybody's.

    Args:
        everybody: None for everybody's own.
        doubt: of everybody's, what the first class is taken for.
    """

    __slots__ = ("_all", "_doubt", "_everybody", "_right")

    def __init__(self, everybody: Rates | None = None, doubt: float = DOUBT) -> None:
        self._doubt = doubt
        self._right = [0.0] * (len(MATCHED) + 1)
        self._all = [0.0] * (len(MATCHED) + 1)
        self._everybody = everybody

    def rate(self, matched: int) -> float:
        """How likely a guess is to be right behind so many tokens that matched."""
        group = bisect_left(MATCHED, matched)
        if self._everybody is not None:
            return (self._right[group] + PRIOR * self._everybody.rate(matched)) / (self._all[group] + PRIOR)
        rate = self._doubt
        for right, count in zip(self._right[: group + 1], self._all[: group + 1], strict=True):
            rate = (right + PRIOR * rate) / (count + PRIOR)
        return rate

    def count(self, matched: int, right: bool) -> None:
        """A guess turned out right or wrong."""
        group = bisect_left(MATCHED, matched)
        if self._all[group] >= MEMORY:
            self._right[group] /= 2
            self._all[group] /= 2
        self._right[group] += right
        self._all[group] += 1
        if self._everybody is not None:
            self._everybody.count(matched, right)
