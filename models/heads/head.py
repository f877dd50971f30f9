"""What the engine asks of a head.

A head's position j holds what it made of the token j + 1 and of the model's hidden states at j, and says token j + 2. Where it
guesses further, its own hidden states stand for the model's.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Protocol

import jax

from models.api import KVCache, Step
from models.recipes import Recipes
from ops.paged_attention.batch import KVSpec


@functools.partial(jax.tree_util.register_dataclass, data_fields=["hidden_TD", "next_TD", "cache"], meta_fields=[])
@dataclass(frozen=True)
class Said:
    """What a head's forward pass gives.

    Attributes:
        hidden_TD: for `Head.logits`.
        next_TD: what stands for the model's hidden states at the next position, in the place of what `Head.hear` gives.
        cache: with the tokens' K and V in it.
    """

    hidden_TD: jax.Array
    next_TD: jax.Array
    cache: KVCache


class Head(Protocol):
    """An `nnx.Module`. Without `share` it has its own parameters alone, which a loader fills.

    Attributes:
        config: its sizes, as a decoder's; `vocab_size` is the model's.
        taps: `Step.taps` of the model that it listens to; () for what the model's own logits are made of.
        heard_dim: width of all of that together.
    """

    config: Any
    taps: tuple[int, ...]
    heard_dim: int

    def share(self, model: Any) -> None:
        """Takes the model's embedding table, and its output projection, for its own; only now can it run."""
        ...

    def kv_specs(self) -> tuple[KVSpec, ...]:
        """One a layer that keeps K and V."""
        ...

    def hear(self, heard_TH: jax.Array) -> jax.Array:
        """hidden_TD of the model's hidden states, all that were tapped side by side."""
        ...

    def forward(self, step: Step, cache: KVCache, hidden_TD: jax.Array) -> Said:
        """Each token behind the position whose hidden states it is given."""
        ...

    def logits(self, hidden_RD: jax.Array) -> jax.Array:
        """logits_RV, float32, over the model's vocabulary."""
        ...

    def recipes(self) -> Recipes:
        """How every parameter of its own is made, by its path."""
        ...
