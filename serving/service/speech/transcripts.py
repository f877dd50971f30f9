"""What a client asks of speech to text, and what it is answered."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

from serving.errors import ErrorKind, RequestError
from serving.service.speech.doubts import Doubts
from serving.service.speech.segments import Segment
from serving.service.speech.words import Word


class Files:
    """The sound files of requests that run.

    Attributes:
        held: bytes of them.
    """

    def __init__(self) -> None:
        self.held = 0

    @contextlib.contextmanager
    def holding(self, data: bytes, most: int) -> Iterator[None]:
        """Counts a file for as long as its request runs.

        Args:
            most: bytes of all of them.
        Raises:
            RequestError: RESOURCE_EXHAUSTED: those of others are too many bytes already.
        """
        if self.held + len(data) > most:
            raise RequestError(
                ErrorKind.RESOURCE_EXHAUSTED, f"The sound files that requests have sent are more than {most} bytes "
                "together. Try again later.", param="file", code="queue_full", retry_after_s=1.0,
            )  # fmt: skip
        self.held += len(data)
        try:
            yield
        finally:
            self.held -= len(data)


@dataclasses.dataclass(frozen=True)
class TranscribeInput:
    """What a client asks for.

    Attributes:
        data: the sound file.
        task: "transcribe", or "translate" into English.
        language: spoken in it, "en"; None finds out.
        prompt: text that the transcript is to go on from, for names and style.
        temperature: 0 takes the likeliest tokens, and draws where their text is doubtful.
        segments: whether times are wanted.
        words: whether the times of words are, too.
        doubts: when text is doubtful; None for the usual bounds.
        timeout_s: seconds from now by which it must be finished; None for as long as it takes.
    """

    data: bytes
    task: str = "transcribe"
    language: str | None = None
    prompt: str | None = None
    temperature: float = 0.0
    segments: bool = False
    words: bool = False
    doubts: Doubts | None = None
    timeout_s: float | None = None
    request_id: str | None = None


@dataclasses.dataclass(frozen=True)
class Transcript:
    """What was said.

    Attributes:
        language: its code.
        duration: of the sound, seconds.
        segments: with times where they were asked for, or the sound is longer than a window; else one a window.
    """

    task: str
    language: str
    duration: float
    segments: tuple[Segment, ...]

    @property
    def words(self) -> tuple[Word, ...]:
        return tuple(word for segment in self.segments for word in segment.words)

    @property
    def text(self) -> str:
        return "".join(segment.text for segment in self.segments).strip()
