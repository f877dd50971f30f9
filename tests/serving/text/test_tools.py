"""Tool calls and reasoning: read the same however the text is cut, and enforced where that is asked for."""

import itertools
import json
import random

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.errors import RequestError
from serving.text.detokenizer import IncrementalDetokenizer
from serving.text.grammar import GrammarCompiler
from serving.text.tools import (
    ContentDelta,
    ReasoningDelta,
    ReplyParser,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
    detect_reasoning,
    detect_tools,
    kept_token_ids,
    plan_tools,
    reasoning_family,
    tool_family,
)
from serving.text.tools.events import merge
from serving.text.tools.families import TOOL_FAMILIES
from serving.text.tools.json_scan import JSONScanner, MalformedJSONError
from tests.serving.text.schemas import schemas
from tests.serving.text.vocabularies import byte_level, real, sentencepiece
from tests.serving.text.walks import walk

SCHEMAS = {
    "get_weather": {"type": "object", "properties": {"city": {"type": "string"}, "n": {"type": "integer"}}},
    "now": {"type": "object", "properties": {}},
}
CALL = ("get_weather", {"city": "Köln", "n": 3})
# For each family: a reply with two calls, (get_weather city=Köln n=3) and (now), and what is said before them.
REPLIES = {
    "hermes": (
        'Let me see.\n\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln", "n": 3}}\n</tool_call>\n'
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    ),
    "qwen3_coder": (
        "Let me see.\n<tool_call>\n<function=get_weather>\n<parameter=city>\nKöln\n</parameter>\n<parameter=n>\n3\n"
        "</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=now>\n</function>\n</tool_call>"
    ),
    "seed_oss": (
        "Let me see.<seed:tool_call>\n<function=get_weather>\n<parameter=city>Köln</parameter>\n<parameter=n>3"
        "</parameter>\n</function>\n</seed:tool_call><seed:tool_call>\n<function=now>\n</function>\n</seed:tool_call>"
    ),
    "minimax_m2": (
        'Let me see.\n<minimax:tool_call>\n<invoke name="get_weather">\n<parameter name="city">Köln</parameter>'
        '<parameter name="n">3</parameter></invoke>\n<invoke name="now">\n</invoke>\n</minimax:tool_call>'
    ),
    "deepseek_v32": (
        'Let me see.\n\n<｜DSML｜function_calls>\n<｜DSML｜invoke name="get_weather">\n<｜DSML｜parameter name="city" '
        'string="true">Köln</｜DSML｜parameter>\n<｜DSML｜parameter name="n" string="false">3</｜DSML｜parameter>\n'
        '</｜DSML｜invoke>\n<｜DSML｜invoke name="now">\n</｜DSML｜invoke>\n</｜DSML｜function_calls>'
    ),
    "gpt_oss": (
        "<|channel|>commentary<|message|>Let me see.<|end|><|start|>assistant<|channel|>commentary "
        'to=functions.get_weather <|constrain|>json<|message|>{"city": "Köln", "n": 3}<|call|><|start|>assistant '
        "to=functions.now<|channel|>commentary json<|message|>{}<|call|>"
    ),
    "lfm2": 'Let me see.<|tool_call_start|>[get_weather(city="Köln", n=3), now()]<|tool_call_end|>',
    "olmo3": (
        'Let me see.<function_calls>\nget_weather(city="Köln", n=3)\n</function_calls>\n'
        "<function_calls>\nnow()\n</function_calls>"
    ),
    "glm": (
        "Let me see.<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Köln</arg_value>\n<arg_key>n</arg_key>\n"
        "<arg_value>3</arg_value>\n</tool_call>\n<tool_call>now\n</tool_call>"
    ),
    "mistral": (
        'Let me see.[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Köln", "n": 3}}, '
        '{"name": "now", "arguments": {}, "id": "123456789"}]'
    ),
    "mistral_named": 'Let me see.[TOOL_CALLS]get_weather[ARGS]{"city": "Köln", "n": 3}[TOOL_CALLS]now[ARGS]{}',
    "deepseek_v3": (
        "Let me see.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
        '{"city": "Köln", "n": 3}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{}\n'
        "```<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
    ),
    "deepseek_v31": (
        'Let me see.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": "Köln", "n": 3}'
        "<｜tool▁call▁end｜><｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
    ),
    "kimi_k2": (
        "Let me see.<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
        '{"city": "Köln", "n": 3}<|tool_call_end|><|tool_call_begin|>functions.now:1<|tool_call_argument_begin|>{}'
        "<|tool_call_end|><|tool_calls_section_end|>"
    ),
    "functiongemma": (
        "Let me see.<start_function_call>call:get_weather{city:<escape>Köln<escape>,n:3}<end_function_call>"
        "<start_function_call>call:now{}<end_function_call>"
    ),
    "gemma4": (
        'Let me see.<|tool_call>call:get_weather{city:<|"|>Köln<|"|>,n:3}<tool_call|><|tool_call>call:now{}<tool_call|>'
    ),
    "gemma3": "Let me see.\n```tool_code\n[get_weather(city='Köln', n=3), now()]\n```",
    "phi4_mini": (
        'Let me see. functools[{"name": "get_weather", "arguments": {"city": "Köln", "n": 3}}, '
        '{"name": "now", "arguments": {}}]'
    ),
    "granite": (
        'Let me see.<|tool_call|>[{"arguments": {"city": "Köln", "n": 3}, "name": "get_weather"}, '
        '{"name": "now", "arguments": {}}]'
    ),
    "jamba": (
        'Let me see.<tool_calls>[{"name": "get_weather", "arguments": {"city": "Köln", "n": 3}}, '
        '{"name": "now", "arguments": {}}]</tool_calls>'
    ),
    "internlm": (
        'Let me see.<|action_start|><|plugin|>{"name": "get_weather", "parameters": {"city": "Köln", "n": 3}}'
        '<|action_end|>\n<|action_start|><|plugin|>{"name": "now", "parameters": {}}<|action_end|>'
    ),
    "pythonic": "[get_weather(city='Köln', n=3), now()]",
    "llama3_json": '{"name": "get_weather", "parameters": {"city": "Köln", "n": 3}}; {"name": "now", "parameters": {}}',
    "json": '{"name": "get_weather", "arguments": {"city": "Köln", "n": 3}}\n{"name": "now", "arguments": {}}',
}
TEMPLATES = {
    "hermes": "...<tool_call>\\n{'name': ...}\\n</tool_call>...",
    "qwen3_coder": "<tool_call>\n<function=example>\n<parameter=p>",
    "glm": "<tool_call>{name}<arg_key>{k}</arg_key><arg_value>{v}</arg_value></tool_call>",
    "seed_oss": "<seed:tool_call>\n<function=example>\n<parameter=p>",
    "minimax_m2": "<minimax:tool_call> ... '<invoke name=\"' + name",
    "deepseek_v32": "<｜DSML｜function_calls>",
    "gpt_oss": "<|start|>assistant<|channel|>analysis<|message|>",
    "lfm2": "<|tool_call_start|>[",
    "mistral": "[AVAILABLE_TOOLS][ ... [TOOL_CALLS][",
    "mistral_named": "[AVAILABLE_TOOLS] ... [TOOL_CALLS]' + name + '[ARGS]'",
    "deepseek_v3": "<｜tool▁calls▁begin｜> ```json",
    "deepseek_v31": "<｜tool▁calls▁begin｜>",
    "kimi_k2": "<|tool_calls_section_begin|>",
    "functiongemma": "<start_function_call>call:",
    "gemma4": "<|tool_call>call: ... <tool_call|>",
    "llama3_json": '<|start_header_id|> {"name": function name, "parameters": ...}',
}


