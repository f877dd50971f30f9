"""Products in plain XLA; every backend has them.

On CPU the dot takes XLA's fast library path only in certain shapes (docs/benchmarks/notes_matmul.md), which the code here
keeps to.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

CONTRACT_LAST = (((1,), (1,)), ((), ()))


def dense(x_TI: jax.Array, weight_OI: jax.Array) -> jax.Array:
    """y_TO float32; x is rounded to the weight's dtype first."""

    def cpu(x_TI: jax.Array, weight_OI: jax.Array) -> jax.Array:
        rows = x_TI.shape[0]
        # The barrier keeps a later cast or slice from being folded into the dot, which then leaves the fast library
        # path (10x). One row does too for bf16.
        return lax.optimization_barrier(dot(two_rows(x_TI), weight_OI))[:rows]

    return lax.platform_dependent(x_TI.astype(weight_OI.dtype), weight_OI, cpu=cpu, default=dot)


def dot(x_TI: jax.Array, weight_OI: jax.Array) -> jax.Array:
    """y_TO float32, left to the compiler."""
    return lax.dot_general(
        x_TI, weight_OI, CONTRACT_LAST, precision=exact(weight_OI), preferred_element_type=jnp.float32
    )


def exact(weight: jax.Array) -> lax.Precision | None:
    """float32 weights are asked for by someone who wants float32 results: no TF32, no bf16 passes."""
    return lax.Precision.HIGHEST if weight.dtype == jnp.float32 else None


def two_rows(x_TI: jax.Array) -> jax.Array:
    """One row alone is 10-30x slower than two in bf16 and int8 on XLA:CPU."""
    return jnp.pad(x_TI, ((0, 1), (0, 0))) if x_TI.shape[0] == 1 else x_TI
