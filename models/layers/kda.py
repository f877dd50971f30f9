"""Kimi Delta Attention (Kimi Team 2025, arXiv:2510.26692): the gated delta rule with a decay for every channel of a key."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from models.api import StateSpec, Step
from models.config import ModelConfig
from models.layers.build import Build, child_recipes, weight
from models.layers.delta_net import rate_of, taps_of
from models.layers.linear import Linear
from models.layers.norms import Norm, RMSNorm
from models.mixers import KDA
from models.recipes import Computed, Recipe, Recipes, deal, one, pieces
from ops.recurrent import matrix_recurrence, short_conv
from ops.recurrent.gated_delta import unit


class KimiDeltaAttention(nnx.Module):
    """Convolution over q, k and v, the recurrence, a norm over each head, a gate. Rows and channels are laid out per head: its q,
    its k, its v."""

    def __init__(self, config: ModelConfig, mixer: KDA, build: Build):
        self.mixer = mixer
        H, h, D = mixer.heads, mixer.head_dim, config.embed_dim
        axis = build.axis("heads", H)
        self.placement = (build.mesh, build.rules.mesh_axis(axis))
        self.inputs = Linear(D, 3 * H * h, build, (axis, "embed"))
        self.kernel = weight((mixer.conv_width, 3 * H * h), jnp.float32, (None, axis))
        self.decay_narrow = Linear(D, h, build, (None, "embed"))
        self.decay = Linear(h, H * h, build, (axis, None))
        self.dt_bias = weight((H * h,), jnp.float32, (axis,))
        self.rate = weight((H,), jnp.float32, (axis,))  # -exp(A_log)
        self.gates = Linear(D, H, build, (axis, "embed"))  # how far v replaces what k reads
        self.gate_narrow = Linear(D, h, build, (None, "embed"))
        self.gate = Linear(h, H * h, build, (axis, None))
        self.norm = RMSNorm(h, config.norm_eps)
        self.out = Linear(H * h, D, build, ("embed", axis))

    @property
    def state_specs(self) -> tuple[StateSpec, ...]:
        """What it keeps of a sequence."""
        H, h, (_, axis) = self.mixer.heads, self.mixer.head_dim, self.placement
        return (
            StateSpec("conv", (self.mixer.conv_width - 1, 3 * H * h), (None, axis)),
            StateSpec("matrix", (H, h, h), (axis, None, None)),
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
        T, H, h, (mesh, axis) = x_TD.shape[0], self.mixer.heads, self.mixer.head_dim, self.placement
        adapter_T = step.adapter_T
        x_TD = x_TD if norm is None else norm(x_TD)
        qkv_TC, conv = short_conv(
            self.inputs(x_TD, adapter_T=adapter_T),
            self.kernel[...],
            None,
            kept["conv"],
            step.recurrent,
            activation=self.mixer.activation,
            mesh=mesh,
            axis=axis,
        )
        q_THh, k_THh, v_THh = (qkv_TC.reshape(T, H, 3, h)[:, :, part] for part in range(3))
        step_size_TI = self.decay(
            self.decay_narrow(x_TD, adapter_T=adapter_T), out_dtype=jnp.float32, adapter_T=adapter_T
        )
        step_size_THh = jax.nn.softplus(step_size_TI + self.dt_bias[...]).reshape(T, H, h)
        out_THh, matrix = matrix_recurrence(
            unit(q_THh) * h**-0.5,
            unit(k_THh),
            v_THh,
            self.rate[...][:, None] * step_size_THh,
            jax.nn.sigmoid(self.gates(x_TD, out_dtype=jnp.float32, adapter_T=adapter_T)),
            kept["matrix"],
            step.recurrent,
            mesh=mesh,
            axis=axis,
        )
        gate_TI = self.gate(self.gate_narrow(x_TD, adapter_T=adapter_T), out_dtype=jnp.float32, adapter_T=adapter_T)
        out_TI = (self.norm(out_THh).reshape(T, -1) * jax.nn.sigmoid(gate_TI)).astype(x_TD.dtype)
        return self.out(out_TI, residual_TO=residual_TD, adapter_T=adapter_T), {"conv": conv, "matrix": matrix}

    def recipes(self, name: str) -> Recipes:
        H, h, D = self.mixer.heads, self.mixer.head_dim, self.out.weight.shape[0]
        width = self.mixer.conv_width
        inputs = pieces([f"{name}.{part}_proj.weight" for part in "qkv"], *((H * h, D),) * 3)
        taps = pieces([f"{name}.{part}_conv1d.weight" for part in "qkv"], *((H * h, 1, width),) * 3)
        recipes: dict[str, Recipe] = {
            "inputs.weight": deal(H, *inputs),
            "kernel": Computed((deal(H, *taps),), taps_of),
            "rate": one(f"{name}.A_log", 1, 1, H, 1, assemble=rate_of),
            "dt_bias": one(f"{name}.dt_bias", H * h),
        }
        names = {"decay_narrow": "f_a_proj", "decay": "f_b_proj", "gates": "b_proj", "gate_narrow": "g_a_proj"}
        return recipes | child_recipes(self, names | {"gate": "g_b_proj", "norm": "o_norm", "out": "o_proj"}, name)
