"""Phi-3 and Phi-4 (Microsoft 2024, arXiv:2404.14219, arXiv:2412.08905): Llama with fused projections in its checkpoints,
partial rotary embedding and LongRoPE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.config import ModelConfig, from_hf, windows_from_hf
from models.decoder import Decoder
from models.family import Family
from models.layers import Attention, Build, GatedMLP, Layer
from models.recipes import Piece, Recipes, deal, split, under


class Phi3Attention(Attention):
    """Attention whose checkpoint has q, k and v in one tensor."""

    def recipes(self, name: str) -> Recipes:
        K, G, h = self.heads
        fused = Piece(f"{name}.qkv_proj.weight", self.qkv.weight.stored_shape)
        return {"qkv.weight": deal(K, *split(fused, K * G * h, K * h, K * h))} | under(
            "out", self.out.recipes(f"{name}.o_proj")
        )


class Phi3MLP(GatedMLP):
    """Feed-forward whose checkpoint has gate and up in one tensor."""

    def recipes(self, name: str) -> Recipes:
        fused, F = Piece(f"{name}.gate_up_proj.weight", self.gate_up.weight.shape), self.down.weight.shape[1]
        return {"gate_up.weight": deal(self.shards, *split(fused, F, F))} | under(
            "down", self.down.recipes(f"{name}.down_proj")
        )


class Phi3Layer(Layer):
    def make_attention(self, config: ModelConfig, index: int, build: Build) -> Phi3Attention:
        return Phi3Attention(config, index, build)

    def make_mlp(self, config: ModelConfig, index: int, build: Build) -> Phi3MLP:
        return Phi3MLP(config, build)


def build(config: ModelConfig, build: Build) -> Decoder:
    return Decoder(config, build, Phi3Layer)


def phi3_config(hf: Mapping[str, Any]) -> ModelConfig:
    """Older files call LongRoPE "su" or "yarn"."""
    hf = dict(hf)
    for field in ("rope_scaling", "rope_parameters"):
        scaling = hf.get(field) or {}
        if (scaling.get("rope_type") or scaling.get("type")) == "yarn":
            hf[field] = dict(scaling) | {"rope_type": "longrope", "type": "longrope"}
    return from_hf(hf, partial=True, windows=windows_from_hf(hf, hf["num_hidden_layers"]))


FAMILIES = (Family("Phi-3, Phi-4", ("Phi3ForCausalLM",), phi3_config, build, gguf=("phi3",)),)
