"""A conversation in Ollama's messages as one in OpenAI's, which chat templates know."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from serving.errors import invalid


def as_messages(given: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The same conversation. Calls have no ids there: they get one each, and a tool's message answers the first call that waits,
    of its tool where it names one.

    Raises:
        RequestError: INVALID_ARGUMENT naming the message.
    """
    out: list[dict[str, Any]] = []
    waiting: list[tuple[str, str]] = []  # (id, name) of calls without a result
    for i, message in enumerate(given):
        where = f"messages[{i}]"
        if not isinstance(message, Mapping):
            raise invalid(f"{where} must be an object with role and content.", where)
        one: dict[str, Any] = {"role": message.get("role"), "content": _content(message, where)}
        if isinstance(message.get("thinking"), str) and message["thinking"]:
            one["reasoning"] = message["thinking"]
        calls = message.get("tool_calls")
        if calls:
            if not isinstance(calls, Sequence) or isinstance(calls, str):
                raise invalid(f"{where}.tool_calls must be a list.", f"{where}.tool_calls")
            one["tool_calls"] = [
                _call(call, f"call_{i}_{j}", f"{where}.tool_calls[{j}]") for j, call in enumerate(calls)
            ]
            waiting += [(call["id"], call["function"]["name"]) for call in one["tool_calls"]]
        if one["role"] == "tool":
            name = message.get("tool_name") or message.get("name")
            one["tool_call_id"] = _answered(waiting, message.get("tool_call_id"), name)
            if isinstance(name, str):
                one["name"] = name
        out.append(one)
    return out


def _content(message: Mapping[str, Any], where: str) -> Any:
    text, images = message.get("content"), message.get("images")
    if not images:
        return text if text is not None else ""
    if not isinstance(images, Sequence) or isinstance(images, str) or not all(isinstance(one, str) for one in images):
        raise invalid(f"{where}.images must be a list of images in base64.", f"{where}.images")
    parts = [{"type": "image_url", "image_url": {"url": f"data:image/*;base64,{image}"}} for image in images]
    return [*([{"type": "text", "text": text}] if text else []), *parts]


def _call(call: Any, made_id: str, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        raise invalid(f"{where} must have a function with a name.", where)
    arguments = function.get("arguments")  # type: ignore[union-attr]
    text = arguments if isinstance(arguments, str) else json.dumps(arguments or {}, ensure_ascii=False)
    given = call.get("id")
    return {
        "id": given if isinstance(given, str) and given else made_id,
        "type": "function",
        "function": {"name": name, "arguments": text},
    }


def _answered(waiting: list[tuple[str, str]], asked: Any, name: Any) -> str:
    """The id of the call that a tool's message answers, which then waits no more."""
    by_id = next((one for one in waiting if one[0] == asked), None)
    found = by_id or next((one for one in waiting if one[1] == name), None) or (waiting[0] if waiting else None)
    if found is None:
        return asked if isinstance(asked, str) else "call_0"
    waiting.remove(found)
    return found[0]
