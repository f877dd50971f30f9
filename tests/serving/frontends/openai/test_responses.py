"""/v1/responses: whole, streamed, continued by its input; tools that take a text; thinking that goes back."""

from __future__ import annotations

import json

import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from serving.frontends.openai.responses.protocol import ResponsesRequest
from tests.mock_engine import MockEngine
from tests.serving.frontends.conftest import Running, Start

EVENT: TypeAdapter = TypeAdapter(ResponseStreamEvent)
PATH = "/v1/responses"
TEXT = "Hello wörld!"


async def test_a_response_has_openais_shape(running: Running):
    body = {"input": "hi", "instructions": "Be short.", "temperature": 0.5, "metadata": {"k": "v"}}
    reply = await running.http.post(PATH, json={**body, "include": ["message.output_text.logprobs"], "top_logprobs": 1})
    parsed = TypeAdapter(Response).validate_python(reply.json())
    assert parsed.output_text == TEXT and parsed.status == "completed"
    assert parsed.temperature == 0.5 and parsed.metadata == {"k": "v"} and parsed.usage
    assert parsed.usage.output_tokens == len(TEXT.encode()) + 1
    assert parsed.output[0].content[0].logprobs  # type: ignore[union-attr]
    text = bytes(i for i in running.engine.requests[0].prompt_token_ids if i < 256).decode()
    assert text == "Be short.hi"


async def test_events_follow_openais_order_and_add_up(running: Running):
    lines = await running.events(PATH, input="hi")
    events = [EVENT.validate_python(json.loads(line)) for line in lines]
    kinds = [e.type for e in events]
    assert [k for i, k in enumerate(kinds) if i == 0 or kinds[i - 1] != k] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
        "response.output_text.delta", "response.output_text.done", "response.content_part.done",
        "response.output_item.done", "response.completed",
    ]  # fmt: skip
    assert [e.sequence_number for e in events] == list(range(len(events)))
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == TEXT
    assert events[-1].response.output_text == TEXT  # type: ignore[union-attr]
    assert json.loads(lines[0])["response"]["output"] == []


async def test_the_client_streams(running: Running):
    async with running.client.responses.stream(model="default", input="x") as stream:
        async for _ in stream:
            pass
        final = await stream.get_final_response()
    assert final.output_text == TEXT


async def test_a_cut_response_is_incomplete(running: Running):
    reply = await running.client.responses.create(model="mock", input="x", max_output_tokens=3)
    assert reply.status == "incomplete" and reply.incomplete_details
    assert reply.incomplete_details.reason == "max_output_tokens" and reply.output_text == "Hel"


