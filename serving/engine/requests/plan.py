"""What one step does, and what came of it. Made by the scheduler, carried out by the runner, taken back by the scheduler."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from serving.engine.api.types import TokenLogprobs
from serving.engine.requests.moves import NO_MOVES, Moves
from serving.engine.requests.request import Request

CHUNK_ALIGN = 16
"""Pieces of prompts start at multiples of this in the chunk part of a step (ops' Q_BLOCK)."""

HEARD = 64
"""Positions of a sequence, its last ones, whose hidden states are kept where a head guesses; see device/head.py."""

ON_DEVICE = -2
"""Stands in a plan for a draft that a draft model makes: the host does not know it."""


def align(tokens: int) -> int:
    """Chunk positions that a piece of `tokens` takes up."""
    return -(-tokens // CHUNK_ALIGN) * CHUNK_ALIGN


@dataclasses.dataclass(frozen=True, slots=True)
class Chunk:
    """Positions [start, start + length) of one request, computed as chunk tokens.

    Attributes:
        samples: the chunk reaches the sequence's end, so its last row also samples a token.
        offset: where its tokens are in the chunk part of its replica's step; a multiple of `chunks.CHUNK_ALIGN`.
    """

    request: Request
    start: int
    length: int
    samples: bool
    offset: int

    @property
    def end(self) -> int:
        """Positions of the request that are computed after it."""
        return self.start + self.length

    @property
    def read(self) -> int:
        """How many of its last positions' hidden states are read: all where each is scored or counts in a mean."""
        spec = self.request.spec
        if spec.params.prompt_logprobs is not None or spec.pooling == "mean":
            return self.length
        return int(self.samples or (spec.pooling is not None and self.end == self.request.prompt_len))


@dataclasses.dataclass(frozen=True, slots=True)
class StepPlan:
    """One step. Rows of the sample program: `decode` in order, then the chunks that sample, in order.

    Attributes:
        decode: requests that compute one position, whose token is known or still on the device, and its drafts.
        decode_positions: that position of each; where the token is on the device, the position at most.
        chunks: pieces of prompts.
        admitted: requests that got their slot in this step (their per-slot state is to be loaded first).
        moves: what is copied to and from other places around the step.
        num_steps: decode steps in one dispatch, in a loop on the device; more than 1 only when there are no chunks. It may
            end sooner, when every row has sampled an end-of-sequence or stop token.
        adapters: (slot, digest) of adapters whose matrices are to be on the devices before the forward pass.
        drafts: of each decode row, the tokens guessed to follow its own, to be verified; () where there are none.
        caught_up: pieces of sequences that a draft model computes before it guesses: positions that were computed without it.
    """

    step_id: int
    decode: tuple[Request, ...]
    decode_positions: tuple[int, ...]
    chunks: tuple[Chunk, ...]
    admitted: tuple[Request, ...]
    sampled: tuple[Request, ...]
    moves: Moves = NO_MOVES
    num_steps: int = 1
    drafts: tuple[tuple[int, ...], ...] = ()
    adapters: tuple[tuple[int, str], ...] = ()
    caught_up: tuple[Chunk, ...] = ()

    def of_replica(self, replica: int) -> StepPlan:
        """What one replica has to do: its rows and chunks, in their order."""
        rows = [row for row, request in enumerate(self.decode) if request.replica == replica]
        return dataclasses.replace(
            self,
            decode=tuple(self.decode[row] for row in rows),
            decode_positions=tuple(self.decode_positions[row] for row in rows),
            drafts=tuple(self.drafts[row] for row in rows) if self.drafts else (),
            chunks=tuple(c for c in self.chunks if c.request.replica == replica),
            sampled=tuple(r for r in self.sampled if r.replica == replica),
            caught_up=tuple(c for c in self.caught_up if c.request.replica == replica),
        )

    @property
    def chunk_tokens(self) -> int:
        """Length of the chunk part, alignment included; of a plan for one replica."""
        return max((chunk.offset + align(chunk.length) for chunk in self.chunks), default=0)

    @property
    def queries(self) -> int:
        """Places that its longest decode row takes."""
        return 1 + max(map(len, self.drafts), default=0)

    def has_drafted(self, row: int) -> bool:
        """Whether the drafts of a decode row are made on the device."""
        return bool(self.drafts) and ON_DEVICE in self.drafts[row]

    def most_tokens(self, row: int) -> int:
        """How many tokens a row of `sampled` may give at most."""
        if row >= len(self.decode):
            return 1
        return self.num_steps + (len(self.drafts[row]) if self.drafts else 0)

    @property
    def requests(self) -> tuple[Request, ...]:
        """Everybody whom the step computes something of."""
        return (*self.decode, *(chunk.request for chunk in self.chunks))

    @property
    def num_tokens(self) -> int:
        """Tokens scheduled, padding not counted."""
        drafts = sum(map(len, self.drafts))
        return len(self.decode) * self.num_steps + drafts + sum(c.length for c in self.chunks)


@dataclasses.dataclass(frozen=True, slots=True)
class StepResult:
    """What a step sampled, row by row of `StepPlan.sampled`: some tokens each.

    Attributes:
        tokens: int32 [rows, N], in the order of their positions; -1 behind a row's last one.
        finite: bool, the same shape; False where the logits held NaN or infinity.
        logprobs: of each row's tokens, where the request asked for it.
        prompt_logprobs: request id -> entries for prompt positions [chunk.start + 1, chunk.start + length] of this step.
        pooled: request id -> this step's share of its pooled hidden states, float32 [embed].
    """

    tokens: np.ndarray
    finite: np.ndarray
    logprobs: Sequence[Sequence[TokenLogprobs] | None] | None = None
    prompt_logprobs: dict[str, list[TokenLogprobs]] | None = None
    pooled: dict[str, np.ndarray] | None = None
