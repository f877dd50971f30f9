"""The reader of replies that are messages on channels: GPT-OSS's "harmony" format (OpenAI, openai/harmony).

A reply goes on behind `<|start|>assistant`. A message is a header, `<|message|>`, a body and a closing marker:
`<|channel|>analysis<|message|>...<|end|>` is thinking, `final` is the answer, `commentary` is said to the user before
tools are called, and a message to `functions.f` is a call whose body is the arguments.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from serving.text.tools.events import ContentDelta, Event, ReasoningDelta
from serving.text.tools.json_scan import BLANKS, JSONScanner
from serving.text.tools.payloads import Calls

START, CHANNEL, MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
CLOSES = ("<|end|>", "<|call|>", "<|return|>")
MAX_HEADER = 1024
_TO = re.compile(r"\bto=([^\s<]+)")
_CHANNEL = re.compile(re.escape(CHANNEL) + r"\s*(\w+)")


class ChannelReader:
    """Reads one completion; `feed` takes pieces of any size.

    Args:
        calls: collects the events.
        opened: the prompt ends inside a message on the channel of thoughts.
    """

    def __init__(self, calls: Calls, opened: bool) -> None:
        self._calls = calls
        self._buffer = ""
        self._said: set[type] = set()  # kinds of text that came, of which another message begins on a new line
        self._break = False
        self._kind: Callable[[str], Event] = ReasoningDelta
        self._name = ""
        self._state: Callable[[], bool] = self._text if opened else self._first

    def feed(self, text: str) -> None:
        """Takes more of the completion."""
        self._buffer += text
        while self._state():
            pass

    def finish(self) -> None:
        """The completion ended. What was held back of a header is worth nothing; of a text it is text."""
        rest, self._buffer = self._buffer, ""
        if self._state == self._first:
            self._kind = ContentDelta
            self._say(rest)
        elif self._state == self._text:
            self._say(rest)
        elif self._state == self._arguments:
            self._calls.end(False)
        elif self._state == self._open_arguments and not rest.strip():
            self._calls.start(self._name)
            self._calls.end(False)
        self._state = lambda: False

    # Each state takes what it can from the buffer and says whether the next state may have work.

    def _first(self) -> bool:
        """A reply that does not begin with a header is the answer."""
        text = self._buffer.lstrip()
        heads = (CHANNEL, START, "to=", "assistant" + CHANNEL)
        if any(text.startswith(head) for head in heads):
            self._state = self._header
            return True
        if any(head.startswith(text) for head in heads):
            return False
        self._kind, self._state = ContentDelta, self._text
        return True

    def _header(self) -> bool:
        at = self._buffer.find(MESSAGE)
        if at < 0:
            if len(self._buffer) > MAX_HEADER:
                self._kind, self._state = ContentDelta, self._text
                return True
            return False
        header, self._buffer = self._buffer[:at], self._buffer[at + len(MESSAGE) :]
        recipient = found[1] if (found := _TO.search(header)) else ""
        channel = found[1] if (found := _CHANNEL.search(header)) else "final"
        self._state = self._text
        name = recipient.removeprefix("functions.")
        if recipient.startswith("functions.") and self._calls.known(name):
            self._name, self._state = name, self._open_arguments
        elif channel == "analysis" or (recipient and not recipient.startswith("functions.")):
            self._kind = ReasoningDelta  # calls of tools that the model brings along are thoughts
        else:
            self._kind = ContentDelta
        self._break = self._state == self._text and self._kind in self._said
        return True

    def _text(self) -> bool:
        at, marker = self._closing()
        if at < 0:
            ready = len(self._buffer) - _half_marker(self._buffer)
            self._say(self._buffer[:ready])
            self._buffer = self._buffer[ready:]
            return False
        self._say(self._buffer[:at])
        return self._end_message(at, marker)

    def _open_arguments(self) -> bool:
        text = self._buffer.lstrip(BLANKS)
        at, marker = self._closing()
        if text[:1] == "{" or (at >= 0 and not self._buffer[:at].strip()):
            self._calls.start(self._name)
            if at >= 0 and text[:1] != "{":
                self._calls.arguments("{}")
                self._calls.end(True)
                return self._end_message(at, marker)
            self._buffer, self._scanner, self._state = text, JSONScanner(repair=True), self._arguments
            return True
        if not text or any(mark.startswith(text) for mark in (START, *CLOSES)):
            return False
        # No object: the message is text.
        self._kind, self._state = ContentDelta, self._text
        return True

    def _arguments(self) -> bool:
        at, marker = self._closing()
        ready = at if at >= 0 else len(self._buffer) - _half_marker(self._buffer)
        broken = False
        for i, char in enumerate(self._buffer[:ready]):
            try:
                text = self._scanner.feed(char)
            except ValueError:
                broken = True
            else:
                self._calls.arguments(self._scanner.before + text)
            if broken or self._scanner.done:
                if broken:
                    self._calls.arguments(self._scanner.closing())
                self._calls.end(not broken)
                self._buffer, self._state = self._buffer[i + 1 :], self._rest
                return True
        if at < 0:
            self._buffer = self._buffer[ready:]
            return False
        self._calls.arguments(self._scanner.closing())
        self._calls.end(True)
        return self._end_message(at, marker)

    def _rest(self) -> bool:
        """What stands between the arguments and the end of the message."""
        at, marker = self._closing()
        if at < 0:
            self._buffer = self._buffer[len(self._buffer) - _half_marker(self._buffer) :]
            return False
        return self._end_message(at, marker)

    def _closing(self) -> tuple[int, str]:
        """(where the message ends, by what marker); (-1, "") for not yet. The start of another message ends it too."""
        found = [(at, mark) for mark in (*CLOSES, START) if (at := self._buffer.find(mark)) >= 0]
        return min(found, default=(-1, ""))

    def _end_message(self, at: int, marker: str) -> bool:
        self._buffer = self._buffer[at + (len(marker) if marker != START else 0) :]
        self._state = self._between
        return True

    def _between(self) -> bool:
        """Behind a message: another one, or text without a header."""
        text = self._buffer.lstrip()
        if not text or (START.startswith(text) and text != START) or (CHANNEL.startswith(text) and text != CHANNEL):
            return False
        if text.startswith((START, CHANNEL)):
            self._buffer, self._state = text, self._header
        else:
            self._kind, self._state = ContentDelta, self._text
            self._break = ContentDelta in self._said
        return True

    def _say(self, text: str) -> None:
        if not text:
            return
        if self._break:
            text, self._break = "\n" + text, False
        self._said.add(self._kind)  # type: ignore[arg-type]
        self._calls.events.append(self._kind(text))


def _half_marker(text: str) -> int:
    """How many characters at the end of `text` may be the beginning of a marker."""
    at = text.rfind("<", max(0, len(text) - 12))
    if at < 0:
        return 0
    tail = text[at:]
    return len(tail) if any(mark.startswith(tail) for mark in (START, *CLOSES)) else 0
