"""Other processes of one engine, as the first one sees them. Implemented over gRPC in `serving/processes`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

from serving.engine.requests.commands import Command

Meet = Callable[[str, int], int]
"""`Followers.least`, as followers have it too."""


class Followers(Protocol):
    """Every process starts in the same way and calls `least` at the same points; then the first one sends commands."""

    def least(self, point: str, value: int) -> int:
        """Waits for every process to come to this point, and returns the smallest of their values.

        Raises:
            ConnectionError: one of them is lost.
        """
        ...

    def send(self, command: Command) -> None:
        """Gives a command to the other processes, which carry out all in this order. Does not wait."""
        ...

    def sampled(self, number: int, tokens: np.ndarray) -> None:
        """What the sampling command number `number` (from 1) gave, to be compared between processes. Does not wait."""
        ...
