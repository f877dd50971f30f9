"""Keys and TLS in front of both protocols and the gateway's client, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from typing import Any

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from proto.jaxserve.v1 import control_pb2, control_pb2_grpc, inference_pb2_grpc
from proto.jaxserve.v1 import inference_pb2 as pb
from serving.access import Access, ClientTls, KeyRing, ServerTls
from serving.engine.api.sampling_params import SamplingParams
from serving.engine.api.types import EngineRequest
from serving.errors import ErrorKind, RequestError
from serving.frontends.app import serve_http
from serving.frontends.grpc.client import RemoteEngineClient
from serving.frontends.grpc.server import GrpcServer
from serving.frontends.page.page import page_paths
from serving.service import Limits
from tests.mock_engine import MockEngine, mock_service, until
from tests.serving.access import certificates

ALICE, BOB, ADMIN, WATCH = (f"sk-{name}-0123456789abcdef" for name in ("alice", "bob", "admin", "watch"))
ACCESS = Access(KeyRing.of([ALICE, BOB], [ADMIN]))
WATCHED = Access(KeyRing.of([ALICE], [ADMIN], monitors=[WATCH]))
BODY = {"prompt": "hi", "max_tokens": 3, "model": "default"}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@contextlib.asynccontextmanager
async def http_server(
    engine: MockEngine | None = None, limits: Limits | None = None, **options: Any
) -> AsyncIterator[Any]:
    server = await serve_http(mock_service(engine or MockEngine(reply="Hello"), limits=limits), port=0, **options)
    try:
        yield server
    finally:
        await server.stop(grace_s=1.0)


@contextlib.asynccontextmanager
async def grpc_server(engine: MockEngine | None = None, **options: Any) -> AsyncIterator[str]:
    server = GrpcServer(port=0, **options)
    port = await server.start()
    await server.serve(mock_service(engine or MockEngine(reply="Hello")))
    try:
        yield f"localhost:{port}"
    finally:
        await server.stop()


# -- HTTP ----------------------------------------------------------------------------------------------------------------


async def test_every_route_but_the_probes_needs_a_key():
    """Enumerated from the application itself, so that a new route is in."""
    async with http_server(access=ACCESS) as server, httpx.AsyncClient(base_url=server.url, timeout=60) as client:
        app = server._server.config.app
        document = (await client.get("/openapi.json", headers=bearer(ALICE))).json()
        routes = {(m.upper(), path) for path, methods in document["paths"].items() for m in methods}
        routes |= {("GET", path) for path in ("/static/nothing.js", "/openapi.json", "/metrics", "/nothing")}
        assert len(routes) > 15 and app is not None
        for method, path in sorted(routes):
            for headers in ({}, bearer("sk-wrong-0123456789abcdef"), {"Authorization": ALICE}):
                reply = await client.request(method, path.replace("{", "").replace("}", ""), headers=headers)
                if path in ("/health", "/ready"):
                    assert reply.status_code == 200
                    continue
                assert reply.status_code == 401, (method, path)
                error = reply.json()["error"]
                if path.startswith("/api/"):
                    assert "key" in error.lower()  # Ollama's shape is a sentence alone
                elif path.startswith("/v1/messages"):
                    assert error["type"] == "authentication_error"
                else:
                    assert error["code"] == "invalid_api_key"
                assert reply.headers["WWW-Authenticate"] == "Bearer" and reply.headers["X-Request-Id"]
        assert (await client.get("/v1/models", headers=bearer(ALICE))).status_code == 200
        for path in page_paths():
            page = await client.get(path)
            assert page.status_code == 200 and "mock" not in page.text, path
            assert (await client.post(path)).status_code == 401
        for path in ("/static/../v1/models", "/static//page.js", "/static/page.js/", "/static/", "/static"):
            url = httpx.URL(server.url).copy_with(raw_path=path.encode())
            assert (await client.get(url)).status_code == 401, path


@pytest.mark.parametrize(
    "target",
    [
        "/v1/models?/health", "/v1/models#/health", "//health/../v1/models", "/health/../v1/models", "/health/..%2fv1/models",
        "/health%2f..%2fv1%2fmodels", "/%76%31/models", "/V1/models", "/v1//models", "/v1/models/", "/v1/models;/health",
        "/v1/models%00/health", "http://x/health/../v1/models", "http://health/v1/models", "/health?x", "/ready/", "/HEALTH",
        "/./v1/models", "*",
    ],
)  # fmt: skip
async def test_no_spelling_of_a_path_or_host_goes_past_the_key(target):
    async with http_server(access=ACCESS) as server:
        for host in ("localhost", "localhost/health", "health", "localhost:1/health?", ""):
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            extra = "X-Forwarded-Prefix: /health\r\nX-Original-URL: /health\r\nX-Rewrite-URL: /health\r\n"
            writer.write(f"GET {target} HTTP/1.1\r\nHost: {host}\r\n{extra}Connection: close\r\n\r\n".encode())
            reply = await reader.read()
            writer.close()
            assert b"mock" not in reply, "nothing about the model without a key"
            assert int(reply.split()[1]) in ((200,) if target in ("/health?x", "/ready/") else (307, 400, 401, 404))


async def test_what_all_users_do_is_for_keys_that_watch():
    """Prometheus gets a key that reads and asks for nothing; a user's key does not see what others do; without keys all is open."""
    async with http_server(access=WATCHED) as server, httpx.AsyncClient(base_url=server.url, timeout=60) as client:
        for path in ("/metrics", "/load"):
            statuses = [(await client.get(path, headers=bearer(key))).status_code for key in (ALICE, WATCH, ADMIN)]
            assert statuses == [403, 200, 200], path
        reply = await client.get("/metrics", headers=bearer(ALICE))
        assert reply.json()["error"]["code"] == "monitor_key_needed" and "--monitor-api-key" in reply.text
        assert (await client.get("/v1/models", headers=bearer(WATCH))).status_code == 200
        for path, body in (
            ("/v1/completions", BODY),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
            ("/v1/responses", {"input": "a"}),
            ("/tokenize", {"prompt": "a"}),
            ("/detokenize", {"tokens": [1]}),
            ("/pause", {}),
        ):
            reply = await client.post(path, json=body, headers=bearer(WATCH))
            assert reply.status_code == 403, path
    async with http_server() as server, httpx.AsyncClient(base_url=server.url, timeout=60) as client:
        assert [(await client.get(path)).status_code for path in ("/metrics", "/load")] == [200, 200]


