"""What changes logits before sampling: penalties, forbidden tokens, biases. Each returns new logits_RV float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def apply_penalties(
    logits_RV: jax.Array,
    *,
    prompt_mask_RV: jax.Array,
    output_counts_RV: jax.Array,
    repetition_R: jax.Array,
    presence_R: jax.Array,
    frequency_R: jax.Array,
) -> jax.Array:
    """Repetition penalty first (Keskar et al. 2019, arXiv:1909.05858), then frequency and presence (OpenAI's).

    Args:
        prompt_mask_RV: bool, tokens of the prompt.
        output_counts_RV: integer, how often each token was generated.
        repetition_R: float32 > 0; divides positive and multiplies negative logits of tokens seen in either; 1 is none.
        presence_R: float32, subtracted once for tokens generated; 0 is none.
        frequency_R: float32, subtracted once for each time a token was generated; 0 is none.
    """
    generated_RV = output_counts_RV > 0
    factor_RV = jnp.where(prompt_mask_RV | generated_RV, repetition_R[:, None], 1.0)
    logits_RV = jnp.where(logits_RV > 0, logits_RV / factor_RV, logits_RV * factor_RV)
    logits_RV = logits_RV - frequency_R[:, None] * output_counts_RV.astype(jnp.float32)
    return logits_RV - jnp.where(generated_RV, presence_R[:, None], 0.0)


def apply_token_mask(logits_RV: jax.Array, bitmask_RW: jax.Array) -> jax.Array:
    """Forbids (-inf) the tokens whose bit is not set.

    Args:
        bitmask_RW: int32 or uint32 [R, >= ceil(V / 32)]; bit t % 32 of word t // 32 allows token t.
    """
    rows, vocab = logits_RV.shape
    words = -(-vocab // 32)
    bits_RW = jax.lax.bitcast_convert_type(bitmask_RW[:, :words], jnp.uint32)
    allowed_RWb = (bits_RW[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    return jnp.where(allowed_RWb.reshape(rows, -1)[:, :vocab] != 0, logits_RV, -jnp.inf)


def apply_bias(logits_RV: jax.Array, ids_RN: jax.Array, values_RN: jax.Array) -> jax.Array:
    """Adds values to the logits of the given ids; -inf forbids. Ids outside [0, V) are padding."""
    rows, vocab = logits_RV.shape
    # A negative index would count from the end; V is out of bounds and dropped.
    ids_RN = jnp.where(ids_RN < 0, vocab, ids_RN)
    return logits_RV.at[jnp.arange(rows)[:, None], ids_RN].add(values_RN, mode="drop")
