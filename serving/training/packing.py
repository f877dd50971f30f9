"""Examples in rows of one length, and rows in steps: what a compiled training step is given."""

from __future__ import annotations

import bisect
import dataclasses
import logging
from collections.abc import Iterator, Sequence

import numpy as np

from serving.training.examples import Example, Pair

log = logging.getLogger(__name__)

MULTIPLE = 16
"""Rows are this many tokens long, or a multiple."""


@dataclasses.dataclass(frozen=True)
class Rows:
    """N rows of S tokens. The hidden state at `index` is to predict `target`; there are at most M of those a row.

    Attributes:
        tokens_NS: int32, 0 behind the last text.
        segments_NS: int32, the texts of a row from 1 on; 0 for padding.
        positions_NS: int32, from 0 in each text.
        index_NM, target_NM: int32; padding is 0.
        weight_NM: float32, 1 for each target, 0 for padding.
        packed: whether a row has several texts.
    """

    tokens_NS: np.ndarray
    segments_NS: np.ndarray
    positions_NS: np.ndarray
    index_NM: np.ndarray
    target_NM: np.ndarray
    weight_NM: np.ndarray
    packed: bool

    def __len__(self) -> int:
        return len(self.tokens_NS)

    @property
    def num_targets(self) -> int:
        """Tokens that the loss is on."""
        return int(self.weight_NM.sum())

    @property
    def num_tokens(self) -> int:
        """Without padding."""
        return int((self.segments_NS > 0).sum())

    def take(self, index: np.ndarray) -> Batch:
        """Those rows; -1 is an empty one, on which nothing is learned."""
        arrays = (
            self.tokens_NS, self.segments_NS, self.positions_NS, self.index_NM, self.target_NM, self.weight_NM,
        )  # fmt: skip
        there = index >= 0
        return tuple(
            np.where(there[:, None], array[np.maximum(index, 0)], np.zeros((), array.dtype)) for array in arrays
        )


Batch = tuple[np.ndarray, ...]
"""What a step's program is given, each [B, ...]: of texts those of `Rows` in its order, of pairs `PairRows`' tokens and lengths."""


def pack(examples: Sequence[Example], max_length: int, *, packing: bool = True, seed: int = 0) -> Rows:
    """Examples in rows.

    Args:
        max_length: tokens of a row; longer examples are cut at their end.
        packing: put several examples in a row, where they fit; else each has one.
        seed: which examples meet in a row.
    Raises:
        ValueError: nothing is left to learn.
    """
    cut = [Example(e.tokens_N[:max_length], e.learned_N[:max_length], e.line) for e in examples]
    long = sum(len(e.tokens_N) > max_length for e in examples)
    kept = [e for e in cut if e.learned_N[1:].any()]
    if long:
        log.warning(
            "%d of %d examples are longer than %d tokens (--max-length) and are cut.", long, len(cut), max_length
        )
    if len(kept) < len(cut):
        log.warning(
            "%d examples have nothing to learn within %d tokens and are left out.", len(cut) - len(kept), max_length
        )
    if not kept:
        raise ValueError("the training data has nothing to learn: no token that the loss is on.")
    order = np.random.default_rng(seed).permutation(len(kept))
    rows = _fit([kept[i] for i in order], max_length) if packing else [[e] for e in kept]
    return _rows(rows)


