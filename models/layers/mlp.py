"""Dense feed-forward blocks."""

from __future__ import annotations

import jax
from flax import nnx

from models.api import Step
from models.config import ModelConfig
from models.layers.build import Build, child_recipes
from models.layers.linear import Linear
from models.layers.norms import Norm, taken
from models.recipes import Recipes, deal, pieces, under
from ops.linear import gated_mlp, mlp


class MLP(nnx.Module):
    """down(act(up(x))), both with biases where the configuration says so.

    Args:
        names: of the two projections in checkpoints.
    """

    def __init__(self, config: ModelConfig, build: Build, names: tuple[str, str] = ("c_fc", "c_proj")):
        axis = build.axis("ffw", config.ffw_dim)
        self.names, self.activation = names, config.activation
        self.up = Linear(config.embed_dim, config.ffw_dim, build, (axis, "embed"), bias=config.mlp_bias)
        self.down = Linear(config.ffw_dim, config.embed_dim, build, ("embed", axis), bias=config.mlp_bias)

    def __call__(
        self, x_TD: jax.Array, step: Step, norm: Norm | None = None, residual_TD: jax.Array | None = None
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """mlp(norm(x)) + residual, and the experts visited: none."""
        return mlp_of(self.up, self.down, self.activation, x_TD, norm, residual_TD, step.adapter_T), ()

    def recipes(self, name: str) -> Recipes:
        up, down = self.names
        return child_recipes(self, {"up": up, "down": down}, name)


def mlp_of(
    up: Linear,
    down: Linear,
    activation: str,
    x_TD: jax.Array,
    norm: Norm | None = None,
    residual_TD: jax.Array | None = None,
    adapter_T: jax.Array | None = None,
) -> jax.Array:
    """down(act(up(norm(x)))) + residual."""
    return mlp(
        x_TD,
        up.weight.get_value(),
        down.weight.get_value(),
        activation,
        up_bias_F=up.bias_value(),
        down_bias_D=down.bias_value(),
        norm=taken(norm),
        residual_TD=residual_TD,
        adapters=(up.adapters(adapter_T), down.adapters(adapter_T)),
    )


class GatedMLP(nnx.Module):
    """down(act(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202).

    gate and up are one projection with rows [S, 2, F / S], S the number of `model` shards: each device's piece is
    then its part of the gate followed by the same part of up.
    """

    def __init__(self, config: ModelConfig, build: Build, ffw_dim: int | None = None):
        D, F = config.embed_dim, ffw_dim or config.ffw_dim
        axis = build.axis("ffw", F)
        self.shards = build.shards("ffw", F)
        self.activation = config.activation
        layout = {"gate_shards": (0, self.shards)}
        self.gate_up = Linear(D, 2 * F, build, (axis, "embed"), bias=config.mlp_bias, **layout)
        self.down = Linear(F, D, build, ("embed", axis), bias=config.mlp_bias)

    def __call__(
        self, x_TD: jax.Array, step: Step | None, norm: Norm | None = None, residual_TD: jax.Array | None = None
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """mlp(norm(x)) + residual, and the experts visited: none. Encoders have no step."""
        adapter_T = None if step is None else step.adapter_T
        y_TD = gated_mlp(
            x_TD,
            self.gate_up.weight.get_value(),
            self.down.weight.get_value(),
            self.activation,
            gate_up_bias=self.gate_up.bias_value(),
            down_bias_D=self.down.bias_value(),
            norm=taken(norm),
            residual_TD=residual_TD,
            shards=self.shards,
            adapters=(self.gate_up.adapters(adapter_T), self.down.adapters(adapter_T)),
        )
        return y_TD, ()

    def recipes(self, name: str) -> Recipes:
        F, D = self.down.weight.shape[1], self.down.weight.shape[0]
        sources = (f"{name}.gate_proj", f"{name}.up_proj")
        weights = pieces([f"{s}.weight" for s in sources], (F, D), (F, D))
        recipes = {"gate_up.weight": deal(self.shards, *weights)}
        if self.gate_up.bias is not None:
            biases = pieces([f"{s}.bias" for s in sources], (F,), (F,))
            recipes["gate_up.bias"] = deal(self.shards, *biases)
        return recipes | under("down", self.down.recipes(f"{name}.down_proj"))
