"""A bounded share of scripts/fuzz.py: a few hundred cases of each target, always the same ones."""

from __future__ import annotations

import pytest

from tests.fuzz import guided, packed, parsers, protocols
from tests.fuzz.run import INTERNAL, run

CASES = {
    "gguf": 150,
    "tokenizer": 120,
    "template": 60,
    "schema": 200,
    "regex": 200,
    "grammar": 200,
    "ranks": 150,
    "pieces": 100,
    "merges": 100,
}


SLOW = {"video", "document"}
"""Each case is a process of its own."""


@pytest.mark.parametrize(
    "name", [name for name in [*parsers.TARGETS, *packed.TARGETS, *protocols.TARGETS] if name not in SLOW]
)
def test_nothing_crashes_hangs_or_tells(name):
    targets = {**parsers.TARGETS, **packed.TARGETS, **protocols.TARGETS}
    result = run(name, targets[name], CASES.get(name, 300), seed=1)
    assert not result.failures
    assert result.cases == CASES.get(name, 300)


def test_the_watch_sees_what_it_is_for():
    """A case that raises, one that tells a path, and one that leaves a trace are failures."""

    def make(folder):
        def case(rng):
            kind = rng.randrange(3)
            if kind == 0:
                raise KeyError("x")
            return [] if kind == 1 else ['File "/usr/lib/x.py", line 3']

        return case

    result = run("x", make, 30, seed=0)
    assert 0 < result.accepted < 30 and len(result.failures) == 30 - result.accepted
    assert INTERNAL.search("<Thing object at 0x7f0011223344>") and not INTERNAL.search("max_tokens is 3, more than 2.")


@pytest.mark.parametrize("name", sorted(guided.TARGETS))
def test_guided_targets(name, tmp_path):
    """What scripts/fuzz_guided.py runs holds for valid input, and for it cut off anywhere and with a byte changed."""
    one = guided.TARGETS[name](tmp_path)
    for seed in guided.seeds(name, tmp_path):
        one(seed)
        for at in range(0, len(seed), max(1, len(seed) // 40)):
            one(seed[:at])
            one(seed[:at] + bytes([seed[at] ^ 0x41]) + seed[at + 1 :])
