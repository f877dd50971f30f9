"""Keywords that come to others: what their grammars take is what JSON Schema's own validator takes."""

from __future__ import annotations

import json

import jsonschema
import pytest

from serving.engine.api.sampling_params import StructuredOutputs
from serving.errors import RequestError
from serving.text.grammar import GrammarCompiler
from tests.serving.text.constraints.test_lookahead import DECIMAL, EMAIL
from tests.serving.text.vocabularies import byte_level

KIND = {"k": {"enum": ["a", "b"]}, "v": {"type": "integer"}, "w": {"type": "integer"}}


def when(value, *required):
    return {"if": {"properties": {"k": {"const": value}}}, "then": {"required": [*required]}}


@pytest.fixture(scope="module")
def taken():
    tokenizer = byte_level()
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size)

    def taken(schema, value):
        constraint = compiler.compile(StructuredOutputs(json=schema))()
        ids = tokenizer.encode(json.dumps(value, ensure_ascii=False), add_special_tokens=False)
        return all(map(constraint.accept, ids)) and constraint.accept(tokenizer.eos_token_ids[0])

    return taken


@pytest.mark.parametrize(
    ("schema", "values"),
    [
        ({"type": "string", "pattern": DECIMAL}, ["1.5", "-", "", "x", "-.5"]),
        ({"type": "string", "format": "email", "pattern": EMAIL}, ["a@b.com", ".a@b.com", "a..b@b.com", "x"]),
        ({"if": True, "then": {"minLength": 2}, "type": "string"}, ["ab", "a"]),
        ({"if": False, "then": {"minLength": 9}, "else": {"maxLength": 1}, "type": "string"}, ["ab", "a"]),
        (
            {"type": "object", "properties": KIND, "required": ["k"], "allOf": [when("a", "v"), when("b", "w")]},
            [{"k": "a", "v": 1}, {"k": "b", "w": 1}, {"k": "a"}, {"k": "b"}, {"k": "b", "v": 1}],
        ),
        (
            {"type": "object", "properties": KIND, "required": ["k"], **when("a", "v"), "else": {"required": ["w"]}},
            [{"k": "a", "v": 1}, {"k": "b", "w": 1}, {"k": "a", "w": 1}, {"k": "b"}],
        ),
        (
            {
                "type": "object",
                "properties": {"k": {"$ref": "#/$defs/flag"}, "v": {"type": "integer"}},
                "required": ["k"],
                "if": {"properties": {"k": {"const": True}}, "required": ["k"]},
                "then": {"required": ["v"]},
                "$defs": {"flag": {"type": "boolean"}},
            },
            [{"k": True, "v": 1}, {"k": False}, {"k": True}],
        ),
        ({"not": {"type": "null"}}, [1, 1.5, "x", None, {}]),
        ({"type": ["number", "string"], "not": {"type": "number"}}, ["x", 1, 1.5]),
        ({"type": ["integer", "null"], "not": {"type": "string"}}, [1, None]),
        ({"enum": ["a", "b", 1, True], "not": {"enum": ["b", 1]}}, ["a", True, "b", 1]),
        ({"type": "string", "not": {"enum": ["", "N/A"]}}, ["a", "N", "N/A x", "N/A", ""]),
        ({"type": "boolean", "not": {"const": False}}, [True, False]),
        ({"enum": [1, 2, {"a": 1}], "not": {"enum": [1.0, {"a": 1.0}]}}, [2, 1, {"a": 1}]),
        (
            {
                "type": "object",
                "properties": {"k": {"enum": [1, "1"]}, "v": {}},
                "required": ["k"],
                "if": {"properties": {"k": {"type": "string", "enum": [1, "1"]}}},
                "then": {"required": ["v"]},
            },
            [{"k": 1}, {"k": "1", "v": 0}, {"k": "1"}],
        ),
        ({"$id": "https://x.y/z", "$ref": "https://x.y/z#/$defs/A", "$defs": {"A": {"type": "integer"}}}, [1, "x"]),
        (
            {"items": {"$ref": "item"}, "type": "array", "$defs": {"i": {"$id": "item", "type": "integer"}}},
            [[1], ["x"]],
        ),
        ({"$ref": "#/$defs/a%20b", "$defs": {"a b": {"type": "integer"}}}, [1, "x"]),
        ({"$ref": "#/$defs/a~1b%25", "$defs": {"a/b%": {"type": "integer"}}}, [1, "x"]),
    ],
)
def test_as_the_validator(taken, schema, values):
    validator = jsonschema.Draft202012Validator(schema)
    wanted = [validator.is_valid(value) for value in values]
    assert [taken(schema, value) for value in values] == wanted and True in wanted


@pytest.mark.parametrize("name", ["List<str>", "A[int]", "Größe", "a b"])
def test_names_that_are_no_uris(taken, name):
    """As generators of schemas write references to generic types; strict readers refuse them."""
    schema = {"$ref": f"#/$defs/{name}", "$defs": {name: {"type": "integer"}}}
    assert taken(schema, 1) and not taken(schema, "x")


def test_bounds_beyond_all_numbers_restrict_nothing(taken):
    schema = json.loads('{"type": "string", "maxLength": 1e400}')
    assert taken(schema, "abc")
    assert taken({"type": "number", "maximum": 10**400, "minimum": -(10**400)}, 5)


def test_a_property_that_is_required_by_itself(taken):
    schema = {"type": "object", "properties": {"a": {"type": "integer", "required": True}}}
    assert taken(schema, {"a": 1}) and not taken(schema, {})


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "number", "not": {"type": "integer"}}, "uses not"),
        ({"type": "integer", "not": {"const": 0}}, "uses not"),
        ({"enum": ["a"], "not": {"const": "a"}}, "leaves no value"),
        ({"type": "object", "properties": KIND, **when("a", "v")}, "uses if, then"),  # k may be missing
        ({"type": "object", "properties": {"k": {"type": "string"}}, "required": ["k"], **when("a", "v")}, "uses if"),
        ({"properties": KIND, "required": ["k"], **when("a", "v")}, "uses if"),  # may be no object
        (
            {
                "type": "object",
                "properties": KIND,
                "required": ["k"],
                "if": {"properties": {"k": {"enum": ["a"], "minLength": 2}}},
                "then": {"required": ["v"]},
            },
            "uses if",
        ),
        ({"type": "string", "pattern": r"^(?!.*abc)a"}, "look-around"),
        (json.loads('{"type": "string", "minLength": 1e400}'), "minLength Infinity; at most"),
        (json.loads('{"contains": {}, "minContains": 1e400}'), "minContains Infinity"),
        (json.loads('{"multipleOf": 1e400}'), "above 0"),
        (json.loads('{"const": [1, 1e400]}'), "Infinity as a value"),
        ({"enum": [1, 10**400]}, "too large to be enforced"),
        ({"const": "\ud800"}, "half of a character"),
        ({"not": 5}, "uses not"),
        ({"not": None}, "uses not"),
        ({"enum": "a"}, "an enum that is no list"),
        (json.loads('{"items":' * 140 + "{}" + "}" * 140), "nested too deeply"),
    ],
)
def test_what_cannot_be_said_is_refused_by_name(taken, schema, words):
    with pytest.raises(RequestError, match=words):
        taken(schema, "a")