async def test_two_keys_in_one_request_are_none():
    async with http_server(access=ACCESS) as server, httpx.AsyncClient(base_url=server.url, timeout=60) as client:
        headers = [("Authorization", f"Bearer {ALICE}"), ("Authorization", f"Bearer {BOB}")]
        assert (await client.get("/v1/models", headers=headers)).status_code == 401


async def test_a_key_is_the_tenant_and_scopes_the_cache():
    engine = MockEngine(reply="Hello")
    async with (
        http_server(engine, access=ACCESS) as server,
        httpx.AsyncClient(base_url=server.url, timeout=60) as client,
    ):
        for key in (ALICE, BOB, ALICE):
            reply = await client.post("/v1/completions", json={**BODY, "cache_salt": "s"}, headers=bearer(key))
            assert reply.status_code == 200
    assert [r.tenant for r in engine.requests] == ["key-1", "key-2", "key-1"]
    salts = [r.cache_salt for r in engine.requests]
    assert salts[0] == salts[2] != salts[1]


async def test_rates_are_counted_by_key():
    limits = Limits(requests_per_minute=2)
    async with (
        http_server(limits=limits, access=ACCESS) as server,
        httpx.AsyncClient(base_url=server.url, timeout=60) as client,
    ):
        replies = [await client.post("/v1/completions", json=BODY, headers=bearer(ALICE)) for _ in range(3)]
        assert [r.status_code for r in replies] == [200, 200, 429] and int(replies[2].headers["Retry-After"]) > 1
        assert (await client.post("/v1/completions", json=BODY, headers=bearer(BOB))).status_code == 200


