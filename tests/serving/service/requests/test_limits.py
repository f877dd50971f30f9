"""Every limit at every entry: a table of what is too much against all the ways in."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import grpc
import httpx
import pytest

from proto.jaxserve.v1 import inference_pb2 as pb
from proto.jaxserve.v1 import inference_pb2_grpc, sampling_pb2
from serving.engine.api.sampling_params import SamplingParams, StructuredOutputs
from serving.errors import RequestError
from serving.frontends.app import create_app, serve_http
from serving.frontends.grpc.client import RemoteEngineClient, RemoteGrammars
from serving.frontends.grpc.server import GrpcServer
from serving.frontends.openai.batches.runner import call_app
from serving.gateway import Pool
from serving.llm import LLM
from serving.service import GenerateInput, Limits
from tests.mock_engine import MockEngine, mock_service

SMALL = Limits(
    max_body_bytes=8000, max_head_bytes=4000, max_headers=20, head_timeout_s=2.0, body_gap_s=2.0, max_prompt_chars=200,
    max_messages=3, max_tools=2, max_template_arguments=2, max_template_argument_chars=20, max_batch=3, max_n=3,
    max_stop_strings=2, max_stop_chars=10, max_sequences=4, max_grammar_chars=60, max_name_chars=40, max_timeout_s=60.0,
    requests_per_minute=4,
)  # fmt: skip
LONG = "x" * 50
TOOLS = [{"type": "function", "function": {"name": f"f{i}", "parameters": {"type": "object"}}} for i in range(3)]

# name of the limit -> fields of a request in OpenAI's shape that go beyond it, all else being small.
BEYOND: dict[str, dict[str, Any]] = {
    "max_prompt_chars": {"prompt": "x" * 201},
    "max_messages": {"messages": [{"role": "user", "content": "a"}] * 4},
    "max_tools": {"messages": [{"role": "user", "content": "a"}], "tools": TOOLS},
    "max_template_arguments": {"chat": True, "chat_template_kwargs": {f"k{i}": 1 for i in range(3)}},
    "max_template_argument_chars": {"chat": True, "chat_template_kwargs": {"k": LONG}},
    "max_n": {"prompt": "a", "n": 4, "temperature": 1.0},
    "max_stop_strings": {"prompt": "a", "stop": ["b", "c", "d"]},
    "max_stop_chars": {"prompt": "a", "stop": [LONG]},
    "max_grammar_chars": {"prompt": "a", "structured_outputs": {"regex": "a" * 61}},
    "max_name_chars": {"prompt": "a", "cache_salt": LONG},
    "max_timeout_s": {"prompt": "a", "timeout": 61.0},
}
# Limits of what only some entries have, each with its own test below; and those that are no bound on a request.
ELSEWHERE = {
    "max_body_bytes", "max_head_bytes", "max_headers", "head_timeout_s", "body_gap_s", "stalled_reader_s",
    "max_batch", "max_sequences", "max_bodies_bytes", "max_pipelined", "body_timeout_s", "max_json_values", "max_json_depth",
    "context", "max_content_parts", "max_entries", "max_logprobs", "max_live", "max_live_extra", "max_live_per_key",
    "max_embed_len", "max_sound_bytes", "max_sounds_bytes", "max_media_bytes",
    "requests_per_minute", "grammar_timeout_s",
}  # fmt: skip


def test_the_table_has_every_limit():
    assert set(BEYOND) | ELSEWHERE == set(Limits.__dataclass_fields__)


def body_of(fields: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    fields = dict(fields)
    if fields.pop("chat", False):
        fields["messages"] = [{"role": "user", "content": "a"}]
    return ("/v1/chat/completions" if "messages" in fields else "/v1/completions"), {"max_tokens": 2, **fields}


def wire_of(fields: dict[str, Any]) -> pb.GenerateRequest:
    fields = dict(fields)
    params = {k: fields[k] for k in ("n", "temperature", "stop") if k in fields}
    wire = pb.GenerateRequest(sampling_params=sampling_pb2.SamplingParams(max_tokens=2, **params))
    if "structured_outputs" in fields:
        wire.sampling_params.structured_outputs.regex = fields["structured_outputs"]["regex"]
    if "prompt" in fields:
        wire.text = fields["prompt"]
    else:
        for message in fields.get("messages", [{"role": "user", "content": "a"}]):
            wire.chat.messages.add(role=message["role"], content=message["content"])
        for tool in fields.get("tools", ()):
            wire.chat.tools.add(name=tool["function"]["name"], parameters_json="{}")
        for name, value in fields.get("chat_template_kwargs", {}).items():
            scalar = {"string_value": value} if isinstance(value, str) else {"int_value": value}
            wire.chat.chat_template_kwargs[name].CopyFrom(pb.Scalar(**scalar))
    wire.cache_salt = fields.get("cache_salt", "")
    if "timeout" in fields:
        wire.timeout_s = fields["timeout"]
    return wire


@contextlib.asynccontextmanager
async def grpc_target(limits: Limits) -> AsyncIterator[tuple[str, MockEngine]]:
    engine = MockEngine(reply="hello")
    server = GrpcServer(port=0, limits=limits)
    port = await server.start()
    await server.serve(mock_service(engine, limits=limits))
    try:
        yield f"127.0.0.1:{port}", engine
    finally:
        await server.stop()


@contextlib.asynccontextmanager
async def http_over(service: Any) -> AsyncIterator[Any]:
    server = await serve_http(service, port=0)
    try:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            client.port = server.port  # type: ignore[attr-defined]
            yield client
    finally:
        await server.stop(grace_s=1.0)


@contextlib.asynccontextmanager
async def gateway(limits: Limits) -> AsyncIterator[Any]:
    """HTTP over a pool over gRPC over an engine, whose own limits are the default: it is the gateway's that are tried."""
    async with grpc_target(Limits()) as (target, engine):
        client = await RemoteEngineClient.connect(target, timeout_s=20)
        try:
            service = mock_service(Pool([client]), limits=limits, grammar_compiler=RemoteGrammars())  # type: ignore[arg-type]
            async with http_over(service) as http:
                yield http, engine
        finally:
            await client.close()


