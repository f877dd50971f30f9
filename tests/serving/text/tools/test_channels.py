"""Replies on channels (GPT-OSS): thinking, answers and calls, and what models make of the format."""

import json
import random

import pytest

from serving.text.detokenizer import IncrementalDetokenizer
from serving.text.formats.gguf_vocab import end_token_ids
from serving.text.grammar import GrammarCompiler
from serving.text.tools import (
    detect_reasoning,
    detect_tools,
    kept_token_ids,
    plan_tools,
    reasoning_family,
    tool_family,
)
from tests.serving.text.test_tools import message, parse, tool
from tests.serving.text.vocabularies import real
from tests.serving.text.walks import walk

TO = "<|channel|>commentary to=functions.f <|constrain|>json<|message|>"


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>Hi", ("hm", "Hi", [])),
        ("plain <b> text", ("", "plain <b> text", [])),
        (f'<|channel|>commentary<|message|>Wait.<|end|><|start|>assistant{TO}{{"a": 1}}', ("", "Wait.", [{"a": 1}])),
        ('to=functions.f<|channel|>commentary json<|message|>{"a": [1, 2}<|call|>', ("", "", [{"a": [1, 2]}])),
        (f"{TO}<|call|>", ("", "", [{}])),
        (f'{TO}{{"a": NaN,}} <|call|>', ("", "", [{"a": None}])),
        ("<|channel|>commentary to=functions.other<|message|>{}<|call|>", ("", "{}", [])),
        ("<|channel|>analysis to=python<|message|>print(1)<|call|>", ("print(1)", "", [])),
        ("<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>analysis<|message|>b", ("a\nb", "", [])),
        ("<|channel|>final<|message|>never closed <|e", ("", "never closed <|e", [])),
        ("<|channel|>final", ("", "", [])),
    ],
)
def test_replies(text, right):
    for family, reasoning in ((tool_family("gpt_oss"), None), (tool_family("gpt_oss"), reasoning_family("gpt_oss"))):
        for cuts in ((), range(len(text)), range(0, len(text), 7)):
            events = parse(text, family, reasoning=reasoning, schemas={"f": {}}, cuts=cuts)
            reasoned, content, calls = message(events)
            assert (reasoned, content, [json.loads(arguments) for _, arguments in calls]) == right


def test_without_tools_there_is_reasoning_and_content():
    text = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>Hi"
    assert message(parse(text, None, reasoning=reasoning_family("openai_gptoss"))) == ("hm", "Hi", [])
    assert message(parse("so<|end|>", None, reasoning=reasoning_family("gpt_oss"), in_reasoning=True))[0] == "so"


def test_a_real_vocabulary_keeps_what_the_parser_reads_by():
    tokenizer = real("gptoss")
    tools, reasoning = tool_family("gpt_oss"), reasoning_family("gpt_oss")
    # An assistant's turn as the model's own template writes it.
    turn = (
        "<|channel|>analysis<|message|>Look it up.<|end|><|start|>assistant to=functions.f<|channel|>commentary "
        'json<|message|>{"city": "Köln"}<|call|>'
    )
    ids = tokenizer.encode(turn, add_special_tokens=False, parse_special=True)
    text = IncrementalDetokenizer(tokenizer, keep=kept_token_ids(tokenizer, tools, reasoning)).push(ids)
    assert message(parse(text, tools, reasoning=reasoning, schemas={"f": {}})) == (
        "Look it up.",
        "",
        [["f", '{"city": "Köln"}']],
    )


def test_the_format_is_known_by_its_template():
    template = "{{ '<|start|>assistant<|channel|>analysis<|message|>' + message.thinking + '<|end|>' }}"
    assert (detect_tools(template).name, detect_reasoning(template).name) == ("gpt_oss", "gpt_oss")
    assert detect_reasoning("{{ '<|assistant|>' + message.content + '<|end|>' }}") is None


def test_a_forced_call_may_be_thought_about_and_ends_the_reply():
    tokenizer = real("gptoss")
    family, reasoning = tool_family("gpt_oss"), reasoning_family("gpt_oss")
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer"}},
        "required": ["n"],
        "additionalProperties": False,
    }
    plan = plan_tools([tool("f", schema)], "required", family, tokenizer, reasoning=reasoning)
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size)
    thought = "<|channel|>analysis<|message|>hm <b><|end|><|start|>assistant"
    keep = kept_token_ids(tokenizer, family, reasoning)
    for before in (TO, thought + TO):
        constraint = compiler.compile_tools(plan.grammar)()
        ids = tokenizer.encode(before, add_special_tokens=False, parse_special=True)
        assert all(constraint.accept(token) for token in ids)
        rest = walk(constraint, tokenizer, random.Random(1), free_tokens=10)
        text = IncrementalDetokenizer(tokenizer, keep=keep).push([*ids, *rest])
        reasoned, content, calls = message(parse(text, plan.family, reasoning=reasoning, schemas=plan.schemas))
        assert (reasoned, content) == ("hm <b>" if before != TO else "", "")
        assert [name for name, _ in calls] == ["f"]
        assert isinstance(json.loads(calls[0][1])["n"], int)


def test_a_message_ends_where_a_reply_does_not():
    """`<|end|>` ends a reply of Phi, and a thought of GPT-OSS."""

    def ends(tokens):
        types = [1] + [3] * (len(tokens) - 1)
        found = end_token_ids({"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types})
        return [tokens[i] for i in found]

    assert ends(["a", "<|end|>", "<|endoftext|>"]) == ["<|end|>", "<|endoftext|>"]
    assert ends(["a", "<|end|>", "<|return|>", "<|call|>", "<|channel|>"]) == ["<|return|>", "<|call|>"]
