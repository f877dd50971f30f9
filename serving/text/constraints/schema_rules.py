"""The rewritings of one JSON schema node, keyword by keyword: see `schema`."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any

from serving.text.constraints.lookahead import apart

Schema = dict[str, Any]
Resolve = Callable[[Any], Any]

TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
FORMATS = frozenset(
    {"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri", "unknown"}
)
"""Formats that are enforced. The others are annotations (JSON Schema 2020-12, Validation, 7.2.1)."""
ANNOTATIONS = frozenset(
    {"title", "description", "default", "examples", "example", "deprecated", "readOnly", "writeOnly", "$comment"}
)
MAX_REPEAT = 1_000_000
# The compiler's bounds of integers are 64 bits wide and pass through doubles; those of numbers are written out as decimals.
LEAST_INTEGER, GREATEST_INTEGER = -(2**63) + 1024, 2**63 - 1
GREATEST_NUMBER = 1e17
_COUNTS = (
    "minLength",
    "maxLength",
    "minItems",
    "maxItems",
    "minProperties",
    "maxProperties",
    "minContains",
    "maxContains",
)
_REPEAT = re.compile(r"\{(\d+)(?:,(\d*))?\}")


class Refused(ValueError):  # noqa: N818 (it is no error of the program)
    """What is wrong with a schema: the rest of a sentence that begins with "The JSON schema"."""


def vacuous(schema: Any) -> bool:
    """Whether a schema admits everything."""
    return schema is True or (isinstance(schema, dict) and not schema.keys() - ANNOTATIONS)


def unsupported(word: str, where: str, hint: str = "") -> Refused:
    """A keyword that restricts values and cannot be enforced."""
    place = f" at {where}" if where else ""
    return Refused(f"uses {word}, which is not supported{place}. {hint or 'Leave it out or say it differently.'}")


def types_of(node: Schema) -> frozenset[str]:
    """The types that a node's own `type` admits."""
    named = node.get("type")
    names = [named] if isinstance(named, str) else named if isinstance(named, list) else TYPES
    return frozenset(names) | ({"integer"} if "number" in names else frozenset())


def _shapes(node: Schema, where: str, resolve: Resolve) -> None:
    """What must be an object, a list, a text or a number is one."""
    place = f" at {where}" if where else ""
    for word in ("properties", "patternProperties"):
        if not isinstance(node.get(word, {}), dict):
            raise Refused(f"has {word} that are no object{place}.")
    for word in ("allOf", "anyOf", "oneOf", "prefixItems"):
        if not isinstance(node.get(word, []), list):
            raise Refused(f"has {word} that is no list{place}.")
    if node.get("allOf") == []:
        del node["allOf"]
    for word in ("anyOf", "oneOf"):
        if node.get(word) == []:
            raise Refused(f"has an empty {word}{place}: no value satisfies it.")
    if isinstance(node.get("required"), bool):
        del node["required"]  # see `_objects`
    if not all(isinstance(name, str) for name in _list(node, "required", place)):
        raise Refused(f"has a required that is no list of names{place}.")
    for word in ("pattern", "format"):
        if not isinstance(node.get(word, ""), str):
            raise Refused(f"has a {word} that is no text{place}.")
    named = node.get("type", "object")
    names = [named] if isinstance(named, str) else named
    if not isinstance(names, list) or not names or not all(name in TYPES for name in names):
        raise Refused(f"has the type {json.dumps(named)[:60]}{place}; there are {', '.join(TYPES)}.")
    if "enum" in node and not _list(node, "enum", place):
        raise Refused(f"has an empty enum{place}: no value satisfies it.")


def _list(node: Schema, word: str, place: str) -> list[Any]:
    value = node.get(word, [])
    if not isinstance(value, list):
        raise Refused(f"has {'an' if word[0] in 'ae' else 'a'} {word} that is no list{place}.")
    return value


def _values(node: Schema, where: str, resolve: Resolve) -> None:
    """Listed values are written out as they are: numbers that the compiler would round, or that JSON does not have, are none."""
    for word in ("const", "enum"):
        stack = [node[word]] if word in node else []
        while stack:
            value = stack.pop()
            if isinstance(value, dict | list):
                stack += value.values() if isinstance(value, dict) else value
            elif isinstance(value, int | float) and not isinstance(value, bool):
                whole = isinstance(value, int) and not -(2**63) <= value < 2**63
                if whole or not math.isfinite(value):
                    place = f" at {where}" if where else ""
                    raise Refused(
                        f"has the number {json.dumps(value)[:40]} as a value{place}: it is too large to be enforced."
                    )


