"""One sound file on its way: a window of 30 seconds after the other, each as often as its text needs."""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from serving.access.keys import caller_of_task
from serving.engine.api.media import Media, MediaItem
from serving.engine.api.sampling_params import SamplingParams
from serving.engine.api.types import EngineOutput, EngineRequest, FinishReason
from serving.errors import ErrorKind, RequestError
from serving.media.sound import RATE
from serving.media.sound.spectrum import HOP
from serving.service.speech.doubts import Attempt, Doubts
from serving.service.speech.rules import SpeechRules
from serving.service.speech.segments import Segment, cut

if TYPE_CHECKING:
    from serving.service.service import TextService
    from serving.service.speech.listening import Frames
    from serving.service.speech.transcripts import TranscribeInput

WINDOW_S = 30
FRAMES = WINDOW_S * RATE // HOP

Align = Callable[[np.ndarray, Sequence[int], Sequence[int], int], Awaitable[Sequence[float]]]


class Windows:
    """One sound file.

    Args:
        speech: a `serving.service.speech.transcribe.Speech`.
        frames: its spectrogram, [T, mels].
        prompt: tokens that stand before the first window's.
        length: frames that are sound, without padding behind it.
        timed: whether segments have times.
        tell: is given text as it becomes certain; None where nobody waits for it.
    """

    def __init__(
        self,
        speech: Any,
        service: TextService,
        given: TranscribeInput,
        frames: np.ndarray | Frames,
        prompt: list[int],
        length: int,
        timed: bool,
        tell: Callable[[str], None] | None = None,
    ) -> None:
        self._speech, self._service, self._given = speech, service, given
        self._frames, self._prompt, self._length = frames, prompt, length
        self._timed, self._tell = timed, tell
        caller = caller_of_task.get()
        self._salt = caller.cache_salt(None) if caller else None
        self._tenant = caller.tenant(None) if caller else None

    async def all(self) -> tuple[str, list[Segment]]:
        """(language, segments) of the whole."""
        t, seek, segments, prompt = self._speech.tokens, 0, [], self._prompt
        language = self._given.language
        while seek < len(self._frames):
            window = await self._window(seek)
            if language is None:
                language = await self._language(window)
            head = [*prompt, t.start]
            if t.languages:
                task = t.translate if self._given.task == "translate" else t.transcribe
                head += [t.languages[language], *([task] if task is not None else [])]
            head += [] if self._timed else [t.no_timestamps]
            frames = min(FRAMES, len(self._frames) - seek)
            said = await self._attempts(head, window)
            if said is None:  # silence
                found, on = [], frames
            else:
                found, on = cut(said.tokens, t.times, seek * HOP / RATE, frames)
                segments += await self._segments(found, said, seek, head, window)
            seek, prompt = seek + max(1, on), []
        return language or "en", segments

    async def _segments(
        self,
        found: Sequence[tuple[float, float, list[int]]],
        said: Attempt,
        seek: int,
        head: list[int],
        window: MediaItem,
    ) -> list[Segment]:
        """A window's segments, with their texts, and where asked for when their words were said."""
        t, decode, words = self._speech.tokens, self._service.tokenizer.decode, ()
        if self._given.words:
            sound = max(1, min(FRAMES, self._length - seek))
            words = await self._speech.words(self._service, head, said.tokens, window, sound)
        made, at = [], 0
        for start, end, part in found:
            text = decode([token for token in part if token < t.end])
            own = tuple(word.later(seek * HOP / RATE) for word in words if at <= word.first < at + len(part))
            made.append(
                Segment(seek, start, end, tuple(part), text, said.temperature, said.avg_logprob, said.no_speech, own)
            )
            at += len(part)
            if self._tell is not None and self._timed:
                self._tell(text)
        return made

    @property
    def _vocab(self) -> int:
        return self._service.info.vocab_size

    async def _window(self, seek: int) -> MediaItem:
        """The frames from `seek` on, as the engine takes them."""
        frames = np.zeros((FRAMES, self._frames.shape[1]), np.float32)
        there = await self._speech.listener.rows(self._frames, seek, FRAMES)
        frames[: len(there)] = there
        h = hashlib.blake2b(digest_size=32)
        h.update(b"sound\0" + b"\0".join((b"" if self._salt is None else b"+" + self._salt.encode(), frames.tobytes())))
        return MediaItem(h.digest(), np.zeros(1, np.int32), frames, np.zeros((FRAMES, 2), np.int32), lasting=True)

    async def _language(self, window: MediaItem) -> str:
        t = self._speech.tokens
        if not t.languages:
            return "en"
        rules = SpeechRules(t, self._vocab, False, only=list(t.languages.values()))
        said = await self._tokens([t.start], window, rules, 0.0, most=1)
        return next(code for code, i in t.languages.items() if i == said.tokens[0])

    async def _attempts(self, head: list[int], window: MediaItem) -> Attempt | None:
        """What is said in a window: the likeliest text, and where that is doubtful what is drawn at higher temperatures, until it
        is not; None for silence. Text that is told while it is made is not taken back: then there is one attempt."""
        given, doubts, t = self._given, self._given.doubts or Doubts(), self._speech.tokens
        live = self._tell is not None and not self._timed
        wanted = given.segments or doubts.checks
        rules = SpeechRules(t, self._vocab, self._timed)
        first = await self._tokens(head, window, rules, given.temperature, scored=wanted, tell=live)
        if live or not wanted:
            return first
        decode = self._service.tokenizer.decode
        text = decode([token for token in first.tokens if token < t.end])
        doubtful = doubts.of(first, text)
        if given.segments or doubts.unlikely(first):
            first = first.with_no_speech(await self._no_speech(head, window))
            if doubts.silent(first):
                return None
        for temperature in doubts.temperatures if doubtful and not given.temperature else ():
            rules = SpeechRules(t, self._vocab, self._timed)
            again = await self._tokens(head, window, rules, temperature, scored=True)
            if not doubts.of(again, decode([token for token in again.tokens if token < t.end])):
                return again.with_no_speech(first.no_speech)
        return first

    async def _no_speech(self, head: list[int], window: MediaItem) -> float | None:
        """How likely it is that nobody speaks: the probability of the token that says so where the transcript begins."""
        t = self._speech.tokens
        if t.no_speech is None:
            return None
        prompt = [*head[: head.index(t.start) + 1], t.no_speech]
        rules = SpeechRules(t, self._vocab, False)
        said = await self._tokens(prompt, window, rules, 0.0, most=1, prompt_logprobs=0)
        return None if said.prompt_logprob is None else math.exp(said.prompt_logprob)

    async def _tokens(
        self,
        prompt: list[int],
        window: MediaItem,
        rules: SpeechRules,
        temperature: float,
        most: int | None = None,
        scored: bool = False,
        tell: bool = False,
        prompt_logprobs: int | None = None,
    ) -> Attempt:
        """What the engine says of a window."""
        service, given, t = self._service, self._given, self._speech.tokens
        room = service.info.max_model_len - len(prompt)
        seed = None if not temperature else round(temperature * 1000)  # the same file has the same text each time
        params = SamplingParams(
            max_tokens=min(most or room, room), temperature=temperature, logprobs=0 if scored else None, seed=seed,
            prompt_logprobs=prompt_logprobs,
        )  # fmt: skip
        request = EngineRequest(
            self._speech.next_id(given), tuple(prompt), params, (t.end,), constraint=rules, arrival_time=time.monotonic(),
            cache_salt=self._salt, tenant=self._tenant, media=Media((window,), len(prompt)),
        )  # fmt: skip
        outputs = cast(AsyncGenerator[EngineOutput, None], service.client.generate(request))
        text = self._speech.detokenizer(service)
        tokens: list[int] = []
        scores: list[float] = []
        last: float | None = None
        async with contextlib.aclosing(outputs):
            async for output in outputs:
                tokens += output.token_ids
                scores += [one.logprob for one in output.logprobs or ()]
                if output.prompt_logprobs and output.prompt_logprobs[-1] is not None:
                    last = output.prompt_logprobs[-1].logprob
                if output.finish_reason in _FAILED:
                    raise RequestError(_FAILED[output.finish_reason], output.error or "The transcription was ended.")
                if tell and self._tell is not None and (more := text.push(i for i in output.token_ids if i < t.end)):
                    self._tell(more)
        mean = math.fsum(scores) / len(scores) if scores else None
        return Attempt(tuple(token for token in tokens if token != t.end), temperature, mean, last)


_FAILED: Mapping[FinishReason | None, ErrorKind] = {
    FinishReason.ERROR: ErrorKind.INTERNAL,
    FinishReason.REFUSED: ErrorKind.INVALID_ARGUMENT,
    FinishReason.DEADLINE: ErrorKind.DEADLINE_EXCEEDED,
    FinishReason.ABORT: ErrorKind.UNAVAILABLE,
}
