"""MiniMax-M2 (MiniMax 2025): many small experts chosen by biased sigmoids, norms of all heads together, partial rotation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from models.config import ModelConfig, MoEConfig, from_hf
from models.decoder import Decoder
from models.family import Family
from models.layers import Build, Layer
from models.layers.moe import MoE
from models.recipes import Recipes, one, under


class MiniMaxMoE(MoE):
    def recipes(self, name: str) -> Recipes:
        assert self.bias is not None
        recipes = under("router", self.router.recipes(f"{name}.gate"))
        recipes["bias"] = one(f"{name}.e_score_correction_bias", *self.bias.shape)
        return recipes | under("experts", self.experts.recipes(f"{name}.experts", ("w1", "w3", "w2")))


class MiniMaxLayer(Layer):
    names: ClassVar[dict[str, str]] = Layer.names | {"mlp": "block_sparse_moe"}

    def make_mlp(self, config: ModelConfig, index: int, build: Build) -> MiniMaxMoE:
        return MiniMaxMoE(config, build)


def build(config: ModelConfig, build: Build) -> Decoder:
    return Decoder(config, build, MiniMaxLayer)


def minimax_m2_config(hf: Mapping[str, Any]) -> ModelConfig:
    """Published files say how much of a head is rotated as `rotary_dim`."""
    layers = hf["num_hidden_layers"]
    if hf.get("rotary_dim") and not (hf.get("rope_parameters") or {}).get("partial_rotary_factor"):
        head_dim = hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]
        hf = {**hf, "partial_rotary_factor": hf["rotary_dim"] / head_dim}
    moe = MoEConfig(
        num_experts=hf["num_local_experts"],
        experts_per_token=hf["num_experts_per_tok"],
        ffw_dim=hf["intermediate_size"],
        layers=(True,) * layers,
        scoring="sigmoid",
        normalize=True,
        bias=True,
    )
    return from_hf(hf, partial=True, moe=moe, qk_norm="full")


FAMILIES = (Family("MiniMax-M2", ("MiniMaxM2ForCausalLM",), minimax_m2_config, build, gguf=("minimax-m2",)),)
