"""Ray Serve itself, where it is installed: engines and a gateway on this machine, and an update of both under load."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pathlib
import time

import httpx
import pytest

from scripts.deploy.server_process import free_port
from tests.tiny_checkpoint import write_tiny_checkpoint

ray = pytest.importorskip("ray", reason="pip install 'ray[serve]'")
pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).resolve().parents[2]
STREAMS, TOKENS = 4, 48
POOLS = {
    "dtype": "float32", "kv_cache_memory": "1MB", "max_model_len": 64, "max_num_seqs": 2, "max_num_batched_tokens": 32,
    "page_size": 16, "num_cpus": 0.5, "num_replicas": 2, "drain_timeout": 45, "gateway_drain_timeout": 45,
}  # fmt: skip
"""Of the smallest kind: a handful of step shapes are compiled, once, whatever starts; the rest of a start is imports."""
PATIENT = {
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "240", "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "240",
    "RAY_worker_register_timeout_seconds": "240", "RAY_memory_monitor_refresh_ms": "0", "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_prestart_worker_first_driver": "0", "RAY_enable_worker_prestart": "0",
}  # fmt: skip
"""Ray kills a proxy that has not begun to answer after a few checks of 5 s, and this machine may have other things to do; it also
counts all of the machine's memory, whoever has it, against its own processes; and it starts a process for each CPU ahead of any
need, with another environment than ours, so that none of them is ever used."""


@pytest.fixture(scope="module")
def pools(tmp_path_factory):
    """Arguments of two tiny engines that share what they compile, with the runs before too where tests keep that."""
    folder = tmp_path_factory.mktemp("ray")
    kept = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    programs = pathlib.Path(kept) / "ray" if kept else folder / "programs"
    return {**POOLS, "model": str(write_tiny_checkpoint(folder / "model")), "compile_cache": str(programs)}


@pytest.fixture(scope="module")
def url():
    from ray import serve

    port = free_port()
    env = {"env_vars": {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **PATIENT}}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in PATIENT.items():  # the processes that Ray starts before there is a runtime environment
            patch.setenv(name, value)
        ray.init(
            num_cpus=4, include_dashboard=False, runtime_env=env, object_store_memory=100 * 2**20,
            log_to_driver=bool(os.environ.get("RAY_LOGS")),
        )  # fmt: skip
        with contextlib.suppress(
            TimeoutError
        ):  # after 60 s, in which a proxy may not have started; it goes on starting
            serve.start(http_options={"host": "127.0.0.1", "port": port})
        yield listening(f"http://127.0.0.1:{port}")
        serve.shutdown()
        ray.shutdown()


def listening(url):
    """The address, when Ray's proxy answers there, whatever."""
    deadline = time.monotonic() + 240
    while True:
        with contextlib.suppress(httpx.TransportError):
            httpx.get(f"{url}/-/healthz", timeout=5)
            return url
        assert time.monotonic() < deadline, "Ray's proxy does not answer"
        time.sleep(0.5)


def deploy(arguments):
    from ray import serve

    from scripts.deploy.ray_serve import app

    serve.run(app(arguments), name="default", route_prefix="/")


async def stream(web, number):
    """One answer, read as it comes: (tokens by its own count, whether it ended as it should)."""
    body = {
        "prompt": f"w{number} w5 w7 w11", "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    tokens, ended = 0, False
    async with web.stream("POST", "/v1/completions", json=body) as reply:
        assert reply.status_code == 200, await reply.aread()
        async for line in reply.aiter_lines():
            if line == "data: [DONE]":
                ended = True
            elif line.startswith("data: {"):
                chunk = json.loads(line[6:])
                assert "error" not in chunk, chunk
                tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
    return tokens, ended


@pytest.mark.parametrize("front", [{"gateways": 1}, {}], ids=["through a gateway", "engines alone"])
async def test_an_update_under_load_loses_no_stream(url, pools, front):
    await asyncio.to_thread(deploy, {**pools, **front})
    over, seen = asyncio.Event(), []

    async def keep_asking(web, number):
        while not over.is_set():
            seen.append((await stream(web, number), time.monotonic()))

    async with httpx.AsyncClient(base_url=url, timeout=300) as web:
        tasks = [asyncio.create_task(keep_asking(web, i)) for i in range(STREAMS)]
        await asyncio.sleep(2)
        began = time.monotonic()
        changed = {"max_num_queued_reqs": 7, **({"gateway_policy": "least-loaded"} if front else {})}
        await asyncio.to_thread(deploy, {**pools, **front, **changed})
        updated = time.monotonic()
        await asyncio.sleep(1)
        over.set()
        await asyncio.gather(*tasks)
    assert all(one == (TOKENS, True) for one, _ in seen)
    assert sum(began < at < updated for _, at in seen) >= STREAMS, "streams ran all the while"
    print(f"{len(seen)} streams, {sum(began < at < updated for _, at in seen)} in an update of {updated - began:.0f} s")
