"""Per-layer embeddings (Gemma 3n and 4): a small embedding of each token for each layer, which it mixes in at its end."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from models.config import ModelConfig
from models.layers.build import Build, child_recipes
from models.layers.embedding import Embedding
from models.layers.linear import Linear
from models.layers.norms import RMSNorm
from models.recipes import Recipes
from ops.activation import activation


class PerLayerEmbeddings(nnx.Module):
    """(norm(project(x)) + table[token]) / sqrt(2), P numbers a layer.

    Args:
        rows: of the table; tokens behind them have the first one's.
        width: P.
    """

    def __init__(self, config: ModelConfig, build: Build, rows: int, width: int):
        self.rows, self.shape = rows, (config.num_layers, width)
        self.scales = config.embed_dim**-0.5, width**0.5
        self.table = Embedding(rows, config.num_layers * width, build)
        self.project = Linear(config.embed_dim, config.num_layers * width, build, (None, "embed"))
        self.norm = RMSNorm(width, config.norm_eps)

    def __call__(
        self, tokens_T: jax.Array, x_TD: jax.Array, adapter_T: jax.Array | None = None
    ) -> tuple[jax.Array, ...]:
        """Of each layer its P numbers a token. `x_TD`: scaled embeddings, as they enter the first layer."""
        of_x, of_token = self.scales
        known_T = jnp.where(tokens_T < self.rows, tokens_T, 0)
        own_TLP = self.table(known_T, x_TD.dtype, adapter_T).reshape(-1, *self.shape) * of_token
        projected_TLP = (self.project(x_TD, adapter_T=adapter_T) * of_x).reshape(-1, *self.shape)
        mixed_TLP = (self.norm(projected_TLP) + own_TLP) * 2.0**-0.5
        return tuple(mixed_TLP[:, layer] for layer in range(self.shape[0]))

    def recipes(self, name: str) -> Recipes:
        names = {"table": "embed_tokens_per_layer", "project": "per_layer_model_projection"}
        return child_recipes(self, names | {"norm": "per_layer_projection_norm"}, name)


class PerLayerMix(nnx.Module):
    """norm(out(act(gate(x)) * p)): what a layer makes of its own embedding p of each token."""

    def __init__(self, config: ModelConfig, build: Build, width: int):
        self.activation = config.activation
        self.gate = Linear(config.embed_dim, width, build, (None, "embed"))
        self.out = Linear(width, config.embed_dim, build, ("embed", None))
        self.norm = RMSNorm(config.embed_dim, config.norm_eps)

    def __call__(self, x_TD: jax.Array, own_TP: jax.Array, adapter_T: jax.Array | None = None) -> jax.Array:
        hidden_TP = activation(self.activation)(self.gate(x_TD, adapter_T=adapter_T)) * own_TP
        return self.norm(self.out(hidden_TP, adapter_T=adapter_T))

    def recipes(self, name: str) -> Recipes:
        names = {"gate": "per_layer_input_gate", "out": "per_layer_projection", "norm": "post_per_layer_input_norm"}
        return child_recipes(self, names, name)
