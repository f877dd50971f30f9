"""What models write when they do not keep to their format: texts from public bug reports of many servers.

`parsers.jsonl` has one a line: the parser, what the model wrote, the tool's schema, and what is right.
"""

import json
from pathlib import Path

import pytest

from serving.text.tools import ToolCallEnd, tool_family
from tests.serving.text.test_tools import message, parse

LINES = [json.loads(line) for line in (Path(__file__).parent / "parsers.jsonl").read_text("utf-8").splitlines()]


def read(parser, text, parameters):
    """(reasoning, content, arguments of the calls), the same however the text is cut."""
    schemas = {"f": parameters}
    family = tool_family(parser)
    whole = parse(text, family, schemas=schemas)
    assert parse(text, family, schemas=schemas, cuts=range(len(text))) == whole
    reasoning, content, calls = message(whole)
    return reasoning, content, [json.loads(arguments) for _, arguments in calls]


@pytest.mark.parametrize("line", LINES, ids=[f"{i}-{line['parser']}" for i, line in enumerate(LINES)])
def test_the_line_is_read_right(line):
    reasoning, content, calls = read(line["parser"], line["text"], line["parameters"])
    right = line["right"]
    if isinstance(right, dict):
        assert (reasoning, content, calls) == ("", "", [right])
    elif line["parser"] == "gpt_oss":
        assert (reasoning, content, calls) == ("We need 2+2.", "4", [])
    else:  # whole valid JSON and nothing as content, or the reverse
        assert (content == "") == (len(calls) == 1)
        assert calls or content == line["text"]


STRING_OR_NULL = {"anyOf": [{"type": "string"}, {"type": "null"}]}
VALUES = [
    ({"type": "string"}, "null", "null"),
    (STRING_OR_NULL, "null", None),
    (STRING_OR_NULL, "None", None),
    (STRING_OR_NULL, "[1]", "[1]"),
    ({"type": "string", "nullable": True}, "12", "12"),
    ({"type": ["integer", "string"]}, "12", 12),
    ({"type": ["integer", "string"]}, "12a", "12a"),
    ({"allOf": [{"type": "string"}, {"minLength": 1}]}, "1", "1"),
    ({"oneOf": [{"type": "boolean"}, {"type": "string"}]}, "TRUE", True),
    ({"$ref": "#/$defs/Loop"}, "5", 5),
    ({"$ref": "#/$defs/Text"}, "5", "5"),
    ({"$ref": "#/nowhere"}, "5", 5),
    ({"anyOf": [{"$ref": "#/$defs/Text"}, {"type": "integer"}]}, "007", 7),
    ({"enum": ["1", 2, None, True]}, "1", "1"),
    ({"enum": ["1", 2, None, True]}, "2", 2),
    ({"enum": ["1", 2, None, True]}, "None", None),
    ({"enum": ["1", 2, None, True]}, "True", True),
    ({"enum": [1, 2]}, "1", 1),
    ({"const": 1.0}, "1", 1.0),
    ({"type": "number"}, "1e3", 1000.0),
    ({"type": "number"}, "5", 5),
    ({"type": "number"}, ".5", 0.5),
    ({"type": "number"}, "NaN", "NaN"),
    ({"type": "number"}, "1e999", "1e999"),
    ({"type": "integer"}, "3.0", 3),
    ({"type": "integer"}, " +3 ", 3),
    ({"type": "integer"}, "three", "three"),
    ({"type": "array"}, "('a', 1.5, None)", ["a", 1.5, None]),
    ({"type": "object"}, "{'a': {'b': False}}", {"a": {"b": False}}),
    ({"type": "object"}, "{'a': __import__('os')}", "{'a': __import__('os')}"),
    ({"type": "array"}, "[" * 5000, "[" * 5000),
    ({"type": "array"}, "[" * 60 + "1" + "]" * 60, None),
    ({"properties": {"a": {}}}, '{"a": "1"}', {"a": "1"}),
    ({"items": {}}, "[1, 'x']", [1, "x"]),
    ({}, "12", 12),
    ({}, "True", "True"),
    (True, "12", 12),
    ({"type": "string", "enum": ["a"]}, "12", "12"),
]


