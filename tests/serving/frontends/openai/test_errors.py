"""Failures: the right status, OpenAI's shape, and a server that goes on serving."""

from __future__ import annotations

import asyncio
import json

import openai
import pytest

from serving.service import Limits
from tests.mock_engine import MockEngine
from tests.serving.frontends.conftest import HI, Running, Start

CHAT = "/v1/chat/completions"


WRONG = [
    ({"temperature": -1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 2}, "top_p"),
    ({"n": 10**9}, "n"),
    ({"n": 0}, "n"),
    ({"n": True}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 10**6}, "messages"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{"role": 7, "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"structured_outputs": {}}, "structured_outputs"),
    ({"stop": [""]}, "stop"),
    ({"allowed_token_ids": [99999]}, "allowed_token_ids"),
]
NO_REQUEST = [b"{", b"[]", b"null", b'"x"', b"\xff", b'{"messages": NaN}', b"[" * 100_000, b""]


async def test_wrong_values_are_400_and_name_the_field(running: Running):
    for fields, param in WRONG:
        body = json.dumps({"messages": HI, **fields})  # ascii escapes: a lone surrogate gets through
        reply = await running.http.post(CHAT, content=body, headers={"Content-Type": "application/json"})
        assert reply.status_code == 400, (fields, reply.text)
        error = reply.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert (error["param"], error["type"]) == (param, "invalid_request_error"), (fields, error)
    assert not running.engine.requests
    assert (await running.chat()).status_code == 200


async def test_bodies_that_are_not_a_request(running: Running):
    for content in NO_REQUEST:
        reply = await running.http.post(CHAT, content=content, headers={"Content-Type": "application/json"})
        assert reply.status_code == 400, content[:20]
        assert reply.json()["error"]["type"] == "invalid_request_error"


async def test_unknown_model_is_404(running: Running):
    with pytest.raises(openai.NotFoundError) as caught:
        await running.client.chat.completions.create(model="gpt-x", messages=HI)
    assert caught.value.code == "model_not_found" and "mock" in caught.value.message
    with pytest.raises(openai.NotFoundError):
        await running.client.models.retrieve("gpt-x")


async def test_unknown_path_and_wrong_method(running: Running):
    reply = await running.http.get("/v1/nothing")
    assert reply.status_code == 404 and reply.json()["error"]["code"] == "not_found"
    reply = await running.http.get(CHAT)
    assert reply.status_code == 405 and reply.headers["allow"] == "POST"
    assert reply.json()["error"]["code"] == "method_not_allowed"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_full_queue_is_429_with_retry_after(start: Start, stream):
    running = await start(MockEngine(reply="x", max_live=0))
    reply = await running.chat(stream=stream)
    assert reply.status_code == 429 and int(reply.headers["retry-after"]) >= 1
    assert reply.json()["error"]["type"] == "rate_limit_error"


async def test_draining_is_503(running: Running):
    running.service.start_draining()
    reply = await running.chat()
    assert reply.status_code == 503 and "retry-after" in reply.headers
    assert (await running.http.get("/ready")).status_code == 503
    assert (await running.http.get("/health")).status_code == 200


async def test_a_dead_engine_is_503_everywhere(running: Running):
    running.engine.die()
    assert (await running.chat()).status_code == 503
    assert (await running.http.get("/ready")).status_code == 503
    reply = await running.http.get("/health")
    assert reply.status_code == 503 and reply.json()["error"]["message"]


async def test_an_error_inside_a_stream_ends_it_as_clients_expect(start: Start):
    running = await start(MockEngine(reply="Hello"))
    running.engine.fail_next = "The model produced NaN."
    lines = await running.events(CHAT, messages=HI)
    assert lines[-1] == "[DONE]" and "NaN" in json.loads(lines[-2])["error"]["message"]
    running.engine.fail_next = "The model produced NaN."
    with pytest.raises(openai.APIError, match="NaN"):
        async for _ in await running.client.chat.completions.create(model="mock", messages=HI, stream=True):
            pass
    assert not running.engine.live


async def test_an_error_without_a_stream_is_a_500(start: Start):
    running = await start(MockEngine(reply="Hello"))
    running.engine.fail_next = "The model produced NaN."
    reply = await running.chat()
    assert reply.status_code == 500 and reply.json()["error"]["type"] == "server_error"


async def test_a_deadline_is_504(start: Start):
    running = await start(MockEngine(reply="x" * 500, step_s=0.01))
    reply = await running.chat(timeout=0.05)
    assert reply.status_code == 504 and reply.json()["error"]["code"] == "deadline_exceeded"


async def test_what_nobody_expected_is_a_500_that_tells_nothing(running: Running, monkeypatch, caplog):
    async def broken(*args, **kwargs):
        raise KeyError("/secret/path")

    monkeypatch.setattr(running.service, "prepare", broken)
    reply = await running.chat()
    assert reply.status_code == 500 and "secret" not in reply.text
    assert reply.headers["x-request-id"] and "secret" in caplog.text


async def test_bodies_over_the_limit_are_413(start: Start):
    running = await start(limits=Limits(max_body_bytes=2000))
    reply = await running.chat(pad="x" * 3000)
    assert reply.status_code == 413 and reply.json()["error"]["code"] == "body_too_large"

    async def pieces():
        for _ in range(100):
            yield b" " * 1000
            await asyncio.sleep(0)

    reply = await running.http.post(CHAT, content=pieces(), headers={"Content-Type": "application/json"})
    assert reply.status_code == 413
    assert (await running.chat()).status_code == 200


@pytest.mark.parametrize(("sent", "kept"), [("abc-123", True), ("x" * 129, False), ("caf\xe9", False), (None, False)])
async def test_request_ids_come_back(running: Running, sent, kept):
    headers = {} if sent is None else {"X-Request-Id": sent.encode("latin-1")}
    reply = await running.http.post(CHAT, json={"messages": HI}, headers=headers)
    back = reply.headers["x-request-id"]
    assert (back == sent) is kept and reply.json()["id"] == f"chatcmpl-{back}"


async def test_a_late_refusal_comes_inside_the_stream(start: Start, monkeypatch):
    monkeypatch.setattr("serving.frontends.http.sse.HEADERS_AFTER_S", 0.05)
    monkeypatch.setattr("serving.frontends.http.sse.PING_EVERY_S", 0.05)
    running = await start(MockEngine(reply="x", step_s=1.5))
    async with running.http.stream("POST", CHAT, json={"messages": HI, "stream": True, "ttft_timeout": 1.0}) as reply:
        lines = [line async for line in reply.aiter_lines() if line]
    assert reply.status_code == 200 and ": still working" in lines
    assert json.loads(lines[-2].removeprefix("data: "))["error"]["code"] == "deadline_exceeded"
    assert lines[-1] == "data: [DONE]"
