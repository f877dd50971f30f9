"""The request before the first one: it runs what a request runs, on the engine's thread, and leaves no trace."""

from __future__ import annotations

import asyncio
import copy
import threading

import pytest

from serving.boot.start import start_engine
from serving.engine.api.config import EngineConfig
from serving.engine.api.sampling_params import SamplingParams
from serving.engine.api.types import EngineRequest
from serving.engine.rehearsal import rehearse
from serving.engine.requests.commands import DecodeLoop, Forward, LoadSlot, Sample
from tests.tiny import tiny_engine
from tests.tiny_checkpoint import write_tiny_checkpoint


def generate(engine, request_id: str) -> tuple[int, ...]:
    params = SamplingParams(temperature=0.8, seed=3, repetition_penalty=1.3, max_tokens=12, ignore_eos=True)

    async def run():
        outputs = engine.client.generate(EngineRequest(request_id, tuple(range(20)), params))
        return tuple([token async for output in outputs for token in output.token_ids])

    return asyncio.run(run())


def state(engine):
    """What a request would leave behind in the scheduler that serves and in the counters."""
    s = engine.scheduler
    return copy.copy(s.counters), s.pool.num_free, s.pool.num_cached, s.slots.num_free, dict(s.requests), s._step_id


@pytest.mark.parametrize("steps", [1, 4])
def test_it_runs_every_part_of_a_request_and_leaves_no_trace(monkeypatch, steps):
    engine = tiny_engine(max_num_seqs=1, max_num_batched_tokens=32, max_model_len=64, num_pages=20, steps=steps)
    try:
        before = generate(engine, "before")
        engine.call(engine.scheduler.pool.reset_cache)
        was, stats = state(engine), engine.client.stats()
        seen = []
        execute = engine.runner.executor.execute
        monkeypatch.setattr(
            engine.runner.executor,
            "execute",
            lambda command: seen.append((type(command), threading.current_thread().name)) or execute(command),
        )
        engine.call(lambda: rehearse(engine.scheduler, engine.runner))
        monkeypatch.undo()
        assert {kind for kind, _ in seen} >= {LoadSlot, Forward, Sample} | ({DecodeLoop} if steps > 1 else set())
        assert sum(kind in (Forward, DecodeLoop) for kind, _ in seen) == 2, "a prompt and a decode step"
        assert {thread for _, thread in seen} == {"jaxserve-engine"}
        assert state(engine) == was
        now = engine.client.stats()
        assert (now.num_steps, now.prompt_tokens, now.num_scheduled_tokens_total, now.num_recompilations) == (
            stats.num_steps, stats.prompt_tokens, stats.num_scheduled_tokens_total, 0,
        )  # fmt: skip
        assert generate(engine, "after") == before
    finally:
        engine.shutdown()


def test_an_engine_is_not_ready_before_it(monkeypatch, tmp_path):
    done = []
    monkeypatch.setattr("serving.boot.wire.rehearse", lambda *args: done.append(threading.current_thread().name))
    config = EngineConfig(
        model=str(write_tiny_checkpoint(tmp_path / "model")), max_num_seqs=1, max_num_batched_tokens=32, max_model_len=48,
        progress=False, compile_cache=str(tmp_path / "programs"),
    )  # fmt: skip
    start_engine(config).shutdown()
    assert done == ["jaxserve-engine"]


def test_a_failure_in_it_is_the_starts(monkeypatch, tmp_path):
    def fail(*args):
        raise ValueError("no device")

    monkeypatch.setattr("serving.boot.wire.rehearse", fail)
    config = EngineConfig(
        model=str(write_tiny_checkpoint(tmp_path / "model")), max_num_seqs=1, max_num_batched_tokens=32, max_model_len=48,
        progress=False, compile_cache="",
    )  # fmt: skip
    with pytest.raises(ValueError, match="no device"):
        start_engine(config)
