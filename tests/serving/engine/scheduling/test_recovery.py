"""Steps that fail, and what an engine does besides serving: nobody loses a token, and only the guilty is ended."""

from __future__ import annotations

import asyncio
import threading
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from models.embedding_head import EmbeddingHead
from serving.engine.api.lifecycle import Lifecycle
from serving.engine.api.sampling_params import SamplingParams
from serving.engine.api.types import EngineRequest, FinishReason
from serving.engine.device.programs.compiling import starting
from serving.engine.lifecycle import Resting
from serving.engine.scheduling.recovery import MAX_IN_A_ROW, Suspects, is_out_of_memory
from serving.errors import DIED, ErrorKind, RequestError
from serving.reliability.faults import Fault, FaultyRunner
from serving.reliability.watchdog import StalledError, Watchdog
from tests.mock_engine import until
from tests.tiny import VOCAB, own_tiny_model, tiny_engine

POISON = 250


def _requests(count=6, tokens=24):
    """Greedy, seeded and penalized ones, of different lengths, two with a shared prefix."""
    return [
        EngineRequest(
            f"r{i}",
            tuple((7 * i + 3 * j) % 200 for j in range(3 + 5 * i)) if i % 3 else tuple(range(20 + i)),
            SamplingParams(
                temperature=0.0 if i % 2 else 0.9, seed=i, max_tokens=tokens, repetition_penalty=1.2 if i == 4 else 1.0
            ),
        )
        for i in range(count)
    ]


async def _run(engine, request):
    tokens, last = [], None
    async for output in engine.client.generate(request):
        tokens += output.token_ids
        last = output
    return tokens, last


async def _run_all(engine, requests):
    return await asyncio.gather(*(_run(engine, r) for r in requests))


@pytest.fixture(scope="module")
def engine():
    engine = tiny_engine()
    with starting():  # what the copies compile is none of the engine's business
        engine.runner.executor.replace_weights(engine.runner.executor.leaves_of(own_tiny_model()))
    runner = engine.loop.runner
    yield engine
    engine.loop.runner = runner
    engine.shutdown()


@pytest.fixture(scope="module")
def expected(engine):
    return [tokens for tokens, _ in asyncio.run(_run_all(engine, _requests()))]


@pytest.fixture
def broken(engine):
    """Puts faults into the engine for one test; checks afterwards that nothing was left behind or compiled."""
    runner, failures = engine.runner, engine.loop.suspects

    def put(*faults):
        engine.loop.suspects = Suspects()
        engine.loop.runner = FaultyRunner(runner, [Fault.parse(text) for text in faults])

    yield put
    engine.loop.runner, engine.loop.suspects = runner, failures
    engine.scheduler.max_tokens = engine.scheduler.config.max_num_batched_tokens
    assert engine.failure is None and not engine.scheduler.requests
    engine.scheduler.pool.check()
    assert engine.scheduler.slots.num_free == engine.scheduler.config.max_num_seqs
    engine.runner.guard.check()


@pytest.mark.parametrize(
    "fault",
    ["step-error@1", "step-error@5", "step-error@9:3", "transfer-error@6", "out-of-memory@4", "slow-step@3:0.05"],
)
async def test_a_failed_step_costs_nobody_a_token(engine, expected, broken, fault):
    broken(fault)
    results = await _run_all(engine, _requests())
    assert [tokens for tokens, _ in results] == expected
    assert {last.finish_reason for _, last in results} == {FinishReason.LENGTH}
    assert (engine.loop.suspects.failures > 0) == ("slow" not in fault)


async def test_without_memory_steps_become_smaller(engine, expected, broken):
    broken("out-of-memory@3:2")
    before = engine.scheduler.max_tokens
    results = await _run_all(engine, _requests())
    assert [tokens for tokens, _ in results] == expected
    assert engine.scheduler.max_tokens < before


async def test_only_the_request_that_makes_steps_fail_is_ended(engine, expected, broken):
    broken(f"poison:{POISON}")
    bad = EngineRequest("bad", (1, POISON, 2), SamplingParams(max_tokens=24))
    *good, (tokens, last) = await _run_all(engine, [*_requests(), bad])
    assert [t for t, _ in good] == expected
    assert not tokens and last.finish_reason is FinishReason.ERROR and "poison" not in last.error
    assert engine.client.healthy and engine.client.stats().num_failed_steps > 0
    assert engine.loop.suspects.only is None


