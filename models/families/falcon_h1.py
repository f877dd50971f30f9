"""Falcon-H1 (TII 2025, arXiv:2507.22448): attention and Mamba-2 side by side in every layer, with multipliers everywhere. Bamba
(IBM 2024): one or the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from models.api import StateSpec, Step
from models.config import ModelConfig, from_hf, layer_kinds
from models.decoder import Decoder
from models.family import Family
from models.layers import Build, GatedMLP, Layer
from models.layers.mamba2 import Mamba2Mixer
from models.layers.mixing import mixer_of
from models.layers.norms import Norm
from models.mixers import Mamba2
from models.recipes import Recipes, under
from ops.activation import activation


class FalconMamba2(Mamba2Mixer):
    """Mamba-2 whose projection's parts each have a multiplier.

    Args:
        multipliers: of z, x, B, C and the step sizes.
    """

    def __init__(self, config: ModelConfig, mixer: Mamba2, build: Build, multipliers: tuple[float, ...]):
        super().__init__(config, mixer, build)
        self.multipliers = multipliers

    def scaled(self, zxBC_TGc: jax.Array, dt_TH: jax.Array) -> tuple[jax.Array, jax.Array]:
        z, x, B, C, dt = self.multipliers
        m = self.mixer
        of_group = m.heads // m.groups * m.head_dim
        by_channel = np.repeat(np.array([z, x, B, C], np.float32), [of_group, of_group, m.state_dim, m.state_dim])
        return zxBC_TGc * jnp.asarray(by_channel, zxBC_TGc.dtype), dt_TH * dt


class FalconMLP(GatedMLP):
    """A gated block with a multiplier before its activation and one behind it all."""

    def __init__(self, config: ModelConfig, build: Build):
        super().__init__(config, build)
        self.multipliers = config.get("mlp_multipliers")

    def __call__(
        self, x_TD: jax.Array, step: Step | None, norm: Norm | None = None, residual_TD: jax.Array | None = None
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        adapter_T, (of_gate, of_all) = None if step is None else step.adapter_T, self.multipliers
        both = self.gate_up(x_TD, norm=norm, adapter_T=adapter_T).reshape(len(x_TD), self.shards, 2, -1)
        hidden_TF = (activation(self.activation)(both[:, :, 0] * of_gate) * both[:, :, 1]).reshape(len(x_TD), -1)
        y_TD = self.down(hidden_TF, adapter_T=adapter_T) * of_all
        return (y_TD if residual_TD is None else y_TD + residual_TD), ()


class FalconH1Layer(Layer):
    """x + mamba(s x') m + attention(a x') o, x' = norm(x); then x + mlp(norm(x))."""

    names: ClassVar[dict[str, str]] = {
        "attn_norm": "input_layernorm",
        "attn": "self_attn",
        "mlp_norm": "pre_ff_layernorm",
        "mlp": "feed_forward",
    }

    def __init__(self, config: ModelConfig, index: int, build: Build):
        super().__init__(config, index, build)
        mixer = config.mixers[index]
        assert isinstance(mixer, Mamba2)
        self.mamba = FalconMamba2(config, mixer, build, config.get("mamba_multipliers"))
        self.multipliers = config.get("multipliers")

    def make_mlp(self, config: ModelConfig, index: int, build: Build) -> FalconMLP:
        return FalconMLP(config, build)

    @property
    def state_specs(self) -> tuple[StateSpec, ...]:
        """What it keeps of a sequence besides pages."""
        return self.mamba.state_specs

    def __call__(self, x_TD: jax.Array, step: Step, kv: Any) -> tuple[jax.Array, Any, tuple[jax.Array, ...]]:
        mamba_in, mamba_out, attn_in, attn_out = self.multipliers
        pages, states = kv
        normed_TD = self.attn_norm(x_TD)
        mixed_TD, states = self.mamba(normed_TD * mamba_in, step, states)
        attended_TD, pages = self.attn(normed_TD * attn_in, step, pages)
        x_TD = step.asked(x_TD + mixed_TD * mamba_out + attended_TD * attn_out)
        x_TD, visited = self.mlp(x_TD, step, norm=self.mlp_norm, residual_TD=x_TD)
        return x_TD, (pages, states), visited

    def recipes(self, name: str) -> Recipes:
        return super().recipes(name) | under("mamba", self.mamba.recipes(f"{name}.mamba"))