def parse(text, family, *, cuts=(), reasoning=None, schemas=SCHEMAS, in_reasoning=False):
    ids = iter(range(100))
    parser = ReplyParser(family, reasoning, schemas=schemas, in_reasoning=in_reasoning, new_id=lambda: f"id{next(ids)}")
    edges = [0, *sorted({min(cut, len(text)) for cut in cuts}), len(text)]
    events = [e for a, b in itertools.pairwise(edges) for e in parser.push(text[a:b])]
    return merge(events + parser.finish())


def message(events):
    """(reasoning, content, calls) that a client puts together."""
    reasoning = "".join(e.text for e in events if isinstance(e, ReasoningDelta))
    content = "".join(e.text for e in events if isinstance(e, ContentDelta))
    calls = []
    for event in events:
        if isinstance(event, ToolCallStart):
            assert event.index == len(calls)
            calls.append([event.name, ""])
        elif isinstance(event, ToolCallArguments):
            assert event.index == len(calls) - 1
            calls[-1][1] += event.text
    return reasoning, content, calls


def test_every_family_has_a_reply_here():
    assert set(REPLIES) == {family.name for family in TOOL_FAMILIES}


@pytest.mark.parametrize("name", REPLIES)
def test_calls_are_found(name):
    events = parse(REPLIES[name], tool_family(name))
    _, content, calls = message(events)
    assert content == ("" if REPLIES[name][0] in "[{" else "Let me see.")
    assert [(call, json.loads(arguments)) for call, arguments in calls] == [CALL, ("now", {})]
    assert [e for e in events if isinstance(e, ToolCallEnd)] == [ToolCallEnd(0, True), ToolCallEnd(1, True)]


