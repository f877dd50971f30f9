"""A tiny server that takes adapters, and adapters for it."""

from __future__ import annotations

import contextlib
import gc
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from proto.jaxserve.v1 import control_pb2_grpc, inference_pb2_grpc
from serving.access import Access, KeyRing
from serving.boot.startup import Started, start
from serving.engine.api.config import EngineConfig
from serving.frontends.app import serve_http
from serving.frontends.grpc.server import GrpcServer
from tests.models.adapters.make import write_adapter, write_base
from tests.tiny import one_width

ANNA, BERT, ADMIN = ("sk-anna-0123456789abcdef", "sk-bert-0123456789abcdef", "sk-admin-0123456789abcdef")
ACCESS = Access(KeyRing.of([ANNA, BERT], [ADMIN]))  # their names are key-1, key-2 and admin-1

SETTINGS: dict[str, Any] = {
    "dtype": "float32", "max_model_len": 128, "max_num_seqs": 4, "max_num_batched_tokens": 64, "kv_cache_memory": "4MiB",
    "progress": False, "enable_lora": True, "max_lora_rank": 8,
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def few_programs():
    with one_width():
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("lora") / "base")


@pytest.fixture(scope="module")
def started(base):
    """An engine with places for two adapters on the device and two in host memory."""
    made = start(EngineConfig(model=str(base), max_loras=2, max_cpu_loras=2, **SETTINGS))
    yield made
    made.shutdown()
    gc.collect()


@pytest.fixture
def folder(tmp_path) -> Path:
    """The folder that admins may load from: "one" and "two" are adapters, the second a rank-8 one."""
    write_adapter(tmp_path / "adapters" / "one", rank=4, seed=1)
    write_adapter(tmp_path / "adapters" / "two", rank=8, seed=2)
    return tmp_path / "adapters"


class Running:
    """One service over HTTP and gRPC."""

    def __init__(self, service: Any, url: str, channel: grpc.aio.Channel, target: str) -> None:
        self.service, self.url, self.target = service, url, target
        self.inference = inference_pb2_grpc.InferenceStub(channel)
        self.control = control_pb2_grpc.ControlStub(channel)
        self.http = httpx.AsyncClient(base_url=url, timeout=60)

    async def post(self, path: str, body: dict[str, Any], key: str | None = None) -> httpx.Response:
        return await self.http.post(path, json=body, headers=bearer(key))

    async def load(self, name: str, path: str, key: str | None = ADMIN, **more: Any) -> httpx.Response:
        return await self.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": path, **more}, key)

    async def unload(self, name: str) -> httpx.Response:
        return await self.post("/v1/unload_lora_adapter", {"lora_name": name}, ADMIN)

    async def models(self, key: str | None = None) -> dict[str, dict[str, Any]]:
        reply = await self.http.get("/v1/models", headers=bearer(key))
        return {card["id"]: card for card in reply.json()["data"]}

    async def text(self, model: str, prompt: str = "w3 w4 w5", key: str | None = None, **more: Any) -> str:
        body = {"model": model, "prompt": prompt, "max_tokens": 6, "temperature": 0, "ignore_eos": True, **more}
        reply = await self.post("/v1/completions", body, key)
        assert reply.status_code == 200, reply.text
        return reply.json()["choices"][0]["text"]


def bearer(key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}


def metadata(key: str | None) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {key}"),) if key else ()


@contextlib.asynccontextmanager
async def serving(started: Started, folder: Path | None, access: Access = ACCESS) -> AsyncIterator[Running]:
    """A service of its own over a running engine; what it loaded is unloaded in the end."""
    service = started.service()
    http = await serve_http(service, port=0, access=access, lora_folder=folder)
    server = GrpcServer("127.0.0.1", 0, access=access, lora_folder=folder)
    await server.start()
    await server.serve(service)
    target = f"127.0.0.1:{server.port}"
    async with grpc.aio.insecure_channel(target) as channel:
        running = Running(service, http.url, channel, target)
        try:
            yield running
        finally:
            await running.http.aclose()
            await http.stop(0.0)
            await server.stop(0.0)
            for info in service.adapters.client.infos():
                service.adapters.unload(info.name)


def copied(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target
