"""Calls as the models' own templates write them, which is what these models were trained to write.

What a template renders of an assistant's turn is read back; nothing here is written by hand.
"""

import json

import pytest

from serving.service.requests.chat_style import ChatStyle
from serving.text.chat_template import ChatTemplate
from serving.text.detokenizer import IncrementalDetokenizer
from tests.serving.text.test_tools import message, parse
from tests.serving.text.vocabularies import real

NAMES = ("qwen3", "qwen2_5", "llama3_2", "mistral_nemo", "deepseek_v3")  # whose templates write calls
ONE_CALL = ("llama3_2",)  # its template refuses a second one
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"Does {name}.",
            "parameters": {"type": "object", "properties": {key: {"type": kind} for key, kind in fields.items()}},
        },
    }
    for name, fields in (
        ("get_weather", {"city": "string", "n": "integer", "deep": "object", "on": "boolean", "list": "array"}),
        ("now", {}),
    )
]
SCHEMAS = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}
ARGUMENTS = (
    {"city": "Köln", "n": 3},
    {"city": 'a "quoted" \\ path\\n, {braces} [and] 日本 😀', "n": -1},
    {"city": "two\nlines\t", "deep": {"a": [1.5, None, True, {"b": ""}]}, "on": False, "list": []},
    {},
)


def turn_of(name: str, calls: list[tuple[str, dict]]) -> str:
    """What the model writes after the prompt, by its template."""
    tokenizer = real(name)
    template = ChatTemplate.from_tokenizer(tokenizer)
    assert template is not None
    ask = [{"role": "user", "content": "What is the weather?"}]
    made = [
        {"id": f"call0000{i}", "type": "function", "function": {"name": call, "arguments": json.dumps(arguments)}}
        for i, (call, arguments) in enumerate(calls)
    ]
    said = {"role": "assistant", "content": None, "tool_calls": made}
    prompt = template.render(ask, tools=TOOLS)
    whole = template.render([*ask, said], tools=TOOLS, add_generation_prompt=False)
    assert whole.startswith(prompt), (prompt[-80:], whole[-200:])
    return whole[len(prompt) :]


def read_back(name: str, turn: str) -> tuple[str, str, list[list[str]]]:
    """Through the vocabulary, as the server reads it."""
    tokenizer = real(name)
    style = ChatStyle.of(ChatTemplate.from_tokenizer(tokenizer), tokenizer)
    ids = tokenizer.encode(turn, add_special_tokens=False, parse_special=True)
    ends = [at for at, token in enumerate(ids) if token in tokenizer.eos_token_ids]
    ids = ids[: ends[0]] if ends else ids
    detokenizer = IncrementalDetokenizer(tokenizer, keep=style.markers)
    text = "".join([*(detokenizer.push([token]) for token in ids), detokenizer.finish()])
    return message(parse(text, style.tools, reasoning=style.reasoning, schemas=SCHEMAS, cuts=range(0, len(text), 3)))


@pytest.mark.parametrize("name", NAMES)
def test_a_call_is_read_as_it_was_made(name):
    for arguments in ARGUMENTS:
        calls = [("get_weather", arguments), ("now", {})][: 1 if name in ONE_CALL else 2]
        turn = turn_of(name, calls)
        reasoning, content, found = read_back(name, turn)
        assert [(call, json.loads(text)) for call, text in found] == calls, turn
        assert (reasoning.strip(), content.strip()) == ("", ""), turn


def test_each_template_shows_a_format_of_its_own():
    found = {name: ChatStyle.of(ChatTemplate.from_tokenizer(real(name)), real(name)).tools.name for name in NAMES}
    assert sorted(set(found.values())) == ["deepseek_v3", "hermes", "llama3_json", "mistral"]
