"""What a draft model computes: guesses of the tokens behind each row's last one, one forward pass a guess.

A guess is drawn as the decoder will draw: at the same temperature, with the same filters and the same random numbers of the
request. So two models that agree draw the same token, however hot; and since a guess only counts where the decoder draws the
very same one (`verify`), it may be anything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from models.api import KVCache, Step
from ops import sampling
from ops.paged_attention.groups import KVGroups
from serving.engine.device.programs.packing import Layout, decode_rows, make_step
from serving.engine.device.programs.steps import SplitModel
from serving.engine.requests.plan import ON_DEVICE


def make_draft(
    model: SplitModel,
    groups: KVGroups,
    forward: Layout,
    sample: Layout,
    page_size: int,
    drafts: int,
    hears: bool = False,
) -> Callable[..., Any]:
    """draft(leaves, kv, forward_flat, sample_flat, wanted_B) -> (kv, drafts_BK int32).

    The first pass takes a row's last two tokens: the one before the last may be a draft that was accepted last, which no pass has
    computed. Each further one takes the guess before it.

    Args:
        forward: layout of rows of two places or more; all their tokens are known to the host.
        sample: layout of as many rows.
        drafts: K.
        hears: the model is a head. Its function has one more argument, the rings (hearing.py): a row's tokens stand at the
            positions before their own, with the hidden states there; each guess stands beside the head's own.
    """

    def draft(
        leaves: tuple[jax.Array, ...],
        kv: KVCache,
        forward_flat: jax.Array,
        sample_flat: jax.Array,
        wanted_B: jax.Array,
        *recent: jax.Array,
    ) -> tuple[KVCache, jax.Array]:
        merged = model.merge(leaves)
        f, s = forward.unpack(forward_flat), sample.unpack(sample_flat)
        rows = wanted_B.shape[0]
        nothing = jnp.zeros(1, jnp.int32)
        tokens_BQ, start_B = decode_rows(f, (nothing, nothing))
        end_B = start_B + f["decode_qlen_B"]  # positions that the row's known tokens take
        drawn_B = end_B + 1 if hears else end_B  # the position of the first guess

        def guess(hidden_BD: jax.Array, behind: jax.Array | int) -> jax.Array:
            """The token behind so many guesses."""
            asked = {name: s[name] for name in _ASKED} | {"step_S": drawn_B + behind - s["prompt_len_S"]}
            return sampling.by_rows(_draw, model.mesh, merged.logits(hidden_BD), asked)

        def said(step: Step, kv: KVCache, hidden_TD: jax.Array | None) -> tuple[jax.Array, jax.Array | None, KVCache]:
            if hidden_TD is None:
                result = merged.forward(step, kv)
                return result.hidden_TD, None, result.cache
            result = merged.forward(step, kv, hidden_TD)
            return result.hidden_TD, result.next_TD, result.cache

        heard_TD = None
        if hears:
            position_BQ = start_B[:, None] + jnp.arange(tokens_BQ.shape[1])
            heard_BQH = recent[0][f["decode_slot_B"][:, None], position_BQ % recent[0].shape[1]]
            heard_TD = merged.hear(heard_BQH.reshape(-1, heard_BQH.shape[-1]))
        step = make_step(f, tokens_BQ, start_B, groups.places, page_size)
        hidden_TD, next_TD, kv = said(step, kv, heard_TD)
        last_B = jnp.arange(rows) * tokens_BQ.shape[1] + jnp.maximum(f["decode_qlen_B"] - 1, 0)
        token_B = guess(hidden_TD[last_B], 0)
        found_BK = jnp.zeros((rows, drafts), jnp.int32).at[:, 0].set(token_B)

        def more(place: jax.Array, carry: Any) -> Any:
            kv, token_B, next_BD, found_BK = carry
            fields = f | {"decode_qlen_B": (place < wanted_B).astype(jnp.int32), "tokens_T": token_B}
            step = make_step(fields, token_B[:, None], end_B + place - 1, groups.places, page_size)
            hidden_BD, next_BD, kv = said(step, kv, next_BD)
            token_B = guess(hidden_BD, place)
            return kv, token_B, next_BD, found_BK.at[:, place].set(token_B)

        carry = (kv, token_B, None if next_TD is None else next_TD[last_B], found_BK)
        kv, *_, found_BK = jax.lax.fori_loop(1, drafts, more, carry)
        return kv, found_BK

    return draft


_ASKED = ("temperature_S", "top_k_S", "top_p_S", "min_p_S", "seed_S")


def _draw(logits_RV: jax.Array, rows: dict[str, jax.Array], tables: Any) -> jax.Array:
    return sampling.sample(
        logits_RV,
        temperature_R=rows["temperature_S"],
        top_k_R=rows["top_k_S"],
        top_p_R=rows["top_p_S"],
        min_p_R=rows["min_p_S"],
        seed_R2=rows["seed_S"],
        step_R=rows["step_S"],
    )


def make_put_drafts(layout: Layout, field: str, queries: int, shift: int) -> Callable[..., Any]:
    """put_drafts(flat, drafts_BK) -> flat with the drafts where the host wrote ON_DEVICE.

    Args:
        field: of the layout, whose first B Q numbers are the places of decode rows.
        queries: Q, K + 1.
        shift: at which place of a row its first draft stands.
    """
    start = layout.offset(field)

    def put_drafts(flat: jax.Array, drafts_BK: jax.Array) -> jax.Array:
        rows, count = drafts_BK.shape
        places = jax.lax.dynamic_slice(flat, (start,), (rows * queries,)).reshape(rows, queries)
        drafts_BQ = jnp.pad(drafts_BK, ((0, 0), (shift, queries - count - shift)))
        return flat.at[start : start + rows * queries].set(
            jnp.where(places == ON_DEVICE, drafts_BQ, places).reshape(-1)
        )

    return put_drafts
