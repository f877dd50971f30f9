"""A JSON reader that takes one character at a time, so that a call's arguments can be passed on while they come.

Models write JSON almost always right. `repair` reads what they write instead when they do not: Python's names and
quotes, NaN, trailing commas, backslashes of Markdown, keys without quotes, a comma or a bracket left out. Whatever is
passed on is JSON (RFC 8259) all the same.
"""

from __future__ import annotations

import re

BLANKS = " \t\n\r"
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_LOOSE_NUMBER = re.compile(r"([+-]?)0*([0-9]*)(\.[0-9]*)?([eE][+-]?[0-9]+)?")
_NUMBER_CHARS = frozenset("+-.0123456789eE")
_LITERALS = ("true", "false", "null")
# JSON has no number that is none: null is what JavaScript's JSON.stringify makes of it.
_WORDS = {
    **{word: word for word in _LITERALS},
    **{"True": "true", "False": "false", "None": "null", "undefined": "null"},
    **dict.fromkeys(("NaN", "nan", "Infinity", "inf", "-Infinity", "-inf", "+Infinity", "+inf", "-NaN"), "null"),
}
_CONTROL = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
_DROPPED_BACKSLASH = "'`_"
MAX_DEPTH = 256
MAX_WORD = 1024


class MalformedJSONError(ValueError):
    """A character came that JSON does not allow there."""