@pytest.mark.parametrize("name", REPLIES)
@given(cuts=st.lists(st.integers(0, 400), max_size=12))
@settings(deadline=None, max_examples=40)
def test_any_split_reads_the_same(name, cuts):
    text = REPLIES[name]
    assert parse(text, tool_family(name), cuts=cuts) == parse(text, tool_family(name))


@pytest.mark.parametrize("name", REPLIES)
def test_character_by_character_and_cut_off_anywhere(name):
    text, family = REPLIES[name], tool_family(name)
    for end in range(len(text) + 1):
        assert parse(text[:end], family, cuts=range(end)) == parse(text[:end], family)


pieces = st.lists(
    st.one_of(
        st.sampled_from(sorted({marker for family in TOOL_FAMILIES for marker in family.markers})),
        st.sampled_from(
            ['{"name": "now", "arguments": {}}', '{"name": "now"', ', "arguments": {"a": [1.5, "x', '"}', "]"]
        ),
        st.sampled_from(
            ["now", "now()", "[now()", "call:now{}", "{", "}", "[", "(", "'", '"', "\\", "\n", " ", ",", ";"]
        ),
        st.sampled_from(["<think>", "</think>", "text ", "é", "😀", "-1e", "tru", "null"]),
        st.text(max_size=4),
    ),
    max_size=14,
).map("".join)


@given(pieces, st.sampled_from(TOOL_FAMILIES), st.lists(st.integers(0, 120), max_size=8), st.booleans(), st.booleans())
@settings(deadline=None, max_examples=600)
def test_noise_never_raises_and_any_split_reads_the_same(text, family, cuts, thinks, open_):
    reasoning = reasoning_family("think") if thinks else None
    how = {"reasoning": reasoning, "in_reasoning": thinks and open_}
    whole = parse(text, family, **how)
    assert parse(text, family, cuts=cuts, **how) == whole
    assert parse(text, family, cuts=range(len(text)), **how) == whole
    for name, arguments in zip(*_complete_calls(whole), strict=True):
        assert name in SCHEMAS
        assert isinstance(json.loads(arguments), dict)


def _complete_calls(events):
    _, _, calls = message(events)
    complete = [e.index for e in events if isinstance(e, ToolCallEnd) and e.complete]
    return [calls[i][0] for i in complete], [calls[i][1] for i in complete]


@given(st.text(max_size=60), st.lists(st.integers(0, 60), max_size=5))
@settings(deadline=None)
def test_without_tools_and_reasoning_the_text_is_the_content(text, cuts):
    assert message(parse(text, None, cuts=cuts)) == ("", text, [])


