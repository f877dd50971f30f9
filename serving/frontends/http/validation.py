"""pydantic's findings about a body as one sentence in OpenAI's words: the first field at fault, what it takes, what it got."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from serving.errors import ErrorKind, RequestError, kind_of

_KINDS = {
    "string_type": "text", "int_type": "a whole number", "int_from_float": "a whole number", "float_type": "a number",
    "bool_type": "true or false", "list_type": "a list", "dict_type": "an object", "model_type": "an object",
    "model_attributes_type": "an object", "tuple_type": "a list", "none_required": "null",
}  # fmt: skip
_BUILTIN = ("str", "int", "float", "bool", "none", "nullable", "lax-or-strict")


def error_of(error: ValidationError) -> RequestError:
    """The error for the client: INVALID_ARGUMENT with `param` as the client wrote it and one of OpenAI's codes.

    A field may take one of several forms (a union): pydantic then tells what is wrong with each, and the sentence names them all.
    """
    found = error.errors(include_url=False, include_context=True)
    first = max(found, key=lambda one: len(_path(one)))
    param = _spelled(_path(first)) or None
    same = [one for one in found if _spelled(_path(one)) == (param or "")]
    name = f"'{param}'" if param else "The body"
    literals = [one for one in same if one["type"] == "literal_error"]
    takes = list(dict.fromkeys(kind for one in same if (kind := _KINDS.get(one["type"])) is not None))
    if not takes and not literals and any(one["type"] == "missing" for one in same) and first["type"] != "missing":
        first = next(one for one in same if one["type"] == "missing")
    got = kind_of(first["input"])
    if first["type"] == "missing":
        if _crosses_union(first):
            return _invalid(f"Invalid type for {name}: it has none of the forms it may have.", param, "invalid_type")
        return _invalid(f"Missing required parameter: {name}.", param, "missing_required_parameter")
    if literals and (isinstance(first["input"], str) or not takes):
        allowed = literals[0].get("ctx", {}).get("expected", "")
        return _invalid(
            f"Invalid value for {name}: it takes {allowed}, got {_shown(first['input'])}.", param, "invalid_value"
        )
    if takes:
        if literals:
            takes.append(literals[0].get("ctx", {}).get("expected", ""))
        return _invalid(f"Invalid type for {name}: it takes {_either(takes)}, got {got}.", param, "invalid_type")
    if first["type"] == "finite_number":
        return _invalid(f"Invalid value for {name}: it takes a finite number.", param, "invalid_value")
    return _invalid(f"Invalid value for {name}: got {_shown(first['input'])}.", param, "invalid_value")


def _invalid(message: str, param: str | None, code: str) -> RequestError:
    return RequestError(ErrorKind.INVALID_ARGUMENT, message, param=param, code=code)


def _is_class(part: Any) -> bool:
    return isinstance(part, str) and part[:1].isupper() and part.isalnum()


def _path(one: Any) -> list[Any]:
    """Where it is, in the client's terms: without the names of a union's members, and not into an object that is only one of
    several forms."""
    path: list[Any] = []
    for part in one["loc"]:
        if isinstance(part, str) and (part in _BUILTIN or "[" in part):
            continue
        if _is_class(part):
            break
        path.append(part)
    return path


def _crosses_union(one: Any) -> bool:
    return any(_is_class(part) for part in one["loc"])


def _spelled(path: list[Any]) -> str:
    """`messages[0].role`."""
    out = ""
    for part in path:
        out += f"[{part}]" if isinstance(part, int) else f".{part}" if out else str(part)
    return out[:256]


def _shown(value: Any) -> str:
    return repr(value[:64]) if isinstance(value, str) else kind_of(value)


def _either(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
