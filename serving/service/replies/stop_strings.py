"""Finding stop strings in text that arrives in pieces."""

from __future__ import annotations

import functools
from collections.abc import Sequence


class StopMatcher:
    """Passes text on until one of `stops` is complete; holds back what may be the start of one.

    The result does not depend on how the text was cut into pieces: the string that is complete at the earliest
    character wins, and of those that end together the longest. Knuth-Morris-Pratt (1977), one automaton a string:
    64 strings of 1024 characters cost a few microseconds a character, where searching the buffer again for every
    token costs milliseconds.

    Args:
        stops: non-empty strings.
        include: whether the text ends with the stop string or before it.
    """

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        self._stops = [(stop, _failure(stop)) for stop in stops]
        self._states = [0] * len(self._stops)
        self._include = include
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Takes new text; returns what may be shown now. After a match `matched` is set and nothing more comes out."""
        if self.matched is not None:
            return ""
        for i, char in enumerate(text):
            longest = self._advance(char)
            if longest is not None:
                self.matched = longest
                seen = self._held + text[: i + 1]
                self._held = ""
                return seen if self._include else seen[: len(seen) - len(longest)]
        seen = self._held + text
        held = max(self._states, default=0)
        self._held = seen[len(seen) - held :]
        return seen[: len(seen) - held]

    def finish(self) -> str:
        """What was held back, when the text ended otherwise. What comes behind begins anew."""
        held, self._held = self._held, ""
        self._states = [0] * len(self._stops)
        return held

    def _advance(self, char: str) -> str | None:
        found = None
        for k, (stop, failure) in enumerate(self._stops):
            state = self._states[k]
            while state and stop[state] != char:
                state = failure[state - 1]
            if stop[state] == char:
                state += 1
            if state == len(stop):
                if found is None or len(stop) > len(found):
                    found = stop
                state = failure[state - 1]
            self._states[k] = state
        return found


@functools.lru_cache(maxsize=64)  # of 1,024 characters at most: 2.4 MB
def _failure(stop: str) -> tuple[int, ...]:
    """For each prefix of `stop`, the length of its longest proper suffix that is a prefix too."""
    table, state = [0] * len(stop), 0
    for i in range(1, len(stop)):
        while state and stop[i] != stop[state]:
            state = table[state - 1]
        if stop[i] == stop[state]:
            state += 1
        table[i] = state
    return tuple(table)
