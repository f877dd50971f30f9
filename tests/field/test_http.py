"""Requests that failed in other people's hands, each with its right answer: every line of http.jsonl.

A line whose right answer is a status and an error says so in `expect`; what is right about the others is a function of the modules
beside this one, by the line's id. Both are looked up, so a line without either fails.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.field import chat_right, http_right, text_right
from tests.field.harness import CHECKS, LINES, Line, ask, line_of, service_for

MODULES = (chat_right, http_right, text_right)


@pytest.mark.parametrize("name", [line["id"] for line in LINES])
async def test_every_line_is_right(name: str):
    line = line_of(name)
    if name in CHECKS:
        await CHECKS[name](line)
        return
    check_expected(line, *await ask(service_for(line), line))


def check_expected(line: Line, status: int, reply: dict[str, Any]) -> None:
    """Holds a reply against the line's `expect`."""
    expect = line["expect"]
    assert status == expect["status"], reply
    error = reply.get("error") or {}
    for field in ("param", "code"):
        if field in expect:
            assert error[field] == expect[field], reply
    assert error.get("message", "").startswith(expect.get("starts", ""))
    assert not any(word in error.get("message", "") for word in expect.get("hides", ()))


def test_the_tables_know_the_same_lines():
    assert set(CHECKS) <= {line["id"] for line in LINES} and MODULES
    assert all(line["id"] in CHECKS or "expect" in line for line in LINES)
