"""The whole way HTTP -> gateway -> gRPC -> engine; and gateways that are there before their engines, or after."""

from __future__ import annotations

import asyncio
import contextlib
import re
import sys

import grpc
import httpx
import pytest

from serving.access import Access, KeyRing
from serving.errors import ErrorKind
from serving.frontends.app import serve_http
from serving.frontends.grpc.client import RemoteEngineClient, RemoteGrammars
from serving.frontends.grpc.errors import error_of
from serving.frontends.grpc.server import GrpcServer
from serving.gateway import Pool, connecting
from serving.gateway.__main__ import Gateway
from serving.gateway.flags import parse
from serving.metrics import MeteredClient
from tests.mock_engine import MockEngine, mock_service, until


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
        async with httpx.AsyncClient(base_url=http.url, timeout=60) as client:
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


async def test_an_engine_that_is_lost_in_mid_stream_is_told_in_our_words():
    engine = MockEngine(reply="x" * 300, step_s=0.01, max_model_len=4096)
    server = GrpcServer("127.0.0.1", 0)
    await server.start()
    await server.serve(mock_service(engine))
    client = await RemoteEngineClient.connect(f"127.0.0.1:{server.port}")
    http = await serve_http(mock_service(MeteredClient(Pool([client]))), port=0)  # type: ignore[arg-type]
    body = {"messages": [{"role": "user", "content": "hi"}], "stream": True}
    text = ""
    async with (
        httpx.AsyncClient(base_url=http.url, timeout=30) as web,
        web.stream("POST", "/v1/chat/completions", json=body) as reply,
    ):
        async for piece in reply.aiter_text():
            if not text:
                await server._server.stop(0.0)  # type: ignore[union-attr]
            text += piece
    await http.stop()
    await client.close()
    await server.stop(0.0)
    error = text.split("data: ")[-2]
    assert text.endswith("data: [DONE]\n\n") and '"error"' in error, text[-500:]
    for word in ("Socket", "RST_STREAM", "recvmsg", "GOAWAY", "Cancel", "127.0.0.1", "ipv4", "StatusCode"):
        assert word not in error, error


@pytest.mark.parametrize(
    "status", ["UNAVAILABLE", "INTERNAL", "UNKNOWN", "CANCELLED", "DEADLINE_EXCEEDED", "UNIMPLEMENTED"]
)
def test_what_grpc_says_itself_is_not_passed_on(status: str):
    empty = grpc.aio.Metadata()
    raw = grpc.aio.AioRpcError(grpc.StatusCode[status], empty, empty, details="recvmsg:Connection reset by peer")
    found = error_of(raw)
    assert "recvmsg" not in found.message and found.message.endswith(".")
    assert (found.kind is ErrorKind.UNAVAILABLE) == (status not in ("DEADLINE_EXCEEDED", "UNIMPLEMENTED"))


async def test_a_connector_waits_and_says_for_whom(monkeypatch):
    monkeypatch.setattr(connecting, "TRY_S", 0.3)
    monkeypatch.setattr(connecting, "AGAIN_S", 0.02)
    said: list[str] = []
    found: list[str] = []
    loading, locked = (
        GrpcServer("127.0.0.1", 0),
        GrpcServer("127.0.0.1", 0, access=Access(KeyRing.of(["sk-0123456789abcdef"]))),
    )
    for server in (loading, locked):
        await server.start()
    await locked.serve(mock_service(MockEngine()))
    names = [f"127.0.0.1:{server.port}" for server in (loading, locked)] + ["127.0.0.1:1"]
    engines = connecting.Connector(names, lambda name, client: found.append(name), say=said.append)
    await engines.start()
    try:
        await until(lambda: len(said) >= 3, "all three are waited for")
        sentence = engines.sentence()
        assert all(name in sentence for name in names)
        assert f"No engine at {names[0]}: The model is still being loaded." in sentence
        assert any(names[1] in line and "API key" in line and "left out" in line for line in said)
        await loading.serve(mock_service(MockEngine()))
        await until(lambda: found == [names[0]], "the first is there")
        assert names[0] not in engines.sentence() and f"the engine at {names[0]} is there" in said
    finally:
        await engines.close()
        for server in (loading, locked):
            await server.stop(0.0)


@contextlib.asynccontextmanager
async def _process(*flags: str):
    """A gateway's process and the lines it has said."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "serving.gateway", "--port", "0", *flags, stderr=asyncio.subprocess.PIPE
    )
    lines: list[str] = []

    async def read() -> None:
        assert process.stderr is not None
        async for line in process.stderr:
            lines.append(line.decode())

    reading = asyncio.create_task(read())
    try:
        yield process, lines
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        await reading


async def test_a_gateway_without_its_engine_listens_and_says_so():
    async with _process("--target", "127.0.0.1:1") as (process, lines), asyncio.timeout(120):
        await until(lambda: any("listening at" in line for line in lines), seconds=100)
        url = re.search(r"http://[\d.:]+", "".join(lines))[0].rstrip(";")  # type: ignore[index]
        async with httpx.AsyncClient(base_url=url, timeout=60) as http:
            assert (await http.get("/health")).status_code == 200
            ready = await http.get("/ready")
            assert ready.status_code == 503 and "127.0.0.1:1" in ready.json()["error"]["message"]
            models = await http.get("/v1/models")
            assert models.status_code == 503 and models.headers["Retry-After"] == "2"
            assert "127.0.0.1" not in models.text
        process.terminate()
        assert await process.wait() == 0


async def test_one_that_may_not_wait_for_ever_names_whom_it_waited_for():
    async with (
        _process("--target", "127.0.0.1:1", "--connect-timeout", "0.5") as (process, lines),
        asyncio.timeout(120),
    ):
        assert await process.wait() == 1
        await until(lambda: "error: No engine at 127.0.0.1:1" in "".join(lines))
        assert "Traceback" not in "".join(lines)


@pytest.mark.parametrize("signals", [1, 2])
async def test_what_a_gateways_stop_cuts_says_so(signals: int):
    """Its engine goes on: it is the gateway that leaves."""
    engine = MockEngine(reply="x" * 3000, step_s=0.01, max_model_len=4096)
    server = GrpcServer("127.0.0.1", 0)
    await server.start()
    await server.serve(mock_service(engine))
    client = await RemoteEngineClient.connect(f"127.0.0.1:{server.port}")
    gateway = Gateway(parse(["--target", "x:1", "--drain-timeout", "0.2" if signals == 1 else "1000"]))
    gateway._service = mock_service(MeteredClient(Pool([client])))  # type: ignore[arg-type]
    http = await serve_http(gateway._service, port=0)
    body = {"prompt": "hi", "stream": True, "max_tokens": 3000}
    async with httpx.AsyncClient(base_url=http.url, timeout=30) as web:
        reading = asyncio.create_task(web.post("/v1/completions", json=body))
        await until(lambda: engine.live, "it runs")
        stopping = asyncio.create_task(gateway._drain())
        for _ in range(signals):
            gateway._on_signal()
        text = (await reading).text
        await stopping
    assert '"code":"server_shutting_down"' in text.replace(": ", ":") and '"finish_reason":"' not in text, text[-300:]
    await until(lambda: not engine.live, "the engine works for nobody")
    await http.stop()
    await client.close()
    await server.stop(0.0)


@pytest.mark.parametrize("flags", [["--target", " , "], ["--target", "a:1", "--target-ssl-ca-certs", "/nowhere.pem"]])
def test_wrong_flags_are_told(flags, capsys):
    with pytest.raises(SystemExit):
        parse(flags)
    assert re.search(r"--target|nowhere.pem", capsys.readouterr().err)