def _fit(examples: Sequence[Example], length: int) -> list[list[Example]]:
    """Best fit, the longest first: a text goes where it leaves the least room."""
    rows: list[list[Example]] = []
    room: list[tuple[int, int]] = []  # (what is left, row), sorted
    for example in sorted(examples, key=lambda example: -len(example.tokens_N)):
        size = len(example.tokens_N)
        at = bisect.bisect_left(room, (size, -1))
        left, row = room.pop(at) if at < len(room) else (length, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(example)
        bisect.insort(room, (left - size, row))
    return rows


def _rows(rows: Sequence[Sequence[Example]]) -> Rows:
    N = len(rows)
    S = _round(max(sum(len(e.tokens_N) for e in row) for row in rows))
    M = _round(max(sum(int(e.learned_N[1:].sum()) for e in row) for row in rows))
    tokens, segments, positions = (np.zeros((N, S), np.int32) for _ in range(3))
    index, target = (np.zeros((N, M), np.int32) for _ in range(2))
    weight = np.zeros((N, M), np.float32)
    for n, row in enumerate(rows):
        begin = labels = 0
        for number, example in enumerate(row, 1):
            size = len(example.tokens_N)
            here = slice(begin, begin + size)
            tokens[n, here], segments[n, here], positions[n, here] = example.tokens_N, number, np.arange(size)
            learned = np.flatnonzero(example.learned_N[1:])  # the state before a token predicts it
            there = slice(labels, labels + len(learned))
            index[n, there], target[n, there] = begin + learned, example.tokens_N[learned + 1]
            weight[n, there] = 1.0
            begin, labels = begin + size, labels + len(learned)
    return Rows(tokens, segments, positions, index, target, weight, any(len(row) > 1 for row in rows))


def _round(count: int) -> int:
    return -(-count // MULTIPLE) * MULTIPLE


@dataclasses.dataclass(frozen=True)
class PairRows:
    """N pairs for an embedding model: of each its query, its positive and maybe a negative.

    Attributes:
        tokens_NkS: int32 [N, 2 or 3, S].
        length_Nk: int32.
    """

    tokens_NkS: np.ndarray
    length_Nk: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens_NkS)

    @property
    def num_targets(self) -> int:
        """Pairs: the loss is a mean over them."""
        return len(self)

    @property
    def num_tokens(self) -> int:
        return int(self.length_Nk.sum())

    def take(self, index: np.ndarray) -> Batch:
        """Those pairs; -1 is an empty one, of no tokens, which is nobody's positive or negative."""
        there, index = index >= 0, np.maximum(index, 0)
        tokens, length = self.tokens_NkS[index], self.length_Nk[index]
        return np.where(there[:, None, None], tokens, 0).astype(np.int32), np.where(there[:, None], length, 0)


def pair_rows(pairs: Sequence[Pair], max_length: int) -> PairRows:
    """Pairs as arrays; longer texts are cut at their end, but for what the tokenizer puts there."""
    if not pairs:
        raise ValueError("the training data has no pairs.")
    texts = [
        [_shortened(text, max_length) for text in (p.query, p.positive, *([p.negative] if p.negative else []))]
        for p in pairs
    ]
    S = _round(max(len(text) for row in texts for text in row))
    tokens = np.zeros((len(texts), len(texts[0]), S), np.int32)
    for n, row in enumerate(texts):
        for k, text in enumerate(row):
            tokens[n, k, : len(text)] = text
    return PairRows(tokens, np.array([[len(text) for text in row] for row in texts], np.int32))


def _shortened(text: tuple[int, ...], length: int) -> tuple[int, ...]:
    return text if len(text) <= length else (*text[: length - 1], text[-1])


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which rows each step takes: a function of the seed and the step's number alone, so that a resumed run goes on as if it
    had never stopped.

    Attributes:
        rows: how many there are.
        batch: rows of one program call.
        accumulate: calls a step.
    """

    rows: int
    batch: int
    accumulate: int
    seed: int

    @property
    def steps_an_epoch(self) -> int:
        return -(-self.rows // (self.batch * self.accumulate))

    def calls(self, step: int) -> Iterator[np.ndarray]:
        """Row numbers [batch] of each call of a step, from 0; -1 where an epoch's last step is not full."""
        epoch, place = divmod(step, self.steps_an_epoch)
        order = np.random.default_rng((self.seed, epoch)).permutation(self.rows)
        size = self.batch * self.accumulate
        mine = np.full(size, -1, np.int64)
        found = order[place * size : (place + 1) * size]
        mine[: len(found)] = found
        for begin in range(0, size, self.batch):
            if (mine[begin : begin + self.batch] >= 0).any():
                yield mine[begin : begin + self.batch]
