"""/v1/messages over HTTP: Anthropic's official client, its events in their order, its errors."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import anthropic
import pytest
from anthropic.types import Message, RawMessageStreamEvent
from pydantic import TypeAdapter

from serving.access import Access, KeyRing
from serving.errors import RequestError
from serving.frontends.anthropic.protocol import MessagesRequest
from tests.mock_engine import MockEngine
from tests.serving.frontends.conftest import Running, Start

EVENT: TypeAdapter = TypeAdapter(RawMessageStreamEvent)
PATH = "/v1/messages"
TEXT = "Hello wörld!"
HI: Any = [{"role": "user", "content": "hi"}]
WEATHER: Any = {
    "name": "get_weather",
    "description": "The weather in a city.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
CALL = 'Let me look.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich"}}\n</tool_call>'
HERMES = {"tool_parser": "hermes", "reasoning_parser": "think"}


@pytest.fixture
async def connect() -> AsyncIterator[Any]:
    """Makes official clients of a running server."""
    made: list[anthropic.AsyncAnthropic] = []

    def connect(running: Running, **options: Any) -> anthropic.AsyncAnthropic:
        options = {"api_key": "any", "max_retries": 0, **options}
        made.append(anthropic.AsyncAnthropic(base_url=running.server.url, **options))
        return made[-1]

    yield connect
    for client in made:
        await client.close()


async def post(running: Running, **fields: Any) -> Any:
    return await running.http.post(PATH, json={"messages": HI, "max_tokens": 64, **fields})


async def named_events(running: Running, **fields: Any) -> list[tuple[str, dict[str, Any]]]:
    """The raw events: each event's name and data."""
    body = {"messages": HI, "max_tokens": 64, "stream": True, **fields}
    async with running.http.stream("POST", PATH, json=body) as reply:
        assert reply.status_code == 200, await reply.aread()
        blocks = (await reply.aread()).decode().strip().split("\n\n")
    pairs = [block.split("\n") for block in blocks]
    return [(a.removeprefix("event: "), json.loads(b.removeprefix("data: "))) for a, b in pairs]


async def test_a_message_has_anthropics_shape(running: Running):
    reply = await post(running, system="Be short.", temperature=0.5)
    message = TypeAdapter(Message).validate_python(reply.json())
    (block,) = message.content
    assert block.type == "text" and block.text == TEXT and message.role == "assistant" and message.model == "mock"
    assert message.stop_reason == "end_turn" and message.stop_sequence is None and message.id.startswith("msg_")
    assert message.usage.output_tokens == len(TEXT.encode()) + 1
    assert message.usage.input_tokens + message.usage.cache_read_input_tokens == 16  # type: ignore[operator]
    assert reply.headers["request-id"] == reply.headers["x-request-id"]
    text = bytes(i for i in running.engine.requests[0].prompt_token_ids if i < 256).decode()
    assert text == "Be short.hi"


