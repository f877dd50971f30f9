"""Speech to text: sound in, segments out, one window of 30 seconds after the other, each a request of the engine like any other."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import uuid
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from serving.engine.api.media import MediaItem
from serving.errors import ErrorKind, RequestError, invalid
from serving.media.sound import RATE
from serving.media.sound.spectrum import HOP
from serving.service.requests.limits import check_text
from serving.service.speech.listening import Listener
from serving.service.speech.rules import SpeechTokens
from serving.service.speech.transcripts import Files, TranscribeInput, Transcript
from serving.service.speech.windows import FRAMES, WINDOW_S, Windows
from serving.service.speech.words import Word, words_of
from serving.text.detokenizer import IncrementalDetokenizer

if TYPE_CHECKING:
    from serving.service.service import TextService

__all__ = ["FRAMES", "Speech", "TranscribeInput", "Transcript", "transcribe"]

Align = Callable[[np.ndarray, Sequence[int], Sequence[int], int], Sequence[float]]
MAX_PROMPT_TOKENS = 223


async def transcribe(
    service: TextService, given: TranscribeInput, model: str | None = None, tell: Callable[[str], None] | None = None
) -> Transcript:
    """What is said in a sound file.

    Args:
        model: the served model's name; None for any.
        tell: is given the text as it becomes certain.
    Raises:
        RequestError: INVALID_ARGUMENT naming the field, NOT_FOUND (model), UNIMPLEMENTED when the model is none for speech,
            DEADLINE_EXCEEDED; as `TextService.generate`.
    """
    service.check_ready()
    service.resolve_model(model)
    service.limits.check_timeout("timeout", given.timeout_s)
    if service.speech is None:
        raise RequestError(
            ErrorKind.UNIMPLEMENTED, f"The model {service.model_id!r} transcribes no speech.", param="model"
        )
    with await service.counted(), service.speech.files.holding(given.data, service.limits.max_sounds_bytes):
        try:
            async with asyncio.timeout(given.timeout_s) as limit:
                return await service.speech.transcribe(service, given, tell)
        except TimeoutError:
            if not limit.expired():
                raise
            raise RequestError(
                ErrorKind.DEADLINE_EXCEEDED, "The request's deadline passed before all of its sound was heard; raise the timeout.",
                code="deadline_exceeded",
            ) from None  # fmt: skip


class Speech:
    """What a service over a Whisper model has besides.

    Args:
        tokens: what the checkpoint's tokens mean.
        mels: of its spectrograms.
        align: (a window's frames, its prompt, its tokens, how many frames are sound) -> the second of the window at which each
            token ends; None where nothing tells times of words. Blocks.

    Attributes:
        listener: reads sound files.
        files: those of requests that run.
    """

    def __init__(self, tokens: SpeechTokens, mels: int, align: Align | None = None) -> None:
        self.tokens, self.align = tokens, align
        self.listener, self.files = Listener(mels, WINDOW_S * RATE), Files()
        self._serial = itertools.count()

    async def transcribe(
        self, service: TextService, given: TranscribeInput, tell: Callable[[str], None] | None = None
    ) -> Transcript:
        """A sound file's text.

        Args:
            tell: is given the text as it becomes certain.
        Raises:
            RequestError: INVALID_ARGUMENT naming the field; as `TextService.generate`.
        """
        self._check(given)
        prompt = self._prompt(service, given)
        frames, samples = await self.listener.spectrogram(given.data)
        duration = samples / RATE
        length, short = -(-samples // HOP), duration <= WINDOW_S
        timed = given.segments or given.words or not short
        language, segments = await Windows(self, service, given, frames, prompt, length, timed, tell).all()
        ended = (dataclasses.replace(segment, end=min(segment.end, duration)) for segment in segments)
        return Transcript(given.task, language, duration, tuple(ended))

    async def words(
        self, service: TextService, prompt: Sequence[int], tokens: Sequence[int], window: MediaItem, frames: int
    ) -> tuple[Word, ...]:
        """When each word of a window was said, in its seconds."""
        if self.align is None or not tokens:
            return ()
        ends = await self.listener.run_in_turn(self.align, window.patches_PX, prompt, tokens, frames)
        return words_of(tokens, ends, self.tokens.end, service.tokenizer.decode)

    @staticmethod
    def detokenizer(service: TextService) -> IncrementalDetokenizer:
        """Of one text that is told while it is made."""
        return IncrementalDetokenizer(service.tokenizer)

    def _check(self, given: TranscribeInput) -> None:
        t = self.tokens
        if given.task == "translate" and t.translate is None:
            raise invalid("This model does not translate: it knows one language.", "model")
        if given.language is not None and given.language not in (t.languages or {"en": 0}):
            known = ", ".join(sorted(t.languages)) or "en"
            raise invalid(f"language must be one of {known}; got {given.language[:16]!r}.", "language")
        if given.words and self.align is None:
            raise RequestError(
                ErrorKind.UNIMPLEMENTED, "This server tells no times of words: its model does not say which of its heads follow "
                "the sound (alignment_heads in generation_config.json).", param="timestamp_granularities",
            )  # fmt: skip
        if not 0 <= given.temperature <= 1:
            raise invalid(f"temperature must be between 0 and 1, got {given.temperature}.", "temperature")

    def _prompt(self, service: TextService, given: TranscribeInput) -> list[int]:
        """The tokens of earlier text."""
        if not given.prompt or self.tokens.previous is None:
            return []
        check_text(given.prompt, "prompt")
        service.limits.check_count(
            "characters in its prompt", len(given.prompt), service.limits.max_prompt_chars, "prompt"
        )
        ids = service.tokenizer.encode(" " + given.prompt.strip(), add_special_tokens=False)
        return [self.tokens.previous, *ids[-MAX_PROMPT_TOKENS:]]

    def next_id(self, given: TranscribeInput) -> str:
        """An id that no other request has."""
        return f"{given.request_id or 'speech-' + uuid.uuid4().hex[:12]}#{next(self._serial)}"
