"""How many tokens each expert gets, counted on the device beside a forward pass where somebody asks for it."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

_counts: contextvars.ContextVar[list[jax.Array] | None] = contextvars.ContextVar("counts", default=None)


def shape(config: Any) -> tuple[int, int] | None:
    """(layers with experts, E) of a model's counts, by its configuration; None for models without."""
    moe = getattr(config, "moe", None)
    return (sum(moe.layers), moe.num_experts) if moe is not None and any(moe.layers) else None


@contextlib.contextmanager
def counting() -> Iterator[list[jax.Array]]:
    """The counts of each forward pass that is traced inside: int32 [layers with experts, E]; none for models without."""
    found: list[jax.Array] = []
    token = _counts.set(found)
    try:
        yield found
    finally:
        _counts.reset(token)


def count(ids_LTk: Sequence[jax.Array], num_experts: int, real_T: jax.Array) -> None:
    """Counts one forward pass, where `counting` wants it.

    Args:
        ids_LTk: the experts that each token visits, [T, k] (or [T k, 1]) for each layer that has experts.
        real_T: bool; False for padding.
    """
    found = _counts.get()
    if found is None or not ids_LTk:
        return
    one_T1 = real_T.astype(jnp.int32)[:, None]

    def of_layer(ids_Tk: jax.Array) -> jax.Array:
        ids_Tk = ids_Tk.reshape(real_T.shape[0], -1)
        return jnp.zeros(num_experts, jnp.int32).at[ids_Tk].add(jnp.broadcast_to(one_T1, ids_Tk.shape), mode="drop")

    found.append(jnp.stack([of_layer(ids_Tk) for ids_Tk in ids_LTk]))
