"""What stays on the device from step to step besides weights and pages: one row a slot, and a dummy row for padding."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from ops.sampling import PROMPT_BIT
from serving.engine.api.sampling_params import MAX_LOGIT_BIAS, MAX_STOP_TOKEN_IDS
from serving.engine.requests.request import Request

MAX_BANNED = MAX_STOP_TOKEN_IDS + 16
"""Stop and end-of-sequence ids that `min_tokens` holds back."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["last_token", "length", "seen", "bias_ids", "bias_values", "banned_ids"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class DeviceState:
    """Donated to every `sample` and `load_slot`.

    Attributes:
        last_token: int32 [slots + 1], what the slot sampled last; the next step's input.
        length: int32 [slots + 1], positions that the slot's sequence has in its pages: where `last_token` goes. Written when
            the slot samples, so that the next step can follow before the host has read how many tokens there were.
        seen: int16 [slots + 1, V], see PROMPT_BIT. Kept up for slots whose request has penalties.
        bias_ids, bias_values: int32 and float32 [slots + 1, MAX_LOGIT_BIAS]; unused entries have id V (dropped).
        banned_ids: int32 [slots + 1, MAX_BANNED], what ends the completion: held back until min_tokens, and looked for by
            the device loop of several decode steps; unused entries have id V.
    """

    last_token: jax.Array
    length: jax.Array
    seen: jax.Array
    bias_ids: jax.Array
    bias_values: jax.Array
    banned_ids: jax.Array

    @classmethod
    def zeros(cls, num_slots: int, vocab_size: int) -> DeviceState:
        rows = num_slots + 1
        return cls(
            jnp.zeros(rows, jnp.int32),
            jnp.zeros(rows, jnp.int32),
            jnp.zeros((rows, vocab_size), jnp.int16),
            jnp.full((rows, MAX_LOGIT_BIAS), vocab_size, jnp.int32),
            jnp.zeros((rows, MAX_LOGIT_BIAS), jnp.float32),
            jnp.full((rows, MAX_BANNED), vocab_size, jnp.int32),
        )

    @property
    def ends(self) -> tuple[jax.Array, jax.Array]:
        """(last_token, length): what a forward pass reads."""
        return self.last_token, self.length


def needs_loading(request: Request, stops: bool = False) -> bool:
    """Whether the request reads any per-slot device row. Most do not, and are admitted without a device call.

    `stops`: the device looks at stop tokens itself (several decode steps a dispatch).
    """
    p = request.spec.params
    return p.has_penalties or bool(p.logit_bias) or p.min_tokens > 0 or stops


def slot_rows(
    request: Request, vocab_size: int, stops: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """A request's rows of seen_V, bias_ids, bias_values, banned_ids, from the tokens known now."""
    p = request.spec.params
    seen = np.zeros(vocab_size, np.int16)
    if p.has_penalties:
        output = np.asarray(request.tokens[request.prompt_len :], np.int64)
        counts = np.bincount(output, minlength=vocab_size) if len(output) else np.zeros(vocab_size, np.int64)
        seen[:] = np.minimum(counts, PROMPT_BIT - 1)
        seen[np.asarray(request.tokens[: request.prompt_len], np.int64)] |= PROMPT_BIT
    bias_ids = np.full(MAX_LOGIT_BIAS, vocab_size, np.int32)
    bias_values = np.zeros(MAX_LOGIT_BIAS, np.float32)
    bias = dict(p.logit_bias or {})
    bias_ids[: len(bias)] = list(bias.keys())
    bias_values[: len(bias)] = list(bias.values())
    banned = np.full(MAX_BANNED, vocab_size, np.int32)
    if p.min_tokens > 0 or stops:
        ids = (*p.stop_token_ids, *(() if p.ignore_eos else request.spec.eos_token_ids))[:MAX_BANNED]
        banned[: len(ids)] = ids
    return seen, bias_ids, bias_values, banned
