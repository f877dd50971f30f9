"""Several models over HTTP and gRPC: every dialect finds them, streams say what they wait for, admins move them, and metrics tell
them apart."""

from __future__ import annotations

import asyncio
import contextlib
import json
import pathlib
import threading

import grpc
import httpx
import pytest

from proto.jaxserve.v1 import control_pb2, control_pb2_grpc, inference_pb2, inference_pb2_grpc
from serving.access import Access
from serving.access.keys import KeyRing
from serving.engine.api.adapters import AdapterInfo, LoRARequest
from serving.frontends.app import serve_http
from serving.frontends.grpc.server import GrpcServer
from tests.mock_engine import until
from tests.serving.fleet.fakes import FakeMember, fleet_of

ADMIN = "sk-admin-0123456789"
HI = [{"role": "user", "content": "hi"}]


@contextlib.asynccontextmanager
async def served(*members, access=None, **options):
    fleet = fleet_of(*members, **options)
    access = access or Access(KeyRing.of([], [ADMIN]))
    server = await serve_http(fleet, port=0, access=access)
    headers = {"Authorization": f"Bearer {ADMIN}"}
    async with httpx.AsyncClient(base_url=server.url, timeout=30, headers=headers) as http:
        try:
            yield fleet, http
        finally:
            await fleet.abort_all()
            await server.stop(1.0)


async def test_every_dialect_reaches_each_model():
    async with served(FakeMember("a", aliases=("gpt-4o",)), FakeMember("b"), FakeMember("c")) as (_, http):
        bodies = {
            "/v1/chat/completions": {"messages": HI},
            "/v1/completions": {"prompt": "hi", "max_tokens": 64},
            "/v1/responses": {"input": "hi", "store": False},
            "/v1/messages": {"messages": HI, "max_tokens": 64},
            "/api/chat": {"messages": HI, "stream": False},
            "/api/generate": {"prompt": "hi", "stream": False},
        }
        for path, body in bodies.items():
            for name, says in (("a", "a"), ("b", "b"), ("c", "c"), ("gpt-4o", "a")):
                reply = await http.post(path, json={**body, "model": name})
                assert reply.status_code == 200 and f"I am {says}." in reply.text, (path, name, reply.text)
            unknown = await http.post(path, json={**body, "model": "d"})
            assert unknown.status_code == 404 and "'a', 'b', 'c'" in unknown.text, unknown.text
        tokens = await http.post("/tokenize", json={"prompt": "hi", "model": "c"})
        assert tokens.json()["count"] == 3
        assert "I am a." in (await http.post("/v1/chat/completions", json={"messages": HI})).text


async def test_lists_tell_where_each_model_is():
    async with served(FakeMember("a", pinned=True), FakeMember("b", keep_alive=300.0)) as (_, http):
        await http.post("/v1/chat/completions", json={"messages": HI, "model": "b"})
        cards = {one["id"]: one["status"] for one in (await http.get("/v1/models")).json()["data"]}
        assert {name: one["value"] for name, one in cards.items()} == {"a": "unloaded", "b": "loaded"}
        assert cards["a"]["pinned"] and cards["b"]["device_bytes"] == 10 and cards["b"]["running"] == 0
        assert (await http.get("/v1/models/b")).json()["status"]["value"] == "loaded"
        assert [one["name"] for one in (await http.get("/api/tags")).json()["models"]] == ["a", "b"]
        (running,) = (await http.get("/api/ps")).json()["models"]
        assert running["name"] == "b" and running["size_vram"] == running["size"] > 0
        anthropic = await http.get("/v1/models", headers={"anthropic-version": "2023-06-01"})
        assert [one["id"] for one in anthropic.json()["data"]] == ["a", "b"]


async def test_keep_alive_of_ollamas_clients_loads_keeps_and_lets_go():
    members = FakeMember("a"), FakeMember("b")
    async with served(*members) as (_, http):
        assert (await http.post("/api/generate", json={"model": "b"})).json()["done_reason"] == "load"
        assert members[1].ready
        await http.post("/api/chat", json={"model": "b", "messages": HI, "stream": False, "keep_alive": "10ms"})
        await until(lambda: not members[1].ready, "it to sleep after ten milliseconds")
        await http.post("/api/generate", json={"model": "b", "keep_alive": -1})
        assert members[1].ready and members[1].idle_s is None
        gone = await http.post("/api/generate", json={"model": "b", "keep_alive": 0})
        assert gone.json()["done_reason"] == "unload" and not members[1].ready
        wrong = await http.post("/api/generate", json={"model": "b", "keep_alive": "soon"})
        assert wrong.status_code == 400 and "keep_alive" in wrong.text


