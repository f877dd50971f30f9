"""Latent attention to what a lightning indexer chooses (DeepSeek-AI 2025, DeepSeek-V3.2), in layers that choose and in layers that
take over what one before them chose (Z.ai 2026, GLM-5)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from models.api import Step
from models.config import ModelConfig
from models.layers.build import Build, child_recipes, weight
from models.layers.linear import Linear
from models.layers.mla import LatentAttention
from models.layers.norms import LayerNorm
from models.layers.rotary import layer_frequencies
from models.recipes import Recipes, one, under
from ops.paged_attention import indexed
from ops.paged_attention.batch import KVSpec
from ops.rope import rope

NORM_EPS = 1e-6  # of the keys' norm; the published models do not take it from the configuration


@dataclasses.dataclass(frozen=True)
class Indexing:
    """Hashable numbers of a model's indexers.

    Attributes:
        heads, head_dim: of the index queries; keys have one head.
        topk: how many positions a query attends to at most.
        interleaved: how the first channels of queries and keys are paired for rotating, as many as the latent's key has.
        chooses: which layers have an indexer; the others attend to what the last such layer before them chose.
    """

    heads: int
    head_dim: int
    topk: int
    interleaved: bool
    chooses: tuple[bool, ...]

    def __post_init__(self) -> None:
        for name in ("heads", "head_dim", "topk"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(
                    f"the model's configuration has {value!r} as {name} of its indexer; it must be a whole number from 1."
                )
        if not self.chooses[0]:
            raise ValueError(
                "the model's configuration says that its first layer attends to what a layer before it chose."
            )


class Indexer(nnx.Module):
    """Small queries and keys, and how much each head counts."""

    def __init__(self, config: ModelConfig, indexing: Indexing, build: Build):
        assert config.mla is not None and config.mla.q_rank is not None
        D, H = config.embed_dim, indexing.heads
        self.indexing, self.rope = indexing, (config.rope, build.max_model_len)
        self.q = Linear(config.mla.q_rank, H * indexing.head_dim, build, (None, None))
        self.k = Linear(D, indexing.head_dim, build, (None, "embed"))
        self.k_norm = LayerNorm(indexing.head_dim, NORM_EPS)
        self.weights = weight((H, D), jnp.float32, (None, "embed"))  # never narrow: it decides between positions

    def query(self, compressed_TC: jax.Array, step: Step) -> jax.Array:
        q = self.q(compressed_TC, adapter_T=step.adapter_T)
        return self._rotated(q.reshape(len(q), self.indexing.heads, -1), step)

    def key(self, x_TD: jax.Array, step: Step) -> jax.Array:
        return self._rotated(self.k_norm(self.k(x_TD, adapter_T=step.adapter_T))[:, None], step)[:, 0]

    def weight(self, x_TD: jax.Array) -> jax.Array:
        """What each head counts, the scale of its scores included."""
        scale = (self.indexing.heads * self.indexing.head_dim) ** -0.5
        x_TD = x_TD.astype(jnp.float32)
        return scale * jnp.einsum("td,hd->th", x_TD, self.weights[...], precision=jax.lax.Precision.HIGHEST)

    def _rotated(self, x_THi: jax.Array, step: Step) -> jax.Array:
        rotary, max_model_len = self.rope
        assert rotary is not None
        angles = layer_frequencies(rotary, max_model_len)
        return rope(x_THi, step.positions_T, *angles, interleaved=self.indexing.interleaved)

    def recipes(self, name: str) -> Recipes:
        recipes = child_recipes(self, {"q": "wq_b", "k": "wk", "k_norm": "k_norm"}, name)
        return recipes | {"weights": one(f"{name}.weights_proj.weight", *self.weights.shape)}


class IndexedLatentAttention(LatentAttention):
    """`LatentAttention` to the positions that its indexer, or that of a layer before it, chooses."""

    def __init__(self, config: ModelConfig, layer: int, build: Build, indexing: Indexing):
        super().__init__(config, layer, build)
        self.topk = indexing.topk
        self.indexer = Indexer(config, indexing, build) if indexing.chooses[layer] else None

    def __call__(
        self,
        x_TD: jax.Array,
        step: Step,
        kv: Any,
        norm: Any = None,
        residual_TD: jax.Array | None = None,
        chosen_TX: jax.Array | None = None,
    ) -> tuple[jax.Array, Any, jax.Array | None]:
        """As `Attention`, and the positions that were attended to, for layers without an indexer: see `indexed.choose`."""
        x_TD = x_TD if norm is None else norm(x_TD)
        compressed_TC, batch = self.compressed(x_TD, step), step.attention
        key_Ti = None if self.indexer is None else self.indexer.key(x_TD, step)
        kv = indexed.write(kv, self.latent(x_TD, step), key_Ti, batch)
        if self.indexer is not None:
            query_THi = self.indexer.query(compressed_TC, step)
            chosen_TX = indexed.choose(query_THi, self.indexer.weight(x_TD), kv, batch, self.topk)
        out_THh = indexed.attend_chosen(self.query(compressed_TC, step), kv, batch, chosen_TX, scale=self.scale)
        return self.result(out_THh, step, residual_TD), kv, chosen_TX

    @property
    def kv_spec(self) -> KVSpec:
        index_dim = None if self.indexer is None else self.indexer.indexing.head_dim
        return indexed.latent_spec(self.mla.kv_rank + self.mla.rope_dim, index_dim)

    def recipes(self, name: str) -> Recipes:
        recipes = super().recipes(name)
        return recipes if self.indexer is None else recipes | under("indexer", self.indexer.recipes(f"{name}.indexer"))
