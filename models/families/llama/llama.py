"""Llama 2, 3, 3.x, SmolLM2 (Touvron et al. 2023, arXiv:2307.09288; Llama Team 2024, arXiv:2407.21783)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.config import ModelConfig, from_hf
from models.decoder import Decoder
from models.family import Family


def llama_config(hf: Mapping[str, Any]) -> ModelConfig:
    """Llama: RMS norm, rotary embedding, grouped queries, gated feed-forward; biases where the file says so."""
    bias = bool(hf.get("attention_bias", False))
    return from_hf(hf, qkv_bias=bias, out_bias=bias, mlp_bias=bool(hf.get("mlp_bias", False)))


FAMILIES = (
    Family(
        "Llama 2, 3, 3.x, SmolLM2",
        ("LlamaForCausalLM", "LlamaModel"),
        llama_config,
        Decoder,
        gguf=("llama",),
    ),
)
