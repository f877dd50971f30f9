"""What the engine asks of a model: `forward(step, cache) -> result`, the same for every block and every model.

A field that an engine does not use is None in its steps: it is absent from the programs, not zero in them.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from ops.paged_attention.batch import AttentionBatch, KVSpec
from ops.recurrent.batch import RecurrentBatch

KVCache = tuple[Any, ...]
"""`KVPages` (opaque pytrees owned by ops/paged_attention): one a layer that keeps K and V, or fewer that layers share
(`AttentionBatch.place`). Behind them, where layers keep a state, `ops.recurrent.States`."""


@dataclasses.dataclass(frozen=True)
class StateSpec:
    """One array that a recurrent layer keeps of a sequence, whatever its length. Hashable and static.

    Attributes:
        name: unique in the model: "3.conv".
        shape: of one sequence.
        axes: the mesh axis that splits each of its dimensions; None for none.
        dtype: float32, unless something says that less will do: errors of a state add up over a sequence.
    """

    name: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    dtype: str = "float32"


@functools.partial(jax.tree_util.register_dataclass, data_fields=["rows_ND", "index_T"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Embeddings:
    """Embeddings that stand where the token table's would: of an image's places, say.

    Attributes:
        rows_ND: the embeddings, any float dtype. They are not scaled as the table's rows are. Where a row is several times as wide,
            the rest of it is added to what leaves the first layer, the second, ... (DeepStack, arXiv:2406.04334).
        index_T: int32, which of them is a token's; -1 for its own from the table.
    """

    rows_ND: jax.Array
    index_T: jax.Array

    def placed(self, x_TD: jax.Array) -> jax.Array:
        """x with embeddings in their tokens' places."""
        rows_TD = self.rows_ND[self.index_T, : x_TD.shape[-1]]
        return jnp.where((self.index_T < 0)[:, None], x_TD, rows_TD.astype(x_TD.dtype))

    def added(self, x_TD: jax.Array, layer: int) -> jax.Array:
        """What leaves a layer, with what embeddings add to it."""
        D = x_TD.shape[-1]
        first = D * (layer + 1)
        if first >= self.rows_ND.shape[-1]:
            return x_TD
        rows_TD = self.rows_ND[self.index_T, first : first + D]
        return x_TD + jnp.where((self.index_T < 0)[:, None], 0, rows_TD.astype(x_TD.dtype))


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["store_MW", "row_B", "row_R", "row_N"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Cross:
    """What tokens attend to beside their own sequence: sound, say, that an encoder has read.

    Attributes:
        store_MW: of M such things the keys and values of all layers, as their encoder lays them out.
        row_B, row_R: int32, which of them each decode row's is, and each piece's of a prompt.
        row_N: int32, and each block of Q_BLOCK chunk tokens'.
    """

    store_MW: jax.Array
    row_B: jax.Array
    row_R: jax.Array
    row_N: jax.Array


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "tokens_T", "positions_T", "attention", "embeddings", "adapter_T", "recurrent", "cross", "last_R", "asked_T",
    ],
    meta_fields=["taps"],
)  # fmt: skip
@dataclasses.dataclass(frozen=True)
class Step:
    """What a forward pass computes: T tokens, B decode rows of Q places each and then C chunk tokens, see AttentionBatch.

    Attributes:
        tokens_T: int32 token ids; padding is 0.
        positions_T: int32, the position of each token in its sequence, from 0, which rotates its q and k; padding is 0. [3, T]
            where a position is three numbers (time, height, width).
        attention: which pages hold the tokens' context. With the tables of all groups of layers in what a model is given; a
            layer's step has its own group's.
        embeddings: of tokens that have others than the table's.
        adapter_T: int32, the slot of each token's adapter; 0 for none.
        recurrent: which tokens belong to which state, where layers keep some.
        cross: what layers attend to besides, where some do.
        last_R: int32, of each piece of a prompt how many of its last tokens' hidden states anybody reads; those of the others are
            arbitrary then, but finite. None where all are read.
        asked_T: bool, in steps of layers behind which only some tokens' hidden states matter: which ones.
        taps: static. Layers whose input the result is to hold; the number of layers for what enters the final norm.
    """

    tokens_T: jax.Array
    positions_T: jax.Array
    attention: AttentionBatch
    embeddings: Embeddings | None = None
    adapter_T: jax.Array | None = None
    recurrent: RecurrentBatch | None = None
    cross: Cross | None = None
    last_R: jax.Array | None = None
    asked_T: jax.Array | None = None
    taps: tuple[int, ...] = ()

    def real(self) -> jax.Array | None:
        """bool [T], which tokens are no padding; None where that cannot be told."""
        return self.attention.real()

    def by_group(self) -> tuple[Step, ...]:
        """The step as the layers of each attention group see it."""
        return tuple(
            dataclasses.replace(self, attention=attention, embeddings=None, last_R=None, taps=())
            for attention in self.attention.by_group()
        )

    def at_end(self) -> tuple[Step, ...]:
        """`by_group` for the last layer that keeps anything and those behind it: only tokens whose hidden states are read attend,
        and their rows alone need be right. K and V of all are written."""
        if self.last_R is None or self.taps:
            return self.by_group()
        found: list[Step] = []
        for step in self.by_group():
            attention, asked_T = step.attention.last(self.last_R)
            found.append(dataclasses.replace(step, attention=attention, asked_T=asked_T))
        return tuple(found)

    def asked(self, x_TD: jax.Array) -> jax.Array:
        """x, with zeros for tokens whose hidden states nobody reads from here on: kernels multiply no rows of zeros."""
        return x_TD if self.asked_T is None else jnp.where(self.asked_T[:, None], x_TD, 0)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["hidden_TD", "cache", "taps", "visited"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Result:
    """What a forward pass gives.

    Attributes:
        hidden_TD: after the final norm, in the compute dtype.
        cache: with the tokens' K and V in it.
        taps: x_TD that entered each of `Step.taps`, in that order.
        visited: of each layer with experts, the int32 ids of those that each token visits, [T, k] or [T k, 1].
    """

    hidden_TD: jax.Array
    cache: KVCache
    taps: tuple[jax.Array, ...] = ()
    visited: tuple[jax.Array, ...] = ()


class CausalLM(Protocol):
    """A decoder over a paged KV cache. An `nnx.Module`; the engine splits it once into leaves."""

    config: Any

    @property
    def vocab_size(self) -> int:
        """Rows of the logits, padding included."""
        ...

    def kv_specs(self) -> tuple[KVSpec, ...]:
        """One a layer that keeps K and V."""
        ...

    def state_specs(self) -> tuple[StateSpec, ...]:
        """What recurrent layers keep, all together; () for a model without any."""
        ...

    def forward(self, step: Step, cache: KVCache) -> Result:
        """Runs every layer; writes the tokens' K and V to their pages before attending, and what became of their states."""
        ...

    def logits(self, hidden_RD: jax.Array, adapter_R: jax.Array | None = None) -> jax.Array:
        """Next-token logits_RV, float32, soft-capped and scaled where the architecture says so.

        Args:
            adapter_R: int32, the slot of each row's adapter; only where some of them change the output projection.
        """
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


class ImageEncoder(Protocol):
    """A tower: one image's patches in, embeddings for a decoder's places out."""

    config: Any

    def encode(self, patches_PX: jax.Array, place_P2: jax.Array, count: jax.Array) -> jax.Array:
        """rows_NM: N = P / merge**2 embeddings, those of the real patches first; the rest is arbitrary.

        Args:
            patches_PX: float32, as the family's processor lays them out; padding behind the real ones.
            place_P2: int32, row and column of each in its image's grid.
            count: int32 scalar, how many are real.
        """
        ...


class Classifier(Encoder, Protocol):
    """An encoder that tells labels of a text, or of two that it reads as one; `models.label_head` makes probabilities of them. With
    one label it is a reranker: that says how well the two fit."""

    def classify(self, hidden_BSD: jax.Array, length_B: jax.Array) -> jax.Array:
        """logit_BL float32 of B texts of length_B tokens, from what `encode` gave."""
        ...
