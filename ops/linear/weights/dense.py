"""A dense array as a weight: the type that parameters hold unless a scheme made another."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from ops import native
from ops.linear.weights import xla
from ops.linear.weights.base import StoredWeight

_ROWS_BY_EXPERT = lax.RaggedDotDimensionNumbers((([1], [2]), ([], [])), [0], [0])
_NATIVE_DOTS = {
    jnp.dtype(jnp.float32): "jaxserve_grouped_dot_f32",
    jnp.dtype(jnp.bfloat16): "jaxserve_grouped_dot_bf16",
}


@dataclasses.dataclass(frozen=True)
class DenseWeight(StoredWeight):
    """A float array [O, I] or [E, O, I]; only ever made around one for the length of a call."""

    array: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> jnp.dtype:
        return self.array.dtype

    def product(self, x_TI: jax.Array) -> jax.Array:
        return xla.dense(x_TI, self.array)

    def rows(self, ids_T: jax.Array) -> jax.Array:
        return jnp.take(self.array, ids_T, axis=0, mode="fill", fill_value=0)

    def dequantize(self, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
        return self.array.astype(dtype)

    def grouped(self, x_MI: jax.Array, sizes_E: jax.Array, expert_M: jax.Array) -> jax.Array:
        return ragged_dot(x_MI.astype(self.dtype), self.array, sizes_E)

    def has_grouped_kernel(self) -> bool:
        return self.dtype in _NATIVE_DOTS and jax.default_backend() == "cpu" and native.available()

    def grouped_on_cpu(self, x_MI: jax.Array, sizes_E: jax.Array) -> jax.Array:
        out = jax.ShapeDtypeStruct((x_MI.shape[0], self.shape[1]), jnp.float32)
        call = jax.ffi.ffi_call(native.target(_NATIVE_DOTS[jnp.dtype(self.dtype)]), out)
        return call(x_MI.astype(jnp.float32), sizes_E, self.array)

    def of_expert(self, expert: jax.Array, x_RI: jax.Array) -> jax.Array:
        return one_expert(self.array, expert, x_RI.astype(self.dtype), jnp.float32)

    def specs(self, whole: PartitionSpec) -> Any:
        return whole


def ragged_dot(x_MI: jax.Array, weight_EOI: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """y_MO float32 of rows sorted by expert."""
    return lax.ragged_dot_general(x_MI, weight_EOI, sizes_E, _ROWS_BY_EXPERT, preferred_element_type=jnp.float32)


def one_expert(weight_EOI: jax.Array, expert: jax.Array, x_RI: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """y_RO of rows through one expert's matrix."""
    return lax.dot_general(
        lax.dynamic_index_in_dim(weight_EOI, expert, 0, keepdims=False),
        x_RI,
        (((1,), (1,)), ((), ())),
        preferred_element_type=dtype,
    ).T
