"""Drafts change no token: with every option, alone and in company, whatever else the scheduler does."""

from __future__ import annotations

import asyncio
import dataclasses
import random

import numpy as np
import pytest

from serving.engine.api.config import EngineConfig
from serving.engine.api.sampling_params import SamplingParams
from serving.engine.api.speculative import SpeculativeConfig
from serving.engine.api.types import EngineRequest, FinishReason
from tests.serving.engine import grammars
from tests.serving.engine.test_engine import Alternating, alone, make_requests, run, settle, together
from tests.tiny import VOCAB, tiny_engine

NGRAM = SpeculativeConfig(
    "ngram", num_speculative_tokens=4, prompt_lookup_min=1, prompt_lookup_max=4, enable_adaptive_verification=False
)
SUFFIX = SpeculativeConfig("suffix", num_speculative_tokens=4, enable_adaptive_verification=False)


class Ahead(Alternating):
    """The same constraint, which looks ahead."""

    def fill_ahead(self, drafts, mask_QW: np.ndarray) -> None:
        seen = list(self.seen)
        for place in range(len(drafts) + 1):
            self.fill_mask(mask_QW[place])
            if place == len(drafts) or drafts[place] % 2 != len(self.seen) % 2:
                break
            self.seen.append(drafts[place])
        self.seen = seen


def every_option() -> list[EngineRequest]:
    """Those of `make_requests`, and what the host masks: a constraint of our own, real grammars and tool calls, bad words. A
    constraint is one completion's: requests are made anew each time."""
    more = [
        EngineRequest(
            f"g{i}", (5 + i, 6, 7), SamplingParams(temperature=i % 2, seed=i, max_tokens=30), constraint=Ahead(20 + i)
        )
        for i in range(4)
    ]
    written = tuple(grammars.tokenizer().encode('{"kind": "red", "n": 12, "tags": ["ab", "ab"]} abcabcab-1212'))
    more += [
        EngineRequest(
            f"text{i}",
            written[i:],
            SamplingParams(temperature=0.8 * (i % 2), seed=i, max_tokens=40),
            constraint=constraint,
            eos_token_ids=(grammars.END,),
        )
        for i, constraint in enumerate(grammars.constraints())
    ]
    words = EngineRequest(
        "words",
        (9, 9),
        SamplingParams(temperature=0, max_tokens=20),
        bad_words_token_ids=tuple((i, i) for i in range(VOCAB)),
    )
    return [*make_requests(27, seed=4), *more, words]


@pytest.fixture(scope="module")
def expected():
    """What every request gets without drafts."""
    engine = tiny_engine()
    try:
        yield asyncio.run(together(engine, every_option(), spread=0.0))
    finally:
        engine.shutdown()


class Oracle:
    """Knows a request's tokens beforehand, and lies at times."""

    def __init__(self, expected: dict, rng: random.Random) -> None:
        self.expected, self.rng = expected, rng

    def __call__(self, request):
        tokens = list(self.expected[request.request_id.removeprefix("alone-")].token_ids)
        rng = self.rng

        class Guesses:
            certain = False

            def verified(self, drafts: int, accepted: int) -> None:
                assert 0 <= accepted <= drafts

            def guess(self, most: int, skip: int = 0):
                true = tokens[request.num_output + skip :][: rng.randrange(most + 1)]
                drafts = [(t + 1) % VOCAB if rng.random() < 0.2 else t for t in true]
                return drafts, [0.5] * len(drafts)

        return Guesses()


def same(got: dict, expected: dict) -> None:
    """Tokens, reasons and numbers."""
    assert {k: v.token_ids for k, v in got.items()} == {k: expected[k].token_ids for k in got}
    assert {k: v.finish_reason for k, v in got.items()} == {k: expected[k].finish_reason for k in got}
    for name, out in got.items():
        assert [(e.token_id, e.rank) for e in out.logprobs] == [(e.token_id, e.rank) for e in expected[name].logprobs]
        numbers = [entry.logprob for entry in expected[name].logprobs]
        assert [entry.logprob for entry in out.logprobs] == pytest.approx(numbers, abs=1e-4)


def config(how: SpeculativeConfig = NGRAM, **more) -> EngineConfig:
    return EngineConfig(page_size=8, progress=False, speculative_config=how, **more)


@pytest.fixture(scope="module")
def engine():
    """One that drafts; its programs are those of the others here."""
    e = tiny_engine(config())
    yield e
    e.shutdown()
    e.runner.guard.check()


@pytest.mark.parametrize("how", [NGRAM, SUFFIX], ids=lambda how: how.method)
async def test_a_method_changes_no_token(engine, expected, how):
    e = engine if how is NGRAM else tiny_engine(config(how))
    try:
        counters = e.scheduler.counters
        same(await together(e, every_option()), expected)
        same({k.removeprefix("alone-"): v for k, v in (await alone(e, every_option())).items()}, expected)
        assert counters.draft_tokens > 100
        if how is SUFFIX:  # every completion was there before; a random model repeats nothing of its own
            assert counters.accepted_tokens > 100
        assert sum(counters.accepted_per_pos) == counters.accepted_tokens and len(counters.accepted_per_pos) == 4
        await settle(e)
    finally:
        if e is not engine:
            e.shutdown()


@pytest.mark.parametrize(
    ("more", "sizes"),
    [
        ({}, {}),
        ({"async_scheduling": False}, {}),
        ({"enable_prefix_caching": False}, {"steps": 4, "max_num_batched_tokens": 32}),
        ({}, {"num_pages": 18, "host_pages": 60}),
    ],
    ids=["plain", "synchronous", "several-steps-no-sharing-small-budget", "preemption-host-tier"],
)
async def test_right_and_wrong_drafts_change_no_token(expected, more, sizes):
    e = tiny_engine(config(**more), **sizes)
    e.scheduler.drafts._guesses = Oracle(expected, random.Random(3))
    try:
        same(await together(e, every_option(), spread=0.0), expected)
        counters = e.scheduler.counters
        assert 50 < counters.accepted_tokens < counters.draft_tokens
        if "num_pages" in sizes:
            assert counters.preemptions > 0
        await settle(e)
        e.runner.guard.check()
    finally:
        e.shutdown()


async def test_a_constraint_that_cannot_look_ahead_is_given_no_drafts(engine, expected):
    before = engine.scheduler.counters.drafts
    for name in ("g0", "g1"):
        (request,) = (r for r in every_option() if r.request_id == name)
        out = await run(engine, dataclasses.replace(request, constraint=Alternating(request.constraint.count)))
        assert out.token_ids == expected[name].token_ids and out.finish_reason is FinishReason.STOP
    assert engine.scheduler.counters.drafts == before


async def test_stops_and_limits_amid_drafts(engine):
    """Whichever token ends a completion, nothing behind it goes out."""
    prompt = (3, 1, 4, 1, 5)
    whole = (await run(engine, EngineRequest("w", prompt, SamplingParams(temperature=0, max_tokens=40)))).token_ids
    for end in (7, 8, 9, 10, 11):
        out = await run(engine, EngineRequest(f"l{end}", prompt, SamplingParams(temperature=0, max_tokens=end)))
        assert out.token_ids == whole[:end] and out.finish_reason is FinishReason.LENGTH
        stop = whole[end]
        params = SamplingParams(temperature=0, max_tokens=40, stop_token_ids=(stop,), min_tokens=end)
        out = await run(engine, EngineRequest(f"s{end}", prompt, params))
        assert out.finish_reason is FinishReason.STOP and out.stop_reason == stop == out.token_ids[-1]
    await settle(engine)
