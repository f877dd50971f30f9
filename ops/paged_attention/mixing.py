"""What 8-bit pages hold of k and v: each head times a Hadamard matrix, so that what is large in one channel is spread over all of
them and costs the others no precision (Ashkboos et al. 2024, arXiv:2404.00456). q is multiplied by the same, and what comes out of
v by its inverse, which it is itself: attention stays what it was. Qwen2.5's keys have such channels.

A head whose size is no power of two is mixed in blocks of the largest one that divides it. Latents that are K and V at once (MLA)
are not mixed: their part that is rotated by position and the rest are of different sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ops.linear.weights.rotation import hadamard
from ops.paged_attention.batch import AttentionBatch, KVSpec
from ops.paged_attention.pages import KVPages

Body = Callable[..., tuple[jax.Array, KVPages]]


def mix(x: jax.Array) -> jax.Array:
    """Each head (the last axis) times the Hadamard matrix, float32; its own inverse."""
    block = x.shape[-1] & -x.shape[-1]
    parts = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, block)
    return jnp.matmul(parts, jnp.asarray(hadamard(block)), precision=jax.lax.Precision.HIGHEST).reshape(x.shape)


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
