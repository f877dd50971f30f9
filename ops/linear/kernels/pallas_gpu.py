"""A product with a weight in groups on GPU: one Pallas (Triton) kernel that reads few bits and multiplies in x's dtype.

A program takes a tile of rows and channels and some of the inputs: runs of a group, or of both halves of bytes, become numbers in
registers and are multiplied there. Few rows are bound by memory, so inputs are cut as well until every multiprocessor reads; what
the cuts add up to is summed behind. Elsewhere than on a GPU the kernel is interpreted, which tests use.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from ops.linear.kernels.coding import Coding, cost, halves
from ops.refs import Ref

LEAST_DOT = 16
"""The smallest side that Triton's matrix products take."""
PROGRAMS = 132 * 2
"""Programs that a product is cut into at least: an H100 and an H200 have 132 multiprocessors."""
MOST_INPUTS = 128
"""Inputs of one dot."""
LEAST_STEPS = 4
"""Steps of a program below which inputs are not cut."""


def step_of(coding: Coding) -> int:
    """Inputs of one dot: all of one group, and as many as registers hold."""
    if coding.half:
        return coding.half
    return next(size for size in (MOST_INPUTS, 64, 32, 16, 8, 4, 2, 1) if coding.group % size == 0)


def supports(inputs: int, channels: int, coding: Coding) -> bool:
    """Whether the kernel takes such a weight: dots of a power of two of inputs, and 32-bit addresses."""
    step = step_of(coding)
    whole = inputs % (2 * step if coding.half else step) == 0
    return LEAST_DOT <= step <= MOST_INPUTS and step & (step - 1) == 0 and whole and inputs * channels < 2**31


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
    rows = next((size for size in (16, 32) if size >= T), 64)
    channels = 64 if rows <= 32 else 128
    steps = I // (step_of(coding) * (2 if coding.half else 1))
    tiles = -(-T // rows) * -(-O // channels)
    cuts = max(1, min(-(-PROGRAMS // tiles), steps // LEAST_STEPS))
    numbers = [scale_GO] if offset_GO is None else [scale_GO, offset_GO]
    parts_CTO = pl.pallas_call(
        functools.partial(_kernel, coding=coding, rows=rows, channels=channels, steps=steps),
        grid=(-(-T // rows), -(-O // channels), cuts),
        out_shape=jax.ShapeDtypeStruct((cuts, T, O), jnp.float32),
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=3),
        cost_estimate=cost(x_TI, values, numbers),
        interpret=interpret,
        name="grouped_product",
    )(x_TI, values, *numbers)
    return parts_CTO[0] if cuts == 1 else jnp.sum(parts_CTO, axis=0)


def _kernel(x_TI: Ref, values: Ref, scale_GO: Ref, *refs: Ref, coding: Coding, rows: int, channels: int, steps: int):
    offset_GO, out_CTO = (refs[0], refs[1]) if len(refs) == 2 else (None, refs[0])
    (T, _), O, dtype = x_TI.shape, values.shape[1], x_TI.dtype
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    cut, cuts, size = pl.program_id(2), pl.num_programs(2), step_of(coding)
    row_T = pl.program_id(0) * rows + jnp.arange(rows, dtype=jnp.int32)
    channel_O = pl.program_id(1) * channels + jnp.arange(channels, dtype=jnp.int32)
    real_T, real_O = row_T < T, channel_O < O

    def folded(sum_TO: jax.Array, first: jax.Array, codes_IO: jax.Array) -> jax.Array:
        """With the product of the inputs from `first` on, which are of one group."""
        input_I = first + jnp.arange(size, dtype=jnp.int32)
        x = plt.load(x_TI.at[row_T[:, None], input_I[None, :]], mask=real_T[:, None], other=0.0)
        group = jax.lax.div(first, coding.group)
        scale_O = plt.load(scale_GO.at[group, channel_O], mask=real_O, other=0.0).astype(jnp.float32)
        weight_IO = coding.values(codes_IO) * scale_O[None, :]
        if offset_GO is not None:
            offset_O = plt.load(offset_GO.at[group, channel_O], mask=real_O, other=0.0)
            weight_IO = weight_IO + offset_O.astype(jnp.float32)[None, :]
        return sum_TO + plt.dot(x, weight_IO.astype(dtype), precision=precision).astype(jnp.float32)

    def fold(step: jax.Array, sum_TO: jax.Array) -> jax.Array:
        line_J = step * size + jnp.arange(size, dtype=jnp.int32)
        zero = 0.0 if jnp.issubdtype(values.dtype, jnp.floating) else 0
        codes = plt.load(values.at[line_J[:, None], channel_O[None, :]], mask=real_O[None, :], other=zero)
        if not coding.half:
            return folded(sum_TO, step * size, codes)
        low, high = halves(codes)
        return folded(folded(sum_TO, step * 2 * size, low), (step * 2 + 1) * size, high)

    first, past = jax.lax.div(cut * steps, cuts), jax.lax.div((cut + 1) * steps, cuts)
    sum_TO = jax.lax.fori_loop(first, past, fold, jnp.zeros((rows, channels), jnp.float32))
    plt.store(out_CTO.at[cut, row_T[:, None], channel_O[None, :]], sum_TO, mask=real_T[:, None] & real_O[None, :])
