"""What the engine asks of a model."""

from __future__ import annotations

from typing import Any, Protocol

import jax

from ops.paged_attention.batch import AttentionBatch, KVSpec

KVCache = tuple[Any, ...]
"""`KVPages` (opaque pytrees owned by ops/paged_attention): one a layer, or fewer that layers share
(`AttentionBatch.place`)."""


class CausalLM(Protocol):
    """A decoder over a paged KV cache. An `nnx.Module`; the engine splits it once into leaves."""

    config: Any

    @property
    def vocab_size(self) -> int:
        """Rows of the logits, padding included."""
        ...

    def kv_specs(self) -> tuple[KVSpec, ...]:
        """One a layer."""
        ...

    def forward(self, tokens_T: jax.Array, batch: AttentionBatch, kv: KVCache) -> tuple[jax.Array, KVCache]:
        """Runs every layer; writes the tokens' K and V to their pages before attending.

        Args:
            tokens_T: int32 token ids; padding is 0.
            batch: with the page tables of all groups of layers; `by_group` and `place` say which are a layer's.
        Returns:
            hidden_TD after the final norm, in the compute dtype, and the updated cache.
        """
        ...

    def logits(self, hidden_RD: jax.Array) -> jax.Array:
        """Next-token logits_RV, float32, soft-capped and scaled where the architecture says so."""
        ...


class Encoder(Protocol):
    """A model that turns texts into hidden states, all tokens seeing each other; `models.pooling` makes vectors of them."""

    config: Any

    @property
    def vocab_size(self) -> int:
        """Rows of the token table."""
        ...

    def encode(self, tokens_BS: jax.Array, length_B: jax.Array, segments_BS: jax.Array | None = None) -> jax.Array:
        """hidden_BSD of B texts of length_B tokens, padded behind their ends (arbitrary there)."""
        ...


class CrossEncoder(Encoder, Protocol):
    """An encoder that reads two texts as one sequence and says how well they fit."""

    def score(self, hidden_BSD: jax.Array, length_B: jax.Array) -> jax.Array:
        """score_B float32 of B pairs of length_B tokens, from what `encode` gave."""
        ...
