"""Normalization over the last axis, computed in float32 whatever the input's dtype is.

On a CPU with native kernels a row's result does not depend on the others, to the last bit: XLA sums rows in another order where
there are few of them (see ops/native/norm.cc).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ops import native


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
    if scale is not None and unit_offset:
        scale = 1.0 + scale.astype(jnp.float32)
    return _norm(x, scale, None, eps, False)


def layer_norm(x: jax.Array, scale: jax.Array | None, bias: jax.Array | None, eps: float) -> jax.Array:
    """Layer norm: `(x - mean) / sqrt(var + eps) * scale + bias` (Ba et al. 2016, arXiv:1607.06450).

    Args:
        x: [..., D], any float dtype.
        scale, bias: [D], or None for none.
        eps: added to the (biased) variance.
    Returns:
        [..., D] in x's dtype; computed in float32.
    """
    return _norm(x, scale, bias, eps, True)


def _norm(x: jax.Array, scale: jax.Array | None, bias: jax.Array | None, eps: float, centred: bool) -> jax.Array:
    given = (None if of is None else jnp.asarray(of).astype(jnp.float32) for of in (scale, bias))
    body = _by_rows if _has_kernel() else _plain
    return body(eps, centred, jnp.asarray(x).astype(jnp.float32), *given).astype(x.dtype)


def _has_kernel() -> bool:
    """Not where several devices share what is normed: a kernel's operands are not divided among them. Nor does a norm build the
    library: who wants kernels has asked before, for pages or weights, and a program for another platform wants none."""
    return jax.default_backend() == "cpu" and jax.device_count() == 1 and native.loaded()


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _by_rows(eps: float, centred: bool, x: Any, scale: Any, bias: Any) -> jax.Array:
    return lax.platform_dependent(
        x,
        scale,
        bias,
        cpu=functools.partial(_native, eps, centred),
        default=functools.partial(_plain, eps, centred),  # a program for another platform, made on this one
    )


@_by_rows.defjvp
def _by_rows_jvp(eps: float, centred: bool, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    return jax.jvp(functools.partial(_plain, eps, centred), primals, tangents)


def _native(eps: float, centred: bool, x: jax.Array, scale: Any, bias: Any) -> jax.Array:
    flat_RD, nothing = x.reshape(-1, x.shape[-1]), jnp.zeros(0, jnp.float32)
    call = jax.ffi.ffi_call(native.target("jaxserve_norm"), jax.ShapeDtypeStruct(flat_RD.shape, jnp.float32))
    given = (nothing if of is None else of for of in (scale, bias))
    return call(flat_RD, *given, eps=np.float32(eps), centred=np.int64(centred)).reshape(x.shape)


def _plain(eps: float, centred: bool, x: jax.Array, scale: Any, bias: Any) -> jax.Array:
    if centred:
        x = x - jnp.mean(x, axis=-1, keepdims=True)
    y = x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    y = y if scale is None else y * scale
    return y if bias is None else y + bias


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


class CentredNorm(NamedTuple):
    """A `layer_norm` of its input that a product may take along.

    Attributes:
        scale_I, bias_I: float32; no bias is None.
        eps: added to the variance; static.
    """

    scale_I: jax.Array
    bias_I: jax.Array | None
    eps: float

    def __call__(self, x_TI: jax.Array) -> jax.Array:
        """The normed x, in x's dtype."""
        return layer_norm(x_TI, self.scale_I, self.bias_I, self.eps)


TakenNorm = RmsNorm | CentredNorm
