"""A JSON reader that takes one character at a time, so that a call's arguments can be passed on while they come."""

from __future__ import annotations

import re

BLANKS = " \t\n\r"
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_NUMBER_CHARS = frozenset("+-.0123456789eE")
_LITERALS = ("true", "false", "null")
MAX_DEPTH = 256


class MalformedJSONError(ValueError):
    """A character came that JSON does not allow there."""


class JSONScanner:
    """Follows one JSON value (RFC 8259) whose first character is `{` or `[`.

    Control characters inside strings, which models write though JSON forbids them, are allowed; see `repaired`.

    Attributes:
        depth: containers that are open.
        key: the last complete key of the object that is open at depth 1.
        done: the value is complete.
        value_started, value_ended: whether the last character started or ended a value directly in the outermost
            container. A number ends at the character behind it; then `ended_before` is True.
    """

    def __init__(self) -> None:
        self.depth = 0
        self.key: str | None = None
        self.done = False
        self.value_started = self.value_ended = self.ended_before = False
        self._stack: list[str] = []
        self._expect = "value"  # value, key_or_end, key, colon, comma, value_or_end, string, number, literal
        self._token = ""
        self._is_key = False
        self._escape = 0  # characters of an escape sequence still to come; -1 behind the backslash

    @property
    def in_string(self) -> bool:
        """Whether the next character belongs to a string."""
        return self._expect == "string"

    def feed(self, char: str) -> None:
        """Takes the next character.

        Raises:
            MalformedJSONError: it does not fit; the scanner is of no more use.
        """
        self.value_started = self.value_ended = self.ended_before = False
        if self._expect == "string":
            self._string(char)
            return
        if self._expect == "number":
            if char in _NUMBER_CHARS:
                self._token += char
                return
            if not _NUMBER.fullmatch(self._token):
                raise MalformedJSONError(f"{self._token!r} is not a number")
            self._close_value()
            self.ended_before = self.value_ended
        elif self._expect == "literal":
            self._token += char
            if not any(word.startswith(self._token) for word in _LITERALS):
                raise MalformedJSONError(f"{self._token!r} is not JSON")
            if self._token in _LITERALS:
                self._close_value()
            return
        if char in BLANKS:
            return
        ended = self.value_ended
        self._structure(char)
        self.value_ended = self.value_ended or ended

    def _structure(self, char: str) -> None:
        expect = self._expect
        if char in "}]" and self._stack and self._stack[-1] == ("{" if char == "}" else "["):
            if expect in ("comma", "key_or_end" if char == "}" else "value_or_end"):
                self._stack.pop()
                self.depth -= 1
                self._close_value()
                return
        elif expect == "comma" and char == ",":
            self._expect = "key" if self._stack[-1] == "{" else "value"
            return
        elif expect == "colon" and char == ":":
            self._expect = "value"
            return
        elif expect in ("key", "key_or_end") and char == '"':
            self._begin_string(is_key=True)
            return
        elif expect in ("value", "value_or_end"):
            self._value(char)
            return
        raise MalformedJSONError(f"unexpected {char!r}")

    def _value(self, char: str) -> None:
        self.value_started = self.depth == 1
        if char in "{[":
            if self.depth >= MAX_DEPTH:
                raise MalformedJSONError(f"nested more than {MAX_DEPTH} deep")
            self._stack.append(char)
            self.depth += 1
            self._expect = "key_or_end" if char == "{" else "value_or_end"
        elif self.depth == 0:
            raise MalformedJSONError(f"unexpected {char!r}")
        elif char == '"':
            self._begin_string(is_key=False)
        elif char in "-0123456789":
            self._expect, self._token = "number", char
        elif char in "tfn":
            self._expect, self._token = "literal", char
        else:
            raise MalformedJSONError(f"unexpected {char!r}")

    def _begin_string(self, is_key: bool) -> None:
        self._expect, self._is_key, self._token, self._escape = "string", is_key, "", 0

    def _string(self, char: str) -> None:
        if self._escape == -1:
            if char not in '"\\/bfnrtu':
                raise MalformedJSONError(f"unknown escape \\{char}")
            self._escape = 4 if char == "u" else 0
        elif self._escape > 0:
            if char not in "0123456789abcdefABCDEF":
                raise MalformedJSONError(f"{char!r} in a \\u escape")
            self._escape -= 1
        elif char == "\\":
            self._escape = -1
        elif char == '"':
            if self._is_key:
                if self.depth == 1:
                    self.key = self._token
                self._expect = "colon"
            else:
                self._close_value()
            return
        if self._is_key and self.depth == 1:
            self._token += char

    def _close_value(self) -> None:
        self._expect = "comma"
        self.value_ended = self.depth == 1
        self.done = self.depth == 0


def repaired(char: str, in_string: bool) -> str:
    """`char` as JSON wants it: control characters inside a string become escapes."""
    if in_string and char < " ":
        return {"\n": "\\n", "\r": "\\r", "\t": "\\t"}.get(char, f"\\u{ord(char):04x}")
    return char
