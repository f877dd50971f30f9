"""Drafts in a simulation: nobody knows what they would be, so they are right as often as one says."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from serving.engine.requests.plan import ON_DEVICE, Chunk, StepPlan
from serving.engine.requests.request import Request
from serving.engine.scheduling.drafts.rates import Rates
from serving.engine.scheduling.drafts.source import Guess


class AssumedGuesses:
    """One request's.

    Args:
        rate: how likely a draft is to be right, where those before it are.
    """

    certain = True

    def __init__(self, rate: float) -> None:
        self._rate = rate

    def follow(self) -> None:
        pass

    def guess(self, most: int, skip: int = 0) -> Guess:
        return [ON_DEVICE] * most, [self._rate ** (place + 1) for place in range(most)]

    def verified(self, drafts: int, accepted: int) -> None:
        pass


class AssumedDrafts:
    """A `Source` whose drafts cost nothing, and are right at one rate."""

    def __init__(self, rate: float) -> None:
        self.rates = Rates()
        self._guesses = AssumedGuesses(rate)

    def begin(self, request: Request) -> AssumedGuesses:
        return self._guesses

    def can_draft(self, request: Request) -> bool:
        return True

    def ready(self, requests: Sequence[Request], places: int) -> Collection[str]:
        return [request.request_id for request in requests]

    def committed(
        self, decode: Sequence[Request], chunks: Sequence[Chunk], drafts: Sequence[Sequence[int]]
    ) -> tuple[Chunk, ...]:
        return ()

    def end(self, request: Request) -> None:
        pass


def tokens_of_rows(plan: StepPlan, rate: float, rng: np.random.Generator) -> np.ndarray:
    """int64 [rows]: how many tokens each sampled row of a step gives."""
    drafts = np.zeros(len(plan.sampled), np.int64)
    drafts[: len(plan.drafts)] = [len(row) for row in plan.drafts]
    right = rng.geometric(1.0 - rate, len(drafts)) - 1 if rate < 1.0 else drafts
    return 1 + np.minimum(drafts, right)
