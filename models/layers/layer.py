"""The block that most decoders repeat."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
from flax import nnx

from models.api import Step
from models.config import ModelConfig
from models.layers.attention import attention_of
from models.layers.build import Build, child_recipes
from models.layers.mlp import GatedMLP
from models.layers.norms import RMSNorm
from models.recipes import Recipes


class Layer(nnx.Module):
    """The pre-norm block: x + attn(norm(x)), then x + mlp(norm(x))."""

    names: ClassVar[dict[str, str]] = {
        "attn_norm": "input_layernorm",
        "attn": "self_attn",
        "mlp_norm": "post_attention_layernorm",
        "mlp": "mlp",
    }

    def __init__(self, config: ModelConfig, index: int, build: Build):
        self.attn_norm = self.make_norm(config)
        self.attn = self.make_attention(config, index, build)
        self.mlp_norm = self.make_norm(config)
        self.mlp = self.make_mlp(config, index, build)

    def make_norm(self, config: ModelConfig) -> Any:
        return RMSNorm(config.embed_dim, config.norm_eps, config.norm_offset)

    def make_attention(self, config: ModelConfig, index: int, build: Build) -> Any:
        return attention_of(config, index, build)

    def make_mlp(self, config: ModelConfig, index: int, build: Build) -> Any:
        return GatedMLP(config, build)

    def __call__(self, x_TD: jax.Array, step: Step, kv: Any) -> tuple[jax.Array, Any, tuple[jax.Array, ...]]:
        """x, what the layer keeps, and the experts that each token visited where it has some (see `Result.visited`)."""
        x_TD, kv = self.attn(x_TD, step, kv, norm=self.attn_norm, residual_TD=x_TD)
        x_TD = step.asked(x_TD)
        x_TD, visited = self.mlp(x_TD, step, norm=self.mlp_norm, residual_TD=x_TD)
        return x_TD, kv, visited

    def recipes(self, name: str) -> Recipes:
        return child_recipes(self, self.names, name)