@pytest.mark.parametrize("parser", ["qwen3_coder", "glm", "minimax_m2", "seed_oss", "deepseek_v32"])
@pytest.mark.parametrize(("schema", "text", "right"), VALUES)
def test_values_are_typed_by_the_schema_the_same_in_all_families(parser, schema, text, right):
    parameters = {
        "type": "object",
        "properties": {"z": schema},
        "$defs": {"Text": {"type": "string"}, "Loop": {"$ref": "#/$defs/Loop"}},
    }
    written = {
        "qwen3_coder": f"<tool_call>\n<function=f>\n<parameter=z>\n{text}\n</parameter>\n</function>\n</tool_call>",
        "glm": f"<tool_call>f\n<arg_key>z</arg_key>\n<arg_value>{text}</arg_value>\n</tool_call>",
        "minimax_m2": f'<minimax:tool_call>\n<invoke name="f">\n<parameter name="z">{text}</parameter>\n</invoke>\n'
        "</minimax:tool_call>",
        "seed_oss": f"<seed:tool_call><function=f><parameter=z>{text}</parameter></function></seed:tool_call>",
        "deepseek_v32": f'<｜DSML｜function_calls>\n<｜DSML｜invoke name="f">\n<｜DSML｜parameter name="z" string="false">{text}'
        "</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜function_calls>",
    }[parser]
    if right is None and text.startswith("[["):
        right = json.loads(text)
    _, content, calls = read(parser, written, parameters)
    assert content == ""
    assert calls == [{"z": right}]
    assert type(calls[0]["z"]) is type(right)


def test_a_value_marked_as_text_is_text_whatever_the_schema_says():
    text = '<｜DSML｜function_calls><｜DSML｜invoke name="f"><｜DSML｜parameter name="z" string="true">5</｜DSML｜parameter>'
    text += "</｜DSML｜invoke></｜DSML｜function_calls>"
    assert read("deepseek_v32", text, {"properties": {"z": {}}})[2] == [{"z": "5"}]


def test_unquoted_values_in_braces_follow_the_schema():
    parameters = {
        "properties": {
            "zip": {"type": "string"},
            "n": {"type": "integer"},
            "deep": {"type": "object", "properties": {"code": {"type": "string"}}},
            "list": {"type": "array", "items": {"type": "string"}},
        }
    }
    text = '<|tool_call>call:f{zip:12345,n:7,deep:{code:1},list:[1,<|"|>2<|"|>],other:True}<tool_call|>'
    right = {"zip": "12345", "n": 7, "deep": {"code": "1"}, "list": ["1", "2"], "other": "True"}
    assert read("gemma4", text, parameters)[2] == [right]


