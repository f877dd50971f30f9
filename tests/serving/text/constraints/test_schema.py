"""JSON schemas as they are rewritten: which objects are closed, and that a rewritten schema is rewritten no further."""

import jsonschema
import pytest

from serving.text.constraints.schema import prepare
from tests.serving.text.schemas import schemas

A, B = {"properties": {"a": {}}}, {"properties": {"b": {}}}


def closed(schema):
    return prepare(schema, "p", closed=True)


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        (A, [{}, {"a": 1}], [{"b": 1}]),
        ({"properties": {}}, [{}], [{"a": 1}]),
        ({**A, "additionalProperties": True}, [{"b": 1}], []),
        ({**A, "additionalProperties": {"type": "null"}}, [{"b": None}], [{"b": 1}]),
        ({"type": "object"}, [{"b": 1}], []),
        ({**A, "patternProperties": {"^x": {}}}, [{"b": 1}], []),
        ({**A, "required": ["c"]}, [{"c": 1}], [{"c": 1, "d": 1}]),
        ({"properties": {"a": A}}, [{"a": {}}], [{"a": {"b": 1}}]),
        ({"items": A}, [[{"a": 1}]], [[{"b": 1}]]),
        ({"$ref": "#/$defs/A", "$defs": {"A": A}}, [{"a": 1}], [{"b": 1}]),
        ({"anyOf": [A, B]}, [{"a": 1}, {"b": 1}], [{"c": 1}]),
        # Objects that are described in several places are nobody's to close.
        ({"allOf": [A, B]}, [{"a": 1, "b": 1}], []),
        ({**A, "anyOf": [B, {"required": ["c"]}]}, [{"a": 1, "b": 1}], []),
        ({**A, "$ref": "#/$defs/B", "$defs": {"B": B}}, [{"a": 1, "b": 1}], []),
        ({"allOf": [{"$ref": "#/$defs/A"}, B], "$defs": {"A": A}}, [{"a": 1, "b": 1}], []),
        ({"allOf": [{"$ref": "#/$defs/A"}], "$defs": {"A": A}}, [{"a": 1}], [{"b": 1}]),
        ({**A, "anyOf": [{"required": ["a"]}]}, [{"a": 1}], [{"a": 1, "b": 1}]),
        (
            {"properties": {"next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}},
            [{"next": {"next": None}}],
            [{"next": {"x": 1}}],
        ),
    ],
)
def test_objects_that_list_their_properties_are_closed(schema, good, bad):
    validator = jsonschema.Draft202012Validator(closed(schema))
    for value in good:
        validator.validate(value)
    for value in bad:
        assert not validator.is_valid(value)
    assert jsonschema.Draft202012Validator(prepare(schema, "p")).is_valid({"z": 1}) == jsonschema.Draft202012Validator(
        schema
    ).is_valid({"z": 1})


def test_what_is_rewritten_is_rewritten_no_further():
    for schema in schemas(80):
        for close in (False, True):
            once = prepare(schema, "p", close)
            assert prepare(once, "p", close) == once


def test_the_given_schema_is_left_alone():
    schema = {"properties": {"a": {"uniqueItems": False}}}
    prepare(schema, "p", closed=True)
    assert schema == {"properties": {"a": {"uniqueItems": False}}}
