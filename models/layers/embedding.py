"""The token table."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from models.layers.build import Build, weight
from models.layers.linear import AdapterStack
from models.recipes import Recipes, one
from ops.linear import embed, linear
from ops.lora import Adapters, add_lora, add_lora_rows


class Embedding(nnx.Module):
    """The token table [V, D]; with tied embeddings also the output projection."""

    def __init__(self, rows: int, width: int, build: Build):
        self.weight = weight((rows, width), build.dtype, (build.axis("vocab", rows), "embed"))
        self.lora: AdapterStack | None = None  # of the rows; see models/adapters/attach.py
        self.head_lora: AdapterStack | None = None  # of the output projection

    def __call__(self, tokens_T: jax.Array, dtype: Any, adapter_T: jax.Array | None = None) -> jax.Array:
        x_TD = embed(self.weight.get_value(), tokens_T, dtype)
        if adapter_T is None or self.lora is None:
            return x_TD
        return add_lora_rows(x_TD, tokens_T, self.lora.get_value(), adapter_T)

    def logits(self, hidden_RD: jax.Array, adapter_R: jax.Array | None = None) -> jax.Array:
        """hidden · table: float32 logits_RV."""
        logits_RV = linear(hidden_RD, self.weight.get_value(), out_dtype=jnp.float32)
        if adapter_R is None or self.head_lora is None:
            return logits_RV
        return add_lora(logits_RV, hidden_RD, Adapters(self.head_lora.get_value(), adapter_R))

    def recipes(self, name: str) -> Recipes:
        return {"weight": one(f"{name}.weight", *self.weight.shape)}
