"""Control over HTTP and gRPC: who may, what it does, what it says."""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from proto.jaxserve.v1 import control_pb2, control_pb2_grpc
from serving.access import Access, KeyRing
from serving.errors import ErrorKind, RequestError
from serving.frontends.app import serve_http
from serving.frontends.grpc.server import GrpcServer
from serving.metrics import MeteredClient
from tests.mock_engine import MockEngine, mock_service, until

USER, ADMIN = "sk-user-0123456789abcdef", "sk-admin-0123456789abcdef"
ACCESS = Access(KeyRing.of([USER], [ADMIN]))


class FakeLifecycle:
    """Notes what it was asked, off the event loop."""

    paused = asleep = False

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        def act(*args: Any) -> None:
            assert threading.current_thread() is not threading.main_thread(), "it would block the event loop"
            self.asked.append((name, *args))
            if name == "update_weights" and args == ("missing",):
                raise RequestError(ErrorKind.FAILED_PRECONDITION, "The weights cannot be used: no such file.")
            if name in ("sleep", "wake"):
                self.asleep = name == "sleep"
            if name in ("pause", "resume"):
                self.paused = name == "pause"

        return act


def controlled() -> tuple[MockEngine, Any]:
    engine = MockEngine(reply="word " * 50, step_s=0.01)
    engine.lifecycle = FakeLifecycle()  # type: ignore[attr-defined]
    return engine, mock_service(MeteredClient(engine))  # type: ignore[arg-type]


@contextlib.asynccontextmanager
async def http(service: Any, access: Access, key: str | None = ADMIN):
    server = await serve_http(service, port=0, access=access)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    async with httpx.AsyncClient(base_url=server.url, headers=headers, timeout=60) as client:
        yield client
    await server.stop(grace_s=0.5)


ROUTES = ["/pause", "/resume", "/sleep", "/wake_up", "/drain", "/reset_prefix_cache", "/update_weights"]


@pytest.mark.parametrize(("access", "key"), [(Access(), None), (Access(KeyRing.of([USER])), USER), (ACCESS, USER)])
async def test_nobody_but_an_admin_controls(access, key):
    engine, service = controlled()
    async with http(service, access, key) as client:
        for path in ROUTES:
            reply = await client.post(path, json={"source": "x"})
            assert reply.status_code == 403, path
            assert reply.json()["error"]["code"] in ("control_closed", "admin_key_needed")
        for path in ("/is_paused", "/is_sleeping"):
            assert (await client.get(path)).status_code == 403
    server = GrpcServer(port=0, access=access)
    port = await server.start()
    await server.serve(service)
    md = (("authorization", f"Bearer {key}"),) if key else ()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = control_pb2_grpc.ControlStub(channel)
        for name in ("Pause", "Resume", "Sleep", "WakeUp", "Drain", "ResetPrefixCache", "UpdateWeights"):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await getattr(stub, name)(getattr(control_pb2, f"{name}Request")(), metadata=md)
            assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
    await server.stop()
    assert not engine.lifecycle.asked and not service.draining  # type: ignore[attr-defined]


async def test_http_routes_do_what_they_say():
    engine, service = controlled()
    async with http(service, ACCESS) as client:
        assert (await client.post("/pause")).json() == {
            "paused": True,
            "asleep": False,
            "draining": False,
            "num_live": 0,
        }
        assert (await client.get("/is_paused")).json() == {"is_paused": True}
        await client.post("/resume")
        assert (await client.post("/sleep?level=2")).json()["asleep"]
        assert (await client.get("/is_sleeping")).json() == {"is_sleeping": True}
        await client.post("/wake_up")
        await client.post("/reset_prefix_cache")
        await client.post("/update_weights", json={"source": "good"})
        reply = await client.post("/update_weights", json={"source": "missing"})
        assert reply.status_code == 409 and "no such file" in reply.json()["error"]["message"]
        assert (await client.post("/update_weights", json={"source": ""})).status_code == 400
        assert (await client.post("/sleep?level=x")).status_code == 400
    asked = engine.lifecycle.asked  # type: ignore[attr-defined]
    names = ["pause", "resume", "sleep", "wake", "reset_prefix_cache", "update_weights", "update_weights"]
    assert [a[0] for a in asked] == names and asked[2] == ("sleep", 2)


async def test_grpc_drains_and_resumes():
    engine, service = controlled()
    server = GrpcServer(port=0, access=ACCESS)
    port = await server.start()
    await server.serve(service)
    md = (("authorization", f"Bearer {ADMIN}"),)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub, health = control_pb2_grpc.ControlStub(channel), health_pb2_grpc.HealthStub(channel)

        async def serving() -> int:
            return (await health.Check(health_pb2.HealthCheckRequest(service="jaxserve.v1.Inference"))).status

        state = (await stub.Drain(control_pb2.DrainRequest(timeout_s=5.0), metadata=md)).state
        assert state.draining and not state.num_live
        for _ in range(500):
            if await serving() == health_pb2.HealthCheckResponse.NOT_SERVING:
                break
        else:
            raise AssertionError("health never said so")
        with pytest.raises(RequestError):
            service.check_ready()
        assert not (await stub.Resume(control_pb2.ResumeRequest(), metadata=md)).state.draining
        service.check_ready()
        await stub.Sleep(control_pb2.SleepRequest(), metadata=md)
        await stub.UpdateWeights(control_pb2.UpdateWeightsRequest(source="m"), metadata=md)
    await server.stop()
    assert engine.lifecycle.asked == [("resume",), ("sleep", 1), ("update_weights", "m")]  # type: ignore[attr-defined]
    await until(lambda: not engine.live)


async def test_where_no_engine_is_there_is_nothing_to_control():
    async with http(mock_service(MockEngine()), ACCESS) as client:
        assert (await client.post("/pause")).status_code == 501
        assert (await client.post("/drain")).json()["draining"]
        assert (await client.get("/ready")).status_code == 503
        assert not (await client.post("/resume")).json()["draining"]
        assert (await client.get("/ready")).status_code == 200


async def test_an_engine_that_sleeps_is_not_ready_and_says_why():
    engine, service = controlled()
    engine.refusal = "The server is asleep; wake it up, or ask another replica."  # type: ignore[attr-defined]
    async with http(service, Access(), None) as client:
        reply = await client.get("/ready")
        assert reply.status_code == 503 and "asleep" in reply.text
        assert (await client.get("/health")).status_code == 200, "alive all the same: nothing is to be restarted"
