"""`if` and `not` in a JSON schema, where they come to a choice among values that are listed: see `schema`."""

from __future__ import annotations

import json
from typing import Any

from serving.text.constraints.lookahead import other_than
from serving.text.constraints.schema_rules import (
    ANNOTATIONS,
    Refused,
    Resolve,
    Schema,
    also,
    types_of,
    unsupported,
    vacuous,
)


def conditions(node: Schema, where: str, resolve: Resolve) -> None:
    """`if` that asks for one of the values that a property may have is a choice between those and the others. It may stand beside
    the property or in an `allOf` below; what it has no consequence for, or one that says nothing, restricts nothing."""
    for part in (node, *(part for part in node.get("allOf", ()) if isinstance(part, dict))):
        rules = {word: part.get(word, True) for word in ("then", "else")}
        if "if" not in part or all(map(vacuous, rules.values())):
            if part is node:
                _drop(part)
            continue
        branches = _branches(node, part["if"], rules["then"], rules["else"], resolve)
        if branches is not None:
            _drop(part)
            also(part, branches[0] if len(branches) == 1 else {"anyOf": branches})
        elif part is node:
            raise unsupported(", ".join(word for word in ("if", "then", "else") if word in node), where)


def _drop(part: Schema) -> None:
    for word in ("if", "then", "else"):
        part.pop(word, None)


def _branches(node: Schema, condition: Any, then: Any, other: Any, resolve: Resolve) -> list[Any] | None:
    """What a condition comes to for values of `node`: one schema or two, of which one must hold. None where it cannot be said."""
    if vacuous(condition):
        return [then]
    if condition is False:
        return [other]
    if not isinstance(condition, dict) or condition.keys() - ANNOTATIONS - {"properties", "required", "type"}:
        return None
    asked = condition.get("properties")
    if not isinstance(asked, dict) or len(asked) != 1 or condition.get("type", "object") != "object":
        return None
    ((name, wanted),) = asked.items()
    # A condition on a property that may be missing, or of a value that may be no object, holds without it.
    if (
        name not in node.get("required", ())
        or condition.get("required", [name]) != [name]
        or types_of(node) != {"object"}
    ):
        return None
    known, wanted = _listed(node.get("properties", {}).get(name), resolve), _only_listed(wanted)
    if known is None or wanted is None:
        return None
    keys = set(map(_key, wanted))
    sides: dict[bool, list[Any]] = {True: [], False: []}
    for value in known:
        sides[_key(value) in keys].append(value)
    return [
        {"allOf": [{"properties": {name: {"enum": values}}}, *(() if vacuous(rule) else (rule,))]}
        for values, rule in ((sides[True], then), (sides[False], other))
        if values
    ]


def _listed(schema: Any, resolve: Resolve) -> list[Any] | None:
    """The values that a schema lists."""
    for _ in range(32):
        if not isinstance(schema, dict):
            return None
        if schema.keys() & {"const", "enum"}:
            found = [schema["const"]] if "const" in schema else schema["enum"]
            return found if isinstance(found, list) else None
        if schema.get("type") == "boolean":
            return [True, False]
        if "$ref" not in schema:
            return None
        schema = resolve(schema["$ref"])
    return None


def _only_listed(schema: Any) -> list[Any] | None:
    """The values of a schema that is nothing but a list of them; of those that it lists beside a type, the ones of that type."""
    rules = schema.keys() - ANNOTATIONS if isinstance(schema, dict) else set()
    if not rules & {"const", "enum"} or rules - {"const", "enum", "type"} or rules >= {"const", "enum"}:
        return None
    values = [schema["const"]] if "const" in rules else schema["enum"]
    if not isinstance(values, list):
        return None
    return [value for value in values if _type_of(value) in types_of(schema)]


def _type_of(value: Any) -> str:
    if isinstance(value, float) and not value.is_integer():
        return "number"
    kinds = ((bool, "boolean"), (int | float, "integer"), (str, "string"), (list, "array"), (dict, "object"))
    return next((name for kind, name in kinds if isinstance(value, kind)), "null")


def _key(value: Any) -> str:
    """The same for values that JSON Schema calls equal: 1 and 1.0, objects in any order."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(one) for name, one in value.items()}
        if isinstance(value, list):
            return list(map(plain, value))
        return int(value) if isinstance(value, float) and value.is_integer() else value

    return json.dumps(plain(value), sort_keys=True)


def negations(node: Schema, where: str, resolve: Resolve) -> None:
    """`not` takes values or types away from those that are listed, or single texts from all; `not` nothing restricts nothing."""
    if "not" not in node:
        return
    other = node.pop("not")
    if other is False:
        return
    if not isinstance(other, dict):
        raise unsupported("not", where)
    rules = {word: rule for word, rule in other.items() if word not in ANNOTATIONS}
    kinds = types_of(node) - types_of(other) if "type" in rules else types_of(node)
    if "type" in rules and not types_of(other) & types_of(node):
        return
    halves = types_of(other) & {"integer", "number"} == {"integer"} and "number" in types_of(node)
    if rules.keys() == {"type"} and kinds and not halves:
        node["type"] = sorted(kinds - {"integer"} if "number" in kinds else kinds)
        return
    rules.pop("type", None)
    away = _listed(rules, resolve) if rules.keys() in ({"const"}, {"enum"}) else None
    mine = _listed(node, resolve)
    if away is not None and mine is not None:
        keys = set(map(_key, away))
        node.pop("const", None)
        node["enum"] = [value for value in mine if _key(value) not in keys]
        if not node["enum"]:
            raise Refused(f"has a not{f' at {where}' if where else ''} that leaves no value.")
        return
    if away is not None and all(isinstance(value, str) and len(value) <= 64 for value in away):
        also(node, *({"pattern": other_than(value)} for value in away))
        return
    raise unsupported("not", where)
