"""What came, elsewhere, after the tokens that a request ends with: its guesses, and how likely each is to be right."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from serving.engine.requests.request import Request
from serving.engine.scheduling.drafts.history import Place, matched
from serving.engine.scheduling.drafts.rates import Rates
from serving.engine.scheduling.drafts.source import NONE, Guess

MOST_FOLLOWED = 8
"""Places that are followed at once."""

Lookup = Callable[[], Iterable[Place]]


class Guesses:
    """The places at which a request's text goes on elsewhere. They are looked up when none is left that was right so far, and
    followed from token to token.

    Args:
        lookup: gives places after earlier ones of the request's last tokens, the best first among equals.
        least, most: tokens that must match at a place for it to be followed; and that are compared.
        many: follow all of the places that match longest, and guess what most of them say; else the first of them.
        floor: guesses end where fewer of the places followed than this share say the same.
        factor: at most so many guesses for each token that matched.
    """

    certain = False

    def __init__(
        self,
        request: Request,
        lookup: Lookup,
        rates: Rates,
        *,
        least: int,
        most: int,
        many: bool = False,
        floor: float = 0.0,
        factor: float = 0.0,
    ) -> None:
        self._request = request
        self._lookup = lookup
        self.rates = Rates(rates)
        self._least, self._most = least, most
        self._many, self._floor, self._factor = many, floor, factor
        self._places: list[Place] = []
        self._matched = 0
        self._known = len(request.tokens)
        self._find()

    def follow(self) -> None:
        """Takes in the tokens that the request got since the last call."""
        tokens = self._request.tokens
        while self._known < len(tokens):
            token = tokens[self._known]
            if self._places:
                self.rates.count(self._matched, self._next()[0] == token)
                self._places = [(text, at + 1) for text, at in self._places if text[at] == token and at + 1 < len(text)]
                self._matched += 1
            self._known += 1
        if not self._places:
            self._find()

    def verified(self, drafts: int, accepted: int) -> None:
        """`follow` learns from every token, verified or not."""

    def guess(self, most: int, skip: int = 0) -> Guess:
        """Up to `most` next tokens.

        Args:
            skip: leave out so many of the first, which are being sampled: how likely those are stays in the numbers.
        """
        if not self._places:
            return NONE
        tokens = self._request.tokens
        if self._factor:
            most = min(most, int(self._factor * self._matched))
        found: list[int] = []
        likely: list[float] = []
        places, chance = self._places, 1.0
        while len(found) < most + skip:
            ahead = len(found)
            said = [_at(text, at + ahead, tokens, found) for text, at in places]
            token, share = _most_said(said)
            if token < 0 or share < self._floor:
                break
            places = [place for place, one in zip(places, said, strict=True) if one == token]
            chance *= self.rates.rate(self._matched + ahead)
            found.append(token)
            likely.append(chance)
        return found[skip:], likely[skip:]

    def _next(self) -> tuple[int, float]:
        return _most_said([text[at] for text, at in self._places])

    def _find(self) -> None:
        self._places, self._matched = [], 0
        tokens = self._request.tokens
        for place in self._lookup():
            count = matched(tokens, place, self._most)
            if count < self._least or count < self._matched:
                continue
            if count > self._matched:
                self._places, self._matched = [], count
            if not self._places or (self._many and len(self._places) < MOST_FOLLOWED):
                self._places.append(place)


def _at(text: list[int], at: int, tokens: list[int], found: list[int]) -> int:
    """A place's token; behind the end of the request's own text, that which has been guessed: it repeats itself."""
    if at < len(text):
        return text[at]
    return found[at - len(text)] if text is tokens and at - len(text) < len(found) else -1


def _most_said(said: list[int]) -> tuple[int, float]:
    """The token that most places say, the first of them on ties, and the share of places that say it."""
    if len(said) == 1:
        return said[0], 1.0
    token, count = Counter(said).most_common(1)[0]
    return token, count / len(said)
