"""Bounds on a gRPC message's parts: how many, before it is parsed and again before its values are looked at.

Two bytes of a message can be an entry of a list (an empty message, an empty text), which takes a hundred bytes once it is parsed;
and what walks through a list does so on the event loop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from serving.errors import RequestError, invalid
from serving.service import Limits

LARGE_BYTES = 64 * 1024
"""A larger message is looked through before it is parsed, on a thread."""

COUNTS: dict[str, Callable[[Limits], int]] = {
    "messages": lambda limits: limits.max_messages,
    "tools": lambda limits: limits.max_tools,
    "tool_calls": lambda limits: limits.max_content_parts,
    "chat_template_kwargs": lambda limits: limits.max_template_arguments,
    "stop": lambda limits: limits.max_stop_strings,
    "inputs": lambda limits: limits.max_batch,
    "pairs": lambda limits: limits.max_batch,
    **dict.fromkeys(("bad_words", "stop_token_ids", "logit_bias"), lambda limits: limits.max_entries),
}
"""Repeated field -> how many entries it may have; others as many as a prompt may have characters."""

_LENGTH_DELIMITED = 2
_SKIPPED = {1: 8, 5: 4}  # fixed64, fixed32


def check_wire(data: bytes, kind: Any, limits: Limits) -> None:
    """Refuses serialized messages with more parts than `max_json_values`. Bytes that are no message pass: parsing tells.

    Args:
        kind: the message's descriptor.
    Raises:
        RequestError: INVALID_ARGUMENT.
    """
    left = limits.max_json_values
    waiting: list[tuple[int, int, Any]] = [(0, len(data), kind)]
    while waiting:
        at, end, kind = waiting.pop()
        fields = kind.fields_by_number
        while at < end:
            tag, at = _varint(data, at, end)
            wire = tag & 7
            if wire == 0:
                _, at = _varint(data, at, end)
            elif wire == _LENGTH_DELIMITED:
                size, at = _varint(data, at, end)
                field = fields.get(tag >> 3)
                left -= 1
                if left < 0:
                    raise invalid(f"The request has more than {limits.max_json_values} parts; send fewer at once.")
                if field is not None and field.message_type is not None and at + size <= end:
                    waiting.append((at, at + size, field.message_type))
                at += size
            elif wire in _SKIPPED:
                at += _SKIPPED[wire]
            else:
                return


def check_counts(message: Message, limits: Limits, where: str = "") -> None:
    """Refuses a parsed message with too many entries in one of its lists, whose lengths are looked at before their entries.

    Raises:
        RequestError: INVALID_ARGUMENT naming the field.
    """
    for field, value in message.ListFields():
        name = f"{where}{field.name}"
        if field.is_repeated:
            most = COUNTS.get(field.name, lambda limits: limits.max_prompt_chars)(limits)
            if len(value) > most:
                raise _too_many(name, len(value), most)
        if field.type != FieldDescriptor.TYPE_MESSAGE:
            continue
        for one in _messages(field, value):
            check_counts(one, limits, f"{name}.")


def _messages(field: Any, value: Any) -> Any:
    if not field.is_repeated:
        return (value,)
    if field.message_type.GetOptions().map_entry:
        return (one for one in value.values() if isinstance(one, Message))
    return value


def _too_many(name: str, count: int, most: int) -> RequestError:
    return invalid(f"{name} has {count} entries; at most {most} are taken.", name)


def _varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            return 0, end  # no varint: nothing more is looked at
    return value, end
