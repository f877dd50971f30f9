"""Tool calls and reasoning over HTTP: parsed, streamed, typed, refused."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from serving.frontends.grpc.client import RemoteGrammars
from serving.service import ChatStyle, TextService
from tests.mock_engine import MockEngine, MockTemplate, MockTokenizer, mock_service
from tests.serving.frontends.conftest import HI, Start

EVENT: TypeAdapter = TypeAdapter(ResponseStreamEvent)
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
ONE = 'Let me look.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich"}}\n</tool_call>'
TWO = ONE + '\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Bern"}}\n</tool_call>'
THOUGHT = "<think>\nIs it big?\nYes.\n</think>\n\nIt is big."
HERMES = {"tool_parser": "hermes", "reasoning_parser": "think"}


async def test_a_call_comes_back_as_openais_message(start: Start):
    running = await start(MockEngine(reply=ONE), **HERMES)
    reply = TypeAdapter(ChatCompletion).validate_python((await running.chat(tools=[WEATHER])).json())
    choice = reply.choices[0]
    (call,) = choice.message.tool_calls or ()
    assert choice.finish_reason == "tool_calls" and choice.message.content == "Let me look."
    assert call.type == "function" and call.function.name == "get_weather" and call.id
    assert json.loads(call.function.arguments) == {"city": "Zürich"}
    prompt = bytes(i for i in running.engine.requests[0].prompt_token_ids if i < 256).decode()
    assert prompt.startswith("1 tools")


async def test_a_message_of_calls_alone_has_no_content(start: Start):
    running = await start(MockEngine(reply=ONE.removeprefix("Let me look.\n")), **HERMES)
    assert (await running.chat(tools=[WEATHER])).json()["choices"][0]["message"]["content"] is None


async def test_parallel_calls_stream_as_deltas_that_add_up(start: Start):
    running = await start(MockEngine(reply=TWO), **HERMES)
    chunks = await running.chunks(tools=[WEATHER])
    for chunk in chunks:
        TypeAdapter(ChatCompletionChunk).validate_python(chunk)
    calls: dict[int, dict[str, Any]] = {}
    pieces = 0
    for chunk in chunks:
        for call in chunk["choices"][0]["delta"].get("tool_calls", ()):
            known = calls.setdefault(call["index"], {"id": call.get("id"), "name": "", "arguments": ""})
            known["name"] += call["function"].get("name", "")
            known["arguments"] += call["function"].get("arguments", "")
            pieces += 1
    assert [json.loads(c["arguments"])["city"] for c in calls.values()] == ["Zürich", "Bern"]
    assert len({c["id"] for c in calls.values()}) == 2 and pieces > 6
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
    content = "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks)
    assert content == "Let me look."


async def test_the_client_accumulates_a_streamed_call(start: Start):
    running = await start(MockEngine(reply=ONE), **HERMES)
    async with running.client.chat.completions.stream(model="default", messages=HI, tools=[WEATHER]) as stream:
        async for _ in stream:
            pass
        final = await stream.get_final_completion()
    (call,) = final.choices[0].message.tool_calls or ()
    assert json.loads(call.function.arguments) == {"city": "Zürich"}


async def test_parallel_tool_calls_false_keeps_the_first(start: Start):
    running = await start(MockEngine(reply=TWO), **HERMES)
    message = (await running.chat(tools=[WEATHER], parallel_tool_calls=False)).json()["choices"][0]["message"]
    assert len(message["tool_calls"]) == 1


@pytest.mark.parametrize("fields", [{"tools": [WEATHER], "tool_choice": "none"}, {}])
async def test_without_tools_a_call_is_text(start: Start, fields):
    running = await start(MockEngine(reply=ONE), tool_parser="hermes")
    choice = (await running.chat(**fields)).json()["choices"][0]
    assert choice["message"]["content"] == ONE and choice["finish_reason"] == "stop"
    assert "tool_calls" not in choice["message"]


async def test_a_call_of_no_offered_tool_is_text(start: Start):
    text = ONE.replace("get_weather", "rm_rf")
    running = await start(MockEngine(reply=text), **HERMES)
    message = (await running.chat(tools=[WEATHER])).json()["choices"][0]["message"]
    assert "tool_calls" not in message and "rm_rf" in message["content"]


async def test_reasoning_is_told_apart(start: Start):
    running = await start(MockEngine(reply=THOUGHT), **HERMES)
    message = (await running.chat()).json()["choices"][0]["message"]
    assert message["reasoning"] == "Is it big?\nYes." and message["content"] == "It is big."
    chunks = await running.chunks()
    deltas = [c["choices"][0]["delta"] for c in chunks]
    assert "".join(d.get("reasoning") or "" for d in deltas) == "Is it big?\nYes."
    assert "".join(d.get("content") or "" for d in deltas) == "It is big."
    hidden = (await running.chat(include_reasoning=False)).json()["choices"][0]["message"]
    assert "reasoning" not in hidden and hidden["content"] == "It is big."


async def test_logprobs_and_ids_of_parsed_text_are_all_there(start: Start):
    running = await start(MockEngine(reply=ONE), **HERMES)
    chunks = await running.chunks(tools=[WEATHER], logprobs=True, return_token_ids=True)
    ids = [i for c in chunks for i in c["choices"][0].get("token_ids") or ()]
    entries = [e for c in chunks for e in (c["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert len(ids) == len(entries) == len(ONE.encode()) + 1


async def test_calls_and_reasoning_in_a_response(start: Start):
    running = await start(MockEngine(reply=f"<think>hm</think>{TWO}"), **HERMES)
    tool = {"type": "function", **WEATHER["function"]}  # type: ignore[dict-item]
    reply = (await running.http.post("/v1/responses", json={"input": "weather?", "tools": [tool]})).json()
    parsed = TypeAdapter(Response).validate_python(reply)
    assert [item.type for item in parsed.output] == ["reasoning", "message", "function_call", "function_call"]
    lines = await running.events("/v1/responses", input="weather?", tools=[tool])
    events = [EVENT.validate_python(json.loads(line)) for line in lines]
    done = [e for e in events if e.type == "response.function_call_arguments.done"]
    assert [json.loads(e.arguments)["city"] for e in done] == ["Zürich", "Bern"]
    first = [e.delta for e in events if e.type == "response.function_call_arguments.delta" and e.output_index == 2]
    assert json.loads("".join(first)) == {"city": "Zürich"}
    assert "".join(e.delta for e in events if e.type == "response.reasoning_text.delta") == "hm"


@pytest.mark.parametrize(
    "fields",
    [
        {"tool_choice": "required"},
        {"tool_choice": {"type": "function", "function": {"name": "get_weather"}}},
        {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "other"}}},
        {"tools": [WEATHER], "tool_choice": "sometimes"},
        {"tools": [{"type": "function"}]},
        {"tools": [{"type": "retrieval"}]},
    ],
)
async def test_wrong_tools_are_400(start: Start, fields):
    running = await start(**HERMES)
    with pytest.raises(openai.BadRequestError):
        await running.client.chat.completions.create(model="default", messages=HI, **fields)


class _Compiler:
    """Notes the grammars it is given and enforces none."""

    def __init__(self) -> None:
        self.grammars: list[str] = []

    def compile_tools(self, lark: str):
        self.grammars.append(lark)
        return lambda: None


NAMED = {"type": "function", "function": {"name": "get_weather"}}


@pytest.mark.parametrize(
    ("fields", "enforced"),
    [
        ({"tool_choice": "required"}, True),
        ({"tool_choice": NAMED}, True),
        ({"tool_choice": "auto"}, False),
        ({}, False),
        ({"tools": [{"type": "function", "function": {**WEATHER["function"], "strict": True}}]}, True),
    ],
)
async def test_forced_and_strict_calls_are_held_to_their_schema(start: Start, fields, enforced):
    compiler = _Compiler()
    running = await start(MockEngine(reply=ONE), **HERMES, grammar_compiler=compiler)
    reply = await running.chat(**{"tools": [WEATHER], **fields})
    assert reply.json()["choices"][0]["message"]["tool_calls"]
    assert len(compiler.grammars) == enforced
    assert all('"city"' in grammar and "get_weather" in grammar for grammar in compiler.grammars)


async def test_a_remote_engine_gets_the_grammars_source(start: Start):
    running = await start(MockEngine(reply=ONE), **HERMES, grammar_compiler=RemoteGrammars())
    await running.chat(tools=[WEATHER], tool_choice="required")
    structured = running.engine.requests[0].params.structured_outputs
    assert structured is not None and "get_weather" in structured.grammar


def test_a_style_comes_from_the_chat_template():
    service = mock_service()
    style = service.voice().style
    assert style.tools.name == "json" and style.reasoning is None
    template, tokenizer = MockTemplate(), service.tokenizer
    template.source = "{% if tools %}<tool_call>{% endif %}<think>"  # type: ignore[attr-defined]
    style = ChatStyle.of(template, tokenizer)  # type: ignore[arg-type]
    assert style.tools.name == "hermes" and style.reasoning is not None and style.reasoning.name == "think"
    with pytest.raises(ValueError, match="no tool-call parser named 'nope'"):
        mock_service(tool_parser="nope")


OPEN, CLOSE, OTHER = 300, 301, 302
MARKED = {OPEN: "<tool_call>", CLOSE: "</tool_call>", OTHER: "<|pad|>"}


class _MarkingTokenizer(MockTokenizer):
    """Its markers of calls are control tokens, as in most models that call tools."""

    special_token_ids = frozenset({*MockTokenizer.special_token_ids, *MARKED})

    def id_to_token(self, token_id: int) -> str | None:
        return MARKED.get(token_id) or super().id_to_token(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        return MARKED[token_id].encode() if token_id in MARKED else super().token_bytes(token_id)


async def test_markers_that_are_control_tokens_stay_in_the_text_and_others_do_not(start: Start):
    call = [OPEN, *b'{"name": "get_weather", "arguments": {"city": "Bern"}}', CLOSE]
    engine = MockEngine(reply=[*b"So:", OTHER, *call])
    template: Any = MockTemplate()
    service = TextService(engine, _MarkingTokenizer(), template, model_id="m", tool_parser="hermes")  # type: ignore[arg-type]
    running = await start(engine, service=service)
    message = (await running.chat(tools=[WEATHER])).json()["choices"][0]["message"]
    assert message["content"] == "So:" and message["tool_calls"][0]["function"]["name"] == "get_weather"
    message = (await running.chat()).json()["choices"][0]["message"]
    assert message["content"] == 'So:{"name": "get_weather", "arguments": {"city": "Bern"}}'
