"""The reader of calls with one tagged text per argument: Qwen3-Coder's, GLM's, MiniMax's, DeepSeek V3.2's, Seed's."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable

from serving.text.tools.family import ToolFamily
from serving.text.tools.json_scan import BLANKS
from serving.text.tools.payloads import MAX_NAME, BrokenCallError, Calls, NotACallError

MAX_VALUE = 1 << 20
_TAIL = 3 * MAX_NAME  # the closing tags of a call, or the opening ones of an argument, are no longer


class TaggedReader:
    """Arguments are passed on one by one, as each is complete. Closing tags may be left out: a value then ends where
    a line begins with the tag of another argument that the tool has, or with the tags that close the call. And a value may have its
    closing tag in its own text: it ends at one behind which a call can go on, or end."""

    def __init__(self, family: ToolFamily, calls: Calls) -> None:
        assert family.tags is not None
        self.done = self.open_call = self.complete = False
        self._calls = calls
        tags = {field: text.strip() for field, text in dataclasses.asdict(family.tags).items()}
        self._tags = tags
        self._call_end = family.end.strip() or family.wrap[1].strip()
        # Whether a value stands on lines of its own: always, perhaps, or never.
        self._own_lines = family.tags.value_open == "\n"
        self._perhaps_own_lines = not tags["value_open"]
        self._text: list[str] = []
        self._name = self._key = ""
        self._found = ""
        self._value_end, self._behind = 0, ""
        self._as_text = False
        self._seen: set[str] = set()
        self._stage: Callable[[str], None] = self._lead if tags["name_open"] else self._read_name
        key_open, key_close = re.escape(tags["key_open"]), re.escape(tags["key_close"])
        self._next_key = re.compile(rf"\n[ \t]*{key_open}([^<>\n]{{1,{2 * MAX_NAME}}}?){key_close}\Z")
        closes = re.escape(tags["args_close"])
        both = (rf"{closes}\s*" if closes else "") + re.escape(self._call_end)
        self._end_of_call = re.compile(rf"\n[ \t]*(?:{both}|{re.escape(self._call_end)})\Z")
        self._end_of_text = re.compile(rf"\n[ \t]*{closes or re.escape(self._call_end)}\s*\Z")

    def feed(self, char: str) -> None:
        try:
            if len(self._text) >= MAX_VALUE:
                raise NotACallError("too long")
            self._stage(char)
        except ValueError:
            if not self.open_call:
                raise
            self._end(False)
            raise BrokenCallError(char) from None

    def finish(self) -> None:
        """Ends a call whose own closing tag came, though its last argument's did not."""
        if self.open_call and self._stage == self._behind_value:
            self._close_value()
        if not self.open_call or self._stage != self._read_value:
            return
        if (value := self._before(self._end_of_text)) is not None:
            self._value(value)
            self._end(True)

    def _lead(self, char: str) -> None:
        if self._expect(char, self._tags["name_open"]):
            self._stage = self._read_name

    def _read_name(self, char: str) -> None:
        close = self._tags["name_close"]
        ends = char == close[:1] if close else char in "\n<" and bool(self._text)
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
        if len(close) > 1:
            self._text, self._stage = [char], self._close_name
        elif char == "<" and not close:
            self._between(char)

    def _close_name(self, char: str) -> None:
        if self._expect(char, self._tags["name_close"]):
            self._stage = self._between

    def _between(self, char: str) -> None:
        tags = self._tags
        found = self._expect(char, tags["key_open"], tags["args_close"], tags["value_close"], self._call_end)
        if found == tags["key_open"]:
            self._stage = self._read_key
        elif found and found != tags["value_close"]:
            self._end(True)
            self.done = True

    def _read_key(self, char: str) -> None:
        if len(self._text) > 2 * MAX_NAME:
            raise NotACallError("a name too long")
        if (text := self._until(char, self._tags["key_close"])) is not None:
            self._open_key(text)

    def _open_key(self, text: str) -> None:
        # `name="city" string="true` says that the value is a text, whatever the schema says (DeepSeek V3.2).
        key, _, attributes = text.partition('"')
        self._key, self._as_text = key.strip(), 'string="true' in attributes
        self._stage = self._open_value if self._tags["value_open"] else self._read_value

    def _open_value(self, char: str) -> None:
        if self._expect(char, self._tags["value_open"]):
            self._stage = self._read_value

    def _read_value(self, char: str) -> None:
        close = self._tags["value_close"]
        self._text.append(char)
        if char == close[-1] and "".join(self._text[-len(close) :]) == close:
            self._value_end, self._behind, self._stage = len(self._text) - len(close), "", self._behind_value
            return
        if char != ">":
            return
        if (value := self._before(self._next_key)) is not None:
            written = self._found
            key = written.partition('"')[0].strip()
            if self._calls.of(self._name).knows(key) and key not in self._seen | {self._key}:
                self._value(value)
                self._text = []
                self._open_key(written)
        elif (value := self._before(self._end_of_call)) is not None:
            self._value(value)
            self._end(True)
            self.done = True

    def _behind_value(self, char: str) -> None:
        """Behind a tag that closes a value, unless what follows shows that it was in the value's text."""
        self._behind += char
        tags, text = self._tags, self._behind.lstrip(BLANKS)
        known = (tags["key_open"], tags["args_close"], tags["value_close"], self._call_end)
        wanted = [tag for tag in known if tag]
        if text in wanted:
            self._close_value()
        elif any(tag.startswith(text) for tag in wanted):
            return
        else:
            self._stage, text = self._read_value, self._behind
        for one in text:
            self._stage(one)

    def _close_value(self) -> None:
        value, self._text = "".join(self._text[: self._value_end]), []
        self._value(value)
        self._stage = self._between

    def _before(self, tag: re.Pattern[str]) -> str | None:
        """The value that was read so far without the tag at its end; None where none is there, at a line's beginning."""
        tail = "".join(self._text[-_TAIL:])
        at = len(self._text) - len(tail)
        found = tag.search(tail if at else "\n" + tail)
        if found is None:
            return None
        self._found = found[1] if tag.groups else ""
        return "".join(self._text)[: max(0, at + found.start() - (not at))]

    def _value(self, text: str) -> None:
        if self._own_lines:
            text = text.removeprefix("\n").removesuffix("\n")
        elif self._perhaps_own_lines and len(text) > 1 and text[0] == text[-1] == "\n":
            text = text[1:-1]
        value = text if self._as_text else self._calls.of(self._name).read(self._key, text)
        comma = ", " if self._seen else ""
        self._seen.add(self._key)
        key = json.dumps(self._key, ensure_ascii=False)
        self._calls.arguments(f"{comma}{key}: {json.dumps(value, ensure_ascii=False)}")

    def _end(self, complete: bool) -> None:
        self._calls.arguments("}")
        self._calls.end(complete)
        self.open_call = False

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
        if not any(want.startswith(text) for want in wanted if want):
            raise NotACallError(text)
        if text in wanted:
            self._text = []
            return text
        self._text.append(char)
        return ""
