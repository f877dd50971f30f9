"""Mamba-2 (Dao & Gu 2024, arXiv:2405.21060): a matrix a head that decays by a step size of the token's own choosing."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from models.api import StateSpec, Step
from models.config import ModelConfig
from models.layers.build import Build, weight
from models.layers.delta_net import rate_of, taps_of
from models.layers.linear import Linear
from models.layers.norms import Norm
from models.mixers import Mamba2
from models.recipes import Computed, Recipe, Recipes, deal, one, split, under
from ops.norm import rms_norm
from ops.recurrent import matrix_recurrence, short_conv


class Mamba2Mixer(nnx.Module):
    """Convolution over x, B and C, the recurrence, a gate and a norm.

    Rows of the projection are laid out per group: the gate z and the x of its heads, then its B and C; channels of the
    convolution are its x, B and C. So what `model` cuts are whole groups with their states; with fewer groups than devices each
    device computes them all.
    """

    def __init__(self, config: ModelConfig, mixer: Mamba2, build: Build):
        self.mixer, self.eps = mixer, config.norm_eps
        G, N, H, D = mixer.groups, mixer.state_dim, mixer.heads, config.embed_dim
        I = H * mixer.head_dim
        axis = build.axis("heads", G)
        self.placement = (build.mesh, build.rules.mesh_axis(axis))
        self.inputs = Linear(D, 2 * I + 2 * G * N, build, (axis, "embed"), bias=mixer.bias)
        self.gates = Linear(D, H, build, (axis, "embed"), bias=mixer.bias)  # step sizes
        self.kernel = weight((mixer.conv_width, I + 2 * G * N), jnp.float32, (None, axis))
        self.kernel_bias = weight((I + 2 * G * N,), jnp.float32, (axis,)) if mixer.conv_bias else None
        self.rate = weight((H,), jnp.float32, (axis,))  # -exp(A_log)
        self.dt_bias = weight((H,), jnp.float32, (axis,))
        self.skip = weight((H,), jnp.float32, (axis,))
        self.norm_scale = weight((I,), jnp.float32, (axis,)) if mixer.norm else None
        self.out = Linear(I, D, build, ("embed", axis), bias=mixer.bias)

    @property
    def state_specs(self) -> tuple[StateSpec, ...]:
        """What it keeps of a sequence."""
        m, (_, axis) = self.mixer, self.placement
        channels = m.heads * m.head_dim + 2 * m.groups * m.state_dim
        return (
            StateSpec("conv", (m.conv_width - 1, channels), (None, axis)),
            StateSpec("matrix", (m.heads, m.state_dim, m.head_dim), (axis, None, None)),
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
        G, N, H, P = m.groups, m.state_dim, m.heads, m.head_dim
        of_group = H // G * P
        zxBC_TGc = self.inputs(x_TD, norm=norm, adapter_T=step.adapter_T).reshape(T, G, -1)
        dt_TH = self.gates(x_TD, norm=norm, out_dtype=jnp.float32, adapter_T=step.adapter_T)
        zxBC_TGc, dt_TH = self.scaled(zxBC_TGc, dt_TH)
        dt_TH = jnp.clip(jax.nn.softplus(dt_TH + self.dt_bias[...]), *m.dt_limits)
        bias_C = None if self.kernel_bias is None else self.kernel_bias[...]
        mixed_TC, conv = short_conv(
            zxBC_TGc[:, :, of_group:].reshape(T, -1),
            self.kernel[...],
            bias_C,
            kept["conv"],
            step.recurrent,
            activation=self.mixer.activation,
            mesh=mesh,
            axis=axis,
        )
        x_TGc, B_TGN, C_TGN = jnp.split(mixed_TC.reshape(T, G, -1), [of_group, of_group + N], axis=-1)
        x_THP = x_TGc.reshape(T, H, P)
        out_THP, matrix = matrix_recurrence(
            C_TGN,
            B_TGN,
            x_THP * dt_TH[..., None],
            dt_TH * self.rate[...],
            None,
            kept["matrix"],
            step.recurrent,
            mesh=mesh,
            axis=axis,
        )
        out_TI = (out_THP + self.skip[...][:, None] * x_THP).reshape(T, H * P)
        out_TI = self.gated(out_TI, zxBC_TGc[:, :, :of_group].reshape(T, H * P).astype(jnp.float32)).astype(x_TD.dtype)
        return self.out(out_TI, residual_TO=residual_TD, adapter_T=step.adapter_T), {"conv": conv, "matrix": matrix}

    def scaled(self, zxBC_TGc: jax.Array, dt_TH: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What was projected, as the rest is to see it."""
        return zxBC_TGc, dt_TH

    def gated(self, out_TI: jax.Array, z_TI: jax.Array) -> jax.Array:
        """The result behind its gate and, where there is one, its norm; or before the gate."""
        if self.norm_scale is None:
            return out_TI * jax.nn.silu(z_TI)
        if not self.mixer.norm_before_gate:
            out_TI = out_TI * jax.nn.silu(z_TI)
        grouped = out_TI.reshape(len(out_TI), self.mixer.norm_groups, -1)
        ones = jnp.ones(grouped.shape[-1], jnp.float32)
        out_TI = rms_norm(grouped, ones, self.eps).reshape(out_TI.shape) * self.norm_scale[...]
        return out_TI * jax.nn.silu(z_TI) if self.mixer.norm_before_gate else out_TI

    def recipes(self, name: str) -> Recipes:
        m, D = self.mixer, self.out.weight.shape[0]
        G, N, H = m.groups, m.state_dim, m.heads
        I = H * m.head_dim
        parts = (I, I, G * N, G * N)

        def rows(kind: str, *rest: int) -> tuple[Recipe, Recipe]:
            *grouped, dt = split(one(f"{name}.in_proj.{kind}", sum(parts) + H, *rest), *parts, H)
            return deal(G, *grouped), dt

        taps = deal(G, *split(one(f"{name}.conv1d.weight", sum(parts[1:]), 1, m.conv_width), *parts[1:]))
        recipes: dict[str, Recipe] = {
            "kernel": Computed((taps,), taps_of),
            "rate": one(f"{name}.A_log", H, assemble=rate_of),
            "dt_bias": one(f"{name}.dt_bias", H),
            "skip": one(f"{name}.D", H),
        }
        recipes["inputs.weight"], recipes["gates.weight"] = rows("weight", D)
        if m.bias:
            recipes["inputs.bias"], recipes["gates.bias"] = rows("bias")
        if m.conv_bias:
            recipes["kernel_bias"] = deal(G, *split(one(f"{name}.conv1d.bias", sum(parts[1:])), *parts[1:]))
        if m.norm:
            recipes["norm_scale"] = one(f"{name}.norm.weight", I)
        return recipes | under("out", self.out.recipes(f"{name}.out_proj"))
