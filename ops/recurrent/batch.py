"""Which of a step's tokens belong to which sequence's state: what recurrent layers are told beside their inputs.

A step's tokens are those of `ops.paged_attention.batch`: B decode rows of Q positions each, then C chunk tokens in pieces of
up to R sequences. A sequence's state lies in a *slot*, a row of a layer's state arrays; the last row is a dummy that padded
rows write to.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["decode_slot_B", "decode_start_B", "decode_count_B", "accepted_B",
                 "chunk_slot_R", "chunk_first_R", "chunk_start_R", "chunk_qlen_R"],
    meta_fields=["num_tokens", "queries", "replayed", "tentative"],
)  # fmt: skip
@dataclasses.dataclass(frozen=True)
class RecurrentBatch:
    """Where each sequence's tokens are in a step, and which slot keeps its state. All int32.

    A sequence whose first token of this step is at position 0 begins with a state of zeros, whatever its slot holds, so slots
    need not be cleared when they are given on.

    Padding: a padded decode row has count 0 and the dummy slot; a padded chunk row has qlen 0 and the dummy slot. Neither
    changes the state of a real slot; outputs at padded tokens are arbitrary.
    """

    decode_slot_B: jax.Array  # slot of each decode row
    decode_start_B: jax.Array  # position of its first token of this step
    decode_count_B: jax.Array  # how many of its Q tokens are real, or of Q - replayed; the rest is padding at its end
    chunk_slot_R: jax.Array  # slot of each piece
    chunk_first_R: jax.Array  # where it starts, counted inside the chunk part
    chunk_start_R: jax.Array  # position of its first token
    chunk_qlen_R: jax.Array  # its number of tokens
    num_tokens: int  # T = B * Q + C, static
    queries: int = 1  # Q, static
    replayed: int = 0  # static
    """How many of the Q tokens of a decode row repeat those that it brought in the step before, where drafts are verified. The
    state in the slot is the one before them. Of the repeated tokens the first `accepted_B` have become part of the
    sequence, the others are skipped; the state that is kept is the one behind the accepted ones, and what the new tokens
    do to it shows in their outputs alone."""
    accepted_B: jax.Array | None = None  # where replayed > 0
    tentative: bool = False  # static
    """How many of a decode row's tokens become part of the sequence is found out afterwards: states stay as they are, and come
    back as `Held`, which brings them behind as many tokens as there turn out to be. Such a step has no chunks."""

    @property
    def num_decode(self) -> int:
        """B, static."""
        return self.decode_slot_B.shape[0]

    @property
    def num_decode_tokens(self) -> int:
        """B * Q, static."""
        return self.num_decode * self.queries

    @property
    def num_chunk(self) -> int:
        """C, static."""
        return self.num_tokens - self.num_decode_tokens


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["row_N", "first_N", "count_N", "is_first_N", "is_last_N"],
    meta_fields=["length"],
)
@dataclasses.dataclass(frozen=True)
class Blocks:
    """The pieces of a batch cut into blocks of at most `length` tokens, in order: what a scan over chunks walks.

    Attributes:
        row_N: the piece of each block; R for blocks that hold nothing.
        first_N: its first token, counted inside the chunk part.
        count_N: its number of tokens.
        is_first_N, is_last_N: whether it begins or ends its piece.
    """

    row_N: jax.Array
    first_N: jax.Array
    count_N: jax.Array
    is_first_N: jax.Array
    is_last_N: jax.Array
    length: int


def blocks(batch: RecurrentBatch, length: int) -> Blocks:
    """Cuts the chunk part into blocks; C / length of them, and one more for each piece that may end inside one."""
    R, C = batch.chunk_qlen_R.shape[0], batch.num_chunk
    N = -(-C // length) + max(R - 1, 0)
    each_R = -(-batch.chunk_qlen_R // length)
    end_R = jnp.cumsum(each_R)
    block_N = jnp.arange(N, dtype=jnp.int32)
    row_N = jnp.searchsorted(end_R, block_N, side="right").astype(jnp.int32)
    at_N = jnp.minimum(row_N, R - 1)
    offset_N = block_N - (end_R - each_R)[at_N]
    real_N = row_N < R
    count_N = jnp.where(real_N, jnp.clip(batch.chunk_qlen_R[at_N] - offset_N * length, 0, length), 0)
    return Blocks(
        row_N=row_N,
        first_N=jnp.where(real_N, batch.chunk_first_R[at_N] + offset_N * length, 0),
        count_N=count_N.astype(jnp.int32),
        is_first_N=real_N & (offset_N == 0),
        is_last_N=real_N & (offset_N == each_R[at_N] - 1),
        length=length,
    )
