"""Granite 3, dense (IBM 2024): Llama with multipliers on embeddings, scores, residuals and logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.config import ModelConfig, from_hf
from models.decoder import Decoder
from models.family import Family


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


FAMILIES = (Family("Granite 3", ("GraniteForCausalLM",), granite_config, Decoder, gguf=("granite",)),)
