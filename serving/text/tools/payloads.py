"""Readers of what stands between a tool call's markers. Each takes one character at a time and appends events."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from serving.text.tools.events import Event, ToolCallArguments, ToolCallEnd, ToolCallStart
from serving.text.tools.family import Payload, ToolFamily
from serving.text.tools.json_scan import BLANKS
from serving.text.tools.literals import MAX_BUFFERED, BracketCounter, braced_call, python_calls
from serving.text.tools.typed import Arguments

MAX_NAME = 256
_PLAIN_NAME = re.compile(r"[\w.:/-]{1,256}")


class NotACallError(ValueError):
    """The text is no tool call of this family."""


class BrokenCallError(ValueError):
    """A call went wrong behind its name. It was ended, with what was read of its arguments as whole JSON; what is
    left of its text belongs to it and is not content."""


class Calls:
    """Numbers the calls of one message and collects their events.

    Args:
        tools: name -> JSON schema of the arguments; None takes any name.
        new_id: makes an id.
    """

    def __init__(self, tools: Mapping[str, Mapping[str, Any]] | None, new_id: Callable[[], str]) -> None:
        self._tools, self._new_id = tools, new_id
        self._arguments: dict[str, Arguments] = {}
        self.events: list[Event] = []
        self.count = 0

    def known(self, name: str) -> bool:
        return name in self._tools if self._tools is not None else _PLAIN_NAME.fullmatch(name) is not None

    def start(self, name: str, call_id: str = "") -> None:
        self.events.append(ToolCallStart(self.count, name, call_id or self._new_id()))
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

    def of(self, name: str) -> Arguments:
        """How to read the arguments of a tool."""
        if name not in self._arguments:
            self._arguments[name] = Arguments((self._tools or {}).get(name))
        return self._arguments[name]


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
        """Takes a character.

        Raises:
            BrokenCallError: it does not fit, in a call that was begun.
            ValueError: it does not fit, and no call was begun. Either way it was not taken, and the reader is of no
                more use.
        """
        ...

    def finish(self) -> None:
        """The text ended: a call of which all but its closing marks was read is ended."""
        ...


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
        try:
            found = python_calls(text) if self._family.payload is Payload.PYTHON else [self._braced(text)]
            if not found or not all(self._calls.known(name) for name, _ in found):
                raise NotACallError(text)
        except ValueError:
            self._text.pop()
            raise
        for name, arguments in found:
            self._calls.whole(name, arguments)
        self.done = True

    def finish(self) -> None:
        """Nothing: brackets that are not closed tell nothing of what was to come."""

    def _braced(self, text: str) -> tuple[str, dict[str, Any]]:
        name, given = braced_call(text, self._family.string_quote)
        arguments = self._calls.of(name)
        return name, {key: arguments.settle(key, value) for key, value in given.items()}
