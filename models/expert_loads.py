"""How many tokens each expert gets, counted on the device beside a forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp


def shape(config: Any) -> tuple[int, int] | None:
    """(layers with experts, E) of a model's counts, by its configuration; None for models without."""
    moe = getattr(config, "moe", None)
    return (sum(moe.layers), moe.num_experts) if moe is not None and any(moe.layers) else None


def of_asked(visited: tuple[jax.Array, ...], asked_T: jax.Array) -> tuple[jax.Array, ...]:
    """The same ids with ones of no expert for tokens that a layer has not computed."""

    def of_layer(ids: jax.Array) -> jax.Array:
        ids_Tk = ids.reshape(asked_T.shape[0], -1)
        return jnp.where(asked_T[:, None], ids_Tk, jnp.iinfo(jnp.int32).max).reshape(ids.shape)

    return tuple(map(of_layer, visited))


def count(visited: Sequence[jax.Array], num_experts: int, real_T: jax.Array) -> jax.Array:
    """int32 [layers with experts, E]: how many of the real tokens visit each.

    Args:
        visited: `Result.visited`; one a layer at least. What is no expert's id counts for none.
        real_T: bool; False for padding.
    """
    one_T1 = real_T.astype(jnp.int32)[:, None]

    def of_layer(ids_Tk: jax.Array) -> jax.Array:
        ids_Tk = ids_Tk.reshape(real_T.shape[0], -1)
        return jnp.zeros(num_experts, jnp.int32).at[ids_Tk].add(jnp.broadcast_to(one_T1, ids_Tk.shape), mode="drop")

    return jnp.stack([of_layer(ids_Tk) for ids_Tk in visited])
