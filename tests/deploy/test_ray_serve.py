"""Ray Serve's replicas around real server processes with a mock engine; test_ray_cluster.py has Ray itself."""

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

from scripts.deploy import ray_serve, server_process

ROOT = pathlib.Path(__file__).resolve().parents[2]
COMMAND = (sys.executable, str(ROOT / "tests" / "mock_launch.py"))


def test_arguments_become_flags():
    arguments = {"model": "a/b", "max_model_len": 64, "no_http": False, "enforce": "true"}
    assert server_process.flags(arguments) == ["--model", "a/b", "--max-model-len", "64", "--enforce"]


async def test_requests_reach_the_server_and_its_death_is_noticed(monkeypatch):
    monkeypatch.setenv("MOCK_LAUNCH", json.dumps({"reply": "one two three", "start_s": 0.5}))
    replica = server_process.ServerProcess({}, command=COMMAND, start_timeout_s=120)
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


async def test_a_server_that_cannot_start_is_an_error(monkeypatch):
    monkeypatch.setenv("MOCK_LAUNCH", json.dumps({"fail": "no such model"}))
    replica = server_process.ServerProcess({}, command=COMMAND, start_timeout_s=120)
    with pytest.raises(RuntimeError, match=r"ended with status 1(.|\n)*no such model"):
        await replica._wait_until_ready()


@pytest.fixture
def deployed(monkeypatch):
    """What the application asks Ray for: name -> (class, options, what it is bound to)."""
    made = {}

    class Deployment:
        def __init__(self, target, name, **options):
            self.name, self.target, self.options = name, target, options

        def bind(self, *arguments):
            made[self.name] = self.target, self.options, arguments
            return self

    fake = types.ModuleType("ray")
    fake.serve = types.SimpleNamespace(deployment=Deployment)
    monkeypatch.setitem(sys.modules, "ray", fake)
    return made


def test_engines_alone(deployed):
    assert ray_serve.app({"model": "a/b", "num_replicas": "3", "num_gpus": "2"}).name == "jaxserve"
    ((target, options, bound),) = deployed.values()
    assert target is ray_serve.Engine and bound[:3] == ({"model": "a/b"}, "", False)
    assert options["num_replicas"] == 3 and options["ray_actor_options"] == {"num_gpus": 2.0, "num_cpus": 4.0}


def test_gateways_roles_and_autoscaling(deployed):
    arguments = {"model": "a/b", "gateways": 2, "prefill_replicas": "1", "max_replicas": 4, "gateway_policy": "cache"}
    assert ray_serve.app(arguments).name == "jaxserve-gateway"
    target, options, (flags, pools, _) = deployed["jaxserve-gateway"]
    assert target is ray_serve.Gateway and options["num_replicas"] == 2
    assert flags == {"policy": "cache", "model": "a/b"} and [one.name for one in pools] == [
        "jaxserve",
        "jaxserve-prefill",
    ]
    assert [deployed[one.name][2][:3] for one in pools] == [
        ({"model": "a/b"}, "decode", True), ({"model": "a/b"}, "prefill", True),
    ]  # fmt: skip
    scaling = deployed["jaxserve"][1]["autoscaling_config"]
    assert (scaling["min_replicas"], scaling["max_replicas"]) == (1, 4)
    module, name = scaling["policy"]["policy_function"].split(":")
    policy = getattr(sys.modules[module], name)(**scaling["policy"]["policy_kwargs"])

    def wanted(**metrics):
        context = types.SimpleNamespace(current_num_replicas=2, target_num_replicas=3, aggregated_metrics=metrics)
        return policy(context)[0]

    assert wanted(waiting={"a": 6.0, "b": 10.0}, kv_usage={"a": 0.2, "b": 0.2}) == 4.0
    assert wanted(waiting={"a": 0.0, "b": 0.0}, kv_usage={"a": 0.8, "b": 0.4}) == pytest.approx(1.5)
    assert wanted() == 3, "nobody has told yet"
    with pytest.raises(ValueError, match="needs gateways"):
        ray_serve.app({"prefill_replicas": 1})


def test_the_directory_forgets_who_is_silent(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(ray_serve.time, "monotonic", lambda: now[0])
    found = ray_serve.Directory()
    found.here("a:1", "decode")
    found.here("b:1", "prefill")
    now[0] = 6.0
    found.here("b:1", "prefill")
    assert found.engines() == {"a:1": "decode", "b:1": "prefill"}
    now[0] = 11.0
    assert found.engines() == {"b:1": "prefill"}
    found.gone("b:1")
    assert found.engines() == {}
