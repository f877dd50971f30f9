"""Mamba (Gu & Dao 2023, arXiv:2312.00752): every channel has a state of its own, and step sizes of the token's choosing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.api import StateSpec, Step
from models.config import ModelConfig
from models.layers.build import Build, weight
from models.layers.delta_net import taps_of
from models.layers.linear import Linear
from models.layers.norms import Norm, RMSNorm
from models.mixers import Mamba1
from models.recipes import Computed, Recipes, deal, one, split, under
from ops.norm import rms_norm
from ops.recurrent import selective_scan, short_conv


class Mamba1Mixer(nnx.Module):
    """Convolution over x, the scan, a gate. x and the gate are one projection with rows [S, 2, I / S], S the number of `model`
    shards, which cut the channels."""

    def __init__(self, config: ModelConfig, mixer: Mamba1, build: Build):
        self.mixer = mixer
        D, I, N, R = config.embed_dim, mixer.inner, mixer.state_dim, mixer.rank
        axis = build.axis("ffw", I)
        self.shards, self.placement = build.shards("ffw", I), (build.mesh, build.rules.mesh_axis(axis))
        self.inputs = Linear(D, 2 * I, build, (axis, "embed"), bias=mixer.bias)
        self.kernel = weight((mixer.conv_width, I), jnp.float32, (None, axis))
        self.kernel_bias = weight((I,), jnp.float32, (axis,)) if mixer.conv_bias else None
        self.choices = Linear(I, R + 2 * N, build, ("embed", axis))  # step sizes, B and C
        self.gates = Linear(R, I, build, (axis, "embed"), bias=True)  # step sizes of channels
        self.rate = weight((N, I), jnp.float32, (None, axis))  # -exp(A_log)
        self.skip = weight((I,), jnp.float32, (axis,))
        norms: list[Any] = []
        if mixer.norms == "scaled":
            norms = [RMSNorm(width, mixer.norm_eps) for width in (R, N, N)]
        self.norms: Any = nnx.List(norms)
        self.out = Linear(I, D, build, ("embed", axis), bias=mixer.bias)

    @property
    def state_specs(self) -> tuple[StateSpec, ...]:
        """What it keeps of a sequence."""
        m, (_, axis) = self.mixer, self.placement
        return (
            StateSpec("conv", (m.conv_width - 1, m.inner), (None, axis)),
            StateSpec("scan", (m.state_dim, m.inner), (None, axis)),
        )

    def __call__(
        self,
        x_TD: jax.Array,
        step: Step,
        kept: Mapping[str, jax.Array],
        norm: Norm | None = None,
        residual_TD: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """mixer(norm(x)) + residual, and the layer's states behind this step."""
        assert step.recurrent is not None, "a step says which states its tokens belong to"
        m, T, (mesh, axis) = self.mixer, x_TD.shape[0], self.placement
        xz = self.inputs(x_TD, norm=norm, adapter_T=step.adapter_T).reshape(T, self.shards, 2, -1)
        x_TI, z_TI = (xz[:, :, part].reshape(T, -1) for part in range(2))
        bias_I = None if self.kernel_bias is None else self.kernel_bias[...]
        x_TI, conv = short_conv(
            x_TI,
            self.kernel[...],
            bias_I,
            kept["conv"],
            step.recurrent,
            activation=m.activation,
            mesh=mesh,
            axis=axis,
        )
        chosen = self.choices(x_TI, out_dtype=jnp.float32, adapter_T=step.adapter_T)
        parts = self.normed(jnp.split(chosen, [m.rank, m.rank + m.state_dim], axis=-1))
        dt_TI = jax.nn.softplus(self.gates(parts[0], out_dtype=jnp.float32, adapter_T=step.adapter_T))
        y_TI, scan = selective_scan(
            x_TI, dt_TI, self.rate[...], parts[1], parts[2], kept["scan"], step.recurrent, mesh=mesh, axis=axis
        )
        y_TI = (y_TI + self.skip[...] * x_TI) * jax.nn.silu(z_TI.astype(jnp.float32))
        out_TD = self.out(y_TI.astype(x_TD.dtype), residual_TO=residual_TD, adapter_T=step.adapter_T)
        return out_TD, {"conv": conv, "scan": scan}

    def normed(self, parts: list[jax.Array]) -> list[jax.Array]:
        """Step sizes, B and C, normalized where the model does that."""
        if self.mixer.norms == "scaled":
            return [norm(part) for norm, part in zip(self.norms, parts, strict=True)]
        if self.mixer.norms == "plain":
            return [rms_norm(part, jnp.ones(part.shape[-1], jnp.float32), self.mixer.norm_eps) for part in parts]
        return parts

    def recipes(self, name: str) -> Recipes:
        m, I = self.mixer, self.mixer.inner
        D = self.out.weight.shape[0]
        recipes: Recipes = {
            "inputs.weight": deal(self.shards, *split(one(f"{name}.in_proj.weight", 2 * I, D), I, I)),
            "kernel": Computed((one(f"{name}.conv1d.weight", I, 1, m.conv_width),), taps_of),
            "rate": one(f"{name}.A_log", I, m.state_dim, assemble=rates_of),
            "skip": one(f"{name}.D", I),
        }
        if m.bias:
            recipes["inputs.bias"] = deal(self.shards, *split(one(f"{name}.in_proj.bias", 2 * I), I, I))
        if m.conv_bias:
            recipes["kernel_bias"] = one(f"{name}.conv1d.bias", I)
        for index, norm in enumerate(self.norms):
            recipes |= under(f"norms.{index}", norm.recipes(f"{name}.{['dt', 'b', 'c'][index]}_layernorm"))
        for child, theirs in (("choices", "x_proj"), ("gates", "dt_proj"), ("out", "out_proj")):
            recipes |= under(child, getattr(self, child).recipes(f"{name}.{theirs}"))
        return recipes


def rates_of(stored: np.ndarray) -> np.ndarray:
    """[N, I], how fast states decay, of the logarithm [I, N] that checkpoints have."""
    return -np.exp(stored.astype(np.float32)).T
