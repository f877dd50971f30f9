"""One parser for every family: a completion's text, in pieces of any size, to reasoning, content and tool calls.

The events depend on the text alone, not on how it was cut: whatever could still turn out to be a marker is held back,
and payloads are read character by character. What is no call after all is content; nothing here raises for what a
model wrote.
"""

from __future__ import annotations

import secrets
import string
from collections.abc import Callable, Mapping
from typing import Any

from serving.text.tools.channels import ChannelReader
from serving.text.tools.events import ContentDelta, Event, ReasoningDelta, ToolCallEnd, merge
from serving.text.tools.family import Payload, ReasoningFamily, ToolFamily
from serving.text.tools.json_calls import JSONReader
from serving.text.tools.payloads import BrokenCallError, BufferedReader, Calls, Reader
from serving.text.tools.tagged import TaggedReader

# Blanks before a marker belong to the format and are dropped, so blanks are held back; but not without end.
MAX_HELD_BLANKS = 1024


class ReplyParser:
    """Parses one completion. Not thread-safe; one a completion.

    Args:
        tools: how the model writes calls, or None to find none (no tools were offered, or `tool_choice` is none).
        reasoning: how it writes its thinking, or None to find none.
        schemas: name -> JSON schema of the arguments, of the tools that were offered: a call of any other is content.
            None takes any name.
        in_reasoning: the prompt ends inside the thinking (`ReasoningFamily.opened_by`).
        new_id: makes a call's id; None makes random ones.
    """

    def __init__(
        self,
        tools: ToolFamily | None,
        reasoning: ReasoningFamily | None = None,
        *,
        schemas: Mapping[str, Mapping[str, Any]] | None = None,
        in_reasoning: bool = False,
        new_id: Callable[[], str] | None = None,
    ) -> None:
        self._tools, self._reasoning = tools, reasoning
        self._calls = Calls(schemas, new_id or _id_maker(tools))
        self._out: list[Event] = self._calls.events
        self._buffer = ""
        self._state: Callable[[], bool] = self._content
        if reasoning is not None:
            self._state = self._thinking if in_reasoning else self._start
        self._strip = in_reasoning  # blanks at the start of the next delta are the format's, not the text's
        self._fresh = True  # nothing but blanks was content so far
        self._reader: Reader | None = None
        self._raw: list[str] = []
        self._begun = ""  # what stands before a call and was not shown: blanks, the mark of a run of calls
        self._unclosed = False  # behind a call, before its closing marker
        self._first_call = 0
        self._channels: ChannelReader | None = None
        if (tools is not None and tools.payload is Payload.CHANNELS) or (reasoning is not None and reasoning.then):
            if tools is None:
                self._calls = Calls({}, _id_maker(tools))
                self._out = self._calls.events
            self._channels = ChannelReader(self._calls, in_reasoning)
        if tools is not None:
            # What begins a payload begins a call too where the marker before it was left out.
            self._heads = (tools.tags.name_open.strip(),) if tools.tags is not None and tools.tags.name_open else ()
            self._begins = tuple(text for text in (*tools.begin, tools.wrap[0], *self._heads) if text)
            self._openers = ("{", "[") if tools.payload is Payload.JSON else ("[",)
            ends = [text.strip() for text in (tools.end, tools.wrap[1]) if text.strip()]
            # A fence that was not opened is not closed.
            self._ends = (*ends, *(end.removeprefix("```") for end in ends if end.startswith("```<")))
            self._after = (*self._ends, *([tools.separator.strip()] if tools.separator.strip() else ()))

    @property
    def num_calls(self) -> int:
        """Tool calls that were started so far."""
        return self._calls.count

    def push(self, text: str) -> list[Event]:
        """The events that became certain with this text."""
        if self._channels is not None:
            self._channels.feed(text)
            return self._take()
        self._buffer += text
        while self._state():
            pass
        return self._take()

    def finish(self) -> list[Event]:
        """What was held back, at the completion's end."""
        if self._channels is not None:
            self._channels.finish()
            return self._take()
        rest, self._buffer = self._buffer, ""
        state = self._state
        if state == self._thinking:
            self._emit_reasoning(rest[: _end_of_text(rest, len(rest))])
        elif state == self._call:
            if self._reader is not None:
                self._reader.finish()
            self._give_up(cut=True)
        elif state not in (self._behind_call, self._broken):  # of half a marker behind a call nothing is worth showing
            self._emit_content(rest)
        elif self._begun:
            self._emit_content(self._begun + rest)
        self._state = lambda: False
        return self._take()

    def _take(self) -> list[Event]:
        events = merge(self._out)
        self._out.clear()
        return events

    # Each state takes what it can from the buffer and says whether the next state may have work.

    def _start(self) -> bool:
        assert self._reasoning is not None
        text = self._buffer.lstrip()
        many = len(self._buffer) - len(text) >= MAX_HELD_BLANKS
        if text.startswith(self._reasoning.open) and not many:
            self._buffer = text[len(self._reasoning.open) :]
            self._state, self._strip = self._thinking, True
            return True
        if self._reasoning.open.startswith(text) and not many:
            return False
        self._state = self._content
        return True

    def _thinking(self) -> bool:
        assert self._reasoning is not None
        close = self._reasoning.close
        at = self._buffer.find(close)
        if at >= 0:
            self._emit_reasoning(self._buffer[: _end_of_text(self._buffer, at)])
            self._buffer = self._buffer[at + len(close) :]
            self._state, self._strip = self._content, True
            return True
        ready = self._ready((close,))
        self._emit_reasoning(self._buffer[:ready])
        self._buffer = self._buffer[ready:]
        return False

    def _content(self) -> bool:
        if self._tools is None:
            self._emit_content(self._buffer)
            self._buffer = ""
            return False
        text = self._buffer.lstrip()
        if self._fresh and self._tools.bare and text[:1] in self._openers and text:
            self._buffer = text
            return self._begin_call("")
        found = [(self._buffer.find(marker), -len(marker), marker) for marker in self._begins]
        at, _, marker = min((hit for hit in found if hit[0] >= 0), default=(-1, 0, ""))
        ready = self._ready(self._begins)
        # A longer marker could still begin before or at the one that was found.
        if at >= 0 and at <= ready:
            end = _end_of_text(self._buffer, at)
            self._emit_content(self._buffer[:end])
            self._begun, self._buffer = self._buffer[end:at], self._buffer[at + len(marker) :]
            if marker == self._tools.wrap[0]:
                self._begun += marker
                self._state = self._behind_call
                return True
            return self._begin_marked(marker)
        self._emit_content(self._buffer[:ready])
        self._buffer = self._buffer[ready:]
        return False

    def _begin_marked(self, marker: str) -> bool:
        """A call whose marker was just taken from the buffer."""
        if marker in self._heads:
            self._buffer, marker = marker + self._buffer, ""
        return self._begin_call(marker)

    def _begin_call(self, marker: str) -> bool:
        assert self._tools is not None
        self._reader = _reader_for(self._tools, self._calls)
        self._raw, self._first_call = [self._begun + marker], self._calls.count
        self._begun = ""
        self._state = self._call
        return True

    def _call(self) -> bool:
        reader = self._reader
        assert reader is not None
        for i, char in enumerate(self._buffer):
            try:
                reader.feed(char)
            except BrokenCallError:
                self._buffer = self._buffer[i:]
                self._state = self._broken
                return True
            except (ValueError, RecursionError):
                self._buffer = self._buffer[i:]
                self._give_up()
                if self._raw == [""]:  # a bare opener that was none: it must not be tried again
                    self._fresh = False
                self._state = self._content
                return True
            if self._calls.count == self._first_call:
                self._raw.append(char)
            if reader.done:
                self._buffer = self._buffer[i + 1 :]
                self._state, self._unclosed = self._behind_call, True
                return True
        self._buffer = ""
        return False

    def _give_up(self, cut: bool = False) -> None:
        """The text since the marker is no call, or not a whole one. Half of one behind others is not worth showing."""
        reader = self._reader
        if reader is not None and reader.open_call:
            self._out.append(ToolCallEnd(self._calls.count - 1, reader.complete))
        elif self._calls.count == self._first_call and not (cut and self._first_call):
            self._emit_content("".join(self._raw))

    def _broken(self) -> bool:
        """Drops the rest of a call that went wrong, to its closing marker or the next one."""
        markers = (*self._ends, *self._begins)
        at = min((at for at in map(self._buffer.find, markers) if at >= 0), default=-1)
        if at >= 0:
            self._buffer = self._buffer[at:]
            self._state = self._behind_call
            return True
        self._buffer = self._buffer[self._ready(markers) :]
        return False

    def _behind_call(self) -> bool:
        assert self._tools is not None
        text = self._buffer.lstrip()
        expected = (*self._begins, *self._after)
        marker = max((m for m in expected if text.startswith(m)), key=len, default="")
        if not text or any(m.startswith(text) for m in expected if len(m) > len(text)):
            return False  # nothing yet, or still part of a longer marker
        if self._begun:
            self._begun += self._buffer[: len(self._buffer) - len(text)]
        if marker:
            self._buffer = text[len(marker) :]
            self._unclosed = self._unclosed and marker not in self._ends
            return self._begin_marked(marker) if marker in (*self._tools.begin, *self._heads) else True
        self._buffer = text
        if text[0] in "}]" and self._tools.payload in (Payload.JSON, Payload.NAMED):
            self._buffer = text[1:]  # a bracket too many
            return True
        if self._tools.bare and text[0] in self._openers:
            return self._begin_call("")
        if self._tools.payload is Payload.PYTHON and self._unclosed and (text[0].isalpha() or text[0] == "_"):
            return self._begin_call("")  # one call a line
        self._emit_content(self._begun)
        self._begun, self._fresh, self._state = "", False, self._content
        return True

    def _ready(self, markers: tuple[str, ...]) -> int:
        """How much of the buffer is certainly before any marker and the blanks that may stand before it."""
        text = self._buffer
        keep = 0
        for marker in markers:
            for size in range(min(len(marker) - 1, len(text)), keep, -1):
                if text.endswith(marker[:size]):
                    keep = size
                    break
        return _end_of_text(text, len(text) - keep)

    def _emit_content(self, text: str) -> None:
        if self._strip:
            text = text.lstrip()
        if text:
            self._strip = False
            self._fresh = self._fresh and not text.strip()
            self._out.append(ContentDelta(text))

    def _emit_reasoning(self, text: str) -> None:
        if self._strip:
            text = text.lstrip()
        if text:
            self._strip = False
            self._out.append(ReasoningDelta(text))


def _end_of_text(text: str, end: int) -> int:
    """Where `text[:end]` ends without the blanks behind it. Of very many, whole blocks count as text, so that it makes
    no difference whether they came one by one."""
    size = len(text[:end].rstrip())
    return size + (end - size) // MAX_HELD_BLANKS * MAX_HELD_BLANKS


def _reader_for(family: ToolFamily, calls: Calls) -> Reader:
    """A fresh reader of the family's payload."""
    if family.payload is Payload.TAGGED:
        return TaggedReader(family, calls)
    if family.payload in (Payload.PYTHON, Payload.BRACED):
        return BufferedReader(family, calls)
    return JSONReader(family, calls)


def _id_maker(tools: ToolFamily | None) -> Callable[[], str]:
    letters = string.ascii_letters + string.digits
    if tools is not None and tools.id_length:
        return lambda: "".join(secrets.choice(letters) for _ in range(tools.id_length))
    return lambda: "call_" + secrets.token_hex(12)