AB = {"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "string"}}}
HEAD = "<tool_call>\n<function=f>\n"


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (f"{HEAD}<parameter=a>\nx\n</function>\n</tool_call>", {"a": "x"}),
        (f"{HEAD}<parameter=a>\nx\n</tool_call>", {"a": "x"}),
        (f"{HEAD}<parameter=a>\nx\n</function>", {"a": "x"}),
        (f"{HEAD}<parameter=a>\nx\n</parameter>\n</parameter>\n</function>\n</tool_call>", {"a": "x"}),
        (f"{HEAD}</tool_call>", {}),
        ("<function=f>\n<parameter=a>\nx\n</parameter>\n</function>\n</tool_call>", {"a": "x"}),
        # What looks like a tag inside a value is the value's.
        (
            f"{HEAD}<parameter=a>\nif a <parameter=b> c\n</parameter>\n</function>\n</tool_call>",
            {"a": "if a <parameter=b> c"},
        ),
        (f"{HEAD}<parameter=a>\n<parameter=q>\n</parameter>\n</function>\n</tool_call>", {"a": "<parameter=q>"}),
        (f"{HEAD}<parameter=a>\n</function>\nx\n</parameter>\n</function>\n</tool_call>", {"a": "</function>\nx"}),
        (f"{HEAD}<parameter=a>\n\n  two\n\n</parameter>\n</function>\n</tool_call>", {"a": "\n  two\n"}),
    ],
)
def test_closing_tags_that_were_left_out(text, right):
    assert read("qwen3_coder", text, AB) == ("", "", [right])


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (
            "<tool_call>f<arg_key>a</arg_key><arg_value>x\n<arg_key>b</arg_key><arg_value>y</arg_value></tool_call>",
            ["x", "y"],
        ),
        (
            "<tool_call>f<arg_key>a</arg_key><arg_value>x</arg_value><arg_key>b</arg_key><arg_value>y\n</tool_call>",
            ["x", "y"],
        ),
    ],
)
def test_closing_tags_that_glm_left_out(text, right):
    _, content, calls = read("glm", text, AB)
    assert content == ""
    assert list(calls[0].values()) == right


@pytest.mark.parametrize(
    ("arguments", "right"),
    [
        ("{'a': 'it\\'s', 'b': True}", {"a": "it's", "b": True}),
        ('{"a": None, "b": [1, 2,], }', {"a": None, "b": [1, 2]}),
        ('{"a": -Infinity, b: +1, "c": .5, "d": 007}', {"a": None, "b": 1, "c": 0.5, "d": 7}),
        ('{"a": "C:\\dir \\d+"}', {"a": "C:\\dir \\d+"}),
        ('{"a": "\\u12"}', {"a": "\\u12"}),
        ('{"a": 1 "b": 2}', {"a": 1, "b": 2}),
        ('{"a": [1, {"b": 2]}', {"a": [1, {"b": 2}]}),
        ('{"a": , "b":}', None),
        ('{"a": "say "hi""}', None),
        ("{" * 3 + "x", None),
        ('{"a": ' + "[" * 2000, None),
        ('{"a": 1, // why\n "b": 2}', None),
    ],
)
@pytest.mark.parametrize("parser", ["hermes", "mistral_named", "deepseek_v31", "kimi_k2", "llama3_json", "gpt_oss"])
def test_arguments_that_are_nearly_json_are_mended_or_end_whole(parser, arguments, right):
    before, behind = {
        "hermes": ('<tool_call>\n{"name": "f", "arguments": ', "}\n</tool_call>"),
        "mistral_named": ("[TOOL_CALLS]f[ARGS]", ""),
        "deepseek_v31": (
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>",
            "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        ),
        "kimi_k2": ("<|tool_call_begin|>functions.f:3<|tool_call_argument_begin|>", "<|tool_call_end|>"),
        "llama3_json": ('{"name": "f", "parameters": ', "}"),
        "gpt_oss": ("<|channel|>commentary to=functions.f <|constrain|>json<|message|>", "<|call|>"),
    }[parser]
    family, schemas = tool_family(parser), {"f": {}}
    text = before + arguments + behind
    events = parse(text, family, schemas=schemas)
    assert parse(text, family, schemas=schemas, cuts=range(len(text))) == events
    _, content, calls = message(events)
    if right is not None:
        assert content == ""
        assert [json.loads(found) for _, found in calls] == [right]
        assert events[-1] == ToolCallEnd(0, True)
    elif calls:  # what was read of it, as a whole object, and no half of it as content
        assert content == ""
        assert isinstance(json.loads(calls[0][1]), dict)
    else:
        assert content == text


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>\n{"name": "f", "arguments": {"a": "x"}\n</tool_call>',
        '<tool_call>\n{"name": "f", "arguments": {"a": "x"}}}\n</tool_call>',
        '<tool_call>\n{"name": "f", "arguments": {"a": "x"}, "thought": "so"}\n</tool_call>',
        '<tool_call>\n{"name": "f", "arguments": "{\'a\': \'x\'}"}\n</tool_call>',
        "<tool_call>\n{'name': 'f', 'arguments': {'a': 'x'}}\n</tool_call>",
    ],
)
def test_brackets_and_keys_around_arguments(text):
    assert read("hermes", text, AB) == ("", "", [{"a": "x"}])