async def test_a_stream_says_what_it_waits_for_until_its_model_is_there():
    slow = FakeMember("slow")
    slow.gate = threading.Event()
    async with served(FakeMember("a"), slow) as (_, http):
        body = {"model": "slow", "messages": HI, "stream": True}
        async with http.stream("POST", "/v1/chat/completions", json=body) as reply:
            assert reply.headers["x-model-status"] == "slow is loading"
            lines = reply.aiter_lines()
            assert await anext(lines) == ": slow is loading"
            slow.gate.set()
            text = "".join([line async for line in lines if "content" in line])
        assert (
            "".join(json.loads(line)["choices"][0]["delta"].get("content", "") for line in text.split("data: ")[1:])
            == "I am slow."
        )


async def test_admins_move_models_and_others_may_not():
    a, b = FakeMember("a"), FakeMember("b")
    access = Access(KeyRing.of(["sk-user-0123456789"], [ADMIN]))
    async with served(a, b, access=access) as (_, http):
        reply = await http.post("/models/load", json={"model": "b", "pinned": True})
        assert reply.json()["status"] | {"value": "loaded", "pinned": True} == reply.json()["status"]
        assert (await http.post("/models/sleep", json={"model": "b"})).json()["status"]["value"] == "sleeping"
        assert (await http.post("/wake_up?model=b")).status_code == 200 and b.ready
        assert (await http.post("/models/unload", json={"model": "b", "pinned": False})).json()["status"][
            "value"
        ] == "unloaded"
        user = {"Authorization": "Bearer sk-user-0123456789"}
        assert (await http.post("/models/load", json={"model": "b"}, headers=user)).status_code == 403
        await http.post("/api/generate", json={"model": "a"}, headers=user)
        await http.post("/api/generate", json={"model": "a", "keep_alive": 0}, headers=user)
        assert a.ready  # a user's keep_alive is taken and changes nothing


async def test_a_tenants_model_is_nobody_elses():
    keys = KeyRing.of(["sk-first-0123456789", "sk-second-0123456789"], [ADMIN])
    first = keys.find("sk-first-0123456789").name
    async with served(FakeMember("a"), FakeMember("b"), access=Access(keys), tenants={"b": (first,)}) as (_, http):
        for key, status, names in (("sk-first-0123456789", 200, ["a", "b"]), ("sk-second-0123456789", 404, ["a"])):
            headers = {"Authorization": f"Bearer {key}"}
            assert [one["id"] for one in (await http.get("/v1/models", headers=headers)).json()["data"]] == names
            reply = await http.post("/v1/chat/completions", json={"messages": HI, "model": "b"}, headers=headers)
            assert reply.status_code == status
            assert status == 200 or "'b'," not in reply.text.replace("'b' does", "")


class Shelf:
    """As much of an `AdapterClient` as loading, lists and requests ask for."""

    def __init__(self):
        self.loaded = {}

    def locate(self, path):
        return pathlib.Path(path)

    def load(self, name, path, replace=False, *, within=None, tenants=None):
        if not pathlib.Path(path).is_dir():
            raise ValueError("there is no such adapter.")
        self.loaded[name] = AdapterInfo(name, path, name[:1] * 32, 8, 14, tenants=tenants)
        return self.loaded[name]

    def find(self, name):
        return self.loaded.get(name)

    def infos(self):
        return list(self.loaded.values())