@pytest.mark.parametrize(
    ("name", "text", "content"),
    [
        ("hermes", "a < b and <tool_c", "a < b and <tool_c"),
        ("hermes", '<tool_call>\n{"name": "unknown", "arguments": {}}\n</tool_call>', None),
        ("hermes", "<tool_call>not JSON</tool_call>", None),
        ("hermes", '<tool_call>{"name": 7, "arguments": {}}', None),
        ("hermes", '<tool_call>{"name": "now", "arguments": [1]}', None),
        ("llama3_json", '{"answer": 42, "name": "now"}', None),
        ("llama3_json", '{"name": "Ada", "parameters": {}}', None),
        ("pythonic", "[1] is a footnote, [2, 3] are two", None),
        ("pythonic", "[now(**{}), x]", None),
        ("pythonic", "[now(__import__('os').system('x'))]", None),
        ("mistral_named", "[TOOL_CALLS]unknown[ARGS]{}", None),
        ("functiongemma", "<start_function_call>call:now{a:}<end_function_call>", None),
        ("glm", "<tool_call>unknown\n</tool_call>", None),
    ],
)
def test_what_is_no_call_is_content(name, text, content):
    events = parse(text, tool_family(name))
    assert message(events) == ("", content or text, [])


def test_arguments_stream_while_they_come():
    parser = ReplyParser(tool_family("hermes"), schemas=SCHEMAS)
    assert parser.push('<tool_call>{"name": "get_weather", "arguments": ') == []
    start, first = parser.push('{"city": "Kö')
    assert isinstance(start, ToolCallStart)
    assert first == ToolCallArguments(0, '{"city": "Kö')
    assert parser.push('ln"') == [ToolCallArguments(0, 'ln"')]
    assert parser.push("}}") == [ToolCallArguments(0, "}"), ToolCallEnd(0, True)]
    assert parser.num_calls == 1


def test_a_call_that_goes_wrong_inside_ends_as_whole_json_and_the_rest_of_it_is_no_content():
    events = parse('<tool_call>{"name": "now", "arguments": {"a": 1 oops}}\n</tool_call> Done.', tool_family("hermes"))
    assert ToolCallEnd(0, False) in events
    assert message(events) == ("", "Done.", [["now", '{"a": 1 }']])


def test_control_characters_in_arguments_become_escapes():
    _, _, calls = message(
        parse('<tool_call>{"name": "get_weather", "arguments": {"city": "a\n\tb\x01"}}', tool_family("hermes"))
    )
    assert json.loads(calls[0][1]) == {"city": "a\n\tb\x01"}


def test_text_values_of_tagged_arguments_follow_the_schema():
    schemas = {"f": {"properties": {"s": {"type": "string"}, "n": {"type": "number"}, "o": {}}}}
    text = "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in (("s", "12"), ("n", "12"), ("o", '{"a": 1}')))
    text += "<parameter=x>\nNaN\n</parameter>\n"
    events = parse(f"<tool_call><function=f>{text}</function></tool_call>", tool_family("qwen3_coder"), schemas=schemas)
    assert json.loads(message(events)[2][0][1]) == {"s": "12", "n": 12, "o": {"a": 1}, "x": "NaN"}


@pytest.mark.parametrize(
    ("text", "in_reasoning", "expected"),
    [
        ("<think>\nhm\n</think>\n\nHi ", False, ("hm", "Hi ")),
        ("hm, so\n</think>\n\nHi", True, ("hm, so", "Hi")),
        ("Hi <think>not</think>", False, ("", "Hi <think>not</think>")),
        ("\n <think>a", False, ("a", "")),
        ("<thin", False, ("", "<thin")),
        ("<think></think>\n\n", False, ("", "")),
        ("never closed </thin", True, ("never closed </thin", "")),
    ],
)
def test_reasoning(text, in_reasoning, expected):
    for family in (None, tool_family("hermes")):
        for cuts in ((), range(len(text))):
            events = parse(text, family, reasoning=reasoning_family("think"), in_reasoning=in_reasoning, cuts=cuts)
            assert message(events)[:2] == expected


def test_calls_inside_the_thinking_are_thoughts():
    text = f"<think>{REPLIES['hermes']}</think>{REPLIES['hermes']}"
    reasoning, content, calls = message(parse(text, tool_family("hermes"), reasoning=reasoning_family("think")))
    assert reasoning == REPLIES["hermes"]
    assert content == "Let me see."
    assert len(calls) == 2


