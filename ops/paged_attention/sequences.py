"""Attention of whole sequences, without pages: what training computes, in operations that differentiate.

A model is given `Sequences` where a step of the engine has an `AttentionBatch`, and no pages. Queries go in blocks, each against
the keys that it can see at all: half of the scores are never computed, with a window most of them. Of long rows the backward pass
computes a block's scores again, so that no more than one block's are in memory.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

MAX_BLOCKS = 8
"""Blocks of queries of a sequence at most: each is traced and compiled."""

MIN_BLOCK = 256

KEPT_SCORES = 1 << 26
"""Scores of a layer (256 MiB) that are kept for the backward pass; where there are more it computes each block's again."""

_UNSEEN = -1e30  # finite: its differences are not NaN


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["segments_BS", "positions_BS"], meta_fields=["single"]
)
@dataclasses.dataclass(frozen=True)
class Sequences:
    """B rows of S tokens, T = B S: every token sees those of its own segment up to itself.

    Attributes:
        segments_BS: int32, which text of its row a token is of; neighbours of one segment are one text. Padding is a segment too,
            0 by custom.
        positions_BS: int32, the token's position in its text.
        single: static: each row is one text, and what is behind it padding: nothing is masked but what is to come.
    """

    segments_BS: jax.Array
    positions_BS: jax.Array
    single: bool = False

    def by_group(self) -> tuple[Sequences, ...]:
        """As `AttentionBatch.by_group`: where nothing is kept there is one group."""
        return (self,)

    def place(self, layer: int) -> tuple[int, int]:
        """As `AttentionBatch.place`."""
        return 0, layer


def attend(
    q_TKGh: jax.Array,
    k_TKh: jax.Array,
    v_TKh: jax.Array | None,
    batch: Sequences,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks_KG: jax.Array | None = None,
    chunk: int | None = None,
) -> jax.Array:
    """As `ops.paged_attention.attend` on tokens that are all there: out_TKGh in q's dtype."""
    (B, S), (T, K, G, h) = batch.segments_BS.shape, q_TKGh.shape
    assert T == B * S, f"{T} tokens of {B} rows of {S}"
    q_BSKGh, k_BSKh = q_TKGh.reshape(B, S, K, G, h), k_TKh.reshape(B, S, K, h)
    v_BSKh = k_BSKh if v_TKh is None else v_TKh.reshape(B, S, K, -1)
    size = max(MIN_BLOCK, -(-math.ceil(S / MAX_BLOCKS) // 16) * 16)
    block = functools.partial(_block, scale=scale, window=window, softcap=softcap, chunk=chunk, single=batch.single)
    parts = []
    for first in range(0, S, size):
        last = min(S, first + size)
        begin = 0 if window is None else max(0, first - window + 1)
        queries, keys = slice(first, last), slice(begin, last)
        run = functools.partial(block, first=first - begin)
        run = jax.checkpoint(run) if B * K * G * S * S > KEPT_SCORES else run
        parts.append(
            run(
                q_BSKGh[:, queries],
                k_BSKh[:, keys],
                v_BSKh[:, keys],
                (batch.segments_BS[:, queries], batch.segments_BS[:, keys]),
                (batch.positions_BS[:, queries], batch.positions_BS[:, keys]),
                sinks_KG,
            )
        )
    out_BSKGh = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)
    return out_BSKGh.reshape(T, K, G, -1).astype(q_TKGh.dtype)


def _block(
    q_BQKGh: jax.Array,
    k_BSKh: jax.Array,
    v_BSKh: jax.Array,
    segments: tuple[jax.Array, jax.Array],
    positions: tuple[jax.Array, jax.Array],
    sinks_KG: jax.Array | None,
    *,
    first: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    chunk: int | None,
    single: bool,
) -> jax.Array:
    """Q queries, the first of which stands beside key number `first`: out_BQKGh, float32."""
    precision = jax.lax.Precision.HIGHEST if k_BSKh.dtype == jnp.float32 else None
    options: dict[str, Any] = {"preferred_element_type": jnp.float32, "precision": precision}
    q_BQKGh = (q_BQKGh.astype(jnp.float32) * scale).astype(k_BSKh.dtype)
    score = jnp.einsum("bqkgh,bskh->bkgqs", q_BQKGh, k_BSKh, **options)
    if softcap is not None:
        score = softcap * jnp.tanh(score / softcap)
    Q, S = score.shape[-2:]
    ahead_QS = (first + jnp.arange(Q))[:, None] - jnp.arange(S)
    seen = ahead_QS >= 0
    if window is not None:
        seen &= ahead_QS < window
    seen = seen[None, None, None]
    if not single:
        seen = seen & (segments[0][:, :, None] == segments[1][:, None, :])[:, None, None]
    if chunk is not None:
        seen = seen & (positions[0][:, :, None] // chunk == positions[1][:, None, :] // chunk)[:, None, None]
    score = jnp.where(seen, score, _UNSEEN)
    best = score.max(axis=-1)
    sink = None if sinks_KG is None else sinks_KG.astype(jnp.float32)[None, :, :, None]
    best = jax.lax.stop_gradient(best if sink is None else jnp.maximum(best, sink))
    weight = jnp.exp(score - best[..., None])
    total = weight.sum(axis=-1)
    if sink is not None:  # a key of weight exp(sink) that has no value
        total = total + jnp.exp(sink - best)
    # Divided last: scores are gone through less often, forward and backward.
    out = jnp.einsum("bkgqs,bskh->bqkgh", weight.astype(v_BSKh.dtype), v_BSKh, **options)
    return out / jnp.moveaxis(total, 3, 1)[..., None]
