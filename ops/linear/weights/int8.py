"""int8 with one scale an output channel: row-major for plain XLA, and packed for the native CPU kernels."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.sharding import PartitionSpec

from ops import native
from ops.linear.weights import xla
from ops.linear.weights.base import Around, Experts, StoredWeight, single_cpu
from ops.linear.weights.dense import one_expert, ragged_dot
from ops.linear.weights.native import ACTIVATIONS, AFTER, centred, eps, f32, gain, shift
from ops.linear.weights.rotation import BLOCK, rotate
from ops.lora import Adapters, LoraStack

INT8_MAX = 127.0
PANEL = 16  # output channels a panel of a packed weight, as in ops/native/int8.h
GROUP = 64  # inputs that share an activation scale in the native kernels


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values_OI", "scale_O"], meta_fields=["rotated"])
@dataclasses.dataclass(frozen=True)
class Int8Weight(StoredWeight):
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
    def shape(self) -> tuple[int, ...]:
        return self.values_OI.shape

    @property
    def dtype(self) -> jnp.dtype:
        """int8: how the weight is stored."""
        return self.values_OI.dtype

    def product(self, x_TI: jax.Array) -> jax.Array:
        """On CPU each row of x is rounded to int8 on its own scale; elsewhere only the weight is rounded."""
        x_TI = rotate(x_TI) if self.rotated else x_TI
        return lax.platform_dependent(x_TI, self.values_OI, self.scale_O, cpu=_product_on_cpu, default=_product)

    def rows(self, ids_T: jax.Array) -> jax.Array:
        rows_TI = jnp.take(self.values_OI, ids_T, axis=0, mode="fill", fill_value=0)
        return _scaled_rows(rows_TI, self.scale_O, ids_T, self.rotated)

    def dequantize(self, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
        dense_OI = self.values_OI.astype(jnp.float32) * self.scale_O[..., None]
        return (rotate(dense_OI) if self.rotated else dense_OI).astype(dtype)

    def grouped(self, x_MI: jax.Array, sizes_E: jax.Array, expert_M: jax.Array) -> jax.Array:
        x_MI = rotate(x_MI) if self.rotated else x_MI
        y_MO = ragged_dot(x_MI, self.values_OI.astype(x_MI.dtype), sizes_E)
        return y_MO * self.scale_O[jnp.minimum(expert_M, self.shape[0] - 1)]

    def of_expert(self, expert: jax.Array, x_RI: jax.Array) -> jax.Array:
        rounded_RI, scale_R = quantize_rows(rotate(x_RI) if self.rotated else x_RI)
        y_RO = one_expert(self.values_OI, expert, rounded_RI, jnp.int32).astype(jnp.float32)
        return y_RO * scale_R[:, None] * self.scale_O[expert]

    def specs(self, whole: PartitionSpec) -> Any:
        return dataclasses.replace(self, values_OI=whole, scale_O=PartitionSpec(*whole[: len(self.shape) - 1]))

    def packed(self) -> StoredWeight:
        return pack_int8(self) if single_cpu(self.values_OI) and native.available() else self

    def packed_experts(self) -> StoredWeight:
        return self.flat().packed() if single_cpu(self.values_OI) and native.available() else self

    def flat(self) -> Int8Weight:
        """Experts [E, O, I] as one matrix [E * O, I]."""
        return Int8Weight(self.values_OI.reshape(-1, self.shape[-1]), self.scale_O.reshape(-1), self.rotated)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["panels_PQci", "scale_O", "sums_PGc"],
    meta_fields=["shape", "rotated"],
)
@dataclasses.dataclass(frozen=True)
class PackedInt8Weight(StoredWeight):
    """An `Int8Weight` in the layout of the native CPU kernels; see `ops/native/int8.h`.

    One native call does the norm, the rounding, the product and what follows it. Activations are rotated and rounded with one
    scale for every 64 inputs of a row: finer than `Int8Weight`'s one a row.

    Attributes:
        panels_PQci: int8 [ceil(O / 16), ceil(I / 4), 16, 4]: channels in panels of 16, inputs in fours, zero padded.
        scale_O: float32, padded with zeros to whole panels.
        sums_PGc: int16 [ceil(O / 16), ceil(I / 64), 16]: each channel's sum over 64 inputs, for kernels that take
            activations as value + 128.
        shape: (O, I), as of the dense weight; of a stack of experts (E O, I).
        rotated: as of `Int8Weight`.
    """

    panels_PQci: jax.Array
    scale_O: jax.Array
    sums_PGc: jax.Array
    shape: tuple[int, int]
    rotated: bool = False
    centres = True

    @property
    def dtype(self) -> jnp.dtype:
        """int8: how the weight is stored."""
        return self.panels_PQci.dtype

    def product(self, x_TI: jax.Array) -> jax.Array:
        return self.linear(x_TI, Around(), jnp.float32)

    def linear(self, x_TI: jax.Array, around: Around, dtype: jax.typing.DTypeLike) -> jax.Array:
        out = jax.ShapeDtypeStruct((x_TI.shape[0], self.shape[0]), jnp.float32)
        norm, rest = around.norm, (*self.operands(around.bias_O), f32(around.residual_TO))
        attributes = {"eps": eps(norm), "rotated": np.int64(self.rotated)}
        if (own := around.adapters) is None:
            after = np.int64(0 if around.activation is None else AFTER[around.activation])
            call = jax.ffi.ffi_call(native.target("jaxserve_int8_linear"), out)
            y_TO = call(
                f32(x_TI), gain(norm), shift(norm), *rest, **attributes, centred=centred(norm), activation=after
            )
        else:
            call = jax.ffi.ffi_call(native.target("jaxserve_int8_linear_lora"), out)
            y_TO = call(
                f32(x_TI), gain(norm), *rest, own.slot_T, *own.stack.matrices, **attributes, ends=own.stack.ends
            )
        return y_TO.astype(dtype)

    def takes(self, stack: LoraStack) -> bool:
        return stack.on_native()

    def activates(self, activation: str) -> bool:
        return activation in AFTER

    def mlp(
        self, x_TD: jax.Array, down: StoredWeight, activation: str, around: Around, down_bias_D: jax.Array | None
    ) -> jax.Array | None:
        if not isinstance(down, PackedInt8Weight) or activation not in AFTER or self.shape[0] % PANEL:
            return None
        out, norm = jax.ShapeDtypeStruct((x_TD.shape[0], down.shape[0]), jnp.float32), around.norm
        return jax.ffi.ffi_call(native.target("jaxserve_int8_mlp"), out)(
            f32(x_TD),
            gain(norm),
            shift(norm),
            *self.operands(around.bias_O),
            *down.operands(down_bias_D),
            f32(around.residual_TO),
            eps=eps(norm),
            centred=centred(norm),
            activation=np.int64(AFTER[activation]),
            up_rotated=np.int64(self.rotated),
            down_rotated=np.int64(down.rotated),
        )

    def gated_mlp(
        self,
        x_TD: jax.Array,
        down: StoredWeight,
        activation: str,
        around: Around,
        down_bias_D: jax.Array | None,
        down_adapters: Adapters | None = None,
    ) -> jax.Array | None:
        # Gate and up must be whole panels each; the hidden values never leave the cache.
        if not isinstance(down, PackedInt8Weight) or activation not in ACTIVATIONS or self.shape[0] % (2 * PANEL):
            return None
        out = jax.ShapeDtypeStruct((x_TD.shape[0], down.shape[0]), jnp.float32)
        operands = (
            f32(x_TD),
            gain(around.norm),
            *self.operands(around.bias_O),
            *down.operands(down_bias_D),
            f32(around.residual_TO),
        )
        attributes = {
            "activation": np.int64(ACTIVATIONS[activation]),
            "eps": eps(around.norm),
            "up_rotated": np.int64(self.rotated),
            "down_rotated": np.int64(down.rotated),
        }
        if around.adapters is None and down_adapters is None:
            return jax.ffi.ffi_call(native.target("jaxserve_int8_gated_mlp"), out)(*operands, **attributes)
        if around.adapters is None or down_adapters is None:
            return None
        slot_T, up, last = around.adapters.slot_T, around.adapters.stack, down_adapters.stack
        if not (up.on_native() and last.on_native()):
            return None
        call = jax.ffi.ffi_call(native.target("jaxserve_int8_gated_mlp_lora"), out)
        given = (*operands, slot_T, *up.matrices, *last.matrices)
        return call(*given, **attributes, up_ends=up.ends, down_ends=last.ends)

    def experts(self, down: StoredWeight, given: Experts) -> jax.Array | None:
        if not isinstance(down, PackedInt8Weight):
            return None
        x_TD = given.x_TD
        out = jax.ShapeDtypeStruct(x_TD.shape, jnp.float32)
        y_TD = jax.ffi.ffi_call(native.target("jaxserve_int8_experts"), out)(
            x_TD.astype(jnp.float32),
            given.ids_Tk.astype(jnp.int32),
            given.weights_Tk.astype(jnp.float32),
            *self.operands(given.gate_up_bias_EJ),
            *down.operands(given.down_bias_ED),
            num_experts=np.int64(down.shape[0] // x_TD.shape[1]),
            activation=np.int64(ACTIVATIONS[given.gated]),
            up_rotated=np.int64(self.rotated),
            down_rotated=np.int64(down.rotated),
        )
        return y_TD.astype(x_TD.dtype)

    def rows(self, ids_T: jax.Array) -> jax.Array:
        # Read in place: a second copy of the table would be as large as all it saves.
        rows_TQi = self.panels_PQci.at[ids_T // PANEL, :, ids_T % PANEL].get(mode="fill", fill_value=0)
        rows_TI = rows_TQi.reshape(*ids_T.shape, -1)[..., : self.shape[1]]
        return _scaled_rows(rows_TI, self.scale_O, ids_T, self.rotated)

    def unpack(self) -> Int8Weight:
        """The same weight, a row a channel."""
        O, I = self.shape
        values_OI = self.panels_PQci.transpose(0, 2, 1, 3).reshape(self.scale_O.shape[0], -1)
        return Int8Weight(values_OI[:O, :I], self.scale_O[:O], self.rotated)

    def dequantize(self, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
        return self.unpack().dequantize(dtype)

    def operands(self, bias: jax.Array | None) -> tuple[jax.Array, ...]:
        """What a native call takes of it and of what is added to its product."""
        return self.panels_PQci, self.scale_O, self.sums_PGc, f32(None if bias is None else bias.reshape(-1))


def quantize_int8(weight_OI: jax.Array) -> Int8Weight:
    """Symmetric int8 with one scale an output channel, rotated where every device's part of I is whole blocks."""
    return _quantized(weight_OI, _inputs_a_device(weight_OI) % BLOCK == 0)


