"""Top-k, top-p and min-p as one threshold a row: a token is kept when its logit is at least the threshold.

No sort. The threshold is an element of the row, found by bisection between elements: each pass counts (top-k) or
weighs (top-p) what lies above the middle, then moves one end to the nearest element. It ends on the exact element, so
ties at the threshold are all kept, whatever order they are stored in.

Most rows are decided on few candidates: the blocks with the highest maxima. An element outside them is at most the
lowest of those maxima, the bound; a threshold found above the bound is therefore exact. Rows without one are searched
in full.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

BLOCK = 64  # logits a block
CANDIDATE_BLOCKS = 128  # 8192 candidates a row: a sixth of a 49k vocabulary
NEGLIGIBLE = 104.0  # exp(-104) is 0 in float32: logits further below the maximum have no weight


def blocks(x_RV: jax.Array) -> jax.Array:
    """x_RNb: the row in blocks of `BLOCK`, padded with -inf."""
    rows, vocab = x_RV.shape
    padded_RV = jnp.pad(x_RV, ((0, 0), (0, -vocab % BLOCK)), constant_values=-jnp.inf)
    return padded_RV.reshape(rows, -1, BLOCK)


def threshold(x_RV: jax.Array, top_k_R: jax.Array, top_p_R: jax.Array, min_p_R: jax.Array) -> jax.Array:
    """The lowest logit that is kept in each row: min-p and top-k first, then top-p on what they leave.

    Args:
        x_RV: float32, (logits - maximum) over temperature: each row's maximum is 0, or it has no finite number.
        top_k_R: int32; below 1 or at least V keeps all.
        top_p_R: float32 in (0, 1]; 1 keeps all.
        min_p_R: float32 in [0, 1]; 0 keeps all.
    """
    vocab = x_RV.shape[1]
    x_RNb = blocks(x_RV)
    count = min(CANDIDATE_BLOCKS, x_RNb.shape[1])
    best_RC, ids_RC = lax.top_k(jnp.max(x_RNb, axis=-1), count)
    candidates_RC = jnp.take_along_axis(x_RNb, ids_RC[:, :, None], axis=1).reshape(x_RV.shape[0], -1)
    bound_R = best_RC[:, -1] if count < x_RNb.shape[1] else jnp.full(x_RV.shape[:1], -jnp.inf)

    def find(weigh: Callable[[jax.Array], jax.Array], need_R: jax.Array, active_R: jax.Array) -> jax.Array:
        found_R = search(candidates_RC, weigh(candidates_RC), need_R, active_R)
        missed_R = active_R & (found_R <= bound_R)
        # Each row keeps its own answer: what it gets never depends on its neighbours in the batch.
        found_R = lax.cond(
            jnp.any(missed_R),
            lambda: jnp.where(missed_R, search(x_RV, weigh(x_RV), need_R, missed_R), found_R),
            lambda: found_R,
        )
        return jnp.where(active_R, found_R, -jnp.inf)

    low_R = jnp.log(min_p_R)
    with_k_R = (top_k_R > 0) & (top_k_R < vocab)
    low_R = lax.cond(
        jnp.any(with_k_R),
        lambda: jnp.maximum(low_R, find(jnp.ones_like, top_k_R.astype(jnp.float32), with_k_R)),
        lambda: low_R,
    )
    with_p_R = top_p_R < 1.0

    def nucleus() -> jax.Array:
        weight_RV = jnp.where(x_RV >= low_R[:, None], jnp.exp(x_RV), 0.0)
        need_R = top_p_R * jnp.sum(weight_RV, axis=-1)
        return jnp.maximum(low_R, find(jnp.exp, need_R, with_p_R))

    return lax.cond(jnp.any(with_p_R), nucleus, lambda: low_R)


def search(x_RN: jax.Array, weight_RN: jax.Array, need_R: jax.Array, active_R: jax.Array) -> jax.Array:
    """The highest element t of each row for which the weights of the elements >= t sum to at least `need`.

    A row's maximum is 0. Elements more than `NEGLIGIBLE` below it are not told apart; when even they are needed, the
    lowest element above them is returned.
    """
    low_R = jnp.min(jnp.where(x_RN >= -NEGLIGIBLE, x_RN, jnp.inf), axis=-1)
    # Invariant: the answer is an element in [low, high]; both ends are elements.
    low_R = jnp.where(active_R, jnp.minimum(low_R, 0.0), 0.0)

    def going(ends: tuple[jax.Array, jax.Array]) -> jax.Array:
        return jnp.any(ends[0] < ends[1])

    def halve(ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low_R, high_R = ends
        middle_R = low_R + (high_R - low_R) * 0.5
        middle_R = jnp.where((middle_R > low_R) & (middle_R < high_R), middle_R, high_R)
        above_RN = x_RN >= middle_R[:, None]
        enough_R = jnp.sum(jnp.where(above_RN, weight_RN, 0.0), axis=-1) >= need_R
        lowest_above_R = jnp.min(jnp.where(above_RN, x_RN, jnp.inf), axis=-1)
        highest_below_R = jnp.max(jnp.where(above_RN, -jnp.inf, x_RN), axis=-1)
        done_R = low_R >= high_R
        low_next_R = jnp.where(enough_R & ~done_R, lowest_above_R, low_R)
        high_next_R = jnp.where(enough_R | done_R, high_R, highest_below_R)
        return low_next_R, high_next_R

    return lax.while_loop(going, halve, (low_R, jnp.zeros_like(low_R)))[0]
