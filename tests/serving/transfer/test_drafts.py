"""Pages travel with what a draft model keeps in them: the tokens stay, and its guesses are as good as where they come
from.

Slow: what travels is the same as without drafts, in more arrays.
"""

from __future__ import annotations

import dataclasses

import pytest

from serving.engine.api.speculative import SpeculativeConfig
from tests.serving.engine.test_drafts import config
from tests.serving.engine.test_engine import run, settle
from tests.serving.transfer import local
from tests.serving.transfer.test_two_engines import WAYS, P, apart, prompt, request
from tests.tiny import tiny_engine, tiny_model

pytestmark = pytest.mark.slow

HOW = {
    "draft_model": SpeculativeConfig("draft_model", "a draft", 2, enable_adaptive_verification=False),
    "ngram": SpeculativeConfig(
        "ngram", None, 2, prompt_lookup_min=1, prompt_lookup_max=3, enable_adaptive_verification=False
    ),
}
SIZES = {"max_num_seqs": 2, "max_num_batched_tokens": 32, "num_pages": 60}


@pytest.mark.parametrize("method", HOW)
async def test_pages_of_a_draft_travel(method):
    transport = local.LocalTransport()
    more = {"draft": tiny_model()} if method == "draft_model" else {}
    plain = tiny_engine(**SIZES)
    first = tiny_engine(config(HOW[method]), transfers=dataclasses.replace(WAYS, role="prefill"), **SIZES, **more)
    second = tiny_engine(
        config(HOW[method]), transfers=dataclasses.replace(WAYS, role="decode"), transport=transport, **SIZES, **more
    )
    transport.engines = {P: first}
    try:
        for seed, length in enumerate((1, 9, 40, 77)):
            whole = request(f"r{seed}", prompt(length, seed), max_tokens=40)
            found = await apart((first, second, transport), whole)
            assert found.token_ids == (await run(plain, whole)).token_ids
        counters = second.scheduler.counters
        assert counters.draft_tokens > (
            30 if method == "draft_model" else 10
        )  # lookups find little in prompts of this size
        if method == "draft_model":  # what it has not computed here came with the pages
            assert counters.accepted_tokens >= 0.9 * counters.draft_tokens
        await settle(second)
        second.runner.guard.check()
    finally:
        for engine in (plain, first, second):
            engine.shutdown()
