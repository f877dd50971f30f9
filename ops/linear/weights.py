"""What a weight may be: a dense array, or a quantized one that remembers how to become dense.

An int8 weight is rotated before it is rounded: each 64 neighbouring inputs are multiplied by a Hadamard matrix, and so are
the activations before they are rounded in turn (Ashkboos et al. 2024, "QuaRot", arXiv:2404.00456, with small blocks and at
run time). The product stays what it was, but an outlier is spread over its 64 neighbours instead of costing them their
precision: the divergence of SmolLM2-135M's predictions from float32's falls to a third.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from ops import native

INT8_MAX = 127.0
PANEL = 16  # output channels a panel of a packed weight, as in ops/native/int8.h
GROUP = 64  # inputs that share an activation scale in the native kernels
BLOCK = 64  # inputs that are rotated together; the native kernels rotate what shares a scale


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values_OI", "scale_O"], meta_fields=["rotated"])
@dataclasses.dataclass(frozen=True)
class Int8Weight:
    """A weight matrix in symmetric int8 with one float32 scale an output channel: w = values * scale, maybe rotated.

    Attributes:
        values_OI: int8, -127..127.
        scale_O: float32, > 0.
        rotated: values * scale is `rotate` of the weight, so a product needs `rotate(x)`.
    """

    values_OI: jax.Array
    scale_O: jax.Array
    rotated: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I), as of the dense weight."""
        return self.values_OI.shape  # pyright: ignore[reportReturnType]

    @property
    def dtype(self) -> jnp.dtype:
        """int8: how the weight is stored."""
        return self.values_OI.dtype

    def dequantize(self, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
        """The dense weight_OI that the quantized one stands for."""
        dense_OI = self.values_OI.astype(jnp.float32) * self.scale_O[..., None]
        return (rotate(dense_OI) if self.rotated else dense_OI).astype(dtype)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["panels_PQci", "scale_O", "sums_PGc"],
    meta_fields=["shape", "rotated"],
)
@dataclasses.dataclass(frozen=True)
class PackedInt8Weight:
    """An `Int8Weight` in the layout of the native CPU kernels; see `ops/native/int8.h`.

    Attributes:
        panels_PQci: int8 [ceil(O / 16), ceil(I / 4), 16, 4]: channels in panels of 16, inputs in fours, zero padded.
        scale_O: float32, padded with zeros to whole panels.
        sums_PGc: int16 [ceil(O / 16), ceil(I / 64), 16]: each channel's sum over 64 inputs, for kernels that take
            activations as value + 128.
        shape: (O, I), as of the dense weight.
        rotated: as of `Int8Weight`.
    """

    panels_PQci: jax.Array
    scale_O: jax.Array
    sums_PGc: jax.Array
    shape: tuple[int, int]
    rotated: bool = False

    @property
    def dtype(self) -> jnp.dtype:
        """int8: how the weight is stored."""
        return self.panels_PQci.dtype

    def unpack(self) -> Int8Weight:
        """The same weight, a row a channel."""
        O, I = self.shape
        values_OI = self.panels_PQci.transpose(0, 2, 1, 3).reshape(self.scale_O.shape[0], -1)
        return Int8Weight(values_OI[:O, :I], self.scale_O[:O], self.rotated)

    def dequantize(self, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
        """The dense weight_OI that the quantized one stands for."""
        return self.unpack().dequantize(dtype)


Weight = jax.Array | Int8Weight | PackedInt8Weight
SCHEMES = ("int8",)


def quantize(weight_OI: jax.Array, scheme: str | None) -> Weight:
    """Converts a dense weight to the type that `scheme` names.

    Args:
        weight_OI: float array; leading axes before O are allowed.
        scheme: None keeps it dense; "int8" is symmetric int8 with one scale an output channel, rotated where every
            device's part of I is whole blocks.
    Raises:
        ValueError: the scheme is not known.
    """
    if scheme is None:
        return weight_OI
    if scheme == "int8":
        return _int8(weight_OI, _inputs_a_device(weight_OI) % BLOCK == 0)
    raise ValueError(f"Quantization {scheme!r} is not supported; known ones are {', '.join(SCHEMES)}.")


def _inputs_a_device(weight_OI: jax.Array) -> int:
    if isinstance(weight_OI, Tracer):
        return weight_OI.shape[-1]
    return weight_OI.sharding.shard_shape(weight_OI.shape)[-1]


@functools.partial(jax.jit, static_argnums=1)
def _int8(weight_OI: jax.Array, rotated: bool) -> Int8Weight:
    weight_OI = weight_OI.astype(jnp.float32)
    values_OI, scale_O = quantize_rows(rotate(weight_OI) if rotated else weight_OI)
    return Int8Weight(values_OI, scale_O, rotated)


def hadamard(size: int) -> np.ndarray:
    """The orthogonal, symmetric Hadamard matrix of Sylvester's construction, float32; `size` is a power of two."""
    matrix = np.ones((1, 1), np.float32)
    while matrix.shape[0] < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / np.float32(size**0.5)


def rotate(x_TI: jax.Array) -> jax.Array:
    """Each BLOCK neighbours along the last axis, a multiple of it, times the Hadamard matrix; its own inverse."""
    parts = x_TI.reshape(*x_TI.shape[:-1], -1, BLOCK)
    mixed = jnp.matmul(parts, jnp.asarray(hadamard(BLOCK), x_TI.dtype), precision=jax.lax.Precision.HIGHEST)
    return mixed.reshape(x_TI.shape)


def pack(weight: Weight) -> Weight:
    """The weight in the layout of this machine's fastest product; unchanged where there is no other.

    Only a weight on a single CPU device has one: the kernels are not partitioned over a mesh.
    """
    if not isinstance(weight, Int8Weight) or isinstance(weight.values_OI, Tracer):
        return weight
    devices = weight.values_OI.devices()
    if len(devices) > 1 or next(iter(devices)).platform != "cpu" or not native.available():
        return weight
    return pack_int8(weight)


@jax.jit
def pack_int8(weight: Int8Weight) -> PackedInt8Weight:
    """`pack` without asking whether the kernels are there."""
    O, I = weight.shape
    values_OI = jnp.pad(weight.values_OI, ((0, -O % PANEL), (0, -I % 4)))
    panels_PcQi = values_OI.reshape(values_OI.shape[0] // PANEL, PANEL, -1, 4)
    groups_PcGi = jnp.pad(values_OI, ((0, 0), (0, -values_OI.shape[1] % GROUP))).reshape(
        -1, PANEL, -(-I // GROUP), GROUP
    )
    sums_PcG = jnp.sum(groups_PcGi, axis=-1, dtype=jnp.int16)
    return PackedInt8Weight(
        panels_PcQi.transpose(0, 2, 1, 3),
        jnp.pad(weight.scale_O, (0, -O % PANEL)),
        sums_PcG.transpose(0, 2, 1),
        (O, I),
        weight.rotated,
    )


def quantize_rows(x_TI: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Symmetric int8 with one scale a row: (values_TI int8, scale_T float32 > 0), x ~ values * scale."""
    x_TI = x_TI.astype(jnp.float32)
    peak_T = jnp.max(jnp.abs(x_TI), axis=-1)
    # A row of zeros gets scale 1; a denormal peak would overflow the division below.
    scale_T = jnp.where(peak_T > 1e-30, peak_T / INT8_MAX, 1.0)
    values_TI = jnp.round(x_TI / scale_T[..., None])
    return jnp.clip(values_TI, -INT8_MAX, INT8_MAX).astype(jnp.int8), scale_T
