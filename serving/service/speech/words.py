"""When each word was said: tokens to words, and the attention of a decoder to its sound to times."""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Callable, Sequence

import numpy as np

BEFORE = "\"'“¿([{-"
"""Marks that belong to the word behind them."""
AFTER = "\"'.。,，!！?？:：”)]}、"
"""Marks that belong to the word in front."""
STEP_S = 0.02
WIDTH = 7
"""Steps that a median is taken of (Whisper's own)."""


@dataclasses.dataclass(frozen=True)
class Word:
    """A word of a transcript.

    Attributes:
        text: with its marks, without blanks around it.
        start, end: seconds.
        first: which of its window's tokens it begins with.
    """

    text: str
    start: float
    end: float
    first: int

    def later(self, seconds: float) -> Word:
        return dataclasses.replace(self, start=self.start + seconds, end=self.end + seconds)


def words_of(
    tokens: Sequence[int], ends: Sequence[float], end_token: int, decode: Callable[[Sequence[int]], str]
) -> tuple[Word, ...]:
    """A window's words.

    Args:
        ends: of each token, the second at which it ends; the next begins there.
        end_token: those from here on are no text.
    """
    starts = [0.0, *ends[:-1]]
    groups: list[list[int]] = []
    texts: list[str] = []
    part: list[int] = []
    for index, token in enumerate(tokens):
        if token >= end_token:
            continue
        part.append(index)
        text = decode([tokens[i] for i in part])
        if "\ufffd" in text:  # half a character
            continue
        alone = text.strip()
        if not groups or text.startswith(" ") or not _joined(texts[-1], alone):
            groups.append(part)
            texts.append(text)
        else:
            groups[-1] += part
            texts[-1] += text
        part = []
    if part and groups:
        groups[-1] += part
    merged: list[tuple[str, list[int]]] = []
    for text, group in zip(texts, groups, strict=True):
        alone = text.strip()
        before = merged[-1][0].strip() if merged else ""
        behind = before and alone and all(mark in AFTER for mark in alone)
        if behind or (before and all(mark in BEFORE for mark in before)):
            merged[-1] = (merged[-1][0] + text, merged[-1][1] + group)
        elif alone:
            merged.append((text, group))
    return tuple(Word(text.strip(), starts[group[0]], ends[group[-1]], group[0]) for text, group in merged)


def _joined(before: str, text: str) -> bool:
    """Whether a text without a blank in front goes on with the word before it: not where letters have no blanks between words."""
    return not text or _blanked(before[-1:]) or text[0] in AFTER or text[0] in string.punctuation


def _blanked(letter: str) -> bool:
    """Whether a letter's script puts blanks between words: no Han, kana, Thai, Lao, Khmer or Burmese."""
    code = ord(letter) if letter else 0
    return not (
        0x0E00 <= code <= 0x0EFF or 0x1000 <= code <= 0x109F or 0x1780 <= code <= 0x17FF or 0x3040 <= code <= 0x9FFF
    )


def token_ends(weights_AST: np.ndarray) -> list[float]:
    """The second at which each of S tokens ends, by dynamic time warping (Giorgino 2009) of what A heads attend to.

    Args:
        weights_AST: of each head, what each token attends to, over T steps of 20 ms.
    """
    deviation = weights_AST.std(axis=1, keepdims=True)
    scaled = (weights_AST - weights_AST.mean(axis=1, keepdims=True)) / np.where(deviation == 0, 1, deviation)
    if scaled.shape[-1] > WIDTH // 2:
        padded = np.pad(scaled, ((0, 0), (0, 0), (WIDTH // 2, WIDTH // 2)), mode="reflect")
        windows = np.lib.stride_tricks.sliding_window_view(padded, WIDTH, axis=-1)
        scaled = np.median(windows, axis=-1)
    return (_first_steps(-scaled.mean(axis=0)) * STEP_S).tolist()


def _first_steps(cost_ST: np.ndarray) -> np.ndarray:
    """Where along the cheapest monotone path each row is entered. Diagonal by diagonal: those of one depend on the last two."""
    S, T = cost_ST.shape
    best = np.full((S + 1, T + 1), np.inf, np.float32)
    best[0, 0] = 0
    came = np.zeros((S + 1, T + 1), np.int8)
    for diagonal in range(2, S + T + 1):
        i = np.arange(max(1, diagonal - T), min(S, diagonal - 1) + 1)
        j = diagonal - i
        both, up, left = best[i - 1, j - 1], best[i - 1, j], best[i, j - 1]
        way = np.where((both < up) & (both < left), 0, np.where((up < both) & (up < left), 1, 2))
        best[i, j] = cost_ST[i - 1, j - 1] + np.choose(way, (both, up, left))
        came[i, j] = way
    came[0, :], came[:, 0] = 2, 1
    entered, i, j = np.zeros(S, np.int64), S, T
    while i > 0 or j > 0:
        if i > 0:
            entered[i - 1] = j - 1
        way = came[i, j]
        i, j = i - (way != 2), j - (way != 1)
    return entered
