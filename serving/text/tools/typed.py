"""What a text stands for as an argument of a tool, by the JSON schema of that argument: one reading for all families.

Models that write arguments as plain text (tags, braces) leave open whether `12345` is a number or a postal code. The
schema says it. Where it admits several kinds, the narrowest that the text can be read as is taken and a string last,
which is what clients of other servers are used to.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from serving.text.tools.literals import Unquoted, python_literal

ALL_KINDS = frozenset({"null", "boolean", "integer", "number", "string", "array", "object"})
_MAX_REFS = 32
_INTEGER = re.compile(r"[+-]?[0-9]{1,400}")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?")
_NULLS = frozenset({"null", "None", "none", "NULL", "Null"})
_MISSING = object()


class Arguments:
    """The arguments of one tool.

    Args:
        schema: the tool's `parameters`; None where nothing is known.
    """

    def __init__(self, schema: Mapping[str, Any] | None) -> None:
        self._root = schema if isinstance(schema, Mapping) else {}

    def schema_of(self, key: str) -> Mapping[str, Any] | None:
        """The schema of a top-level argument; None where the tool says nothing about it."""
        return self._find(self._root, key, 0)

    def knows(self, key: str) -> bool:
        """Whether the tool declares an argument of this name."""
        return self._find(self._root, key, 0) is not None

    def read(self, key: str, text: str) -> Any:
        """The value that `text` stands for as the argument `key`."""
        return self._read(text, self.schema_of(key))

    def settle(self, key: str, value: Any) -> Any:
        """`value` with every `Unquoted` text in it read by the schema."""
        return self._settle(value, self.schema_of(key), 0)

    def _settle(self, value: Any, schema: Any, depth: int) -> Any:
        if isinstance(value, Unquoted):
            return self._read(str(value), schema)
        if isinstance(value, dict):
            return {key: self._settle(item, self._find(schema, key, 0), depth + 1) for key, item in value.items()}
        if isinstance(value, list):
            items = self._resolve(schema).get("items") if isinstance(schema, Mapping) else None
            return [self._settle(item, items, depth + 1) for item in value]
        return value

    def _find(self, schema: Any, key: str, refs: int) -> Mapping[str, Any] | None:
        """The schema of property `key`, looked for in combined schemas too."""
        if not isinstance(schema, Mapping) or refs > _MAX_REFS:
            return None
        schema = self._resolve(schema)
        properties = schema.get("properties")
        found = properties.get(key) if isinstance(properties, Mapping) else None
        if found is not None:
            return found if isinstance(found, Mapping) else {}
        for word in ("allOf", "anyOf", "oneOf"):
            for part in _list(schema.get(word)):
                found = self._find(part, key, refs + 1)
                if found is not None:
                    return found
        extra = schema.get("additionalProperties")
        return extra if isinstance(extra, Mapping) else None

    def _resolve(self, schema: Mapping[str, Any]) -> Mapping[str, Any]:
        """`schema`, or what its `$ref` into the same document points to (RFC 6901)."""
        for _ in range(_MAX_REFS):
            ref = schema.get("$ref")
            if not isinstance(ref, str) or not ref.startswith("#"):
                return schema
            found: Any = self._root
            for part in ref[1:].split("/")[1:]:
                part = part.replace("~1", "/").replace("~0", "~")
                found = found.get(part) if isinstance(found, Mapping) else None
            if not isinstance(found, Mapping):
                return {}
            schema = {**found, **{key: value for key, value in schema.items() if key != "$ref"}}
        return {}

    def _read(self, text: str, schema: Any) -> Any:
        members = self._members(schema, 0) if isinstance(schema, Mapping) else None
        if members is not None:
            found = _member(text, members)
            if found is not _MISSING:
                return found
        kinds = self._kinds(schema, 0) if isinstance(schema, Mapping) else None
        if kinds is None:
            return _untyped(text)
        for kind, reader in _READERS:
            if kind in kinds and (value := reader(text)) is not _MISSING:
                return value
        return text if "string" in kinds else _untyped(text)

    def _kinds(self, schema: Any, refs: int) -> frozenset[str] | None:
        """The kinds of values that `schema` admits; None where it does not restrict them."""
        if not isinstance(schema, Mapping) or refs > _MAX_REFS:
            return None
        schema = self._resolve(schema)
        found: list[frozenset[str]] = []
        named = schema.get("type")
        names = [named] if isinstance(named, str) else _list(named)
        if names:
            found.append(frozenset(name for name in names if isinstance(name, str)))
        if schema.get("nullable") is True and found:
            found[0] |= {"null"}
        members = self._own_members(schema)
        if members is not None and not found:
            found.append(frozenset(_kind(value) for value in members))
        for word in ("anyOf", "oneOf"):
            parts = [self._kinds(part, refs + 1) for part in _list(schema.get(word))]
            if parts and all(part is not None for part in parts):
                found.append(frozenset().union(*(part for part in parts if part is not None)))
        for part in _list(schema.get("allOf")):
            kinds = self._kinds(part, refs + 1)
            if kinds is not None:
                found.append(kinds)
        if not found:
            if isinstance(schema.get("properties"), Mapping):
                return frozenset({"object"})
            return frozenset({"array"}) if "items" in schema else None
        if len(found) == 1:
            return found[0]
        common = frozenset.intersection(*(_widened(kinds) for kinds in found))
        return common or found[0]

    @staticmethod
    def _own_members(schema: Mapping[str, Any]) -> list[Any] | None:
        if "const" in schema:
            return [schema["const"]]
        values = schema.get("enum")
        return list(values) if isinstance(values, list) else None

    def _members(self, schema: Mapping[str, Any], refs: int) -> list[Any] | None:
        """The values that enum and const list, anywhere in `schema`; None where there are none."""
        if refs > _MAX_REFS:
            return None
        schema = self._resolve(schema)
        found = self._own_members(schema)
        for word in ("allOf", "anyOf", "oneOf"):
            for part in _list(schema.get(word)):
                more = self._members(part, refs + 1) if isinstance(part, Mapping) else None
                found = found if more is None else [*(found or []), *more]
        return found


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int):
        return "integer"
    if isinstance(value, float):
        return "number"
    return "string" if isinstance(value, str) else "array" if isinstance(value, list) else "object"


def _widened(kinds: frozenset[str]) -> frozenset[str]:
    return kinds | {"integer"} if "number" in kinds else kinds


def _member(text: str, members: list[Any]) -> Any:
    """The listed value that `text` spells; a string of exactly that text wins."""
    if text in members:
        return text
    for value in members:
        if isinstance(value, str):
            continue
        kind = _kind(value)
        for name, reader in _READERS:
            if name == kind or (kind == "integer" and name == "number"):
                read = reader(text)
                if read is not _MISSING and read == value and isinstance(read, bool) == isinstance(value, bool):
                    return value
    return text.strip() if text.strip() in members else _MISSING


def _null(text: str) -> Any:
    return None if text.strip() in _NULLS else _MISSING


def _boolean(text: str) -> Any:
    return {"true": True, "false": False}.get(text.strip().lower(), _MISSING)


def _integer(text: str) -> Any:
    text = text.strip()
    if _INTEGER.fullmatch(text):
        return int(text)
    value = _number(text)
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**63 else _MISSING


def _number(text: str) -> Any:
    text = text.strip()
    if _INTEGER.fullmatch(text):
        return int(text)
    value = float(text) if _NUMBER.fullmatch(text) else math.inf
    return value if math.isfinite(value) else _MISSING


def _array(text: str) -> Any:
    value = _container(text)
    return value if isinstance(value, list) else _MISSING


def _object(text: str) -> Any:
    value = _container(text)
    return value if isinstance(value, dict) else _MISSING


def _container(text: str) -> Any:
    """A list or an object in JSON's notation, or else in Python's."""
    if text.lstrip()[:1] not in ("[", "{", "("):
        return _MISSING
    value = strict_json(text)
    if value is not _MISSING:
        return value
    try:
        return python_literal(text)
    except ValueError:
        return _MISSING


def strict_json(text: str) -> Any:
    """The value of a JSON text, or a marker that is no JSON value: Python also reads NaN and Infinity, JSON has none."""
    try:
        value = json.loads(text)
        json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError):
        return _MISSING
    return value


def _untyped(text: str) -> Any:
    """Without a type: JSON where it is JSON, a list or an object in Python's notation, else the text."""
    value = strict_json(text)
    if value is _MISSING:
        value = _container(text)
    return text if value is _MISSING else value


_READERS = (
    ("null", _null),
    ("integer", _integer),
    ("number", _number),
    ("boolean", _boolean),
    ("object", _object),
    ("array", _array),
)