class JSONScanner:
    """Follows one JSON value whose first character is `{` or `[`.

    Control characters inside strings, which models write though JSON forbids them, become escapes always.

    Args:
        repair: read what is nearly JSON too.
    Attributes:
        depth: containers that are open.
        key: the last complete key of the object that is open at depth 1.
        done: the value is complete.
        value_started, value_ended: whether the last character started or ended a value directly in the outermost
            container. A number or a word ends at the character behind it; then `ended_before` is True.
        before: of the text that was held back, what ended with the last character, which is not part of it.
    """

    def __init__(self, repair: bool = False) -> None:
        self.depth = 0
        self.key: str | None = None
        self.done = False
        self.value_started = self.value_ended = self.ended_before = False
        self.before = ""
        self._repair = repair
        self._stack: list[str] = []
        self._expect = "value"  # value, key_or_end, key, colon, comma, value_or_end, string, number, word, bare_key
        self._token = ""
        self._held = ""  # a comma, which a closing bracket may make one too many, and the blanks behind it
        self._is_key = False
        self._quote = '"'
        self._escape = ""  # an escape sequence of which more is to come

    @property
    def in_string(self) -> bool:
        """Whether the next character belongs to a string."""
        return self._expect == "string"

    def feed(self, char: str) -> str:
        """Takes the next character; the JSON text that became certain with it and belongs to it.

        Raises:
            MalformedJSONError: it does not fit; the scanner is of no more use, but for `closing`.
        """
        self.value_started = self.value_ended = self.ended_before = False
        self.before = ""
        if self._expect == "string":
            return self._string(char)
        if self._expect in ("number", "word", "bare_key"):
            if self._goes_on(char):
                if len(self._token) >= MAX_WORD:
                    raise MalformedJSONError("a word too long")
                self._token += char
                return ""
            self._end_token()
        if char in BLANKS:
            if self._held:
                self._held += char
                return ""
            return char
        ended = self.value_ended
        text = self._structure(char)
        self.value_ended = self.value_ended or ended
        return text

    def closing(self) -> str:
        """What makes the text that was given out a whole JSON value, where it ends here."""
        text = ""
        if self._expect == "string":
            text = '": null' if self._is_key else '"'
        elif self._expect == "colon":
            text = ": null"
        elif self._expect == "value" and not self._held and self.depth:
            text = "null"
        elif self._expect == "bare_key":
            text = f'"{self._token}": null'
        elif self._expect in ("number", "word"):
            text = _number(self._token, True) or _WORDS.get(self._token, "null")
        for bracket in reversed(self._stack):
            text += "}" if bracket == "{" else "]"
        return text

    def _goes_on(self, char: str) -> bool:
        if self._expect != "number":
            return char.isalnum() or char in "_$-"
        if char in _NUMBER_CHARS:
            return True
        if self._repair and char.isalpha() and self._token in "+-":
            self._expect = "word"
            return True
        return False

    def _end_token(self) -> None:
        """A number, a word or a key without quotes is complete: the character that comes is not part of it."""
        token, expect = self._token, self._expect
        if expect == "bare_key":
            if self.depth == 1:
                self.key = token
            self._expect, self.before = "colon", f'"{token}"'
            return
        if expect == "number":
            text = _number(token, self._repair)
        else:
            text = _WORDS.get(token, "") if self._repair else token * (token in _LITERALS)
        if not text:
            raise MalformedJSONError(f"{token!r} is not JSON")
        self.before = text
        self._close_value()
        self.ended_before = self.value_ended

    def _structure(self, char: str) -> str:
        expect = self._expect
        if char in "}]" and self._stack:
            return self._close(char)
        if expect == "comma":
            if char == ",":
                self._expect, self._held = ("key" if self._stack[-1] == "{" else "value"), ","
                return ""
            if self._repair and char in "\"'":
                self._expect, self._held = ("key" if self._stack[-1] == "{" else "value"), ", "
                return self._structure(char)
        elif expect == "colon" and char == ":":
            self._expect = "value"
            return char
        elif expect in ("key", "key_or_end"):
            if char == '"' or (char == "'" and self._repair):
                return self._release() + self._begin_string(char, is_key=True)
            if self._repair and (char.isalpha() or char in "_$"):
                self._expect, self._token = "bare_key", char
                return self._release()
        elif expect in ("value", "value_or_end"):
            return self._value(char)
        raise MalformedJSONError(f"unexpected {char!r}")

    def _close(self, char: str) -> str:
        opener = "{" if char == "}" else "["
        fits = self._stack[-1] == opener
        empty = self._expect == ("key_or_end" if char == "}" else "value_or_end")
        if fits and (empty or self._expect == "comma"):
            self._stack.pop()
            self.depth -= 1
            self._close_value()
            return char
        if not self._repair or opener not in self._stack:
            raise MalformedJSONError(f"unexpected {char!r}")
        # A comma too many, a value left out, or inner brackets that were not closed.
        text = ""
        if self._expect == "colon":
            text = ": null"
        elif self._expect == "value" and not self._held:
            text = "null"
        elif self._held:
            text = self._held[1:]
        self._held = ""
        while self._stack:
            top = self._stack.pop()
            self.depth -= 1
            text += "}" if top == "{" else "]"
            if top == opener:
                break
        self._close_value()
        return text

    def _release(self) -> str:
        held, self._held = self._held, ""
        return held

    def _value(self, char: str) -> str:
        self.value_started = self.depth == 1
        held = self._release()
        if char in "{[":
            if self.depth >= MAX_DEPTH:
                raise MalformedJSONError(f"nested more than {MAX_DEPTH} deep")
            self._stack.append(char)
            self.depth += 1
            self._expect = "key_or_end" if char == "{" else "value_or_end"
            return held + char
        if self.depth and (char == '"' or (char == "'" and self._repair)):
            return held + self._begin_string(char, is_key=False)
        if self.depth and (char in "-0123456789" or (self._repair and char in "+.")):
            self._expect, self._token = "number", char
            return held
        if self.depth and (char in "tfn" or (self._repair and char.isalpha())):
            self._expect, self._token = "word", char
            return held
        self._held = held
        raise MalformedJSONError(f"unexpected {char!r}")

    def _begin_string(self, quote: str, is_key: bool) -> str:
        self._expect, self._is_key, self._quote, self._token, self._escape = "string", is_key, quote, "", ""
        return '"'

    def _string(self, char: str) -> str:
        if self._escape:
            return self._escaped(char)
        if char == "\\":
            self._escape = char
            return ""
        if char == self._quote:
            if self._is_key:
                if self.depth == 1:
                    self.key = self._token
                self._expect = "colon"
            else:
                self._close_value()
            return '"'
        return self._note('\\"' if char == '"' else _plain(char))

    def _escaped(self, char: str) -> str:
        """The escape sequence, if it is complete with `char`."""
        sequence, self._escape = self._escape + char, ""
        if sequence[1] == "u":
            if len(sequence) == 2 or char in "0123456789abcdefABCDEF":
                if len(sequence) == 6:
                    return self._note(sequence)
                self._escape = sequence
                return ""
            if not self._repair:
                raise MalformedJSONError(f"{char!r} in a \\u escape")
            return self._note("\\" + sequence[:-1]) + self._string(char)
        if char in '"\\/bfnrt':
            return self._note(sequence)
        if not self._repair:
            raise MalformedJSONError(f"unknown escape {sequence}")
        return self._note(char if char in _DROPPED_BACKSLASH else "\\\\" + _plain(char))

    def _note(self, text: str) -> str:
        if self._is_key and self.depth == 1:
            self._token += text
        return text

    def _close_value(self) -> None:
        self._expect = "comma"
        self.value_ended = self.depth == 1
        self.done = self.depth == 0


def repaired_json(text: str) -> str:
    """The JSON text of one object or list that is nearly JSON.

    Raises:
        MalformedJSONError: it cannot be read, or is not complete.
    """
    scanner = JSONScanner(repair=True)
    out = []
    for char in text.strip():
        if scanner.done:
            raise MalformedJSONError("text behind the value")
        part = scanner.feed(char)
        out += (scanner.before, part)
    if not scanner.done:
        raise MalformedJSONError("not complete")
    return "".join(out)


def _plain(char: str) -> str:
    """A character as it stands in a JSON string."""
    return char if char >= " " else _CONTROL.get(char, f"\\u{ord(char):04x}")


def _number(token: str, loose: bool) -> str:
    """A number's text as JSON wants it; empty where it is none."""
    if _NUMBER.fullmatch(token):
        return token
    found = _LOOSE_NUMBER.fullmatch(token) if loose else None
    if found is None or not any(char.isdigit() for char in token.partition("e")[0]):
        return ""
    sign, whole, fraction, exponent = (found[i] or "" for i in range(1, 5))
    text = ("-" if sign == "-" else "") + (whole or "0") + (fraction if len(fraction) > 1 else "") + exponent
    return text if _NUMBER.fullmatch(text) else ""
