"""Where guesses come from, as the planner sees it: `lookups.py`, `model.py` and `head.py` have some."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

from serving.engine.requests.plan import Chunk
from serving.engine.requests.request import Request
from serving.engine.scheduling.drafts.rates import Rates

Guess = tuple[list[int], list[float]]
"""Tokens, and of each how likely it and all before it are to be right."""

NONE: Guess = ([], [])


class Guessing(Protocol):
    """One request's guesses."""

    @property
    def certain(self) -> bool:
        """Whether there are guesses whatever the token is that is being sampled."""
        ...

    def follow(self) -> None:
        """Takes in the tokens that the request got since the last call."""
        ...

    def guess(self, most: int, skip: int = 0) -> Guess:
        """Up to `most` next tokens.

        Args:
            skip: leave out so many of the first, which are being sampled.
        """
        ...

    def verified(self, drafts: int, accepted: int) -> None:
        """So many of its drafts were verified, and so many accepted."""
        ...


class Source(Protocol):
    """All requests' guesses.

    Attributes:
        rates: how often they are right.
    """

    rates: Rates

    def begin(self, request: Request) -> Guessing:
        """A request's, whose first token is being sampled or is known."""
        ...

    def can_draft(self, request: Request) -> bool:
        """Whether drafts of the request can be verified at all."""
        ...

    def ready(self, requests: Sequence[Request], places: int) -> Collection[str]:
        """Ids of those of the requests for which guesses can be had in one step of so many places a row, all together."""
        ...

    def committed(
        self, decode: Sequence[Request], chunks: Sequence[Chunk], drafts: Sequence[Sequence[int]]
    ) -> tuple[Chunk, ...]:
        """A step is about to be dispatched, for requests that have not been advanced yet. Returns what a draft model is to
        compute before it: `StepPlan.caught_up`."""
        ...

    def end(self, request: Request) -> None:
        """The request is over."""
        ...
