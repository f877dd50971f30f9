"""An agent's loop over each dialect, for scripts/check_clients.py: the model calls a tool, gets its result, and answers.

A small model decides nothing by itself here: the call is forced and its arguments are held to a schema, and the answer is held to
another, so that what comes is the same every time.
"""

from __future__ import annotations

import json
from typing import Any

QUESTION = "Is it raining in Paris? Look it up with the tool."
CITY = {
    "type": "object",
    "properties": {"city": {"const": "Paris"}},
    "required": ["city"],
    "additionalProperties": False,
}
VERDICT = {
    "type": "object", "properties": {"raining": {"const": True}}, "required": ["raining"], "additionalProperties": False,
}  # fmt: skip
RESULT = json.dumps({"city": "Paris", "weather": "rain"})
NAME, ABOUT = "weather", "The weather in a city."


def weather(arguments: dict[str, Any]) -> str:
    """The tool."""
    assert arguments == {"city": "Paris"}, arguments
    return RESULT


def right(text: str | None) -> None:
    """The answer is held to VERDICT."""
    assert json.loads(text or "") == {"raining": True}, text


def loop_chat(url: str) -> None:
    """Chat completions, streamed as agents do."""
    import openai

    client: Any = openai.OpenAI(base_url=url, api_key="none")
    tools = [{"type": "function", "function": {"name": NAME, "description": ABOUT, "parameters": CITY}}]
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    name, arguments, call_id = "", "", ""
    for chunk in client.chat.completions.create(
        model="default", messages=messages, tools=tools, tool_choice="required", parallel_tool_calls=False, stream=True
    ):
        for call in (chunk.choices[0].delta.tool_calls or ()) if chunk.choices else ():
            name, call_id = name or call.function.name or "", call_id or call.id or ""
            arguments += call.function.arguments or ""
    assert name == NAME
    function = {"name": name, "arguments": arguments}
    messages += [
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": call_id, "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": call_id, "content": weather(json.loads(arguments))},
    ]
    form = {"type": "json_schema", "json_schema": {"name": "verdict", "schema": VERDICT, "strict": True}}
    done = client.chat.completions.create(
        model="default", messages=messages, tools=tools, tool_choice="none", response_format=form
    )
    right(done.choices[0].message.content)


def loop_responses(url: str) -> None:
    """Responses that follow on one another, kept by the server; a conversation; what is kept is told and deleted."""
    import openai

    client: Any = openai.OpenAI(base_url=url, api_key="none")
    tools = [{"type": "function", "name": NAME, "description": ABOUT, "parameters": CITY, "strict": True}]
    first = client.responses.create(model="default", input=QUESTION, tools=tools, tool_choice="required")
    call = next(item for item in first.output if item.type == "function_call")
    assert call.name == NAME
    output = {"type": "function_call_output", "call_id": call.call_id, "output": weather(json.loads(call.arguments))}
    form = {"format": {"type": "json_schema", "name": "verdict", "schema": VERDICT, "strict": True}}
    second = client.responses.create(
        model="default", previous_response_id=first.id, input=[output], tools=tools, tool_choice="none", text=form
    )
    right(second.output_text)
    assert client.responses.retrieve(second.id).output_text == second.output_text
    items = client.responses.input_items.list(second.id).data
    assert {item.type for item in items} >= {"message", "function_call", "function_call_output"}
    conversation = client.conversations.create()
    for text in (QUESTION, "And now?"):
        client.responses.create(model="default", input=text, conversation=conversation.id, max_output_tokens=8)
    assert len(client.conversations.items.list(conversation.id).data) == 4
    running = client.responses.create(
        model="default", input="Count to a thousand.", background=True, max_output_tokens=256
    )
    assert client.responses.cancel(running.id).status in ("cancelled", "completed")
    for response in (first, second):
        client.responses.delete(response.id)
    try:
        client.responses.retrieve(first.id)
    except openai.NotFoundError:
        return
    raise AssertionError("a deleted response was told")


def loop_messages(url: str) -> None:
    """Anthropic's messages, streamed, with the call's JSON as it comes."""
    import anthropic

    client: Any = anthropic.Anthropic(base_url=url.removesuffix("/v1"), api_key="none")
    tools = [{"name": NAME, "description": ABOUT, "input_schema": CITY}]
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    common = {"model": "default", "max_tokens": 64, "tools": tools}
    with client.messages.stream(messages=messages, tool_choice={"type": "any"}, **common) as stream:
        pieces = [event.partial_json for event in stream if event.type == "input_json"]
        final = stream.get_final_message()
    (call,) = [block for block in final.content if block.type == "tool_use"]
    assert final.stop_reason == "tool_use" and json.loads("".join(pieces)) == call.input
    messages += [
        {"role": "assistant", "content": [block.model_dump(exclude_none=True) for block in final.content]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": weather(call.input)}]},
    ]
    form = {"format": {"type": "json_schema", "schema": VERDICT}}
    done = client.messages.create(
        messages=messages, tool_choice={"type": "none"}, extra_body={"output_config": form}, **common
    )
    right("".join(block.text for block in done.content if block.type == "text"))


def loop_ollama(url: str) -> None:
    """Ollama's chat, which has no way to force a call: the call is asked for as a format, and given back as one."""
    import ollama

    client = ollama.Client(host=url.removesuffix("/v1"))
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    asked = client.chat("default", messages=messages, format=CITY).message.content
    arguments = json.loads(asked or "")
    messages += [
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": NAME, "arguments": arguments}}]},
        {"role": "tool", "tool_name": NAME, "content": weather(arguments)},
    ]
    parts = list(client.chat("default", messages=messages, format=VERDICT, stream=True))
    right("".join(part.message.content or "" for part in parts))


LOOPS = {"openai": (loop_chat, loop_responses), "anthropic": (loop_messages,), "ollama": (loop_ollama,)}
"""By the package that each needs."""
