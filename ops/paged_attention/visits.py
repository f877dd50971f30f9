"""A step's attention as a list of visits: one block of queries against one request's pages.

A decode row is one visit. A block of chunk tokens has one for each piece of a prompt in it: pieces promise to begin at
multiples of Q_BLOCK, and a block that keeps matrix units busy is larger than that.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from ops.paged_attention.batch import Q_BLOCK, AttentionBatch


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["block_V", "row_V", "base_V", "begin_V", "end_V", "first_V", "last_V"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Visits:
    """Which queries meet which pages. All int32 [V]; visits of one block are neighbours, every block has at least one.

    Attributes:
        block_V: block of queries.
        row_V: row of the page tables.
        base_V: position of the block's token 0, were it in this request; token t is at base + t.
        begin_V, end_V: tokens of the block that belong to the request; equal when there is nothing to do.
        first_V, last_V: 1 for the first and the last visit of its block.
    """

    block_V: jax.Array
    row_V: jax.Array
    base_V: jax.Array
    begin_V: jax.Array
    end_V: jax.Array
    first_V: jax.Array
    last_V: jax.Array


def decode_visits(batch: AttentionBatch) -> Visits:
    """One visit a decode row, its block of Q tokens; padded rows have an empty one."""
    row_B = jnp.arange(batch.num_decode, dtype=jnp.int32)
    one_B, zero_B = jnp.ones_like(row_B), jnp.zeros_like(row_B)
    qlen_B = batch.row_queries
    base_B = jnp.maximum(batch.decode_len_B - jnp.maximum(qlen_B, 1), 0)
    return Visits(row_B, row_B, base_B, zero_B, qlen_B, one_B, one_B)


def chunk_visits(batch: AttentionBatch, tokens: int) -> Visits:
    """Visits of blocks of `tokens` chunk tokens: one where a block begins, one where a piece begins inside it."""
    N, R = batch.chunk_row_N.shape[0], batch.chunk_qlen_R.shape[0]
    per_block = tokens // Q_BLOCK
    X = -(-N // per_block)
    n = jnp.arange(N, dtype=jnp.int32)
    new_piece_N = jnp.append(True, batch.chunk_row_N[1:] != batch.chunk_row_N[:-1])
    begins_N = (n % per_block == 0) | (new_piece_N & (batch.chunk_row_N < R))
    num = min(N, X + R)
    # Too few visits leave places at the end: they belong to the last block and do nothing.
    at_V = jnp.nonzero(begins_N, size=num, fill_value=N)[0].astype(jnp.int32)
    real_V = at_V < N
    at_V = jnp.minimum(at_V, N - 1)
    block_V = at_V // per_block
    row_V = batch.chunk_row_N[at_V]
    real_V &= row_V < R
    row_V = jnp.minimum(row_V, R - 1)
    start_V, qlen_V = batch.chunk_start_R[row_V], batch.chunk_qlen_R[row_V]
    begin_V = jnp.maximum(start_V - block_V * tokens, 0)
    end_V = jnp.where(real_V, jnp.minimum(start_V + qlen_V - block_V * tokens, tokens), begin_V)
    base_V = block_V * tokens - start_V + batch.chunk_len_R[row_V] - qlen_V
    changes_V = block_V[1:] != block_V[:-1]
    first_V, last_V = jnp.append(True, changes_V), jnp.append(changes_V, True)
    return Visits(block_V, row_V, base_V, begin_V, end_V, first_V.astype(jnp.int32), last_V.astype(jnp.int32))
