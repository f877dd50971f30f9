"""A chat's earlier turns in the one shape that templates know, whichever of OpenAI's APIs, or clients' habits, they came in."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from serving.service.requests.limits import Limits


def as_templates_know_it(messages: Sequence[Mapping[str, Any]], limits: Limits) -> list[dict[str, Any]]:
    """The messages with calls as `tool_calls`, their results as role "tool", and content where there is only a refusal.

    - The older `function_call` and role "function" become a call with an id of its own and the result of that.
    - Arguments that are nested too deeply to be walked count as none.

    Args:
        messages: checked by `check_messages`; not changed.
    """
    shaped, last_id = [], ""
    for i, message in enumerate(messages):
        one = dict(message)
        legacy = one.pop("function_call", None)
        if isinstance(legacy, Mapping) and not one.get("tool_calls"):
            last_id = f"call_{i}"
            one["tool_calls"] = [{"id": last_id, "type": "function", "function": dict(legacy)}]
        if one.get("role") == "function":
            one["role"] = "tool"
            one.setdefault("tool_call_id", last_id or f"call_{i}")
        if one.get("content") is None and isinstance(one.get("refusal"), str):
            one["content"] = one["refusal"]
        if isinstance(one.get("tool_calls"), list):
            one["tool_calls"] = [_bounded(call, limits) for call in one["tool_calls"]]
        shaped.append(one)
    return shaped


def _bounded(call: Any, limits: Limits) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    text = function.get("arguments") if isinstance(function, Mapping) else None
    if not isinstance(text, str) or text.count("[") + text.count("{") <= limits.max_json_depth:
        return call
    try:
        value = json.loads(text)
    except RecursionError:
        value = None
    except ValueError:
        return call
    if value is not None and _depth_within(value, limits.max_json_depth):
        return call
    return {**call, "function": {**function, "arguments": "{}"}}  # type: ignore[dict-item]


def _depth_within(value: Any, most: int) -> bool:
    level = [value]
    for _ in range(most + 1):
        level = [y for x in level if isinstance(x, dict | list) for y in (x.values() if isinstance(x, dict) else x)]
        if not level:
            return True
    return False
