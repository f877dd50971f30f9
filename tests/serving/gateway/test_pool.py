"""The gateway's pool: balance, failover, engines that differ."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest

from serving.engine.api.sampling_params import SamplingParams
from serving.engine.api.types import EngineRequest
from serving.errors import ErrorKind, RequestError
from serving.gateway import Pool
from tests.mock_engine import MockEngine


def _request(name: str = "r", **params) -> EngineRequest:
    return EngineRequest(name, (1, 2), SamplingParams(**{"max_tokens": 4, **params}), eos_token_ids=(257,))


async def _text(pool: Pool, name: str) -> list[int]:
    return [token async for output in pool.generate(_request(name)) for token in output.token_ids]


async def test_work_goes_where_there_is_least():
    engines = [MockEngine(reply="x" * 50, step_s=0.005) for _ in range(3)]
    pool = Pool(engines)
    tasks = [asyncio.ensure_future(_text(pool, f"r{i}")) for i in range(9)]
    await asyncio.gather(*tasks)
    assert [len(e.requests) for e in engines] == [3, 3, 3]


async def test_equal_engines_take_turns():
    engines = [MockEngine(reply="x") for _ in range(3)]
    pool = Pool(engines)
    for i in range(6):
        await _text(pool, f"r{i}")
    assert [len(e.requests) for e in engines] == [2, 2, 2]


async def test_a_full_or_dead_engine_is_passed_over():
    full, dead, good = MockEngine(max_live=0), MockEngine(), MockEngine(reply="ab")
    dead.die()
    pool = Pool([full, dead, good])
    for i in range(4):
        assert (await _text(pool, f"r{i}"))[:2] == [97, 98]
    assert pool.healthy and len(good.requests) == 4
    good.die()
    with pytest.raises(RequestError) as caught:
        await _text(pool, "last")
    assert caught.value.kind is ErrorKind.RESOURCE_EXHAUSTED


async def test_what_has_begun_is_not_begun_again():
    first, second = MockEngine(reply="x" * 50, step_s=0.002), MockEngine(reply="y" * 50)
    pool = Pool([first, second])
    seen = []
    with pytest.raises(RequestError):
        async for output in pool.generate(_request(max_tokens=40)):
            seen.append(output)
            first.die()
    assert seen and not second.requests


async def test_closing_a_stream_aborts_it():
    engine = MockEngine(reply="x" * 50, step_s=0.002)
    stream = Pool([engine]).generate(_request(max_tokens=40))
    await anext(stream)
    await stream.aclose()
    assert engine.aborted == ["r"]


async def test_stats_are_sums():
    engines = [MockEngine(num_pages=11), MockEngine(num_pages=21)]
    assert Pool(engines).stats().num_pages_total == 30
    assert Pool(engines).info().num_pages == 32


def test_engines_of_different_models_are_refused():
    other = MockEngine()
    other._info = dataclasses.replace(other.info(), model_id="other")
    with pytest.raises(ValueError, match="model_id: mock-1b, other"):
        Pool([MockEngine(), other])


def test_engines_that_come_later_are_taken():
    first, second = MockEngine(num_pages=11), MockEngine(num_pages=21)
    pool = Pool([first])
    pool.add(second)
    assert pool.info().num_pages == 32 and pool.stats().num_pages_total == 30
    other = MockEngine()
    other._info = dataclasses.replace(other.info(), vocab_size=7)
    with pytest.raises(ValueError, match="vocab_size"):
        pool.add(other)
    assert pool.info().num_pages == 32
