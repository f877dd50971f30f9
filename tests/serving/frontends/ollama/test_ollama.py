"""/api/... over HTTP: Ollama's official client, its lines, its errors."""

from __future__ import annotations

import json
from typing import Any

import ollama
import pytest

from serving.frontends.ollama.messages import as_messages
from serving.frontends.ollama.protocol import ChatBody
from serving.metrics import MeteredClient
from tests.mock_engine import EmbeddingEngine, MockEngine, mock_service
from tests.serving.frontends.conftest import HI, Running, Start

TEXT = "Hello wörld!"
HERMES = {"tool_parser": "hermes", "reasoning_parser": "think"}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich"}}\n</tool_call>'


def get_weather(city: str) -> str:
    """The weather in a city.

    Args:
        city: which.
    """
    return f"{city}: sunny"


def client_of(running: Running) -> ollama.AsyncClient:
    return ollama.AsyncClient(host=running.server.url)


async def test_chats_whole_and_streamed(running: Running):
    client = client_of(running)
    whole = await client.chat("mock:latest", messages=HI, options={"temperature": 0.5, "num_predict": 64})
    assert whole.message.content == TEXT and whole.done and whole.done_reason == "stop" and whole.model == "mock:latest"
    assert whole.eval_count == len(TEXT.encode()) + 1 and whole.prompt_eval_count and whole.total_duration
    parts = [part async for part in await client.chat("mock", messages=HI, stream=True)]
    assert "".join(part.message.content or "" for part in parts) == TEXT
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True] and parts[-1].eval_duration is not None
    cut = await client.chat("mock", messages=HI, options={"num_predict": 3})
    assert cut.done_reason == "length" and cut.message.content == "Hel"


async def test_lines_come_unless_a_stream_is_not_wanted(running: Running):
    reply = await running.http.post("/api/chat", json={"model": "mock", "messages": HI})
    assert reply.headers["content-type"].startswith("application/x-ndjson")
    lines = [json.loads(line) for line in reply.text.splitlines()]
    assert all(line["created_at"].endswith("Z") for line in lines) and "eval_count" not in lines[0]
    one = await running.http.post("/api/generate", json={"model": "mock", "prompt": "x", "stream": False})
    assert one.headers["content-type"] == "application/json" and one.json()["response"] == TEXT


async def test_a_prompt_is_answered_or_gone_on_with(running: Running):
    client = client_of(running)
    assert (await client.generate("mock", "hi", system="Be short.")).response == TEXT
    assert (await client.generate("mock", "Once", raw=True)).response == TEXT
    prompts = [bytes(i for i in r.prompt_token_ids if i < 256).decode() for r in running.engine.requests]
    assert prompts == ["Be short.hi", "Once"]
    assert len(running.engine.requests[0].prompt_token_ids) > len(b"Be short.hi")  # a template's marks
    loaded = await client.generate("mock")
    assert loaded.done and loaded.done_reason == "load" and len(running.engine.requests) == 2
    assert (await client.generate("mock", keep_alive=0)).done_reason == "unload"


async def test_a_loop_with_tools_over_the_official_client(start: Start):
    def reply(request: Any) -> list[int]:
        said = bytes(i for i in request.prompt_token_ids if i < 256).decode()
        return list(("It is sunny." if "sunny" in said else f"<think>\nWhere?\n</think>\n{CALL}").encode())

    client = client_of(await start(MockEngine(reply=reply), **HERMES))
    messages: list[Any] = [{"role": "user", "content": "Weather?"}]
    turn = await client.chat("mock", messages=messages, tools=[get_weather], think=True)
    (call,) = turn.message.tool_calls or ()
    assert call.function.name == "get_weather" and dict(call.function.arguments) == {"city": "Zürich"}
    assert turn.message.thinking == "Where?" and turn.done_reason == "stop"
    parts = [part async for part in await client.chat("mock", messages=messages, tools=[get_weather], stream=True)]
    (streamed,) = [c for part in parts for c in part.message.tool_calls or ()]
    assert streamed.function == call.function
    messages += [turn.message, {"role": "tool", "tool_name": "get_weather", "content": get_weather("Zürich")}]
    last = await client.chat("mock", messages=messages, tools=[get_weather])
    assert last.message.content == "It is sunny." and not last.message.tool_calls


