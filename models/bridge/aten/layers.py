"""Products and norms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from models.bridge.aten.table import OPS, op


@op("addmm")
def _addmm(bias: jax.Array, a: jax.Array, b: jax.Array, beta: float = 1, alpha: float = 1) -> jax.Array:
    return beta * bias + alpha * (a @ b)


@op("baddbmm")
def _baddbmm(bias: jax.Array, a: jax.Array, b: jax.Array, beta: float = 1, alpha: float = 1) -> jax.Array:
    product = alpha * (a @ b)
    return product if beta == 0 else beta * bias + product


@op("native_layer_norm")
def _layer_norm(x: jax.Array, shape: Sequence[int], weight: Any, bias: Any, eps: float) -> tuple[jax.Array, ...]:
    axes, wide = tuple(range(-len(shape), 0)), x.astype(jnp.float32)
    mean, var = jnp.mean(wide, axes, keepdims=True), jnp.var(wide, axes, keepdims=True)
    y = (wide - mean) * jax.lax.rsqrt(var + eps)
    y = y if weight is None else y * weight
    return (y if bias is None else y + bias).astype(x.dtype), mean, jax.lax.rsqrt(var + eps)


@op("_fused_rms_norm")
def _rms_norm(x: jax.Array, shape: Sequence[int], weight: Any, eps: float | None) -> tuple[jax.Array, jax.Array]:
    axes, wide = tuple(range(-len(shape), 0)), x.astype(jnp.float32)
    scale = jax.lax.rsqrt(
        jnp.mean(jnp.square(wide), axes, keepdims=True) + (jnp.finfo(x.dtype).eps if eps is None else eps)
    )
    y = wide * scale
    return (y if weight is None else y * weight).astype(x.dtype), scale


@op("native_group_norm")
def _group_norm(
    x: jax.Array, weight: Any, bias: Any, batch: int, channels: int, size: int, groups: int, eps: float
) -> tuple[jax.Array, ...]:
    wide = x.astype(jnp.float32).reshape(batch, groups, channels // groups * size)
    mean, var = jnp.mean(wide, -1, keepdims=True), jnp.var(wide, -1, keepdims=True)
    y = ((wide - mean) * jax.lax.rsqrt(var + eps)).reshape(batch, channels, size)
    y = y if weight is None else y * weight[:, None]
    return (y if bias is None else y + bias[:, None]).reshape(x.shape).astype(x.dtype), mean, jax.lax.rsqrt(var + eps)


@op("polar")
def _polar(size: jax.Array, angle: jax.Array) -> jax.Array:
    return jax.lax.complex(size * jnp.cos(angle), size * jnp.sin(angle))


OPS["view_as_complex"] = lambda x: jax.lax.complex(x[..., 0], x[..., 1])
OPS["view_as_real"] = lambda x: jnp.stack([x.real, x.imag], -1)
OPS["special_expm1"] = OPS["expm1"]
OPS["numel"] = lambda x: math.prod(x.shape)
