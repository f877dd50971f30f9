"""Many JSON schemas of the kinds that people send: `schemas(n)` makes the same ones every time."""

from __future__ import annotations

import random
from typing import Any

WORDS = ["name", "age", "city", "tags", "price", "active", "items", "note", "größe", "a b", "x-y", "id"]


def schemas(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Objects of growing variety; each has a type and can be satisfied."""
    rng = random.Random(seed)
    made = [*SPECIAL]
    while len(made) < count:
        made.append(_object(rng, depth=rng.randrange(1, 4)))
    return made[:count]


def _any(rng: random.Random, depth: int) -> dict[str, Any]:
    kinds = [_string, _number, _integer, _enum, _const, _boolean, _null]
    if depth > 0:
        kinds += [_object, _array, _tuple, _union, _object, _array, _map]
    return rng.choice(kinds)(rng, depth - 1)


def _string(rng: random.Random, depth: int) -> dict[str, Any]:
    return rng.choice(
        [
            {"type": "string"},
            {"type": "string", "minLength": 2, "maxLength": rng.randrange(2, 20)},
            {"type": "string", "pattern": "^[A-Z][a-z]{1,6}(-[0-9]{2})?$"},
            {"type": "string", "pattern": "^(https?|ftp)://[a-z]{2,8}\\.(com|org)$"},
            {"type": "string", "format": rng.choice(["date", "time", "date-time", "uuid", "ipv4", "email"])},
            {"type": ["string", "null"], "description": "a text or nothing"},
        ]
    )


def _number(rng: random.Random, depth: int) -> dict[str, Any]:
    low = rng.randrange(-50, 50)
    return rng.choice(
        [
            {"type": "number"},
            {"type": "number", "minimum": low, "maximum": low + 10},
            {"type": "number", "exclusiveMinimum": 0},
        ]
    )


def _integer(rng: random.Random, depth: int) -> dict[str, Any]:
    low = rng.randrange(-1000, 1000)
    return rng.choice(
        [
            {"type": "integer"},
            {"type": "integer", "minimum": low, "maximum": low + rng.randrange(0, 500)},
            {"type": "integer", "multipleOf": rng.choice([2, 5, 10])},
        ]
    )


def _enum(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"enum": rng.sample(["red", "green", 'a "quoted" one', "ü", 1, 2.5, None, True], 3)}


def _const(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"const": rng.choice(["fixed", 7, None, {"a": [1, 2]}])}


def _boolean(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"type": "boolean"}


def _null(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"type": "null"}


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(WORDS, rng.randrange(1, 5))
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {name: _any(rng, depth) for name in names},
        "required": rng.sample(names, rng.randrange(0, len(names) + 1)),
    }
    if rng.random() < 0.7:
        schema["additionalProperties"] = False
    return schema


def _array(rng: random.Random, depth: int) -> dict[str, Any]:
    low = rng.randrange(0, 3)
    return {"type": "array", "items": _any(rng, depth), "minItems": low, "maxItems": low + rng.randrange(0, 4)}


def _tuple(rng: random.Random, depth: int) -> dict[str, Any]:
    parts = [_any(rng, depth) for _ in range(rng.randrange(1, 4))]
    return {"type": "array", "prefixItems": parts, "items": False, "minItems": len(parts)}


def _union(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [_any(rng, depth), _any(rng, depth)]}


def _map(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": _any(rng, depth)}


SPECIAL: list[dict[str, Any]] = [
    {"type": "object"},
    {"type": "object", "properties": {}, "additionalProperties": False},
    {"type": "array", "items": {"type": "string"}, "minItems": 1},
    {"type": "string", "maxLength": 5},
    {"type": "integer", "minimum": 3, "maximum": 3},
    {
        "type": "object",
        "properties": {"value": {"type": "integer"}, "next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
        "required": ["value", "next"],
        "additionalProperties": False,
    },
    {
        "$defs": {
            "Cat": {
                "type": "object",
                "properties": {"kind": {"const": "cat"}, "lives": {"type": "integer"}},
                "required": ["kind", "lives"],
            },
            "Dog": {
                "type": "object",
                "properties": {"kind": {"const": "dog"}, "breed": {"type": "string", "maxLength": 9}},
                "required": ["kind", "breed"],
            },
        },
        "type": "object",
        "title": "Owner",
        "properties": {
            "pet": {
                "oneOf": [{"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}],
                "discriminator": {"propertyName": "kind"},
            }
        },
        "required": ["pet"],
    },
    {
        "type": "object",
        "properties": {"steps": {"type": "array", "items": {"$ref": "#/$defs/Step"}}, "answer": {"type": "string"}},
        "required": ["steps", "answer"],
        "additionalProperties": False,
        "$defs": {
            "Step": {
                "type": "object",
                "properties": {"explanation": {"type": "string"}, "output": {"type": "string"}},
                "required": ["explanation", "output"],
                "additionalProperties": False,
            }
        },
    },
    {"type": "object", "patternProperties": {"^n_[a-z]{1,5}$": {"type": "integer"}}, "additionalProperties": False},
    {"allOf": [{"type": "object", "properties": {"a": {"type": "integer"}}}, {"required": ["a"]}]},
    {"type": "object", "additionalProperties": {"type": "integer"}, "minProperties": 1, "maxProperties": 3},
    {
        "$defs": {
            "Node": {
                "type": "object",
                "properties": {
                    "label": {"type": "string", "maxLength": 6},
                    "children": {"type": "array", "items": {"$ref": "#/$defs/Node"}, "maxItems": 2},
                },
                "required": ["label", "children"],
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/Node",
    },
    {
        "$defs": {
            "Term": {
                "anyOf": [
                    {"type": "integer", "minimum": 0, "maximum": 99},
                    {
                        "type": "object",
                        "properties": {
                            "op": {"enum": ["+", "-", "*"]},
                            "left": {"$ref": "#/$defs/Term"},
                            "right": {"$ref": "#/$defs/Term"},
                        },
                        "required": ["op", "left", "right"],
                        "additionalProperties": False,
                    },
                ]
            }
        },
        "type": "object",
        "properties": {"formula": {"$ref": "#/$defs/Term"}},
        "required": ["formula"],
        "additionalProperties": False,
    },
    {
        "type": "array",
        "items": {
            "oneOf": [
                {
                    "type": "object",
                    "properties": {"kind": {"const": "move"}, "to": {"type": "string", "pattern": "^[a-h][1-8]$"}},
                    "required": ["kind", "to"],
                    "additionalProperties": False,
                },
                {
                    "type": "object",
                    "properties": {"kind": {"const": "wait"}, "seconds": {"type": "number", "exclusiveMaximum": 60}},
                    "required": ["kind", "seconds"],
                    "additionalProperties": False,
                },
            ]
        },
        "minItems": 1,
        "maxItems": 3,
    },
]
