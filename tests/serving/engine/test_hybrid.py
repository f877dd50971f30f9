"""The engine on a tiny model with recurrent layers: states and snapshots change no token, whoever shares what."""

from __future__ import annotations

import asyncio
import random
import time

import pytest

from models.config import ModelConfig, RopeConfig
from models.dummy import random_model
from models.mixers import DeltaNet
from serving.engine.api.config import EngineConfig
from serving.engine.api.sampling_params import SamplingParams
from serving.engine.api.speculative import SpeculativeConfig
from serving.engine.api.types import EngineRequest
from tests.tiny import VOCAB, one_width, tiny_engine

DELTA = DeltaNet(2, 16, 4, 16)
HYBRID = ModelConfig(
    "Qwen3_5ForCausalLM", VOCAB, 2, 64, 96, 4, 2, 16, 512, 1e-5, rope=RopeConfig(1e4, 4), qk_norm="head", attn_gate=True,
    mixers=(DELTA, None), tie_embeddings=True,
)  # fmt: skip
PAGES = 40
SNAPSHOTS = {"interval": 24, "tail": 8, "worth": 8}


def hybrid_engine(num_snapshots=12, **options):
    model = random_model(HYBRID, seed=3)
    with one_width():
        return tiny_engine(
            model=model, num_snapshots=num_snapshots, snapshots=SNAPSHOTS, max_num_batched_tokens=32, **options
        )


class Unshared:
    """An engine that shares nothing, and has pages for all that it runs at a time: what it answers, computed once."""

    def __init__(self):
        without = EngineConfig(page_size=8, progress=False, enable_prefix_caching=False)
        self.engine = hybrid_engine(config=without, num_pages=PAGES)
        self.known: dict[tuple[int, ...], list[int]] = {}

    def __call__(self, prompt, count):
        """A greedy completion of so many tokens."""
        self.learn([prompt], [count])
        return self.known[tuple(prompt)][:count]

    def learn(self, prompts, counts):
        """Computes what is not known yet, three at a time."""
        wanted: dict[tuple[int, ...], int] = {}
        for prompt, count in zip(map(tuple, prompts), counts, strict=True):
            if count > max(len(self.known.get(prompt, ())), wanted.get(prompt, 0)):
                wanted[prompt] = count

        async def every():
            turn = asyncio.Semaphore(3)

            async def one(i, prompt, count):
                async with turn:
                    self.known[prompt], _ = await answer(self.engine, f"alone {i}", prompt, count)

            await asyncio.gather(*(one(i, *item) for i, item in enumerate(wanted.items())))

        asyncio.run(every())


@pytest.fixture(scope="module")
def alone():
    unshared = Unshared()
    yield unshared
    assert not unshared.engine.scheduler.counters.preemptions
    unshared.engine.shutdown()
    unshared.engine.runner.guard.check()


async def answer(engine, name, prompt, count):
    """(tokens, prompt tokens that were found computed) of a greedy completion."""
    request = EngineRequest(name, tuple(prompt), SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True))
    tokens, cached = [], 0
    async for output in engine.client.generate(request):
        tokens += output.token_ids
        cached = max(cached, output.num_cached_tokens)
    return tokens, cached


def some(count, seed):
    rng = random.Random(seed)
    return [rng.randrange(VOCAB) for _ in range(count)]


def check(engine):
    """Nothing is left, and nothing was compiled."""
    balanced(engine)
    engine.shutdown()
    engine.runner.guard.check()


def balanced(engine):
    """Nobody runs, and every page, state and snapshot is free or indexed."""
    scheduler = engine.scheduler

    def look():
        if scheduler.has_work or any(manager.num_leaving for manager in scheduler.kv.managers):
            return False
        for manager in scheduler.kv.managers:
            manager.snapshots.check([])
            manager.pool.check()
            assert manager.pool.num_free == manager.pool.num_pages - 1, "pages leaked"
        return True

    for _ in range(500):  # who was given up may be in the step that still runs
        if engine.call(look):
            return
        time.sleep(0.01)
    raise AssertionError("the engine does not come to rest")


NGRAM = SpeculativeConfig("ngram", num_speculative_tokens=4, enable_adaptive_verification=False)


class Foreseen:
    """Guesses from what an engine without drafts answered, every fifth of them wrong."""

    certain = False

    def __init__(self, tokens, request):
        self.tokens, self.request = tokens, request

    def verified(self, drafts: int, accepted: int) -> None:
        assert 0 <= accepted <= drafts

    def guess(self, most: int, skip: int = 0):
        prompt = self.request.tokens[: self.request.prompt_len]
        at = self.request.num_output + skip
        true = self.tokens.get(tuple(prompt), [])[at : at + most]
        return [(token + ((at + i) % 5 == 4)) % VOCAB for i, token in enumerate(true)], [0.5] * len(true)


