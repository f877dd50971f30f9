"""Normalization over the last axis, computed in float32 whatever the input's dtype is."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


def rms_norm(x: jax.Array, scale: jax.Array | None, eps: float, *, unit_offset: bool = False) -> jax.Array:
    """Root mean square norm: `x / sqrt(mean(x^2) + eps) * scale` (Zhang & Sennrich 2019, arXiv:1910.07467).

    Args:
        x: [..., D], any float dtype.
        scale: [D], or None for none.
        eps: added to the mean square.
        unit_offset: multiply by `1 + scale`, as Gemma stores its scales.
    Returns:
        [..., D] in x's dtype. Mean, division and scale are float32; only the result is rounded.
    """
    x32 = x.astype(jnp.float32)
    y = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    if scale is not None:
        scale32 = scale.astype(jnp.float32)
        y = y * (1.0 + scale32 if unit_offset else scale32)
    return y.astype(x.dtype)


def layer_norm(x: jax.Array, scale: jax.Array | None, bias: jax.Array | None, eps: float) -> jax.Array:
    """Layer norm: `(x - mean) / sqrt(var + eps) * scale + bias` (Ba et al. 2016, arXiv:1607.06450).

    Args:
        x: [..., D], any float dtype.
        scale, bias: [D], or None for none.
        eps: added to the (biased) variance.
    Returns:
        [..., D] in x's dtype; computed in float32.
    """
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    y = centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + eps)
    if scale is not None:
        y = y * scale.astype(jnp.float32)
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    return y.astype(x.dtype)


class RmsNorm(NamedTuple):
    """A `rms_norm` of its input that a product may take along.

    Attributes:
        scale_I: float32.
        eps: added to the mean square; static.
    """

    scale_I: jax.Array
    eps: float

    def __call__(self, x_TI: jax.Array) -> jax.Array:
        """The normed x, in x's dtype."""
        return rms_norm(x_TI, self.scale_I, self.eps)
