"""Paged attention on TPU: two Pallas (Mosaic) kernels, one that writes this step's tokens and one that attends.

Both work on pages in the layout "lanes" (see pages.py): `[page, K, page_size, L]` with a token's K and V side by side in
the lanes, so that a page is one copy and a head of it is a ready matrix. Elsewhere than on a TPU the kernels are
interpreted, which tests use.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from ops.paged_attention.batch import Q_BLOCK, AttentionBatch
from ops.paged_attention.pages import KVPages, in_units, join_lanes, lane_layout, quantize_int8
from ops.paged_attention.visits import chunk_visits, decode_visits

if TYPE_CHECKING:
    from ops.paged_attention.pallas_tpu_attend import Shape

BUFFER_BYTES = 2 << 20
"""VMEM that one span of pages may take; there are two. 2 MiB is 2.5 us of HBM time on v5e, longer than its latency."""
MAX_KEYS = 1024
CHUNK_KEYS = 512
CHUNK_ROWS = 512
"""Query rows and keys of a chunk's score matrix: 1 MiB of float32, and enough products a byte to keep the MXU busy."""


def sublanes(dtype: jax.typing.DTypeLike) -> int:
    """Rows of the smallest tile of HBM that a copy can address."""
    return 8 * 4 // jnp.dtype(dtype).itemsize


def least_page_size(dtype: jax.typing.DTypeLike) -> int:
    """Positions that a page must hold: whole tiles, and of int8 whole rows of scales, which lie along the 128 lanes.

    8 positions of float32, 16 of bfloat16, 32 of one-byte floats, 128 of int8.
    """
    dtype = jnp.dtype(dtype)
    return 128 if dtype == jnp.int8 else sublanes(dtype)


