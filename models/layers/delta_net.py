"""Gated DeltaNet (Yang et al. 2024, arXiv:2412.06464): a matrix a head that decays and is corrected where a key reads it."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.api import StateSpec, Step
from models.config import ModelConfig
from models.layers.build import Build, weight
from models.layers.linear import Linear
from models.layers.norms import Norm, RMSNorm
from models.mixers import DeltaNet
from models.recipes import Computed, Recipe, Recipes, deal, one, pieces, split, under
from ops.recurrent.gated_delta import DeltaWeights, gated_delta


class GatedDeltaNet(nnx.Module):
    """Convolution over q, k and v, the gated delta rule, a norm over each head, a gate.

    Rows of the projection and channels of the convolution are laid out per key head: its q, its k, then v and the gate z of the
    G value heads that read it. So what `model` cuts are whole heads with their states.

    Args:
        fused: the checkpoint has q, k, v and z in one tensor, laid out so (Qwen3-Next); else q, k and v one behind the other,
            and z, b and a each in one of its own (Qwen3.5).

    Attributes:
        reach: how far v may replace what k reads: 1, or 2, where it may turn it over (Grazzi et al. 2024, arXiv:2411.12537).
    """

    reach = 1.0

    def __init__(self, config: ModelConfig, mixer: DeltaNet, build: Build, fused: bool = False):
        self.mixer, self.fused = mixer, fused
        K, H, n, p, D = mixer.key_heads, mixer.value_heads, mixer.key_dim, mixer.value_dim, config.embed_dim
        axis = build.axis("heads", K)
        self.placement = (build.mesh, build.rules.mesh_axis(axis))
        self.inputs = Linear(D, 2 * K * n + 2 * H * p, build, (axis, "embed"))
        self.gates = Linear(
            D, 2 * H, build, (axis, "embed")
        )  # [K, 2, G]: how far v replaces, how fast the state decays
        self.kernel = weight((mixer.conv_width, 2 * K * n + H * p), jnp.float32, (None, axis))
        self.rate = weight((H,), jnp.float32, (axis,))  # -exp(A_log)
        self.dt_bias = weight((H,), jnp.float32, (axis,))
        self.norm = RMSNorm(p, config.norm_eps)
        self.out = Linear(H * p, D, build, ("embed", axis))

    @property
    def state_specs(self) -> tuple[StateSpec, ...]:
        """What it keeps of a sequence."""
        m, (_, axis) = self.mixer, self.placement
        channels = 2 * m.key_heads * m.key_dim + m.value_heads * m.value_dim
        return (
            StateSpec("conv", (m.conv_width - 1, channels), (None, axis)),
            StateSpec("matrix", (m.value_heads, m.key_dim, m.value_dim), (axis, None, None)),
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
        mesh, axis = self.placement
        out_TO, conv, matrix = gated_delta(
            self.inputs(x_TD, norm=norm, adapter_T=step.adapter_T),
            self.gates(x_TD, norm=norm, out_dtype=jnp.float32, adapter_T=step.adapter_T),
            DeltaWeights(
                self.kernel[...],
                self.rate[...],
                self.dt_bias[...],
                self.norm.scale[...],
                self.norm.eps,
                self.reach,
                self.mixer.activation,
            ),
            kept["conv"],
            kept["matrix"],
            step.recurrent,
            key_heads=self.mixer.key_heads,
            mesh=mesh,
            axis=axis,
        )
        out_TD = self.out(out_TO, residual_TO=residual_TD, adapter_T=step.adapter_T)
        return out_TD, {"conv": conv, "matrix": matrix}

    def recipes(self, name: str) -> Recipes:
        m, D = self.mixer, self.out.weight.shape[0]
        K, H, n, p = m.key_heads, m.value_heads, m.key_dim, m.value_dim
        parts = (K * n, K * n, H * p)
        channels = sum(parts)
        if self.fused:
            inputs = one(f"{name}.in_proj_qkvz.weight", channels + H * p, D)
            gates = one(f"{name}.in_proj_ba.weight", 2 * H, D)
        else:
            qkv, z = pieces([f"{name}.in_proj_{x}.weight" for x in ("qkv", "z")], (channels, D), (H * p, D))
            inputs = deal(K, *split(qkv, *parts), z)
            gates = deal(K, *pieces([f"{name}.in_proj_{x}.weight" for x in "ba"], (H, D), (H, D)))
        taps = deal(K, *split(one(f"{name}.conv1d.weight", channels, 1, m.conv_width), *parts))
        recipes: dict[str, Recipe] = {
            "inputs.weight": inputs,
            "gates.weight": gates,
            "kernel": Computed((taps,), taps_of),
            "rate": one(f"{name}.A_log", H, assemble=rate_of),
            "dt_bias": one(f"{name}.dt_bias", H),
        }
        recipes |= under("norm", self.norm.recipes(f"{name}.norm"))
        return recipes | under("out", self.out.recipes(f"{name}.out_proj"))


def taps_of(stored: np.ndarray) -> np.ndarray:
    """[channels, 1, W] to [W, channels]."""
    return np.ascontiguousarray(stored.reshape(len(stored), -1).T)


def rate_of(stored: np.ndarray) -> np.ndarray:
    return -np.exp(stored.astype(np.float32))
