"""Putting tokens into pages on TPU, in place: read a tile, change some of its rows, write it back.

A page lies as `[K, page_size, L]` (layout "lanes" in pages.py). HBM is addressed in tiles of 8, 16 or 32 rows (4, 2 or
1 byte an element), so a single token cannot be written alone. Tiles of one call are distinct, so a span of them is in
flight at once: the reads overlap, then the writes.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ops.refs import Ref

SPAN_BYTES = 1 << 20
"""VMEM that the tiles of one grid step may take: enough of them to hide the latency of HBM behind each other."""


def write_tiles(
    pages_PKsL: jax.Array,
    new_WKrL: jax.Array,
    page_W: jax.Array,
    row_W: jax.Array,
    begin_W: jax.Array,
    end_W: jax.Array,
    *,
    tile_rows: int,
    interpret: bool,
) -> jax.Array:
    """Writes rows [begin, end) of W tiles of pages.

    Args:
        pages_PKsL: updated in place (aliased with the result).
        new_WKrL: what the rows become, in the pages' dtype; r is tile_rows, or 1: every row of [begin, end) gets it. A page may
            have more heads (or units): those behind are left alone.
        page_W, row_W: where each tile is: a page and its first row in it, a multiple of tile_rows. No two tiles with
            rows to write may be the same.
        begin_W, end_W: counted from row_W; nothing is touched where end <= begin.
        tile_rows: a multiple of `sublanes` that divides the page.
    """
    num_tiles, K, r, L = new_WKrL.shape
    bytes_a_tile = K * tile_rows * L * pages_PKsL.dtype.itemsize
    span = max(1, min(16, num_tiles, SPAN_BYTES // bytes_a_tile))
    padding = -num_tiles % span
    scalars = [jnp.pad(x.astype(jnp.int32), (0, padding)) for x in (page_W, row_W, begin_W, end_W)]
    if r == 1:  # one row is taken apart in float32, which holds every narrower dtype exactly
        new_WKrL = new_WKrL.astype(jnp.float32)
    new_WKrL = jnp.pad(new_WKrL, ((0, padding), (0, 0), (0, 0), (0, 0)))
    return pl.pallas_call(
        functools.partial(_write_kernel, tile_rows=tile_rows),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=((num_tiles + padding) // span,),
            in_specs=[
                pl.BlockSpec((span, K, r, L), lambda step, *_: (step, 0, 0, 0)),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=pl.BlockSpec(memory_space=pl.ANY),
            scratch_shapes=[
                pltpu.VMEM((span, K, tile_rows, L), pages_PKsL.dtype),
                pltpu.SemaphoreType.DMA((span,)),
                pltpu.SemaphoreType.DMA((span,)),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(pages_PKsL.shape, pages_PKsL.dtype),
        input_output_aliases={5: 0},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        interpret=interpret,
        name="paged_attention_write",
    )(*scalars, new_WKrL, pages_PKsL)


def _write_kernel(
    page_W: Ref,
    row_W: Ref,
    begin_W: Ref,
    end_W: Ref,
    new_gKrL: Ref,
    _pages_in: Ref,
    pages_PKsL: Ref,
    tile_gKrL: Ref,
    read_sem_g: Ref,
    write_sem_g: Ref,
    *,
    tile_rows: Ref,
):
    span = new_gKrL.shape[0]
    first = pl.program_id(0) * span

    def place(i: jax.Array):
        w = first + i
        heads = pl.ds(0, new_gKrL.shape[1])
        return pages_PKsL.at[page_W[w], heads, pl.ds(pl.multiple_of(row_W[w], tile_rows), tile_rows), :]

    def rows_kept(i: jax.Array):  # a tile that is replaced whole needs no read
        return (begin_W[first + i] > 0) | (end_W[first + i] < tile_rows)

    def rows_written(i: jax.Array):
        return end_W[first + i] > begin_W[first + i]

    def read(i: jax.Array):
        return pltpu.make_async_copy(place(i), tile_gKrL.at[i], read_sem_g.at[i])

    def write(i: jax.Array):
        return pltpu.make_async_copy(tile_gKrL.at[i], place(i), write_sem_g.at[i])

    @pl.loop(0, span)
    def _(i: jax.Array):
        @pl.when(rows_written(i) & rows_kept(i))
        def _():
            read(i).start()

    @pl.loop(0, span)
    def _(i: jax.Array):
        @pl.when(rows_written(i) & rows_kept(i))
        def _():
            read(i).wait()
            old = tile_gKrL[i].astype(jnp.float32)
            row = jax.lax.broadcasted_iota(jnp.int32, old.shape, 1)
            mask = (row >= begin_W[first + i]) & (row < end_W[first + i])
            new = jnp.broadcast_to(new_gKrL[i].astype(jnp.float32), old.shape)
            tile_gKrL[i] = jnp.where(mask, new, old).astype(tile_gKrL.dtype)

        @pl.when(rows_written(i) & ~rows_kept(i))
        def _():
            tile_gKrL[i] = jnp.broadcast_to(new_gKrL[i], tile_gKrL.shape[1:]).astype(tile_gKrL.dtype)

        @pl.when(rows_written(i))
        def _():
            write(i).start()

    @pl.loop(0, span)
    def _(i: jax.Array):
        @pl.when(rows_written(i))
        def _():
            write(i).wait()


def write_scales(
    scales_PKts: jax.Array,
    new_WKts: jax.Array,
    page_W: jax.Array,
    begin_W: jax.Array,
    end_W: jax.Array,
    *,
    interpret: bool,
) -> jax.Array:
    """Writes columns [begin, end) of W pages' scales; otherwise as write_tiles.

    Args:
        scales_PKts: float32, updated in place; s is the page size, a multiple of 128.
        new_WKts: what the columns become; the last axis is s, or 1: every column of [begin, end) gets it.
    """
    num_tiles = new_WKts.shape[0]
    page_shape = scales_PKts.shape[1:]
    scalars = [x.astype(jnp.int32) for x in (page_W, begin_W, end_W)]
    return pl.pallas_call(
        _scales_kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(num_tiles,),
            in_specs=[
                pl.BlockSpec((1, *new_WKts.shape[1:]), lambda step, *_: (step, 0, 0, 0)),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=pl.BlockSpec(memory_space=pl.ANY),
            scratch_shapes=[pltpu.VMEM(page_shape, scales_PKts.dtype), pltpu.SemaphoreType.DMA(())],
        ),
        out_shape=jax.ShapeDtypeStruct(scales_PKts.shape, scales_PKts.dtype),
        input_output_aliases={4: 0},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        interpret=interpret,
        name="paged_attention_write_scales",
    )(*scalars, new_WKts, scales_PKts)


def _scales_kernel(
    page_W: Ref, begin_W: Ref, end_W: Ref, new_1Kts: Ref, _scales_in: Ref, scales_PKts: Ref, page_Kts: Ref, sem: Ref
):
    w = pl.program_id(0)

    @pl.when(end_W[w] > begin_W[w])
    def _():
        place = scales_PKts.at[page_W[w]]
        read = pltpu.make_async_copy(place, page_Kts, sem)
        read.start()
        read.wait()
        column = jax.lax.broadcasted_iota(jnp.int32, page_Kts.shape, 2)
        mask = (column >= begin_W[w]) & (column < end_W[w])
        page_Kts[...] = jnp.where(mask, jnp.broadcast_to(new_1Kts[0], page_Kts.shape), page_Kts[...])
        write = pltpu.make_async_copy(page_Kts, place, sem)
        write.start()
        write.wait()
