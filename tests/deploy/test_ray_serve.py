"""The Ray Serve replica around the real server process with a mock engine; Ray itself is not needed for it."""

import asyncio
import json
import os
import pathlib
import signal
import sys
import types

import httpx
import pytest
from starlette.applications import Starlette
from starlette.routing import Route

ROOT = pathlib.Path(__file__).resolve().parents[2]
COMMAND = (sys.executable, str(ROOT / "tests" / "mock_launch.py"))


@pytest.fixture(scope="module")
def ray_serve():
    sys.path.insert(0, str(ROOT / "scripts" / "deploy"))
    try:
        import ray_serve
    finally:
        sys.path.pop(0)
    return ray_serve


def test_arguments_become_flags(ray_serve):
    arguments = {"model": "a/b", "max_model_len": 64, "no_http": False, "enforce": "true", "num_gpus": 1}
    assert ray_serve.flags(arguments) == ["--model", "a/b", "--max-model-len", "64", "--enforce"]


async def test_requests_reach_the_server_and_its_death_is_noticed(ray_serve, monkeypatch):
    monkeypatch.setenv("MOCK_LAUNCH", json.dumps({"reply": "one two three", "start_s": 0.5}))
    replica = ray_serve.Replica({}, command=COMMAND, start_timeout_s=120)
    try:
        await replica.check_health()  # still starting: well
        outside = Starlette(routes=[Route("/{path:path}", replica.__call__, methods=["GET", "POST"])])
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(outside), base_url="http://ray", timeout=120
        ) as client:
            models = await client.get("/v1/models")
            assert models.status_code == 200
            name = models.json()["data"][0]["id"]
            body = {"model": name, "messages": [{"role": "user", "content": "hi"}], "stream": True}
            answer = await client.post("/v1/chat/completions", json=body)
            assert answer.status_code == 200 and "text/event-stream" in answer.headers["content-type"]
            assert answer.text.rstrip().endswith("data: [DONE]")
            # No path and no Host leads anywhere but to that server, and a body is passed on as it comes, up to its bound.
            for path in (
                "//127.0.0.1:1/v1/models",
                "/@127.0.0.1:1/",
                "/http://127.0.0.1:1/",
                "/v1%2fmodels",
                "/?x=%2f",
            ):
                url = httpx.URL("http://ray").copy_with(raw_path=path.encode())
                reply = await client.get(url, headers={"Host": "elsewhere:1/x"})
                assert reply.status_code == (404 if "127" in path else 200), path

            async def much():
                for _ in range(64):
                    yield b" " * 2**20

            for headers in ({}, {"Content-Length": str(64 * 2**20)}):
                reply = await client.post("/v1/chat/completions", content=much(), headers=headers)
                assert reply.status_code in (413, 503), reply.text
            wrong = await client.post("/v1/chat/completions", json={"messages": []})
            assert wrong.status_code == 400 or wrong.status_code == 422
        await replica.check_health()
        os.kill(replica._process.pid, signal.SIGKILL)
        await asyncio.to_thread(replica._process.wait, 30)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(outside), base_url="http://ray") as client:
            gone = await client.get("/v1/models")
            assert gone.status_code == 503 and "127.0.0.1" not in gone.text
        with pytest.raises(RuntimeError, match="ended with status -9"):
            await replica.check_health()
    finally:
        if replica._process.poll() is None:
            replica._process.kill()
        replica._process.wait()


async def test_a_server_that_cannot_start_is_an_error(ray_serve, monkeypatch):
    monkeypatch.setenv("MOCK_LAUNCH", json.dumps({"fail": "no such model"}))
    replica = ray_serve.Replica({}, command=COMMAND, start_timeout_s=120)
    with pytest.raises(RuntimeError, match="ended with status 1"):
        await replica._wait_until_ready()


def test_the_application_is_a_deployment_with_the_asked_for_size(ray_serve, monkeypatch):
    made = {}

    class Deployment:
        def bind(self, arguments):
            return arguments

    def deployment(target, **options):
        made.update(options, target=target)
        return Deployment()

    fake = types.ModuleType("ray")
    fake.serve = types.SimpleNamespace(deployment=deployment)
    monkeypatch.setitem(sys.modules, "ray", fake)
    arguments = {"model": "a/b", "num_replicas": "3", "num_gpus": "2"}
    assert ray_serve.app(arguments) == arguments
    assert made["target"] is ray_serve.Replica and made["num_replicas"] == 3
    assert made["ray_actor_options"] == {"num_gpus": 2.0, "num_cpus": 4.0}
