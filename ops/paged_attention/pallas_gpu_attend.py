"""The GPU kernels that attend: online softmax (Milakov & Gimelshein 2018, arXiv:1805.02867) over pages read in place.

A program takes one item of work: rows of queries of one request and a range of its keys, for one KV head. A row is one
query head of one token; the rows of a KV head's group stand together, so that keys are read once for all of them. With
few requests running, an item is a part of a request's keys and `combine` adds the parts up (Dao et al. 2023, "Flash-
Decoding"), which keeps every multiprocessor reading.

Written in Pallas with its Triton lowering: it covers every GPU from sm_80 on and runs in interpret mode. docs/plan.md
says why not Mosaic GPU or jax-triton.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from ops.refs import Ref

_NOTHING = -1e30  # running maximum before any key; finite, so that differences of two of them are not NaN
_LOG2E = 1.0 / math.log(2.0)
LEAST_DOT = 16
"""The smallest side that Triton's matrix products take."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["table_W", "token_W", "base_W", "row_W", "rows_W", "first_W", "past_W"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Items:
    """What each program works on. All int32 [W].

    Attributes:
        table_W: row of the page tables.
        token_W: index among the queries of the request's first token.
        base_W: position of that token.
        row_W: first row of this item, counted from that token; row r is head r % G of token r // G.
        rows_W: rows that the request has; 0 where there is nothing to do.
        first_W, past_W: the keys [first, past) that this item looks at.
    """

    table_W: jax.Array
    token_W: jax.Array
    base_W: jax.Array
    row_W: jax.Array
    rows_W: jax.Array
    first_W: jax.Array
    past_W: jax.Array


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Sizes of a program: rows of queries, keys folded in at once, warps, and how many loads are under way."""

    rows: int
    keys: int
    warps: int
    stages: int


def pieces(width: int) -> tuple[tuple[int, int, bool], ...]:
    """(first, size, whole) powers of two that cover `width` channels; the last may reach beyond, and is not whole then."""
    found, first = [], 0
    while first < width:
        left = width - first
        size = max(1 << (left.bit_length() - 1), LEAST_DOT)
        found.append((first, size, size <= left))
        first += size
    return tuple(found)


def attend_items(
    q_TKGh: jax.Array,
    k_PKsh: jax.Array,
    v_PKsh: jax.Array | None,
    scales: tuple[jax.Array | None, jax.Array | None],
    tables_RP: jax.Array,
    items: Items,
    sinks_KG: jax.Array | None,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    tuning: Tuning,
    parts: int,
    interpret: bool,
) -> tuple[jax.Array, ...]:
    """Attends item by item.

    Args:
        q_TKGh: queries, in the dtype of the products.
        k_PKsh, v_PKsh, scales: pages in rows, this step's tokens written already; v is None when K is V too; scales
            [P, K, s] of int8 pages.
        parts: give unfinished sums of each item's first rows, so many, for `combine`, instead of finished rows; 0 for those.
    Returns:
        (out_TKGv,) in q's dtype, zeros where no item has rows; or, with parts, float32 (best_WKM, total_WKM, sum_WKMv) in
        powers of two: exp2 is what the hardware has. Anything where an item has fewer rows.
    """
    T, K, G, _ = q_TKGh.shape
    W = items.table_W.shape[0]
    v_dim = (k_PKsh if v_PKsh is None else v_PKsh).shape[-1]
    optional = (v_PKsh, *scales, sinks_KG)
    present = tuple(x is not None for x in optional)
    operands = [
        *(getattr(items, field.name) for field in dataclasses.fields(Items)),
        tables_RP,
        q_TKGh,
        k_PKsh,
        *(x for x in optional if x is not None),
    ]
    aliases = {}
    if parts:
        out_shape = tuple(
            jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((W, K, parts), (W, K, parts), (W, K, parts, v_dim))
        )
    else:
        operands.append(jnp.zeros((T, K, G, v_dim), q_TKGh.dtype))
        aliases = {len(operands) - 1: 0}
        out_shape = (jax.ShapeDtypeStruct((T, K, G, v_dim), q_TKGh.dtype),)
    kernel = functools.partial(
        _attend_kernel, present=present, scale=scale, window=window, softcap=softcap, tuning=tuning, parts=parts > 0
    )
    return pl.pallas_call(
        kernel,
        grid=(-(-parts // tuning.rows) or 1, W, K),  # programs that read the same keys start together
        out_shape=out_shape,
        input_output_aliases=aliases,
        compiler_params=plt.CompilerParams(num_warps=tuning.warps, num_stages=tuning.stages),
        interpret=interpret,
        name="paged_attention",
    )(*operands)


# Over 80 lines: one kernel: its pieces share two dozen values, and
# the loop over keys carries them.
def _attend_kernel(
    table_W: Ref, token_W: Ref, base_W: Ref, row_W: Ref, rows_W: Ref, first_W: Ref, past_W: Ref, tables_RP: Ref,
    q_TKGh: Ref, k_PKsh: Ref, *refs: Ref,
    present: tuple[bool, ...], scale: float, window: int | None, softcap: float | None, tuning: Tuning, parts: bool,
):  # fmt: skip
    left = list(refs)
    v_PKsh, k_scale_PKs, v_scale_PKs, sinks_KG = (left.pop(0) if there else None for there in present)
    # Later rows of a prompt have more keys: they go first, so that no long item is left for the end.
    w = pl.num_programs(1) - 1 - pl.program_id(1)
    head = pl.program_id(2)
    M, S = tuning.rows, tuning.keys
    G, page_size = q_TKGh.shape[2], k_PKsh.shape[2]
    dtype = q_TKGh.dtype
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None

    table, base, first, past, rows = table_W[w], base_W[w], first_W[w], past_W[w], rows_W[w]
    first_row = row_W[w] + pl.program_id(0) * M
    row_M = first_row + jnp.arange(M, dtype=jnp.int32)
    real_M = row_M < rows
    token_M, group_M = jax.lax.div(row_M, G), jax.lax.rem(row_M, G)
    position_M = base + token_M
    at_q = token_W[w] + token_M, head, group_M
    k_parts, v_parts = pieces(k_PKsh.shape[3]), pieces((k_PKsh if v_PKsh is None else v_PKsh).shape[3])
    q_MH = [load_channels(q_TKGh, at_q, piece, real_M) for piece in k_parts]

    def fold(masked: bool, block: jax.Array, carry: Any):
        best_M, total_M, *sums = carry
        position_S = first + block * S + jnp.arange(S, dtype=jnp.int32)
        inside_S = position_S < past if masked else None
        column_S = jax.lax.div(position_S, page_size)
        if masked:
            page_S = plt.load(tables_RP.at[table, column_S], mask=inside_S, other=0)
        else:
            page_S = plt.load(tables_RP.at[table, column_S])
        at = page_S, head, jax.lax.rem(position_S, page_size)
        keys = [load_channels(k_PKsh, at, piece, inside_S) for piece in k_parts]
        score_MS = sum(
            plt.dot(q, k.astype(dtype), trans_b=True, precision=precision).astype(jnp.float32)
            for q, k in zip(q_MH, keys, strict=True)
        )
        if k_scale_PKs is not None:
            score_MS = score_MS * _load_scales(k_scale_PKs, at, inside_S)[None, :]
        if softcap is None:
            score_MS = score_MS * (scale * _LOG2E)
        else:
            score_MS = (softcap * _LOG2E) * jnp.tanh(score_MS * (scale / softcap))
        if inside_S is not None:
            seen_MS = inside_S[None, :] & (position_S[None, :] <= position_M[:, None])
            if window is not None:
                seen_MS &= position_S[None, :] > position_M[:, None] - window
            score_MS = jnp.where(seen_MS, score_MS, _NOTHING)
            new_best_M = jnp.maximum(best_M, jnp.max(score_MS, axis=1))
            weight_MS = jnp.where(seen_MS, jnp.exp2(score_MS - new_best_M[:, None]), 0.0)
        else:
            new_best_M = jnp.maximum(best_M, jnp.max(score_MS, axis=1))
            weight_MS = jnp.exp2(score_MS - new_best_M[:, None])
        shrink_M = jnp.exp2(best_M - new_best_M)
        total_M = total_M * shrink_M + jnp.sum(weight_MS, axis=1)
        if v_scale_PKs is not None or (v_PKsh is None and k_scale_PKs is not None):
            weight_MS = (
                weight_MS * _load_scales(k_scale_PKs if v_scale_PKs is None else v_scale_PKs, at, inside_S)[None, :]
            )
        values = keys if v_PKsh is None else [load_channels(v_PKsh, at, piece, inside_S) for piece in v_parts]
        weight_MS = weight_MS.astype(dtype)
        sums = [
            old * shrink_M[:, None] + plt.dot(weight_MS, v.astype(dtype), precision=precision).astype(jnp.float32)
            for old, v in zip(sums, values, strict=True)
        ]
        return new_best_M, total_M, *sums

    if sinks_KG is None or parts:
        best_M, total_M = jnp.full((M,), _NOTHING, jnp.float32), jnp.zeros((M,), jnp.float32)
    else:  # a sink is a key of weight exp(sink) and no value
        best_M = plt.load(sinks_KG.at[head, group_M]).astype(jnp.float32) * _LOG2E
        total_M = jnp.ones((M,), jnp.float32)
    sums = [jnp.zeros((M, size), jnp.float32) for _, size, _ in v_parts]
    blocks = jnp.where(rows > first_row, jax.lax.div(past - first + (S - 1), S), 0)
    whole = jnp.int32(0)
    carry: Any = (best_M, total_M, *sums)
    if window is None:  # blocks that every row sees all of need no masks
        all_see = jnp.minimum(base + jax.lax.div(first_row, G) + 1, past)
        whole = jnp.minimum(jax.lax.div(jnp.maximum(all_see - first, 0), S), blocks)
        carry = jax.lax.fori_loop(0, whole, functools.partial(fold, False), carry)
    best_M, total_M, *sums = jax.lax.fori_loop(whole, blocks, functools.partial(fold, True), carry)

    if parts:
        best_WKM, total_WKM, *rest = left
        plt.store(best_WKM.at[w, head, row_M], best_M, mask=real_M)
        plt.store(total_WKM.at[w, head, row_M], total_M, mask=real_M)
        for piece, value in zip(v_parts, sums, strict=True):
            store_channels(rest[0], (w, head, row_M), piece, value, real_M)
        return
    share_M = 1.0 / jnp.where(total_M == 0.0, 1.0, total_M)
    for piece, value in zip(v_parts, sums, strict=True):
        store_channels(refs[-1], at_q, piece, (value * share_M[:, None]).astype(refs[-1].dtype), real_M)


def combine(
    best_WKM: jax.Array,
    total_WKM: jax.Array,
    sum_WKMv: jax.Array,
    first_B: jax.Array,
    count_B: jax.Array,
    sinks_KM: jax.Array | None,
    dtype: jax.typing.DTypeLike,
    *,
    interpret: bool,
) -> jax.Array:
    """out_BKMv: the parts [first, first + count) of each row added up; zeros where there are none."""
    _, K, M, v_dim = sum_WKMv.shape
    B = first_B.shape[0]
    operands = [first_B, count_B, best_WKM, total_WKM, sum_WKMv] + ([] if sinks_KM is None else [sinks_KM])
    return pl.pallas_call(
        functools.partial(_combine_kernel, has_sinks=sinks_KM is not None),
        grid=(B, K, M),
        out_shape=jax.ShapeDtypeStruct((B, K, M, v_dim), dtype),
        compiler_params=plt.CompilerParams(num_warps=2, num_stages=1),
        interpret=interpret,
        name="paged_attention_combine",
    )(*operands)


_PARTS_AT_ONCE = 16


def _combine_kernel(
    first_B: Ref, count_B: Ref, best_WKM: Ref, total_WKM: Ref, sum_WKMv: Ref, *refs: Ref, has_sinks: bool
):
    b, head, group = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    first, count = first_B[b], count_B[b]
    v_parts = pieces(sum_WKMv.shape[3])

    def fold(block: jax.Array, carry: Any):
        best, total, *sums = carry
        part_X = block * _PARTS_AT_ONCE + jnp.arange(_PARTS_AT_ONCE, dtype=jnp.int32)
        real_X = part_X < count
        at = jnp.where(real_X, first + part_X, 0), head, group
        best_X = plt.load(best_WKM.at[at], mask=real_X, other=_NOTHING)
        total_X = plt.load(total_WKM.at[at], mask=real_X, other=0.0)
        new_best = jnp.maximum(best, jnp.max(best_X, axis=0))
        share_X = jnp.exp2(best_X - new_best)
        shrink = jnp.exp2(best - new_best)
        total = total * shrink + jnp.sum(total_X * share_X, axis=0)
        sums = [
            old * shrink + jnp.sum(load_channels(sum_WKMv, at, piece, real_X) * share_X[:, None], axis=0)
            for old, piece in zip(sums, v_parts, strict=True)
        ]
        return new_best, total, *sums

    if has_sinks:
        best, total = refs[0][head, group].astype(jnp.float32) * _LOG2E, jnp.float32(1.0)
    else:
        best, total = jnp.float32(_NOTHING), jnp.float32(0.0)
    sums = [jnp.zeros((size,), jnp.float32) for _, size, _ in v_parts]
    blocks = jax.lax.div(count + (_PARTS_AT_ONCE - 1), _PARTS_AT_ONCE)
    _, total, *sums = jax.lax.fori_loop(0, blocks, fold, (best, total, *sums))
    share = jnp.where(count > 0, 1.0 / jnp.where(total == 0.0, 1.0, total), 0.0)
    out = refs[-1]
    for (start, size, whole), value in zip(v_parts, sums, strict=True):
        value = (value * share).astype(out.dtype)
        if whole:
            plt.store(out.at[b, head, group, pl.ds(start, size)], value)
        else:
            channel = start + jnp.arange(size, dtype=jnp.int32)
            inside = channel < out.shape[3]
            plt.store(out.at[b, head, group, channel], value, mask=inside)


def load_channels(ref: Ref, at: tuple[Any, ...], piece: tuple[int, int, bool], mask_N: jax.Array | None) -> jax.Array:
    """[N, size] of ref[at], channels of one piece; zeros where the mask says so and beyond the last channel."""
    index, mask = _channels(ref, at, piece, mask_N)
    zero = 0.0 if jnp.issubdtype(ref.dtype, jnp.floating) else 0
    return plt.load(ref.at[index], mask=mask, other=None if mask is None else zero)


def store_channels(
    ref: Ref, at: tuple[Any, ...], piece: tuple[int, int, bool], value_NS: jax.Array, mask_N: jax.Array
) -> None:
    index, mask = _channels(ref, at, piece, mask_N)
    plt.store(ref.at[index], value_NS, mask=mask)


def _channels(
    ref: Ref, at: tuple[Any, ...], piece: tuple[int, int, bool], mask_N: jax.Array | None
) -> tuple[tuple[jax.Array, ...], jax.Array | None]:
    """(index, mask) of channels of one piece. Arrays throughout: interpret mode takes no slices beside arrays.

    Masked indices are left as they come: clamped ones would meet real ones, and interpret mode writes what was there
    before to every masked place.
    """
    first, size, whole = piece
    lead = tuple(x[:, None] if getattr(x, "ndim", 0) else x for x in at)
    channel_S = first + jnp.arange(size, dtype=jnp.int32)
    mask_N1 = None if mask_N is None else mask_N[:, None]
    index = (*lead, channel_S[None, :])
    if whole:
        return index, mask_N1
    inside_1S = (channel_S < ref.shape[-1])[None, :]
    return index, inside_1S if mask_N1 is None else mask_N1 & inside_1S


def _load_scales(ref: Ref, at: tuple[Any, ...], mask_S: jax.Array | None) -> jax.Array:
    if mask_S is None:
        return plt.load(ref.at[at])
    return plt.load(ref.at[at], mask=mask_S, other=0.0)
