"""Readers of what stands between a tool call's markers. Each takes one character at a time and appends events."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from serving.text.tools.events import Event, ToolCallArguments, ToolCallEnd, ToolCallStart
from serving.text.tools.families import Payload, ToolFamily
from serving.text.tools.json_scan import BLANKS, JSONScanner, repaired
from serving.text.tools.literals import MAX_BUFFERED, BracketCounter, braced_call, python_calls

NAME_KEYS = frozenset({"name", "function", "tool_name"})
ARGUMENT_KEYS = frozenset({"arguments", "parameters", "args"})
OTHER_KEYS = frozenset({"id", "type", "index", "tool_call_id"})
MAX_NAME = 256
_PLAIN_NAME = re.compile(r"[\w.:/-]{1,256}")


class NotACallError(ValueError):
    """The text is no tool call of this family."""


class Calls:
    """Numbers the calls of one message and collects their events.

    Args:
        tools: name -> JSON schema of the arguments; None takes any name.
        new_id: makes an id.
    """

    def __init__(self, tools: Mapping[str, Mapping[str, Any]] | None, new_id: Callable[[], str]) -> None:
        self._tools, self._new_id = tools, new_id
        self.events: list[Event] = []
        self.count = 0

    def known(self, name: str) -> bool:
        return name in self._tools if self._tools is not None else _PLAIN_NAME.fullmatch(name) is not None

    def start(self, name: str) -> None:
        self.events.append(ToolCallStart(self.count, name, self._new_id()))
        self.count += 1

    def arguments(self, text: str) -> None:
        if text:
            self.events.append(ToolCallArguments(self.count - 1, text))

    def end(self, complete: bool) -> None:
        self.events.append(ToolCallEnd(self.count - 1, complete))

    def whole(self, name: str, arguments: Mapping[str, Any]) -> None:
        text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        self.start(name)
        self.arguments(text)
        self.end(True)

    def value_of(self, name: str, key: str, text: str) -> Any:
        """The value that `text` stands for: as it is for parameters of type string, else JSON where it is JSON."""
        properties = (self._tools or {}).get(name, {}).get("properties")
        schema = properties.get(key) if isinstance(properties, Mapping) else None
        kind = schema.get("type") if isinstance(schema, Mapping) else None
        if kind == "string":
            return text
        try:
            value = json.loads(text)
            json.dumps(value, allow_nan=False)  # Python also reads NaN and Infinity, which are not JSON
        except (ValueError, RecursionError):
            return text
        return value


class Reader(Protocol):
    """Reads one payload.

    Attributes:
        done: it is complete; the last character belonged to it.
        open_call: a call was started and not ended.
        complete: of that call, the arguments are whole.
    """

    done: bool
    open_call: bool
    complete: bool

    def feed(self, char: str) -> None:
        """Takes a character. ValueError: it does not fit; then it was not taken, and the reader is of no more use."""
        ...


def reader_for(family: ToolFamily, calls: Calls) -> Reader:
    """A fresh reader of the family's payload."""
    if family.payload is Payload.TAGGED:
        return TaggedReader(family, calls)
    if family.payload is Payload.PYTHON or family.payload is Payload.BRACED:
        return BufferedReader(family, calls)
    return JSONReader(family, calls)


