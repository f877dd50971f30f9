"""Tools and thinking over gRPC: the same calls as over HTTP."""

import json

import grpc
import jsonschema
import pytest

from proto.jaxserve.v1 import inference_pb2 as pb
from proto.jaxserve.v1.sampling_pb2 import SamplingParams, StructuredOutputs
from serving.text.grammar import GrammarCompiler
from tests.mock_engine import MockEngine
from tests.serving.frontends.openai.test_structured import MOVE, RandomEngine
from tests.serving.text.vocabularies import byte_level

HERMES = {"tool_parser": "hermes", "reasoning_parser": "think"}
WEATHER = pb.Tool(
    name="get_weather",
    parameters_json='{"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}',
)
ONE = '<think>Hm.</think>Let me look.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich"}}\n</tool_call>'
TWO = ONE + '\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Bern"}}\n</tool_call>'


def chat(tools=(WEATHER,), **fields):
    messages = [pb.ChatMessage(role="user", content="weather?")]
    return pb.GenerateRequest(chat=pb.Chat(messages=messages, tools=tools, **fields))


def calls_of(messages):
    calls = {}
    for piece in (piece for message in messages for piece in message.tool_calls):
        call = calls.setdefault(piece.index, {"id": piece.id, "name": piece.name, "arguments": ""})
        call["arguments"] += piece.arguments_json
    return calls


async def read(call):
    return [message async for message in call]


async def test_calls_thinking_and_text_come_apart(serve):
    async with serve(MockEngine(TWO), **HERMES) as s:
        messages = await read(s.inference.Generate(chat()))
    calls = calls_of(messages)
    assert [json.loads(c["arguments"])["city"] for c in calls.values()] == ["Zürich", "Bern"]
    assert {c["name"] for c in calls.values()} == {"get_weather"} and len({c["id"] for c in calls.values()}) == 2
    assert "".join(m.text for m in messages) == "Let me look."
    assert "".join(m.reasoning for m in messages) == "Hm."
    assert messages[-1].finish_reason == pb.FINISH_REASON_TOOL_CALLS
    assert messages[-1].usage.completion_tokens == len(TWO.encode()) + 1
    assert sum(len(m.token_ids) for m in messages) == messages[-1].usage.completion_tokens


async def test_one_call_no_thinking_no_tools(serve):
    async with serve(MockEngine(TWO), **HERMES) as s:
        messages = await read(s.inference.Generate(chat(parallel_tool_calls=False, include_reasoning=False)))
        assert len(calls_of(messages)) == 1 and not any(m.reasoning for m in messages)
        none = pb.ToolChoice(mode=pb.ToolChoice.MODE_NONE)
        messages = await read(s.inference.Generate(chat(tool_choice=none)))
        assert not calls_of(messages) and "get_weather" in "".join(m.text for m in messages)
        assert messages[-1].finish_reason == pb.FINISH_REASON_STOP
        raw = chat()
        raw.sampling_params.CopyFrom(SamplingParams(detokenize=False))
        messages = await read(s.inference.Generate(raw))
        assert not calls_of(messages) and not any(m.text for m in messages)


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        (pb.ToolChoice(function="other"), "not among the tools"),
        (pb.ToolChoice(mode=77), "77 is not known"),
    ],
)
async def test_wrong_choices_are_refused(serve, choice, words):
    async with serve(MockEngine(ONE), **HERMES) as s:
        with pytest.raises(grpc.aio.AioRpcError, match=words) as caught:
            await read(s.inference.Generate(chat(tool_choice=choice)))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_required_without_tools_is_refused_and_wins_over_a_grammar(serve):
    required = pb.ToolChoice(mode=pb.ToolChoice.MODE_REQUIRED)
    async with serve(MockEngine(ONE), **HERMES) as s:
        with pytest.raises(grpc.aio.AioRpcError, match="no tools"):
            await read(s.inference.Generate(chat(tools=(), tool_choice=required)))
        both = chat(tool_choice=required)
        both.sampling_params.CopyFrom(SamplingParams(structured_outputs=StructuredOutputs(json_object=True)))
        assert (await read(s.inference.Generate(both)))[-1].finish_reason == pb.FINISH_REASON_TOOL_CALLS


@pytest.mark.parametrize("choice", [pb.ToolChoice(mode=pb.ToolChoice.MODE_REQUIRED), pb.ToolChoice(function="move")])
async def test_forced_calls_have_valid_arguments(serve, choice, monkeypatch):
    """With a model that picks any allowed token, whatever comes out right is the grammar's doing."""
    tokenizer = byte_level()
    monkeypatch.setattr("tests.mock_engine.MockTokenizer", lambda: tokenizer)
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size)
    move = pb.Tool(name="move", parameters_json=json.dumps(MOVE))
    async with serve(RandomEngine(), grammar_compiler=compiler, tool_parser="hermes") as s:
        for _ in range(4):
            wire = chat(tools=(move,), tool_choice=choice, parallel_tool_calls=False)
            messages = await read(s.inference.Generate(wire))
            (call,) = calls_of(messages).values()
            jsonschema.validate(json.loads(call["arguments"]), MOVE)
            assert call["name"] == "move" and messages[-1].finish_reason == pb.FINISH_REASON_TOOL_CALLS
