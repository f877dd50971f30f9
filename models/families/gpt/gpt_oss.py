"""GPT-OSS (OpenAI 2025, arXiv:2508.10925): attention sinks, windows on every other layer, clamped gated experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from models.config import ModelConfig, MoEConfig, from_hf, windows_from_hf
from models.decoder import Decoder
from models.family import Family
from models.layers import Build, Layer, Linear
from models.layers.moe import Experts, MoE
from models.recipes import Piece, Recipe, Recipes, alternating, deal, one, under


class GptOssExperts(Experts):
    """(up + 1) * gate * sigmoid(alpha * gate), both clamped; checkpoints are [in, out] with gate and up alternating."""

    def __init__(self, config: ModelConfig, moe: MoEConfig, build: Build):
        super().__init__(config, moe, build, bias=True)
        self.alpha, self.limit = config.get("swiglu_alpha"), config.get("swiglu_limit")

    def gate(self, gate: jax.Array, up: jax.Array) -> jax.Array:
        gate = jnp.minimum(gate, self.limit)
        up = jnp.clip(up, -self.limit, self.limit)
        return (up + 1.0) * gate * jax.nn.sigmoid(self.alpha * gate)

    def recipes(self, name: str, sources: tuple[str, str, str] = ("", "", "")) -> Recipes:
        E, D, F = self.sizes

        def halves(piece: Piece) -> Recipe:
            return deal(E * self.shards, *alternating(piece, 2))

        return {
            "gate_up": halves(Piece(f"{name}.gate_up_proj", (E, D, 2 * F), turned=True)),
            "gate_up_bias": halves(Piece(f"{name}.gate_up_proj_bias", (E, 2 * F), vector=True)),
            "down": one(f"{name}.down_proj", E, F, D, turned=True),
            "down_bias": one(f"{name}.down_proj_bias", E, D, vector=True),
        }


class GptOssMoE(MoE):
    def __init__(self, config: ModelConfig, build: Build):
        super().__init__(config, build)
        assert config.moe is not None
        self.router = Linear(config.embed_dim, config.moe.num_experts, build, (None, "embed"), bias=True)

    def make_experts(self, config: ModelConfig, moe: MoEConfig, build: Build) -> GptOssExperts:
        return GptOssExperts(config, moe, build)

    def recipes(self, name: str) -> Recipes:
        router = under("router", self.router.recipes(f"{name}.router"))
        return router | under("experts", self.experts.recipes(f"{name}.experts"))


class GptOssLayer(Layer):
    def make_mlp(self, config: ModelConfig, index: int, build: Build) -> GptOssMoE:
        return GptOssMoE(config, build)


def build(config: ModelConfig, build: Build) -> Decoder:
    return Decoder(config, build, GptOssLayer)


def gpt_oss_config(hf: Mapping[str, Any]) -> ModelConfig:
    layers = hf["num_hidden_layers"]
    kinds = hf.get("layer_types") or [("sliding_attention", "full_attention")[index % 2] for index in range(layers)]
    moe = MoEConfig(
        num_experts=hf.get("num_local_experts", 128),
        experts_per_token=hf.get("num_experts_per_tok", 4),
        ffw_dim=hf["intermediate_size"],
        layers=(True,) * layers,
        # The softmax over the chosen logits is the softmax over all, divided by the chosen ones' sum.
        normalize=True,
    )
    return from_hf(
        hf,
        windows=windows_from_hf(dict(hf) | {"layer_types": kinds}, layers),
        qkv_bias=bool(hf.get("attention_bias", True)),
        out_bias=bool(hf.get("attention_bias", True)),
        attn_sinks=True,
        moe=moe,
        extra=(("swiglu_alpha", hf.get("swiglu_alpha", 1.702)), ("swiglu_limit", hf.get("swiglu_limit", 7.0))),
    )


FAMILIES = (Family("GPT-OSS", ("GptOssForCausalLM",), gpt_oss_config, build, gguf=("gpt-oss",)),)