async def test_events_follow_anthropics_order_and_add_up(running: Running):
    events = await named_events(running)
    assert [name for name, _ in events] == [data["type"] for _, data in events]
    kinds = [name for i, (name, _) in enumerate(events) if i == 0 or events[i - 1][0] != name]
    assert kinds == [
        "message_start", "ping", "content_block_start", "content_block_delta", "content_block_stop", "message_delta",
        "message_stop",
    ]  # fmt: skip
    for name, data in events:
        if name != "ping":
            EVENT.validate_python(data)
    first, last = events[0][1]["message"], events[-2][1]
    assert first["content"] == [] and first["stop_reason"] is None and first["usage"]["input_tokens"] > 0
    assert "".join(d["delta"]["text"] for n, d in events if n == "content_block_delta") == TEXT
    assert last["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert last["usage"]["output_tokens"] == len(TEXT.encode()) + 1


async def test_an_agents_loop_over_the_official_client(start: Start, connect: Any):
    """The model calls, the client answers, the model concludes: streamed, with thinking, as agents do it."""

    def reply(request: Any) -> list[int]:
        said = bytes(i for i in request.prompt_token_ids if i < 256).decode()
        return list(("It is sunny." if "sunny" in said else f"<think>\nWhere?\n</think>\n{CALL}").encode())

    running = await start(MockEngine(reply=reply), **HERMES)
    client = connect(running)
    messages: list[Any] = [{"role": "user", "content": [{"type": "text", "text": "Weather in Zürich?"}]}]
    common: Any = {"model": "default", "max_tokens": 400, "tools": [WEATHER], "system": [{"type": "text", "text": "x"}]}
    turns = 0
    while True:
        turns += 1
        async with client.beta.messages.stream(messages=messages, **common) as stream:
            kinds = [event.type async for event in stream]
            final = await stream.get_final_message()
        messages.append(
            {"role": "assistant", "content": [block.model_dump(exclude_none=True) for block in final.content]}
        )
        if final.stop_reason != "tool_use":
            break
        assert {"thinking", "signature", "text", "input_json"} <= set(kinds)
        (call,) = (block for block in final.content if block.type == "tool_use")
        assert call.input == {"city": "Zürich"} and call.name == "get_weather"
        result = [{"type": "text", "text": "sunny"}]
        messages.append(
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": result}]}
        )
    assert turns == 2 and final.content[-1].text == "It is sunny." and final.stop_reason == "end_turn"  # type: ignore[union-attr]


async def test_thinking_and_calls_whole(start: Start):
    running = await start(MockEngine(reply=f"<think>\nWhere?\n</think>\n\n{CALL}"), **HERMES)
    message = (await post(running, tools=[WEATHER], max_tokens=400)).json()
    assert [block["type"] for block in message["content"]] == ["thinking", "text", "tool_use"]
    assert message["content"][0]["thinking"] == "Where?" and message["content"][0]["signature"]
    assert message["content"][2]["input"] == {"city": "Zürich"} and message["stop_reason"] == "tool_use"
    assert message["usage"]["output_tokens_details"]["thinking_tokens"] > 0
    hidden = (await post(running, max_tokens=400, thinking={"type": "adaptive", "display": "omitted"})).json()
    assert hidden["content"][0]["thinking"] == "" and hidden["content"][0]["signature"]


async def test_why_a_message_ended(start: Start):
    running = await start(MockEngine(reply="one two three", max_model_len=64))
    stopped = (await post(running, stop_sequences=["three", " two"])).json()
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", " two")
    assert stopped["content"][0]["text"] == "one"
    assert (await post(running, max_tokens=3)).json()["stop_reason"] == "max_tokens"
    # Agents ask for tens of thousands of tokens whatever the model's context is.
    long = await start(MockEngine(reply="x" * 500, max_model_len=64))
    assert (await post(long, max_tokens=32_000)).json()["stop_reason"] == "model_context_window_exceeded"
    assert (await post(running, max_tokens=32_000)).json()["stop_reason"] == "end_turn"


async def test_a_turn_that_was_begun_is_gone_on_with(running: Running):
    await post(running, messages=[*HI, {"role": "assistant", "content": "Well,"}])
    prompt = bytes(i for i in running.engine.requests[0].prompt_token_ids if i < 256).decode()
    assert prompt.endswith("Well,")


async def test_counting_tokens_runs_nothing(running: Running, connect: Any):
    counted = await connect(running).messages.count_tokens(model="default", messages=HI, tools=[WEATHER])
    assert counted.input_tokens > 10 and not running.engine.requests


async def test_models_in_either_shape(running: Running, connect: Any):
    client = connect(running)
    page = await client.models.list()
    (model,) = page.data
    assert model.id == "mock" and model.type == "model" and model.created_at.year >= 2026 and not page.has_more
    assert (await client.models.retrieve("default")).id == "mock"
    with pytest.raises(anthropic.NotFoundError):
        await client.models.retrieve("nobody")
    assert (await running.http.get("/v1/models")).json()["object"] == "list"


async def test_errors_have_anthropics_shape(start: Start, connect: Any):
    running = await start(MockEngine(reply="x", max_live=0))
    with pytest.raises(anthropic.NotFoundError) as unknown:
        await connect(running).messages.create(model="nobody", max_tokens=4, messages=HI)
    body: Any = unknown.value.body
    assert body["type"] == "error" and body["error"]["type"] == "not_found_error" and unknown.value.request_id
    for fields, name in (
        ({"max_tokens": 0}, "max_tokens"),
        ({"top_p": 7.0}, "top_p"),
        ({"tools": [{"name": "f"}]}, "input_schema"),
    ):
        reply = await post(running, **fields)
        assert reply.status_code == 400 and reply.json()["error"]["type"] == "invalid_request_error"
        assert name in reply.json()["error"]["message"]
    missing = await running.http.post(PATH, json={"messages": HI})
    assert missing.status_code == 400 and "max_tokens" in missing.json()["error"]["message"]
    assert (await running.http.get(f"{PATH}/batches")).json()["error"]["type"] == "not_found_error"
    full = await post(running)
    assert full.status_code in (429, 529) and full.headers["retry-after"] == "1"
    large = await running.http.post(PATH, content=b"x" * (17 * 2**20), headers={"content-type": "application/json"})
    assert large.status_code == 413 and large.json()["error"]["type"] == "request_too_large"


async def test_a_stream_that_fails_ends_with_an_error_event(start: Start, connect: Any):
    engine = MockEngine(reply="a longer answer")
    running = await start(engine)
    engine.fail_next = "It went wrong."
    events = await named_events(running)
    assert events[-1][0] == "error" and events[-1][1]["error"] == {"type": "api_error", "message": "It went wrong."}
    engine.fail_next = "It went wrong."
    with pytest.raises(anthropic.APIStatusError):
        async with connect(running).messages.stream(model="default", max_tokens=64, messages=HI) as stream:
            await stream.get_final_message()


async def test_a_key_comes_in_either_header(start: Start, connect: Any):
    ring = KeyRing.of(["a-key-of-some-length", "another-key-of-length"])
    running = await start(app={"access": Access(ring)})
    with pytest.raises(anthropic.AuthenticationError) as refused:
        await connect(running).messages.create(model="default", max_tokens=4, messages=HI)
    assert refused.value.body["error"]["type"] == "authentication_error"  # type: ignore[index]
    for options in ({"api_key": "a-key-of-some-length"}, {"api_key": None, "auth_token": "a-key-of-some-length"}):
        made = connect(running, **options)
        assert (await made.messages.create(model="default", max_tokens=4, messages=HI)).content
    both = {"x-api-key": "a-key-of-some-length", "authorization": "Bearer another-key-of-length"}
    assert (await running.http.post(PATH, json={"messages": HI, "max_tokens": 4}, headers=both)).status_code == 401


def to_messages(*messages: Any, **fields: Any) -> Any:
    body = MessagesRequest.model_validate({"messages": list(messages), "max_tokens": 4, **fields})
    return body.to_input("id").messages


def test_blocks_become_messages_in_their_order():
    made = to_messages(
        {"role": "user", "content": "weather?"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "s"},
                {"type": "redacted_thinking", "data": "??"},
                {"type": "text", "text": "Looking."},
                {"type": "tool_use", "id": "t1", "name": "f", "input": {"a": 1}},
                {"type": "tool_use", "id": "t2", "name": "f", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": "sun"},
                {"type": "tool_result", "tool_use_id": "t2", "is_error": True},
                {"type": "document", "title": "T", "source": {"type": "text", "media_type": "text/plain", "data": "D"}},
                {"type": "text", "text": "And?", "cache_control": {"type": "ephemeral"}},
            ],
        },
        system=[
            {"type": "text", "text": "x-anthropic-billing-header: cc=1"},
            {"type": "text", "text": "A", "cache_control": {}},
        ],
    )
    assert [m["role"] for m in made] == ["system", "user", "assistant", "tool", "tool", "user"]
    assert made[0]["content"] == [{"type": "text", "text": "A"}]
    assert made[2]["reasoning"] == "hm" and made[2]["content"] == "Looking."
    assert [call["function"]["arguments"] for call in made[2]["tool_calls"]] == ['{"a": 1}', "{}"]
    assert (
        made[3] == {"role": "tool", "tool_call_id": "t1", "content": "sun"} and made[4]["content"] == "The tool failed."
    )
    assert [part["text"] for part in made[5]["content"]] == ["T", "D", "And?"]


