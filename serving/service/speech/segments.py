"""A window's tokens as segments with times, and transcripts in the forms that clients ask for."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Sequence

from serving.service.speech.words import Word

STEP_S = 0.02
"""Between two of Whisper's times."""
FRAMES_A_STEP = 2


@dataclasses.dataclass(frozen=True)
class Segment:
    """A stretch of a transcript.

    Attributes:
        seek: where its window begins, in frames of 10 ms.
        start, end: seconds.
        tokens: with its times.
        text: without.
        temperature, avg_logprob: as it was drawn, and the mean of its window's tokens' log probabilities; None where unknown.
        no_speech: the probability that nobody speaks in its window; None where unknown.
        words: when each was said, where that was asked for.
    """

    seek: int
    start: float
    end: float
    tokens: tuple[int, ...]
    text: str
    temperature: float
    avg_logprob: float | None
    no_speech: float | None = None
    words: tuple[Word, ...] = ()

    @property
    def compression_ratio(self) -> float:
        """Of its text."""
        return compression_ratio(self.text)


def compression_ratio(text: str) -> float:
    """How much smaller a text can be written: more than 2.4 mostly says that it repeats itself."""
    raw = text.encode()
    return len(raw) / len(zlib.compress(raw)) if raw else 0.0


def cut(
    tokens: Sequence[int], times: int, offset: float, frames: int
) -> tuple[list[tuple[float, float, list[int]]], int]:
    """A window's segments, (start s, end s, tokens) each, and how many frames on the next window begins: at the last time, where
    a segment was not finished; else behind the window.

    Args:
        tokens: without the end's.
        times: the token of 0.00 s.
        offset: where the window begins, seconds.
        frames: that the window has.
    """
    is_time = [token >= times for token in tokens]
    single_end = is_time[-2:] == [False, True]
    cuts = [i + 1 for i in range(len(tokens) - 1) if is_time[i] and is_time[i + 1]]
    if not cuts:
        last = int(frames / FRAMES_A_STEP)
        said = [token for token, time in zip(tokens, is_time, strict=True) if time]
        if said and said[-1] != times:
            last = said[-1] - times
        return [(offset, offset + last * STEP_S, list(tokens))], frames
    if single_end:
        cuts.append(len(tokens))
    else:
        cuts[-1] += 1  # the time behind it shows that it did not end alone
    segments, begin = [], 0
    for index, end in enumerate(cuts):
        part = list(tokens[begin:end])
        last_time = part[-1 if index < len(cuts) - 1 or single_end else -2]
        segments.append((offset + (part[0] - times) * STEP_S, offset + (last_time - times) * STEP_S, part))
        begin = end
    on = frames if single_end else (tokens[begin - 2] - times) * FRAMES_A_STEP
    return segments, on


def as_srt(segments: Sequence[Segment]) -> str:
    """SubRip subtitles."""
    return "".join(
        f"{number}\n{_clock(s.start, ',')} --> {_clock(s.end, ',')}\n{_line(s.text)}\n\n"
        for number, s in enumerate(segments, 1)
    )


def as_vtt(segments: Sequence[Segment]) -> str:
    """WebVTT subtitles."""
    return "WEBVTT\n\n" + "".join(
        f"{_clock(s.start, '.')} --> {_clock(s.end, '.')}\n{_line(s.text)}\n\n" for s in segments
    )


def _line(text: str) -> str:
    return text.strip().replace("-->", "->").replace("\n", " ")


def _clock(seconds: float, point: str) -> str:
    thousandths = round(max(0.0, seconds) * 1000)
    minutes, thousandths = divmod(thousandths, 60_000)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{thousandths // 1000:02}{point}{thousandths % 1000:03}"


FORMS: dict[str, Callable[[Sequence[Segment]], str]] = {"srt": as_srt, "vtt": as_vtt}
