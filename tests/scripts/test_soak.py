"""scripts/soak.py over an engine without a model: a clean run passes, and each thing it is there to find is found."""

from __future__ import annotations

import contextlib
import dataclasses
import os

import pytest

from scripts import soak as script
from serving.frontends.app import serve_http
from serving.frontends.grpc.server import GrpcServer
from serving.metrics import MeteredClient
from tests.mock_engine import MockEngine, mock_service


@pytest.fixture(autouse=True)
def brisk(monkeypatch):
    monkeypatch.setattr(script, "SLOW_S", 0.005)


class NoGrammar:
    """The only grammars that a soak sends are wrong."""

    def compile(self, grammar):
        raise ValueError(f"structured_outputs cannot be compiled: {grammar}")


@contextlib.asynccontextmanager
async def soaking(engine):
    service = mock_service(MeteredClient(engine), grammar_compiler=NoGrammar())
    server = GrpcServer(port=0)
    port = await server.start()
    await server.serve(service)
    http = await serve_http(service, port=0)
    soak = script.Soak(f"127.0.0.1:{port}", http.port, os.getpid(), 256, seed=1)
    try:
        yield soak
    finally:
        await soak.close()
        await http.stop(0.5)
        await server.stop()


async def run(engine, seconds=1.5):
    async with soaking(engine) as soak:
        await soak.load(40.0, seconds)
        end = await soak.settle()
        replayed = await soak.replay(5.0)
        return soak, script.report(soak, 40.0, seconds, end, replayed)


async def test_a_server_that_does_as_it_should_passes():
    soak, found = await run(MockEngine(reply="word " * 30, step_s=0.001), seconds=3.0)  # enough for every kind to come
    assert found["failures"] == [] and found["requests"] > 20 and found["replayed_streams"] > 5
    assert {"OK", "INVALID_ARGUMENT"} <= set(found["by_status"]) and len(found["by_kind"]) >= 6
    assert soak.samples and found["memory_mb"]


class Losing(MockEngine):
    """Drops every twentieth token on its way out."""

    count = 0

    async def generate(self, request):
        async for output in super().generate(request):
            Losing.count += 1
            lost = Losing.count % 20 == 0 and output.finish_reason is None
            yield dataclasses.replace(output, token_ids=()) if lost else output


async def test_a_lost_token_is_found():
    _, found = await run(Losing(reply="word " * 30, step_s=0.001))
    assert any("tokens" in what for what in found["failures"])


class Unlikely(MockEngine):
    """When scored again, one of the tokens is far from the likeliest."""

    async def generate(self, request):
        async for output in super().generate(request):
            scored = output.prompt_logprobs
            if scored is not None and scored[-1] is not None:
                worse = dataclasses.replace(scored[-1], logprob=-9.0)
                output = dataclasses.replace(output, prompt_logprobs=(*scored[:-1], worse))
            yield output


async def test_a_token_out_of_place_is_found():
    _, found = await run(Unlikely(reply="word " * 30, step_s=0.001), seconds=0.5)
    assert any("nats" in what for what in found["failures"])


async def test_pages_that_are_left_are_found(monkeypatch):
    engine = MockEngine(reply="a")
    async with soaking(engine) as soak:
        await soak.load(40.0, 0.3)
        engine._pages["forgotten"] = 3
        end = await soak.settle(0.1)
        assert "pages or requests are left" in script.report(soak, 40.0, 0.3, end, (0, 0, 0.0))["failures"]


@pytest.mark.parametrize(("grown", "slope"), [(0.0, 0.0), (0.5, 30.0)])
def test_the_slope_is_that_of_the_second_half(grown, slope):
    samples = [
        script.Sample(float(i), 500 + (i * 9 if i < 50 else 450 + (i - 50) * grown), 0, 0, 0, 0) for i in range(100)
    ]
    assert script.slope(samples) == pytest.approx(slope, abs=1e-6)
