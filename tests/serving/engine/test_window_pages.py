"""A real engine over a model whose every layer has a window: pages that come free on the way change no token."""

from __future__ import annotations

import asyncio

import pytest

from models.config import ModelConfig, RopeConfig
from models.dummy import random_model
from serving.engine.assembly import widest_window
from serving.engine.sampling_params import SamplingParams
from serving.engine.types import EngineRequest
from tests.tiny import VOCAB, tiny_engine

WINDOW = 12
PROMPTS = [[(7 * i + 3 * j) % VOCAB for j in range(n)] for i, n in enumerate((50, 5, 33, 17))]


@pytest.fixture(scope="module")
def model():
    rope = RopeConfig(10000.0, 16)
    return random_model(
        ModelConfig("MistralForCausalLM", VOCAB, 2, 64, 96, 4, 2, 16, 512, 1e-5, rope=rope, windows=(WINDOW, WINDOW))
    )


def complete(engine) -> tuple[list[list[int]], int]:
    """Greedy completions of all prompts at once, and how often one was preempted."""

    async def one(i: int) -> list[int]:
        params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
        return [
            t
            async for o in engine.client.generate(EngineRequest(f"r{i}", tuple(PROMPTS[i]), params))
            for t in o.token_ids
        ]

    async def every() -> list[list[int]]:
        return list(await asyncio.gather(*(one(i) for i in range(len(PROMPTS)))))

    try:
        return asyncio.run(every()), engine.client.stats().num_preemptions
    finally:
        engine.shutdown()


def test_the_same_tokens_from_fewer_pages(model):
    pages = {"num_pages": 25, "model": model}  # 24 of 8 tokens: the four sequences end at 345
    wanted, preempted = complete(tiny_engine(**pages))
    assert preempted > 0
    tokens, preempted = complete(tiny_engine(**pages, window=WINDOW))
    assert tokens == wanted
    assert preempted == 0


def test_widest_window():
    assert widest_window((4, 8, 4)) == 8
    assert widest_window((4, None)) is None
    assert widest_window((None, None)) is None
