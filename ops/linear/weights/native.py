"""What products by native kernels share; see `ops/native/int8_handlers.cc`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from ops.norm import CentredNorm, TakenNorm

# The numbers of `Activation` in int8.h, by the names of ops.activation.
ACTIVATIONS = {"silu": 1, "swish": 1, "gelu_new": 2, "gelu_pytorch_tanh": 2, "relu": 3}

# Of int8 products without gates.
AFTER = {
    **ACTIVATIONS,
    "gelu": 4,
    "gelu_python": 4,
    "gelu_fast": 2,
    "gelu_accurate": 2,
    "gelu_python_tanh": 2,
    "quick_gelu": 5,
}


def f32(array: jax.Array | None) -> jax.Array:
    """An operand in float32; an absent one is an empty array."""
    return jnp.zeros((0,), jnp.float32) if array is None else array.astype(jnp.float32)


def eps(norm: TakenNorm | None) -> np.float32:
    """The norm's attribute of a call; 0 without one."""
    return np.float32(0.0 if norm is None else norm.eps)


def gain(norm: TakenNorm | None) -> jax.Array:
    """The norm's scale as a call takes it."""
    return f32(None if norm is None else norm.scale_I)


def shift(norm: TakenNorm | None) -> jax.Array:
    """The bias of a norm that takes the mean off."""
    return f32(norm.bias_I if isinstance(norm, CentredNorm) else None)


def centred(norm: TakenNorm | None) -> np.int64:
    """Whether the mean is taken off."""
    return np.int64(isinstance(norm, CentredNorm))
