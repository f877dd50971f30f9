"""Rotated weights: each 64 neighbouring inputs are multiplied by a Hadamard matrix before they are rounded, and so are the
activations before they are rounded in turn (Ashkboos et al. 2024, "QuaRot", arXiv:2404.00456, with small blocks and at run
time). The product stays what it was, but an outlier is spread over its 64 neighbours instead of costing them their precision:
the divergence of SmolLM2-135M's predictions from float32's falls to a third.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

BLOCK = 64
"""Inputs that are rotated together; the native int8 kernels rotate what shares a scale."""


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
