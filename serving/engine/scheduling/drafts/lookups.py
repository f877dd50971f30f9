"""Drafts that are looked up: in the request's own text, and for `suffix` in recent completions of its tenant."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from serving.engine.api.speculative import SpeculativeConfig
from serving.engine.requests.plan import Chunk
from serving.engine.requests.request import Request
from serving.engine.scheduling.drafts.corpus import Corpora
from serving.engine.scheduling.drafts.guesses import Guesses
from serving.engine.scheduling.drafts.history import History, Place
from serving.engine.scheduling.drafts.rates import Rates

LEAST_MATCH = 2
"""Tokens that must match where a configuration does not say: of single tokens too many stood before."""


class Lookups:
    """A `Source`: methods ngram, suffix and auto.

    Attributes:
        rates: how often guesses are right, of all requests.
    """

    def __init__(self, how: SpeculativeConfig) -> None:
        self.rates = Rates()
        self._how = how
        self._least = how.prompt_lookup_min if how.method == "ngram" else LEAST_MATCH
        others = how.suffix_decoding_max_cached_requests if how.looks_at_others else 0
        self._corpora = Corpora(others, self._least) if others else None

    def begin(self, request: Request) -> Guesses:
        how, corpora, own = self._how, self._corpora, History(request.tokens, self._least)

        def lookup() -> Iterator[Place]:
            own.grow()
            yield from own.places()
            others = None if corpora is None else corpora.of(request)
            if others is not None:
                yield from others.places(request.tokens)

        if how.method == "ngram":
            return Guesses(request, lookup, self.rates, least=self._least, most=how.prompt_lookup_max)
        return Guesses(
            request,
            lookup,
            self.rates,
            least=self._least,
            most=how.suffix_decoding_max_tree_depth,
            many=True,
            floor=how.suffix_decoding_min_token_prob,
            factor=how.suffix_decoding_max_spec_factor,
        )

    def can_draft(self, request: Request) -> bool:
        """A grammar must be able to look ahead."""
        constraint = request.spec.constraint
        return constraint is None or hasattr(constraint, "fill_ahead")

    def ready(self, requests: Sequence[Request], places: int) -> Collection[str]:
        return [request.request_id for request in requests]

    def committed(
        self, decode: Sequence[Request], chunks: Sequence[Chunk], drafts: Sequence[Sequence[int]]
    ) -> tuple[Chunk, ...]:
        return ()

    def end(self, request: Request) -> None:
        """Others may repeat what it wrote."""
        if self._corpora is not None and not request.spec.pooling:
            self._corpora.add(request)
