"""OLMo 2 (Team OLMo 2024, arXiv:2501.00656): norms behind the blocks, and an RMS norm over all heads' q and k together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import jax

from models.config import ModelConfig, from_hf
from models.decoder import Decoder, Layer
from models.family import Family
from models.layers import Build
from ops.paged_attention.batch import AttentionBatch


class Olmo2Layer(Layer):
    """x + norm(attn(x)), then x + norm(mlp(x))."""

    names: ClassVar[dict[str, str]] = {
        "attn": "self_attn",
        "attn_norm": "post_attention_layernorm",
        "mlp": "mlp",
        "mlp_norm": "post_feedforward_layernorm",
    }

    def __call__(self, x_TD: jax.Array, batch: AttentionBatch, kv: Any) -> tuple[jax.Array, Any]:
        attended_TD, kv = self.attn(x_TD, batch, kv)
        x_TD = x_TD + self.attn_norm(attended_TD)
        return x_TD + self.mlp_norm(self.mlp(x_TD)), kv


def build(config: ModelConfig, build: Build) -> Decoder:
    return Decoder(config, build, Olmo2Layer)


def olmo2_config(hf: Mapping[str, Any]) -> ModelConfig:
    bias = bool(hf.get("attention_bias", False))
    return from_hf(hf, qkv_bias=bias, out_bias=bias, qk_norm="full", norm_eps=hf.get("rms_norm_eps", 1e-5))


FAMILIES = (Family("OLMo 2", ("Olmo2ForCausalLM",), olmo2_config, build, gguf=("olmo2",)),)