@pytest.mark.parametrize(
    ("parser", "text"),
    [
        ("hermes", "I will use <tool_call> tags"),
        ("hermes", 'So:\n\n<tool_call>\n{"name": "nobody", "arguments": {}}\n</tool_call>'),
        ("minimax_m2", "A run: <minimax:tool_call>\n<invoke name=f>\n</invoke>\n</minimax:tool_call>"),
        (
            "deepseek_v31",
            "<｜tool▁calls▁begin｜>\n<｜tool▁call▁begin｜>nobody<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        ),
        ("kimi_k2", "See <|tool_calls_section_begin|> none"),
        ("kimi_k2", "See <|tool_calls_section_begin|>"),
        ("olmo3", "<function_calls>\nnone of them\n</function_calls>"),
    ],
)
def test_what_is_no_call_is_content_to_the_letter(parser, text):
    """With the blanks before it and the mark of a run of calls."""
    assert read(parser, text, AB) == ("", text, [])


@pytest.mark.parametrize(
    ("parser", "text", "calls"),
    [
        ("olmo3", '<function_calls>\nf(a="x")\nf(b="y")\n</function_calls>', [{"a": "x"}, {"b": "y"}]),
        ("gemma3", '```tool_code\nf(a="x")\nf(b="y")\n```', [{"a": "x"}, {"b": "y"}]),
        ("gemma3", '```tool_code\nprint(f(a="x"))\n```', [{"a": "x"}]),
        (
            "deepseek_v3",  # without the fence around its arguments
            '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n{"a":"x"}<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
            [{"a": "x"}],
        ),
    ],
)
def test_calls_that_are_written_a_little_differently(parser, text, calls):
    assert read(parser, text, AB) == ("", "", calls)


def test_one_name_for_all_that_mistrals_models_write():
    """As vLLM's users give it, whatever the model: the template says which form is meant."""
    assert tool_family("mistral").name == "mistral"
    assert tool_family("mistral", "{{ '[TOOL_CALLS]' }}").name == "mistral"
    assert tool_family("mistral", "{{ '[TOOL_CALLS]' }}f{{ '[ARGS]' }}").name == "mistral_named"
    assert tool_family("hermes", "{{ '[TOOL_CALLS]' }}f{{ '[ARGS]' }}").name == "hermes"


def test_a_second_call_cut_off_before_its_name_is_not_shown():
    text = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>\n<tool_call>\n{"name'
    assert read("hermes", text, AB) == ("", "", [{}])
    text = '{"name": "f", "parameters": {}}; {"name'
    assert read("llama3_json", text, AB) == ("", "", [{}])


def test_ids_that_models_write_are_the_calls_ids():
    from serving.text.tools import ReplyParser, ToolCallStart

    for parser, text, call_id in (
        ("kimi_k2", "<|tool_call_begin|>functions.f:3<|tool_call_argument_begin|>{}<|tool_call_end|>", "functions.f:3"),
        ("mistral_named", "[TOOL_CALLS]f[CALL_ID]a1B2c3D4e[ARGS]{}", "a1B2c3D4e"),
    ):
        events = ReplyParser(tool_family(parser), schemas={"f": {}}).push(text)
        assert events[0] == ToolCallStart(0, "f", call_id)


def test_a_long_value_is_read_in_time_that_grows_with_its_length():
    body = "<b>" * 100_000
    _, _, calls = read("qwen3_coder", f"{HEAD}<parameter=a>\n{body}\n</parameter>\n</function>\n</tool_call>", AB)
    assert calls == [{"a": body}]
