"""What a client learns of a server by itself: health as it changes, adapters; and requests for adapters through a gateway."""

from __future__ import annotations

from serving.engine.api.adapters import AdapterInfo
from serving.engine.api.sampling_params import SamplingParams
from serving.engine.api.types import EngineRequest
from serving.errors import ErrorKind, RequestError
from serving.frontends.grpc.client import RemoteEngineClient
from serving.frontends.grpc.server import GrpcServer
from serving.gateway import Pool
from tests.mock_engine import MockEngine, mock_service, until

NEVER_S = 3600.0


class Adapters:
    """Those of a mock engine."""

    def __init__(self, *names: str) -> None:
        self.loaded = [AdapterInfo(name, "", f"digest of {name}", 8, 14) for name in names]

    def find(self, name: str) -> AdapterInfo | None:
        return next((one for one in self.loaded if one.name == name), None)

    def infos(self) -> list[AdapterInfo]:
        return self.loaded


async def _server(engine: MockEngine, port: int = 0):
    server, service = GrpcServer("127.0.0.1", port), mock_service(engine)
    await server.start()
    await server.serve(service)
    return server, service


async def test_health_is_told_without_asking_again():
    server, service = await _server(MockEngine())
    client = await RemoteEngineClient.connect(f"127.0.0.1:{server.port}", poll_s=NEVER_S)
    try:
        await until(lambda: client.healthy)
        service.start_draining()
        await until(lambda: not client.healthy, "a server that drains")
        service.stop_draining()
        await until(lambda: client.healthy, "one that takes requests again")
        port = server.port
        await server.stop(0.0)
        await until(lambda: not client.healthy, "one that is gone")
        server, service = await _server(MockEngine(), port)
        await until(lambda: client.healthy, "one that is back", 20)
    finally:
        await client.close()
        await server.stop(0.0)


async def _run(pool: Pool, adapter: str | None):
    request = EngineRequest("r", (1, 2), SamplingParams(max_tokens=2), eos_token_ids=(257,), adapter=adapter)
    return [output async for output in pool.generate(request)]


async def test_requests_for_an_adapter_go_where_it_is():
    engines = [MockEngine(), MockEngine(), MockEngine()]
    engines[0].adapters, engines[1].adapters = Adapters(), Adapters("a", "b")
    servers, clients = [], []
    try:
        for engine in engines:
            servers.append((await _server(engine))[0])
            clients.append(await RemoteEngineClient.connect(f"127.0.0.1:{servers[-1].port}", poll_s=0.02))
        assert clients[2].adapters is None and clients[0].adapters is not None
        pool = Pool(clients)
        assert pool.adapters is not None and [one.name for one in pool.adapters.infos()] == ["a", "b"]
        found = pool.adapters.find("b")
        assert found is not None and (found.digest, found.rank, found.num_matrices) == ("digest of b", 8, 14)
        for _ in range(3):
            await _run(pool, "digest of b")
        assert [one.adapter for one in engines[1].requests] == ["digest of b"] * 3
        assert not engines[0].requests
        engines[1].adapters.loaded.clear()
        await until(lambda: pool.members["1"].target.adapters == frozenset())
        try:
            await _run(pool, "digest of b")
            raise AssertionError("nobody has it any more")
        except RequestError as error:
            assert error.kind is ErrorKind.UNAVAILABLE
        for refuse in (lambda: pool.adapters.load("c", "/c"), lambda: pool.adapters.unload("a")):  # type: ignore[union-attr]
            try:
                refuse()
                raise AssertionError("they are another machine's")
            except (ValueError, RequestError) as error:
                assert "at the engines" in str(error)
    finally:
        for client in clients:
            await client.close()
        for server in servers:
            await server.stop(0.0)
