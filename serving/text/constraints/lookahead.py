"""Regular expressions with look-ahead at their start, said by several without any.

The grammar compiler's expressions are regular in the strict sense, but it can demand that a text matches several at once. What
pydantic writes for a `Decimal` and zod for an e-mail address is such a case: `^(?!\\.)(?!.*\\.\\.)[a-z.]+@…$`.
"""

from __future__ import annotations

import re

_ANY = r"[\s\S]"
_CLASS = re.compile(r"\[(\^?)((?:\\.|[^\]\\])+)\]|(\\[dDwWsS])")
_SIMPLE = re.compile(r"\\[^\w]|[^\\^$.|?*+()\[\]{}]")
_LONGEST = 64
_LOOKS = ("(?=", "(?!", "(?<=", "(?<!")


def apart(pattern: str) -> list[str] | None:
    """Expressions without look-ahead, all of which a text must match (anywhere in it, as in JSON Schema) to match `pattern`.

    Every text that matches them all matches `pattern`; the reverse holds for texts of one line.

    Returns:
        `pattern` alone where it has no look-ahead; None where it cannot be taken apart.
    """
    pattern = _spelt(pattern)
    if not _looks(pattern):
        return [pattern]
    if not pattern.startswith("^") or len(_alternatives(pattern)) > 1:
        return None
    rest, found = pattern[1:], []
    while rest.startswith(("(?=", "(?!")):
        end = _closing(rest)
        if end is None:
            return None
        body, negative = rest[3:end].removeprefix("^"), rest.startswith("(?!")
        rest = rest[end + 1 :]
        parts = [_without(one) for one in _each(body)] if negative else [_with(body)]
        if any(part is None for part in parts):
            return None
        found += [part for part in parts if part is not None]
    whole = [f"^{rest}", *found]
    return None if any(map(_looks, whole)) else whole


def other_than(text: str) -> str:
    """An expression of every text but this one."""
    return _unlike(text, also_longer=True)


def _looks(pattern: str) -> bool:
    """Whether there is look-ahead or look-behind in an expression."""
    return any(letter == "(" and pattern.startswith(_LOOKS, place) for place, letter in _plain(pattern))


def _spelt(pattern: str) -> str:
    """With Python's signs for beginning and end as JSON Schema has them."""
    if pattern.startswith(r"\A"):
        pattern = "^" + pattern[2:]
    if pattern.endswith((r"\Z", r"\z")) and not pattern.endswith((r"\\Z", r"\\z")):
        pattern = pattern[:-2] + "$"
    return pattern


def _with(body: str) -> str | None:
    """What begins with something that matches `body`."""
    ends = body.endswith("$") and not body.endswith(r"\$")
    inner = body[:-1] if ends else body
    return f"^(?:{inner}){'$' if ends else ''}"


def _each(body: str) -> list[str]:
    """The alternatives of an expression, also of a group that is all of it: `(?:a|b)$` is `a$` or `b$`."""
    group = re.fullmatch(r"\((?:\?:)?([^()]*)\)(\$?)", body)
    if group is None:
        return [one.removeprefix("^") for one in _alternatives(body)]
    return [one + group[2] for one in _alternatives(group[1])]


def _without(body: str) -> str | None:
    """What does not begin with a match of `body`: an expression of one of a few common forms."""
    ends = body.endswith("$") and not body.endswith(r"\$")
    inner = body[:-1] if ends else body
    if inner.startswith(".*") and not ends:
        return _never(inner[2:])
    if inner[-1:] in ("*", "+") and ends and (members := _class(inner[:-1])):
        other = _complement(members)
        return other if inner.endswith("*") else f"^(?:{_ANY}*{other}{_ANY}*)?$"
    if (members := _class(inner)) and not ends:
        return f"^(?:{_complement(members)}{_ANY}*)?$"
    text = _literal(inner)
    return None if text is None else _unlike(text, also_longer=ends)


def _never(body: str) -> str | None:
    """What has no match of `body` in it: a class, or one or two letters."""
    if members := _class(body):
        return f"^{_complement(members)}*$"
    text = _literal(body)
    if text is None or len(text) > 2:
        return None
    first, last = (_among(letter) for letter in (text[0], text[-1]))
    if len(text) == 1:
        return f"^[^{first}]*$"
    if first == last:
        return f"^(?:{_out(text[0])}[^{first}]|[^{first}])*{_out(text[0])}?$"
    return f"^(?:[^{first}]|{_out(text[0])}+[^{first}{last}])*{_out(text[0])}*$"


def _unlike(text: str, also_longer: bool) -> str:
    """What does not begin with `text`; or, with `also_longer`, what only is not equal to it."""
    expression = f"{_ANY}+" if also_longer else ""
    for place in range(len(text) - 1, -1, -1):
        letter = text[place]
        after = f"{_out(letter)}{expression}" if place == len(text) - 1 else f"{_out(letter)}(?:{expression})?"
        if place == len(text) - 1 and not also_longer:
            after = ""
        expression = f"[^{_among(letter)}]{_ANY}*" + (f"|{after}" if after else "")
    return f"^(?:{expression})?$" if text else f"^{_ANY}+$"


def _class(body: str) -> str | None:
    """A class of letters, as an expression, or None for what is none."""
    found = _CLASS.fullmatch(body)
    return None if found is None or (found[2] or "").startswith("[:") else body


def _complement(members: str) -> str:
    if members.startswith("[^"):
        return "[" + members[2:]
    return "[^" + members[1:] if members.startswith("[") else f"[^{members}]"


def _literal(body: str) -> str | None:
    """The text that an expression without operators is."""
    if len(body) > _LONGEST or not body:
        return None
    letters = _SIMPLE.findall(body)
    return "".join(letter[-1] for letter in letters) if "".join(letters) == body else None


def _out(letter: str) -> str:
    return re.escape(letter)


def _among(letter: str) -> str:
    """A letter within a class."""
    return "\\" + letter if letter in r"\]^-[&~" else letter


def _closing(text: str) -> int | None:
    """Where the group at the beginning ends."""
    depth = 0
    for place, letter in _plain(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return place
    return None


def _alternatives(text: str) -> list[str]:
    """What `|` parts, outside of groups."""
    depth, begin, found = 0, 0, []
    for place, letter in _plain(text):
        depth += (letter == "(") - (letter == ")")
        if letter == "|" and not depth:
            found.append(text[begin:place])
            begin = place + 1
    return [*found, text[begin:]]


def _plain(text: str) -> list[tuple[int, str]]:
    """The characters that are no part of a class and not escaped, with their places."""
    found: list[tuple[int, str]] = []
    inside, place = False, 0
    while place < len(text):
        letter = text[place]
        if letter == "\\":
            place += 2
            continue
        if inside:
            inside = letter != "]"
        elif letter == "[":
            inside = True
            place += 2 if text[place + 1 : place + 2] in ("]",) else 1
            continue
        else:
            found.append((place, letter))
        place += 1
    return found
