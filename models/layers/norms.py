"""Norms of hidden states, and of each head's q and k."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.layers.build import weight
from models.recipes import Recipes, one
from ops.linear import CentredNorm, RmsNorm, TakenNorm
from ops.norm import layer_norm, rms_norm


class RMSNorm(nnx.Module):
    """Root-mean-square norm with a float32 scale.

    Args:
        offset: the checkpoint stores the scale less one.
    """

    def __init__(self, width: int, eps: float, offset: bool = False):
        self.eps, self.offset = eps, offset
        self.scale = weight((width,), jnp.float32, (None,))

    def __call__(self, x_TD: jax.Array) -> jax.Array:
        return rms_norm(x_TD, self.scale[...], self.eps)

    def recipes(self, name: str) -> Recipes:
        add = (lambda stored: stored.astype(np.float32) + 1.0) if self.offset else None
        return {"scale": one(f"{name}.weight", *self.scale.shape, assemble=add, inverse=lambda scale: scale - 1.0)}


class LayerNorm(nnx.Module):
    """Mean-and-variance norm with float32 scale and, unless told otherwise, bias."""

    def __init__(self, width: int, eps: float, bias: bool = True):
        self.eps = eps
        self.scale = weight((width,), jnp.float32, (None,))
        self.bias = weight((width,), jnp.float32, (None,)) if bias else None

    def __call__(self, x_TD: jax.Array) -> jax.Array:
        return layer_norm(x_TD, self.scale[...], None if self.bias is None else self.bias[...], self.eps)

    def recipes(self, name: str) -> Recipes:
        recipes = {"scale": one(f"{name}.weight", *self.scale.shape)}
        return recipes if self.bias is None else recipes | {"bias": one(f"{name}.bias", *self.scale.shape)}


Norm = RMSNorm | LayerNorm


def taken(norm: Norm | None) -> TakenNorm | None:
    """A norm as a product takes it along."""
    if norm is None:
        return None
    if isinstance(norm, RMSNorm):
        return RmsNorm(norm.scale[...], norm.eps)
    return CentredNorm(norm.scale[...], None if norm.bias is None else norm.bias[...], norm.eps)