def _inputs_a_device(weight_OI: jax.Array) -> int:
    if isinstance(weight_OI, Tracer):
        return weight_OI.shape[-1]
    return weight_OI.sharding.shard_shape(weight_OI.shape)[-1]


@functools.partial(jax.jit, static_argnums=1)
def _quantized(weight_OI: jax.Array, rotated: bool) -> Int8Weight:
    weight_OI = weight_OI.astype(jnp.float32)
    values_OI, scale_O = quantize_rows(rotate(weight_OI) if rotated else weight_OI)
    return Int8Weight(values_OI, scale_O, rotated)


@jax.jit
def pack_int8(weight: Int8Weight) -> PackedInt8Weight:
    """`packed` without asking whether the kernels are there."""
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


def _product_on_cpu(x_TI: jax.Array, values_OI: jax.Array, scale_O: jax.Array) -> jax.Array:
    rounded_TI, scale_T = quantize_rows(xla.two_rows(x_TI))
    acc_TO = lax.dot_general(rounded_TI, values_OI, xla.CONTRACT_LAST, preferred_element_type=jnp.int32)
    acc_TO = lax.optimization_barrier(acc_TO)
    return (acc_TO.astype(jnp.float32) * scale_T[:, None] * scale_O)[: x_TI.shape[0]]


def _product(x_TI: jax.Array, values_OI: jax.Array, scale_O: jax.Array) -> jax.Array:
    return xla.dot(x_TI, values_OI.astype(x_TI.dtype)) * scale_O


def _scaled_rows(rows_TI: jax.Array, scale_O: jax.Array, ids_T: jax.Array, rotated: bool) -> jax.Array:
    scale_T = jnp.take(scale_O, ids_T, axis=0, mode="fill", fill_value=0)
    x_TI = rows_TI.astype(jnp.float32) * scale_T[..., None]
    return rotate(x_TI) if rotated else x_TI
