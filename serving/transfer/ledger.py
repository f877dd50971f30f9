"""The counts behind `TransferStats`, written from several threads."""

from __future__ import annotations

import threading
from typing import Any

from serving.engine.api.peers.stats import REASONS, TransferStats


class Ledger:
    """Adds up; what leases and waiting requests there are now, their owners say."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[str, Any] = {}
        self._fallbacks = [0] * len(REASONS)

    def add(self, **counts: float) -> None:
        """Adds to fields of TransferStats."""
        with self._lock:
            for name, value in counts.items():
                self._counts[name] = self._counts.get(name, 0) + value

    def fell_back(self, reason: str) -> None:
        """A transfer did not happen, or not wholly."""
        with self._lock:
            self._fallbacks[REASONS.index(reason)] += 1

    def stats(self, **now: int) -> TransferStats:
        """The counts, and these gauges."""
        with self._lock:
            return TransferStats(**self._counts, **now, fallbacks=tuple(self._fallbacks))
