"""Items of a response: as messages of a chat, as they are kept, and as lists of them are told."""

from __future__ import annotations

import base64
import binascii
import json
import uuid
import zlib
from collections.abc import Sequence
from typing import Any

from serving.errors import invalid

MAX_REASONING_CHARS = 1 << 20
_MARK = "jaxserve-reasoning:"
_PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc", "custom_tool_call": "ctc"}
_CALLS = {"function_call": "arguments", "custom_tool_call": "input"}
_RESULTS = ("function_call_output", "custom_tool_call_output")
MAX_PAGE = 100


def add_item(messages: list[dict[str, Any]], item: dict[str, Any], where: str, origins: dict[str, str]) -> None:
    """Adds one item to a chat. All that the model wrote in one turn becomes one message: templates want roles to alternate.

    Args:
        where: the item's place, as errors name it.
        origins: gets the place of the message.
    Raises:
        RequestError: INVALID_ARGUMENT naming the place.
    """
    kind = item.get("type", "message")
    last = messages[-1] if messages and messages[-1].get("role") == "assistant" else None
    if kind == "message":
        _add_message(messages, item, last)
    elif kind in _CALLS:
        turn = _turn(messages, last)
        turn.setdefault("tool_calls", []).append(_call(item, where))
    elif kind in _RESULTS:
        messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")})
    elif kind == "reasoning":
        text = _thought(item)
        if text:
            turn = _turn(messages, last)
            turn["reasoning"] = turn.get("reasoning", "") + text
    else:
        raise invalid(f"{where} is of type {str(kind)[:64]!r}, which this server does not take.", f"{where}.type")
    place = f"messages[{len(messages) - 1}]"
    origins[place] = where
    if kind in _RESULTS:
        origins[f"{place}.content"] = f"{where}.output"


def _turn(messages: list[dict[str, Any]], last: dict[str, Any] | None) -> dict[str, Any]:
    """The assistant's message that is being put together."""
    if last is None:
        last = {"role": "assistant", "content": None}
        messages.append(last)
    return last


def _add_message(messages: list[dict[str, Any]], item: dict[str, Any], last: dict[str, Any] | None) -> None:
    content = item.get("content")
    if item.get("role") == "assistant" and last is not None and isinstance(content, str | list):
        last["content"] = [*_parts(last["content"]), *_parts(content)] if last["content"] is not None else content
    else:
        messages.append({"role": item.get("role"), "content": content})


def _call(item: dict[str, Any], where: str) -> dict[str, Any]:
    kind = item["type"]
    name, given, call_id = item.get("name"), item.get(_CALLS[kind]), item.get("call_id")
    if not (isinstance(name, str) and isinstance(given, str) and isinstance(call_id, str)):
        raise invalid(f"{where} needs name, {_CALLS[kind]} and call_id, each a string.", where)
    arguments = given if kind == "function_call" else json.dumps({"input": given}, ensure_ascii=False)
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def _parts(content: Any) -> list[Any]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


# -- thinking ------------------------------------------------------------------------------------------------------------


def sealed(text: str) -> str:
    """Thinking as `encrypted_content`, which clients send back unread. It is packed, not encrypted: an open model's thinking is no
    secret, and stands beside it."""
    return base64.b64encode(_MARK.encode() + zlib.compress(text.encode("utf-8", "surrogatepass"))).decode()


def _thought(item: dict[str, Any]) -> str:
    """The text of an item of thinking, if it has one: by itself, or in what `sealed` made. Others' is passed over."""
    parts = item.get("content")
    texts = [part.get("text") for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []
    found = "".join(text for text in texts if isinstance(text, str))
    seal = item.get("encrypted_content")
    if found or not isinstance(seal, str):
        return found
    try:
        raw = base64.b64decode(seal, validate=True)
        if not raw.startswith(_MARK.encode()):
            return ""
        return zlib.decompressobj().decompress(raw[len(_MARK) :], MAX_REASONING_CHARS).decode("utf-8")
    except (ValueError, binascii.Error, zlib.error):
        return ""


# -- what is kept --------------------------------------------------------------------------------------------------------


def as_items(given: str | Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """An input as items, each with a type and an id, texts as parts: how lists of them are told."""
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    return [_with_id(item) for item in given]


def _with_id(item: dict[str, Any]) -> dict[str, Any]:
    kind = item.get("type", "message")
    made = {**item, "type": kind}
    if not isinstance(made.get("id"), str) or not made["id"]:
        made["id"] = f"{_PREFIXES.get(kind, 'item')}_{uuid.uuid4().hex}"
    if kind == "message":
        made.setdefault("status", "completed")
        if isinstance(item.get("content"), str):
            part: dict[str, Any] = {"type": "input_text", "text": item["content"]}
            if item.get("role") == "assistant":
                part = {"type": "output_text", "text": item["content"], "annotations": [], "logprobs": []}
            made["content"] = [part]
    return made


def listed(items: Sequence[dict[str, Any]], limit: int, after: str | None, newest_first: bool) -> dict[str, Any]:
    """A page of items, as OpenAI lists them.

    Raises:
        RequestError: INVALID_ARGUMENT: the limit, or an `after` that is none of them.
    """
    if not 1 <= limit <= MAX_PAGE:
        raise invalid(f"limit must be between 1 and {MAX_PAGE}, got {limit}.", "limit")
    ordered = list(reversed(items)) if newest_first else list(items)
    if after is not None:
        at = next((i for i, item in enumerate(ordered) if item.get("id") == after), None)
        if at is None:
            raise invalid("after names no item of this list.", "after")
        ordered = ordered[at + 1 :]
    page = ordered[:limit]
    ends = {"first_id": page[0].get("id") if page else None, "last_id": page[-1].get("id") if page else None}
    return {"object": "list", "data": page, "has_more": len(ordered) > limit, **ends}
