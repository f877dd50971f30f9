"""Granite 3 (IBM 2024), dense and with experts: Llama with multipliers on embeddings, scores, residuals and logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax

from models.api import Step
from models.config import ModelConfig, MoEConfig, from_hf
from models.decoder import Decoder
from models.encoders.audio.granite_speech import GraniteSpeech, granite_speech
from models.family import Family, Tower
from models.layers import Build, Layer
from models.layers.moe import Experts, MoE
from models.recipes import Piece, Recipes, deal, one, split, under


def granite_config(hf: Mapping[str, Any]) -> ModelConfig:
    bias = bool(hf.get("attention_bias", False))
    return from_hf(
        hf,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bool(hf.get("mlp_bias", False)),
        attn_scale=hf.get("attention_multiplier", 1.0),
        embed_scale=hf.get("embedding_multiplier", 1.0),
        residual_scale=hf.get("residual_multiplier", 1.0),
        logits_scale=1.0 / hf.get("logits_scaling", 1.0),
    )


class GraniteLayer(Layer):
    """x + s attn(norm(x)), then x + s mlp(norm(x))."""

    def __init__(self, config: ModelConfig, index: int, build: Build):
        super().__init__(config, index, build)
        self.scale = config.residual_scale

    def __call__(self, x_TD: jax.Array, step: Step, kv: Any) -> tuple[jax.Array, Any, tuple[jax.Array, ...]]:
        attended_TD, kv = self.attn(x_TD, step, kv, norm=self.attn_norm)
        x_TD = step.asked(x_TD + attended_TD * self.scale)
        y_TD, visited = self.mlp(self.mlp_norm(x_TD), step)
        return x_TD + y_TD * self.scale, kv, visited


def build(config: ModelConfig, build: Build) -> Decoder:
    return Decoder(config, build, GraniteLayer)


class GraniteExperts(Experts):
    """Experts in one tensor each, `[E, out, in]`, the gate's rows first."""

    def recipes(self, name: str, sources: tuple[str, str, str] = ("", "", "")) -> Recipes:
        E, D, F = self.sizes
        base = name.removesuffix(".experts")

        both = Piece(f"{base}.input_linear.weight", (E, 2 * F, D))
        return {
            "gate_up": both if self.shards == 1 else deal(E * self.shards, *split(both, F, F)),
            "down": one(f"{base}.output_linear.weight", E, D, F),
        }


class GraniteMoE(MoE):
    def make_experts(self, config: ModelConfig, moe: MoEConfig, build: Build) -> GraniteExperts:
        return GraniteExperts(config, moe, build)

    def recipes(self, name: str) -> Recipes:
        router = under("router", self.router.recipes(f"{name}.router.layer"))
        return router | under("experts", self.experts.recipes(f"{name}.experts"))


class GraniteMoELayer(GraniteLayer):
    names: ClassVar[dict[str, str]] = GraniteLayer.names | {"mlp": "block_sparse_moe"}

    def make_mlp(self, config: ModelConfig, index: int, build: Build) -> GraniteMoE:
        return GraniteMoE(config, build)


def build_moe(config: ModelConfig, build: Build) -> Decoder:
    return Decoder(config, build, GraniteMoELayer)


def granite_moe_config(hf: Mapping[str, Any]) -> ModelConfig:
    moe = MoEConfig(
        num_experts=hf.get("num_local_experts", 8),
        experts_per_token=hf.get("num_experts_per_tok", 2),
        ffw_dim=hf["intermediate_size"],
        layers=(True,) * hf["num_hidden_layers"],
        # The softmax over the chosen logits is the softmax over all, divided by the chosen ones' sum.
        normalize=True,
    )
    return dataclasses.replace(granite_config(hf), moe=moe)


def granite_speech_config(hf: Mapping[str, Any]) -> ModelConfig:
    """Of the decoder beside what hears."""
    kind = (hf.get("text_config") or {}).get("model_type", "granite")
    if kind != "granite":
        raise ValueError(f"config.json: the decoder {kind!r} is not served with Granite Speech's encoder; granite is.")
    return granite_config(hf)


HEARS = r"^(model\.)?(encoder|projector)\."
FAMILIES = (
    Family("Granite 3", ("GraniteForCausalLM",), granite_config, build, gguf=("granite",)),
    Family(
        "Granite Speech",
        ("GraniteSpeechForConditionalGeneration",),
        granite_speech_config,
        build,
        ignore=(HEARS,),
        tower=Tower(granite_speech, GraniteSpeech, HEARS, "audio"),
    ),
    Family("Granite 3 MoE", ("GraniteMoeForCausalLM",), granite_moe_config, build_moe, gguf=("granitemoe",)),
)
