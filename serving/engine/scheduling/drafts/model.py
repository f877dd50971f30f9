"""Drafts of a draft model. The host does not see them; it knows how far the draft model's pages have come, and how often it was
right.

The draft model computes every piece of a prompt that the decoder computes, and every row of a step that has such pieces. In
steps of decode rows alone it only computes what it guesses behind, so without guesses it falls back; what it has missed it
computes in one piece before it guesses again. A cached prefix counts as computed by both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from serving.engine.requests.chunks import CHUNK_ALIGN
from serving.engine.requests.plan import ON_DEVICE, Chunk, align
from serving.engine.requests.request import Request
from serving.engine.requests.scheduler_config import SchedulerConfig
from serving.engine.scheduling.drafts.rates import Rates
from serving.engine.scheduling.drafts.source import NONE, Guess

HOPE = 0.9
"""How often a draft model is taken to be right before it was asked. More than most are: who is never asked is never known (of two
models of one family, 0.93 in code; taken for 0.6 it was not tried once), and some wrong guesses are soon found out."""

PATIENCE, MOST_PATIENCE = 64, 1024
"""Tokens without a guess after which a request's draft model is asked again, whatever it was like, because texts change; twice as
many each time that it is all wrong."""


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
        self._patience = PATIENCE
        self.computed = 0

    def follow(self) -> None:
        pass

    def guess(self, most: int, skip: int = 0) -> Guess:
        known = len(self._request.tokens)
        if self._preemptions != self._request.num_preemptions or self.missed > self._capacity:
            return NONE
        rate = self._rates.rate(1)
        if known - self._last_asked >= self._patience:
            rate = max(rate, HOPE)
        return [ON_DEVICE] * most, [rate ** (place + 1) for place in range(most)]

    def verified(self, drafts: int, accepted: int) -> None:
        self._patience = PATIENCE if accepted else min(2 * self._patience, MOST_PATIENCE)
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

    def caught_up(self) -> None:
        """It computes in this step all that is known."""
        self.computed = len(self._request.tokens)

    def took(self, start: int, end: int) -> None:
        """It computes positions [start, end) of the request in this step."""
        if self._preemptions != self._request.num_preemptions:
            self._preemptions, self.computed = self._request.num_preemptions, start
        if self.computed >= start:
            self.computed = max(self.computed, end)

    def asked(self) -> None:
        """It guesses in this step, behind all of the request's tokens."""
        self._last_asked = len(self._request.tokens)
        self.caught_up()


class ModelDrafts:
    """A `Source`: method draft_model."""

    Guesses: type[ModelGuesses] = ModelGuesses

    def __init__(self, config: SchedulerConfig) -> None:
        self.rates = Rates(doubt=HOPE)
        self._most_rows, self._capacity = config.max_chunk_rows, config.max_chunk_tokens
        self._of: dict[str, ModelGuesses] = {}

    def begin(self, request: Request) -> ModelGuesses:
        found = self._of.get(request.request_id)
        if found is None:
            found = self._of[request.request_id] = self.Guesses(request, self.rates, self.most_missed)
        return found

    @property
    def most_missed(self) -> int:
        """Positions that can be caught up with."""
        return self._capacity - CHUNK_ALIGN

    def can_draft(self, request: Request) -> bool:
        """A grammar must be able to look ahead. The host asks the device for guesses that it has to mask behind."""
        constraint = request.spec.constraint
        return constraint is None or hasattr(constraint, "fill_ahead")

    def committed(
        self, decode: Sequence[Request], chunks: Sequence[Chunk], drafts: Sequence[Sequence[int]]
    ) -> tuple[Chunk, ...]:
        self._follow(decode, chunks)
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

    def _follow(self, decode: Sequence[Request], chunks: Sequence[Chunk]) -> None:
        """Takes in what a step with pieces of prompts has it compute."""
        for chunk in chunks:
            known = chunk.request.request_id in self._of
            guesses = self.begin(chunk.request)
            if not known:
                guesses.computed = chunk.start
            guesses.took(chunk.start, chunk.end)
        if chunks:
            for request in decode:
                self.begin(request).took(request.num_computed, request.num_computed + 1)

    def ready(self, requests: Sequence[Request], places: int) -> set[str]:
        return self._fitting(requests, lambda missed: missed > 0)

    def _fitting(
        self, requests: Sequence[Request], needs: Callable[[int], bool], taken: int = 0, used: int = 0
    ) -> set[str]:
        """Those, in their order, that can all catch up in one step.

        Args:
            needs: whether one that has missed so many positions has to.
            taken, used: pieces and places of each replica that others have.
        """
        found: set[str] = set()
        rows: dict[int, int] = {}
        places: dict[int, int] = {}
        for request in requests:
            missed, replica = self.begin(request).missed, request.replica
            if needs(missed):
                full = rows.get(replica, taken) >= self._most_rows
                if full or places.get(replica, used) + align(missed) > self._capacity:
                    continue
                rows[replica] = rows.get(replica, taken) + 1
                places[replica] = places.get(replica, used) + align(missed)
            found.add(request.request_id)
        return found

    def end(self, request: Request) -> None:
        self._of.pop(request.request_id, None)
