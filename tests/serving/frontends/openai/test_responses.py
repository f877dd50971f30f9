"""/v1/responses: whole, streamed, continued; never stored."""

from __future__ import annotations

import json

import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from serving.frontends.openai.protocol.responses import ResponsesRequest
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
