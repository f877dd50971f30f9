"""The gateway's pool: balance, failover; and the whole way HTTP -> gateway -> gRPC -> engine."""

from __future__ import annotations

import asyncio
import dataclasses

import httpx
import pytest

from serving.engine.api.sampling_params import SamplingParams
from serving.engine.api.types import EngineRequest
from serving.errors import ErrorKind, RequestError
from serving.frontends.grpc.client import RemoteEngineClient, RemoteGrammars
from serving.frontends.grpc.server import GrpcServer
from serving.frontends.openai.server import serve_http
from serving.gateway import Pool
from tests.mock_engine import MockEngine, mock_service


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


async def test_http_through_a_gateway_over_grpc():
    engines = [MockEngine(reply="Hello wörld!"), MockEngine(reply="Hello wörld!")]
    servers = [GrpcServer("127.0.0.1", 0) for _ in engines]
    clients = []
    try:
        for server, engine in zip(servers, engines, strict=True):
            await server.start()
            await server.serve(mock_service(engine))
            clients.append(await RemoteEngineClient.connect(f"127.0.0.1:{server.port}"))
        service = mock_service(Pool(clients), grammar_compiler=RemoteGrammars())  # type: ignore[arg-type]
        http = await serve_http(service, port=0)
        body = {"messages": [{"role": "user", "content": "hi"}], "n": 2, "logprobs": True}
        async with httpx.AsyncClient(base_url=http.url) as client:
            for _ in range(2):
                reply = (await client.post("/v1/chat/completions", json=body)).json()
                assert [c["message"]["content"] for c in reply["choices"]] == ["Hello wörld!"] * 2
                assert reply["choices"][0]["logprobs"]["content"][0]["token"] == "H"
            assert (await client.get("/ready")).status_code == 200
        await http.stop()
        assert [len(e.requests) for e in engines] == [2, 2]
    finally:
        for client in clients:
            await client.close()
        for server in servers:
            await server.stop(0.0)
