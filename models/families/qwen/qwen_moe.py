"""Qwen 2 MoE and Qwen 3 MoE (arXiv:2407.10671, arXiv:2505.09388): many small experts; in 2 also a gated shared one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.config import ModelConfig, MoEConfig, from_hf
from models.decoder import Decoder
from models.families.qwen.qwen2 import qwen_windows
from models.family import Family
from models.layers import Build, GatedMLP, Layer
from models.layers.moe import MoE


class QwenMoELayer(Layer):
    """A mixture, or a dense block where the configuration says so."""

    def make_mlp(self, config: ModelConfig, index: int, build: Build) -> MoE | GatedMLP:
        assert config.moe is not None
        return MoE(config, build) if config.moe.layers[index] else GatedMLP(config, build)


def build(config: ModelConfig, build: Build) -> Decoder:
    return Decoder(config, build, QwenMoELayer)


def qwen_moe(hf: Mapping[str, Any], **more: Any) -> MoEConfig:
    layers, step = hf["num_hidden_layers"], hf.get("decoder_sparse_step", 1)
    dense = hf.get("mlp_only_layers") or ()
    return MoEConfig(
        num_experts=hf.get("num_experts") or hf["num_local_experts"],
        experts_per_token=hf["num_experts_per_tok"],
        ffw_dim=hf["moe_intermediate_size"],
        layers=tuple(index not in dense and (index + 1) % step == 0 for index in range(layers)),
        normalize=bool(hf.get("norm_topk_prob", False)),
        **more,
    )


def qwen2_moe_config(hf: Mapping[str, Any]) -> ModelConfig:
    """Where the file does not say which layers have the window, it is every second one before `max_window_layers`."""
    shared = hf.get("shared_expert_intermediate_size", 5632)
    if hf.get("use_sliding_window") and not hf.get("layer_types"):
        most = hf.get("max_window_layers", 28)
        sliding = [index % 2 == 0 and index < most for index in range(hf["num_hidden_layers"])]
        hf = {**hf, "layer_types": ["sliding_attention" if slides else "full_attention" for slides in sliding]}
    moe = qwen_moe(hf, shared_ffw_dim=shared, shared_gate=True)
    return from_hf(hf, moe=moe, qkv_bias=hf.get("qkv_bias", True), windows=qwen_windows(hf))


def qwen3_moe_config(hf: Mapping[str, Any]) -> ModelConfig:
    """Where `use_sliding_window` is set, every layer has the window, whatever else the file says."""
    bias = bool(hf.get("attention_bias", False))
    window = (hf.get("sliding_window") or None) if hf.get("use_sliding_window") else None
    windows = (window,) * hf["num_hidden_layers"]
    return from_hf(hf, moe=qwen_moe(hf), qkv_bias=bias, out_bias=bias, qk_norm="head", windows=windows)


FAMILIES = (
    Family("Qwen 2 MoE", ("Qwen2MoeForCausalLM",), qwen2_moe_config, build, gguf=("qwen2moe",)),
    Family("Qwen 3 MoE", ("Qwen3MoeForCausalLM",), qwen3_moe_config, build, gguf=("qwen3moe",)),
)
