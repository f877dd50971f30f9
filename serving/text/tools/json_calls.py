"""The reader of calls in JSON: `{"name": ..., "arguments": {...}}`, a list of such objects, or a name and an object."""

from __future__ import annotations

import json
import re

from serving.text.tools.family import Payload, ToolFamily
from serving.text.tools.json_scan import BLANKS, JSONScanner, repaired_json
from serving.text.tools.payloads import MAX_NAME, BrokenCallError, Calls, NotACallError

NAME_KEYS = frozenset({"name", "function", "tool_name"})
ARGUMENT_KEYS = frozenset({"arguments", "parameters", "args"})
OTHER_KEYS = frozenset({"id", "type", "index", "tool_call_id"})


class JSONReader:
    """Passes arguments on while they come. What is nearly JSON is repaired (see `JSONScanner`); where that fails
    behind a call's beginning, what was passed on is closed, so that a client never gets half an object."""

    def __init__(self, family: ToolFamily, calls: Calls) -> None:
        self.done = self.open_call = self.complete = False
        self._family, self._calls = family, calls
        self._stage = "open"  # open, name, arguments, call, next (in a list)
        self._list = False
        self._any = False  # of a list, a call was read
        self._text: list[str] = []
        self._end = family.end.strip()[:1] or family.wrap[1][:1]
        self._begin_object()

    def _begin_object(self) -> None:
        self._scanner = JSONScanner(repair=True)
        self._name: str | None = None
        self._held: str | None = None  # arguments that came before the name, or as a string
        self._capture: list[str] | None = None
        self._streams = False

    def feed(self, char: str) -> None:
        try:
            self._take(char)
        except (ValueError, RecursionError):
            if not self.open_call:
                if self._any:
                    raise BrokenCallError(char) from None
                raise
            # A bracket left out before the closing marker is the commonest fault, and leaves nothing open.
            self._break_off(bool(self._end) and char == self._end)
            raise BrokenCallError(char) from None

    def finish(self) -> None:
        """Nothing: an object that is not closed tells nothing of what was to come."""

    def _break_off(self, complete: bool) -> None:
        if self._stage == "arguments":
            self._calls.arguments(self._scanner.closing() if self._scanner.depth else "{}")
        elif self._streams:
            # The scanner stands in the object around the arguments, which a client does not see.
            self._calls.arguments(self._scanner.closing()[:-1])
        self._calls.end(complete)
        self.open_call = False

    def _take(self, char: str) -> None:
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
        elif char == "{" and self._stage in ("item", "next"):
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
        end, mark = self._family.name_end, self._family.id_mark
        opens = char == "{" and bool(self._text)  # the separator was left out
        if len(self._text) >= 2 * MAX_NAME + len(end) + len(mark) + len(self._family.name_prefix):
            raise NotACallError("a name too long")
        self._text.append(char)
        if not opens and not (char == end[-1] and "".join(self._text[-len(end) :]) == end):
            return
        written = "".join(self._text)[: -1 if opens else -len(end)].strip()
        name, call_id = written, ""
        if mark and mark in written:
            name, _, call_id = (part.strip() for part in written.partition(mark))
        prefix = self._family.name_prefix
        name = name.removeprefix(prefix) if prefix else name
        if numbered := re.fullmatch(r"(.*?):(\d+)", name, re.DOTALL):
            name = numbered[1]
            call_id = written if self._family.numbered else call_id
        if not self._calls.known(name):
            self._text.pop()
            raise NotACallError(name)
        self._calls.start(name, call_id)
        self.open_call, self._stage = True, "arguments"
        if opens:
            self._arguments(char)

    def _arguments(self, char: str) -> None:
        """Of a named payload: the whole rest is the arguments."""
        if self._scanner.depth == 0 and char in BLANKS:
            return
        if self._scanner.depth == 0 and char != "{":
            raise NotACallError(char)
        text = self._scanner.feed(char)
        self._calls.arguments(self._scanner.before + text)
        if self._scanner.done:
            self._finish_call()

    def _call(self, char: str) -> None:
        """Of a call object: follows its keys."""
        scanner = self._scanner
        key_before = scanner.key
        text = scanner.feed(char)
        known = scanner.key is key_before or scanner.key in NAME_KEYS | ARGUMENT_KEYS | OTHER_KEYS
        if not known and not self.open_call:
            raise NotACallError(f"key {scanner.key}")
        if self._capture is not None:
            self._pass_on(scanner.before)
        if scanner.value_started:
            self._start_value(char)
        if self._capture is not None and not scanner.ended_before:
            self._pass_on(text)
        if scanner.value_ended and self._capture is not None:
            self._end_value()
        if scanner.done:
            self._end_object()

    def _pass_on(self, text: str) -> None:
        assert self._capture is not None
        if self._streams:
            self._calls.arguments(text)
        else:
            self._capture.append(text)

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
        elif self.open_call:
            return  # what stands behind the arguments does not matter any more
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
        self._any = True
        if self._list:
            self._stage = "next"
        else:
            self.done = True


def _object_text(text: str) -> str:
    """Arguments that did not come as an object behind the name: an object as it is, its text in a string, or null."""
    value = json.loads(text)
    if isinstance(value, str):
        text = repaired_json(value) if value.strip() else "{}"
        value = json.loads(text)
    if value is None:
        return "{}"
    if not isinstance(value, dict):
        raise NotACallError(text)
    return text or "{}"
