"""Weights in groups made on the host: from what a checkpoint has in blocks or in float8, exactly, or by rounding dense ones."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ops.linear.kernels.coding import LANES, Coding
from ops.linear.weights.blocks import PANEL, PANELS, TABLES, BlockWeight, parts_of_groups
from ops.linear.weights.grouped import GroupedWeight, Place
from ops.linear.weights.rotation import BLOCK, rotate

LEAST_GROUP = 16
"""Inputs that must share a scale: the smallest dot of a GPU."""
MOST_HALF = 64
"""Inputs in the lower halves of a run of bytes at most."""
FLOATS = (np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2))
"""What values may be besides integers."""


@dataclasses.dataclass(frozen=True)
class Rows:
    """A weight's rows on the host: w = (value - zero) * scale + offset.

    Attributes:
        values_OI: uint8 codes of four bits, int8, or float8.
        scale_OG, offset_OG: float32; a group has I / G inputs.
        bits: 4 or 8.
        zero, table: as of `Coding`.
        order_I, rotated: as of `GroupedWeight`.
    """

    values_OI: np.ndarray
    scale_OG: np.ndarray
    offset_OG: np.ndarray | None
    bits: int
    zero: int = 0
    table: tuple[float, ...] | None = None
    order_I: np.ndarray | None = None
    rotated: bool = False

    def weight(self, shape: tuple[int, ...], platform: str, cuts: int = 1) -> GroupedWeight | None:
        """The weight of these rows, of numpy arrays; None where its groups are too small to compute with.

        Args:
            shape: of the dense weight: [O, I], or [E, O, I] of a stack whose rows lie one behind the other.
            cuts: into how many parts devices cut its inputs.
        """
        I = shape[-1]
        if cuts > 1 and self.order_I is not None:
            return None
        coding = coding_of(I, self.scale_OG.shape[1], self.bits, cuts, self.zero, self.table)
        if coding is None:
            return None
        half = coding.half
        values = self.values_OI.reshape(*shape[:-1], I)
        if half:
            runs = values.reshape(*shape[:-1], I // (2 * half), 2, half)
            values = (runs[..., 0, :] | runs[..., 1, :] << 4).reshape(*shape[:-1], I // 2)
        values = np.ascontiguousarray(values.swapaxes(-1, -2))
        again = I // coding.group // self.scale_OG.shape[1]  # a scale's group may be wider than what a device has of it

        def numbers(array_OG: np.ndarray | None) -> Any:
            if array_OG is None:
                return None
            narrow = array_OG.astype(ml_dtypes.bfloat16)
            array_OG = narrow if (narrow.astype(np.float32) == array_OG).all() else array_OG
            return np.ascontiguousarray(np.repeat(array_OG, again, axis=1).reshape(*shape[:-1], -1).swapaxes(-1, -2))

        kept: Any = values.view(np.int8) if values.dtype == np.uint8 else values
        order: Any = None if self.order_I is None else self.order_I.astype(np.int32)
        parts = numbers(self.scale_OG), numbers(self.offset_OG), order
        return GroupedWeight(kept, *parts, coding, platform, self.rotated)


def coding_of(
    inputs: int, groups: int, bits: int, cuts: int = 1, zero: int = 0, table: tuple[float, ...] | None = None
) -> Coding | None:
    """How inputs of so many groups are stored where devices cut them into `cuts` parts; None where too few are left together."""
    if inputs % cuts or inputs % groups:
        return None
    piece = inputs // cuts
    group = math.gcd(inputs // groups, piece)
    if group < LEAST_GROUP:
        return None
    half = math.gcd(group, MOST_HALF) if bits == 4 else 0
    while half >= LEAST_GROUP and piece % (2 * half):
        half //= 2
    half = half if half >= LEAST_GROUP else 0
    return None if bits == 4 and not half and table is not None else Coding(group, half, zero, table)


@dataclasses.dataclass(frozen=True)
class Packing:
    """How the weights of a checkpoint are stored, as far as its configuration says it: for plans, which read no tensor.

    Attributes:
        bits: 4 or 8.
        group: neighbouring inputs that share a scale; 0 for all of a row.
        values: dtype of values of eight bits.
        scale: dtype of scales and offsets.
        offsets: whether there are any.
        table: four bits are codes of a table.
        experts: of a mixture's experts alone.
    """

    bits: int
    group: int
    values: str = "int8"
    scale: str = "float32"
    offsets: bool = False
    table: bool = False
    experts: bool = False

    def like(self, shape: tuple[int, ...], platform: str, cuts: int) -> GroupedWeight | None:
        """A weight stored so, of arrays without values; None where it would stay dense."""
        *lead, O, I = shape
        entries = tuple(map(float, TABLES["e2m1"] or ())) if self.table else None
        group = self.group if self.group and self.group < I else I
        coding = coding_of(I, I // group, self.bits, cuts, 0, entries) if I % group == 0 else None
        if coding is None:
            return None
        values = jax.ShapeDtypeStruct((*lead, I // 2 if coding.half else I, O), jnp.dtype(self.values))
        scale = jax.ShapeDtypeStruct((*lead, I // coding.group, O), jnp.dtype(self.scale))
        offset = scale if self.offsets else None
        return GroupedWeight(values, scale, offset, None, coding, platform)  # pyright: ignore[reportArgumentType]


ROUNDED = {4: Packing(4, 32, scale="bfloat16", offsets=True), 8: Packing(8, 32, scale="bfloat16")}
"""What `rounded` makes, by bits."""


def rows_of_blocks(weight: BlockWeight) -> Rows | None:
    """What a weight in blocks of numpy arrays has, exactly; None where its stretches have no form in common."""
    forms = weight.forms
    alike = {form.table for form in forms}
    bits = 4 if all(form.bits == 4 for form in forms) and len(alike) == 1 else 8
    if bits == 8 and alike & {"nf4", "fp4"}:
        return None
    entries = TABLES[next(iter(alike))] if bits == 4 else None
    parts = [_stretch(weight, index, entries is not None, bits) for index in range(len(weight.stretches))]
    counts = [scale_OG.shape[1] for _, scale_OG, _, _ in parts]
    if any(max(counts) % count for count in counts):
        return None
    zeros = {zero for *_, zero in parts}
    zero = zeros.pop() if len(zeros) == 1 else 0
    scales, offsets = [], []
    for _, scale_OG, offset_OG, own in parts:
        offset_OG = offset_OG - scale_OG * np.float32(own - zero)
        again = max(counts) // scale_OG.shape[1]
        scales.append(np.repeat(scale_OG, again, axis=1))
        offsets.append(np.repeat(offset_OG, again, axis=1))
    O, offset_OG = weight.shape[0], np.concatenate(offsets)
    return Rows(
        np.concatenate([codes_OI for codes_OI, *_ in parts])[:O],
        np.concatenate(scales)[:O],
        offset_OG[:O] if offset_OG.any() else None,
        bits,
        zero,
        None if entries is None else tuple(float(entry) for entry in entries),
        None if weight.order_I is None else np.asarray(weight.order_I),
        weight.rotated,
    )


def _stretch(
    weight: BlockWeight, index: int, is_table: bool, bits: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """(codes [O, I], scales and offsets float32 [O, G], what is taken off each code) of a stretch of a weight's rows.

    Args:
        is_table: codes stay what a table is asked for.
        bits: 8 makes them signed bytes.
    """
    stretch, inputs = weight.stretches[index], weight.shape[1]
    form, bytes_N = stretch.form, np.asarray(weight.bytes_N)
    size, begin = form.panel_bytes(inputs), stretch.offset
    found: list[list[np.ndarray]] = []
    whole, rest = divmod(stretch.panels, PANELS)
    for groups, of in ((whole, PANELS), (1, rest)):
        if groups * of:
            end = begin + groups * of * size
            parts = parts_of_groups(bytes_N[begin:end].reshape(groups, of * size), of, form, inputs)
            found.append([part.reshape(groups * of * PANEL, -1) for part in parts])
            begin = end
    codes, scale, offset = (np.concatenate(parts) for parts in zip(*found, strict=True))
    offset = offset if offset.size else np.zeros_like(scale)
    if bits == 4:
        return codes, scale, offset, 0 if is_table else form.zero
    entries = TABLES[form.table]
    if entries is not None:
        return np.array(entries, np.int8)[codes], scale, offset, 0
    shift = 128 if form.bits == 8 else 0
    return (codes.astype(np.int16) - shift).astype(np.int8), scale, offset, form.zero - shift


def as_float8(rows: Rows) -> Rows:
    """Four-bit floats as float8 with the same scales, exactly: what a GPU turns into other floats by one instruction. Other rows as
    they are."""
    if rows.table is None or rows.table != tuple(float(entry) for entry in TABLES["e2m1"] or ()):
        return rows
    values = np.array(rows.table, FLOATS[0])[rows.values_OI]
    return dataclasses.replace(rows, values_OI=values, bits=8, table=None)


SHRUNK = (0.0, 0.05, 0.1, 0.15)
"""Parts of a group's range, half of them at either end, that `rounded` tries to leave out."""
GROUP = 32