async def test_requests_at_once_are_counted_by_key():
    """One key cannot take all the room: whatever it asks for, another's request is taken."""
    engine = MockEngine(reply="word " * 700, step_s=0.005, max_model_len=4096)
    limits = Limits(max_live_per_key=2, max_live_extra=6)
    async with http_server(engine, limits, access=ACCESS) as server:
        async with httpx.AsyncClient(base_url=server.url, timeout=30) as client:

            def ask(key: str, **more: Any) -> Any:
                body = {**BODY, "max_tokens": 3000, "temperature": 1.0, **more}
                return asyncio.create_task(client.post("/v1/completions", json=body, headers=bearer(key)))

            running = [ask(ALICE, n=3), ask(ALICE)]
            await until(lambda: len(engine.live) == 4, "both run")
            for refused in (
                await ask(ALICE),
                await client.post("/tokenize", json={"prompt": "a"}, headers=bearer(ALICE)),
            ):
                assert refused.status_code == 429 and refused.json()["error"]["code"] == "rate_limit_exceeded"
                assert refused.headers["Retry-After"]
            assert (await ask(BOB, max_tokens=2)).status_code == 200
            running[1].cancel()
            await until(lambda: len(engine.live) == 3, "it is gone")
            too_many = await ask(ALICE, n=3)
            assert too_many.status_code == 429 and "completions of this key" in too_many.json()["error"]["message"]
            assert (await ask(ALICE, max_tokens=2)).status_code == 200
            running[0].cancel()
            await until(lambda: not engine.live, "all are gone")


async def test_cross_origin_pages_get_nothing_by_default():
    async with http_server(access=ACCESS) as server, httpx.AsyncClient(base_url=server.url, timeout=60) as client:
        asked = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
        reply = await client.options("/v1/completions", headers=asked)
        assert not any(name.startswith("access-control") for name in reply.headers)
        reply = await client.get("/v1/models", headers={**asked, **bearer(ALICE)})
        assert not any(name.startswith("access-control") for name in reply.headers)


# -- gRPC ----------------------------------------------------------------------------------------------------------------


def metadata(key: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {key}"),)


async def status_of(call: Any) -> grpc.StatusCode:
    try:
        if hasattr(call, "__aiter__"):
            async for _ in call:
                pass
        else:
            await call
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


async def test_every_call_but_health_needs_a_key():
    async with grpc_server(access=ACCESS) as target, grpc.aio.insecure_channel(target) as channel:
        inference, control = inference_pb2_grpc.InferenceStub(channel), control_pb2_grpc.ControlStub(channel)
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)

        def calls(md: Any) -> list[Any]:
            made: list[Any] = []
            for stub, service in ((inference, "Inference"), (control, "Control")):
                module = pb if service == "Inference" else control_pb2
                for method in module.DESCRIPTOR.services_by_name[service].methods:
                    kind = getattr(module, method.input_type.name)
                    made.append(getattr(stub, method.name)(kind(), metadata=md))
            listing = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
            made.append(reflection.ServerReflectionInfo(listing, metadata=md))
            return made

        for md in ((), metadata("sk-wrong-0123456789abcdef"), (("authorization", ALICE),), metadata(ALICE) * 2):
            for call in calls(md):
                assert await status_of(call) is grpc.StatusCode.UNAUTHENTICATED
        for call in calls(metadata(ALICE)):
            assert await status_of(call) is not grpc.StatusCode.UNAUTHENTICATED
        check = health_pb2_grpc.HealthStub(channel).Check
        assert (await check(health_pb2.HealthCheckRequest())).status == health_pb2.HealthCheckResponse.SERVING
        assert await status_of(channel.unary_unary("/jaxserve.v1.Nothing/At")(b"")) is grpc.StatusCode.UNAUTHENTICATED


