"""Compiled grammars that are kept, by what they hold.

A grammar is small when it is compiled. Its lexer grows while it is used, shared by all completions that use it, and
cannot be asked how large it is. What it costs to grow can be measured: the states are built in the time that a mask
takes beyond the few microseconds of a known one. On a vocabulary of 152,000 tokens, nested repetitions grew by 8 to 110
MB a CPU second, 50 in the median (those that grew faster had under 5 MB when they failed), up to about 1.3 kB a state.
"""

from __future__ import annotations

import collections
import threading
import weakref
from typing import Any

from llguidance import LLMatcher

BASE_BYTES = 128 << 10
BYTES_A_CHAR = 64
BYTES_A_SECOND = 64 << 20
BYTES_A_STATE = 2 << 10


class Held:
    """A compiled grammar, and what it is charged.

    Attributes:
        matcher: at its beginning; completions use copies, which share its lexer.
        seconds: CPU time that masks took so far.
        failed: its lexer is full, or cannot go on: it is of no use to others.
    """

    __slots__ = ("__weakref__", "_base", "_most", "failed", "matcher", "seconds")

    def __init__(self, matcher: LLMatcher, num_chars: int, max_states: int) -> None:
        self.matcher = matcher
        self.seconds = 0.0
        self.failed = False
        self._base = BASE_BYTES + BYTES_A_CHAR * num_chars
        self._most = BYTES_A_STATE * max_states

    @property
    def num_bytes(self) -> int:
        return self._base + min(self._most, int(self.seconds * BYTES_A_SECOND))


class HeldGrammars:
    """The least recently used go first, once there are too many or they hold too much. Thread-safe.

    Args:
        max_entries, max_bytes: of what is kept for later requests.
        max_live_bytes: of everything, what running completions hold included: beyond it, those that have grown most
            cannot go on.
    """

    def __init__(self, max_entries: int, max_bytes: int, max_live_bytes: int) -> None:
        self._entries: collections.OrderedDict[str, Held] = collections.OrderedDict()
        self._live: weakref.WeakSet[Held] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._max_entries, self._max_bytes, self._max_live_bytes = max_entries, max_bytes, max_live_bytes

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def num_bytes(self) -> int:
        """What the kept ones are charged."""
        with self._lock:
            return sum(held.num_bytes for held in self._entries.values())

    def get(self, key: str) -> Held | None:
        with self._lock:
            held = self._entries.get(key)
            if held is None or held.failed:
                self._entries.pop(key, None)
                return None
            self._entries.move_to_end(key)
            return held

    def put(self, key: str, held: Held) -> None:
        with self._lock:
            self._entries[key] = held
            self._live.add(held)
            self._trim()

    def grew(self, held: Held) -> str | None:
        """Called when a grammar in use grew by much: forgets others. A sentence, where this one cannot go on."""
        with self._lock:
            self._trim()
            sizes: list[Any] = [other.num_bytes for other in self._live]
        if sum(sizes) > self._max_live_bytes and held.num_bytes >= max(sizes) // 2:
            held.failed = True
            return "the grammars in use take too much memory, and this one is among the largest"
        return None

    def _trim(self) -> None:
        for key in [key for key, held in self._entries.items() if held.failed]:
            del self._entries[key]
        total = sum(held.num_bytes for held in self._entries.values())
        while self._entries and (len(self._entries) > self._max_entries or total > self._max_bytes):
            total -= self._entries.popitem(last=False)[1].num_bytes