async def test_two_guilty_ones_are_both_found(engine, expected, broken):
    broken(f"poison:{POISON}")
    bad = [EngineRequest(f"bad{i}", (i + 1, POISON), SamplingParams(max_tokens=4)) for i in range(2)]
    first, *good, second = await _run_all(engine, [bad[0], *_requests(), bad[1]])
    assert [t for t, _ in good] == expected
    assert {first[1].finish_reason, second[1].finish_reason} == {FinishReason.ERROR}


async def test_a_device_that_is_gone_ends_the_engine_instead_of_a_crash_loop():
    engine = tiny_engine()
    try:
        engine.loop.runner = FaultyRunner(engine.runner, [Fault.parse("step-error@3:1000000")])
        results = await asyncio.gather(*(_run(engine, r) for r in _requests(20)), return_exceptions=True)
        assert any(isinstance(r, RequestError) and r.kind is ErrorKind.INTERNAL for r in results)
        assert all(isinstance(r, RequestError) or r[1].finish_reason is FinishReason.ERROR for r in results)
        assert engine.failure is not None and not engine.client.healthy
        assert engine.loop.suspects.failures <= MAX_IN_A_ROW + 1
    finally:
        engine.shutdown()


def test_what_is_out_of_memory():
    assert is_out_of_memory(RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 12 bytes"))
    assert (
        is_out_of_memory(MemoryError())
        and not is_out_of_memory(RuntimeError("INTERNAL: no"))
        and not is_out_of_memory(None)
    )


@given(st.sets(st.integers(0, 40), min_size=1), st.sets(st.integers(0, 40), max_size=3))
@settings(deadline=None)
def test_halving_finds_exactly_the_guilty(ids, guilty):
    """Whoever makes a step fail in any company is ended; nobody else is; and it ends."""
    suspects = Suspects(clock=iter(range(0, 10**6, 10)).__next__)
    live, running, ended = {f"r{i:02}" for i in ids}, set(), set()
    bad = {f"r{i:02}" for i in ids & guilty}
    for _ in range(1000):
        suspects.gone(live.__contains__)
        only = suspects.only
        running |= live if only is None else live & only
        step = sorted(running)
        if not step or (only is None and running == live and not running & bad):
            break
        if running & bad:
            culprit = suspects.failed(step)
            running = set()
            if culprit is not None:
                ended.add(culprit)
                live.discard(culprit)
        else:
            suspects.passed(step)
    else:
        raise AssertionError("it never ended")
    assert ended == bad and not suspects.hopeless


# -- pausing, sleeping, new weights --------------------------------------------------------------------------------------


def as_loaded(model):
    """What reading a checkpoint with these weights gives."""
    return SimpleNamespace(model=model, embedding=EmbeddingHead())


@pytest.fixture
def alive(engine, broken):
    """The engine with a way to read weights; wakes it, whatever a test left."""
    engine.lifecycle = Lifecycle(
        Resting(engine.loop, engine.scheduler, engine.runner.executor, engine._use_head),
        lambda name: as_loaded(own_tiny_model(0.9 if name == "other" else 1.0)),
    )
    yield engine
    if engine.lifecycle.asleep:
        engine.lifecycle.wake()
    engine.lifecycle.resume()
    engine.lifecycle.update_weights("tiny")


async def test_pausing_holds_streams_and_goes_on_with_the_same_tokens(alive, expected):
    tasks = [asyncio.ensure_future(_run(alive, r)) for r in _requests()]
    await until(lambda: alive.client.stats().generation_tokens)
    await asyncio.to_thread(alive.lifecycle.pause)
    steps = alive.scheduler.counters.steps
    late = asyncio.ensure_future(_run(alive, EngineRequest("late", (1, 2), SamplingParams(max_tokens=2))))
    await until(lambda: "late" in alive.scheduler.requests)
    assert alive.scheduler.counters.steps == steps and alive.lifecycle.paused and not any(t.done() for t in tasks)
    await asyncio.to_thread(alive.lifecycle.resume)
    assert [tokens for tokens, _ in await asyncio.gather(*tasks)] == expected
    assert len((await late)[0]) == 2


async def test_deadlines_pass_while_paused(alive):
    await asyncio.to_thread(alive.lifecycle.pause)
    request = EngineRequest("d", (1, 2), SamplingParams(max_tokens=2), deadline=time.monotonic() + 0.3)
    _, last = await _run(alive, request)
    assert last.finish_reason is FinishReason.DEADLINE


@pytest.mark.parametrize("level", [1, 2])
async def test_sleep_gives_memory_back_and_waking_goes_on_with_the_same_tokens(alive, expected, level):
    tasks = [asyncio.ensure_future(_run(alive, r)) for r in _requests()]
    before = alive.client.stats().generation_tokens
    await until(lambda: alive.client.stats().generation_tokens > before)
    leaves = alive.runner.executor.decoder.leaves
    freed = await asyncio.to_thread(alive.lifecycle.sleep, level)
    assert freed > sum(leaf.nbytes for leaf in leaves)
    assert all(leaf.is_deleted() for leaf in leaves) and alive.runner.executor._kv is None
    with pytest.raises(RequestError) as caught:
        await _run(alive, EngineRequest("no", (1,), SamplingParams(max_tokens=1)))
    assert caught.value.kind is ErrorKind.UNAVAILABLE and "asleep" in caught.value.message
    for wrong in (alive.lifecycle.sleep, alive.lifecycle.resume, lambda: alive.lifecycle.update_weights("other")):
        with pytest.raises(RequestError) as caught:
            await asyncio.to_thread(wrong)
        assert caught.value.kind is ErrorKind.FAILED_PRECONDITION
    await asyncio.to_thread(alive.lifecycle.wake)
    assert [tokens for tokens, _ in await asyncio.gather(*tasks)] == expected


async def test_new_weights_while_streams_run(alive, expected):
    requests = _requests()
    running = [asyncio.ensure_future(_run(alive, r)) for r in requests]
    before = alive.client.stats().generation_tokens
    await until(lambda: alive.client.stats().generation_tokens > before)
    await asyncio.to_thread(alive.lifecycle.update_weights, "other")
    mixed = await asyncio.gather(*running)
    assert all(len(tokens) == 24 and last.finish_reason is FinishReason.LENGTH for tokens, last in mixed)
    # The same prompts again: nothing that the old weights computed may be found.
    new = [tokens for tokens, _ in await _run_all(alive, requests)]
    assert new != expected
    await asyncio.to_thread(alive.lifecycle.reset_prefix_cache)
    assert [tokens for tokens, _ in await _run_all(alive, requests)] == new
    await asyncio.to_thread(alive.lifecycle.update_weights, "tiny")
    assert [tokens for tokens, _ in await _run_all(alive, requests)] == expected


async def test_weights_of_another_shape_are_refused_and_the_old_ones_serve_on(alive, expected):
    from models.config import ModelConfig, RopeConfig
    from models.decoder import Decoder
    from models.layers import Build

    config = ModelConfig(
        "LlamaForCausalLM", VOCAB, 3, 64, 80, 4, 2, 16, 512, 1e-5, tie_embeddings=True, rope=RopeConfig(10000.0, 16)
    )
    graph, state = nnx.split(Decoder(config, Build(max_model_len=512)))
    with starting():
        wide = nnx.merge(graph, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state))
    alive.lifecycle._load_model = lambda name: as_loaded(wide)
    with pytest.raises(RequestError, match="same shape"):
        await asyncio.to_thread(alive.lifecycle.update_weights, "wide")
    alive.lifecycle._load_model = lambda name: (_ for _ in ()).throw(ValueError("no such file."))
    with pytest.raises(RequestError, match="no such file"):
        await asyncio.to_thread(alive.lifecycle.update_weights, "none")
    alive.lifecycle._load_model = lambda name: as_loaded(own_tiny_model())
    assert [tokens for tokens, _ in await _run_all(alive, _requests())] == expected


# -- a step that never ends ----------------------------------------------------------------------------------------------


async def test_a_stalled_step_reaches_every_waiting_client_at_once_and_new_ones():
    engine = tiny_engine()
    engine.loop.runner = FaultyRunner(engine.runner, [Fault.parse("stall@4")])
    gave_up = threading.Event()
    watchdog = Watchdog(lambda: engine.loop.busy_since, 0.5, engine.declare_dead, gave_up.set, grace_s=0.1)
    watchdog.start()
    results = await asyncio.gather(*(_run(engine, r) for r in _requests(12)), return_exceptions=True)
    assert all(isinstance(r, RequestError) and r.code == DIED for r in results)
    assert isinstance(engine.failure, StalledError) and not engine.client.healthy
    with pytest.raises(RequestError):
        await _run(engine, EngineRequest("late", (1,), SamplingParams(max_tokens=1)))
    assert await asyncio.to_thread(gave_up.wait, 30), "a process whose engine hangs is ended"
    engine.runner.guard.close()  # the thread itself hangs for ever: that is the point


async def test_an_idle_engine_is_not_stalled(engine):
    await _run_all(engine, _requests(2))
    await until(lambda: engine.loop.busy_since is None)
