"""Paged attention on GPU: Pallas (Triton) kernels that write this step's tokens in place and attend over pages.

They work on pages in rows, the layout of plain XLA: `[page, K, page_size, h]`, of any page size. Elsewhere than on a GPU
the kernels are interpreted, which tests use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from ops.paged_attention.batch import AttentionBatch
from ops.paged_attention.pages import KVPages

if TYPE_CHECKING:
    from ops.paged_attention.pallas_gpu_attend import Items, Tuning

PROGRAMS = 132 * 8
"""Programs that decode is cut into at least: an H100 and an H200 have 132 multiprocessors, which hold a few each."""

LEAST_KEYS = 256
"""Keys below which a request's context is not cut: starting a program costs as much as reading them."""


def supports(kv: KVPages) -> bool:
    """Whether the kernels can work on such pages.

    Triton's lowering addresses arrays of up to 4 GiB by 32-bit signed offsets: one-byte pages of 2 to 4 GiB a layer
    would be addressed wrongly. Larger ones get 64-bit offsets.
    """
    wrong = kv.k.dtype.itemsize == 1 and 2**31 < max(kv.k.size, 0 if kv.v is None else kv.v.size) <= 2**32
    return kv.layout == "rows" and not wrong


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
) -> tuple[jax.Array, KVPages]:
    """See ops.paged_attention.attend."""
    if not supports(kv):
        raise NotImplementedError("pages are not in rows, or of a size that cannot be addressed")
    from ops.paged_attention import pallas_gpu_attend, pallas_gpu_write  # Pallas costs 0.2 s to import

    interpret = kv.platform != "gpu"
    if k_TKh is not None:
        kv = pallas_gpu_write.write(kv, k_TKh, v_TKh, batch.kv_index_T, interpret=interpret)
    B, C, D = batch.num_decode, batch.num_chunk, batch.num_decode_tokens
    _, K, G, _ = q_TKGh.shape
    v_dim = kv.spec.v_head_dim or kv.spec.head_dim
    narrow = q_TKGh.dtype in (jnp.bfloat16, jnp.float16)
    q_TKGh, out_dtype = (q_TKGh if narrow else q_TKGh.astype(jnp.float32)), q_TKGh.dtype
    arrays = kv.k, kv.v, (kv.k_scale, kv.v_scale)
    options: dict[str, Any] = {"scale": scale, "softcap": softcap, "interpret": interpret}
    parts = []
    if B:
        Q = batch.queries
        M = Q * G  # rows of queries that meet the same keys
        tuning = decode_tuning(M, v_dim)
        programs = PROGRAMS if v_dim <= 256 else PROGRAMS // 4  # wide ones fill a multiprocessor by twos
        wanted = -(-programs // (K * -(-M // tuning.rows)))
        items, first_B, count_B = decode_items(batch, tuning, wanted, G, kv.page_size, window)
        # A row's single token sees all keys of its items; of several tokens the window leaves out each another one.
        limits: dict[str, Any] = {"window": window if Q > 1 else None, "tuning": tuning, "parts": M}
        best_WKM, total_WKM, sum_WKMv = pallas_gpu_attend.attend_items(
            q_TKGh[:D], *arrays, batch.decode_pages_BP, items, None, **limits, **options
        )
        sinks_KM = None if sinks_KG is None else jnp.tile(sinks_KG, (1, Q))
        out_BKMv = pallas_gpu_attend.combine(
            best_WKM, total_WKM, sum_WKMv, first_B, count_B, sinks_KM, q_TKGh.dtype, interpret=interpret
        )
        if Q > 1:
            out_BQKGv = out_BKMv.reshape(B, K, Q, G, -1).swapaxes(1, 2)
            real_BQ = batch.row_positions() >= 0  # what was summed for padding is nobody's
            out_BKMv = jnp.where(real_BQ[..., None, None, None], out_BQKGv, 0)
        parts.append(out_BKMv.reshape(D, K, G, -1))
    if C:
        tuning = chunk_tuning(C * G, v_dim, narrow)
        items = chunk_items(batch, tuning, G, window)
        parts += pallas_gpu_attend.attend_items(
            q_TKGh[D:],
            *arrays,
            batch.chunk_pages_RP,
            items,
            sinks_KG,
            window=window,
            tuning=tuning,
            parts=0,
            **options,
        )
    out_TKGv = parts[0] if len(parts) == 1 else jnp.concatenate(parts)
    return out_TKGv.astype(out_dtype), kv


def decode_tuning(rows: int, v_dim: int) -> Tuning:
    """Sizes for decode rows of so many rows of queries: memory-bound, so few rows, and loads well ahead."""
    from ops.paged_attention.pallas_gpu_attend import LEAST_DOT, Tuning

    rows = min(max(_power(rows), LEAST_DOT), 32 if v_dim > 256 else 64)
    if v_dim > 256:
        return Tuning(rows, keys=32, warps=8 if rows > 16 else 4, stages=2)
    return Tuning(rows, keys=64, warps=4, stages=3)


def chunk_tuning(rows: int, v_dim: int, narrow: bool) -> Tuning:
    """Sizes for prompts: bound by products, so as many rows as registers hold sums for (64 Ki of 4 bytes)."""
    from ops.paged_attention.pallas_gpu_attend import LEAST_DOT, Tuning

    most = 128 if v_dim <= 128 and narrow else 64 if v_dim <= 256 else 16
    rows = min(max(_power(rows), LEAST_DOT), most)
    return Tuning(rows, keys=64 if v_dim <= 128 else 32, warps=8 if rows >= 128 else 4, stages=3 if v_dim <= 128 else 2)


def decode_items(
    batch: AttentionBatch, tuning: Tuning, wanted: int, G: int, page_size: int, window: int | None
) -> tuple[Items, jax.Array, jax.Array]:
    """Decode rows cut into parts of equal length, so many that they fill the device however lengths differ.

    Args:
        wanted: parts that do; there may be one more a row.
    Returns:
        (items, first part of each row [B], how many parts it has [B]).
    """
    from ops.paged_attention.pallas_gpu_attend import Items

    S, B = tuning.keys, batch.num_decode
    most = -(-batch.decode_pages_BP.shape[1] * page_size // max(S, LEAST_KEYS))
    W = min(B + wanted, B * most)
    len_B, qlen_B = batch.decode_len_B, batch.row_queries
    begin_B = jnp.zeros_like(len_B)
    if window is not None:
        begin_B = jnp.maximum(len_B - jnp.maximum(qlen_B, 1) + 1 - window, 0)
    blocks_B = (len_B - begin_B + S - 1) // S
    # Rounding up adds at most one part a row: sum(ceil(blocks / size)) <= wanted + B, and never more than `most` a row.
    size = jnp.maximum(-(-jnp.sum(blocks_B) // wanted), max(1, LEAST_KEYS // S))
    count_B = (blocks_B + size - 1) // size
    past_B = jnp.cumsum(count_B)
    first_B = past_B - count_B
    w = jnp.arange(W, dtype=jnp.int32)
    row_W = jnp.searchsorted(past_B, w, side="right", method="compare_all").astype(jnp.int32)
    real_W = row_W < B
    row_W = jnp.minimum(row_W, B - 1)
    first_W = begin_B[row_W] + (w - first_B[row_W]) * size * S
    items = Items(
        table_W=row_W,
        token_W=row_W * batch.queries,
        base_W=(len_B - qlen_B)[row_W],
        row_W=jnp.zeros_like(row_W),
        rows_W=jnp.where(real_W, qlen_B[row_W] * G, 0),
        first_W=first_W,
        past_W=jnp.minimum(first_W + size * S, len_B[row_W]),
    )
    return items, first_B, count_B


def chunk_items(batch: AttentionBatch, tuning: Tuning, G: int, window: int | None) -> Items:
    """Pieces of prompts cut into `tuning.rows` rows each."""
    from ops.paged_attention.pallas_gpu_attend import Items

    C, R, M = batch.num_chunk, batch.chunk_qlen_R.shape[0], tuning.rows
    W = -(-C * G // M) + R
    rows_R = batch.chunk_qlen_R * G
    count_R = (rows_R + M - 1) // M
    past_R = jnp.cumsum(count_R)
    w = jnp.arange(W, dtype=jnp.int32)
    piece_W = jnp.searchsorted(past_R, w, side="right", method="compare_all").astype(jnp.int32)
    real_W = piece_W < R
    piece_W = jnp.minimum(piece_W, R - 1)
    row_W = (w - (past_R - count_R)[piece_W]) * M
    rows_W = jnp.where(real_W, rows_R[piece_W], 0)
    base_W = (batch.chunk_len_R - batch.chunk_qlen_R)[piece_W]
    last_W = base_W + (jnp.minimum(row_W + M, rows_W) - 1) // G
    first_W = jnp.zeros_like(last_W)
    if window is not None:
        first_W = jnp.maximum(base_W + row_W // G - window + 1, 0)
    return Items(
        table_W=piece_W,
        token_W=batch.chunk_start_R[piece_W],
        base_W=base_W,
        row_W=row_W,
        rows_W=rows_W,
        first_W=first_W,
        past_W=last_W + 1,
    )


def _power(n: int) -> int:
    """The power of two that is not below n."""
    return 1 << (n - 1).bit_length()
