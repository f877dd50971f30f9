"""Edits, filters and the draw in one C++ call, which gives each row only the passes it needs; log-probabilities likewise.

See `ops/native/sampling.cc`. It draws what `draw.py` draws for the same two uniform numbers a row, except where these
fall within a rounding error (some 1e-6 of the total weight) of the border between two tokens, or a top-p cut within
one of its probability: sums are taken in another order.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ops import native
from ops.sampling.draw import GREEDY_TEMPERATURE, uniform
from ops.sampling.edits import Edits


def choose(
    logits_RV: jax.Array,
    edits: Edits,
    *,
    temperature_R: jax.Array,
    top_k_R: jax.Array,
    top_p_R: jax.Array,
    min_p_R: jax.Array,
    seed_R2: jax.Array,
    step_R: jax.Array,
) -> jax.Array:
    """See ops.sampling.choose."""
    rows = logits_RV.shape[0]
    params = [temperature_R, top_p_R, min_p_R, edits.repetition_R, edits.presence_R, edits.frequency_R]
    masked_R = jnp.broadcast_to(edits.masked, (rows,))
    choices = [top_k_R, edits.slot_R, edits.biased_R, edits.held_back_R, masked_R]
    uniform_R2 = jax.lax.cond(
        jnp.any(temperature_R >= GREEDY_TEMPERATURE),
        lambda: uniform(seed_R2, step_R),
        lambda: jnp.zeros((rows, 2), jnp.float32),
    )
    call = jax.ffi.ffi_call(native.target("jaxserve_sample"), jax.ShapeDtypeStruct((rows,), jnp.int32))
    return call(
        logits_RV.astype(jnp.float32),
        jnp.stack([x.astype(jnp.float32) for x in params], axis=1),
        jnp.stack([x.astype(jnp.int32) for x in choices], axis=1),
        uniform_R2,
        edits.seen_NV,
        edits.bias_ids_NE,
        edits.bias_values_NE,
        edits.banned_ids_NE,
        jnp.zeros((rows, 0), jnp.int32) if edits.mask_RW is None else edits.mask_RW,
    )


def logprobs(
    logits_RV: jax.Array, tokens_R: jax.Array, num_top: int, asked_R: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """See ops.sampling.logprobs."""
    rows = logits_RV.shape[0]
    shapes = (
        ((rows,), jnp.float32),
        ((rows,), jnp.int32),
        ((rows, num_top), jnp.int32),
        ((rows, num_top), jnp.float32),
    )
    call = jax.ffi.ffi_call(native.target("jaxserve_logprobs"), [jax.ShapeDtypeStruct(*shape) for shape in shapes])
    chosen_R, rank_R, top_ids_RN, top_values_RN = call(
        logits_RV.astype(jnp.float32), tokens_R.astype(jnp.int32), asked_R.astype(jnp.int32)
    )
    return chosen_R, rank_R, top_ids_RN, top_values_RN
