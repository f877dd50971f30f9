"""OLMo 2 (Team OLMo 2024, arXiv:2501.00656): norms behind the blocks, and an RMS norm over all heads' q and k together; OLMo 3
(2025, arXiv:2512.13961), of whose layers three in four have a window; OLMoE (Muennighoff et al. 2024, arXiv:2409.02060)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax

from models.api import Step
from models.config import ModelConfig, MoEConfig, from_hf, rope_from_hf, windows_from_hf
from models.decoder import Decoder
from models.family import Family
from models.layers import Build, Layer
from models.layers.moe import MoE


class Olmo2Layer(Layer):
    """x + norm(attn(x)), then x + norm(mlp(x))."""

    names: ClassVar[dict[str, str]] = {
        "attn": "self_attn",
        "attn_norm": "post_attention_layernorm",
        "mlp": "mlp",
        "mlp_norm": "post_feedforward_layernorm",
    }

    def __call__(self, x_TD: jax.Array, step: Step, kv: Any) -> tuple[jax.Array, Any, tuple[jax.Array, ...]]:
        attended_TD, kv = self.attn(x_TD, step, kv)
        x_TD = step.asked(x_TD + self.attn_norm(attended_TD))
        y_TD, visited = self.mlp(x_TD, step)
        return x_TD + self.mlp_norm(y_TD), kv, visited


def build(config: ModelConfig, build: Build) -> Decoder:
    return Decoder(config, build, Olmo2Layer)


def olmo2_config(hf: Mapping[str, Any]) -> ModelConfig:
    bias = bool(hf.get("attention_bias", False))
    return from_hf(hf, qkv_bias=bias, out_bias=bias, qk_norm="full", norm_eps=hf.get("rms_norm_eps", 1e-5))


def olmo3_config(hf: Mapping[str, Any]) -> ModelConfig:
    """The layers with a window rotate as in training; only the others' rotation is stretched."""
    layers = hf["num_hidden_layers"]
    kinds = hf.get("layer_types") or [
        "full_attention" if (index + 1) % 4 == 0 else "sliding_attention" for index in range(layers)
    ]
    windows = windows_from_hf({"sliding_window": hf.get("sliding_window", 4096), "layer_types": kinds}, layers)
    hf = {"rope_theta": 500000.0, **hf}
    dim = hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]
    plain = {name: value for name, value in hf.items() if name != "rope_scaling"}
    if "sliding_attention" not in (hf.get("rope_parameters") or {}):
        plain = {"rope_theta": hf["rope_theta"]}
    config = olmo2_config(hf | {"rope_parameters": (hf.get("rope_parameters") or {}).get("full_attention")})
    return dataclasses.replace(config, windows=windows, local_rope=rope_from_hf(plain, dim, "sliding_attention"))


class OlmoeLayer(Layer):
    """A pre-norm block with a mixture."""

    def make_mlp(self, config: ModelConfig, index: int, build: Build) -> MoE:
        return MoE(config, build)


def build_olmoe(config: ModelConfig, build: Build) -> Decoder:
    return Decoder(config, build, OlmoeLayer)


def olmoe_config(hf: Mapping[str, Any]) -> ModelConfig:
    if hf.get("clip_qkv") is not None:
        raise ValueError(f"config.json: clip_qkv {hf['clip_qkv']} is not supported; published checkpoints have none.")
    moe = MoEConfig(
        num_experts=hf.get("num_experts") or hf.get("num_local_experts") or 64,
        experts_per_token=hf.get("num_experts_per_tok", 8),
        ffw_dim=hf["intermediate_size"],
        layers=(True,) * hf["num_hidden_layers"],
        normalize=bool(hf.get("norm_topk_prob", False)),
    )
    return dataclasses.replace(olmo2_config(hf), moe=moe)


FAMILIES = (
    Family("OLMo 2", ("Olmo2ForCausalLM",), olmo2_config, build, gguf=("olmo2",)),
    Family("OLMo 3", ("Olmo3ForCausalLM",), olmo3_config, build, gguf=("olmo2 with windows",)),
    Family("OLMoE", ("OlmoeForCausalLM",), olmoe_config, build_olmoe, gguf=("olmoe",)),
)
