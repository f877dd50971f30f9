"""A conversation in Anthropic's blocks as one in OpenAI's messages, which chat templates know."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from serving.errors import RequestError, invalid, kind_of

FAILED = "The tool failed."
"""The result of a tool that failed without a word."""


class Conversation:
    """Collects messages. A block that holds a tool's result becomes a message of its own; those of one turn stay in order.

    Attributes:
        messages: in OpenAI's shape.
        origins: place in `messages` -> what the client wrote there, for `RequestError.renamed`.
    """

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self.origins: dict[str, str] = {}
        self._last_is_open = False

    @property
    def is_open(self) -> bool:
        """Whether the last turn is the beginning of the answer: the model goes on with it."""
        return self._last_is_open

    def add_system(self, block: str | Mapping[str, Any], where: str) -> None:
        """Adds to the system prompt, which is one message whose blocks are its parts."""
        text = block if isinstance(block, str) else _text(block, where)
        if self.messages and self.messages[-1]["role"] == "system":
            self.messages[-1]["content"].append({"type": "text", "text": text})
        elif text:
            content = text if isinstance(block, str) else [{"type": "text", "text": text}]
            self._append({"role": "system", "content": content}, where.split("[", 1)[0])

    def add(self, message: Mapping[str, Any], where: str) -> None:
        """Adds one of `messages`.

        Raises:
            RequestError: INVALID_ARGUMENT naming the block.
        """
        role, content = message.get("role"), message.get("content")
        if role not in ("user", "assistant", "system"):
            raise invalid(f"{where}.role must be user, assistant or system, got {_brief(role)}.", f"{where}.role")
        self._last_is_open = False
        if isinstance(content, str):
            self._append({"role": role, "content": content}, where)
            self._last_is_open = role == "assistant" and bool(content)
            return
        if not isinstance(content, Sequence):
            raise invalid(
                f"{where}.content must be text or a list of blocks, got {_brief(content)}.", f"{where}.content"
            )
        blocks = [(block, f"{where}.content[{i}]") for i, block in enumerate(content)]
        for block, place in blocks:
            if not isinstance(block, Mapping) or not isinstance(block.get("type"), str):
                raise invalid(f'{place} must be a block such as {{"type": "text", "text": ...}}.', place)
        if role == "assistant":
            self._add_assistant(blocks, where)
        else:
            self._add_user(role, blocks, where)

    def _add_user(self, role: str, blocks: Sequence[tuple[Mapping[str, Any], str]], where: str) -> None:
        parts: list[dict[str, Any]] = []
        for block, place in blocks:
            if block["type"] != "tool_result":
                parts.extend(_parts(block, place))
                continue
            if parts:
                self._append({"role": role, "content": parts}, where)
                parts = []
            self._append(_result(block, place), place)
        if parts or not blocks:
            self._append({"role": role, "content": parts}, where)

    def _add_assistant(self, blocks: Sequence[tuple[Mapping[str, Any], str]], where: str) -> None:
        texts: list[str] = []
        thoughts: list[str] = []
        calls: list[dict[str, Any]] = []
        for block, place in blocks:
            kind = block["type"]
            if kind == "text":
                texts.append(_text(block, place))
            elif kind == "tool_use":
                calls.append(_call(block, place))
            elif kind == "thinking":
                thoughts.append(_string(block, "thinking", place))
            elif kind != "redacted_thinking":  # nobody but its author can read it
                raise _unknown(kind, place)
        message: dict[str, Any] = {"role": "assistant", "content": "".join(texts) if texts else None}
        if thoughts:
            message["reasoning"] = "".join(thoughts)
        if calls:
            message["tool_calls"] = calls
        if message["content"] is None and len(message) == 2:
            message["content"] = ""
        self._append(message, where)
        self._last_is_open = bool(texts) and not calls

    def _append(self, message: dict[str, Any], origin: str) -> None:
        self.origins[f"messages[{len(self.messages)}]"] = origin
        self.messages.append(message)


def _parts(block: Mapping[str, Any], place: str) -> list[dict[str, Any]]:
    """One block of a user's turn, or of a tool's result, as parts."""
    kind = block["type"]
    if kind == "text":
        return [{"type": "text", "text": _text(block, place)}]
    if kind == "image":
        return [_image(block, place)]
    if kind == "document":
        return _document(block, place)
    if kind == "search_result":
        head = f"{_string(block, 'title', place)} ({_string(block, 'source', place)})"
        return [{"type": "text", "text": head}, *_nested(block.get("content"), f"{place}.content")]
    if kind == "tool_reference":
        return [{"type": "text", "text": _string(block, "tool_name", place)}]
    raise _unknown(kind, place)


def _image(block: Mapping[str, Any], place: str) -> dict[str, Any]:
    source = block.get("source")
    kind = source.get("type") if isinstance(source, Mapping) else None
    if kind == "base64":
        media, data = _string(source, "media_type", f"{place}.source"), _string(source, "data", f"{place}.source")
        return {"type": "image_url", "image_url": {"url": f"data:{media};base64,{data}"}}
    if kind == "url":
        return {"type": "image_url", "image_url": {"url": _string(source, "url", f"{place}.source")}}
    raise invalid(f"{place}.source must be of type base64 or url, got {_brief(kind)}.", f"{place}.source")


def _document(block: Mapping[str, Any], place: str) -> list[dict[str, Any]]:
    source = block.get("source")
    kind = source.get("type") if isinstance(source, Mapping) else None
    heads = [str(block[name]) for name in ("title", "context") if isinstance(block.get(name), str)]
    head = [{"type": "text", "text": "\n".join(heads)}] if heads else []
    if kind == "text":
        return [*head, {"type": "text", "text": _string(source, "data", f"{place}.source")}]
    if kind == "content":
        assert isinstance(source, Mapping)
        return [*head, *_nested(source.get("content"), f"{place}.source.content")]
    raise invalid(
        f"{place} is a document of type {_brief(kind)}; this server reads documents of text: send what is written in it.",
        f"{place}.source",
    )


def _nested(content: Any, place: str) -> list[dict[str, Any]]:
    """The parts of a content inside a block: text, or blocks."""
    if content is None:
        return []
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, Sequence):
        raise invalid(f"{place} must be text or a list of blocks, got {_brief(content)}.", place)
    parts: list[dict[str, Any]] = []
    for i, block in enumerate(content):
        if not isinstance(block, Mapping) or block.get("type") not in _WITHIN:
            raise invalid(f"{place}[{i}] must be a block of type {', '.join(_WITHIN)}.", f"{place}[{i}]")
        parts.extend(_parts(block, f"{place}[{i}]"))
    return parts


_WITHIN = ("text", "image", "document", "search_result", "tool_reference")


def _result(block: Mapping[str, Any], place: str) -> dict[str, Any]:
    """A tool's result as a message; one text stays a text."""
    parts = _nested(block.get("content"), f"{place}.content")
    if block.get("is_error") is True and not any(part.get("text") for part in parts):
        parts.append({"type": "text", "text": FAILED})
    content: Any = parts
    if not parts:
        content = ""
    elif len(parts) == 1 and parts[0]["type"] == "text":
        content = parts[0]["text"]
    return {"role": "tool", "tool_call_id": _string(block, "tool_use_id", place), "content": content}


def _call(block: Mapping[str, Any], place: str) -> dict[str, Any]:
    given = block.get("input")
    if not isinstance(given, Mapping):
        raise invalid(f"{place}.input must be an object, got {_brief(given)}.", f"{place}.input")
    function = {"name": _string(block, "name", place), "arguments": json.dumps(given, ensure_ascii=False)}
    return {"id": _string(block, "id", place), "type": "function", "function": function}


def _text(block: Mapping[str, Any], place: str) -> str:
    if block.get("type", "text") != "text":
        raise _unknown(block.get("type"), place)
    return _string(block, "text", place)


def _string(block: Any, name: str, place: str) -> str:
    value = block.get(name)
    if not isinstance(value, str):
        raise invalid(f"{place}.{name} must be text, got {_brief(value)}.", f"{place}.{name}")
    return value


def _unknown(kind: Any, place: str) -> RequestError:
    return invalid(f"{place} is of type {_brief(kind)}, which this server does not take there.", f"{place}.type")


def _brief(value: Any) -> str:
    return repr(value[:64]) if isinstance(value, str) else kind_of(value)
