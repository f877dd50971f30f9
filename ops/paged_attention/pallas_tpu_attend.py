"""The TPU kernel that attends: online softmax (Milakov & Gimelshein 2018, arXiv:1805.02867) over pages read in place.

Work is a list of visits (visits.py). Visits of one block follow each other, so its queries, result and running sums
stay in VMEM. While one span of pages is computed on, the next is on its way, across visits too.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ops.paged_attention.visits import Visits
from ops.refs import Ref

_NOTHING = -1e30  # running maximum before any key; finite, so that differences of two of them are not NaN
_LANES = 128


@dataclasses.dataclass(frozen=True)
class Shape:
    """Static facts of one call.

    Attributes:
        group: query heads a KV head; row m of a block is head m % group of token m // group.
        heads: KV heads that one grid step computes on.
        keys: key positions a span of pages holds.
        page_size: positions a page holds; divides keys.
        k_lanes, v_lanes: (first, past the last) lane of K and of V in a page's rows, multiples of 128.
    """

    group: int
    heads: int
    keys: int
    page_size: int
    k_lanes: tuple[int, int]
    v_lanes: tuple[int, int]


# Over 80 lines: the call of a kernel. Its operands and their block shapes are in
# the order of the kernel's arguments, and grow together by what is optional.
def attend_blocks(
    q_XKML: jax.Array,
    pages_PKsL: jax.Array,
    scales_PKts: jax.Array | None,
    tables_RP: jax.Array,
    visits: Visits,
    sinks_KM: jax.Array | None,
    shape: Shape,
    *,
    window: int | None,
    softcap: float | None,
    interpret: bool,
) -> jax.Array:
    """Attends with X blocks of M query rows.

    Args:
        q_XKML: scaled already, in the dtype of the products; lanes as K's in the pages.
        pages_PKsL, scales_PKts: pages, this step's tokens written already, and the scales of K and V (int8 only). Rows of more
            lanes than theirs are in several units, as pages.py has them.
        sinks_KM: the logit of each row's sink.
    Returns:
        out_XKML with V's lanes, in q's dtype; rows that no visit covers are zeros.
    """
    X, K, M, _ = q_XKML.shape
    num_visits = visits.block_V.shape[0]
    P = tables_RP.shape[1]
    v_width = shape.v_lanes[1] - shape.v_lanes[0]
    Kb, width = shape.heads, max(shape.k_lanes[1], shape.v_lanes[1])

    position_first_V = visits.base_V + visits.begin_V
    position_past_V = jnp.where(visits.end_V > visits.begin_V, visits.base_V + visits.end_V, 0)  # keys this visit sees
    span_past_V = (position_past_V + shape.keys - 1) // shape.keys
    span_first_V = jnp.zeros_like(span_past_V)
    if window is not None:
        span_first_V = jnp.minimum(jnp.maximum(position_first_V - window + 1, 0) // shape.keys, span_past_V)
    next_V, first_busy = _chain(span_past_V > span_first_V)

    def block(kb: jax.Array, v: jax.Array, block_V: Ref, *_: Ref):
        return block_V[v], kb, 0, 0

    in_specs = [
        pl.BlockSpec((1, Kb, M, q_XKML.shape[-1]), block),
        pl.BlockSpec((1, 1, P), lambda kb, v, block_V, row_V, *_: (row_V[v], 0, 0), memory_space=pltpu.SMEM),
        pl.BlockSpec(
            (1, 1, P),
            lambda kb, v, block_V, row_V, next_V, *_: (row_V[jnp.maximum(next_V[v], 0)], 0, 0),
            memory_space=pltpu.SMEM,
        ),
        pl.BlockSpec(memory_space=pl.ANY),
    ]
    tables_R1P = tables_RP[:, None]
    operands = [q_XKML, tables_R1P, tables_R1P, pages_PKsL]
    scratch = [
        pltpu.VMEM((2, Kb, shape.keys, width), pages_PKsL.dtype),
        pltpu.SemaphoreType.DMA((2,)),
        pltpu.SMEM((1,), jnp.int32),  # which buffer the next span of pages is in
        pltpu.VMEM((Kb, M, _LANES), jnp.float32),  # running maximum, the same in every lane
        pltpu.VMEM((Kb, M, _LANES), jnp.float32),  # running sum
        pltpu.VMEM((Kb, M, v_width), jnp.float32),
    ]
    if scales_PKts is not None:
        in_specs.append(pl.BlockSpec(memory_space=pl.ANY))
        operands.append(scales_PKts)
        pages_a_span = shape.keys // shape.page_size
        scratch.append(pltpu.VMEM((2, pages_a_span, Kb, *scales_PKts.shape[2:]), jnp.float32))
    if sinks_KM is not None:
        in_specs.append(pl.BlockSpec((Kb, M, _LANES), lambda kb, v, *_: (kb, 0, 0)))
        operands.append(jnp.broadcast_to(sinks_KM.astype(jnp.float32)[..., None], (K, M, _LANES)))
    kernel = functools.partial(
        _attend_kernel,
        shape=shape,
        window=window,
        softcap=softcap,
        has_scales=scales_PKts is not None,
        has_sinks=sinks_KM is not None,
    )
    scalars = [
        visits.block_V, visits.row_V, next_V, visits.base_V, visits.begin_V, visits.end_V, visits.first_V,
        visits.last_V, span_first_V, span_past_V, position_past_V, first_busy[None],
    ]  # fmt: skip
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(K // Kb, num_visits),
            in_specs=in_specs,
            out_specs=pl.BlockSpec((1, Kb, M, v_width), block),
            scratch_shapes=scratch,
        ),
        out_shape=jax.ShapeDtypeStruct((X, K, M, v_width), q_XKML.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=_vmem_limit(M, q_XKML.shape[-1], v_width, shape, width * pages_PKsL.dtype.itemsize),
        ),
        interpret=interpret,
        name="paged_attention",
    )(*[s.astype(jnp.int32) for s in scalars], *operands)


def _vmem_limit(M: int, width: int, v_width: int, shape: Shape, row_bytes: int) -> int:
    """Bytes of VMEM to ask for: what the operands take, scores several times over, and room for the compiler."""
    blocks = 2 * shape.heads * M * (width + v_width) * 4
    state = shape.heads * M * (2 * _LANES + v_width) * 4
    pages = 2 * shape.heads * shape.keys * row_bytes
    rows = shape.keys * (width + v_width) * 4
    need = blocks + state + pages + rows + 6 * M * shape.keys * 4
    return min(max(need + (4 << 20), 16 << 20), 60 << 20)  # v5p has 64 MiB, v5e and v6e 128


def _chain(busy_V: jax.Array) -> tuple[jax.Array, jax.Array]:
    """For each visit the next that has keys, -1 behind the last; and the first that has."""
    num = busy_V.shape[0]
    index_V = jnp.where(busy_V, jnp.arange(num, dtype=jnp.int32), num)
    from_here_V = jax.lax.cummin(index_V, reverse=True)
    behind_V = jnp.append(from_here_V[1:], num)
    return jnp.where(behind_V < num, behind_V, -1), from_here_V[0]


# Over 80 lines: one kernel: its pieces share references, buffers and
# semaphores, which a split would pass on one by one.
def _attend_kernel(
    block_V: Ref, row_V: Ref, next_V: Ref, base_V: Ref, begin_V: Ref, end_V: Ref, first_V: Ref, last_V: Ref,
    span_first_V: Ref, span_past_V: Ref, past_V: Ref, first_busy: Ref,
    q_1KML: Ref, table_11P: Ref, next_table_11P: Ref, pages_PKsL: Ref, *refs: Ref,
    shape: Shape, window: int | None, softcap: float | None, has_scales: bool, has_sinks: bool,
):  # fmt: skip
    left = list(refs)
    scales_PKts = left.pop(0) if has_scales else None
    sinks_KMl = left.pop(0) if has_sinks else None
    out_1KML, buffer_2KSL, sem_2, turn, best_KMl, total_KMl, sum_KML = left[:7]
    scale_2gKts = left[7] if has_scales else None
    kb, v = pl.program_id(0), pl.program_id(1)
    Kb, S, size = shape.heads, shape.keys, shape.page_size
    pages_a_span = S // size
    M, dtype = q_1KML.shape[2], q_1KML.dtype
    heads = pl.ds(kb * Kb, Kb)
    lanes = pages_PKsL.shape[-1]
    units, K = buffer_2KSL.shape[-1] // lanes, Kb * pl.num_programs(0)
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT

    def pages_in(span: jax.Array, past: jax.Array):
        """How many pages of a span hold keys of a request that has `past` of them."""
        return jnp.minimum((past + size - 1) // size - span * pages_a_span, pages_a_span)

    def copies(page: jax.Array | int, i: jax.Array, slot: jax.Array | int):
        rows = pl.ds(pl.multiple_of(i * size, size), size)
        if units == 1:
            yield pltpu.make_async_copy(pages_PKsL.at[page, heads], buffer_2KSL.at[slot, :, rows], sem_2.at[slot])
        for unit in range(units if units > 1 else 0):
            source = pages_PKsL.at[page, pl.ds(unit * K + kb * Kb, Kb)]
            target = buffer_2KSL.at[slot, :, rows, unit * lanes : (unit + 1) * lanes]
            yield pltpu.make_async_copy(source, target, sem_2.at[slot])
        if scales_PKts is not None and scale_2gKts is not None:
            yield pltpu.make_async_copy(scales_PKts.at[page, heads], scale_2gKts.at[slot, i], sem_2.at[slot])

    def start(table: Ref, span: jax.Array, past: jax.Array, slot: jax.Array | int):
        @pl.loop(0, pages_in(span, past))
        def _(i: jax.Array):
            for copy in copies(table[0, 0, span * pages_a_span + i], i, slot):
                copy.start()

    def wait(span: jax.Array, past: jax.Array, slot: jax.Array | int):
        @pl.loop(0, pages_in(span, past))
        def _(i: jax.Array):
            for copy in copies(0, i, slot):
                copy.wait()

    @pl.when(first_V[v] == 1)
    def _():
        if sinks_KMl is None:
            best_KMl[...] = jnp.full_like(best_KMl, _NOTHING)
            total_KMl[...] = jnp.zeros_like(total_KMl)
        else:  # a sink is a key of weight exp(sink) and no value
            best_KMl[...] = sinks_KMl[...]
            total_KMl[...] = jnp.ones_like(total_KMl)
        sum_KML[...] = jnp.zeros_like(sum_KML)

    @pl.when(v == first_busy[0])
    def _():
        turn[0] = 0
        start(table_11P, span_first_V[v], past_V[v], 0)

    past = past_V[v]

    def clear_tail(span: jax.Array, slot: jax.Array):
        """Zeros behind the last key: other requests' leftovers may be anything, and 0 * inf is not 0."""

        @pl.loop(jnp.minimum((past - span * S) // size, pages_a_span), pages_a_span)
        def _(i: jax.Array):
            rows = pl.ds(pl.multiple_of(i * size, size), size)
            position = span * S + i * size + jax.lax.broadcasted_iota(jnp.int32, (Kb, size, buffer_2KSL.shape[-1]), 1)
            kept = buffer_2KSL[slot, :, rows].astype(jnp.float32)
            buffer_2KSL[slot, :, rows] = jnp.where(position < past, kept, 0.0).astype(buffer_2KSL.dtype)

    @pl.loop(span_first_V[v], span_past_V[v])
    def _(span: jax.Array):
        slot = turn[0]
        last = span + 1 == span_past_V[v]
        following = next_V[v]

        @pl.when(~last)
        def _():
            start(table_11P, span + 1, past, 1 - slot)

        @pl.when(last & (following >= 0))
        def _():
            start(next_table_11P, span_first_V[following], past_V[following], 1 - slot)

        wait(span, past, slot)

        @pl.when((span + 1) * S > past)
        def _():
            clear_tail(span, slot)

        token = jax.lax.broadcasted_iota(jnp.int32, (M, S), 0) // shape.group
        position = span * S + jax.lax.broadcasted_iota(jnp.int32, (M, S), 1)
        query = base_V[v] + token
        seen_MS = (token >= begin_V[v]) & (token < end_V[v]) & (position <= query)
        if window is not None:
            seen_MS &= position > query - window
        for head in range(Kb):
            k_SL = buffer_2KSL[slot, head, :, shape.k_lanes[0] : shape.k_lanes[1]].astype(dtype)
            score_MS = jax.lax.dot_general(
                q_1KML[0, head], k_SL, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32, precision=precision
            )
            if scale_2gKts is not None:
                score_MS *= _row_of_scales(scale_2gKts, slot, head, 0, pages_a_span)
            if softcap is not None:
                score_MS = softcap * jnp.tanh(score_MS / softcap)
            score_MS = jnp.where(seen_MS, score_MS, _NOTHING)
            best_M1 = best_KMl[head, :, :1]
            new_best_M1 = jnp.maximum(best_M1, jnp.max(score_MS, axis=1, keepdims=True))
            weight_MS = jnp.where(seen_MS, jnp.exp(score_MS - new_best_M1), 0.0)
            shrink_M1 = jnp.exp(best_M1 - new_best_M1)
            total_M1 = total_KMl[head, :, :1] * shrink_M1 + jnp.sum(weight_MS, axis=1, keepdims=True)
            if scale_2gKts is not None:
                value_scale = _row_of_scales(scale_2gKts, slot, head, -1, pages_a_span)
                weight_MS = jnp.where(seen_MS, weight_MS * value_scale, 0.0)
            v_SL = buffer_2KSL[slot, head, :, shape.v_lanes[0] : shape.v_lanes[1]].astype(dtype)
            part_ML = jax.lax.dot_general(
                weight_MS.astype(dtype), v_SL, (((1,), (0,)), ((), ())),
                preferred_element_type=jnp.float32, precision=precision,
            )  # fmt: skip
            sum_KML[head] = sum_KML[head] * shrink_M1 + part_ML
            best_KMl[head] = jnp.broadcast_to(new_best_M1, (M, _LANES))
            total_KMl[head] = jnp.broadcast_to(total_M1, (M, _LANES))
        turn[0] = 1 - slot

    @pl.when(last_V[v] == 1)
    def _():
        for head in range(Kb):
            total_M1 = total_KMl[head, :, :1]
            out_1KML[0, head] = (sum_KML[head] / jnp.where(total_M1 == 0.0, 1.0, total_M1)).astype(out_1KML.dtype)


def _row_of_scales(scale_2gKts: Ref, slot: jax.Array, head: int, which: int, pages_a_span: int):
    """[1, S] scales of a span's keys: pages side by side along the lanes."""
    which = which % scale_2gKts.shape[3]
    pieces = [scale_2gKts[slot, i, head, which : which + 1, :] for i in range(pages_a_span)]
    return pieces[0] if pages_a_span == 1 else jnp.concatenate(pieces, axis=1)
