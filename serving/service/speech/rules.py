"""Which tokens may come next in a transcription: Whisper's rules, as a constraint of the engine (arXiv:2212.04356)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class SpeechTokens:
    """What a Whisper checkpoint's tokens mean, from its generation_config.json and its tokenizer.

    Attributes:
        end, start, previous: of a transcript, and what stands before earlier text; `previous` None where there is none.
        transcribe, translate: the tasks; None in models of one language.
        no_timestamps: says that no times are wanted. The tokens behind it are times, 20 ms apart.
        languages: code -> token, "en" -> <|en|>. Empty in models of one language.
        suppressed, suppressed_first: tokens that never come, and such that no transcript begins with.
        latest_first: the latest time that a window may begin with, in steps of 20 ms; None for any.
        no_speech: says that nobody speaks.
    """

    end: int
    start: int
    previous: int | None
    transcribe: int | None
    translate: int | None
    no_timestamps: int
    languages: Mapping[str, int]
    suppressed: tuple[int, ...]
    suppressed_first: tuple[int, ...]
    latest_first: int | None
    no_speech: int | None = None

    @property
    def times(self) -> int:
        """The token of 0.00 s."""
        return self.no_timestamps + 1

    @classmethod
    def of(cls, generation: Mapping[str, Any], tokens: Mapping[str, int]) -> SpeechTokens:
        """From generation_config.json and the tokenizer's added tokens. ValueError where it is no Whisper's."""
        start = generation.get("decoder_start_token_id", tokens.get("<|startoftranscript|>"))
        none = generation.get("no_timestamps_token_id", tokens.get("<|notimestamps|>"))
        if start is None or none is None:
            raise ValueError("the checkpoint's tokens <|startoftranscript|> and <|notimestamps|> are not known.")
        tasks = generation.get("task_to_id") or {}
        languages = generation.get("lang_to_id") or {}
        if not languages and tasks:
            languages = {text: i for text, i in tokens.items() if start < i < min(tasks.values())}
        end = generation.get("eos_token_id", tokens.get("<|endoftext|>"))
        return cls(
            end=end[0] if isinstance(end, list) else int(end or 0),
            start=int(start),
            previous=generation.get("prev_sot_token_id", tokens.get("<|startofprev|>")),
            transcribe=tasks.get("transcribe"),
            translate=tasks.get("translate"),
            no_timestamps=int(none),
            languages={text.strip("<|>"): i for text, i in languages.items()},
            suppressed=tuple(generation.get("suppress_tokens") or ()),
            suppressed_first=tuple(generation.get("begin_suppress_tokens") or ()),
            latest_first=generation.get("max_initial_timestamp_index"),
            no_speech=next(
                (tokens[text] for text in ("<|nospeech|>", "<|nocaptions|>") if text in tokens), int(none) - 1
            ),
        )


class SpeechRules:
    """`TokenConstraint` of one window.

    Args:
        words: of the vocabulary's rows.
        timestamps: times come in pairs around text, and never decrease.
        only: the window's only token is one of these (a language).
    """

    def __init__(self, tokens: SpeechTokens, vocab: int, timestamps: bool, only: Sequence[int] | None = None) -> None:
        self._tokens, self._vocab, self._timestamps = tokens, vocab, timestamps
        self._only = None if only is None else np.array(only)
        self._said: list[int] = []

    def fill_mask(self, mask_W: np.ndarray) -> None:
        allowed = np.ones(len(mask_W) * 32, bool)
        allowed[self._vocab :] = False
        self._narrow(allowed)
        mask_W[:] = np.packbits(allowed, bitorder="little").view(np.int32)

    def _narrow(self, allowed: np.ndarray) -> None:
        """Takes away what may not come."""
        t, said = self._tokens, self._said
        if self._only is not None:
            allowed[:] = False
            allowed[self._only] = True
            return
        allowed[list(t.suppressed)] = False
        if not said:
            allowed[list(t.suppressed_first)] = False
        if not self._timestamps:
            return
        allowed[t.no_timestamps] = False
        last, before = bool(said) and said[-1] >= t.times, len(said) < 2 or said[-2] >= t.times
        if last:
            if before:
                allowed[t.times :] = False
            else:
                allowed[: t.end] = False
        times = [token for token in said if token >= t.times]
        if times:
            allowed[t.times : times[-1] + (0 if last and not before else 1)] = False
        if not said:
            allowed[: t.times] = False
            if t.latest_first is not None:
                allowed[t.times + t.latest_first + 1 :] = False

    def accept(self, token: int) -> bool:
        self._said.append(token)
        return True

    def fill_ahead(self, drafts: Sequence[int], mask_QW: np.ndarray) -> None:
        raise NotImplementedError("transcriptions are given no drafts")

    @property
    def finished(self) -> bool:
        return False
