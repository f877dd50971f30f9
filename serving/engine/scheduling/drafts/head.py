"""Drafts of a head. As a draft model's, but that a head needs the decoder's hidden states, which are kept of a sequence's last
positions only: it catches up before they are written over, whether it guesses or not.
"""

from __future__ import annotations

from collections.abc import Sequence

from serving.engine.requests.plan import HEARD, Chunk, align
from serving.engine.requests.request import Request
from serving.engine.requests.scheduler_config import SchedulerConfig
from serving.engine.scheduling.drafts.model import ModelDrafts, ModelGuesses

LATE = 24
"""Positions that a head may be behind before it catches up without being asked."""

SPARE = 4
"""Positions that steps in flight may have written beyond those that the host knows of, wrong drafts not counted."""


class HeadGuesses(ModelGuesses):
    """One request's. What a head makes of a position needs the token behind it: of n tokens it can have n - 1 positions."""

    @property
    def missed(self) -> int:
        """Positions that its pages lack, at least one: the last one is what it guesses from."""
        return max(1, len(self._request.tokens) - 1 - self.computed)

    def verified(self, drafts: int, accepted: int) -> None:
        """Its own guesses are computed anew, beside the decoder's hidden states and not its own."""
        computed = self.computed
        super().verified(drafts, accepted)
        self.computed = computed

    def caught_up(self) -> None:
        self.computed = len(self._request.tokens) - 1


class HeadDrafts(ModelDrafts):
    """A `Source`: methods mtp and eagle3. `StepPlan.caught_up` has all that a request's head has missed, its last position too."""

    Guesses = HeadGuesses

    def __init__(self, config: SchedulerConfig, draft_tokens: int) -> None:
        super().__init__(config)
        self._lost = HEARD - draft_tokens - SPARE  # who is later is too late: its hidden states are written over
        self._late = min(LATE, self._lost // 2)

    @property
    def most_missed(self) -> int:
        return min(super().most_missed, self._lost)

    def ready(self, requests: Sequence[Request], places: int) -> set[str]:
        return self._fitting(requests, lambda missed: missed > places)

    def committed(
        self, decode: Sequence[Request], chunks: Sequence[Chunk], drafts: Sequence[Sequence[int]]
    ) -> tuple[Chunk, ...]:
        self._follow(decode, chunks)
        if chunks:
            return ()
        asked = [request for request, guessed in zip(decode, drafts, strict=False) if guessed]
        late = [
            request
            for request in decode
            if request not in asked
            and request.request_id in self._of
            and self._late < self.begin(request).missed <= self._lost
        ]
        # Of those that are late as many as fit: the others come next, there is time.
        places = 1 + max(map(len, drafts), default=0)
        first = [align(missed) for r in asked if (missed := self.begin(r).missed) > places]
        fitting = self._fitting(late, lambda _: True, len(first), sum(first))
        pieces: list[Chunk] = []
        for request in (*asked, *(r for r in late if r.request_id in fitting)):
            guesses = self._of[request.request_id]
            end = len(request.tokens) - 1
            pieces.append(Chunk(request, end - guesses.missed, guesses.missed, False, 0))
            guesses.caught_up()
        for request in asked:
            self._of[request.request_id].asked()
        return tuple(pieces)
