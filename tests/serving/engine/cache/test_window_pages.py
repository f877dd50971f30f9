"""A real engine over models with windows: pages that come free on the way, and are others' then, change no token."""

from __future__ import annotations

import asyncio

import jax
import pytest

from models.config import ModelConfig, RopeConfig
from models.dummy import random_model
from serving.engine.api.sampling_params import SamplingParams
from serving.engine.api.types import EngineRequest
from tests.tiny import VOCAB, tiny_engine

WINDOW = 12
MIXED = (WINDOW, WINDOW, None, WINDOW, 20)
GROUPS = {1: MIXED, 2: (WINDOW, None, WINDOW, 20), 3: (WINDOW, None, 20)}  # by layers a group: what each attends to
PROMPTS = [[(7 * i + 3 * j) % VOCAB for j in range(n)] for i, n in enumerate((50, 5, 33, 17))]


def windowed(windows):
    rope = RopeConfig(10000.0, 16)
    return random_model(
        ModelConfig(
            "MistralForCausalLM", VOCAB, len(windows), 64, 96, 4, 2, 16, 512, 1e-5, rope=rope, windows=tuple(windows)
        )
    )


@pytest.fixture(scope="module")
def uniform():
    return windowed((WINDOW, WINDOW))


@pytest.fixture(scope="module")
def mixed():
    return windowed(MIXED)


async def complete(engine, prompts, max_tokens=60):
    """Greedy completions of all prompts at once."""

    async def one(i: int) -> list[int]:
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        request = EngineRequest(f"r{i}", tuple(prompts[i]), params)
        return [t async for o in engine.client.generate(request) for t in o.token_ids]

    return list(await asyncio.gather(*(one(i) for i in range(len(prompts)))))


def run(*batches, **options):
    """Completions of batches of prompts one after the other, the engine's counters, and the pages it held at the end."""
    engine = tiny_engine(max_num_batched_tokens=32, **options)

    async def every():
        return [await complete(engine, batch) for batch in batches]

    try:
        tokens = asyncio.run(every())
        assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_pages - 1, "pages leaked"
        engine.scheduler.pool.check()
        engine.runner.guard.check()
        return tokens, engine.scheduler.counters, engine.scheduler
    finally:
        engine.shutdown()


def test_the_same_tokens_from_fewer_pages(uniform):
    pages = {"num_pages": 25, "model": uniform}  # 24 of 8 tokens: the four sequences end at 345
    (wanted,), counters, _ = run(PROMPTS, **pages, windows=(None,))
    assert counters.preemptions > 0
    (tokens,), counters, _ = run(PROMPTS, **pages)
    assert tokens == wanted
    assert counters.preemptions == 0


@pytest.fixture(scope="module")
def wanted(mixed):
    """What the layout that keeps everything, one page table for all layers, gives."""
    (tokens,), _, scheduler = run(PROMPTS, model=mixed)
    assert scheduler.config.windows == (None,)
    return tokens


PAGES = 260  # everything that two rounds of prompts need: engines of as many pages share programs


@pytest.mark.parametrize(
    ("layers", "steps"),
    [(1, 1), (2, 4), (3, 1), *(pytest.param(*one, marks=pytest.mark.slow) for one in ((1, 4), (2, 1), (3, 4)))],
)
def test_the_same_tokens_from_groups_of_layers(mixed, wanted, layers, steps):
    """The second time from pages of the first."""
    tokens, counters, scheduler = run(
        PROMPTS, PROMPTS, model=mixed, layers_per_page=layers, num_pages=PAGES, steps=steps
    )
    assert tokens == [wanted, wanted]
    assert counters.prefix_hits >= sum((len(p) - 1) // 8 * 8 for p in PROMPTS)
    assert scheduler.config.windows == GROUPS[layers]


def test_the_same_tokens_through_preemptions_and_the_host_tier(mixed, wanted):
    """The pool is too small for all, and what is evicted comes back: pages of all groups, or the tokens would be others."""
    tokens, counters, scheduler = run(
        PROMPTS, PROMPTS[::-1], PROMPTS, model=mixed, layers_per_page=1, num_pages=56, host_pages=400
    )
    assert tokens == [wanted, wanted[::-1], wanted]
    assert counters.preemptions > 0 and counters.prefix_hits > 0
    assert scheduler.kv.managers[0].host_tier.num_restored > 0


def test_layers_that_share_an_array_do_not_copy_it(mixed):
    """A program's temporaries do not grow with the pool: every write is in place. (But for a single decode row: XLA fuses its
    write into what reads it, and copies, whether arrays are shared or not. Native kernels and the GPU's do not.)"""
    sizes = []
    for pages in (40, 400):
        engine = tiny_engine(model=mixed, layers_per_page=1, num_pages=pages, steps=4)
        try:
            found = {
                key: program.memory_analysis().temp_size_in_bytes
                for key, program in engine.runner.executor.programs.items()
                if key.kind in ("forward", "decode_loop") and key.shape.tokens > 1
            }
            pool = sum(leaf.nbytes for leaf in jax.tree.leaves(engine.runner.executor._kv))
        finally:
            engine.shutdown()
        sizes.append((found, pool))
    (small, _), (large, pool) = sizes
    assert large.keys() == small.keys()
    for key, temporaries in large.items():
        assert temporaries - small[key] < pool // 20, str(key)