async def test_the_load_is_told_to_keys_that_watch():
    """Others learn what the server is; a gateway with a user's key still works."""
    engine = MockEngine(reply="Hello")
    async with grpc_server(engine, access=WATCHED) as target, grpc.aio.insecure_channel(target) as channel:
        inference, control = inference_pb2_grpc.InferenceStub(channel), control_pb2_grpc.ControlStub(channel)
        ask = pb.GenerateRequest(text="x")
        assert await status_of(inference.Generate(ask, metadata=metadata(ALICE))) is grpc.StatusCode.OK
        assert await status_of(inference.Generate(ask, metadata=metadata(WATCH))) is grpc.StatusCode.PERMISSION_DENIED
        infos = [
            await control.GetServerInfo(control_pb2.GetServerInfoRequest(), metadata=metadata(key))
            for key in (ALICE, WATCH, ADMIN)
        ]
        assert [info.num_steps > 0 for info in infos] == [False, True, True]
        assert [info.num_pages_total > 0 for info in infos] == [False, True, True]
        assert all(info.platform == "cpu" for info in infos)


async def test_only_the_owner_and_admins_end_a_request():
    engine = MockEngine(reply="word " * 700, step_s=0.005, max_model_len=4096)
    async with grpc_server(engine, access=ACCESS) as target, grpc.aio.insecure_channel(target) as channel:
        inference, control = inference_pb2_grpc.InferenceStub(channel), control_pb2_grpc.ControlStub(channel)
        for who in (ALICE, ADMIN):
            call = inference.Generate(pb.GenerateRequest(text="x", request_id="mine"), metadata=metadata(ALICE))
            stream = aiter(call)
            await anext(stream)
            ask = control_pb2.AbortRequest(request_id="mine")
            assert not (await control.Abort(ask, metadata=metadata(BOB))).found
            assert (await control.Abort(ask, metadata=metadata(who))).found
            last = [message async for message in stream][-1]
            assert last.finish_reason == pb.FINISH_REASON_ABORT
        assert [r.tenant for r in engine.requests] == ["key-1", "key-1"]


async def test_gateways_name_their_clients_tenants(tmp_path):
    from serving.access.keys import Role, file_line

    file = tmp_path / "keys"
    file.write_text(file_line("gw", Role.PROXY, ADMIN))
    engine = MockEngine(reply="Hello")
    async with grpc_server(engine, access=Access(KeyRing.of(file=str(file)))) as target:
        with pytest.raises(RequestError) as caught:
            await RemoteEngineClient.connect(target, timeout_s=10)
        assert caught.value.kind is ErrorKind.UNAUTHENTICATED
        client = await RemoteEngineClient.connect(target, timeout_s=10, api_key=ADMIN, poll_s=0.05)
        request = EngineRequest("r", (1, 2), SamplingParams(max_tokens=3), (257,), tenant="alice", cache_salt="s")
        assert [t async for out in client.generate(request) for t in out.token_ids]
        await client.close()
    assert (engine.requests[0].tenant, engine.requests[0].cache_salt) == ("alice", "s")


# -- TLS -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pki(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pki")
    certificates.make(folder)
    return folder


def tls(pki, mutual=False) -> ServerTls:
    ca = {"ca_certs": f"{pki}/ca.pem", "cert_reqs": "required"} if mutual else {}
    return ServerTls(f"{pki}/server.key", f"{pki}/server.pem", **ca)


def context(pki, name: str | None = None) -> ssl.SSLContext:
    made = ssl.create_default_context(cafile=f"{pki}/ca.pem")
    if name:
        made.load_cert_chain(f"{pki}/{name}.pem", f"{pki}/{name}.key")
    return made


