"""From logits to tokens: pure functions that the compiled sampling program is made of.

Two bodies: `native` on a CPU with native kernels, `xla` everywhere else. `best_body` says which one a program should
be traced with. Both take whole rows: on a mesh, `by_rows` gives each device some.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from ops import native as _native_kernels
from ops.sampling import native as _native
from ops.sampling.by_rows import by_rows
from ops.sampling.draw import GREEDY_TEMPERATURE, sample
from ops.sampling.edits import PROMPT_BIT, Edits, apply_edits
from ops.sampling.logits import apply_bias, apply_penalties, apply_token_mask
from ops.sampling.logprobs import logprobs as _logprobs
from ops.sampling.times import prefer_times

__all__ = [
    "GREEDY_TEMPERATURE",
    "PROMPT_BIT",
    "Body",
    "Edits",
    "apply_bias",
    "apply_edits",
    "apply_penalties",
    "apply_token_mask",
    "best_body",
    "by_rows",
    "choose",
    "logprobs",
    "prefer_times",
    "sample",
]

Body = Literal["native", "xla"]


def best_body(platform: str) -> Body:
    """What a program on this platform should sample with; builds the native library when first asked on a CPU."""
    return "native" if platform == "cpu" and _native_kernels.available() else "xla"


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
    body: Body = "xla",
) -> jax.Array:
    """Each row's next token: its logits are edited, filtered, and drawn from. See `Edits` and `sample`.

    A row's token depends on its own logits, edits, parameters, seed and step alone. The two bodies draw the same token
    but where rounding decides: see ops/sampling/native.py.

    Args:
        logits_RV: float32, as the model gives them; they are not copied unless a row edits its own.
        temperature_R, top_k_R, top_p_R, min_p_R, seed_R2, step_R: as in `sample`.
    Returns:
        tokens_R int32.
    """
    options = {
        "temperature_R": temperature_R,
        "top_k_R": top_k_R,
        "top_p_R": top_p_R,
        "min_p_R": min_p_R,
        "seed_R2": seed_R2,
        "step_R": step_R,
    }
    if body == "native":
        return _native.choose(logits_RV, edits, **options)
    # Branches that returned logits would copy [R, V] when nobody asks for anything (64 rows of 49k on a CPU: 7 ms).
    return lax.cond(
        edits.wanted,
        lambda: sample(apply_edits(logits_RV, edits), **options),
        lambda: sample(logits_RV, **options),
    )


def logprobs(
    logits_RV: jax.Array, tokens_R: jax.Array, num_top: int, asked_R: jax.Array | None = None, body: Body = "xla"
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Log-softmax of the logits as the model gave them, at the chosen and at the `num_top` likeliest tokens.

    Args:
        logits_RV: float32, before temperature and penalties (vLLM's raw_logprobs).
        tokens_R: int32 chosen ids, in [0, V).
        num_top: static, 0..V.
        asked_R: bool; other rows' results are unspecified. When None, every row is asked for.
    Returns:
        chosen_R float32; rank_R int32, 1 for the likeliest (tokens that tie count as before it); top_ids_RN int32 and
        top_values_RN float32, likeliest first, the lowest id first on ties.
    """
    rows = logits_RV.shape[0]
    if body == "native":
        asked_R = jnp.ones(rows, bool) if asked_R is None else asked_R
        return _native.logprobs(logits_RV, tokens_R, num_top, asked_R)
    if asked_R is None:
        return _logprobs(logits_RV, tokens_R, num_top)
    shapes = jax.eval_shape(lambda: _logprobs(logits_RV, tokens_R, num_top))
    return lax.cond(
        jnp.any(asked_R),
        lambda: _logprobs(logits_RV, tokens_R, num_top),
        lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes),
    )