async def test_a_request_for_an_adapter_loads_its_model_and_then_the_adapter(tmp_path):
    keys = KeyRing.of(["sk-first-0123456789", "sk-second-0123456789"], [ADMIN])
    mine = (keys.find("sk-first-0123456789").name,)
    a, b = FakeMember("a"), FakeMember("b")
    a.mock.adapters = Shelf()
    given = [("pirate", tmp_path, None), ("lawyer", tmp_path, mine), ("gone", tmp_path / "nowhere", None)]
    async with served(a, b, access=Access(keys)) as (fleet, http):
        fleet.declare(fleet.services[0], [LoRARequest(name, 0, str(path), whose) for name, path, whose in given])

        async def ask(model, key):
            headers = {"Authorization": f"Bearer {key}"}
            return await http.post("/v1/chat/completions", json={"messages": HI, "model": model}, headers=headers)

        assert (await ask("lawyer", "sk-second-0123456789")).status_code == 404 and a.engine is None
        for turn in range(2):
            reply = await ask("pirate", "sk-second-0123456789")
            assert reply.status_code == 200 and reply.json()["model"] == "pirate", reply.text
            assert a.mock.requests[-1].adapter == "p" * 32 and list(a.mock.adapters.loaded) == ["pirate"]
            if not turn:
                await http.post("/models/unload", json={"model": "a"})
                a.mock.adapters.loaded.clear()  # they go with the engine
        assert (await ask("lawyer", "sk-first-0123456789")).json()["model"] == "lawyer"
        assert (await ask("gone", "sk-first-0123456789")).status_code == 404
        listed = await http.get("/v1/models", headers={"Authorization": "Bearer sk-second-0123456789"})
        assert [one["id"] for one in listed.json()["data"]] == ["a", "pirate", "b"]


async def test_metrics_tell_the_models_apart():
    async with served(FakeMember("a"), FakeMember("b")) as (_, http):
        await http.post("/v1/chat/completions", json={"messages": HI, "model": "b"})
        text = (await http.get("/metrics")).text
        for name, count in (("a", "0.0"), ("b", "1.0")):
            assert (
                f'jaxserve:request_success_total{{engine="0",finished_reason="stop",model_name="{name}"}} {count}'
                in text
            )
        assert 'jaxserve:model_state{model_name="b",state="loaded"} 1.0' in text
        assert (
            'jaxserve:model_switches_total{model_name="b"} 1.0' in text
            and "jaxserve:models_memory_limit_bytes 20.0" in text
        )
        assert text.count("# TYPE jaxserve:num_requests_running ") == 1


async def test_grpc_generates_lists_loads_and_unloads():
    a, b = FakeMember("a"), FakeMember("b")
    fleet = fleet_of(a, b)
    server = GrpcServer("127.0.0.1", 0, access=Access(KeyRing.of([], [ADMIN])))
    await server.start()
    await server.serve(fleet)
    metadata = (("authorization", f"Bearer {ADMIN}"),)
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            inference, control = inference_pb2_grpc.InferenceStub(channel), control_pb2_grpc.ControlStub(channel)
            call = inference.Generate(inference_pb2.GenerateRequest(text="hi", model="b"), metadata=metadata)
            assert "".join([one.text async for one in call]) == "I am b."
            listed = await control.ListModels(control_pb2.ListModelsRequest(), metadata=metadata)
            assert [(one.name, one.state) for one in listed.models] == [("a", "unloaded"), ("b", "loaded")]
            loaded = await control.LoadModel(control_pb2.LoadModelRequest(model="a", pinned=True), metadata=metadata)
            assert loaded.model.state == "loaded" and loaded.model.pinned and loaded.model.device_bytes == 10
            slept = await control.UnloadModel(control_pb2.UnloadModelRequest(model="b", sleep=True), metadata=metadata)
            assert slept.model.state == "sleeping"
            gone = await control.UnloadModel(control_pb2.UnloadModelRequest(model="b"), metadata=metadata)
            assert gone.model.state == "unloaded"
            info = await control.GetServerInfo(control_pb2.GetServerInfoRequest(), metadata=metadata)
            assert info.num_pages_total == a.stats.num_pages_total + b.stats.num_pages_total
            with pytest.raises(grpc.aio.AioRpcError, match="does not exist"):
                await control.LoadModel(control_pb2.LoadModelRequest(model="c"), metadata=metadata)
    finally:
        await fleet.abort_all()
        await server.stop()


async def test_a_server_of_one_model_says_that_it_stays():
    from tests.mock_engine import mock_service

    server = await serve_http(mock_service(), port=0, access=Access(KeyRing.of([], [ADMIN])))
    async with httpx.AsyncClient(base_url=server.url, headers={"Authorization": f"Bearer {ADMIN}"}, timeout=60) as http:
        reply = await http.post("/models/load", json={"model": "mock"})
        assert reply.status_code == 409 and "one model" in reply.text
        assert "status" not in (await http.get("/v1/models")).json()["data"][0]
    await server.stop(1.0)
    await asyncio.sleep(0)
