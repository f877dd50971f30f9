"""What is right about tools, structured output and thinking."""

from __future__ import annotations

import json
from typing import Any

from tests.field.harness import WEATHER, Line, any_model, ask, fixed, right, streamed, templated
from tests.serving.text.vocabularies import byte_level

# -- tools --------------------------------------------------------------------------------------------------------------


def _called(reply: dict[str, Any]) -> tuple[Any, list[dict[str, Any]], str]:
    choice = reply["choices"][0]
    calls = choice["message"].get("tool_calls", [])
    return (
        choice["message"]["content"],
        [json.loads(call["function"]["arguments"]) for call in calls],
        choice["finish_reason"],
    )


@right("stop-cuts-call")
async def _stop_cuts_call(line: Line) -> None:
    for reply, parser in ((WEATHER, "json"), (f"<tool_call>\n{WEATHER}\n</tool_call>", "hermes")):
        status, body = await ask(fixed(reply, tool_parser=parser), line, max_tokens=100)
        assert (status, *_called(body)) == (200, None, [{"city": "Paris"}], "tool_calls")
        chunks = await streamed(fixed(reply, tool_parser=parser), line, max_tokens=100, stream=True)
        assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
    auto = {"tool_choice": "auto", "stop": ["Paris", "done"], "max_tokens": 200}
    status, body = await ask(fixed(f"Let me see.\n<tool_call>\n{WEATHER}\n</tool_call>"), line, **auto)
    assert _called(body) == ("Let me see.", [{"city": "Paris"}], "tool_calls")
    status, body = await ask(fixed("First this. It is done now."), line, **auto)
    assert _called(body) == ("First this. It is ", [], "stop") and body["choices"][0]["stop_reason"] == "done"


@right("cut-before-name")
async def _cut_before_name(line: Line) -> None:
    status, body = await ask(fixed(WEATHER), line)
    assert (status, *_called(body)) == (200, None, [], "length")
    deltas = [chunk["choices"][0]["delta"] for chunk in await streamed(fixed(WEATHER), line, stream=True)]
    assert not any(delta.get("content") for delta in deltas)


@right("second-call-cut")
async def _second_call_cut(line: Line) -> None:
    call = f"<tool_call>\n{WEATHER}\n</tool_call>\n"
    status, body = await ask(fixed(call * 2), line, max_tokens=len(call) + 24)
    assert (status, *_called(body)) == (200, None, [{"city": "Paris"}], "length")


ITEMS = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content or '' }}{% for c in m.tool_calls or [] %}{{ c.function.name }}("
    "{% for k, v in c.function.arguments|items %}{{ k }}={{ v }};{% endfor %}){% endfor %}{% endfor %}"
)
ALTERNATING = (
    "{% for m in messages %}{% if m.role != 'tool' and (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "[{{ m.role }} {{ m.content }}{% for c in m.tool_calls or [] %} {{ c.function.name }}{% endfor %}]{% endfor %}"
)


@right("bad-history-arguments")
async def _bad_history(line: Line) -> None:
    engine, service = templated(ITEMS)
    messages = line["body"]["messages"]
    for arguments in ('{"oops', "[1]", '"text"', "", "[" * 100_000, '{"a": ' * 5000, '{"a": 1}'):
        messages[1]["tool_calls"][0]["function"]["arguments"] = arguments
        status, reply = await ask(service, line, messages=messages, max_tokens=1)
        assert status == 200, (arguments[:20], reply)
        prompt = byte_level().decode(engine.requests[-1].prompt_token_ids, skip_special_tokens=False)
        assert ("f(a=1;)" if arguments == '{"a": 1}' else "f()") in prompt


@right("responses-message-then-call")
async def _message_then_call(line: Line) -> None:
    engine, service = templated(ALTERNATING)
    status, reply = await ask(service, line)
    assert status == 200, reply
    prompt = byte_level().decode(engine.requests[-1].prompt_token_ids, skip_special_tokens=False)
    assert prompt == "[user a][assistant b f][tool 1]"


@right("legacy-history")
async def _legacy(line: Line) -> None:
    engine, service = templated(ITEMS)
    status, reply = await ask(service, line)
    assert status == 200, reply
    prompt = byte_level().decode(engine.requests[-1].prompt_token_ids, skip_special_tokens=False)
    assert prompt == "<|user|>a<|assistant|>f()<|tool|>1"
    for turn in ({"reasoning_content": "hm"}, {"reasoning": "hm"}, {"refusal": "No."}):
        user = {"role": "user", "content": "a"}
        messages = [user, {"role": "assistant", "content": None, **turn}, user]
        assert (await ask(service, line, messages=messages))[0] == 200, turn
    assert "<|assistant|>No.<|user|>" in byte_level().decode(
        engine.requests[-1].prompt_token_ids, skip_special_tokens=False
    )


