"""What products by native kernels share; see `ops/native/int8_handlers.cc`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from ops.norm import RmsNorm

# The numbers of `Activation` in int8.h, by the names of ops.activation.
ACTIVATIONS = {"silu": 1, "swish": 1, "gelu_new": 2, "gelu_pytorch_tanh": 2, "relu": 3}


def f32(array: jax.Array | None) -> jax.Array:
    """An operand in float32; an absent one is an empty array."""
    return jnp.zeros((0,), jnp.float32) if array is None else array.astype(jnp.float32)


def eps(norm: RmsNorm | None) -> np.float32:
    """The norm's attribute of a call; 0 without one."""
    return np.float32(0.0 if norm is None else norm.eps)