class JSONReader:
    """`{"name": ..., "arguments": {...}}`, a list of such objects, or a name followed by an object."""

    def __init__(self, family: ToolFamily, calls: Calls) -> None:
        self.done = self.open_call = self.complete = False
        self._family, self._calls = family, calls
        self._stage = "open"  # open, name, arguments, call, next (in a list)
        self._list = False
        self._text: list[str] = []
        self._begin_object()

    def _begin_object(self) -> None:
        self._scanner = JSONScanner()
        self._name: str | None = None
        self._held: str | None = None  # arguments that came before the name, or as a string
        self._capture: list[str] | None = None
        self._streams = False

    def feed(self, char: str) -> None:
        if self._stage == "call":
            self._call(char)
        elif self._stage == "arguments":
            self._arguments(char)
        elif self._stage == "name":
            self._collect_name(char)
        elif char in BLANKS:
            return
        elif self._stage == "open":
            self._open(char)
        elif char == "," and self._stage == "next":
            self._stage = "item"
        elif char == "{" and self._stage == "item":
            self._begin_object()
            self._stage = "call"
            self._call(char)
        elif char == "]":
            self.done = True
        else:
            raise NotACallError(char)

    def _open(self, char: str) -> None:
        if char == "{" and self._family.payload is Payload.JSON:
            self._stage = "call"
            self._call(char)
        elif char == "[":
            self._list, self._stage = True, "item"
        elif self._family.name_end:
            self._stage = "name"
            self._collect_name(char)
        else:
            raise NotACallError(char)

    def _collect_name(self, char: str) -> None:
        end = self._family.name_end
        opens = char == "{" and bool(self._text)  # the separator was left out
        if len(self._text) >= MAX_NAME + len(end) + len(self._family.name_prefix):
            raise NotACallError("a name too long")
        self._text.append(char)
        if not opens and not (char == end[-1] and "".join(self._text[-len(end) :]) == end):
            return
        name = "".join(self._text)[: -1 if opens else -len(end)].strip()
        prefix = self._family.name_prefix
        name = re.sub(r":\d+$", "", name[len(prefix) :] if prefix and name.startswith(prefix) else name)
        if not self._calls.known(name):
            self._text.pop()
            raise NotACallError(name)
        self._calls.start(name)
        self.open_call, self._stage = True, "arguments"
        if opens:
            self._arguments(char)

    def _arguments(self, char: str) -> None:
        """Of a named payload: the whole rest is the arguments."""
        if self._scanner.depth == 0 and char in BLANKS:
            return
        if self._scanner.depth == 0 and char != "{":
            raise NotACallError(char)
        text = repaired(char, self._scanner.in_string)
        self._scanner.feed(char)
        self._calls.arguments(text)
        if self._scanner.done:
            self._finish_call()

    def _call(self, char: str) -> None:
        """Of a call object: follows its keys."""
        scanner = self._scanner
        text = repaired(char, scanner.in_string)
        key_before = scanner.key
        scanner.feed(char)
        if scanner.key is not key_before and scanner.key not in NAME_KEYS | ARGUMENT_KEYS | OTHER_KEYS:
            raise NotACallError(f"key {scanner.key}")
        if scanner.value_started:
            self._start_value(char)
        if self._capture is not None and not scanner.ended_before:
            self._capture.append(text)
            if self._streams:
                self._calls.arguments(text)
        if scanner.value_ended and self._capture is not None:
            self._end_value()
        if scanner.done:
            self._end_object()

    def _start_value(self, char: str) -> None:
        self._capture, self._streams = [], False
        if self._scanner.key in ARGUMENT_KEYS and char == "{" and self._name is not None and not self.open_call:
            self._calls.start(self._name)
            self.open_call = self._streams = True

    def _end_value(self) -> None:
        text, key = "".join(self._capture or ()), self._scanner.key
        self._capture = None
        if self._streams:
            self._streams, self.complete = False, True
        elif key in ARGUMENT_KEYS:
            self._held = _object_text(text)
        elif key in NAME_KEYS:
            name = json.loads(text)
            if not isinstance(name, str) or not self._calls.known(name):
                raise NotACallError(text)
            self._name = name

    def _end_object(self) -> None:
        if not self.open_call:
            if self._name is None:
                raise NotACallError("no name")
            self._calls.start(self._name)
            self._calls.arguments(self._held or "{}")
            self.open_call = True
        self._finish_call()

    def _finish_call(self) -> None:
        self._calls.end(True)
        self.open_call = self.complete = False
        if self._list:
            self._stage = "next"
        else:
            self.done = True


def _object_text(text: str) -> str:
    """Arguments that did not come as an object behind the name: an object as it is, its text in a string, or null."""
    value = json.loads(text)
    if isinstance(value, str):
        text, value = value, json.loads(value or "{}")
    if value is None:
        return "{}"
    if not isinstance(value, dict):
        raise NotACallError(text)
    return text or "{}"


