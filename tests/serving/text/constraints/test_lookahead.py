"""Expressions with look-ahead that are said without, against Python's."""

from __future__ import annotations

import random
import re

import pytest

from serving.text.constraints.lookahead import apart, other_than

DECIMAL = r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$"  # pydantic's
EMAIL = r"^(?!\.)(?!.*\.\.)([A-Za-z0-9_'+\-\.]*)[A-Za-z0-9_+-]@([A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$"  # zod's


@pytest.mark.parametrize(
    ("pattern", "letters"),
    [
        (DECIMAL, "-+.01a"),
        (EMAIL, "ab.@"),
        (r"^(?=.*\d)(?=.*[a-z]).{4,8}$", "ab1"),
        (r"^(?=a.*c$)[abc]+$", "abc"),
        (r"^(?!ab)[abc]{1,4}$", "abc"),
        (r"^(?!ab$)[abc]{1,4}$", "abc"),
        (r"^(?!a|bc)[abc]{1,4}$", "abc"),
        (r"^(?!(?:ab|c)$)[abc]{1,3}$", "abc"),
        (r"^(?!.*ab)[abc]*$", "abc"),
        (r"^(?!.*\[\])[\[\]a]*$", "[]a"),
        (r"^(?!.*a)[abc]*$", "abc"),
        (r"^(?![ab])[abc]{1,3}$", "abc"),
        (r"^(?![^ab])[abc]{1,3}$", "abc"),
        (r"^(?![ab]+$)[abc]*$", "abc"),
        (r"^(?!\d+$)[a1]{1,3}$", "a1"),
        (r"^(?!-)(?!.*--)[a-z-]+$", "a-"),
        (r"^[^(?=]$", "(?=a"),
        ("^a$", "ab"),
    ],
)
def test_the_parts_together_say_what_the_whole_does(pattern, letters):
    parts, rng = apart(pattern), random.Random(0)
    assert parts is not None and not any(re.search(r"(?<!\[\^)\(\?[=!]", part) for part in parts)
    found = set()
    for _ in range(3000):
        text = "".join(rng.choice(letters) for _ in range(rng.randrange(9)))
        wanted = re.search(pattern, text) is not None
        found.add(wanted)
        assert all(re.search(part, text) for part in parts) == wanted, text
    assert found == {True, False}


@pytest.mark.parametrize(
    "pattern",
    [r"^(?!.*abc)[abc]*$", r"(?!a)b", r"^(?!a)b|c$", r"^a(?=b)", r"^(?!a", r"^(?!(a|(b)))c", r"^(?<!a)b", r"^(?!a+b)c"],
)
def test_what_cannot_be_said_without_is_left(pattern):
    assert apart(pattern) in (None, [pattern])


def test_pythons_signs_for_beginning_and_end():
    assert apart(r"\Aab\Z") == ["^ab$"]
    assert apart(r"ab\\Z") == [r"ab\\Z"]


@pytest.mark.parametrize("text", ["", "a", "ab", "a]b", "^-", "x|y", "ü\n"])
def test_every_other_text(text):
    for other in ("", "a", "ab", "abc", "b", "a]b", "a]bc", "^-", "^", "x|y", "x", "ü", "ü\n", "ü\nx"):
        # Python's $ is also before a line's end at the text's end.
        expression = other_than(text).removesuffix("$") + r"\Z"
        assert (re.search(expression, other) is not None) == (other != text)
