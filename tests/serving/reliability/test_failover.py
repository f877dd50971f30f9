"""Gateways: what an engine's death costs, and that its return is noticed."""

from __future__ import annotations

import asyncio
import time

import pytest

from serving.engine.api.sampling_params import SamplingParams
from serving.engine.api.types import EngineRequest
from serving.errors import DIED, ErrorKind, RequestError
from serving.frontends.grpc import client as client_module
from serving.frontends.grpc.client import RemoteEngineClient
from serving.frontends.grpc.server import GrpcServer
from serving.gateway import Pool
from tests.mock_engine import MockEngine, mock_service, until


class Dying(MockEngine):
    """Dies under each request: before its first token, or after."""

    def __init__(self, after: int, code: str | None = DIED) -> None:
        super().__init__(reply="dying")
        self.after, self.code, self.tried = after, code, 0

    async def generate(self, request):
        self.tried += 1
        count = 0
        async for output in super().generate(request):
            if count == self.after:
                raise RequestError(ErrorKind.INTERNAL, "the engine died; the server is going down.", code=self.code)
            count += 1
            yield output


def request(name="r"):
    return EngineRequest(name, (1, 2), SamplingParams(max_tokens=4), eos_token_ids=(257,))


async def tokens_of(client, name="r"):
    return [t async for output in client.generate(request(name)) for t in output.token_ids]


async def test_what_has_no_token_yet_goes_to_another_engine():
    dying, good = Dying(after=0), MockEngine(reply="good")
    pool = Pool([dying, good])
    for i in range(4):
        assert bytes(await tokens_of(pool, f"r{i}")) == b"good"
    assert dying.tried


async def test_what_has_begun_is_told_and_not_begun_again():
    pairs = [(Dying(after=1), MockEngine(reply="good")) for _ in range(2)]  # of engines alike, the first is asked first
    results = await asyncio.gather(*(tokens_of(Pool(pair)) for pair in pairs), return_exceptions=True)
    assert all(isinstance(r, RequestError) and r.code == DIED for r in results)
    assert all(dying.tried == 1 and not good.requests for dying, good in pairs)


async def test_other_failures_are_not_tried_elsewhere():
    """An error that is the request's own would only be the next engine's too."""
    pool = Pool([Dying(after=0, code=None), MockEngine(reply="good")])
    with pytest.raises(RequestError):
        await tokens_of(pool)


async def test_a_restarted_engine_is_found_again():
    async def start(port=0):
        server = GrpcServer(port=port)
        await server.start()
        await server.serve(mock_service(MockEngine(reply="good")))
        return server

    server = await start()
    port = server.port
    client = await RemoteEngineClient.connect(f"127.0.0.1:{port}", timeout_s=20, poll_s=0.05)
    try:
        assert bytes(await tokens_of(client)) == b"good"
        await server.stop()
        await until(lambda: not client.healthy, "the gateway notices that it is gone")
        with pytest.raises(RequestError) as caught:
            await tokens_of(Pool([client]), "gone")
        assert caught.value.kind is ErrorKind.UNAVAILABLE
        server = await start(port)
        await until(lambda: client.healthy, "the gateway notices that it is back")
        assert bytes(await tokens_of(Pool([client]), "again")) == b"good"
    finally:
        await client.close()
        await server.stop()


async def test_an_engine_that_answers_late_is_not_gone(monkeypatch):
    """Until it does so again and again."""
    monkeypatch.setattr(client_module, "INFO_TIMEOUT_S", 0.05)
    engine = MockEngine(reply="good")
    server = GrpcServer(port=0)
    await server.start()
    await server.serve(mock_service(engine))
    client = await RemoteEngineClient.connect(f"127.0.0.1:{server.port}", timeout_s=20, poll_s=0.01)
    asked, real = [], engine.stats

    def late():
        asked.append(client.healthy)
        time.sleep(0.15)
        return real()

    try:
        engine.stats = late
        await until(lambda: len(asked) >= 3)
        assert asked[:3] == [True] * 3
        await until(lambda: not client.healthy, "it was late too often")
        assert len(asked) >= client_module.MAX_LATE
        engine.stats = real
        await until(lambda: client.healthy)
    finally:
        await client.close()
        await server.stop()
