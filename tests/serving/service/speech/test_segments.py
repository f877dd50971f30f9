"""Tokens with times as segments, and subtitles."""

import pytest

from serving.service.speech.segments import Segment, as_srt, as_vtt, cut

T = 100  # the token of 0.00 s


@pytest.mark.parametrize(
    ("tokens", "segments", "on"),
    [
        ([T, 1, 2, T + 50, T + 50, 3, T + 100], [(10, 11, [T, 1, 2, T + 50]), (11, 12, [T + 50, 3, T + 100])], 3000),
        ([T, 1, T + 50, T + 50, 3], [(10, 11, [T, 1, T + 50, T + 50])], 100),
        ([T, 1, T + 50, T + 60, 3, 4], [(10, 11, [T, 1, T + 50, T + 60])], 100),
        ([T, 1, 2], [(10, 40, [T, 1, 2])], 3000),
        ([T, 1, 2, T + 25], [(10, 10.5, [T, 1, 2, T + 25])], 3000),
        ([T, 1, T + 50, T + 50], [(10, 11, [T, 1, T + 50, T + 50])], 100),
    ],
)
def test_segments_and_where_the_next_window_begins(tokens, segments, on):
    found, frames = cut(tokens, T, 10.0, 3000)
    assert [(pytest.approx(a), pytest.approx(b), c) for a, b, c in segments] == found
    assert frames == on


def test_subtitles():
    said = [
        Segment(0, 0.0, 2.5, (), " Hello --> there.", 0.0, None),
        Segment(0, 3599.999, 3661.2, (), " Bye.", 0.0, None),
    ]
    assert as_srt(said) == (
        "1\n00:00:00,000 --> 00:00:02,500\nHello -> there.\n\n2\n00:59:59,999 --> 01:01:01,200\nBye.\n\n"
    )
    assert as_vtt(said).startswith("WEBVTT\n\n00:00:00.000 --> 00:00:02.500\nHello -> there.\n\n00:59:59.999")


def test_what_repeats_itself_is_told_by_its_size():
    assert Segment(0, 0, 1, (), "ha " * 100, 0.0, None).compression_ratio > 2.4
    assert Segment(0, 0, 1, (), "", 0.0, None).compression_ratio == 0.0
