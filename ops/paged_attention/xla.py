"""Attention over pages in plain XLA: what runs where no kernel does, on every platform.

Key pages are gathered a span at a time and folded in by online softmax (Milakov & Gimelshein 2018, arXiv:1805.02867),
in a loop whose trip count the batch decides: cost follows the longest context in the batch, not the page table's width,
and with a window it starts where the window of the earliest query starts.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from ops.paged_attention import pages as kv_pages
from ops.paged_attention.batch import Q_BLOCK, AttentionBatch
from ops.paged_attention.pages import KVPages
from ops.paged_attention.visits import chunk_visits

SPAN_TOKENS = 256
"""Key positions folded in at once: enough to fill a matmul, little enough that gathered pages stay in cache."""

VISIT_TOKENS, VISIT_KEYS = 128, 128
"""On a CPU, the queries of a chunk that meet a request's pages together, and the key positions folded in at once: with 256
keys, 8 prompts of 128 take 17 ms a layer where they take 9."""

_NOTHING = -1e30  # running maximum before any key; finite, so that differences of two of them are not NaN


def attend(
    q_TKGh: jax.Array,
    k_TKh: jax.Array | None,
    v_TKh: jax.Array | None,
    kv: KVPages,
    batch: AttentionBatch,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks_KG: jax.Array | None,
    chunk: int | None = None,
) -> tuple[jax.Array, KVPages]:
    """See ops.paged_attention.attend."""
    if k_TKh is not None:
        kv = kv_pages.write(kv, k_TKh, v_TKh, batch.kv_index_T)
    B, Q, C = batch.num_decode, batch.queries, batch.num_chunk
    first = batch.num_decode_tokens  # of the chunk part
    _, K, G, h = q_TKGh.shape
    options: dict[str, Any] = {"scale": scale, "window": window, "softcap": softcap, "chunk": chunk}
    parts = []
    if B and Q == 1:
        position_BM = jnp.broadcast_to(batch.decode_len_B[:, None] - 1, (B, G))
        parts.append(_attend_rows(q_TKGh[:B], position_BM, batch.decode_pages_BP, kv, sinks_KG, **options))
    elif B:
        q_BKMh = q_TKGh[:first].reshape(B, Q, K, G, h).swapaxes(1, 2).reshape(B, K, Q * G, h)
        position_BM = jnp.repeat(batch.row_positions(), G, axis=1)
        sinks_KM = None if sinks_KG is None else jnp.tile(sinks_KG, (1, Q))
        out = _attend_rows(q_BKMh, position_BM, batch.decode_pages_BP, kv, sinks_KM, **options)
        parts.append(out.reshape(B, K, Q, G, -1).swapaxes(1, 2).reshape(first, K, G, -1))
    if C and kv.platform == "cpu":
        parts.append(_attend_visits(q_TKGh[first:], batch, kv, sinks_KG, **options))
    elif C:
        N = C // Q_BLOCK
        pages_NP, position_NQ = chunk_blocks(batch)
        q_NKMh = q_TKGh[first:].reshape(N, Q_BLOCK, K, G, h).swapaxes(1, 2).reshape(N, K, Q_BLOCK * G, h)
        sinks_KM = None if sinks_KG is None else jnp.tile(sinks_KG, (1, Q_BLOCK))
        if batch.chunk_ahead_C is not None:
            ahead_NQ = jnp.where(position_NQ < 0, 0, batch.chunk_ahead_C.reshape(position_NQ.shape))
            options["ahead_XM"] = jnp.repeat(ahead_NQ, G, axis=1)
        out = _attend_rows(q_NKMh, jnp.repeat(position_NQ, G, axis=1), pages_NP, kv, sinks_KM, **options)
        parts.append(out.reshape(N, K, Q_BLOCK, G, -1).swapaxes(1, 2).reshape(C, K, G, -1))
    out_TKGh = parts[0] if len(parts) == 1 else jnp.concatenate(parts)
    return out_TKGh.astype(q_TKGh.dtype), kv


def _attend_visits(
    q_CKGh: jax.Array, batch: AttentionBatch, kv: KVPages, sinks_KG: jax.Array | None, **options: Any
) -> jax.Array:
    """The chunk part as a loop over pairs of a block of queries and a request's pages: out_CKGh float32.

    A CPU gathers 1,024 fresh tokens' pages 8 times this way, and 64 times with all blocks of Q_BLOCK at once; and each
    block stops at its own last position.
    """
    C, K, G, h = q_CKGh.shape
    visits = chunk_visits(batch, VISIT_TOKENS)
    X = -(-C // VISIT_TOKENS)
    q_XtKGh = jnp.pad(q_CKGh, ((0, X * VISIT_TOKENS - C), (0, 0), (0, 0), (0, 0))).reshape(X, VISIT_TOKENS, K, G, h)
    q_XKMh = q_XtKGh.swapaxes(1, 2).reshape(X, K, VISIT_TOKENS * G, h)
    sinks_KM = None if sinks_KG is None else jnp.tile(sinks_KG, (1, VISIT_TOKENS))
    token_t = jnp.arange(VISIT_TOKENS, dtype=jnp.int32)
    ahead_Xt = None
    if batch.chunk_ahead_C is not None:
        ahead_Xt = jnp.pad(batch.chunk_ahead_C, (0, X * VISIT_TOKENS - C)).reshape(X, VISIT_TOKENS)

    def visit(v: jax.Array, out_XKMh: jax.Array) -> jax.Array:
        block = visits.block_V[v]
        mine_t = (token_t >= visits.begin_V[v]) & (token_t < visits.end_V[v])
        position_M = jnp.repeat(jnp.where(mine_t, visits.base_V[v] + token_t, -1), G)
        part_KMh = _attend_rows(
            q_XKMh[block][None],
            position_M[None],
            batch.chunk_pages_RP[visits.row_V[v]][None],
            kv,
            sinks_KM,
            span_tokens=VISIT_KEYS,
            ahead_XM=None if ahead_Xt is None else jnp.repeat(jnp.where(mine_t, ahead_Xt[block], 0), G)[None],
            **options,
        )[0]
        return out_XKMh.at[block].add(part_KMh)  # other visits' tokens are zeros

    v_dim = kv.spec.v_head_dim or kv.spec.head_dim
    out_XKMh = jax.lax.fori_loop(
        0, visits.block_V.shape[0], visit, jnp.zeros((X, K, VISIT_TOKENS * G, v_dim), jnp.float32)
    )
    return out_XKMh.reshape(X, K, VISIT_TOKENS, G, v_dim).swapaxes(1, 2).reshape(-1, K, G, v_dim)[:C]


def chunk_blocks(batch: AttentionBatch) -> tuple[jax.Array, jax.Array]:
    """Page table [N, P] and query positions [N, Q_BLOCK] of each block of chunk tokens; padding is at position -1."""
    row_N = jnp.minimum(batch.chunk_row_N, batch.chunk_qlen_R.shape[0] - 1)
    start_N, qlen_N, len_N = (x[row_N][:, None] for x in (batch.chunk_start_R, batch.chunk_qlen_R, batch.chunk_len_R))
    token_NQ = jnp.arange(batch.num_chunk, dtype=jnp.int32).reshape(-1, Q_BLOCK)
    piece_NQ = token_NQ - start_N
    real_NQ = (piece_NQ >= 0) & (piece_NQ < qlen_N) & (batch.chunk_row_N == row_N)[:, None]
    return batch.chunk_pages_RP[row_N], jnp.where(real_NQ, len_N - qlen_N + piece_NQ, -1)


def _first_seen(position_XM: jax.Array, window: int | None, chunk: int | None) -> jax.Array | None:
    """The first position that each query sees; None where it sees all before it."""
    first_XM = None if window is None else position_XM - (window - 1)
    if chunk is None:
        return first_XM
    start_XM = position_XM // chunk * chunk
    return start_XM if first_XM is None else jnp.maximum(first_XM, start_XM)


def _attend_rows(
    q_XKMh: jax.Array,
    position_XM: jax.Array,
    pages_XP: jax.Array,
    kv: KVPages,
    sinks_KM: jax.Array | None,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    chunk: int | None,
    span_tokens: int = SPAN_TOKENS,
    ahead_XM: jax.Array | None = None,
) -> jax.Array:
    """M queries against each of X page tables. A query at position -1 sees nothing and yields zeros. float32.

    Args:
        ahead_XM: how many positions behind its own each query sees.
    """
    X, K, M, _ = q_XKMh.shape
    page_size = kv.page_size
    per_span = max(1, span_tokens // page_size)
    S = per_span * page_size
    # XLA's CPU einsum is 5-10 times slower in bfloat16 than in float32; elsewhere half precision is the fast one.
    narrow = q_XKMh.dtype == kv.k.dtype and kv.platform != "cpu"
    dtype = kv.k.dtype if narrow else jnp.float32
    pages_XP = jnp.pad(pages_XP, ((0, 0), (0, -pages_XP.shape[1] % per_span)))
    q_XKMh = (q_XKMh.astype(jnp.float32) * scale).astype(dtype)
    end_XM = position_XM if ahead_XM is None else position_XM + ahead_XM
    last_X = end_XM.max(axis=1)
    first_XM = _first_seen(position_XM, window, chunk)
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None

    def fold(span: jax.Array, carry: Any):
        best_XKM, total_XKM, sum_XKMh = carry
        pages_Xg = jax.lax.dynamic_slice_in_dim(pages_XP, span * per_span, per_span, axis=1)
        k_XgKsh, v_XgKsh = kv_pages.read(kv, pages_Xg, dtype)
        position_S = span * S + jnp.arange(S, dtype=jnp.int32)
        # Behind a row's last token lie other requests' leftovers, which may be anything: 0 * inf is not 0.
        v_XgKsh = jnp.where(
            (position_S <= last_X[:, None]).reshape(X, per_span, 1, page_size, 1), v_XgKsh, jnp.zeros((), dtype)
        )
        score_XKMS = jnp.einsum(
            "xkmh,xgksh->xkmgs", q_XKMh, k_XgKsh, preferred_element_type=jnp.float32, precision=precision
        ).reshape(X, K, M, S)
        if softcap is not None:
            score_XKMS = softcap * jnp.tanh(score_XKMS / softcap)
        seen_XMS = position_S <= end_XM[..., None]
        if first_XM is not None:
            seen_XMS &= position_S >= first_XM[..., None]
        seen_XKMS = seen_XMS[:, None]
        new_best = jnp.maximum(best_XKM, jnp.where(seen_XKMS, score_XKMS, _NOTHING).max(axis=-1))
        weight_XKMS = jnp.where(seen_XKMS, jnp.exp(score_XKMS - new_best[..., None]), 0.0)
        shrink_XKM = jnp.exp(best_XKM - new_best)
        part_XKMh = jnp.einsum(
            "xkmgs,xgksh->xkmh",
            weight_XKMS.reshape(X, K, M, per_span, page_size).astype(dtype),
            v_XgKsh,
            preferred_element_type=jnp.float32,
            precision=precision,
        )
        total_XKM = total_XKM * shrink_XKM + weight_XKMS.sum(axis=-1)
        return new_best, total_XKM, sum_XKMh * shrink_XKM[..., None] + part_XKMh

    v_dim = kv.spec.v_head_dim or kv.spec.head_dim
    sum_XKMh = jnp.zeros((X, K, M, v_dim), jnp.float32)
    if sinks_KM is None:
        best_XKM, total_XKM = jnp.full((X, K, M), _NOTHING, jnp.float32), jnp.zeros((X, K, M), jnp.float32)
    else:  # a sink is a key of weight exp(sink) and no value
        best_XKM = jnp.broadcast_to(sinks_KM.astype(jnp.float32), (X, K, M))
        total_XKM = jnp.ones((X, K, M), jnp.float32)
    end = jnp.max(last_X) // S + 1
    begin = jnp.zeros((), jnp.int32)
    if first_XM is not None:
        earliest_XM = jnp.where(position_XM >= 0, first_XM, jnp.iinfo(jnp.int32).max)
        begin = jnp.minimum(jnp.maximum(earliest_XM.min(), 0) // S, end)
    _, total_XKM, sum_XKMh = jax.lax.fori_loop(begin, end, fold, (best_XKM, total_XKM, sum_XKMh))
    return sum_XKMh / jnp.where(total_XKM == 0.0, 1.0, total_XKM)[..., None]
