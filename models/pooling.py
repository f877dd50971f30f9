"""From hidden states to one vector a text, by the modes of sentence-transformers."""

from __future__ import annotations

import jax
import jax.numpy as jnp

MODES = ("mean", "cls", "last", "max", "weightedmean", "mean_sqrt_len")


def pool(hidden_BSD: jax.Array, length_B: jax.Array, mode: str, normalize: bool = True) -> jax.Array:
    """One float32 vector a text.

    Args:
        hidden_BSD: hidden states, padded behind each text's end.
        length_B: tokens of each text; 0 for a padded row, whose vector is zero.
        mode: "mean" of all tokens, of tokens weighted by their number from 1 ("weightedmean"), or their sum over the root of
            their number ("mean_sqrt_len"); the first token ("cls") or the "last" one; the largest number of each channel ("max").
        normalize: to length 1.
    Raises:
        ValueError: an unknown mode.
    """
    hidden_BSD = hidden_BSD.astype(jnp.float32)
    number_S = jnp.arange(hidden_BSD.shape[1])
    valid_BS = number_S < length_B[:, None]
    count_B1 = jnp.maximum(length_B, 1)[:, None]
    if mode == "mean":
        pooled_BD = jnp.where(valid_BS[..., None], hidden_BSD, 0.0).sum(1) / count_B1
    elif mode == "mean_sqrt_len":
        pooled_BD = jnp.where(valid_BS[..., None], hidden_BSD, 0.0).sum(1) / jnp.sqrt(count_B1.astype(jnp.float32))
    elif mode == "weightedmean":
        weight_BS = jnp.where(valid_BS, number_S + 1.0, 0.0)
        weighted = jnp.where(valid_BS[..., None], hidden_BSD, 0.0) * weight_BS[..., None]
        pooled_BD = weighted.sum(1) / jnp.maximum(weight_BS.sum(1), 1.0)[:, None]
    elif mode == "max":
        pooled_BD = jnp.where(valid_BS[..., None], hidden_BSD, -jnp.inf).max(1)
    elif mode == "cls":
        pooled_BD = hidden_BSD[:, 0]
    elif mode == "last":
        pooled_BD = jnp.take_along_axis(hidden_BSD, jnp.maximum(length_B - 1, 0)[:, None, None], axis=1)[:, 0]
    else:
        raise ValueError(f"the pooling mode {mode!r} is not supported; supported: {list(MODES)}.")
    pooled_BD = jnp.where((length_B > 0)[:, None], pooled_BD, 0.0)
    if normalize:
        norm_B1 = jnp.linalg.norm(pooled_BD, axis=-1, keepdims=True)
        pooled_BD = pooled_BD / jnp.maximum(norm_B1, 1e-12)
    return pooled_BD