class TaggedReader:
    """A name and one tagged text per argument. Arguments are passed on one by one, as each is complete."""

    def __init__(self, family: ToolFamily, calls: Calls) -> None:
        assert family.tags is not None
        self.done = self.open_call = self.complete = False
        self._calls = calls
        tags = {field: text.strip() for field, text in dataclasses.asdict(family.tags).items()}
        self._tags, self._close = tags, tags["args_close"] or family.end.strip()
        self._text: list[str] = []
        self._name = self._key = ""
        self._num_values = 0
        self._stage: Callable[[str], None] = self._lead if tags["name_open"] else self._read_name

    def feed(self, char: str) -> None:
        if len(self._text) >= MAX_BUFFERED:
            raise NotACallError("too long")
        self._stage(char)

    def _lead(self, char: str) -> None:
        if self._expect(char, self._tags["name_open"]):
            self._stage = self._read_name

    def _read_name(self, char: str) -> None:
        close = self._tags["name_close"]
        ends = char == close if close else char in "\n<" and bool(self._text)
        if not ends:
            if len(self._text) >= MAX_NAME:
                raise NotACallError("a name too long")
            self._text.append(char)
            return
        name = "".join(self._text).strip()
        if not self._calls.known(name):
            raise NotACallError(name)
        self._name, self._text, self._stage = name, [], self._between
        self._calls.start(name)
        self._calls.arguments("{")
        self.open_call = True
        if char == "<" and not close:
            self._between(char)

    def _between(self, char: str) -> None:
        found = self._expect(char, self._tags["key_open"], self._close)
        if found == self._tags["key_open"]:
            self._stage = self._read_key
        elif found:
            self._calls.arguments("}")
            self._calls.end(True)
            self.open_call, self.done = False, True

    def _read_key(self, char: str) -> None:
        if (text := self._until(char, self._tags["key_close"])) is not None:
            self._key = text.strip()
            self._stage = self._open_value if self._tags["value_open"] else self._read_value

    def _open_value(self, char: str) -> None:
        if self._expect(char, self._tags["value_open"]):
            self._stage = self._read_value

    def _read_value(self, char: str) -> None:
        text = self._until(char, self._tags["value_close"])
        if text is None:
            return
        if not self._tags["value_open"]:  # the value stands on lines of its own
            text = text.removeprefix("\n").removesuffix("\n")
        value = self._calls.value_of(self._name, self._key, text)
        comma = ", " if self._num_values else ""
        self._num_values += 1
        key = json.dumps(self._key, ensure_ascii=False)
        self._calls.arguments(f"{comma}{key}: {json.dumps(value, ensure_ascii=False)}")
        self._stage = self._between

    def _until(self, char: str, end: str) -> str | None:
        """The text before `end`, once it is complete."""
        self._text.append(char)
        if char != end[-1] or "".join(self._text[-len(end) :]) != end:
            return None
        text = "".join(self._text)[: -len(end)]
        self._text = []
        return text

    def _expect(self, char: str, *wanted: str) -> str:
        """Which of the texts is complete with this character; "" for none yet. Blanks before it do not count."""
        if not self._text and char in BLANKS:
            return ""
        text = "".join(self._text) + char
        if not any(want.startswith(text) for want in wanted):
            raise NotACallError(text)
        if text in wanted:
            self._text = []
            return text
        self._text.append(char)
        return ""


class BufferedReader:
    """Calls in a notation that is not JSON: read once its brackets are closed."""

    def __init__(self, family: ToolFamily, calls: Calls) -> None:
        self.done = self.open_call = self.complete = False
        self._family, self._calls = family, calls
        self._text: list[str] = []
        quotes = (family.string_quote,) if family.payload is Payload.BRACED else ("'", '"')
        self._brackets = BracketCounter(quotes, escapes=family.payload is Payload.PYTHON)

    def feed(self, char: str) -> None:
        if not self._text and char in BLANKS:
            return
        if len(self._text) >= MAX_BUFFERED:
            raise NotACallError("too long")
        if not self._text and not (char.isalpha() or char in "_["):
            raise NotACallError(char)
        if len(self._text) == 1 and self._text[0] == "[" and not (char.isalpha() or char in "_] \n"):
            raise NotACallError(char)  # a list of something else: say so before it is complete
        closed = self._brackets.feed(char)
        self._text.append(char)
        if not closed:
            return
        text = "".join(self._text)
        found = python_calls(text) if self._family.payload is Payload.PYTHON else [braced_call(text, self._quote)]
        if not found or not all(self._calls.known(name) for name, _ in found):
            self._text.pop()
            raise NotACallError(text)
        for name, arguments in found:
            self._calls.whole(name, arguments)
        self.done = True

    @property
    def _quote(self) -> str:
        return self._family.string_quote
