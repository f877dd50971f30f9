"""The token table."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from models.layers.build import Build, weight
from models.recipes import Recipes, one
from ops.linear import embed, linear


class Embedding(nnx.Module):
    """The token table [V, D]; with tied embeddings also the output projection."""

    def __init__(self, rows: int, width: int, build: Build):
        self.weight = weight((rows, width), build.dtype, (build.axis("vocab", rows), "embed"))

    def __call__(self, tokens_T: jax.Array, dtype: Any) -> jax.Array:
        return embed(self.weight.get_value(), tokens_T, dtype)

    def logits(self, hidden_RD: jax.Array) -> jax.Array:
        """hidden · table: float32 logits_RV."""
        return linear(hidden_RD, self.weight.get_value(), out_dtype=jnp.float32)

    def recipes(self, name: str) -> Recipes:
        return {"weight": one(f"{name}.weight", *self.weight.shape)}