def test_prompts_that_open_the_thinking():
    family = reasoning_family("deepseek_r1")
    assert family.opened_by("<|im_start|>assistant\n<think>\n")
    assert not family.opened_by("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert not family.opened_by("<|im_start|>assistant\n")


@pytest.mark.parametrize("name", TEMPLATES)
def test_families_are_detected_by_the_template(name):
    found = detect_tools(TEMPLATES[name])
    assert found is not None
    assert found.name == name


def test_detection_on_templates_without_tools_and_on_real_ones():
    assert detect_tools("{{ messages }}") is None
    assert detect_reasoning("{{ messages }}") is None
    for name, tools, thinks in (
        ("qwen3", "hermes", True),
        ("qwen2_5", "hermes", False),
        ("llama3_2", "llama3_json", False),
        ("mistral_nemo", "mistral", False),
        ("deepseek_v3", "deepseek_v3", False),
    ):
        template = real(name).chat_templates["default"]
        found = detect_tools(template)
        assert found is not None
        assert found.name == tools
        assert (detect_reasoning(template) is not None) == thinks


def test_names_of_other_servers_parsers_are_known():
    for name in ("hermes", "llama3_json", "mistral", "pythonic", "deepseek_v3", "qwen3_xml", "kimi_k2", "glm45"):
        assert tool_family(name).payload
    assert reasoning_family("qwen3").open == "<think>"
    with pytest.raises(ValueError, match="hermes"):
        tool_family("martian")


# -- tool_choice ------------------------------------------------------------------------------------------------------


def tool(name, schema=None, **more):
    return {"type": "function", "function": {"name": name, "parameters": schema or {"type": "object"}, **more}}


OBJECTS = [s for s in schemas(60) if s.get("type") == "object" and "$ref" not in str(s)][:24]


@pytest.fixture(scope="module")
def compiler():
    return GrammarCompiler(byte_level(), 1024)


@pytest.mark.parametrize("name", [family.name for family in TOOL_FAMILIES])
def test_required_calls_are_valid_in_every_family(compiler, name):
    rng = random.Random(name)
    tokenizer = byte_level()
    offered = {f"tool_{i}": schema for i, schema in enumerate(rng.sample(OBJECTS, 4))}
    plan = plan_tools([tool(n, s) for n, s in offered.items()], "required", tool_family(name), tokenizer)
    finished = 0
    for seed in range(4):
        ids = walk(compiler.compile_tools(plan.grammar)(), tokenizer, random.Random(seed), free_tokens=60)
        if ids is None:
            continue
        finished += 1
        text = tokenizer.decode(ids, skip_special_tokens=False)
        events = parse(text, plan.family, schemas=plan.schemas)
        _, content, calls = message(events)
        assert content == ""
        assert 1 <= len(calls) <= 16
        for called, arguments in calls:
            jsonschema.validate(json.loads(arguments), offered[called])
    assert finished >= 2


def test_markers_that_are_tokens_in_a_real_vocabulary():
    tokenizer = real("qwen3")
    compiler = GrammarCompiler(tokenizer, 151_936)
    tools = [tool("first", OBJECTS[3]), tool("second", OBJECTS[4])]
    think = reasoning_family("think")
    plan = plan_tools(tools, "required", tool_family("hermes"), tokenizer, reasoning=think, parallel=False)
    offered = {"first": OBJECTS[3], "second": OBJECTS[4]}
    for seed in range(4):
        constraint = compiler.compile_tools(plan.grammar)()
        ids = []
        if seed % 2:
            ids = tokenizer.encode("<think>\nhm </b>\n</think>\n\n", parse_special=True)
            assert all(constraint.accept(token) for token in ids)
        rest = walk(constraint, tokenizer, random.Random(seed), free_tokens=20)
        assert rest is not None
        text = IncrementalDetokenizer(tokenizer).push([*ids, *rest])
        thoughts, content, calls = message(parse(text, plan.family, schemas=plan.schemas, reasoning=think))
        assert ("hm </b>" in thoughts) == bool(seed % 2)
        assert content == ""
        assert len(calls) == 1
        for called, arguments in calls:
            jsonschema.validate(json.loads(arguments), offered[called])


def test_a_named_function_is_called_once(compiler):
    tokenizer = byte_level()
    tools = [tool("a", OBJECTS[1]), tool("b", OBJECTS[2]), tool("c")]
    for choice in ({"type": "function", "function": {"name": "b"}}, {"type": "function", "name": "b"}):
        for family in ("hermes", "llama3_json", "mistral", None):
            plan = plan_tools(tools, choice, family and tool_family(family), tokenizer)
            ids = walk(compiler.compile_tools(plan.grammar)(), tokenizer, random.Random(1))
            _, content, calls = message(
                parse(tokenizer.decode(ids, skip_special_tokens=False), plan.family, schemas=plan.schemas)
            )
            assert content == ""
            assert [call for call, _ in calls] == ["b"]
            jsonschema.validate(json.loads(calls[0][1]), OBJECTS[2])


def test_thinking_may_come_before_a_required_call(compiler):
    tokenizer = byte_level()
    think, end = tokenizer.token_to_id("<think>"), tokenizer.token_to_id("</think>")
    reasoning = reasoning_family("think")
    plan = plan_tools([tool("now")], "required", tool_family("hermes"), tokenizer, reasoning=reasoning)
    constraint = compiler.compile_tools(plan.grammar)()
    assert constraint.accept(think)
    for token in (*tokenizer.encode("hm <b>"), end, *tokenizer.encode("\n\n")):
        assert constraint.accept(token)
    ids = walk(constraint, tokenizer, random.Random(0))
    assert ids[0] == tokenizer.token_to_id("<tool_call>")
    open_plan = plan_tools(
        [tool("now")], "required", tool_family("hermes"), tokenizer, reasoning=reasoning, in_reasoning=True
    )
    constraint = compiler.compile_tools(open_plan.grammar)()
    assert not constraint.accept(think)
    assert constraint.accept(tokenizer.encode("hm")[0])
    assert constraint.accept(end)
    assert constraint.accept(tokenizer.token_to_id("<tool_call>"))


def test_parallel_calls_can_be_forbidden(compiler):
    tokenizer = byte_level()
    end = tokenizer.token_to_id("</tool_call>")
    for parallel, more in ((True, True), (False, False)):
        plan = plan_tools([tool("now")], "required", tool_family("hermes"), tokenizer, parallel=parallel)
        constraint = compiler.compile_tools(plan.grammar)()
        text = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
        for token in tokenizer.encode(text):
            assert constraint.accept(token)
        assert token == end
        assert constraint.accept(tokenizer.token_to_id("Ċ")) == more


def test_strict_tools_are_enforced_once_a_call_begins(compiler):
    tokenizer = byte_level()
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    plan = plan_tools([tool("f", schema, strict=True)], "auto", tool_family("hermes"), tokenizer)
    constraint = compiler.compile_tools(plan.grammar)()
    for token in (*tokenizer.encode("Well, "), tokenizer.token_to_id("<tool_call>")):
        assert constraint.accept(token)
    for token in tokenizer.encode('\n{"name": "f", "arguments": {"a": '):
        assert constraint.accept(token)
    assert not constraint.accept(tokenizer.token_to_id('"'))
    assert constraint.accept(tokenizer.encode("7")[0])
    for token in (*tokenizer.encode("}}\n"), tokenizer.token_to_id("</tool_call>"), *tokenizer.encode(" Done.")):
        assert constraint.accept(token)
    assert constraint.accept(tokenizer.eos_token_ids[0])
    without_call = compiler.compile_tools(plan.grammar)()
    assert without_call.accept(tokenizer.encode("Hi")[0])
    assert without_call.accept(tokenizer.eos_token_ids[0])


def test_strict_tools_with_markers_that_are_no_tokens():
    tokenizer = sentencepiece(prefix=False)
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size)
    plan = plan_tools(
        [tool("f", {"type": "object", "properties": {}, "additionalProperties": False}, strict=True)],
        "auto",
        tool_family("hermes"),
        tokenizer,
    )
    constraint = compiler.compile_tools(plan.grammar)()
    for token in tokenizer.encode('Hm <b> <tool_call>\n{"name": "f", "arguments": {', add_special_tokens=False):
        assert constraint.accept(token)
    assert not constraint.accept(tokenizer.token_to_id('"'))


