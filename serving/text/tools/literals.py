"""Tool calls in notations that are not JSON: Python's, and Gemma's `call:f{a:1}`."""

from __future__ import annotations

import ast
import math
from typing import Any

MAX_BUFFERED = 1 << 16
MAX_BRACKETS = 64
_JSON_NAMES = {"true": True, "false": False, "null": None}


class Unquoted(str):
    """A text that stood without quotes where a notation quotes its strings: what it is, the schema says."""


class BracketCounter:
    """Tells where the first bracketed expression of a text ends, one character at a time.

    Args:
        quotes: what opens and closes a string, in which brackets do not count.
        escapes: a backslash takes the next character's meaning away.
    """

    def __init__(self, quotes: tuple[str, ...], escapes: bool) -> None:
        self._quotes, self._escapes = quotes, escapes
        self._depth = 0
        self._quote = ""
        self._tail = ""
        self._escaped = False
        self._longest = max(map(len, quotes))

    def feed(self, char: str) -> bool:
        """Whether the expression ends with this character.

        Raises:
            ValueError: brackets are nested too deeply to be read safely.
        """
        if self._escaped:
            self._escaped = False
            return False
        if self._escapes and self._quote and char == "\\":
            self._escaped = True
            return False
        self._tail = (self._tail + char)[-self._longest :]
        for quote in self._quotes:
            if self._tail.endswith(quote) and self._quote in ("", quote):
                self._quote = "" if self._quote else quote
                self._tail = ""
                return False
        if self._quote:
            return False
        if char in "([{":
            self._depth += 1
            if self._depth > MAX_BRACKETS:
                raise ValueError("nested too deeply")
        elif char in ")]}":
            self._depth -= 1
            return self._depth <= 0
        return False


def python_calls(text: str) -> list[tuple[str, dict[str, Any]]]:
    """The calls in `[f(a=1), g(b="x")]` or `f(a=1)`: (name, arguments).

    Raises:
        ValueError: it is not a list of calls with named literal arguments.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError("not Python") from None
    nodes = tree.elts if isinstance(tree, ast.List) else [tree]
    return [_python_call(node) for node in nodes]


def python_literal(text: str) -> Any:
    """The value of a Python literal, as JSON could hold it.

    Raises:
        ValueError: it is something else, or nested too deeply.
    """
    if max_depth(text) > MAX_BRACKETS or len(text) > MAX_BUFFERED:
        raise ValueError("nested too deeply")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError("not Python") from None
    return _literal(tree)


def max_depth(text: str) -> int:
    """How deep the brackets of a text go, those in strings included."""
    depth = deepest = 0
    for char in text:
        if char in "([{":
            depth += 1
            deepest = max(deepest, depth)
        elif char in ")]}":
            depth -= 1
    return deepest


def _python_call(node: ast.expr) -> tuple[str, dict[str, Any]]:
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "print" and len(node.args) == 1 and not node.keywords:
        node = node.args[0]  # as Gemma writes code that shows what a call gives
    if not isinstance(node, ast.Call) or node.args:
        raise ValueError("not a call with named arguments")
    arguments: dict[str, Any] = {}
    for keyword in node.keywords:
        if keyword.arg is None:
            raise ValueError("** in a call")
        arguments[keyword.arg] = _literal(keyword.value)
    return ast.unparse(node.func), arguments


def _literal(node: ast.expr) -> Any:
    if isinstance(node, ast.Constant) and (node.value is None or isinstance(node.value, str | int | float | bool)):
        if isinstance(node.value, float) and not math.isfinite(node.value):
            raise ValueError("a number that JSON does not have")
        return node.value
    if isinstance(node, ast.Name) and node.id in _JSON_NAMES:
        return _JSON_NAMES[node.id]
    if isinstance(node, ast.List | ast.Tuple):
        return [_literal(item) for item in node.elts]
    if isinstance(node, ast.Dict):
        keys = [_literal(key) if key is not None else None for key in node.keys]
        if not all(isinstance(key, str) for key in keys):
            raise ValueError("keys must be texts")
        return dict(zip(keys, map(_literal, node.values), strict=True))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _literal(node.operand)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return -value
    raise ValueError("not a literal")


def braced_call(text: str, quote: str) -> tuple[str, dict[str, Any]]:
    """The call in `call:f{a:1,b:<escape>x<escape>}`: (name, arguments). Scalars without quotes are `Unquoted` texts.

    Raises:
        ValueError: it is not such a call.
    """
    head, brace, rest = text.strip().partition("{")
    prefix, colon, name = head.partition(":")
    if not brace or not colon or prefix.strip() != "call" or not name.strip():
        raise ValueError("not a call")
    value, end = _braced("{" + rest, 0, quote)
    if end != len(rest) + 1 or not isinstance(value, dict):
        raise ValueError("not a call")
    return name.strip(), value


def _braced(text: str, at: int, quote: str) -> tuple[Any, int]:
    """(value, position behind it). `BracketCounter` has limited the depth."""
    at = _skip(text, at)
    if text.startswith(quote, at):
        end = text.index(quote, at + len(quote))
        return text[at + len(quote) : end], end + len(quote)
    opener = text[at : at + 1]
    if opener not in ("{", "["):
        end = at
        while end < len(text) and text[end] not in ",]}":
            end += 1
        return _scalar(text[at:end].strip()), end
    closer = "}" if opener == "{" else "]"
    items: list[Any] = []
    pairs: dict[str, Any] = {}
    at = _skip(text, at + 1)
    while not text.startswith(closer, at):
        if opener == "{":
            key, at = _key(text, at, quote)
            pairs[key], at = _braced(text, at, quote)
        else:
            item, at = _braced(text, at, quote)
            items.append(item)
        at = _skip(text, at)
        if text.startswith(",", at):
            at = _skip(text, at + 1)
        elif not text.startswith(closer, at):
            raise ValueError("a comma or the end was expected")
    return (pairs if opener == "{" else items), at + 1


def _key(text: str, at: int, quote: str) -> tuple[str, int]:
    if text.startswith(quote, at):
        end = text.index(quote, at + len(quote))
        key, at = text[at + len(quote) : end], _skip(text, end + len(quote))
        if not text.startswith(":", at):
            raise ValueError("a colon was expected")
        return key, at + 1
    end = text.index(":", at)
    return text[at:end].strip(), end + 1


def _scalar(text: str) -> Unquoted:
    if not text:
        raise ValueError("a value is missing")
    return Unquoted(text)


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at
