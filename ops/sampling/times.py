"""Whisper's rule for times (arXiv:2212.04356): where all times together are likelier than any word, a time comes."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def prefer_times(logits_RV: jax.Array, mask_RW: jax.Array, first: int) -> jax.Array:
    """The logits without words where that is so, among what the mask allows.

    Args:
        logits_RV: float32.
        mask_RW: int32, see `apply_token_mask`. Rows that do not allow token `first - 1`, which says that no times are wanted,
            want times; others are left alone.
        first: the token of 0.00 s; all behind it are times.
    """
    vocab = logits_RV.shape[1]
    ids = jnp.arange(vocab)
    allowed_RV = (mask_RW[:, ids // 32] >> (ids % 32)) & 1 > 0
    scores_RV = jnp.where(allowed_RV, logits_RV, -jnp.inf)
    times_R = jax.nn.logsumexp(scores_RV[:, first:], axis=-1)
    forced_R = ~allowed_RV[:, first - 1] & (times_R > jnp.max(scores_RV[:, :first], axis=-1))
    return jnp.where(forced_R[:, None] & (ids < first), -jnp.inf, logits_RV)
