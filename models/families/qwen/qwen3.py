"""Qwen 3, dense (Qwen Team 2025, arXiv:2505.09388): Llama with an RMS norm over each head's q and k."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.config import ModelConfig, from_hf
from models.decoder import Decoder
from models.families.qwen.qwen2 import qwen_windows
from models.family import Family


def qwen3_config(hf: Mapping[str, Any]) -> ModelConfig:
    bias = bool(hf.get("attention_bias", False))
    return from_hf(hf, qkv_bias=bias, out_bias=bias, qk_norm="head", windows=qwen_windows(hf))


FAMILIES = (Family("Qwen 3", ("Qwen3ForCausalLM", "Qwen3Model"), qwen3_config, Decoder, gguf=("qwen3",)),)