def _counts(node: Schema, where: str, resolve: Resolve) -> None:
    for word in _COUNTS:
        if word not in node:
            continue
        value = node[word]
        number = isinstance(value, int | float) and not isinstance(value, bool)
        value = MAX_REPEAT + 1 if number and value > MAX_REPEAT else value  # however large, or infinite
        if not number or value != value // 1 or value < 0:
            raise Refused(
                f"has {word} {json.dumps(value)[:40]}{f' at {where}' if where else ''}; it is a count, 0 or more."
            )
        if word.startswith("max") and value > MAX_REPEAT:
            del node[word]  # longer than any completion
            continue
        if word.startswith("min") and value > MAX_REPEAT:
            raise Refused(f"has {word} {json.dumps(node[word])[:40]}; at most {MAX_REPEAT} are enforced.")
        node[word] = int(value)
        if word.startswith("min") and not value and word != "minContains":
            del node[word]


def _bounds(node: Schema, where: str, resolve: Resolve) -> None:
    for word, old in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        flag = node.get(word)
        if isinstance(flag, bool):  # as in the fourth draft
            del node[word]
            if flag and old in node:
                node[word] = node.pop(old)
    for word in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"):
        value = node.get(word, 0)
        if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
            raise Refused(f"has {word} {json.dumps(value)[:40]}{f' at {where}' if where else ''}; it is a number.")
    if "multipleOf" in node and not 0 < node["multipleOf"] <= GREATEST_NUMBER:
        given = json.dumps(node["multipleOf"])[:40]
        raise Refused(f"has multipleOf {given}; it is a number above 0, and at most {GREATEST_NUMBER:g} are enforced.")
    kinds = types_of(node) & {"integer", "number"}
    if not kinds:
        return
    integers = kinds == {"integer"}
    if integers and node.get("multipleOf") == 1:
        del node["multipleOf"]
    least, greatest = (LEAST_INTEGER, GREATEST_INTEGER) if integers else (-GREATEST_NUMBER, GREATEST_NUMBER)
    for word, sign in (("minimum", 1), ("exclusiveMinimum", 1), ("maximum", -1), ("exclusiveMaximum", -1)):
        if word not in node:
            continue
        value = node[word]
        beyond = value > greatest if sign > 0 else value < least
        if beyond or (integers and value >= GREATEST_INTEGER - 1024 and sign > 0):
            given, end = json.dumps(value)[:40], greatest if sign > 0 else least
            raise Refused(f"has {word} {given}: numbers beyond {end} cannot be enforced.")
        if value < least:
            node[word] = least
        elif value > greatest:
            node[word] = greatest


def _strings(node: Schema, where: str, resolve: Resolve) -> None:
    if node.get("format", "unknown") not in FORMATS or not types_of(node) & {"string"}:
        node.pop("format", None)
    for pattern in (node.get("pattern"), *node.get("patternProperties", ())):
        if pattern is not None:
            check_repeats(pattern)
    parts = apart(node["pattern"]) if "pattern" in node else None
    if parts is not None:
        node["pattern"] = parts[0]
        also(node, *({"pattern": part} for part in parts[1:]))


def also(node: Schema, *rules: Any) -> None:
    """Adds schemas that a node's value is to satisfy besides."""
    if rules:
        node["allOf"] = [*node.get("allOf", ()), *rules]


def check_repeats(pattern: str) -> None:
    """Refuses counts in a regular expression that are too large to compile.

    Raises:
        Refused: as the rest of a sentence.
    """
    for low, high in _REPEAT.findall(pattern):
        if max(len(low), len(high)) > 7 or max(int(low or 0), int(high or 0)) > MAX_REPEAT:
            raise Refused(
                f"repeats something {{{low}{',' if high else ''}{high}}} times; at most {MAX_REPEAT} are enforced."
            )


def _arrays(node: Schema, where: str, resolve: Resolve) -> None:
    if "array" not in types_of(node):
        for word in ("uniqueItems", "contains", "minContains", "maxContains", "unevaluatedItems"):
            node.pop(word, None)
        return
    if node.get("uniqueItems") in (None, False) or node.get("maxItems", 2) <= 1:
        node.pop("uniqueItems", None)
    else:
        raise unsupported("uniqueItems", where)
    _contains(node, where)
    if not vacuous(node.pop("unevaluatedItems", True)) and isinstance(node.get("items", []), list):
        raise unsupported("unevaluatedItems", where, "Use items.")


def _contains(node: Schema, where: str) -> None:
    wanted = node.get("contains")
    least, most = node.pop("minContains", 1), node.pop("maxContains", None)
    if wanted is None:
        return
    if vacuous(wanted):
        node["minItems"] = max(node.get("minItems", 0), least)
        if most is not None:
            node["maxItems"] = min(node.get("maxItems", most), most)
    elif least or most is not None:
        raise unsupported("contains", where)
    del node["contains"]


def _objects(node: Schema, where: str, resolve: Resolve) -> None:
    if "object" not in types_of(node):
        for word in ("propertyNames", "dependentRequired", "dependentSchemas", "dependencies", "unevaluatedProperties"):
            node.pop(word, None)
        return
    by_itself = [name for name, rule in node.get("properties", {}).items() if _requires_itself(rule)]
    if by_itself:  # of the third draft, where a property said it of itself
        node["required"] = [
            *node.get("required", ()),
            *(name for name in by_itself if name not in node.get("required", ())),
        ]
    _dependencies(node, where)
    # What additionalProperties speaks of is evaluated.
    if not vacuous(node.pop("unevaluatedProperties", True)) and "additionalProperties" not in node:
        raise unsupported("unevaluatedProperties", where, "Use additionalProperties.")
    _property_names(node, where, resolve)
    _property_counts(node, where)


