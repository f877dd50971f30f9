"""What callers ask of the routing, and are told, over HTTP and gRPC; what the gateway counts."""

from __future__ import annotations

import contextlib

import grpc
import httpx
import pytest

from proto.jaxserve.v1 import inference_pb2 as pb
from proto.jaxserve.v1 import inference_pb2_grpc, sampling_pb2
from serving.access import caller_of_task
from serving.access.keys import Caller, Role
from serving.errors import RequestError
from serving.frontends.app import create_app
from serving.frontends.grpc.server import GrpcServer
from serving.gateway import Pool
from serving.gateway.asking import Asked, AskedByHeaders, AskedByMetadata
from serving.gateway.metrics import SPECS, GatewayMetrics, markdown_table
from serving.metrics import MeteredClient
from serving.routing.router import Wish
from tests.mock_engine import MockEngine, mock_service

LONG = "a prompt that is a good deal longer than one page of sixteen tokens"


@contextlib.asynccontextmanager
async def _gateway(count: int = 3, **options):
    engines = [MockEngine(reply="hi", **options) for _ in range(count)]
    pool = Pool(engines, names=[f"10.0.0.{i}:50051" for i in range(count)])
    client = MeteredClient(pool)
    client.metrics.add(GatewayMetrics(pool))
    service = mock_service(client)  # type: ignore[arg-type]
    app = AskedByHeaders(create_app(service))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://localhost") as web:
        yield engines, pool, service, web


async def _ask(web, text=LONG, headers=None, **more):
    body = {"prompt": text, "max_tokens": 4, **more}
    reply = await web.post("/v1/completions", json=body, headers=headers or {})
    assert reply.status_code == 200, reply.text
    return reply


async def test_a_decision_is_told_to_whoever_asks():
    async with _gateway() as (_, _, _, web):
        assert "x-gateway-decision" not in (await _ask(web)).headers
        told = (await _ask(web, headers={"x-gateway-debug": "1"})).headers["x-gateway-decision"]
        assert "reason=prefix" in told and "matched=64/68" in told and "attempt=1" in told and "10.0.0" not in told
        streamed = await _ask(web, headers={"X-Gateway-Debug": "true"}, stream=True)
        assert "reason=prefix" in streamed.headers["x-gateway-decision"]
        several = await _ask(web, headers={"x-gateway-debug": "1"}, n=2)
        assert several.headers["x-gateway-decision"].count("target=") == 2


async def test_a_retry_is_told_and_counted():
    async with _gateway(2) as (engines, pool, _, web):
        engines[0]._max_live = 0
        told = [(await _ask(web, f"{i}", {"x-gateway-debug": "1"})).headers["x-gateway-decision"] for i in range(4)]
        assert any("attempt=2" in one and "reason=retry" in one for one in told)
        assert pool.router.retries["resource_exhausted"] >= 1
        assert all(member.target.live == 0 and member.idle.is_set() for member in pool.members.values())


async def test_sessions_and_endpoints_by_header():
    async with _gateway() as (engines, _, _, web):
        for i in range(6):
            await _ask(web, str(i), {"x-session-id": "alice"})
        assert sorted(len(engine.requests) for engine in engines) == [0, 0, 6]
        reply = await _ask(web, "x", {"x-gateway-destination-endpoint": "gone:1,10.0.0.2:50051"})
        assert reply.headers["x-gateway-destination-endpoint-served"] == "10.0.0.2:50051"
        elsewhere = await _ask(web, "z", {"x-gateway-destination-endpoint": "guess:1"})
        assert "10.0.0" not in str(elsewhere.headers)  # a guess is told no address
        before = [len(engine.requests) for engine in engines]
        for i in range(4):
            await _ask(web, f"y{i}", {"x-gateway-destination-endpoint-subset": "10.0.0.0:50051, 10.0.0.1:50051"})
        after = [len(engine.requests) for engine in engines]
        assert after[2] == before[2] and sum(after) == sum(before) + 4


async def test_a_tenant_can_be_a_session():
    async with _gateway() as (engines, pool, _, web):
        pool.sticky_tenants = True
        for i in range(6):
            await _ask(web, str(i), {"x-gateway-inference-fairness-id": "team-a"})
        assert sorted(len(engine.requests) for engine in engines) == [0, 0, 6]


async def test_fairness_and_objective_are_the_requests_tenant_and_priority():
    async with _gateway(1) as (engines, pool, _, web):
        pool.objectives = {"batch": 10}
        await _ask(web, "x", {"x-gateway-inference-fairness-id": "team-a", "x-gateway-inference-objective": "batch"})
        await _ask(web, "y", {"x-gateway-inference-objective": "unknown"})
        assert [(one.tenant, one.priority) for one in engines[0].requests] == [("team-a", 10), (None, 0)]
        user = Caller("alice", Role.USER)
        token = caller_of_task.set(user)
        request = engines[0].requests[0]
        try:
            # A key of a user is its own tenant, and goes ahead of nobody.
            assert Asked(Wish(), tenant="team-a").concerned(request, {}).tenant == "alice"
            with pytest.raises(RequestError, match="may go behind"):
                Asked(Wish(), objective="urgent").concerned(request, {"urgent": -1})
        finally:
            caller_of_task.reset(token)


async def test_metrics_say_what_was_decided_and_of_whom():
    async with _gateway(2) as (_, _, _, web):
        await _ask(web)
        await _ask(web)
        text = (await web.get("/metrics")).text
    for spec in SPECS:
        if spec.name not in ("gateway_retries", "gateway_prefill_queued_tokens"):  # of what there is none
            assert f"\n{spec.sample}" in text, spec.name
    assert 'jaxserve:gateway_decisions_total{policy="cache",reason="prefix"} 1.0' in text
    assert 'jaxserve:gateway_target_healthy{number="1",target="10.0.0.1:50051"} 1.0' in text
    assert "jaxserve:gateway_matched_tokens_total 64.0" in text


def test_the_table_in_the_docs_is_the_gateways(request):
    docs = (request.config.rootpath / "docs" / "metrics.md").read_text()
    assert markdown_table() in docs


async def test_decisions_over_grpc_are_trailing_metadata():
    async with _gateway(2) as (_, _, service, _):
        server = GrpcServer("127.0.0.1", 0, interceptors=(AskedByMetadata(),))
        await server.start()
        await server.serve(service)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)
            for asked in ((), (("x-gateway-debug", "1"),)):
                call = stub.Generate(
                    pb.GenerateRequest(text=LONG, sampling_params=sampling_pb2.SamplingParams(max_tokens=3)),
                    metadata=asked,
                )
                assert [message async for message in call]
                trailing = dict(await call.trailing_metadata() or ())
                assert ("x-gateway-decision" in trailing) == bool(asked)
            assert "reason=prefix" in trailing["x-gateway-decision"]
            tokenized = await stub.Tokenize(pb.TokenizeRequest(text="x"), metadata=(("x-gateway-debug", "1"),))
            assert tokenized.token_ids
        await server.stop(0.0)