def rounded(weight_OI: np.ndarray, bits: int) -> Rows | None:
    """Dense rows rounded to four or eight bits in groups of 32 with bfloat16 scales and, in four bits, offsets: five bits a weight,
    or eight and a half. Rotated where its inputs are whole blocks of 64. None where inputs are no whole groups."""
    O, I = weight_OI.shape
    if I % GROUP:
        return None
    values = np.empty((O, I), np.uint8 if bits == 4 else np.int8)
    scale, offset = np.empty((O, I // GROUP), np.float32), np.empty((O, I // GROUP), np.float32)
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        for first in range(0, O, 1024):
            to = slice(first, first + 1024)
            part = jnp.asarray(np.asarray(weight_OI[to], np.float32))
            part = rotate(part) if I % BLOCK == 0 else part
            found = (_to_four if bits == 4 else _to_eight)(part.reshape(len(part), -1, GROUP))
            values[to] = np.asarray(found[0]).reshape(len(part), I)
            scale[to], offset[to] = (np.asarray(one)[..., 0] for one in found[1:])
    return Rows(values, scale, offset if bits == 4 else None, bits, rotated=I % BLOCK == 0)


def _bf16(x: jax.Array) -> jax.Array:
    return x.astype(jnp.bfloat16).astype(jnp.float32)


@jax.jit
def _to_four(x_OGi: jax.Array) -> tuple[jax.Array, ...]:
    low, high = x_OGi.min(-1, keepdims=True), x_OGi.max(-1, keepdims=True)

    def attempt(part: float) -> tuple[jax.Array, ...]:
        cut = (high - low) * (part / 2)
        scale = _bf16((high - low - 2 * cut) / 15)
        offset = _bf16(low + cut)
        values = jnp.clip(jnp.round((x_OGi - offset) / jnp.where(scale > 0, scale, 1)), 0, 15)
        offset = _bf16((x_OGi - values * scale).mean(-1, keepdims=True))
        return ((values * scale + offset - x_OGi) ** 2).sum(-1, keepdims=True), values, scale, offset

    best = attempt(SHRUNK[0])
    for part in SHRUNK[1:]:
        new = attempt(part)
        best = tuple(jnp.where(new[0] < best[0], *pair) for pair in zip(new, best, strict=True))
    return best[1].astype(jnp.uint8), best[2], best[3]


@jax.jit
def _to_eight(x_OGi: jax.Array) -> tuple[jax.Array, ...]:
    scale = _bf16(jnp.abs(x_OGi).max(-1, keepdims=True) / 127)
    values = jnp.clip(jnp.round(x_OGi / jnp.where(scale > 0, scale, 1)), -127, 127)
    return values.astype(jnp.int8), scale, jnp.zeros_like(scale)


def place(weight: GroupedWeight, sharding: NamedSharding | None) -> GroupedWeight:
    """A weight of numpy arrays, or of arrays without values, on its devices.

    Args:
        sharding: of the dense weight; None for the default device.
    """
    if sharding is None:
        return jax.device_put(_in_whole_tiles(weight))
    mesh = sharding.mesh
    axes = tuple(sharding.spec) + (None,) * (len(weight.shape) - len(sharding.spec))
    if sharding.shard_shape(weight.shape)[-2] == weight.shape[-2]:
        weight = _in_whole_tiles(weight)
    specs = weight.specs(PartitionSpec(*axes))

    def put(host: Any, spec: PartitionSpec) -> Any:
        own = NamedSharding(mesh, spec)
        if isinstance(host, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(host.shape, host.dtype, sharding=own)
        return jax.make_array_from_callback(host.shape, own, lambda index: np.ascontiguousarray(host[index]))

    placed = jax.tree.map(put, weight, specs)
    return dataclasses.replace(placed, place=Place(mesh, axes) if mesh.size > 1 else None)  # pyright: ignore[reportArgumentType]


def _in_whole_tiles(weight: GroupedWeight) -> GroupedWeight:
    """With channels of zeros behind the others up to whole tiles, on a TPU. XLA keeps an array turned round where that wastes less
    than whole tiles do, and would turn it back, whole, before every product."""
    more = -weight.shape[-2] % LANES
    if weight.platform != "tpu" or not more:
        return weight

    def pad(host: Any) -> Any:
        dims = (*host.shape[:-1], host.shape[-1] + more)
        if isinstance(host, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(dims, host.dtype)
        return np.pad(host, [(0, 0)] * (host.ndim - 1) + [(0, more)])

    values, scale, offset = (one if one is None else pad(one) for one in (weight.values, weight.scale, weight.offset))
    return dataclasses.replace(weight, values=values, scale=scale, offset=offset, outputs=weight.shape[-2])
