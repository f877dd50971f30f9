"""A weight while it is trained: products that differentiate, whatever the weight under them is stored as, and beside them the
low-rank change that is learned (Hu et al. 2021, arXiv:2106.09685).

A dense weight differentiates by itself. A quantized one is computed forward as it is served, roundings of activations included,
and passes gradients back as the dense weight that it stands for would (Dettmers et al. 2023, "QLoRA", arXiv:2305.14314); it gets
none itself. Native kernels for experts pass gradients the same way.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from ops.linear.weights import xla
from ops.linear.weights.base import StoredWeight
from ops.linear.weights.dense import DenseWeight, ragged_dot

_PER_EXPERT = lax.RaggedDotDimensionNumbers((([0], [0]), ([], [])), [0], [])


@functools.partial(jax.tree_util.register_dataclass, data_fields=["a_RI", "b_RO", "key"], meta_fields=["dropout"])
@dataclasses.dataclass(frozen=True)
class Change:
    """y += drop(x) A^T B^T.

    Attributes:
        a_RI, b_RO: A, and B turned, which has the scale in it. Turned so that its gradient needs no transposed copy of dy.
        key: a random key, where there is dropout.
        dropout: static: the share of x's numbers that A does not see.
    """

    a_RI: jax.Array
    b_RO: jax.Array
    key: jax.Array | None = None
    dropout: float = 0.0

    def __call__(self, x_TI: jax.Array) -> jax.Array:
        """What is added to the product, float32."""
        if self.dropout and self.key is not None:
            kept = jax.random.bernoulli(self.key, 1.0 - self.dropout, x_TI.shape)
            x_TI = jnp.where(kept, x_TI / (1.0 - self.dropout), 0.0)
        hidden_TR = xla.dense(x_TI, self.a_RI)
        return lax.optimization_barrier(
            jnp.dot(
                hidden_TR.astype(self.b_RO.dtype),
                self.b_RO,
                preferred_element_type=jnp.float32,
                precision=xla.exact(self.b_RO),
            )
        )


@functools.partial(jax.tree_util.register_dataclass, data_fields=["base", "change"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class TrainedWeight(StoredWeight):
    """A weight [O, I] or a stack of experts [E, O, I] in a training step.

    Attributes:
        base: a dense array, trained or frozen, or a quantized weight, which is frozen.
        change: what is learned beside it; None where nothing is. Not for stacks.
    """

    base: Any
    change: Change | None = None

    @property
    def shape(self) -> Any:
        return self.base.shape

    @property
    def dtype(self) -> Any:
        return self.base.dtype

    @property
    def _dense(self) -> bool:
        return not isinstance(self.base, StoredWeight)

    def product(self, x_TI: jax.Array) -> jax.Array:
        if self._dense and self.base.dtype != jnp.float32 and self.change is not None and not self.change.dropout:
            return _half_changed(x_TI, self.base, self.change.a_RI, self.change.b_RO)
        y_TO = _dense(x_TI, self.base) if self._dense else _frozen(x_TI, self.base)
        return y_TO if self.change is None else y_TO + self.change(x_TI)

    def rows(self, ids_T: jax.Array) -> jax.Array:
        if self._dense:
            return DenseWeight(self.base).rows(ids_T)
        return lax.stop_gradient(self.base.rows(ids_T))

    def dequantize(self, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
        dense_OI = self.base.astype(jnp.float32) if self._dense else self.base.dequantize()
        if self.change is not None:
            dense_OI = dense_OI + xla.dot(self.change.b_RO.T, self.change.a_RI.T)
        return dense_OI.astype(dtype)

    def grouped(self, x_MI: jax.Array, sizes_E: jax.Array, expert_M: jax.Array) -> jax.Array:
        dense_EOI = self._experts(sizes_E, x_MI.dtype)
        return ragged_dot(x_MI.astype(dense_EOI.dtype), dense_EOI, sizes_E)

    def has_grouped_kernel(self) -> bool:
        return jax.default_backend() == "cpu"

    def grouped_on_cpu(self, x_MI: jax.Array, sizes_E: jax.Array) -> jax.Array:
        return _grouped(x_MI.astype(jnp.float32), self._experts(sizes_E, jnp.float32), sizes_E)

    def _experts(self, sizes_E: jax.Array, dtype: Any) -> jax.Array:
        """[E, O, I]; a packed stack is one matrix [E O, I]."""
        if self._dense:
            return self.base
        dense = lax.stop_gradient(self.base.dequantize(dtype))
        return dense.reshape(sizes_E.shape[0], -1, dense.shape[-1])

    def specs(self, whole: PartitionSpec) -> Any:
        return dataclasses.replace(self, base=whole if self._dense else self.base.specs(whole))


def _dense(x_TI: jax.Array, weight_OI: jax.Array) -> jax.Array:
    """y_TO float32. In half precision the products of the backward pass are of that precision too, added up in float32: left to
    itself one factor would be float32, which no unit multiplies fast."""
    return xla.dense(x_TI, weight_OI) if weight_OI.dtype == jnp.float32 else _half(x_TI, weight_OI)


@jax.custom_vjp
def _half(x_TI: jax.Array, weight_OI: jax.Array) -> jax.Array:
    return xla.dense(x_TI, weight_OI)


def _half_forward(x_TI: jax.Array, weight_OI: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    rounded_TI = x_TI.astype(weight_OI.dtype)
    return xla.dense(rounded_TI, weight_OI), (rounded_TI, weight_OI, x_TI[:0])


def _half_backward(kept: tuple[jax.Array, jax.Array, jax.Array], dy_TO: jax.Array) -> tuple[jax.Array, jax.Array]:
    x_TI, weight_OI, none_TI = kept
    # The barriers keep the casts out of the products, which leave XLA's fast path on CPUs otherwise.
    dy_TO = lax.optimization_barrier(dy_TO.astype(weight_OI.dtype))
    options = {"preferred_element_type": jnp.float32}
    dx_TI = lax.optimization_barrier(lax.dot_general(dy_TO, weight_OI, (((1,), (0,)), ((), ())), **options))
    dw_OI = lax.optimization_barrier(lax.dot_general(dy_TO, x_TI, (((0,), (0,)), ((), ())), **options))
    return dx_TI.astype(none_TI.dtype), dw_OI.astype(weight_OI.dtype)


_half.defvjp(_half_forward, _half_backward)


@jax.custom_vjp
def _half_changed(x_TI: jax.Array, weight_OI: jax.Array, a_RI: jax.Array, b_RO: jax.Array) -> jax.Array:
    """y_TO float32 of a frozen weight in half precision and of the pairs beside it, whose factors are rounded alike: what a layer
    keeps for its backward pass, and what goes through that, is there once and in half precision. Gradients of pairs are added up
    in float32."""
    return _half_changed_forward(x_TI, weight_OI, a_RI, b_RO)[0]


def _half_changed_forward(
    x_TI: jax.Array, weight_OI: jax.Array, a_RI: jax.Array, b_RO: jax.Array
) -> tuple[jax.Array, Any]:
    dtype = weight_OI.dtype
    x_half = x_TI.astype(dtype)
    hidden_TR = xla.dense(x_half, a_RI.astype(dtype)).astype(dtype)
    y_TO = xla.dense(x_half, weight_OI) + _half_dot(hidden_TR, b_RO.astype(dtype), 1, 0)
    return y_TO, (x_half, hidden_TR, weight_OI, a_RI, b_RO, x_TI[:0])


def _half_changed_backward(kept: Any, dy_TO: jax.Array) -> tuple[jax.Array, None, jax.Array, jax.Array]:
    x_half, hidden_TR, weight_OI, a_RI, b_RO, none_TI = kept
    dtype = weight_OI.dtype
    dy_half = lax.optimization_barrier(dy_TO.astype(dtype))
    dhidden_TR = _half_dot(dy_half, b_RO.astype(dtype), 1, 1).astype(dtype)
    dx_TI = _half_dot(dy_half, weight_OI, 1, 0) + _half_dot(dhidden_TR, a_RI.astype(dtype), 1, 0)
    da_RI, db_RO = _half_dot(dhidden_TR, x_half, 0, 0), _half_dot(hidden_TR, dy_half, 0, 0)
    return dx_TI.astype(none_TI.dtype), None, da_RI.astype(a_RI.dtype), db_RO.astype(b_RO.dtype)


def _half_dot(one: jax.Array, other: jax.Array, first: int, second: int) -> jax.Array:
    """Both summed over these axes, in float32."""
    found = lax.dot_general(one, other, (((first,), (second,)), ((), ())), preferred_element_type=jnp.float32)
    return lax.optimization_barrier(found)


_half_changed.defvjp(_half_changed_forward, _half_changed_backward)


@jax.custom_vjp
def _frozen(x_TI: jax.Array, weight: StoredWeight) -> jax.Array:
    return weight.product(x_TI)


def _frozen_forward(x_TI: jax.Array, weight: StoredWeight) -> tuple[jax.Array, tuple[jax.Array, StoredWeight]]:
    return weight.product(x_TI), (x_TI[:0], weight)  # of x only its dtype


def _frozen_backward(kept: tuple[jax.Array, StoredWeight], dy_TO: jax.Array) -> tuple[jax.Array, None]:
    none_TI, weight = kept
    dtype = none_TI.dtype
    return xla.dense(dy_TO.astype(dtype), weight.dequantize(dtype).T).astype(dtype), None


_frozen.defvjp(_frozen_forward, _frozen_backward)


@jax.custom_vjp
def _grouped(x_MI: jax.Array, weight_EOI: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Rows sorted by expert through their experts' matrices, on CPU: y_MO float32, zeros behind the last group."""
    weight = DenseWeight(weight_EOI)
    if weight.has_grouped_kernel():
        return weight.grouped_on_cpu(x_MI, sizes_E)
    y_MO = ragged_dot(x_MI, weight_EOI, sizes_E)
    return jnp.where((jnp.arange(len(x_MI)) < sizes_E.sum())[:, None], y_MO, 0.0)


def _grouped_forward(x_MI: jax.Array, weight_EOI: jax.Array, sizes_E: jax.Array) -> tuple[jax.Array, Any]:
    return _grouped(x_MI, weight_EOI, sizes_E), (x_MI, weight_EOI, sizes_E)


def _grouped_backward(kept: Any, dy_MO: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    x_MI, weight_EOI, sizes_E = kept
    dx_MI = _grouped(dy_MO, weight_EOI.swapaxes(1, 2), sizes_E)
    # Rows of nobody are in no group. Where the weight is frozen this is not used, and not computed.
    dw_EOI = lax.ragged_dot_general(dy_MO, x_MI, sizes_E, _PER_EXPERT, preferred_element_type=jnp.float32)
    return dx_MI.astype(x_MI.dtype), dw_EOI.astype(weight_EOI.dtype), None


_grouped.defvjp(_grouped_forward, _grouped_backward)
