"""Drafts that are looked up, or a head's where those promise more: method auto of a model whose checkpoint has a head."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from serving.engine.requests.plan import ON_DEVICE, Chunk
from serving.engine.requests.request import Request
from serving.engine.scheduling.drafts.guesses import Guesses
from serving.engine.scheduling.drafts.head import HeadDrafts
from serving.engine.scheduling.drafts.lookups import Lookups
from serving.engine.scheduling.drafts.model import ModelGuesses
from serving.engine.scheduling.drafts.source import Guess


class EitherGuesses:
    """One request's.

    Attributes:
        certain: the last guesses were the head's.
    """

    def __init__(self, looked_up: Guesses, heads: ModelGuesses) -> None:
        self._looked_up, self._heads = looked_up, heads
        self.certain = False

    def follow(self) -> None:
        self._looked_up.follow()

    def guess(self, most: int, skip: int = 0) -> Guess:
        looked_up, heads = self._looked_up.guess(most, skip), self._heads.guess(most, skip)
        self.certain = sum(heads[1]) > sum(looked_up[1])
        return heads if self.certain else looked_up

    def verified(self, drafts: int, accepted: int) -> None:
        if self.certain:
            self._heads.verified(drafts, accepted)


class EitherDrafts:
    """A `Source`."""

    def __init__(self, looked_up: Lookups, heads: HeadDrafts) -> None:
        self._looked_up, self._heads = looked_up, heads
        self.rates = looked_up.rates
        self._of: dict[str, EitherGuesses] = {}

    def begin(self, request: Request) -> EitherGuesses:
        found = self._of[request.request_id] = EitherGuesses(self._looked_up.begin(request), self._heads.begin(request))
        return found

    def can_draft(self, request: Request) -> bool:
        return self._looked_up.can_draft(request)

    def ready(self, requests: Sequence[Request], places: int) -> Collection[str]:
        asked = [r for r in requests if self._of[r.request_id].certain]
        return {r.request_id for r in requests if r not in asked} | self._heads.ready(asked, places)

    def committed(
        self, decode: Sequence[Request], chunks: Sequence[Chunk], drafts: Sequence[Sequence[int]]
    ) -> tuple[Chunk, ...]:
        return self._heads.committed(decode, chunks, [row if ON_DEVICE in row else () for row in drafts])

    def end(self, request: Request) -> None:
        self._of.pop(request.request_id, None)
        self._looked_up.end(request)
        self._heads.end(request)
