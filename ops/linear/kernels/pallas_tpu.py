"""A product with a weight in groups on TPU: one Pallas (Mosaic) kernel that reads few bits and multiplies in x's dtype.

A tile of the weight becomes numbers in VMEM, once for all rows of a tile, and goes into the MXU from there; HBM gives only what is
stored. XLA would write the whole dense weight first. Elsewhere than on a TPU the kernel is interpreted, which tests use.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ops.linear.kernels.coding import LANES, Coding, cost, dense
from ops.refs import Ref

SUBLANES = 8
TILE_BYTES = 5 << 20
"""VMEM that a tile of the weight may take as float32; there are a few of its size."""
MOST_INPUTS = 2048
MOST_ROWS = 256


def tile_of(inputs: int, channels: int, coding: Coding) -> tuple[int, int] | None:
    """(inputs, channels) of a tile; None where the weight falls into none that Mosaic takes.

    A block's last two axes are whole tiles of (8, 128) words, or (32, 128) bytes, or all of the array.
    """
    unit = max(2 * coding.half, 64 if coding.half else 32)
    if coding.group < inputs:
        unit = math.lcm(unit, SUBLANES * coding.group)
    fitting = [size for size in range(unit, min(inputs, MOST_INPUTS) + 1, unit) if inputs % size == 0]
    size = max(fitting, default=inputs)
    wide = next((width for width in (512, 256, LANES) if size * width * 4 <= TILE_BYTES), None)
    return None if wide is None else (size, min(wide, -(-channels // LANES) * LANES))


def supports(inputs: int, channels: int, coding: Coding) -> bool:
    """Whether the kernel takes such a weight."""
    return tile_of(inputs, channels, coding) is not None and (not coding.half or coding.half % SUBLANES == 0)


def product(
    x_TI: jax.Array,
    values: jax.Array,
    scale_GO: jax.Array,
    offset_GO: jax.Array | None,
    coding: Coding,
    *,
    interpret: bool,
) -> jax.Array:
    """y_TO = x W in float32; arguments as `coding.dense`. `supports` must be true."""
    (T, I), O = x_TI.shape, values.shape[1]
    found = tile_of(I, O, coding)
    assert found is not None
    inputs, channels = found
    rows = min(MOST_ROWS, -(-T // 16) * 16)
    kept = inputs // 2 if coding.half else inputs

    def of_weight(size: int) -> pl.BlockSpec:
        return pl.BlockSpec((size, channels), lambda t, o, i: (i, o))

    is_whole = coding.group == I  # one scale for all of a channel's inputs
    coding = dataclasses.replace(coding, group=min(coding.group, inputs))
    of_groups = of_weight(inputs // coding.group)
    if is_whole:
        of_groups = pl.BlockSpec((1, channels), lambda t, o, i: (0, o))
    numbers = [scale_GO] if offset_GO is None else [scale_GO, offset_GO]
    return pl.pallas_call(
        functools.partial(_kernel, coding=coding),
        grid=(-(-T // rows), -(-O // channels), I // inputs),
        in_specs=[
            pl.BlockSpec((rows, inputs), lambda t, o, i: (t, i)),
            of_weight(kept),
            *(of_groups for _ in numbers),
        ],
        out_specs=pl.BlockSpec((rows, channels), lambda t, o, i: (t, o)),
        out_shape=jax.ShapeDtypeStruct((T, O), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=cost(x_TI, values, numbers),
        interpret=interpret,
        name="grouped_product",
    )(x_TI, values, *numbers)


def _kernel(x_TI: Ref, values: Ref, scale_GO: Ref, *refs: Ref, coding: Coding):
    offset_GO, out_TO = (refs[0], refs[1]) if len(refs) == 2 else (None, refs[0])
    x = x_TI[...]
    offset = None if offset_GO is None else offset_GO[...]
    weight_IO = dense(values[...], scale_GO[...], offset, coding, x.dtype)
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    part_TO = jnp.dot(x, weight_IO, precision=precision, preferred_element_type=jnp.float32)

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        out_TO[...] = part_TO

    @pl.when(pl.program_id(2) > 0)
    def _() -> None:
        out_TO[...] += part_TO