async def test_thinking_can_be_left_out(start: Start):
    client = client_of(await start(MockEngine(reply="<think>\nhm\n</think>\n\nYes."), **HERMES))
    reply = await client.chat("mock", messages=HI, think=False)
    assert reply.message.content == "Yes." and not reply.message.thinking


async def test_clients_that_do_not_say_json_are_taken_and_pages_are_not(start: Start):
    running = await start()
    body = json.dumps({"model": "mock", "messages": HI, "stream": False})
    for kind in ({}, {"Content-Type": "application/x-www-form-urlencoded"}):  # litellm, and curl -d
        assert (await running.http.post("/api/chat", content=body, headers=kind)).status_code == 200, kind
        for says in ({"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}):
            reply = await running.http.post("/api/chat", content=body, headers={**kind, **says})
            assert reply.status_code in (400, 403), reply.text
    assert (await running.http.post("/v1/chat/completions", content=body)).status_code == 400


def test_fields_become_the_services():
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    options = {"num_predict": -1, "repeat_penalty": 1.1, "stop": ["x"], "num_ctx": 4096, "top_k": 4}
    body = ChatBody.model_validate({"model": "m", "messages": HI, "format": schema, "options": options, "think": "low"})
    params = body.params()
    assert params["structured_outputs"].json == schema and params["repetition_penalty"] == 1.1
    assert "max_tokens" not in params and params["stop"] == ["x"] and params["top_k"] == 4
    given = body.to_input("id")
    assert given.chat_template_kwargs["reasoning_effort"] == "low" and given.clip_max_tokens
    assert ChatBody.model_validate({"model": "m", "format": "json"}).params()["structured_outputs"].json_object


def test_results_find_their_calls():
    made = as_messages([
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": n, "arguments": {"n": n}}} for n in "ab"]},
        {"role": "tool", "tool_name": "b", "content": "B"},
        {"role": "tool", "content": "A"},
    ])  # fmt: skip
    ids = [call["id"] for call in made[0]["tool_calls"]]
    assert [message["tool_call_id"] for message in made[1:]] == ids[::-1] and len(set(ids)) == 2


async def test_what_is_served_is_told(running: Running):
    client = client_of(running)
    (card,) = (await client.list()).models
    assert (
        card.model == "mock" and card.details and card.details.parameter_size == "1.0B" and len(card.digest or "") == 64
    )
    shown = await client.show("mock")
    assert shown.capabilities == ["completion", "tools"] and shown.modelinfo
    assert shown.modelinfo["MockForCausalLM.context_length"] == 512
    (live,) = (await client.ps()).models
    assert live.context_length == 512 and live.expires_at
    assert (await client.pull("mock")).status == "success"
    assert (await running.http.get("/api/version")).json()["version"]


async def test_texts_are_embedded(start: Start):
    engine = EmbeddingEngine()
    running = await start(engine, service=mock_service(MeteredClient(engine)))  # type: ignore[arg-type]
    client = client_of(running)
    reply = await client.embed("mock", ["a text", "b"], dimensions=2)
    assert [len(one) for one in reply.embeddings] == [2, 2] and reply.prompt_eval_count == 9
    assert len((await client.embeddings("mock", "a text")).embedding) == 4
    assert (await client.embed("mock", "x" * 2000)).embeddings  # cut, unless `truncate` is false
    with pytest.raises(ollama.ResponseError, match="context length"):
        await client.embed("mock", "x" * 2000, truncate=False)


async def test_errors_are_sentences(start: Start):
    engine = MockEngine(reply="a longer answer")
    running = await start(engine)
    client = client_of(running)
    with pytest.raises(ollama.ResponseError, match="does not exist") as unknown:
        await client.chat("nobody", messages=HI)
    assert unknown.value.status_code == 404
    for fields, name in (
        ({"options": {"top_p": 7.0}}, "options.top_p"),
        ({"options": {"mirostat": 2}}, "mirostat"),
        ({"format": 3}, "format"),
    ):
        reply = await running.http.post("/api/chat", json={"model": "mock", "messages": HI, **fields})
        assert reply.status_code == 400 and name in reply.json()["error"], reply.text
    assert "no /api/nothing" in (await running.http.get("/api/nothing")).json()["error"]
    engine.fail_next = "It went wrong."
    with pytest.raises(ollama.ResponseError, match="It went wrong"):
        async for _ in await client.chat("mock", messages=HI, stream=True):
            pass
