"""Granite 4 (IBM 2025): Granite 3's multipliers around Mamba-2 layers with some attention, usually without positions; experts
beside a dense block, or that alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import jax

from models.api import Step
from models.config import ModelConfig, MoEConfig, from_hf, layer_kinds, rope_from_hf
from models.decoder import Decoder
from models.families.granite.granite import GraniteLayer, GraniteMoE
from models.family import Family
from models.layers import Build, GatedMLP
from models.layers.mixing import mixer_of
from models.mixers import Mamba2
from models.recipes import Recipes, deal, one, split, under

ATTENTION = ("full_attention", "attention")
MAMBA = ("linear_attention", "mamba")  # the second in older files


class GraniteSharedMLP(GatedMLP):
    """Gate and up are one tensor."""

    def recipes(self, name: str) -> Recipes:
        D, F = self.down.weight.shape
        both = one(f"{name}.input_linear.weight", 2 * F, D)
        recipes = {"gate_up.weight": deal(self.shards, *split(both, F, F))}
        return recipes | under("down", self.down.recipes(f"{name}.output_linear"))


class GraniteHybridLayer(GraniteLayer):
    names: ClassVar[dict[str, str]] = GraniteLayer.names | {"mlp": "shared_mlp"}

    def __init__(self, config: ModelConfig, index: int, build: Build):
        super().__init__(config, index, build)
        self.moe = GraniteMoE(config, build) if config.moe else None

    def make_attention(self, config: ModelConfig, index: int, build: Build) -> Any:
        return mixer_of(config, index, build)

    def make_mlp(self, config: ModelConfig, index: int, build: Build) -> GraniteSharedMLP:
        return GraniteSharedMLP(config, build, config.get("shared_ffw"))

    def __call__(self, x_TD: jax.Array, step: Step, kv: Any) -> tuple[jax.Array, Any, tuple[jax.Array, ...]]:
        if self.moe is None:
            return super().__call__(x_TD, step, kv)
        mixed_TD, kv = self.attn(x_TD, step, kv, norm=self.attn_norm)
        x_TD = step.asked(x_TD + mixed_TD * self.scale)
        normed_TD = self.mlp_norm(x_TD)
        y_TD, visited = self.moe(normed_TD, step)
        shared_TD, _ = self.mlp(normed_TD, step)
        return x_TD + (y_TD + shared_TD) * self.scale, kv, visited

    def recipes(self, name: str) -> Recipes:
        moe = {} if self.moe is None else under("moe", self.moe.recipes(f"{name}.block_sparse_moe"))
        return super().recipes(name) | moe


class GraniteMambaLayer(GraniteHybridLayer):
    names: ClassVar[dict[str, str]] = GraniteHybridLayer.names | {"attn": "mamba"}


def build(config: ModelConfig, build: Build) -> Decoder:
    def layer(config: ModelConfig, index: int, build: Build) -> GraniteHybridLayer:
        return (GraniteHybridLayer if config.mixers[index] is None else GraniteMambaLayer)(config, index, build)

    return Decoder(config, build, layer)


def granite_hybrid_config(hf: Mapping[str, Any]) -> ModelConfig:
    layers, heads, groups = hf["num_hidden_layers"], hf["mamba_n_heads"], hf["mamba_n_groups"]
    kinds = hf.get("layer_types") or hf.get("layers_block_type") or ["linear_attention"] * layers
    kinds = layer_kinds(kinds, layers, (*MAMBA, *ATTENTION))
    head_dim = hf.get("mamba_d_head", "auto")
    low, high = hf.get("time_step_limit") or (0.0, float("inf"))
    mamba = Mamba2(
        heads,
        hf["mamba_expand"] * hf["hidden_size"] // heads if head_dim == "auto" else head_dim,
        hf["mamba_d_state"],
        groups,
        hf["mamba_d_conv"],
        conv_bias=bool(hf.get("mamba_conv_bias", True)),
        bias=bool(hf.get("mamba_proj_bias", False)),
        norm_groups=groups,
        dt_limits=(float(low), float(high)),
        activation=hf.get("hidden_act", "silu"),
    )
    moe = None
    if hf.get("num_local_experts"):
        moe = MoEConfig(
            hf["num_local_experts"],
            hf["num_experts_per_tok"],
            hf["intermediate_size"],
            (True,) * layers,
            normalize=True,
        )
    rotates = hf.get("position_embedding_type") == "rope"
    bias = bool(hf.get("attention_bias", False))
    return from_hf(
        hf,
        rope=rope_from_hf(hf, hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"])
        if rotates
        else None,
        qkv_bias=bias,
        out_bias=bias,
        attn_scale=hf.get("attention_multiplier", 1.0),
        embed_scale=hf.get("embedding_multiplier", 1.0),
        residual_scale=hf.get("residual_multiplier", 1.0),
        logits_scale=1.0 / hf.get("logits_scaling", 1.0),
        mixers=tuple(mamba if kind in MAMBA else None for kind in kinds),
        moe=moe,
        extra=(("shared_ffw", hf["shared_intermediate_size"]),),
    )


FAMILIES = (
    Family(
        "Granite 4 (hybrid)", ("GraniteMoeHybridForCausalLM",), granite_hybrid_config, build, gguf=("granitehybrid",)
    ),
)