async def test_what_is_not_taken_is_refused_by_its_place(running: Running):
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGk="}}
    cases = (
        ({"messages": [{"role": "user", "content": [image]}]}, "messages[0].content[0]"),
        ({"messages": HI, "tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "web_search_20250305"),
        ({"messages": HI, "mcp_servers": [{"url": "x"}]}, "mcp_servers"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "tool_use_id"),
    )
    for fields, name in cases:
        reply = await post(running, **fields)
        assert reply.status_code == 400 and name in reply.json()["error"]["message"], reply.text


def test_choices_of_tools():
    for given, meant in (("auto", "auto"), ("any", "required"), ("none", "none")):
        body = MessagesRequest.model_validate({"messages": HI, "max_tokens": 1, "tool_choice": {"type": given}})
        assert body.options().tool_choice == meant and body.options().parallel_tool_calls
    fields = {"tool_choice": {"type": "tool", "name": "f", "disable_parallel_tool_use": True}}
    options = MessagesRequest.model_validate({"messages": HI, "max_tokens": 1, **fields}).options()
    assert options.tool_choice == {"type": "function", "function": {"name": "f"}} and not options.parallel_tool_calls
    with pytest.raises(RequestError, match="name"):
        MessagesRequest.model_validate({"messages": HI, "max_tokens": 1, "tool_choice": {"type": "tool"}}).options()
