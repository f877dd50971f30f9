"""The whole engine on a tiny real model: batching, preemption, sharing and stepping change no token."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import threading

import numpy as np
import pytest

from serving.engine.api.config import EngineConfig
from serving.engine.api.constraint import TooComplexError
from serving.engine.api.sampling_params import SamplingParams
from serving.engine.api.types import EngineRequest, FinishReason
from serving.errors import ErrorKind, RequestError
from tests.mock_engine import until
from tests.tiny import VOCAB, tiny_engine


@pytest.fixture(scope="module")
def engine():
    e = tiny_engine()
    yield e
    e.shutdown()
    e.runner.guard.check()


async def run(engine, request: EngineRequest):
    tokens, last, logprobs, prompt_logprobs = [], None, [], None
    async for output in engine.client.generate(request):
        tokens += output.token_ids
        logprobs += output.logprobs or ()
        prompt_logprobs = output.prompt_logprobs or prompt_logprobs
        last = output
    return dataclasses.replace(last, token_ids=tuple(tokens), logprobs=tuple(logprobs), prompt_logprobs=prompt_logprobs)


def settled(engine) -> bool:
    pool = engine.scheduler.pool
    return engine.call(lambda: (pool.num_free == pool.num_pages - 1) and not engine.scheduler.requests)


async def settle(engine):
    """Waits until no request is left, and asserts that no page is either."""
    for _ in range(3000):
        if await asyncio.to_thread(settled, engine):
            return
        await asyncio.sleep(0.01)
    raise AssertionError("pages or requests are left")


def make_requests(count: int, seed: int = 0) -> list[EngineRequest]:
    """Mixed lengths and every sampling option."""
    rng = random.Random(seed)
    stem = [rng.randrange(VOCAB) for _ in range(40)]
    options = [
        {},
        {"temperature": 0.9, "seed": 5},
        {"temperature": 1.2, "top_k": 20, "seed": 6},
        {"temperature": 1.0, "top_p": 0.7, "min_p": 0.02, "seed": 7},
        {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2},
        {"logit_bias": {7: 3.0, 9: -100.0}},
        {"min_tokens": 6, "stop_token_ids": tuple(range(0, VOCAB, 5))},
        {"logprobs": 3},
        {"allowed_token_ids": tuple(range(10, 60))},
    ]
    out = []
    for i in range(count):
        prompt = stem[: rng.randrange(0, 41)] + [rng.randrange(VOCAB) for _ in range(rng.randrange(1, 30))]
        params = {"temperature": 0.0, "max_tokens": rng.randrange(6, 24), **options[i % len(options)]}
        out.append(EngineRequest(f"r{i}", tuple(prompt), SamplingParams(**params)))
    return out


async def alone(engine, requests):
    return {
        r.request_id: await run(engine, dataclasses.replace(r, request_id=f"alone-{r.request_id}")) for r in requests
    }


async def together(engine, requests, seed=0, spread=0.3):
    rng = random.Random(seed)

    async def later(r):
        await asyncio.sleep(rng.random() * spread)
        return r.request_id, await run(engine, r)

    return dict(await asyncio.gather(*(later(r) for r in requests)))


async def test_batching_changes_no_token(engine):
    requests = make_requests(48)
    expected = await alone(engine, requests)
    got = await together(engine, requests)
    assert {k: v.token_ids for k, v in got.items()} == {k: v.token_ids for k, v in expected.items()}
    assert {k: v.finish_reason for k, v in got.items()} == {k: v.finish_reason for k, v in expected.items()}
    await settle(engine)


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (EngineConfig(async_scheduling=False, progress=False), {}),
        (EngineConfig(enable_prefix_caching=False, progress=False), {}),
        (EngineConfig(progress=False), {"num_pages": 18, "max_num_seqs": 8}),
        (EngineConfig(progress=False), {"num_pages": 18, "max_num_seqs": 8, "host_pages": 60}),
        (EngineConfig(policy="priority", progress=False), {"max_num_batched_tokens": 32, "steps": 4}),
    ],
    ids=["synchronous", "no-sharing", "preemption", "host-tier", "small-budget-several-steps"],
)
async def test_how_it_is_scheduled_changes_no_token(engine, config, sizes):
    requests = make_requests(24, seed=3)
    expected = await alone(engine, requests)
    other = tiny_engine(config, **sizes)
    try:
        got = await together(other, requests, spread=0.0 if "num_pages" in sizes else 0.3)
        assert {k: v.token_ids for k, v in got.items()} == {k: v.token_ids for k, v in expected.items()}
        if "num_pages" in sizes:
            assert other.scheduler.counters.preemptions > 0
        if "host_pages" in sizes:
            assert other.scheduler.kv.managers[0].host_tier.num_restored > 0
        await settle(other)
        other.runner.guard.check()
    finally:
        other.shutdown()


async def test_logprobs_are_those_of_the_token_and_rank_it(engine):
    r = EngineRequest("lp", (1, 2, 3, 4), SamplingParams(temperature=0, max_tokens=5, logprobs=4, prompt_logprobs=2))
    out = await run(engine, r)
    assert len(out.logprobs) == 5 and len(out.prompt_logprobs) == 4 and out.prompt_logprobs[0] is None
    for token, entry in zip(out.token_ids, out.logprobs, strict=True):
        assert entry.token_id == token and entry.rank == 1 and entry.top[0] == (token, pytest.approx(entry.logprob))
        assert [v for _, v in entry.top] == sorted((v for _, v in entry.top), reverse=True) and len(entry.top) == 4
    again = await run(engine, dataclasses.replace(r, request_id="lp2", prompt_token_ids=(1, 2, 3, 4, out.token_ids[0])))
    assert again.prompt_logprobs[4].logprob == pytest.approx(out.logprobs[0].logprob, abs=1e-4)


async def test_prompt_logprobs_over_several_chunks(engine):
    prompt = tuple(np.random.default_rng(0).integers(0, VOCAB, 120).tolist())
    p = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    out = await run(engine, EngineRequest("long", prompt, p))
    short = await run(engine, EngineRequest("short", prompt[:50], p))
    assert len(out.prompt_logprobs) == 120
    for a, b in zip(out.prompt_logprobs[1:50], short.prompt_logprobs[1:], strict=True):
        assert a.token_id == b.token_id and a.logprob == pytest.approx(b.logprob, abs=1e-4)


async def test_embeddings_do_not_depend_on_company_or_chunking(engine):
    rng = np.random.default_rng(3)
    inputs = [tuple(rng.integers(0, VOCAB, n).tolist()) for n in (1, 5, 17, 64, 100)]
    for pooling in ("last", "mean"):
        alone_ = [await engine.client.embed(f"a{i}", ids, pooling=pooling) for i, ids in enumerate(inputs)]
        busy = [asyncio.create_task(run(engine, r)) for r in make_requests(10, seed=4)]
        both = await asyncio.gather(
            *(engine.client.embed(f"b{i}", ids, pooling=pooling) for i, ids in enumerate(inputs))
        )
        await asyncio.gather(*busy)
        for a, b in zip(alone_, both, strict=True):
            assert np.linalg.norm(a) == pytest.approx(1, abs=1e-5)
            np.testing.assert_allclose(a, b, atol=2e-5)
    prefix = await engine.client.embed("p", inputs[3][:63], pooling="mean")
    assert np.abs(prefix - alone_[3]).max() > 1e-3
    with pytest.raises(RequestError):
        await engine.client.embed("x", (1,), pooling="max")
    await settle(engine)


async def test_closing_the_stream_frees_everything(engine):
    stream = engine.client.generate(EngineRequest("x", (1, 2, 3), SamplingParams(temperature=0, max_tokens=100)))
    async for _ in stream:
        break
    await stream.aclose()
    await settle(engine)


async def test_abort_ends_with_its_reason(engine):
    async def consume():
        return await run(engine, EngineRequest("gone", (1, 2), SamplingParams(temperature=0, max_tokens=120)))

    task = asyncio.create_task(consume())
    await until(lambda: "gone" in engine.client._streams)
    assert await engine.client.abort("gone")
    out = await task
    assert out.finish_reason in (FinishReason.ABORT, FinishReason.LENGTH)
    assert not await engine.client.abort("never-there")


async def test_a_live_request_id_is_refused_and_the_first_goes_on(engine):
    r = EngineRequest("twin", (1, 2), SamplingParams(temperature=0, max_tokens=20))
    first = asyncio.create_task(run(engine, r))
    await asyncio.sleep(0)
    with pytest.raises(RequestError) as e:
        await run(engine, r)
    assert e.value.kind is ErrorKind.INVALID_ARGUMENT
    assert len((await first).token_ids) == 20


async def test_too_long_a_prompt_is_that_requests_error(engine):
    with pytest.raises(RequestError, match="128 tokens"):
        await run(engine, EngineRequest("long", (1,) * 128, SamplingParams()))
    assert len((await run(engine, EngineRequest("ok", (1,), SamplingParams(max_tokens=3)))).token_ids) == 3


class Alternating:
    """A constraint that allows even tokens, then odd ones, and is finished after `count`."""

    def __init__(self, count: int) -> None:
        self.count, self.seen = count, []

    def fill_mask(self, mask_W: np.ndarray) -> None:
        mask_W[:] = np.uint32(0x55555555 << (len(self.seen) % 2) & 0xFFFFFFFF).view(np.int32)

    def accept(self, token: int) -> bool:
        if token % 2 != len(self.seen) % 2:
            return False
        self.seen.append(token)
        return True

    @property
    def finished(self) -> bool:
        return len(self.seen) >= self.count


async def test_constraints_hold_at_every_token_among_unconstrained_requests(engine):
    requests = make_requests(10, seed=9)
    expected = await alone(engine, requests)
    grammars = [Alternating(7 + i) for i in range(6)]
    constrained = [
        EngineRequest(
            f"g{i}", (1 + i, 2), SamplingParams(temperature=float(i % 2), max_tokens=40, logprobs=1), constraint=g
        )
        for i, g in enumerate(grammars)
    ]
    got = await together(engine, [*requests, *constrained])
    for i, g in enumerate(grammars):
        out = got[f"g{i}"]
        assert [t % 2 for t in out.token_ids] == [j % 2 for j in range(7 + i)] and g.finished
        assert out.finish_reason is FinishReason.STOP
    assert all(got[r.request_id].token_ids == expected[r.request_id].token_ids for r in requests)
    await settle(engine)


class Broken(Alternating):
    """Raises before its third token, or behind it."""

    def __init__(self, error: Exception, behind: bool) -> None:
        super().__init__(20)
        self.error, self.behind, self.masks = error, behind, 0

    def fill_mask(self, mask_W: np.ndarray) -> None:
        self.masks += 1
        if self.masks == 3 and not self.behind:
            raise self.error
        super().fill_mask(mask_W)

    def accept(self, token: int) -> bool:
        if self.masks == 3:
            raise self.error
        return super().accept(token)


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize(
    ("error", "reason", "told"),
    [
        (RuntimeError("at 0xdeadbeef"), FinishReason.ERROR, "the grammar failed."),
        (TooComplexError("The constraint grew too complex to go on. Simplify it."), FinishReason.REFUSED, None),
    ],
)
async def test_a_grammar_that_breaks_ends_its_request_alone(engine, error, reason, told, behind):
    """What it cannot know is its author's to mend; what breaks is ours."""
    bad = EngineRequest("bad", (1, 2), SamplingParams(max_tokens=20), constraint=Broken(error, behind))
    good = EngineRequest("good", (1, 2), SamplingParams(temperature=0, max_tokens=20))
    a, b = await asyncio.gather(run(engine, bad), run(engine, good))
    assert a.finish_reason is reason and a.error == (told or str(error))
    assert len(a.token_ids) == (3 if behind else 2) and len(b.token_ids) == 20
    await settle(engine)