async def test_conversations_come_in_the_input():
    body = ResponsesRequest.model_validate(
        {
            "input": [
                {"role": "user", "content": [{"type": "input_text", "text": "weather?"}]},
                {"type": "reasoning", "id": "rs_1", "summary": []},
                {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
                {"type": "function_call", "call_id": "c2", "name": "g", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c1", "output": "sun"},
            ]
        }
    )
    messages = body.to_chat().messages
    assert [m["role"] for m in messages] == ["user", "assistant", "tool"]
    assert [c["id"] for c in messages[1]["tool_calls"]] == ["c1", "c2"]
    assert messages[2] == {"role": "tool", "tool_call_id": "c1", "content": "sun"}


@pytest.mark.parametrize(
    "fields",
    [{"previous_response_id": "resp_1"}, {"background": True}, {"input": []}, {"input": [{"type": "item_reference"}]}],
)
async def test_what_needs_storage_is_refused(running: Running, fields):
    with pytest.raises(openai.BadRequestError):
        await running.client.responses.create(**{"model": "mock", "input": "x", **fields})


async def test_a_failure_inside_a_stream_is_an_event(start: Start):
    running = await start(MockEngine(reply="Hello"))
    running.engine.fail_next = "The model produced NaN."
    lines = await running.events(PATH, input="hi")
    last = EVENT.validate_python(json.loads(lines[-1]))
    assert last.type == "response.failed" and last.response.error and "NaN" in last.response.error.message


APPLY = {"type": "custom", "name": "apply", "format": {"type": "grammar", "syntax": "regex", "definition": "a+"}}
CALL = '<tool_call>\n{"name": "apply", "arguments": {"input": "aaa"}}\n</tool_call>'
HERMES = {"tool_parser": "hermes", "reasoning_parser": "think"}


async def test_a_tool_that_takes_a_text(start: Start):
    running = await start(MockEngine(reply=CALL), **HERMES)
    lines = await running.events(PATH, input="hi", tools=[APPLY, {"type": "web_search"}], max_output_tokens=200)
    events = [EVENT.validate_python(json.loads(line)) for line in lines]
    assert [e.sequence_number for e in events] == list(range(len(events)))
    final = events[-1].response  # type: ignore[union-attr]
    (item,) = final.output
    assert item.type == "custom_tool_call" and item.input == "aaa" and item.name == "apply" and item.call_id
    assert {"response.custom_tool_call_input.delta", "response.custom_tool_call_input.done"} <= {e.type for e in events}
    back = [
        {"role": "user", "content": "hi"},
        item.model_dump(),
        {"type": "custom_tool_call_output", "call_id": item.call_id, "output": "ok"},
    ]
    messages = ResponsesRequest.model_validate({"input": back, "tools": [APPLY]}).to_chat().messages
    assert json.loads(messages[1]["tool_calls"][0]["function"]["arguments"]) == {"input": "aaa"}
    assert messages[2] == {"role": "tool", "tool_call_id": item.call_id, "content": "ok"}
    (function,) = ResponsesRequest.model_validate({"input": "x", "tools": [APPLY]}).to_chat().tools or ()
    assert function.function.parameters["properties"]["input"]["pattern"] == "^(?:a+)$"  # type: ignore[index]
    with pytest.raises(openai.BadRequestError):
        await running.client.responses.create(
            model="mock", input="x", tools=[{"type": "file_search", "vector_store_ids": []}]
        )


async def test_some_of_the_tools_may_be_called(start: Start):
    running = await start(MockEngine(reply=CALL), **HERMES)
    other = {"type": "function", "name": "other", "parameters": {"type": "object", "properties": {}}}
    for names, called in ((["apply"], True), (["other"], False)):
        allowed = [{"type": "function", "name": name} for name in names]
        choice = {"type": "allowed_tools", "mode": "auto", "tools": allowed}
        body = {"input": "hi", "tools": [APPLY, other], "tool_choice": choice, "max_output_tokens": 200}
        reply = (await running.http.post(PATH, json=body)).json()
        assert (reply["output"][0]["type"] == "custom_tool_call") == called
        prompt = bytes(i for i in running.engine.requests[-1].prompt_token_ids if i < 256).decode()
        assert prompt.startswith("2 tools")  # the model sees all
    body["tool_choice"]["tools"] = [{"type": "function", "name": "nobody"}]
    refused = await running.http.post(PATH, json=body)
    assert refused.status_code == 400 and "nobody" in refused.json()["error"]["message"]


async def test_thinking_goes_out_sealed_and_comes_back(start: Start):
    running = await start(MockEngine(reply="<think>\nhm\n</think>\n\nYes."), **HERMES)
    body = {"input": "hi", "include": ["reasoning.encrypted_content"], "store": False}
    thought, message = (await running.http.post(PATH, json=body)).json()["output"]
    assert thought["type"] == "reasoning" and thought["encrypted_content"] and message["content"][0]["text"] == "Yes."
    sealed = {
        "type": "reasoning",
        "id": thought["id"],
        "summary": [],
        "encrypted_content": thought["encrypted_content"],
    }
    for item, text in ((sealed, "hm"), ({**sealed, "encrypted_content": "gAAAA-of-somebody-else"}, None)):
        given = [{"role": "user", "content": "hi"}, item, message, {"role": "user", "content": "And?"}]
        messages = ResponsesRequest.model_validate({"input": given}).to_chat().messages
        assert [m["role"] for m in messages] == ["user", "assistant", "user"] and messages[1].get("reasoning") == text
