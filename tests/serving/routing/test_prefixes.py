"""What a router remembers of engines' caches: bounded, per engine, exact where engines tell."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from serving.routing.prefixes import RememberedPrefixes, ToldPrefixes, chain

ROOT = (None, None)


def test_chains_are_prefixes_of_each_other_and_of_nobody_else():
    tokens = list(range(100))
    whole = chain(ROOT, tokens, 16)
    assert len(whole) == 6
    assert chain(ROOT, tokens[:50], 16) == whole[:3]
    assert not set(chain(("adapter", None), tokens, 16)) & set(whole)
    assert not set(chain((None, "salt"), tokens, 16)) & set(whole)
    assert chain(ROOT, [7, *tokens[1:]], 16)[0] != whole[0]
    assert chain(ROOT, tokens[:15], 16) == []


def test_the_least_recent_prefix_goes_first_and_its_end_before_its_beginning():
    known = RememberedPrefixes(4, max_blocks=6)
    first, second = chain(ROOT, range(16), 4), chain(ROOT, range(100, 112), 4)
    known.sent(first)
    known.sent(second)
    assert len(known) == 6
    assert known.match(first) == 3 and known.match(second) == 3  # the last block of the older one gave way
    known.sent(first[:2])  # which makes them recent
    known.sent(chain(ROOT, range(200, 208), 4))
    assert known.match(first) == 2 and known.match(second) == 2


def test_a_prompt_longer_than_all_that_is_remembered_keeps_its_beginning():
    known = RememberedPrefixes(1, max_blocks=3)
    hashes = chain(ROOT, range(10), 1)
    known.sent(hashes)
    assert known.match(hashes) == 3 and len(known) == 3


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=40))
def test_memory_is_bounded_and_what_matches_was_sent(prompts):
    known, ever = RememberedPrefixes(2, max_blocks=8), set()
    for prompt in prompts:
        hashes = chain(ROOT, prompt, 2)
        assert set(hashes[: known.match(hashes)]) <= ever
        known.sent(hashes)
        ever |= set(hashes)
        assert len(known) <= 8
        assert known.match(hashes) == len(hashes[:8])


def test_events_are_followed_by_the_engines_own_names():
    known = ToldPrefixes(4)
    tokens = list(range(12))
    ours = chain(ROOT, tokens, 4)
    known.stored([b"a"], None, tokens[:4], ROOT)
    known.stored([b"b", b"c"], b"a", tokens[4:], ROOT)
    assert known.match(ours) == 3 and len(known) == 3
    known.removed([b"c", b"never"])
    assert known.match(ours) == 2
    known.stored([b"z"], b"unknown", tokens[:4], ROOT)  # its parent's event was lost
    assert len(known) == 2
    known.stored([b"a2"], None, tokens[:4], ROOT)  # a second copy
    known.removed([b"a"])
    assert known.match(ours) == 2
    known.removed([b"a2"])
    assert known.match(ours) == 0
    known.clear()
    assert len(known) == 0


def test_what_is_being_computed_counts_until_it_ends():
    known = ToldPrefixes(4)
    hashes = chain(ROOT, range(8), 4)
    known.sent(hashes)
    known.sent(hashes)
    known.ended(hashes, hashes)
    assert known.match(hashes) == 2
    known.ended(hashes, hashes)
    assert known.match(hashes) == 0  # the engine's events say what is left of it


def test_told_prefixes_agree_with_a_set_of_sequences():
    rng, known, there = random.Random(3), ToldPrefixes(2), {}
    for _ in range(500):
        tokens = [rng.randrange(2) for _ in range(8)]
        if rng.random() < 0.6:
            names = [("own", tuple(tokens[: 2 * i + 2])) for i in range(4)]
            for i, name in enumerate(names):
                known.stored([hash(name)], hash(names[i - 1]) if i else None, tokens[2 * i : 2 * i + 2], ROOT)
                there[name] = True
        elif there:
            name = rng.choice(list(there))
            gone = [one for one in there if one[1][: len(name[1])] == name[1]]  # an engine evicts ends first
            known.removed([hash(one) for one in gone])
            for one in gone:
                del there[one]
        probe = [rng.randrange(2) for _ in range(8)]
        want = 0
        while want < 4 and ("own", tuple(probe[: 2 * want + 2])) in there:
            want += 1
        assert known.match(chain(ROOT, probe, 2)) == want