async def test_https(pki):
    async with http_server(tls=tls(pki), access=ACCESS) as server:
        assert server.url.startswith("https://")
        url = f"https://localhost:{server.port}/v1/models"
        async with httpx.AsyncClient(verify=context(pki), timeout=60) as client:
            assert (await client.get(url, headers=bearer(ALICE))).status_code == 200
            assert (await client.get(url)).status_code == 401
        async with httpx.AsyncClient(timeout=60) as client:
            with pytest.raises(httpx.ConnectError):
                await client.get(url)
            with pytest.raises(httpx.TransportError):
                await client.get(url.replace("https", "http"))
        old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
        old.maximum_version = ssl.TLSVersion.TLSv1_1
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await asyncio.open_connection("127.0.0.1", server.port, ssl=old)


async def test_mutual_https(pki):
    async with http_server(tls=tls(pki, mutual=True)) as server:
        url = f"https://localhost:{server.port}/v1/models"
        async with httpx.AsyncClient(verify=context(pki, "client"), timeout=60) as client:
            assert (await client.get(url)).status_code == 200
        for name in (None, "stranger"):
            async with httpx.AsyncClient(verify=context(pki, name), timeout=60) as client:
                with pytest.raises(httpx.TransportError):
                    await client.get(url)


@pytest.mark.parametrize("mutual", [False, True])
async def test_grpc_over_tls_and_mutual_tls(pki, mutual):
    async with grpc_server(tls=tls(pki, mutual), access=ACCESS) as target:
        good = (
            ClientTls(f"{pki}/ca.pem", f"{pki}/client.key", f"{pki}/client.pem")
            if mutual
            else ClientTls(f"{pki}/ca.pem")
        )
        client = await RemoteEngineClient.connect(target, timeout_s=20, api_key=ALICE, tls=good)
        assert client.healthy and client.info().model_id == "mock"
        await client.close()
        wrong = ClientTls(f"{pki}/ca.pem") if mutual else ClientTls()
        for bad in (wrong, None):
            with pytest.raises(RequestError) as caught:
                await RemoteEngineClient.connect(target, timeout_s=1, api_key=ALICE, tls=bad)
            assert caught.value.kind in (ErrorKind.UNAVAILABLE, ErrorKind.DEADLINE_EXCEEDED)


def test_tls_files_that_cannot_be_used_are_told(pki, tmp_path):
    with pytest.raises(ValueError, match="cannot be used"):
        ServerTls(f"{pki}/client.key", f"{pki}/server.pem")
    with pytest.raises(ValueError, match="cannot be used"):
        ServerTls(f"{pki}/none.key", f"{pki}/server.pem")
    with pytest.raises(ValueError, match="ssl_ca_certs"):
        ServerTls(f"{pki}/server.key", f"{pki}/server.pem", cert_reqs="required")
    with pytest.raises(ValueError, match="both"):
        ClientTls(keyfile=f"{pki}/client.key")
    with pytest.raises(ValueError, match="cannot be read"):
        ClientTls(f"{tmp_path}/none.pem").grpc_arguments()


async def test_a_key_goes_with_the_task_and_not_to_the_next_call():
    """The caller is a context variable: calls that run at once keep theirs."""
    engine = MockEngine(reply="word " * 40, step_s=0.002)
    async with (
        http_server(engine, access=ACCESS) as server,
        httpx.AsyncClient(base_url=server.url, timeout=30) as client,
    ):
        asked = [
            client.post("/v1/completions", json={**BODY, "max_tokens": 20}, headers=bearer(k)) for k in (ALICE, BOB) * 8
        ]
        await asyncio.gather(*asked)
    assert sorted(r.tenant for r in engine.requests) == ["key-1"] * 8 + ["key-2"] * 8
    await until(lambda: not engine.live)
