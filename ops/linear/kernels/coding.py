"""How a weight in groups is stored for accelerators, and what it stands for: the part that all bodies of its product share.

A weight is kept inputs first, [I, O]: what a tile of it is multiplied with lies side by side, and the numbers of a group of inputs
lie along the channels. Four bits lie two in a byte: byte j of a run of `half` bytes holds inputs j and half + j of a run of twice
as many.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

LANES = 128
"""Channels of a TPU's tile."""


@dataclasses.dataclass(frozen=True)
class Coding:
    """w = (value - zero) * scale + offset, where scale and offset are each group's own.

    Attributes:
        group: neighbouring inputs that share a scale.
        half: inputs in the lower halves of a run of bytes, before those of the upper halves; 0 where a value has a byte of its own.
            Divides `group`.
        zero: taken off each value.
        table: what the 16 codes stand for; None where they stand for themselves.
    """

    group: int
    half: int = 0
    zero: int = 0
    table: tuple[float, ...] | None = None

    def values(self, codes: jax.Array) -> jax.Array:
        """Float32 of what is stored, a code each: int32 of four bits, or int8 or float8."""
        if self.table is None:
            values = codes.astype(jnp.float32)
            return values - self.zero if self.zero else values
        return looked_up(codes, self.table)


def looked_up(codes: jax.Array, table: tuple[float, ...]) -> jax.Array:
    """`table[codes]` without a gather, which kernels have not: four rounds of choosing by a bit."""
    entries = [jnp.float32(entry) for entry in table]
    for bit in range(4):
        is_set = (codes >> bit) & 1 == 1
        entries = [jnp.where(is_set, high, low) for low, high in zip(entries[::2], entries[1::2], strict=True)]
    return entries[0]


def halves(bytes_JO: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The codes in the lower and in the upper halves of bytes, int32."""
    wide_JO = bytes_JO.astype(jnp.int32)
    return wide_JO & 15, (wide_JO >> 4) & 15


def dense(
    values: jax.Array, scale: jax.Array, offset: jax.Array | None, coding: Coding, dtype: jax.typing.DTypeLike
) -> jax.Array:
    """The weight [..., I, O].

    Args:
        values: int8 [..., I / 2, O] of four bits, or int8 or float8 [..., I, O].
        scale, offset: [..., I / group, O].
    """
    *lead, _, O = values.shape
    if coding.half:
        runs = [part.reshape(*lead, -1, coding.half, O) for part in halves(values)]
        values = jnp.stack(runs, axis=-3)
    groups = coding.values(values).reshape(*lead, scale.shape[-2], coding.group, O)
    groups = groups * scale[..., None, :].astype(jnp.float32)
    if offset is not None:
        groups = groups + offset[..., None, :].astype(jnp.float32)
    return groups.reshape(*lead, -1, O).astype(dtype)


def cost(x_TI: jax.Array, values: jax.Array, numbers: Sequence[jax.Array]) -> Any:
    """What a product is worth, for compilers that cannot look into its kernel."""
    from jax.experimental import pallas as pl

    (T, I), O = x_TI.shape, values.shape[-1]
    read = sum(array.size * array.dtype.itemsize for array in (x_TI, values, *numbers))
    return pl.CostEstimate(flops=2 * T * I * O, transcendentals=0, bytes_accessed=read + 4 * T * O)
