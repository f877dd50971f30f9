"""What a head computes beside the decoder: it hears the decoder's hidden states, and is kept up with what was computed.

The hidden states of a sequence's last positions stay on the device, a ring a slot: a head guesses behind the newest token,
whose step is read by then, and may have been left out of some steps before. A head's position j holds the token j + 1 beside the
hidden states of j (models/heads/head.py), in the place in pages that the decoder has for j: it is known when that token is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from models.api import KVCache
from ops.paged_attention.batch import Q_BLOCK
from ops.paged_attention.groups import KVGroups
from serving.engine.device.programs.packing import Layout, decode_rows, make_step
from serving.engine.device.programs.steps import SplitModel


def remember(
    recent_SWH: jax.Array, heard_NH: jax.Array, slot_N: jax.Array, position_N: jax.Array, real_N: jax.Array
) -> jax.Array:
    """The rings with what was heard in them.

    Args:
        slot_N, position_N: whose each is; no two real ones may have the same place in the same ring.
    """
    slots, window, _ = recent_SWH.shape
    slot_N = jnp.where(real_N, slot_N, slots)
    return recent_SWH.at[slot_N, position_N % window].set(heard_NH.astype(recent_SWH.dtype), mode="drop")


def make_hear(layout: Layout) -> Callable[..., Any]:
    """hear(recent, ends, flat, heard_TH) -> recent, of a step of decode rows alone."""

    def hear(recent: jax.Array, ends: tuple[jax.Array, jax.Array], flat: jax.Array, heard_TH: jax.Array) -> jax.Array:
        f = layout.unpack(flat)
        tokens_BQ, start_B = decode_rows(f, ends)
        place_Q = jnp.arange(tokens_BQ.shape[1], dtype=jnp.int32)
        position_BQ, real_BQ = start_B[:, None] + place_Q, place_Q < f["decode_qlen_B"][:, None]
        slot_BQ = jnp.broadcast_to(f["decode_slot_B"][:, None], position_BQ.shape)
        return remember(recent, heard_TH, *(x.reshape(-1) for x in (slot_BQ, position_BQ, real_BQ)))

    return hear


def make_follow(model: SplitModel, groups: KVGroups, layout: Layout, page_size: int) -> Callable[..., Any]:
    """follow(leaves, kv, recent, ends, flat, heard_TH) -> (kv, recent), of a step with chunks that has been sampled.

    Every position that the decoder computed is computed: the token behind it is the next one of the piece, what the host wrote
    (`next_R`), or what the step has sampled.

    Args of `follow`:
        ends: DeviceState.ends behind the step.
    """

    def follow(
        leaves: tuple[jax.Array, ...],
        kv: KVCache,
        recent: jax.Array,
        ends: tuple[jax.Array, jax.Array],
        flat: jax.Array,
        heard_TH: jax.Array,
    ) -> tuple[KVCache, jax.Array]:
        merged, f = model.merge(leaves), layout.unpack(flat)
        last_token, length = ends
        slot_B, start_B = f["decode_slot_B"], f["decode_start_B"]
        B, C = slot_B.shape[0], f["chunk_positions_C"].shape[0]
        start_B = jnp.where(start_B < 0, length[slot_B] - 1, start_B)  # a row has one place in such a step, and sampled
        next_R = jnp.where(f["next_R"] < 0, last_token[f["next_slot_R"]], f["next_R"])
        row_C, at_C = _rows(f), jnp.arange(C)
        behind_R = f["chunk_start_R"] + f["chunk_qlen_R"]
        is_last_C = at_C == behind_R[row_C] - 1
        given_C = f["tokens_T"][B:]
        tokens_C = jnp.where(is_last_C, next_R[row_C], jnp.concatenate([given_C[1:], given_C[:1]]))
        f = f | {"tokens_T": jnp.concatenate([last_token[slot_B], tokens_C])}
        step = make_step(f, last_token[slot_B][:, None], start_B, groups.places, page_size)
        said = merged.forward(step, kv, merged.hear(heard_TH))
        position_C = f["chunk_positions_C"]
        real_C = _real(f, row_C, at_C) & (position_C >= f["chunk_len_R"][row_C] - recent.shape[1])
        recent = remember(
            recent,
            heard_TH,
            jnp.concatenate([slot_B, f["next_slot_R"][row_C]]),
            jnp.concatenate([start_B, position_C]),
            jnp.concatenate([f["decode_qlen_B"] > 0, real_C]),
        )
        return said.cache, recent

    return follow


def make_catch_up(model: SplitModel, groups: KVGroups, layout: Layout, page_size: int) -> Callable[..., Any]:
    """catch_up(leaves, kv, recent, flat) -> kv: computes pieces of sequences from what the rings have of them.

    Args:
        layout: of steps of chunks alone. Each token stands at the position before its own.
    """

    def catch_up(leaves: tuple[jax.Array, ...], kv: KVCache, recent: jax.Array, flat: jax.Array) -> KVCache:
        merged, f = model.merge(leaves), layout.unpack(flat)
        nothing = jnp.zeros(1, jnp.int32)
        step = make_step(f, *decode_rows(f, (nothing, nothing)), groups.places, page_size)
        heard_CH = recent[f["next_slot_R"][_rows(f)], f["chunk_positions_C"] % recent.shape[1]]
        return merged.forward(step, kv, merged.hear(heard_CH)).cache

    return catch_up


def _rows(f: dict[str, jax.Array]) -> jax.Array:
    """row_C: the piece of each chunk token; padding has the last one."""
    return jnp.minimum(jnp.repeat(f["chunk_row_N"], Q_BLOCK), f["chunk_start_R"].shape[0] - 1)


def _real(f: dict[str, jax.Array], row_C: jax.Array, at_C: jax.Array) -> jax.Array:
    """real_C: whether a chunk token is none of padding."""
    start_C = f["chunk_start_R"][row_C]
    padding_C = jnp.repeat(f["chunk_row_N"], Q_BLOCK) >= f["chunk_start_R"].shape[0]
    return ~padding_C & (at_C >= start_C) & (at_C < start_C + f["chunk_qlen_R"][row_C])
