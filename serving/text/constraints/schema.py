"""JSON schemas as the grammar compiler can take them: what restricts nothing is left out, what has the same meaning in
another spelling is spelt so, and what cannot be enforced is refused by name.

The rules are those of JSON Schema 2020-12 with the older drafts' spellings (`definitions`, boolean `exclusiveMinimum`,
lists in `items`). Every value that the rewritten schema admits satisfies the given one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from urllib.parse import quote, unquote

from serving.errors import invalid
from serving.text.constraints.conditions import conditions, negations
from serving.text.constraints.schema_rules import RULES, TYPES, Refused, types_of

MAX_DEPTH = 200
MAX_NODES = 50_000
IN_PLACE = ("allOf", "anyOf", "oneOf")
_ONE = ("items", "additionalItems", "additionalProperties")
_MANY = ("prefixItems", *IN_PLACE)
_NAMED = ("properties", "patternProperties")
_DRAFTS = ("http://json-schema.org/draft-04/", "http://json-schema.org/draft-06/", "http://json-schema.org/draft-07/")

Schema = dict[str, Any]


def prepare(schema: Mapping[str, Any], param: str, closed: bool = False, what: str = "The JSON schema") -> Schema:
    """A copy of `schema` for the grammar compiler.

    Args:
        param: the request's field, for errors.
        closed: objects that list their properties and do not say `additionalProperties` have no others, as OpenAI's
            strict schemas demand and other servers' forced calls have it: small models would invent keys without end.
        what: how errors call it.
    Raises:
        RequestError: INVALID_ARGUMENT: it is no schema, allows no value, or uses what cannot be enforced.
    """
    try:
        return _Document(schema, closed).prepared()
    except Refused as error:
        raise invalid(f"{what} {error}", param) from None
    except RecursionError:
        raise invalid(f"{what} is nested too deeply.", param) from None


class _Document:
    """One schema with what its references point to. Works on a copy, in place."""

    def __init__(self, schema: Mapping[str, Any], closed: bool) -> None:
        text = json.dumps(schema, ensure_ascii=False)
        if not text.isascii() and text.encode(errors="replace").decode() != text:
            raise Refused("holds half of a character (a lone surrogate), which is no text.")
        self._root: Schema = json.loads(text)
        self._closed = closed
        self._done: set[int] = set()
        self._merged: set[int] = set()  # nodes whose objects are described by other nodes too
        self._order: list[Schema] = []

    def prepared(self) -> Schema:
        self._visit(self._root, "", 0)
        self._refuse_loops()
        self._refuse_endless()
        if self._closed:
            for node in self._order:
                if id(node) not in self._merged:
                    _close(node)
        return self._root

    def _visit(self, node: Any, where: str, depth: int) -> None:
        """Rewrites `node` and what it holds and refers to. What nothing refers to is left alone."""
        if isinstance(node, bool):
            return
        if not isinstance(node, dict):
            raise Refused(f"must have an object or a boolean at {where or 'its top'}, got {json.dumps(node)[:40]}.")
        if id(node) in self._done:
            return
        if depth > MAX_DEPTH:
            raise Refused(f"is nested too deeply: more than {MAX_DEPTH} levels.")
        self._done.add(id(node))
        self._order.append(node)
        if len(self._order) > MAX_NODES:
            raise Refused(f"has too many parts: more than {MAX_NODES} are not compiled.")
        if isinstance(node.get("$ref"), str):
            node["$ref"] = self._local(node["$ref"])
        draft = node.get("$schema")
        if isinstance(draft, str) and not draft.startswith(_DRAFTS):
            del node["$schema"]  # 2020-12 is understood without a name, and a name may be of anything
        for rule in (*RULES, conditions, negations):
            rule(node, where, self.resolve)
        target = self._target(node, where)
        if target is not None:
            self._visit(target, where, depth + 1)
        for place, child in _children(node):
            self._visit(child, f"{where}.{place}".lstrip("."), depth + 1)
        self._mark_merged(node, target)

    def _mark_merged(self, node: Schema, target: Schema | None) -> None:
        """Notes which nodes describe an object together with others, so that none of them may close it alone."""
        parts = [part for word in IN_PLACE for part in node.get(word, ()) if isinstance(part, dict)]
        own = "properties" in node or "patternProperties" in node
        together = [part for part in node.get("allOf", ()) if isinstance(part, dict)]
        if own and (target is not None or any(_describes(part, self.resolve) for part in parts)):
            self._merged.add(id(node))
        if own or len(together) + (target is not None) + bool(len(parts) > len(together)) > 1:
            for part in [*parts, *([target] if target is not None else ())]:
                self._mark_in_place(part, 0)
        if id(node) in self._merged:
            self._mark_in_place(node, 0)

    def _mark_in_place(self, node: Schema, depth: int) -> None:
        if depth > MAX_DEPTH or (depth and id(node) in self._merged):
            return
        self._merged.add(id(node))
        for word in IN_PLACE:
            for part in node.get(word, ()):
                if isinstance(part, dict):
                    self._mark_in_place(part, depth + 1)
        target = self.resolve(node.get("$ref"))
        if target is not None:
            self._mark_in_place(target, depth + 1)

    def _target(self, node: Schema, where: str) -> Schema | None:
        ref = node.get("$ref")
        if ref is None:
            return None
        if not isinstance(ref, str):
            raise Refused(f"has a $ref that is no text at {where or 'its top'}.")
        if not ref.startswith("#"):
            raise Refused(f"refers to {ref[:100]!r}, which is outside of it. Put it into $defs.")
        found = self.resolve(ref)
        if found is None:
            raise Refused(f"refers to {ref[:100]!r}, which it does not have.")
        return found

    def _local(self, ref: str) -> str:
        """A reference by this document's own address or by a part's `$id` as one into the document, in the letters of a URI."""
        own = self._root.get("$id")
        if isinstance(own, str) and own.partition("#")[0] and ref.partition("#")[0] == own.partition("#")[0]:
            ref = "#" + ref.partition("#")[2]
        if not ref.startswith("#"):
            return next((path for path, node in self._places() if node.get("$id") == ref), ref)
        name = ref[1:]
        if unquote(name) != name and self.resolve("#" + unquote(name)) is not None:
            name = unquote(name)
        return "#" + quote(name, safe="/$~:@!&'()*+,;=")

    def resolve(self, ref: Any) -> Any:
        """What a reference into this document points to (RFC 6901, or an `$anchor`); None for nothing."""
        if not isinstance(ref, str) or not ref.startswith("#"):
            return None
        if len(ref) > 1 and not ref.startswith("#/"):
            return next((node for node in self._nodes() if node.get("$anchor") == ref[1:]), None)
        found: Any = self._root
        for escaped in ref[1:].split("/")[1:]:
            part = escaped.replace("~1", "/").replace("~0", "~")
            if isinstance(found, list):
                found = found[int(part)] if part.isdigit() and int(part) < len(found) else None
            elif isinstance(found, dict):
                found = found.get(part, found.get(unquote(part)))
            else:
                return None
        return found

    def _nodes(self) -> Iterator[Schema]:
        return (node for _, node in self._places())

    def _places(self) -> Iterator[tuple[str, Schema]]:
        """Every object of the document, with the reference to it."""
        stack: list[tuple[str, Any]] = [("#", self._root)]
        while stack:
            path, node = stack.pop()
            if isinstance(node, dict):
                yield path, node
                stack += ((f"{path}/{name.replace('~', '~0').replace('/', '~1')}", part) for name, part in node.items())
            elif isinstance(node, list):
                stack += ((f"{path}/{place}", part) for place, part in enumerate(node))

    def _refuse_loops(self) -> None:
        """A schema that refers to itself without a part of the value in between says nothing about any value."""
        state: dict[int, int] = {}

        def follow(node: Any) -> None:
            if not isinstance(node, dict) or state.get(id(node)) == 2:
                return
            if state.get(id(node)) == 1:
                raise Refused("refers to itself without end: a $ref leads back to where it stands.")
            state[id(node)] = 1
            for word in IN_PLACE:
                for part in node.get(word, ()):
                    follow(part)
            follow(self.resolve(node.get("$ref")))
            state[id(node)] = 2

        for node in self._order:
            follow(node)

    def _refuse_endless(self) -> None:
        """A schema that needs a value of itself inside each value is satisfied by none that ends."""
        finite: set[int] = set()

        def is_finite(node: Any) -> bool:
            return node is not False if isinstance(node, bool) else id(node) in finite

        def ends(node: Schema) -> bool:
            target = self.resolve(node.get("$ref"))
            if (target is not None and not is_finite(target)) or not all(map(is_finite, node.get("allOf", ()))):
                return False
            if not all(any(map(is_finite, node[word])) for word in ("anyOf", "oneOf") if word in node):
                return False
            if "const" in node or "enum" in node or types_of(node) & _SCALARS:
                return True
            if "array" in types_of(node):
                given = node.get("prefixItems", ())
                items = [*given[: node.get("minItems", 0)]]
                if node.get("minItems", 0) > len(given) and not isinstance(node.get("items"), list):
                    items.append(node.get("items", True))
                if all(map(is_finite, items)):
                    return True
            properties = node.get("properties", {})
            return "object" in types_of(node) and all(
                is_finite(properties.get(name, True)) for name in node.get("required", ())
            )

        for _ in range(MAX_DEPTH):
            found = [id(node) for node in reversed(self._order) if id(node) not in finite and ends(node)]
            finite.update(found)
            if not found:
                break
        if id(self._root) not in finite:
            raise Refused("is satisfied by no value that ends: one would need another inside it, and so on.")


_SCALARS = frozenset(TYPES) - {"array", "object"}


def _children(node: Schema) -> Iterator[tuple[str, Any]]:
    for word in _ONE:
        if word in node and not isinstance(node[word], list):
            yield word, node[word]
    for word in (*_MANY, *_ONE):
        if isinstance(node.get(word), list):
            for i, child in enumerate(node[word]):
                yield f"{word}.{i}", child
    for word in _NAMED:
        for name, child in node.get(word, {}).items():
            yield f"{word}.{name}"[:80], child


def _describes(node: Any, resolve: Callable[[Any], Any], depth: int = 0) -> bool:
    """Whether a schema lists properties of the value itself, at once or by others in its place."""
    if not isinstance(node, dict) or depth > 32:
        return False
    if "properties" in node or "patternProperties" in node:
        return True
    parts = [part for word in IN_PLACE for part in node.get(word, ()) if isinstance(part, dict)]
    target = resolve(node.get("$ref"))
    return any(_describes(part, resolve, depth + 1) for part in (*parts, *([target] if target else ())))


def _close(node: Schema) -> None:
    if not isinstance(node.get("properties"), dict) or "additionalProperties" in node or "patternProperties" in node:
        return
    for name in node.get("required", ()):
        node["properties"].setdefault(name, {})
    node["additionalProperties"] = False