def _requires_itself(rule: Any) -> bool:
    return isinstance(rule, dict) and rule.get("required") is True


def _dependencies(node: Schema, where: str) -> None:
    """Properties that ask for others: nothing where they cannot be there, `required` where they always are."""
    closed = node.get("additionalProperties") is False and "patternProperties" not in node
    for word in ("dependentRequired", "dependentSchemas", "dependencies"):
        rules = node.pop(word, {})
        if not isinstance(rules, dict):
            raise Refused(f"has {word} that are no object{f' at {where}' if where else ''}.")
        required = node.get("required", [])
        for name, rule in rules.items():
            if vacuous(rule) or rule == [] or (closed and name not in node.get("properties", {})):
                continue
            if not isinstance(rule, list):
                raise unsupported(word, where)
            missing = [other for other in rule if other not in required]
            if missing and name not in required:
                raise unsupported(word, where)
            required = [*required, *missing]
        if required:
            node["required"] = required


def _property_names(node: Schema, where: str, resolve: Resolve) -> None:
    names = node.pop("propertyNames", True)
    for _ in range(32):
        target = (
            resolve(names.get("$ref")) if isinstance(names, dict) and len(names.keys() - ANNOTATIONS) == 1 else None
        )
        names = target if target is not None else names
    if vacuous(names) or names == {}:
        return
    if not isinstance(names, dict):
        raise unsupported("propertyNames", where)
    rules = {word: value for word, value in names.items() if word not in ANNOTATIONS}
    kind = rules.pop("type", "string")
    if kind != "string" and (not isinstance(kind, list) or "string" not in kind):
        raise unsupported("propertyNames", where)
    if rules.get("format", "unknown") not in FORMATS or rules.get("format") == "unknown":
        rules.pop("format", None)
    if not rules.get("minLength", 1):
        del rules["minLength"]
    values = node.get("additionalProperties", True)
    if not rules or (values is False and "patternProperties" not in node and "properties" not in node):
        return
    listed = [rules["const"]] if "const" in rules else rules.get("enum")
    if "patternProperties" in node or (isinstance(listed, list) and len(rules) > 1):
        raise unsupported("propertyNames", where)
    properties = node.get("properties", {})
    if isinstance(listed, list):
        kept = {name: schema for name, schema in properties.items() if name in listed}
        more = {name: values for name in listed if isinstance(name, str) and name not in kept}
        node["properties"] = {**kept, **(more if values is not False else {})}
        node["additionalProperties"] = False
        return
    pattern = _name_pattern(rules)
    if pattern is None:
        raise unsupported("propertyNames", where)
    check_repeats(pattern)
    if any(re.search(pattern, name) is None for name in properties):
        raise unsupported("propertyNames", where)
    if values is not False:
        node["patternProperties"], node["additionalProperties"] = {pattern: values}, False


def _name_pattern(rules: Schema) -> str | None:
    """One pattern for rules about a name; None where they take more than one."""
    if rules.keys() == {"pattern"} and isinstance(rules["pattern"], str):
        try:
            re.compile(rules["pattern"])
        except re.error:
            return None
        return rules["pattern"]
    if rules.keys() <= {"minLength", "maxLength"}:
        least, most = rules.get("minLength", 0), rules.get("maxLength", "")
        if isinstance(least, int) and isinstance(most, int | str):
            return rf"^[\s\S]{{{least},{most}}}$"
    return None


def _property_counts(node: Schema, where: str) -> None:
    """Counts of properties say nothing where those that are required, or all that there may be, are enough."""
    properties, required = node.get("properties", {}), node.get("required", [])
    if node.get("minProperties", 0) <= len(set(required)):
        node.pop("minProperties", None)
    closed = node.get("additionalProperties") is False and "patternProperties" not in node
    if closed and node.get("maxProperties", 0) >= len(properties):
        node.pop("maxProperties", None)
    for word in ("minProperties", "maxProperties"):
        if word in node and any(name not in required for name in properties):
            raise unsupported(word, where, "It is enforced for objects whose listed properties are all required.")


def _references(node: Schema, where: str, resolve: Resolve) -> None:
    if node.get("$recursiveRef") == "#":
        node["$ref"] = node.pop("$recursiveRef")
    for word in ("$recursiveRef", "$dynamicRef"):
        if word in node:
            raise unsupported(word, where, "Use $ref.")


RULES: tuple[Callable[[Schema, str, Resolve], None], ...] = (
    _shapes, _references, _values, _counts, _bounds, _strings, _arrays, _objects,
)  # fmt: skip
