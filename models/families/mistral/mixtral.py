"""Mixtral (Jiang et al. 2024, arXiv:2401.04088): Mistral with eight experts of which each token visits two."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from models.config import ModelConfig, MoEConfig, from_hf, windows_from_hf
from models.decoder import Decoder
from models.family import Family
from models.layers import Build, Layer
from models.layers.moe import MoE
from models.recipes import Recipes, under


class MixtralMoE(MoE):
    def recipes(self, name: str) -> Recipes:
        router = under("router", self.router.recipes(f"{name}.gate"))
        return router | under("experts", self.experts.recipes(f"{name}.experts", ("w1", "w3", "w2")))


class MixtralLayer(Layer):
    names: ClassVar[dict[str, str]] = Layer.names | {"mlp": "block_sparse_moe"}

    def make_mlp(self, config: ModelConfig, index: int, build: Build) -> MixtralMoE:
        return MixtralMoE(config, build)


def build(config: ModelConfig, build: Build) -> Decoder:
    return Decoder(config, build, MixtralLayer)


def mixtral_config(hf: Mapping[str, Any]) -> ModelConfig:
    layers = hf["num_hidden_layers"]
    moe = MoEConfig(
        num_experts=hf.get("num_local_experts", 8),
        experts_per_token=hf.get("num_experts_per_tok", 2),
        ffw_dim=hf["intermediate_size"],
        layers=(True,) * layers,
        normalize=True,
    )
    return from_hf(hf, moe=moe, windows=windows_from_hf(hf, layers))


FAMILIES = (Family("Mixtral", ("MixtralForCausalLM",), mixtral_config, build, gguf=("llama with experts",)),)
