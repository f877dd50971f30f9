"""Traces: file format, tokens, generators."""

from __future__ import annotations

import itertools
import pathlib

import pytest

from serving.simulator.trace import (
    GENERATORS,
    TOKEN_HIGH,
    TOKEN_LOW,
    Lengths,
    TraceRequest,
    poisson,
    prompt_token_ids,
    read_trace,
    segment_tokens,
    write_trace,
)


@pytest.mark.parametrize("name", sorted(GENERATORS))
def test_generator_is_ordered_and_deterministic(name: str) -> None:
    requests = list(itertools.islice(GENERATORS[name](5.0, 3), 300))
    assert requests == list(itertools.islice(GENERATORS[name](5.0, 3), 300))
    assert requests != list(itertools.islice(GENERATORS[name](5.0, 4), 300))
    arrivals = [r.arrival for r in requests]
    assert arrivals == sorted(arrivals) and arrivals[0] > 0
    for r in requests:
        assert r.output_tokens >= 1 and r.prompt_tokens >= 1
        assert sum(n for _, n in r.prefix) <= r.prompt_tokens


@pytest.mark.parametrize("name", sorted(GENERATORS))
def test_file_round_trip(name: str, tmp_path: pathlib.Path) -> None:
    requests = list(itertools.islice(GENERATORS[name](2.0, 0), 100))
    assert write_trace(tmp_path / "t.jsonl", requests) == 100
    assert list(read_trace(tmp_path / "t.jsonl")) == requests


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        '{"arrival": 1.0}',
        '{"arrival": 1.0, "prompt_tokens": 0, "output_tokens": 1}',
        '{"arrival": 1.0, "prompt_tokens": 3, "output_tokens": 1, "colour": 2}',
        '{"arrival": 0.1, "prompt_tokens": 3, "output_tokens": 1}',
    ],
)
def test_bad_line_is_named(line: str, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"arrival": 0.5, "prompt_tokens": 3, "output_tokens": 1}\n' + line + "\n")
    with pytest.raises(ValueError, match="line 2"):
        list(read_trace(path))


def test_poisson_has_its_rate_and_lengths() -> None:
    requests = list(itertools.islice(poisson(8.0, Lengths(100, 0.5, 1, 10_000), Lengths(20, 0.5, 1, 40), 1), 4000))
    assert 4000 / requests[-1].arrival == pytest.approx(8.0, rel=0.05)
    assert sum(r.prompt_tokens for r in requests) / 4000 == pytest.approx(100, rel=0.05)
    assert max(r.output_tokens for r in requests) == 40


def test_prompts_share_exactly_their_prefix() -> None:
    prefix = ((7, 30), (8, 12))
    a = prompt_token_ids(TraceRequest(0, 60, 1, prefix=prefix), 1)
    b = prompt_token_ids(TraceRequest(0, 50, 1, prefix=prefix), 2)
    assert len(a) == 60 and len(b) == 50
    assert a[:42] == b[:42] == segment_tokens(7, 30) + segment_tokens(8, 12)
    assert a[42] != b[42] and a[42:50] != b[42:50]
    assert all(TOKEN_LOW <= t < TOKEN_HIGH for t in a + b)


def test_a_longer_segment_extends_a_shorter_one() -> None:
    assert segment_tokens(9, 40)[:25] == segment_tokens(9, 25)


def test_a_conversation_repeats_what_was_answered() -> None:
    by_output = {}
    followed = 0
    for i, r in enumerate(itertools.islice(GENERATORS["multi-turn"](1.0, 0), 400)):
        prompt = prompt_token_ids(r, i)
        if len(r.prefix) > 1:
            before, answer = by_output[r.prefix[-2][0]]
            assert prompt[: len(before)] == before
            assert prompt[len(before) : len(before) + len(answer)] == answer
            followed += 1
        assert r.output_id is not None
        by_output[r.output_id] = (prompt, segment_tokens(r.output_id, r.output_tokens))
    assert followed > 50
