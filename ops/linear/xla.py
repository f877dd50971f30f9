"""`linear` in plain XLA: what every platform can run."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from ops.linear.weights import Int8Weight, quantize_rows, rotate

_CONTRACT_LAST = (((1,), (1,)), ((), ()))


def dense(x_TI: jax.Array, weight_OI: jax.Array) -> jax.Array:
    """y_TO float32; x is rounded to the weight's dtype first."""

    def cpu(x_TI: jax.Array, weight_OI: jax.Array) -> jax.Array:
        rows = x_TI.shape[0]
        # The barrier keeps a later cast or slice from being folded into the dot, which then leaves the fast library
        # path (10x). One row does too for bf16.
        return lax.optimization_barrier(_dot(_two_rows(x_TI), weight_OI))[:rows]

    return lax.platform_dependent(x_TI.astype(weight_OI.dtype), weight_OI, cpu=cpu, default=_dot)


def int8(x_TI: jax.Array, weight: Int8Weight) -> jax.Array:
    """y_TO float32. On CPU each row of x is rounded to int8 on its own scale; elsewhere only the weight is rounded."""

    def cpu(x_TI: jax.Array, values_OI: jax.Array, scale_O: jax.Array) -> jax.Array:
        rows = x_TI.shape[0]
        rounded_TI, scale_T = quantize_rows(_two_rows(x_TI))
        acc_TO = lax.dot_general(rounded_TI, values_OI, _CONTRACT_LAST, preferred_element_type=jnp.int32)
        acc_TO = lax.optimization_barrier(acc_TO)
        return (acc_TO.astype(jnp.float32) * scale_T[:, None] * scale_O)[:rows]

    def default(x_TI: jax.Array, values_OI: jax.Array, scale_O: jax.Array) -> jax.Array:
        return _dot(x_TI, values_OI.astype(x_TI.dtype)) * scale_O

    if weight.rotated:
        x_TI = rotate(x_TI)
    return lax.platform_dependent(x_TI, weight.values_OI, weight.scale_O, cpu=cpu, default=default)


def _dot(x_TI: jax.Array, weight_OI: jax.Array) -> jax.Array:
    # float32 weights are asked for by someone who wants float32 results: no TF32, no bf16 passes.
    precision = lax.Precision.HIGHEST if weight_OI.dtype == jnp.float32 else None
    return lax.dot_general(x_TI, weight_OI, _CONTRACT_LAST, precision=precision, preferred_element_type=jnp.float32)


def _two_rows(x_TI: jax.Array) -> jax.Array:
    """One row alone is 10-30x slower than two in bf16 and int8 on XLA:CPU."""
    return jnp.pad(x_TI, ((0, 1), (0, 0))) if x_TI.shape[0] == 1 else x_TI
