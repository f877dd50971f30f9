"""JSON that came from outside, with its size looked at before any of it becomes an object.

A byte of JSON can become a hundred of objects (`[{},{},...]`), each of which a later check would walk through; and brackets in
brackets end in a RecursionError wherever they are walked. Both are counted in the text, at 5 to 40 ms for 16 MiB, whichever way
in it came: a body, a line of a batch, a tool's schema in a gRPC message.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from serving.errors import RequestError, invalid
from serving.service.requests.limits import Limits

PIECE = 1 << 18
"""Bytes looked at without letting other threads in between: a millisecond or three."""

_ESCAPED = re.compile(rb"\\.", re.DOTALL)
_OTHER = bytes(i for i in range(256) if i not in b'{}[],"\\')
_NO_BRACKET = bytes(i for i in range(256) if i not in b"{}[]")


def read_json(raw: bytes | str, limits: Limits, what: str = "The body", param: str | None = None) -> Any:
    """The value of a JSON text. May take long for a large one: keep that off an event loop.

    Args:
        what: begins the sentence of an error.
        param: the request's field that holds the text, if it is one.
    Raises:
        RequestError: INVALID_ARGUMENT: not JSON, more values than `max_json_values`, or nested deeper than `max_json_depth`.
    """
    data = raw.encode("utf-8", "surrogatepass") if isinstance(raw, str) else raw
    if data[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\x00" in data[:4]:
        raise invalid(
            f"{what} must be UTF-8.", param
        )  # json.loads would take UTF-16, whose brackets nobody has counted
    _check_text(data, limits, what, param)
    try:
        return json.loads(raw, parse_constant=_no_constant)
    except UnicodeDecodeError:
        raise invalid(f"{what} must be UTF-8.", param) from None
    except _ConstantError as error:
        raise invalid(f"{what} is not valid JSON: {error}.", param) from None
    except ValueError as error:
        known = isinstance(
            error, json.JSONDecodeError
        )  # the other one is about the digits of a number, in Python's words
        why = f"{error.msg} at character {error.pos}" if known else "a number has too many digits"
        raise invalid(f"{what} is not valid JSON: {why}.", param) from None


def check_nesting(value: Any, limits: Limits, param: str) -> None:
    """Refuses Python values (of `LLM`, or of a field) that are nested too deeply or have too many members. Loops, not recursion.

    Raises:
        RequestError: INVALID_ARGUMENT.
    """
    level, depth, count = [value], 0, 0
    while level:
        below: list[Any] = []
        for one in level:
            if isinstance(one, Mapping):
                below.extend(one.values())
            elif isinstance(one, Sequence) and not isinstance(one, str | bytes):
                below.extend(one)
        count += len(below)
        depth += 1
        if depth > limits.max_json_depth + 1:
            raise _too_deep(param, limits, param)
        if count > limits.max_json_values:
            raise _too_many(param, limits, param)
        level = below


def _check_text(data: bytes, limits: Limits, what: str, param: str | None) -> None:
    if data.count(b"{") + data.count(b"[") + data.count(b",") <= min(limits.max_json_values, limits.max_json_depth):
        return  # as in nearly every request that is not long
    in_string, count, depth, deepest = False, 0, 0, 0
    at = 0
    while at < len(data):
        end = at + PIECE
        piece = data[at:end]
        # A piece does not end inside an escape: an odd number of backslashes at its end takes the next byte in.
        tail = len(piece) - len(piece.rstrip(b"\\"))
        if tail == len(piece) or tail % 2:
            end += 1 if tail % 2 else 0
            piece = data[at:end]
        at = end
        if b"\\" in piece:
            piece = _ESCAPED.sub(b"", piece)
        parts = piece.translate(None, _OTHER).split(b'"')
        outside = b"".join(parts[1 if in_string else 0 :: 2])
        in_string ^= len(parts) % 2 == 0
        brackets = outside.translate(None, _NO_BRACKET)
        count += outside.count(b",") + outside.count(b"{") + outside.count(b"[")
        if count > limits.max_json_values:
            raise _too_many(what, limits, param)
        for bracket in brackets:
            depth += 1 if bracket in b"{[" else -1
            deepest = max(deepest, depth)
        if deepest > limits.max_json_depth:
            raise _too_deep(what, limits, param)


def _too_many(what: str, limits: Limits, param: str | None) -> RequestError:
    return invalid(f"{what} has more than {limits.max_json_values} values; send fewer at once.", param)


def _too_deep(what: str, limits: Limits, param: str | None) -> RequestError:
    return invalid(f"{what} has lists or objects nested more than {limits.max_json_depth} deep.", param)


class _ConstantError(ValueError):
    """What Python takes for a number and JSON does not."""


def _no_constant(name: str) -> Any:
    raise _ConstantError(f"{name} is no JSON number")
