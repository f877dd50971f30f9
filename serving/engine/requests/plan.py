"""What one step does, and what came of it. Made by the scheduler, carried out by the runner, taken back by the scheduler."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from serving.engine.api.types import TokenLogprobs
from serving.engine.requests.request import Request


@dataclasses.dataclass(frozen=True, slots=True)
class Chunk:
    """Positions [start, start + length) of one request, computed as chunk tokens.

    `samples`: the chunk reaches the sequence's end, so its last row also samples a token.
    """

    request: Request
    start: int
    length: int
    samples: bool


@dataclasses.dataclass(frozen=True, slots=True)
class StepPlan:
    """One step. Rows of the sample program: `decode` in order, then the chunks that sample, in order.

    Attributes:
        decode: requests that compute exactly one position; its token is known or still on the device.
        decode_positions: that position of each.
        chunks: pieces of prompts.
        admitted: requests that got their slot in this step (their per-slot state is to be loaded first).
        spilled: (page, digest) to copy to the host tier before anything of this step is written.
        restored: (page, digest) to copy back from it, after that and before the forward pass.
        dropped: digests that the host tier has forgotten.
        num_steps: decode steps in one dispatch, in a loop on the device; more than 1 only when there are no chunks. It may
            end sooner, when every row has sampled an end-of-sequence or stop token.
    """

    step_id: int
    decode: tuple[Request, ...]
    decode_positions: tuple[int, ...]
    chunks: tuple[Chunk, ...]
    admitted: tuple[Request, ...]
    sampled: tuple[Request, ...]
    spilled: tuple[tuple[int, bytes], ...] = ()
    restored: tuple[tuple[int, bytes], ...] = ()
    dropped: tuple[bytes, ...] = ()
    num_steps: int = 1

    def of_replica(self, replica: int) -> StepPlan:
        """What one replica has to do: its rows and chunks, in their order."""
        decode = [(r, p) for r, p in zip(self.decode, self.decode_positions, strict=True) if r.replica == replica]
        return dataclasses.replace(
            self,
            decode=tuple(r for r, _ in decode),
            decode_positions=tuple(p for _, p in decode),
            chunks=tuple(c for c in self.chunks if c.request.replica == replica),
            sampled=tuple(r for r in self.sampled if r.replica == replica),
        )

    @property
    def requests(self) -> tuple[Request, ...]:
        """Everybody whom the step computes something of."""
        return (*self.decode, *(chunk.request for chunk in self.chunks))

    @property
    def num_tokens(self) -> int:
        """Tokens scheduled, padding not counted."""
        return len(self.decode) * self.num_steps + sum(c.length for c in self.chunks)


@dataclasses.dataclass(frozen=True, slots=True)
class StepResult:
    """What a step sampled, row by row of `StepPlan.sampled`.

    Attributes:
        tokens: int32 [rows], or [num_steps, rows]; rows of steps that the device left out are -1.
        finite: bool, the same shape; False where the logits held NaN or infinity.
        logprobs: per row, where the request asked for it.
        prompt_logprobs: request id -> entries for prompt positions [chunk.start + 1, chunk.start + length] of this step.
        pooled: request id -> this step's share of its pooled hidden states, float32 [embed].
    """

    tokens: np.ndarray
    finite: np.ndarray
    logprobs: Sequence[TokenLogprobs | None] | None = None
    prompt_logprobs: dict[str, list[TokenLogprobs]] | None = None
    pooled: dict[str, np.ndarray] | None = None