def supports(page_size: int, dtype: jax.typing.DTypeLike) -> bool:
    """Whether the kernels can work on such pages."""
    return page_size % least_page_size(dtype) == 0 and jnp.dtype(dtype) != jnp.float16


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
    if kv.layout != "lanes" or not supports(kv.page_size, kv.k.dtype):
        raise NotImplementedError("pages are not in lanes")
    from ops.paged_attention.pallas_tpu_attend import attend_blocks  # Pallas costs 0.2 s to import

    if k_TKh is not None:
        kv = write(kv, k_TKh, v_TKh, batch)
    B, Q, C = batch.num_decode, batch.queries, batch.num_chunk
    D = batch.num_decode_tokens
    _, K, G, h = q_TKGh.shape
    lanes = lane_layout(kv.spec)
    dtype = jnp.bfloat16 if q_TKGh.dtype == jnp.bfloat16 else jnp.float32
    width = lanes.k_slice[1] - lanes.k_slice[0]
    q_TKGL = jnp.pad((q_TKGh.astype(jnp.float32) * scale).astype(dtype), ((0, 0), (0, 0), (0, 0), (0, width - h)))
    options: dict[str, Any] = {"window": window, "softcap": softcap, "interpret": kv.platform != "tpu"}
    parts = []
    if B:
        shape = _shape(kv, G, _heads_at_once(kv, K), MAX_KEYS)
        q_BKML = q_TKGL[:D].reshape(B, Q, K, G, width).swapaxes(1, 2).reshape(B, K, Q * G, width)
        sinks_KM = None if sinks_KG is None else jnp.tile(sinks_KG, (1, Q))
        visits = decode_visits(batch)
        out_BKML = attend_blocks(q_BKML, kv.k, kv.k_scale, batch.decode_pages_BP, visits, sinks_KM, shape, **options)
        parts.append(out_BKML.reshape(B, K, Q, G, -1).swapaxes(1, 2).reshape(D, K, G, -1))
    if C:
        tokens = _block_tokens(G, C)
        X = -(-C // tokens)
        q_XtKGL = jnp.pad(q_TKGL[D:], ((0, X * tokens - C), (0, 0), (0, 0), (0, 0))).reshape(X, tokens, K, G, width)
        q_XKML = q_XtKGL.swapaxes(1, 2).reshape(X, K, tokens * G, width)
        sinks_KM = None if sinks_KG is None else jnp.tile(sinks_KG, (1, tokens))
        shape = _shape(kv, G, 1, min(CHUNK_KEYS, CHUNK_KEYS * CHUNK_ROWS // (tokens * G)))
        visits = chunk_visits(batch, tokens)
        out_XKML = attend_blocks(q_XKML, kv.k, kv.k_scale, batch.chunk_pages_RP, visits, sinks_KM, shape, **options)
        out = out_XKML.reshape(X, K, tokens, G, -1).swapaxes(1, 2)
        parts.append(out.reshape(X * tokens, K, G, -1)[:C])
    out_TKGL = parts[0] if len(parts) == 1 else jnp.concatenate(parts)
    first = lanes.v_first - lanes.v_slice[0]
    v_dim = kv.spec.v_head_dim or kv.spec.head_dim
    return out_TKGL[..., first : first + v_dim].astype(q_TKGh.dtype), kv


def write(kv: KVPages, k_TKh: jax.Array, v_TKh: jax.Array | None, batch: AttentionBatch) -> KVPages:
    """The pages with this step's tokens: single rows for decode, whole page pieces for chunks and decode rows of several."""
    from ops.paged_attention.pallas_tpu_write import write_scales, write_tiles

    B, D = batch.num_decode, batch.num_decode_tokens
    size = kv.page_size
    interpret = kv.platform != "tpu"
    rows_TKL, scale_TKt = _pack(kv, k_TKh, v_TKh)
    x_TUL = in_units(rows_TKL, kv.k.shape[-1])
    k, scales = kv.k, kv.k_scale
    if B and batch.queries == 1:
        index_B = batch.kv_index_T[:B]
        page_B, slot_B = index_B // size, index_B % size
        rows = sublanes(k.dtype)
        real_B = (batch.decode_len_B > 0).astype(jnp.int32)
        begin_B = slot_B % rows
        where = (page_B, slot_B - begin_B, begin_B, begin_B + real_B)
        k = write_tiles(k, x_TUL[:B, :, None], *where, tile_rows=rows, interpret=interpret)
        if scales is not None and scale_TKt is not None:
            where = (page_B, slot_B, slot_B + real_B)
            scales = write_scales(scales, scale_TKt[:B, :, :, None], *where, interpret=interpret)
    pieces = []
    if B and batch.queries > 1:
        start_B = jnp.arange(B, dtype=jnp.int32) * batch.queries
        pieces.append((0, D, (batch.decode_pages_BP, start_B, batch.row_queries, batch.decode_len_B)))
    if batch.num_chunk:
        before_R = 0 if batch.chunk_before_R is None else batch.chunk_before_R
        start_R, qlen_R = batch.chunk_start_R - before_R, batch.chunk_qlen_R + before_R
        rows = batch.chunk_pages_RP, start_R, qlen_R, batch.chunk_len_R
        pieces.append((D, batch.num_tokens, rows))
    for first, end, rows in pieces:
        source_Ws, page_W, begin_W, end_W = _pages_of(rows, end - first, size)
        tiles_WUsL = x_TUL[first:end][source_Ws].swapaxes(1, 2)
        where = (page_W, jnp.zeros_like(page_W), begin_W, end_W)
        k = write_tiles(k, tiles_WUsL, *where, tile_rows=size, interpret=interpret)
        if scales is not None and scale_TKt is not None:
            tiles_WKts = jnp.moveaxis(scale_TKt[first:end][source_Ws], 1, 3)
            scales = write_scales(scales, tiles_WKts, page_W, begin_W, end_W, interpret=interpret)
    return dataclasses.replace(kv, k=k, k_scale=scales)


def _pack(kv: KVPages, k_TKh: jax.Array, v_TKh: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
    """K and V of each token as a row of a page, and their scales [T, K, 1 or 2]."""
    if kv.k_scale is None:
        return join_lanes(kv.spec, k_TKh, v_TKh, kv.k.dtype), None
    k_TKh, k_scale_TK = quantize_int8(k_TKh)
    if v_TKh is None:
        return join_lanes(kv.spec, k_TKh, None, jnp.int8), k_scale_TK[..., None]
    v_TKh, v_scale_TK = quantize_int8(v_TKh)
    return join_lanes(kv.spec, k_TKh, v_TKh, jnp.int8), jnp.stack([k_scale_TK, v_scale_TK], axis=-1)


def _pages_of(rows: tuple[jax.Array, ...], tokens: int, size: int) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The pages that R pieces of sequences go to: source token of each row of each (0 where none), page, rows [begin, end).

    At most C / size + R of them: every piece may begin and end in the middle of a page.

    Args:
        rows: (pages_RP, start_R, qlen_R, len_R): of each piece its page table, where its tokens are among the `tokens` (C) of
            this part, how many it has, and its sequence's length after this step.
    """
    pages_RP, start_R, qlen_R, len_R = rows
    C, R = tokens, qlen_R.shape[0]
    num = -(-C // size) + 2 * R if size > Q_BLOCK else C // size + 2 * R
    num = min(num, C)  # no page without a token
    before_R = len_R - qlen_R
    first_page_R = before_R // size
    count_R = jnp.where(qlen_R > 0, (len_R - 1) // size - first_page_R + 1, 0)
    past_R = jnp.cumsum(count_R)
    w = jnp.arange(num, dtype=jnp.int32)
    row_W = jnp.minimum(jnp.searchsorted(past_R, w, side="right").astype(jnp.int32), R - 1)
    column_W = first_page_R[row_W] + w - (past_R - count_R)[row_W]
    real_W = w < past_R[-1]
    page_W = pages_RP[row_W, jnp.minimum(column_W, pages_RP.shape[1] - 1)]
    begin_W = jnp.maximum(before_R[row_W] - column_W * size, 0)
    end_W = jnp.minimum(len_R[row_W] - column_W * size, size)
    token_Ws = (start_R - before_R)[row_W][:, None] + column_W[:, None] * size + jnp.arange(size, dtype=jnp.int32)
    return jnp.clip(token_Ws, 0, C - 1), page_W, begin_W, jnp.where(real_W, end_W, 0)


def _block_tokens(group: int, chunk: int) -> int:
    """Chunk tokens of one block of queries."""
    tokens = min(max(CHUNK_ROWS // group, Q_BLOCK), 256, chunk)
    return tokens // Q_BLOCK * Q_BLOCK


def _shape(kv: KVPages, group: int, heads: int, most_keys: int) -> Shape:
    from ops.paged_attention.pallas_tpu_attend import Shape

    lanes = lane_layout(kv.spec)
    row_bytes = heads * lanes.width * kv.k.dtype.itemsize
    pages = max(1, min(BUFFER_BYTES // (row_bytes * kv.page_size), most_keys // kv.page_size))
    return Shape(group, heads, pages * kv.page_size, kv.page_size, lanes.k_slice, lanes.v_slice)


def _heads_at_once(kv: KVPages, K: int) -> int:
    """KV heads of one grid step: all, so that a page is one long copy; half on chips where two cores share the grid."""
    device = kv.mesh.devices.flat[0] if kv.mesh is not None else jax.devices()[0]
    two_cores = getattr(device, "device_kind", "") in ("TPU v4", "TPU v5")  # v4 and v5p
    return K // 2 if two_cores and K % 2 == 0 else K
