"""Several decode steps a dispatch, by default and as one program: the tokens of single steps, whatever happens meanwhile."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest

from serving.engine.api.sampling_params import SamplingParams
from serving.engine.api.types import EngineRequest, FinishReason
from tests.tiny import one_width, tiny_engine

PROMPTS = [tuple(range(i, i + 5 + i)) for i in range(4)]


@pytest.fixture(scope="module", params=[None, 4], ids=["one by one", "in a loop"])
def engine(request):
    with one_width():
        engine = tiny_engine(max_num_seqs=4, steps=request.param)
    # Steps of a tiny model take so long on a busy machine that hardly one is lengthened.
    observe = engine.scheduler.lengths.observe
    engine.scheduler.lengths.observe = lambda plan, seconds: observe(plan, 0.01 * plan.num_steps)
    yield engine
    engine.shutdown()


async def read(engine, spec: EngineRequest, hold: asyncio.Event | None = None, until: int | None = None):
    """(tokens, finish reason) of a request; after `hold`, and aborted once `until` outputs have come."""
    if hold is not None:
        await hold.wait()
    tokens, reason, seen = [], None, 0
    async for output in engine.client.generate(spec):
        tokens += output.token_ids
        reason, seen = output.finish_reason, seen + 1
        if until is not None and seen == until:
            await engine.client.abort(spec.request_id)
    return tokens, reason


def specs(whole: bool, eos: int | None) -> list[EngineRequest]:
    """Four with other lengths, temperatures and penalties, the second of which ends of itself."""
    asked = [
        SamplingParams(temperature=0, max_tokens=40, ignore_eos=True),
        SamplingParams(temperature=0, max_tokens=50),
        SamplingParams(temperature=0.8, seed=3, top_k=20, max_tokens=23, repetition_penalty=1.2, ignore_eos=True),
        SamplingParams(temperature=1.0, seed=4, max_tokens=31, min_tokens=8, frequency_penalty=0.3),
    ]
    ends = () if eos is None else (eos,)
    return [
        EngineRequest(f"{whole}{i}", prompt, params, ends, whole=whole)
        for i, (prompt, params) in enumerate(zip(PROMPTS, asked, strict=True))
    ]


async def together(engine, whole: bool, eos: int | None):
    return await asyncio.gather(*(read(engine, spec) for spec in specs(whole, eos)))


def dispatches(engine, since: int = 0) -> list[int]:
    return [step.num_steps for step in engine.loop.recent if step.step_id > since]


def stats(engine):
    """Of an engine at rest: behind the round that has handed out the last outputs."""
    engine.call(lambda: None)
    return engine.client.stats()


def test_completions_are_those_of_single_steps(engine):
    free = asyncio.run(together(engine, False, None))
    eos = free[1][0][17]
    alone = [asyncio.run(read(engine, spec)) for spec in specs(False, eos)]
    since = engine.scheduler._step_id
    assert asyncio.run(together(engine, True, eos)) == alone
    assert max(dispatches(engine, since)) > 1
    assert alone[1][1] is FinishReason.STOP and len(alone[1][0]) <= 18


def test_a_newcomer_and_an_abort_change_nothing_for_others(engine):
    first, second, third, late = specs(True, None)
    alone = [
        asyncio.run(read(engine, dataclasses.replace(s, request_id="x", whole=False))) for s in (first, third, late)
    ]

    async def run():
        begun = asyncio.Event()

        async def begins():
            async for output in engine.client.generate(first):
                begun.set()
                tokens.extend(output.token_ids)

        tokens: list[int] = []
        heard = dataclasses.replace(late, whole=False)
        others = read(engine, second, begun, until=1), read(engine, third, begun), read(engine, heard, begun)
        found = await asyncio.gather(begins(), *others)
        return tokens, *found[1:]

    tokens, cut, third_found, late_found = asyncio.run(run())
    assert tokens == alone[0][0] and third_found == alone[1] and late_found == alone[2]
    assert cut[1] in (FinishReason.ABORT, FinishReason.LENGTH)
    now = stats(engine)
    assert (now.num_running, now.num_recompilations) == (0, 0)


def test_what_they_were_counted_as(engine):
    before = stats(engine)
    asyncio.run(together(engine, True, None))
    after = stats(engine)
    assert after.generation_tokens - before.generation_tokens == 40 + 50 + 23 + 31
    assert sum(after.step_tokens) == after.num_steps