# -- structured ---------------------------------------------------------------------------------------------------------


@right("tool-and-schema")
async def _tool_and_schema(line: Line) -> None:
    status, reply = await ask(any_model(), line, max_tokens=200)
    content, calls, finish = _called(reply)
    assert status == 200 and content is None and (finish == "length" or set(calls[0]) == {"city"})
    status, reply = await ask(any_model(), line, tool_choice="auto", max_tokens=200)
    assert status == 200, reply


@right("open-objects")
async def _open_objects(line: Line) -> None:
    for _ in range(4):
        status, reply = await ask(any_model(), line, parallel_tool_calls=False)
        _, calls, finish = _called(reply)
        assert status == 200 and (finish == "length" or set(calls[0]) <= {"city", "days"})


# -- thinking -----------------------------------------------------------------------------------------------------------

THOUGHT = "<think>\nA plan: say a word.\n</think>\n\nHello, and goodbye."


@right("effort")
async def _effort(line: Line) -> None:
    source = "{{ reasoning_effort }} {{ enable_thinking }}{% for m in messages %}{{ m.content }}{% endfor %}"
    for effort, shown in (("low", "low True"), ("none", "none False")):
        engine, service = templated(source.replace("enable_thinking }}", "enable_thinking|default(true) }}"))
        for changes in (
            {"reasoning_effort": effort},
            {"route": "POST /v1/responses", "body": {"input": "hi", "reasoning": {"effort": effort}}},
        ):
            asked = {**line, **changes} if "route" in changes else {**line, "body": {**line["body"], **changes}}
            status, body = await ask(service, asked)
            assert status == 200, body
            prompt = byte_level().decode(engine.requests[-1].prompt_token_ids, skip_special_tokens=False)
            assert prompt.startswith(shown)
            assert "route" not in changes or body["reasoning"]["effort"] == effort


@right("stop-in-thinking")
async def _stop_in_thinking(line: Line) -> None:
    _, body = await ask(fixed(THOUGHT), line)
    message = body["choices"][0]["message"]
    assert (message["reasoning"], message["content"]) == ("A plan: say a word.", "Hello, ")
    assert body["choices"][0]["stop_reason"] == "a" and body["choices"][0]["finish_reason"] == "stop"
    chunks = await streamed(fixed(THOUGHT), line, stream=True)
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == "Hello, "


@right("reasoning-usage")
async def _reasoning_usage(line: Line) -> None:
    chat = {"route": "POST /v1/chat/completions", "body": {"messages": [{"role": "user", "content": "hi"}]}}
    inside = THOUGHT[THOUGHT.index("A plan") : THOUGHT.index("</think>")].strip()
    _, body = await ask(fixed(THOUGHT), chat)
    told = body["usage"]["completion_tokens_details"]["reasoning_tokens"]
    assert len(inside) <= told <= THOUGHT.index("</think>") and told < body["usage"]["completion_tokens"]
    hidden = (await ask(fixed(THOUGHT), chat, include_reasoning=False))[1]
    assert hidden["usage"] == body["usage"] and "reasoning" not in hidden["choices"][0]["message"]
    _, body = await ask(fixed(THOUGHT), {"route": "POST /v1/responses", "body": {"input": "hi"}})
    assert body["usage"]["output_tokens_details"]["reasoning_tokens"] == told
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    assert (await streamed(fixed(THOUGHT), chat, **stream))[-1]["usage"]["completion_tokens_details"][
        "reasoning_tokens"
    ] == told
    assert (await ask(fixed("Hello"), chat))[1]["usage"]["completion_tokens_details"]["reasoning_tokens"] == 0


@right("continue-thinking")
async def _continue_thinking(line: Line) -> None:
    status, body = await ask(fixed(" them.</think>Hi!"), line)
    message = body["choices"][0]["message"]
    assert status == 200 and (message["reasoning"].strip(), message["content"]) == ("them.", "Hi!")
    closed = [line["body"]["messages"][0], {"role": "assistant", "content": "<think>\nI greet.</think>\nHel"}]
    message = (await ask(fixed("lo!"), line, messages=closed))[1]["choices"][0]["message"]
    assert message["content"] == "lo!" and "reasoning" not in message


@right("usage-role-chunk")
async def _role_chunk(line: Line) -> None:
    chunks = await streamed(fixed("Hello"), line)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert "role" in chunks[0]["choices"][0]["delta"] and counts[:3] == [0, 1, 2] and counts[-1] == 3
