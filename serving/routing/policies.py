"""The policies: which target a request goes to, and why. Each is told the healthy targets that can run it."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable, Sequence
from typing import Protocol

from serving.routing.targets import Target, load_of


@dataclasses.dataclass(frozen=True)
class Balance:
    """When a target has so much to do that what it has cached is no reason to go there.

    Attributes:
        cache_threshold: share of a prompt that has to be cached somewhere for the cache to decide, 0..1.
        abs_threshold, rel_threshold: a target is overloaded when it has over `abs_threshold` requests more than the least loaded
            one, and over `rel_threshold` times as many.
        kv_threshold: or when so much of its pages is in use, 0..1, while another target has less.
    """

    cache_threshold: float = 0.3
    abs_threshold: int = 8
    rel_threshold: float = 1.5
    kv_threshold: float = 0.95

    def __post_init__(self) -> None:
        for name, low, high in (("cache_threshold", 0, 1), ("kv_threshold", 0, 1)):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"{name} must be between {low} and {high}, got {value}.")
        if self.abs_threshold < 0:
            raise ValueError(f"balance_abs_threshold must be at least 0, got {self.abs_threshold}.")
        if self.rel_threshold < 1:
            raise ValueError(f"balance_rel_threshold must be at least 1, got {self.rel_threshold}.")

    def overload(self, target: Target, able: Sequence[Target]) -> str | None:
        """Why a target should be spared beside the others: "imbalance", "kv"; None where it need not."""
        least = min(map(load_of, able))
        if target.load - least > self.abs_threshold and target.load > self.rel_threshold * least:
            return "imbalance"
        if target.kv_usage >= self.kv_threshold and any(one.kv_usage < self.kv_threshold for one in able):
            return "kv"
        return None


@dataclasses.dataclass(frozen=True)
class Pick:
    """A policy's choice, with the reason in a word."""

    target: Target
    reason: str


class Match(Protocol):
    """What the targets have of a request's prompt."""

    def longest(self, able: Sequence[Target]) -> tuple[int, list[Target]]:
        """The most tokens of it that any of them has, and who has so many; 0 and nobody where none has any."""
        ...

    def remembered(self, target: Target) -> int:
        """How many blocks of whatever a target has in all."""
        ...


class Policy(Protocol):
    """Chooses a target; may keep state of its own. `able` is never empty."""

    uses_prefixes: bool

    def pick(self, able: Sequence[Target], prompt_tokens: int, match: Match) -> Pick: ...


class RoundRobin(Policy):
    """One after the other, whatever they have to do."""

    uses_prefixes = False

    def __init__(self, balance: Balance, seed: int = 0) -> None:
        self._turn = itertools.count()

    def pick(self, able: Sequence[Target], prompt_tokens: int, match: Match) -> Pick:
        return Pick(able[next(self._turn) % len(able)], "turn")


class Random(Policy):
    """Any of them."""

    uses_prefixes = False

    def __init__(self, balance: Balance, seed: int = 0) -> None:
        self._random = random.Random(seed)

    def pick(self, able: Sequence[Target], prompt_tokens: int, match: Match) -> Pick:
        return Pick(self._random.choice(able), "random")


class PowerOfTwo(Policy):
    """The less loaded of two that are drawn: many routers that know little of each other do not all choose the same."""

    uses_prefixes = False

    def __init__(self, balance: Balance, seed: int = 0) -> None:
        self._random = random.Random(seed)

    def pick(self, able: Sequence[Target], prompt_tokens: int, match: Match) -> Pick:
        drawn = self._random.sample(list(able), min(2, len(able)))
        return Pick(min(drawn, key=load_of), "load")


class LeastLoaded(Policy):
    """The one with the fewest requests; equal ones take turns."""

    uses_prefixes = False

    def __init__(self, balance: Balance, seed: int = 0) -> None:
        pass

    def pick(self, able: Sequence[Target], prompt_tokens: int, match: Match) -> Pick:
        return Pick(_least(able), "load")


class Cache(Policy):
    """The one that has the longest part of the prompt, unless that is short or the target is overloaded: then the least loaded
    one, of equal ones the one that remembers the least."""

    uses_prefixes = True

    def __init__(self, balance: Balance, seed: int = 0) -> None:
        self._balance = balance

    def pick(self, able: Sequence[Target], prompt_tokens: int, match: Match) -> Pick:
        tokens, having = match.longest(able)
        reason = "load"
        if tokens and tokens >= self._balance.cache_threshold * prompt_tokens:
            best = _least(having)
            overload = self._balance.overload(best, able)
            if overload is None:
                return Pick(best, "prefix")
            reason = overload
            if overload == "kv":
                able = [one for one in able if one.kv_usage < self._balance.kv_threshold]
        return Pick(_least(able, match.remembered), reason)


def _least(able: Sequence[Target], more: Callable[[Target], int] = lambda one: 0) -> Target:
    """The least loaded target; of equal ones that with the least of `more`, and of these the one that was given the fewest
    requests so far."""
    least = min(map(load_of, able))
    equal = [one for one in able if one.load == least]
    return equal[0] if len(equal) == 1 else min(equal, key=lambda one: (more(one), one.routed))


POLICIES: dict[str, Callable[[Balance, int], Policy]] = {
    "cache": Cache,
    "least-loaded": LeastLoaded,
    "power-of-two": PowerOfTwo,
    "random": Random,
    "round-robin": RoundRobin,
}
"""By the name that `--policy` takes."""