async def test_queue_limits_refuse_at_once():
    e = tiny_engine(EngineConfig(max_num_queued_reqs=2, progress=False), max_num_seqs=1)
    try:
        requests = [EngineRequest(f"q{i}", (i, 1), SamplingParams(temperature=0, max_tokens=60)) for i in range(8)]
        results = await asyncio.gather(*(run(e, r) for r in requests), return_exceptions=True)
        refused = [r for r in results if isinstance(r, RequestError)]
        assert refused and all(r.kind is ErrorKind.RESOURCE_EXHAUSTED and r.retry_after_s for r in refused)
        assert len(refused) < 8
        await settle(e)
    finally:
        e.shutdown()


async def test_death_reaches_every_waiting_client_and_new_ones():
    e = tiny_engine()
    try:
        e.runner.collect = lambda step: (_ for _ in ()).throw(RuntimeError("device lost"))
        requests = [EngineRequest(f"a{i}", (1,), SamplingParams()) for i in range(16)]
        results = await asyncio.gather(*(run(e, r) for r in requests), return_exceptions=True)
        errors = [r for r in results if isinstance(r, RequestError)]
        # Those that were tried alone, twice, end one by one; then it is clear that it is not theirs.
        assert all(r.finish_reason is FinishReason.ERROR for r in results if r not in errors)
        assert errors and all(r.kind is ErrorKind.INTERNAL and "device lost" not in r.message for r in errors)
        assert isinstance(e.failure, RuntimeError) and not e.client.healthy
        with pytest.raises(RequestError):
            await run(e, EngineRequest("b", (1,), SamplingParams()))
    finally:
        e.shutdown()


async def test_drain_lets_running_requests_finish_and_refuses_new_ones():
    e = tiny_engine()
    try:
        running = asyncio.create_task(run(e, EngineRequest("a", (1,), SamplingParams(temperature=0, max_tokens=60))))
        await until(lambda: e.client.num_live)
        drained = asyncio.create_task(asyncio.to_thread(e.drain, 20.0))
        await until(lambda: e.client.draining)
        with pytest.raises(RequestError) as error:
            await run(e, EngineRequest("b", (1,), SamplingParams()))
        assert error.value.kind is ErrorKind.UNAVAILABLE
        assert len((await running).token_ids) == 60 and await drained
    finally:
        e.shutdown()
    assert not any(t.name == "jaxserve-engine" for t in threading.enumerate() if t is e.loop._thread)
