"""Log-probabilities of the chosen and the likeliest tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from ops.sampling.threshold import BLOCK, blocks


def logprobs(
    logits_RV: jax.Array, tokens_R: jax.Array, num_top: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """See ops.sampling.logprobs; all rows are asked for."""
    norm_R = jax.nn.logsumexp(logits_RV, axis=-1)
    chosen_R = jnp.take_along_axis(logits_RV, tokens_R[:, None], axis=1)[:, 0]
    rank_R = jnp.sum(logits_RV >= chosen_R[:, None], axis=-1, dtype=jnp.int32)
    top_values_RN, top_ids_RN = top(logits_RV, num_top)
    return chosen_R - norm_R, rank_R, top_ids_RN, top_values_RN - norm_R[:, None]


def top(x_RV: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """(values, int32 ids) of the `count` largest, the lowest id first on ties.

    They lie in the `count` blocks with the largest maxima: an element outside has `count` elements before it.
    """
    rows = x_RV.shape[0]
    if count == 0:
        return jnp.zeros((rows, 0), x_RV.dtype), jnp.zeros((rows, 0), jnp.int32)
    x_RNb = blocks(x_RV)
    _, block_RC = lax.top_k(jnp.max(x_RNb, axis=-1), min(count, x_RNb.shape[1]))
    block_RC = jnp.sort(block_RC, axis=-1)  # ascending ids, so that ties keep their order
    near_RC = jnp.take_along_axis(x_RNb, block_RC[:, :, None], axis=1).reshape(rows, -1)
    values_RN, place_RN = lax.top_k(near_RC, count)
    ids_RN = jnp.take_along_axis(block_RC, place_RN // BLOCK, axis=1) * BLOCK + place_RN % BLOCK
    return values_RN, ids_RN.astype(jnp.int32)
