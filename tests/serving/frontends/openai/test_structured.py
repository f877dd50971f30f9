"""Structured output and forced calls over HTTP, with real grammars and a model that picks any allowed token.

Such a model knows nothing, so whatever comes out right is the grammar's doing, through every layer in between.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
import re
from typing import Any

import jsonschema
import numpy as np
import pytest

from serving.engine.api.constraint import TooComplexError
from serving.engine.api.types import EngineRequest
from serving.service import TextService
from serving.text.grammar import GrammarCompiler, GrammarConstraint
from tests.mock_engine import MockEngine, MockTemplate
from tests.serving.frontends.conftest import HI, Running, Start
from tests.serving.text.vocabularies import byte_level

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
MOVE = {
    "type": "object",
    "properties": {"direction": {"enum": ["north", "south"]}, "steps": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["direction", "steps"],
    "additionalProperties": False,
}


class RandomEngine(MockEngine):
    """Picks a random token among those allowed; the end of the completion where that is allowed, most times."""

    def __init__(self) -> None:
        super().__init__(max_model_len=4096)
        self._tokenizer = byte_level()
        self._info = dataclasses.replace(self._info, vocab_size=self._tokenizer.vocab_size)
        self._random = random.Random(0)

    def _next(self, request: EngineRequest, reply: list[int], position: int) -> int:
        if request.constraint is None:
            return self._tokenizer.encode(" a", add_special_tokens=False)[0]
        mask = np.zeros(-(-self._tokenizer.vocab_size // 32), np.int32)
        request.constraint.fill_mask(mask)
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()
        ends = [token for token in allowed if token in request.eos_token_ids]
        token = ends[0] if ends and self._random.random() < 0.8 else self._random.choice(allowed)
        assert request.constraint.accept(token)
        return token


@pytest.fixture
async def any_model(start: Start) -> Running:
    """A server over the engine above, with a real tokenizer and grammar compiler."""
    tokenizer = byte_level()
    engine = RandomEngine()
    template: Any = MockTemplate()
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size)
    service = TextService(engine, tokenizer, template, model_id="any", grammar_compiler=compiler, tool_parser="hermes")
    return await start(engine, service=service)


def _json_schema(schema: dict) -> dict:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}}


async def test_every_kind_of_constraint_holds(any_model: Running):
    checks = [
        (_json_schema(PERSON), lambda text: jsonschema.validate(json.loads(text), PERSON)),
        ({"structured_outputs": {"json": json.dumps(MOVE)}}, lambda text: jsonschema.validate(json.loads(text), MOVE)),
        ({"structured_outputs": {"regex": "[0-9]{4}-(0[1-9]|1[0-2])"}}, re.compile(r"\d{4}-(0[1-9]|1[0-2])").fullmatch),
        ({"structured_outputs": {"choice": ["yes", "no", "möglich"]}}, {"yes", "no", "möglich"}.__contains__),
        ({"structured_outputs": {"grammar": 'start: "x" /[0-9]{2}/'}}, re.compile(r"x\d\d").fullmatch),
        ({"structured_outputs": {"grammar": 'root ::= "a" [0-9] "b"'}}, re.compile(r"a\db").fullmatch),
    ]
    for fields, check in checks:
        reply = (await any_model.chat(n=4, max_tokens=400, **fields)).json()
        for choice in reply["choices"]:
            text = choice["message"]["content"]
            assert choice["finish_reason"] == "stop", (fields, text)
            assert check(text) in (None, True) or isinstance(check(text), re.Match), (fields, text)
        chunks = await any_model.chunks(max_tokens=400, **fields)
        text = "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks)
        assert check(text) in (None, True) or isinstance(check(text), re.Match), (fields, text)


async def test_a_cut_completion_says_length(any_model: Running):
    choice = (await any_model.chat(max_tokens=3, **_json_schema(PERSON))).json()["choices"][0]
    assert choice["finish_reason"] == "length"


async def test_completions_take_constraints_too(any_model: Running):
    body = {"prompt": "x", "max_tokens": 400, "response_format": {"type": "json_object"}}
    reply = (await any_model.http.post("/v1/completions", json=body)).json()
    choice = reply["choices"][0]
    assert choice["finish_reason"] == "length" or isinstance(json.loads(choice["text"]), dict)


TOOLS = [
    {"type": "function", "function": {"name": "move", "parameters": MOVE}},
    {"type": "function", "function": {"name": "save", "parameters": PERSON}},
]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "save"}}])
async def test_forced_calls_have_valid_arguments(any_model: Running, choice):
    fields = {"tools": TOOLS, "tool_choice": choice, "max_tokens": 2000, "parallel_tool_calls": False}
    reply = (await any_model.chat(n=4, **fields)).json()
    for one in reply["choices"]:
        (call,) = one["message"]["tool_calls"]
        assert one["finish_reason"] == "tool_calls" and one["message"]["content"] is None
        schema = {"move": MOVE, "save": PERSON}[call["function"]["name"]]
        jsonschema.validate(json.loads(call["function"]["arguments"]), schema)
        assert isinstance(choice, str) or call["function"]["name"] == "save"
    chunks = await any_model.chunks(messages=HI, **fields)
    calls = [c for chunk in chunks for c in chunk["choices"][0]["delta"].get("tool_calls", ())]
    name = "".join(c["function"].get("name", "") for c in calls)
    arguments = "".join(c["function"].get("arguments", "") for c in calls)
    jsonschema.validate(json.loads(arguments), {"move": MOVE, "save": PERSON}[name])


async def test_a_constraint_that_grows_too_complex_is_its_authors_to_mend(any_model: Running, monkeypatch):
    """A 400, or an event that says so where the answer has begun; the others go on."""
    masks: dict[int, int] = {}
    fill = GrammarConstraint.fill_mask

    def fill_mask(self: GrammarConstraint, mask_W: np.ndarray) -> None:
        masks[id(self)] = masks.get(id(self), 0) + 1
        if masks[id(self)] > 4:
            raise TooComplexError("The constraint grew too complex to go on. Simplify it.")
        fill(self, mask_W)

    monkeypatch.setattr(GrammarConstraint, "fill_mask", fill_mask)
    fields = {"structured_outputs": {"regex": "[a-z]{300}"}, "max_tokens": 400}
    bad, good = await asyncio.gather(any_model.chat(**fields), any_model.chat(max_tokens=20))
    assert bad.status_code == 400 and good.status_code == 200
    error = bad.json()["error"]
    assert error["type"] == "invalid_request_error" and error["code"] == "constraint_too_complex"
    assert "too complex" in error["message"]
    *chunks, last = await any_model.events("/v1/chat/completions", messages=HI, **fields)
    said = json.loads(chunks[-1])["error"] if last == "[DONE]" else json.loads(last)["error"]
    assert said["code"] == "constraint_too_complex"
    assert not any_model.engine.live and not any_model.service.num_live


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (_json_schema({"type": "object", "unevaluatedProperties": False}), "unevaluatedProperties"),
        ({"structured_outputs": {"regex": "(["}}, "regex"),
        ({"structured_outputs": {"grammar": "start: nothing"}}, "grammar"),
        ({"structured_outputs": {"json": "{"}}, "JSON"),
        ({"structured_outputs": {"choice": []}}, "choice"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "exactly one"),
        ({**_json_schema(MOVE), "structured_outputs": {"regex": "a"}}, "exclude each other"),
    ],
)
async def test_what_cannot_be_enforced_is_a_400_that_names_it(any_model: Running, fields, words):
    reply = await any_model.chat(**fields)
    assert reply.status_code == 400 and words in reply.json()["error"]["message"], reply.text
    assert not any_model.engine.requests