async def http_status(client: Any, fields: dict[str, Any]) -> tuple[int, str]:
    path, body = body_of(fields)
    reply = await client.post(path, json=body)
    return reply.status_code, reply.text


OK = {"prompt": "a"}


@pytest.mark.parametrize("entry", ["http", "gateway", "batch", "grpc", "llm"])
async def test_every_limit_at_every_entry(entry):
    limits = Limits(**{**SMALL.__dict__, "requests_per_minute": None})
    engine = MockEngine(reply="hello")
    if entry == "http":
        async with http_over(mock_service(engine, limits=limits)) as client:
            statuses = {name: await http_status(client, fields) for name, fields in {**BEYOND, "ok": OK}.items()}
    elif entry == "gateway":
        async with gateway(limits) as (client, engine):
            statuses = {name: await http_status(client, fields) for name, fields in {**BEYOND, "ok": OK}.items()}
    elif entry == "batch":
        app = create_app(mock_service(engine, limits=limits), page=False)
        statuses = {}
        for name, fields in {**BEYOND, "ok": OK}.items():
            status, reply = await call_app(app, *body_of(fields), f"batch-{name}"[:20])
            statuses[name] = (status, json.dumps(reply))
    elif entry == "grpc":
        statuses = await _over_grpc(limits)
        engine = statuses.pop("engine")  # type: ignore[assignment]
    else:
        statuses = await asyncio.to_thread(_over_llm, engine, limits)
    assert statuses.pop("ok")[0] == 200
    assert {name: status for name, (status, _) in statuses.items()} == dict.fromkeys(statuses, 400)
    for name, (_, text) in statuses.items():
        assert any(char.isdigit() for char in text), f"{name}: the limit is told: {text}"
    assert len(engine.requests) == 1, "nothing beyond a limit came to the engine"
    assert set(statuses) == set(BEYOND) - (LLM_LACKS if entry == "llm" else set())


async def _over_grpc(limits: Limits) -> dict[str, Any]:
    found: dict[str, Any] = {}
    async with grpc_target(limits) as (target, engine), grpc.aio.insecure_channel(target) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        for name, fields in {**BEYOND, "ok": OK}.items():
            try:
                async for _ in stub.Generate(wire_of(fields)):
                    pass
                found[name] = (200, "")
            except grpc.aio.AioRpcError as error:
                found[name] = (400 if error.code() is grpc.StatusCode.INVALID_ARGUMENT else 500, error.details() or "")
        found["engine"] = engine
    return found


LLM_LACKS = {"max_name_chars", "max_timeout_s"}  # `LLM` takes neither salts nor deadlines


def _over_llm(engine: MockEngine, limits: Limits) -> dict[str, Any]:
    started: Any = SimpleNamespace(
        service=lambda limit_changes: mock_service(engine, limits=dataclasses.replace(limits, **limit_changes)),
        engine=SimpleNamespace(client=engine, shutdown=lambda: None),
        text=None,
    )
    found = {}
    with LLM.from_started(started) as llm:
        for name, fields in {**BEYOND, "ok": OK}.items():
            if name in LLM_LACKS:
                continue
            params = {k: fields[k] for k in ("n", "temperature", "stop") if k in fields}
            try:
                if "structured_outputs" in fields:
                    params["structured_outputs"] = StructuredOutputs(**fields["structured_outputs"])
                sampling = SamplingParams(max_tokens=2, **params)
                if "prompt" in fields:
                    llm.generate(fields["prompt"], sampling, use_tqdm=False)
                else:
                    messages = fields.get("messages", [{"role": "user", "content": "a"}])
                    more = {"tools": fields.get("tools"), "chat_template_kwargs": fields.get("chat_template_kwargs")}
                    llm.chat(messages, sampling, use_tqdm=False, **more)
                found[name] = (200, "")
            except RequestError as error:
                found[name] = (error.kind.http_status, error.message)
    return found


