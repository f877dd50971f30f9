"""Everything that changes a row of logits before its draw, as one argument."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from ops.sampling.logits import apply_bias, apply_penalties, apply_token_mask

PROMPT_BIT = 1 << 14
"""In `Edits.seen_NV`: the token is in the prompt. The bits below count it in the completion."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "slot_R", "repetition_R", "presence_R", "frequency_R", "biased_R", "held_back_R", "masked",
        "seen_NV", "bias_ids_NE", "bias_values_NE", "banned_ids_NE", "mask_RW",
    ],
    meta_fields=[],
)  # fmt: skip
@dataclasses.dataclass(frozen=True)
class Edits:
    """What rows ask for, in the order in which it is done. A row that asks for nothing has its logits left alone.

    Attributes:
        slot_R: int32, where the row's facts lie in the tables below that are [N, ...].
        repetition_R, presence_R, frequency_R: float32, see `apply_penalties`; 1, 0 and 0 ask for nothing.
        biased_R: bool, the row adds `bias_values_NE` at `bias_ids_NE`.
        held_back_R: bool, the row may not take any of `banned_ids_NE`.
        masked: bool scalar, rows may take only what `mask_RW` allows.
        seen_NV: int16, see PROMPT_BIT. Read where a row has penalties.
        bias_ids_NE, bias_values_NE: int32 and float32; an id outside [0, V) is unused.
        banned_ids_NE: int32, likewise.
        mask_RW: int32 [R, >= ceil(V / 32)], see `apply_token_mask`; or None where nobody can ask for one.
    """

    slot_R: jax.Array
    repetition_R: jax.Array
    presence_R: jax.Array
    frequency_R: jax.Array
    biased_R: jax.Array
    held_back_R: jax.Array
    masked: jax.Array
    seen_NV: jax.Array
    bias_ids_NE: jax.Array
    bias_values_NE: jax.Array
    banned_ids_NE: jax.Array
    mask_RW: jax.Array | None

    @property
    def penalized(self) -> jax.Array:
        """Bool [R]: the row has a penalty."""
        return (self.repetition_R != 1) | (self.presence_R != 0) | (self.frequency_R != 0)

    @property
    def wanted(self) -> jax.Array:
        """Bool scalar: some row asks for something."""
        asking_R = self.penalized | self.biased_R | self.held_back_R
        return jnp.any(asking_R) | (False if self.mask_RW is None else self.masked)


def apply_edits(logits_RV: jax.Array, edits: Edits) -> jax.Array:
    """The logits that rows are drawn from, float32: penalties, then biases, what is held back, and the mask."""
    vocab = logits_RV.shape[1]
    seen_RV = edits.seen_NV[edits.slot_R]
    logits_RV = apply_penalties(
        logits_RV,
        prompt_mask_RV=(seen_RV & PROMPT_BIT) > 0,
        output_counts_RV=(seen_RV & (PROMPT_BIT - 1)).astype(jnp.int32),
        # Tables hold what their slot's last request left: neutral numbers make that harmless.
        repetition_R=edits.repetition_R,
        presence_R=edits.presence_R,
        frequency_R=edits.frequency_R,
    )
    ids_RE = jnp.where(edits.biased_R[:, None], edits.bias_ids_NE[edits.slot_R], vocab)
    logits_RV = apply_bias(logits_RV, ids_RE, edits.bias_values_NE[edits.slot_R])
    ids_RE = jnp.where(edits.held_back_R[:, None], edits.banned_ids_NE[edits.slot_R], vocab)
    logits_RV = apply_bias(logits_RV, ids_RE, jnp.full(ids_RE.shape, -jnp.inf, jnp.float32))
    if edits.mask_RW is None:
        return logits_RV
    return apply_token_mask(logits_RV, jnp.where(edits.masked, edits.mask_RW, -1))