def test_auto_and_none():
    tokenizer = byte_level()
    hermes = tool_family("hermes")
    auto = plan_tools([tool("now")], None, hermes, tokenizer)
    assert (auto.family, auto.grammar, auto.offered) == (hermes, None, True)
    none = plan_tools([tool("now")], "none", hermes, tokenizer)
    assert (none.family, none.grammar, none.offered) == (None, None, False)
    empty = plan_tools([], None, hermes, tokenizer)
    assert (empty.family, empty.offered) == (None, False)


@pytest.mark.parametrize(
    ("tools", "choice", "words", "param"),
    [
        ([], "required", "no tools", "tool_choice"),
        ([tool("a")], {"function": {"name": "b"}}, "'b'", "tool_choice"),
        ([tool("a")], "sometimes", "sometimes", "tool_choice"),
        ([tool("a"), tool("a")], "auto", "two functions", "tools"),
        ([{"type": "function"}], "auto", r"tools\[0\]", "tools"),
        ([{"type": "web_search"}], "auto", r"tools\[0\]", "tools"),
        ([tool("a b")], "auto", "'a b'", "tools"),
        ([tool("a", {"type": "array"})], "auto", "array", "tools"),
        ([{"type": "function", "function": {"name": "a", "parameters": 3}}], "auto", "a whole number", "tools"),
    ],
)
def test_wrong_tools_are_explained(tools, choice, words, param):
    with pytest.raises(RequestError, match=words) as error:
        plan_tools(tools, choice, tool_family("hermes"), byte_level())
    assert error.value.param == param