# -- limits of some entries ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", ["http", "gateway"])
async def test_batch_width_body_and_head_over_http(entry):
    limits = Limits(**{**SMALL.__dict__, "requests_per_minute": None})
    async with contextlib.AsyncExitStack() as stack:
        if entry == "http":
            client = await stack.enter_async_context(http_over(mock_service(MockEngine(reply="hello"), limits=limits)))
        else:
            client, _ = await stack.enter_async_context(gateway(limits))
        assert (await http_status(client, {"prompt": ["a"] * 4}))[0] == 400  # max_batch
        assert (await http_status(client, {"prompt": ["a"] * 3, "n": 2, "temperature": 1.0}))[0] == 400  # max_sequences
        assert (await http_status(client, {"prompt": "a", "user": "x" * 9000}))[0] == 413  # max_body_bytes
        for headers in ({"x-pad": "x" * 5000}, {f"x-{i}": "y" for i in range(30)}):  # max_head_bytes, max_headers
            with contextlib.suppress(httpx.TransportError):  # closed before the reply could be read: refused too
                assert (await client.get("/health", headers=headers)).status_code == 400
        reader, writer = await asyncio.open_connection("127.0.0.1", client.port)
        assert await asyncio.wait_for(reader.read(), 60) == b""  # head_timeout_s
        writer.close()
        reader, writer = await asyncio.open_connection("127.0.0.1", client.port)
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
        )
        assert b" 408 " in await asyncio.wait_for(reader.read(), 60)  # body_gap_s
        writer.close()
        assert (await http_status(client, OK))[0] == 200


async def test_message_and_metadata_size_over_grpc():
    async with grpc_target(SMALL) as (target, engine), grpc.aio.insecure_channel(target) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        for call in (
            stub.Generate(pb.GenerateRequest(text="x" * 9000)),
            stub.Generate(pb.GenerateRequest(text="x"), metadata=(("x-pad", "y" * 5000),)),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                async for _ in call:
                    pass
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert not engine.requests


async def test_a_batch_files_line_has_the_bodys_limit():
    app = create_app(mock_service(MockEngine(), limits=SMALL), page=False)
    status, _ = await call_app(app, "/v1/completions", {"prompt": "a", "user": "x" * 9000}, "b")
    assert status == 413


@pytest.mark.parametrize("entry", ["http", "gateway", "batch", "grpc"])
async def test_the_rate_at_every_entry(entry):
    async with contextlib.AsyncExitStack() as stack:
        if entry == "grpc":
            target, _ = await stack.enter_async_context(grpc_target(SMALL))
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(target))
            stub = inference_pb2_grpc.InferenceStub(channel)
            codes = []
            for _ in range(5):
                try:
                    async for _ in stub.Generate(pb.GenerateRequest(text="x")):
                        pass
                    codes.append(200)
                except grpc.aio.AioRpcError as error:
                    codes.append(429 if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED else 500)
        elif entry == "batch":
            app = create_app(mock_service(MockEngine(reply="a"), limits=SMALL), page=False)
            codes = [(await call_app(app, "/v1/completions", {"prompt": "a"}, "b"))[0] for _ in range(5)]
        else:
            if entry == "http":
                client = await stack.enter_async_context(http_over(mock_service(MockEngine(reply="a"), limits=SMALL)))
            else:
                client, _ = await stack.enter_async_context(gateway(SMALL))
            codes = [(await http_status(client, OK))[0] for _ in range(5)]
    assert codes == [200] * 4 + [429]


async def test_a_grammar_may_take_so_long():
    def slow(grammar: Any) -> Any:
        import time

        time.sleep(0.5)
        return lambda: None

    service = mock_service(
        MockEngine(),
        limits=Limits(grammar_timeout_s=0.05),
        grammar_compiler=SimpleNamespace(compile=slow),  # type: ignore[arg-type]
    )
    params = SamplingParams(max_tokens=2, structured_outputs=StructuredOutputs(regex="a"))
    with pytest.raises(RequestError, match=r"0\.05 seconds"):
        await service.prepare(GenerateInput(text="a"), params)
