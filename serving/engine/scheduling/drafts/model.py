"""Drafts of a draft model. The host does not see them; it knows how far the draft model's pages have come, and how often it was
right.

The draft model computes every piece of a prompt that the decoder computes, and every row of a step that has such pieces. In
steps of decode rows alone it only computes what it guesses behind, so without guesses it falls back; what it has missed it
computes in one piece before it guesses again. A cached prefix counts as computed by both.
"""

from __future__ import annotations

from collections.abc import Sequence

from serving.engine.requests.chunks import CHUNK_ALIGN
from serving.engine.requests.plan import ON_DEVICE, Chunk, align
from serving.engine.requests.request import Request
from serving.engine.requests.scheduler_config import SchedulerConfig
from serving.engine.scheduling.drafts.rates import Rates
from serving.engine.scheduling.drafts.source import NONE, Guess

DOUBT = 0.6
"""How often a draft model is taken to be right before it was asked."""

PATIENCE = 64
"""Tokens without a guess after which a request's draft model is asked again, whatever it was like: texts change."""


class ModelGuesses:
    """One request's.

    Attributes:
        computed: positions that the draft model's pages have.
    """

    certain = True

    def __init__(self, request: Request, rates: Rates, capacity: int) -> None:
        self._request = request
        self._rates = Rates(rates)
        self._capacity = capacity
        self._preemptions = request.num_preemptions
        self._last_asked = len(request.tokens)
        self.computed = 0

    def follow(self) -> None:
        pass

    def guess(self, most: int, skip: int = 0) -> Guess:
        known = len(self._request.tokens)
        if self._preemptions != self._request.num_preemptions or self.missed > self._capacity:
            return NONE
        rate = self._rates.rate(1)
        if known - self._last_asked >= PATIENCE:
            rate = max(rate, 1.0 - DOUBT / 4)
        return [ON_DEVICE] * most, [rate ** (place + 1) for place in range(most)]

    def verified(self, drafts: int, accepted: int) -> None:
        for _ in range(accepted):
            self._rates.count(1, True)
        if accepted < drafts:
            self._rates.count(1, False)
        # It took each of its guesses but the last one as a token: those that were right are computed.
        self.computed += min(accepted, drafts - 1)

    @property
    def missed(self) -> int:
        """Positions before the last two tokens, which every guess computes, that its pages lack."""
        return len(self._request.tokens) - 2 - self.computed

    def took(self, start: int, end: int) -> None:
        """It computes positions [start, end) of the request in this step."""
        if self._preemptions != self._request.num_preemptions:
            self._preemptions, self.computed = self._request.num_preemptions, start
        if self.computed >= start:
            self.computed = max(self.computed, end)

    def asked(self) -> None:
        """It guesses in this step, behind all of the request's tokens."""
        self._last_asked = self.computed = len(self._request.tokens)


class ModelDrafts:
    """A `Source`: method draft_model."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.rates = Rates(doubt=DOUBT)
        self._most_rows, self._capacity = config.max_chunk_rows, config.max_chunk_tokens
        self._of: dict[str, ModelGuesses] = {}

    def begin(self, request: Request) -> ModelGuesses:
        found = self._of.get(request.request_id)
        if found is None:
            found = self._of[request.request_id] = ModelGuesses(request, self.rates, self._capacity - CHUNK_ALIGN)
        return found

    def can_draft(self, request: Request) -> bool:
        """What is masked by tokens that the host does not know cannot be."""
        return request.spec.constraint is None and not request.spec.bad_words_token_ids

    def committed(
        self, decode: Sequence[Request], chunks: Sequence[Chunk], drafts: Sequence[Sequence[int]]
    ) -> tuple[Chunk, ...]:
        for chunk in chunks:
            known = chunk.request.request_id in self._of
            guesses = self.begin(chunk.request)
            if not known:
                guesses.computed = chunk.start
            guesses.took(chunk.start, chunk.end)
        if chunks:
            for request in decode:
                self.begin(request).took(request.num_computed, request.num_computed + 1)
        missed: list[Chunk] = []
        places: dict[int, int] = {}  # of each replica, how far its pieces reach
        for request, guessed in zip(decode, drafts, strict=False):
            if not guessed:
                continue
            guesses = self.begin(request)
            if guesses.missed > 0:
                at = places.get(request.replica, 0)
                missed.append(Chunk(request, guesses.computed, guesses.missed, False, at))
                places[request.replica] = at + align(guesses.missed)
            guesses.asked()
        return tuple(missed)

    def ready(self, requests: Sequence[Request]) -> set[str]:
        """Those, in their order, that can all catch up in one step."""
        found: set[str] = set()
        rows: dict[int, int] = {}
        places: dict[int, int] = {}
        for request in requests:
            missed, replica = self.begin(request).missed, request.replica
            if missed > 0:
                if rows.get(replica, 0) == self._most_rows or places.get(replica, 0) + align(missed) > self._capacity:
                    continue
                rows[replica] = rows.get(replica, 0) + 1
                places[replica] = places.get(replica, 0) + align(missed)
            found.add(request.request_id)
        return found

    def end(self, request: Request) -> None:
        self._of.pop(request.request_id, None)
