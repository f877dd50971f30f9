"""What 8-bit pages hold of k and v: each head times a Hadamard matrix, so that what is large in one channel is spread over all of
them and costs the others no precision (Ashkboos et al. 2024, arXiv:2404.00456). q is multiplied by the same, and what comes out of
v by its inverse, which it is itself: attention stays what it was. Qwen2.5's keys have such channels.

What a bias adds to every key before it turns stands still where channels turn slowly: a constant of all keys, which adds the same
to all of a query's scores and so changes no softmax. Qwen2.5's are up to a hundred times as large as the rest of a key, in channels
that turn by less than a tenth of a radian in 32,768 positions. Pages of 8 bits hold keys without it (`without_constant`).

A head whose size is no power of two is mixed in blocks of the largest one that divides it. Latents that are K and V at once (MLA)
are not mixed: their part that is rotated by position and the rest are of different sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ops.linear.weights.rotation import hadamard
from ops.paged_attention.batch import AttentionBatch, KVSpec
from ops.paged_attention.pages import KVPages
from ops.rope import cos_sin

SLOW = 1 / 32768
"""Radians a position: pairs of channels that turn more slowly have what a bias adds taken off."""

Body = Callable[..., tuple[jax.Array, KVPages]]


def mix(x: jax.Array) -> jax.Array:
    """Each head (the last axis) times the Hadamard matrix, float32; its own inverse."""
    block = x.shape[-1] & -x.shape[-1]
    parts = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, block)
    return jnp.matmul(parts, jnp.asarray(hadamard(block)), precision=jax.lax.Precision.HIGHEST).reshape(x.shape)


def without_constant(
    qkv_TKgh: jax.Array, bias_Kh: jax.Array, positions_T: jax.Array, rotary: tuple[np.ndarray, float] | None
) -> jax.Array:
    """A fused projection whose keys, once turned, lack the bias's channels that turn slowly as they stand at position 0: here,
    before they turn, these turned back. See `attend_rope`."""
    h = qkv_TKgh.shape[-1]
    standing = jnp.zeros((len(qkv_TKgh), 0)), jnp.zeros((len(qkv_TKgh), 0))
    frequencies = np.zeros(0, np.float32) if rotary is None else np.asarray(rotary[0])
    if frequencies.ndim > 1:
        frequencies = frequencies.sum(0)  # all numbers but one are 0
    turning, slow = 2 * len(frequencies), frequencies < SLOW
    bias_1Kh = jnp.where(jnp.asarray(np.pad(np.tile(slow, 2), (0, h - turning), constant_values=True)), bias_Kh, 0.0)[
        None
    ]
    cos, sin = standing if rotary is None else cos_sin(positions_T, rotary[0])
    first, second = jnp.split(bias_1Kh[..., :turning], 2, axis=-1)
    cos, sin = cos[:, None], sin[:, None]
    back = [first * cos + second * sin, second * cos - first * sin]
    rest = jnp.broadcast_to(bias_1Kh[..., turning:], (len(qkv_TKgh), *bias_1Kh.shape[1:2], h - turning))
    k_TK1h = qkv_TKgh[:, :, -2:-1] - jnp.concatenate([*back, rest], axis=-1)[:, :, None].astype(qkv_TKgh.dtype)
    return jax.lax.dynamic_update_slice(qkv_TKgh, k_TK1h, (0, 0, qkv_TKgh.shape[2] - 2, 0))


def mixed_whole(spec: KVSpec) -> bool:
    """Whether 8-bit pages hold each head times one matrix of its size."""
    sizes = (spec.head_dim, spec.v_head_dim)
    return not spec.indexed and all(size > 0 and size & (size - 1) == 0 for size in sizes)


def around(body: Body) -> Body:
    """A body of `attend` that knows nothing of mixing, for pages that hold what is mixed too."""

    def attend(
        q_TKGh: jax.Array,
        k_TKh: jax.Array | None,
        v_TKh: jax.Array | None,
        kv: KVPages,
        batch: AttentionBatch,
        **options: Any,
    ) -> tuple[jax.Array, KVPages]:
        if not kv.mixed:
            return body(q_TKGh, k_TKh, v_TKh, kv, batch, **options)
        k_TKh, v_TKh = (None if x is None else mix(x) for x in (k_TKh, v_TKh))
        out_TKGh, kv = body(mix(q_TKGh).astype(q_TKGh.dtype), k_TKh, v_TKh, kv, batch, **options)
        return mix(out_TKGh).astype(out_TKGh.dtype), kv

    return attend
