"""Where a text stood before, what came after it there, and how far that is to be trusted."""

from __future__ import annotations

import itertools
import random

import pytest

from serving.engine.api.sampling_params import SamplingParams
from serving.engine.api.types import EngineRequest
from serving.engine.requests.request import Request
from serving.engine.scheduling.drafts import corpus, history
from serving.engine.scheduling.drafts.corpus import Corpora
from serving.engine.scheduling.drafts.guesses import Guesses
from serving.engine.scheduling.drafts.history import History, matched
from serving.engine.scheduling.drafts.rates import Rates


def request(tokens, prompt: int | None = None, **spec) -> Request:
    made = Request(EngineRequest("r", tuple(tokens[:prompt]), SamplingParams(), **spec), 0)
    made.tokens += tokens[len(made.tokens) :]
    return made


@pytest.mark.parametrize("n", [1, 2, 4])
def test_a_history_finds_every_place_by_and_by(n):
    rng = random.Random(n)
    tokens = [rng.randrange(3) for _ in range(20)]
    index = History(tokens, n)
    for _ in range(60):
        index.grow()
        last = tokens[-n:]
        places = [i for i in range(n, len(tokens)) if tokens[i - n : i] == last]
        assert [at for _, at in index.places()] == places[::-1][: history.MOST_TRIED]
        tokens += [rng.randrange(3) for _ in range(rng.randrange(1, 4))]


def test_a_history_keeps_the_last_of_a_long_text(monkeypatch):
    monkeypatch.setattr(history, "MOST_TOKENS", 6)
    tokens = [1, 2, 3, 9, 9, 1, 2, 4, 8, 8, 8, 1, 2]
    index = History(tokens, 2)
    index.grow()
    assert list(index.places()) == []
    tokens += [5, 1, 2]
    index.grow()
    assert [at for _, at in index.places()] == [13]


def test_what_matched_is_counted_up_to_a_bound():
    text = [7, 1, 2, 3, 8, 1, 2, 3]
    assert matched(text, (text, 4), 9) == 3 and matched(text, (text, 4), 2) == 2
    assert matched(text, ([1, 2, 3, 4], 3), 9) == 3


def lookups(made: Request, n: int, **more) -> Guesses:
    index = History(made.tokens, n)

    def lookup():
        index.grow()
        return index.places()

    return Guesses(made, lookup, Rates(), least=n, most=8, **more)


def test_the_longest_match_is_followed_and_the_latest_of_equal_ones():
    made = request([1, 2, 3, 50, 9, 2, 3, 60, 8, 2, 3, 70, 1, 2, 3])
    guesses = lookups(made, 2)
    assert guesses.guess(3)[0] == [50, 9, 2]
    made = request([9, 2, 3, 60, 8, 2, 3, 70, 5, 2, 3])
    assert lookups(made, 2).guess(1)[0] == [70]
    assert lookups(made, 3).guess(1) == ([], [])


def test_a_text_that_repeats_itself_goes_on_repeating():
    guesses = lookups(request([5, 1, 2, 3, 1, 2, 3]), 3)
    assert guesses.guess(8)[0] == [1, 2, 3, 1, 2, 3, 1, 2]
    assert guesses.guess(3, skip=2)[0] == [3, 1, 2], "the first two are being sampled"


def test_guesses_follow_the_text_and_learn_from_it():
    made = request([1, 2, 3, 4, 5, 6, 7, 1, 2])
    guesses = lookups(made, 2)
    before = guesses.guess(1)[1][0]
    for token in (3, 4, 5):
        made.tokens.append(token)
        guesses.follow()
    assert guesses.guess(2)[0] == [6, 7] and guesses.guess(1)[1][0] > before
    made.tokens += [9, 9]
    guesses.follow()
    assert guesses.guess(1)[0] == []


def test_likelihoods_fall_with_each_guess():
    tokens, likely = lookups(request([1, 2, 3, 4, 5, 1, 2]), 2).guess(4)
    assert len(tokens) == 4 and all(a > b > 0 for a, b in itertools.pairwise(likely))


def test_most_of_several_places_decide():
    made = request([1, 2, 7, 5, 1, 2, 8, 5, 1, 2, 7, 6, 1, 2])
    assert lookups(made, 2, many=True, floor=0.6).guess(2)[0] == [7]  # then 5 or 6: as likely
    assert lookups(made, 2, many=True, floor=0.7).guess(2)[0] == []
    assert lookups(made, 2, many=True, factor=1.0).guess(9)[0] == [7, 6]  # two tokens matched


def test_completions_are_kept_apart_and_within_a_bound(monkeypatch):
    corpora = Corpora(3, 2)
    for tenant in ("a", "b"):
        corpora.add(request([0, 1, 2, 3, 4], prompt=1, tenant=tenant))
    mine = corpora.of(request([1, 2], tenant="a"))
    assert [text[at:] for text, at in mine.places([1, 2])] == [[3, 4]]
    for other in ({"tenant": "c"}, {}, {"tenant": "a", "cache_salt": "s"}, {"tenant": "a", "adapter": "x"}):
        assert corpora.of(request([1, 2], **other)) is None
    for last in (7, 8, 9):
        corpora.add(request([0, 1, 2, last], prompt=1, tenant="a"))
    assert [text[at] for text, at in mine.places([1, 2])] == [9, 8, 7]
    assert corpora.of(request([1], tenant="b")) is None and corpora.num_tokens == 9
    monkeypatch.setattr(corpus, "MOST_TOKENS", 6)
    corpora.add(request([0, 5, 6, 7], prompt=1, tenant="a"))
    assert corpora.num_tokens == 6 and [text[at] for text, at in mine.places([1, 2])] == [9]
    corpora.add(request([0, 5], prompt=1, tenant="a"))  # too short to say anything
    assert corpora.num_tokens == 6


def test_rates_lean_on_everybodys_until_a_request_has_its_own():
    everybody = Rates()
    mine, other = Rates(everybody), Rates(everybody)
    for _ in range(30):
        mine.count(5, True)
    assert mine.rate(5) > 0.95 and 0.8 < other.rate(5) < mine.rate(5)
    assert mine.rate(1) == other.rate(1) == everybody.rate(1) < 0.5
    for _ in range(10):
        other.count(5, False)
    assert other.rate(5) < 0.4 < everybody.rate(5)
    for _ in range(600):
        everybody.count(5, False)
    assert everybody.rate(5) < 0.2, "what was long ago counts less"
