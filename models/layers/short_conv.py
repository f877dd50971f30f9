"""A short convolution between two gates (Liquid AI 2025, LFM2)."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from models.api import StateSpec, Step
from models.config import ModelConfig
from models.layers.build import Build, weight
from models.layers.delta_net import taps_of
from models.layers.linear import Linear
from models.layers.norms import Norm
from models.mixers import ShortConv
from models.recipes import Computed, Recipe, Recipes, deal, one, split, under
from ops.recurrent import short_conv


class GatedShortConv(nnx.Module):
    """out(C * conv(B * x)). B, C and x are one projection with rows [S, 3, D / S], S the number of `model` shards."""

    def __init__(self, config: ModelConfig, mixer: ShortConv, build: Build):
        self.mixer, D = mixer, config.embed_dim
        axis = build.axis("ffw", D)
        self.shards, self.placement = build.shards("ffw", D), (build.mesh, build.rules.mesh_axis(axis))
        self.inputs = Linear(D, 3 * D, build, (axis, "embed"), bias=mixer.bias)
        self.kernel = weight((mixer.width, D), jnp.float32, (None, axis))
        self.kernel_bias = weight((D,), jnp.float32, (axis,)) if mixer.bias else None
        self.out = Linear(D, D, build, ("embed", axis), bias=mixer.bias)

    @property
    def state_specs(self) -> tuple[StateSpec, ...]:
        """What it keeps of a sequence."""
        return (StateSpec("conv", (self.mixer.width - 1, self.out.weight.shape[0]), (None, self.placement[1])),)

    def __call__(
        self,
        x_TD: jax.Array,
        step: Step,
        kept: Mapping[str, jax.Array],
        norm: Norm | None = None,
        residual_TD: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """mixer(norm(x)) + residual, and the layer's state behind this step."""
        assert step.recurrent is not None, "a step says which states its tokens belong to"
        T, (mesh, axis) = x_TD.shape[0], self.placement
        BCx = self.inputs(x_TD, norm=norm, adapter_T=step.adapter_T).reshape(T, self.shards, 3, -1)
        B_TD, C_TD, inner_TD = (BCx[:, :, part].reshape(T, -1) for part in range(3))
        bias_D = None if self.kernel_bias is None else self.kernel_bias[...]
        mixed_TD, conv = short_conv(
            B_TD * inner_TD,
            self.kernel[...],
            bias_D,
            kept["conv"],
            step.recurrent,
            activation=None,
            mesh=mesh,
            axis=axis,
        )
        out_TD = C_TD * mixed_TD.astype(x_TD.dtype)
        return self.out(out_TD, residual_TO=residual_TD, adapter_T=step.adapter_T), {"conv": conv}

    def recipes(self, name: str) -> Recipes:
        D = self.out.weight.shape[0]
        recipes: dict[str, Recipe] = {
            "inputs.weight": deal(self.shards, *split(one(f"{name}.in_proj.weight", 3 * D, D), D, D, D)),
            "kernel": Computed((one(f"{name}.conv.weight", D, 1, self.mixer.width),), taps_of),
        }
        if self.mixer.bias:
            recipes["inputs.bias"] = deal(self.shards, *split(one(f"{name}.in_proj.bias", 3 * D), D, D, D))
            recipes["kernel_bias"] = one(f"{name}.conv.bias", D)
        return recipes | under("out", self.out.recipes(f"{name}.out_proj"))
