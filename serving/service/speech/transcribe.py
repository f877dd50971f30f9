"""Speech to text: sound in, segments out, one window of 30 seconds after the other, each a request of the engine like any other."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import itertools
import math
import time
import uuid
from collections.abc import AsyncGenerator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from serving.access.keys import caller_of_task
from serving.engine.api.media import Media, MediaItem
from serving.engine.api.sampling_params import SamplingParams
from serving.engine.api.types import EngineOutput, EngineRequest, FinishReason
from serving.errors import ErrorKind, RequestError, invalid
from serving.media.sound import HOP, RATE, log_mel, read_sound
from serving.service.requests.limits import check_text
from serving.service.speech.rules import SpeechRules, SpeechTokens
from serving.service.speech.segments import Segment, cut

if TYPE_CHECKING:
    from serving.service.service import TextService

WINDOW_S = 30
FRAMES = WINDOW_S * RATE // HOP
MAX_SECONDS = 4 * 3600.0
MAX_PROMPT_TOKENS = 223


async def transcribe(service: TextService, given: TranscribeInput, model: str | None = None) -> Transcript:
    """What is said in a sound file.

    Args:
        model: the served model's name; None for any.
    Raises:
        RequestError: INVALID_ARGUMENT naming the field, NOT_FOUND (model), UNIMPLEMENTED when the model is none for speech; as
            `TextService.generate`.
    """
    service.check_ready()
    service.resolve_model(model)
    if service.speech is None:
        raise RequestError(
            ErrorKind.UNIMPLEMENTED, f"The model {service.model_id!r} transcribes no speech.", param="model"
        )
    with await service.counted():
        return await service.speech.transcribe(service, given)


@dataclasses.dataclass(frozen=True)
class TranscribeInput:
    """What a client asks for.

    Attributes:
        data: the sound file.
        task: "transcribe", or "translate" into English.
        language: spoken in it, "en"; None finds out.
        prompt: text that the transcript is to go on from, for names and style.
        temperature: 0 takes the likeliest tokens.
        segments: whether times are wanted.
    """

    data: bytes
    task: str = "transcribe"
    language: str | None = None
    prompt: str | None = None
    temperature: float = 0.0
    segments: bool = False
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
    def text(self) -> str:
        return "".join(segment.text for segment in self.segments).strip()


class Speech:
    """What a service over a Whisper model has besides.

    Args:
        tokens: what the checkpoint's tokens mean.
        mels: of its spectrograms.
    """

    def __init__(self, tokens: SpeechTokens, mels: int) -> None:
        self.tokens, self.mels = tokens, mels
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="jaxserve-sound")
        self._serial = itertools.count()

    async def transcribe(self, service: TextService, given: TranscribeInput) -> Transcript:
        """A sound file's text.

        Raises:
            RequestError: INVALID_ARGUMENT naming the field; as `TextService.generate`.
        """
        self._check(given)
        prompt = self._prompt(service, given)
        samples = await self._run(read_sound, given.data, MAX_SECONDS, "file")
        duration = len(samples) / RATE
        if len(samples) < HOP:
            raise invalid("file has no sound in it.", "file")
        short = duration <= WINDOW_S
        if short:
            samples = np.pad(samples, (0, WINDOW_S * RATE - len(samples)))
        frames = await self._run(log_mel, samples, self.mels)
        said = _Run(self, service, given, frames, prompt, timed=given.segments or not short)
        language, segments = await said.all()
        ended = (dataclasses.replace(segment, end=min(segment.end, duration)) for segment in segments)
        return Transcript(given.task, language, duration, tuple(ended))

    def _check(self, given: TranscribeInput) -> None:
        t = self.tokens
        if given.task == "translate" and t.translate is None:
            raise invalid("This model does not translate: it knows one language.", "model")
        if given.language is not None and given.language not in (t.languages or {"en": 0}):
            known = ", ".join(sorted(t.languages)) or "en"
            raise invalid(f"language must be one of {known}; got {given.language[:16]!r}.", "language")
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

    async def _run(self, function: Any, *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *args)

    def next_id(self, given: TranscribeInput) -> str:
        """An id that no other request has."""
        return f"{given.request_id or 'speech-' + uuid.uuid4().hex[:12]}#{next(self._serial)}"


class _Run:
    """One sound file on its way."""

    def __init__(
        self,
        speech: Speech,
        service: TextService,
        given: TranscribeInput,
        frames: np.ndarray,
        prompt: list[int],
        timed: bool,
    ) -> None:
        self._speech, self._service, self._given = speech, service, given
        self._frames, self._prompt, self._timed = frames, prompt, timed
        caller = caller_of_task.get()
        self._salt = caller.cache_salt(None) if caller else None
        self._tenant = caller.tenant(None) if caller else None

    async def all(self) -> tuple[str, list[Segment]]:
        """(language, segments) of the whole."""
        t, seek, segments, prompt = self._speech.tokens, 0, [], self._prompt
        language = self._given.language
        while seek < len(self._frames):
            window = self._window(seek)
            if language is None:
                language = await self._language(window)
            head = [*prompt, t.start]
            if t.languages:
                task = t.translate if self._given.task == "translate" else t.transcribe
                head += [t.languages[language], *([task] if task is not None else [])]
            head += [] if self._timed else [t.no_timestamps]
            tokens, logprob = await self._tokens(head, window, SpeechRules(t, self._vocab, self._timed))
            frames = min(FRAMES, len(self._frames) - seek)
            found, on = cut(tokens, t.times, seek * HOP / RATE, frames)
            decode = self._service.tokenizer.decode
            for start, end, part in found:
                text = decode([token for token in part if token < t.end])
                segments.append(Segment(seek, start, end, tuple(part), text, self._given.temperature, logprob))
            seek, prompt = seek + max(1, on), []
        return language or "en", segments

    @property
    def _vocab(self) -> int:
        return self._service.info.vocab_size

    def _window(self, seek: int) -> MediaItem:
        """The frames from `seek` on, as the engine takes them."""
        frames = np.zeros((FRAMES, self._frames.shape[1]), np.float32)
        there = self._frames[seek : seek + FRAMES]
        frames[: len(there)] = there
        h = hashlib.blake2b(digest_size=32)
        h.update(b"sound\0" + b"\0".join((b"" if self._salt is None else b"+" + self._salt.encode(), frames.tobytes())))
        return MediaItem(h.digest(), np.zeros(1, np.int32), frames, np.zeros((FRAMES, 2), np.int32), lasting=True)

    async def _language(self, window: MediaItem) -> str:
        t = self._speech.tokens
        if not t.languages:
            return "en"
        rules = SpeechRules(t, self._vocab, False, only=list(t.languages.values()))
        (token, *_), _ = await self._tokens([t.start], window, rules, most=1)
        return next(code for code, i in t.languages.items() if i == token)

    async def _tokens(
        self, prompt: list[int], window: MediaItem, rules: SpeechRules, most: int | None = None
    ) -> tuple[list[int], float | None]:
        """What the engine says of a window, and the mean log probability where segments are asked for."""
        service, given, t = self._service, self._given, self._speech.tokens
        room = service.info.max_model_len - len(prompt)
        # The draw is a likeliest one for its language, whatever the temperature.
        temperature = given.temperature if most is None else 0.0
        logprobs = 0 if given.segments and most is None else None
        params = SamplingParams(max_tokens=min(most or room, room), temperature=temperature, logprobs=logprobs)
        request = EngineRequest(
            self._speech.next_id(given), tuple(prompt), params, (t.end,), constraint=rules, arrival_time=time.monotonic(),
            cache_salt=self._salt, tenant=self._tenant, media=Media((window,), len(prompt)),
        )  # fmt: skip
        outputs = cast(AsyncGenerator[EngineOutput, None], service.client.generate(request))
        tokens: list[int] = []
        scores: list[float] = []
        async with contextlib.aclosing(outputs):
            async for output in outputs:
                tokens += output.token_ids
                scores += [one.logprob for one in output.logprobs or ()]
                if output.finish_reason in _FAILED:
                    raise RequestError(_FAILED[output.finish_reason], output.error or "The transcription was ended.")
        return [token for token in tokens if token != t.end], (math.fsum(scores) / len(scores) if scores else None)


_FAILED: Mapping[FinishReason | None, ErrorKind] = {
    FinishReason.ERROR: ErrorKind.INTERNAL,
    FinishReason.REFUSED: ErrorKind.INVALID_ARGUMENT,
    FinishReason.DEADLINE: ErrorKind.DEADLINE_EXCEEDED,
    FinishReason.ABORT: ErrorKind.UNAVAILABLE,
}
