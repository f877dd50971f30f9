"""A draft model beside the decoder: no token changes, whatever it guesses; pages are shared, moved and preempted for both."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest

from models.config import ModelConfig, RopeConfig
from models.dummy import random_model
from serving.engine.api.sampling_params import SamplingParams
from serving.engine.api.speculative import SpeculativeConfig
from serving.engine.api.types import EngineRequest
from tests.serving.engine.test_drafts import config, every_option, same
from tests.serving.engine.test_engine import alone, run, settle, together
from tests.tiny import VOCAB, own_tiny_model, tiny_engine, tiny_model


@pytest.fixture(scope="module")
def expected():
    """What every request gets without drafts."""
    engine = tiny_engine()
    try:
        yield asyncio.run(together(engine, every_option(), spread=0.0))
    finally:
        engine.shutdown()


MODEL = SpeculativeConfig("draft_model", "a draft", num_speculative_tokens=2, enable_adaptive_verification=False)
SIZES = {"num_pages": 18, "max_num_batched_tokens": 32, "host_pages": 60}
"""Of all engines here that draft: what is compiled is compiled once."""


def small_draft():
    """One layer of other sizes: right now and then, by chance."""
    rope = RopeConfig(10000.0, 8)
    return random_model(ModelConfig("LlamaForCausalLM", VOCAB, 1, 32, 48, 2, 1, 8, 512, 1e-5, rope=rope), seed=4)


@pytest.mark.parametrize(
    "draft", [tiny_model, lambda: own_tiny_model(0.7), pytest.param(small_draft, marks=pytest.mark.slow)],
    ids=["itself", "another", "of-other-sizes"],
)  # fmt: skip
async def test_a_draft_model_changes_no_token(expected, draft):
    """With too few pages, and host memory behind them."""
    e = tiny_engine(config(MODEL), draft=draft(), **SIZES)
    try:
        same(await together(e, every_option(), spread=0.0), expected)
        alone_ = await alone(e, [r for r in every_option() if r.constraint is None][:9])
        same({k.removeprefix("alone-"): v for k, v in alone_.items()}, expected)
        counters = e.scheduler.counters
        assert counters.draft_tokens > 200 and counters.preemptions > 0
        if draft is tiny_model:  # but for what penalties, masks and biases change: those the draft does not know
            assert counters.accepted_tokens > 0.4 * counters.draft_tokens
        else:
            assert 0 < counters.accepted_tokens < counters.draft_tokens
        await settle(e)
        e.runner.guard.check()
    finally:
        e.shutdown()


async def test_a_draft_model_catches_up():
    """After steps without guesses it computes what it has missed, and is right again."""
    e = tiny_engine(config(MODEL), draft=tiny_model(), **SIZES)
    try:
        params = SamplingParams(temperature=0.8, seed=3, max_tokens=60)
        whole = await run(e, EngineRequest("a", (1, 2, 3), params))
        drafts = e.scheduler.drafts
        choose, seen = drafts.choose, []

        def not_at_first(decode, step):
            seen.append(len(decode[0].tokens) if decode else 0)
            return () if len(seen) < 15 else choose(decode, step)

        drafts.choose = not_at_first
        before = dataclasses.replace(e.scheduler.counters)
        again = await run(e, EngineRequest("b", (1, 2, 3), params))
        assert again.token_ids == whole.token_ids
        after = e.scheduler.counters
        verified, accepted = after.draft_tokens - before.draft_tokens, after.accepted_tokens - before.accepted_tokens
        assert verified > 20 and accepted >= verified - 2, "one row may end with the request"
        await settle(e)
    finally:
        e.shutdown()
