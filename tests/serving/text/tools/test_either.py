"""With tools left to the model and a schema: the reply is a call, or satisfies the schema."""

import json
import random

import pytest

from serving.text.grammar import GrammarCompiler
from serving.text.tools import plan_tools, tool_family
from tests.serving.text.test_tools import message, parse, tool
from tests.serving.text.vocabularies import byte_level
from tests.serving.text.walks import walk

F = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}
ANSWER = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}


@pytest.mark.parametrize("name", ["hermes", "mistral", "json", "qwen3_coder", "gpt_oss"])
def test_a_reply_is_a_call_or_satisfies_the_schema(name):
    tokenizer = byte_level()
    plan = plan_tools([tool("f", F)], "auto", tool_family(name), tokenizer, answer=ANSWER)
    compiler = GrammarCompiler(tokenizer, 1024)
    seen = set()
    for seed in range(12):
        ids = walk(compiler.compile_tools(plan.grammar)(), tokenizer, random.Random(seed), free_tokens=30)
        if ids is None:
            continue
        text = tokenizer.decode(ids, skip_special_tokens=False)
        _, content, calls = message(parse(text, plan.family, schemas=plan.schemas))
        seen.add(bool(calls))
        if calls:
            assert content == ""
            assert all(isinstance(json.loads(arguments)["n"], int) for _, arguments in calls)
        else:
            assert isinstance(json.loads(content)["a"], bool)
    assert seen