@pytest.mark.parametrize(("steps", "drafts"), [(1, False), (3, False), (1, True)])
def test_prefixes_turns_and_preemption(alone, steps, drafts):
    how = EngineConfig(page_size=8, progress=False, speculative_config=NGRAM) if drafts else None
    engine = hybrid_engine(num_pages=18, steps=steps, config=how)
    known: dict[tuple[int, ...], list[int]] = {}
    if drafts:
        engine.scheduler.drafts._guesses = lambda request: Foreseen(known, request)
    stem = some(40, 1)
    # Requests that begin alike, more than run at once, more than there are pages for.
    prompts = [stem[: 24 + 8 * (i % 3)] + some(3 + 5 * i % 17, 10 + i) for i in range(8)]
    prompts += [some(length, length) for length in (1, 7, 8, 9, 33, 61)]

    known |= {tuple(p): alone(p, 20) for p in prompts}

    async def together():
        return await asyncio.gather(*(answer(engine, f"r{i}", p, 20) for i, p in enumerate(prompts)))

    found = asyncio.run(together())
    assert [tokens for tokens, _ in found] == [alone(p, 20) for p in prompts]
    assert engine.scheduler.counters.preemptions > 0
    counters = engine.scheduler.counters
    assert 50 < counters.accepted_tokens < counters.draft_tokens if drafts else not counters.drafts
    again = [asyncio.run(answer(engine, f"again {i}", prompts[0], 20)) for i in range(2)][1]
    assert again == (alone(prompts[0], 20), (len(prompts[0]) - 1) // 8 * 8)
    # A conversation: each turn begins where the answer before it ended.
    history = some(20, 99)
    for turn in range(4):
        known[tuple(history)] = alone(history, 11)
        tokens, cached = asyncio.run(answer(engine, f"turn {turn}", history, 11))
        assert tokens == alone(history, 11)
        # With drafts a state is not kept at each page's end: only at those where a step happens to end.
        assert cached >= (len(history) - (29 if drafts else 13)) // 8 * 8 if turn else cached == 0
        history = history + tokens + some(2, turn)
    check(engine)


def walk(engine, alone, requests, seed):
    """Random prompts over a few stems, arriving while others run, some of them aborted: every token that of the unshared run."""
    rng = random.Random(seed)
    stems = [some(rng.randrange(8, 60), 1000 + i) for i in range(5)]
    prompts = [
        (stem := rng.choice(stems))[: rng.choice([len(stem), rng.randrange(1, len(stem) + 1)])]
        + some(rng.randrange(1, 9), seed + i)
        for i in range(requests)
    ]
    counts = [rng.choice([1, 4, 9, 24]) for _ in prompts]
    pauses = [rng.randrange(12) for _ in prompts]
    ends = [rng.randrange(1, 8) if rng.random() < 0.2 else None for _ in prompts]
    alone.learn(prompts, counts)

    async def one(i, began):
        await asyncio.sleep(began)
        task = asyncio.create_task(answer(engine, f"w{i}", prompts[i], counts[i]))
        if ends[i] is not None:
            await asyncio.sleep(ends[i] / 100)
            task.cancel()
        return (await asyncio.gather(task, return_exceptions=True))[0]

    async def every():
        began, tasks = 0.0, []
        for i in range(requests):
            began += pauses[i] / 1000
            tasks.append(one(i, began))
        return await asyncio.gather(*tasks)

    found = asyncio.run(every())
    hits = 0
    for i, result in enumerate(found):
        if isinstance(result, asyncio.CancelledError):
            continue
        assert result[0] == alone(prompts[i], counts[i]), f"request {i}"
        hits += result[1] > 0
    return hits


def test_a_short_walk(alone):
    engine = hybrid_engine(num_pages=PAGES)
    assert walk(engine, alone, 40, 5) > 0  # how many depends on what the machine finishes first
    check(engine)


STEPS = 250
MODES = {  # (parts, options)
    "one step": (8, {"num_pages": PAGES}),
    "three steps": (8, {"num_pages": PAGES, "steps": 3}),
    "host tier, few pages and snapshots": (3, {"num_pages": 18, "host_pages": 60, "num_snapshots": 3}),
    "drafts": (3, {"num_pages": 18}),
}


@pytest.fixture(scope="module")
def walking(alone):
    """engine(mode) for all parts of a walk: each finds what those before it left."""
    engines = {}

    def engine(mode):
        if mode not in engines:
            how = EngineConfig(page_size=8, progress=False, speculative_config=NGRAM) if mode == "drafts" else None
            engines[mode] = hybrid_engine(config=how, **MODES[mode][1])
            if mode == "drafts":
                engines[mode].scheduler.drafts._guesses = lambda request: Foreseen(alone.known, request)
        return engines[mode]

    yield engine
    for each in engines.values():
        check(each)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "part"), [(mode, part) for mode, (parts, _) in MODES.items() for part in range(parts)]
)
def test_a_long_walk(alone, walking, mode, part):
    """2,000 steps and more in all parts of the first two, on the real programs."""
    engine = walking(mode)
    counters = engine.scheduler.counters
    end, seed = counters.steps + STEPS, 1000 * part
    while counters.steps < end:
        seed += 1
        assert walk(engine, alone, 40, seed) > 2
        balanced(engine)
    assert counters.preemptions or "few" not in mode
    assert counters.accepted_tokens or mode != "drafts"