class BambaLayer(Layer):
    names: ClassVar[dict[str, str]] = FalconH1Layer.names

    def make_attention(self, config: ModelConfig, index: int, build: Build) -> Any:
        return mixer_of(config, index, build)


class BambaMambaLayer(BambaLayer):
    names: ClassVar[dict[str, str]] = BambaLayer.names | {"attn": "mamba"}


class FalconH1(Decoder):
    names: ClassVar[dict[str, str]] = {"embed": "model.embed_tokens", "norm": "model.final_layernorm"}


def build(config: ModelConfig, build: Build) -> FalconH1:
    return FalconH1(config, build, FalconH1Layer)


def build_bamba(config: ModelConfig, build: Build) -> FalconH1:
    def layer(config: ModelConfig, index: int, build: Build) -> BambaLayer:
        return (BambaLayer if config.mixers[index] is None else BambaMambaLayer)(config, index, build)

    return FalconH1(config, build, layer)


def _mamba(hf: Mapping[str, Any], inner: int, **norm: Any) -> Mamba2:
    low, high = hf.get("time_step_limit") or (0.0, float("inf"))
    head_dim = hf.get("mamba_d_head", "auto")
    return Mamba2(
        hf["mamba_n_heads"],
        inner // hf["mamba_n_heads"] if head_dim == "auto" else head_dim,
        hf["mamba_d_state"],
        hf["mamba_n_groups"],
        hf["mamba_d_conv"],
        conv_bias=bool(hf.get("mamba_conv_bias", True)),
        bias=bool(hf.get("mamba_proj_bias", False)),
        dt_limits=(float(low), float(high)),
        activation=hf.get("hidden_act", "silu"),
        **norm,
    )


def falcon_h1_config(hf: Mapping[str, Any]) -> ModelConfig:
    if bool(hf.get("projectors_bias", False)) != bool(hf.get("mamba_proj_bias", False)):
        raise ValueError(
            "config.json has biases in some of the projections of Mamba layers only; that is not supported."
        )
    inner = hf.get("mamba_d_ssm") or int(hf["mamba_expand"] * hf["hidden_size"])
    mamba = _mamba(
        hf,
        inner,
        norm=bool(hf.get("mamba_rms_norm", False)),
        norm_before_gate=bool(hf.get("mamba_norm_before_gate", True)),
        norm_groups=hf["mamba_n_groups"],
    )
    head_dim = hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]
    bias = bool(hf.get("attention_bias", False))
    factors = [hf.get(f"{name}_multiplier", 1.0) for name in ("ssm_in", "ssm_out", "attention_in", "attention_out")]
    return from_hf(
        hf,
        head_dim=head_dim,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bool(hf.get("mlp_bias", False)),
        attn_scale=head_dim**-0.5 * hf.get("key_multiplier", 1.0),
        embed_scale=hf.get("embedding_multiplier", 1.0),
        logits_scale=hf.get("lm_head_multiplier", 1.0),
        mixers=(mamba,) * hf["num_hidden_layers"],
        extra=(
            ("multipliers", tuple(factors)),
            ("mamba_multipliers", tuple(hf.get("ssm_multipliers") or (1.0,) * 5)),
            ("mlp_multipliers", tuple(hf.get("mlp_multipliers") or (1.0, 1.0))),
        ),
    )


def bamba_config(hf: Mapping[str, Any]) -> ModelConfig:
    layers = hf["num_hidden_layers"]
    field = "layers_block_type" if hf.get("layers_block_type") else "layer_types"
    told = hf.get(field)
    attends = hf.get("attn_layer_indices") or ()
    if told:
        told = layer_kinds(told, layers, ("attention", "full_attention", "mamba", "linear_attention"), field)
        attends = [
            index for index, kind in enumerate(told) if kind.endswith("attention") and kind != "linear_attention"
        ]
    mamba = _mamba(hf, int(hf["mamba_expand"] * hf["hidden_size"]), norm_groups=hf["mamba_n_groups"])
    bias = bool(hf.get("attention_bias", False))
    return from_hf(
        {"partial_rotary_factor": 0.5, **hf},
        partial=True,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bool(hf.get("mlp_bias", False)),
        mixers=tuple(None if index in attends else mamba for index in range(layers)),
    )


FAMILIES = (
    Family("Falcon-H1", ("FalconH1ForCausalLM",), falcon_h1_config, build, gguf=("falcon-h1",)),
    Family("Bamba", ("BambaForCausalLM",), bamba_config, build_bamba),
)
