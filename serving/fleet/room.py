"""Who gives way when a model needs memory. Plain numbers in, names out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Resident:
    """A model that takes memory.

    Attributes:
        bytes: what it takes.
        gives: what of that it gives back when it goes to sleep; 0 while it sleeps.
        busy: requests run with it, or wait to.
        pinned: it never gives way.
        used: when it was last asked for, in seconds.
        since: when it was loaded or woken, in seconds.
    """

    name: str
    bytes: int
    gives: int
    busy: bool
    pinned: bool
    used: float
    since: float


class NoRoomError(Exception):
    """A model does not fit, whoever gives way."""

    def __init__(self, fixed: int) -> None:
        super().__init__(f"{fixed} bytes are taken by those that stay")
        self.fixed = fixed


def who_leaves(
    need: int, memory: int, residents: Sequence[Resident], *, now: float, turn_s: float
) -> tuple[str, ...] | None:
    """The names of those that go to sleep so that `need` more bytes fit into `memory`: idle ones, the one first that nobody has
    asked for the longest; then, of the busy, those that have had a turn of `turn_s` seconds, the one first whose turn is the
    longest.

    Returns:
        None where somebody has to go idle, or to have had a turn, first.
    Raises:
        NoRoomError: it would not even fit if all went that may.
    """
    missing = need - (memory - sum(one.bytes for one in residents))
    movable = [one for one in residents if one.gives and not one.pinned]
    if missing > sum(one.gives for one in movable):
        raise NoRoomError(sum(one.bytes for one in residents) - sum(one.gives for one in movable))
    idle = sorted((one for one in movable if not one.busy), key=lambda one: one.used)
    busy = sorted((one for one in movable if one.busy and now - one.since >= turn_s), key=lambda one: one.since)
    leaving: list[str] = []
    for one in (*idle, *busy):
        if missing <= 0:
            break
        leaving.append(one.name)
        missing -= one.gives
    return tuple(leaving) if missing <= 0 else None


def next_turn_end(residents: Sequence[Resident], *, now: float, turn_s: float) -> float | None:
    """Seconds until the next of the busy has had its turn; None where nobody is busy that may go."""
    ends = [one.since + turn_s - now for one in residents if one.busy and one.gives and not one.pinned]
    return max(0.0, min(ends)) if ends else None
