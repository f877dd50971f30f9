"""StarCoder 2 (Lozhkov et al. 2024, arXiv:2402.19173): layer norms, biases, a plain feed-forward block, sliding windows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.config import ModelConfig, from_hf, windows_from_hf
from models.decoder import Decoder
from models.family import Family
from models.layers import MLP, Build, Layer, LayerNorm


class Starcoder2Layer(Layer):
    def make_norm(self, config: ModelConfig) -> LayerNorm:
        return LayerNorm(config.embed_dim, config.norm_eps)

    def make_mlp(self, config: ModelConfig, index: int, build: Build) -> MLP:
        return MLP(config, build)


class Starcoder2(Decoder):
    def __init__(self, config: ModelConfig, build: Build):
        super().__init__(config, build, Starcoder2Layer)

    def make_norm(self, config: ModelConfig) -> LayerNorm:
        return LayerNorm(config.embed_dim, config.norm_eps)


def starcoder2_config(hf: Mapping[str, Any]) -> ModelConfig:
    bias = bool(hf.get("use_bias", True))
    return from_hf(
        hf,
        norm_eps=hf.get("norm_epsilon", hf.get("layer_norm_eps", 1e-5)),
        activation=hf.get("hidden_act", "gelu_pytorch_tanh"),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
        windows=windows_from_hf(hf, hf["num_hidden_layers"]),
    )


FAMILIES = (Family("StarCoder 2", ("Starcoder2ForCausalLM",), starcoder2_config, Starcoder2, gguf=("starcoder2",)),)