def test_schemas_that_cannot_be_enforced_are_refused_by_name(compiler):
    bad = {"type": "object", "properties": {"a": {"not": {}}}, "x-guidance": {"lenient": True}}
    with pytest.raises(RequestError, match=r"schema of f uses not, which is not supported at properties\.a") as error:
        plan_tools([tool("f", bad)], "required", tool_family("hermes"), byte_level())
    assert error.value.param == "tools"
    big = {"type": "object", "properties": {"a": {"type": "string", "pattern": "(((a{0,99}){0,99}){0,99}){0,99}"}}}
    plan = plan_tools([tool("f", {**big, "required": ["a"]})], "required", tool_family("json"), byte_level())
    compiler.compile_tools(plan.grammar)  # what is behind the first few tokens is found out later


def test_control_tokens_that_are_markers_stay_in_the_text():
    tokenizer = real("mistral_nemo")
    family = tool_family("mistral")
    keep = kept_token_ids(tokenizer, family, None)
    assert keep == {tokenizer.token_to_id("[TOOL_CALLS]")}
    ids = [tokenizer.token_to_id("[TOOL_CALLS]"), *tokenizer.encode('[{"name": "now", "arguments": {}}]'), 2]
    text = IncrementalDetokenizer(tokenizer, keep=keep).push(ids)
    assert message(parse(text, family))[2] == [["now", "{}"]]
    assert "TOOL_CALLS" not in IncrementalDetokenizer(tokenizer).push(ids)


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
        max_leaves=12,
    ),
    st.booleans(),
    st.integers(0, 3),
)
@settings(deadline=None, max_examples=100)
def test_the_scanner_takes_json_and_nothing_else(value, ascii_only, indent):
    value = value if isinstance(value, list | dict) else [value]
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent or None)
    scanner = JSONScanner()
    for i, char in enumerate(text):
        assert not scanner.done, text[:i]
        scanner.feed(char)
    assert scanner.done
    for at in range(len(text)):
        broken = text[:at] + "#" + text[at:]
        if not _is_json(broken):
            with pytest.raises(MalformedJSONError):
                _scan(broken)


def _is_json(text):
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _scan(text):
    scanner = JSONScanner()
    for char in text:
        scanner.feed(char)
    if not scanner.done:
        raise MalformedJSONError("not complete")
