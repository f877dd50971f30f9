"""Seed-OSS (ByteDance Seed 2025): Llama with biases on q, k and v."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.config import ModelConfig, from_hf
from models.decoder import Decoder
from models.family import Family


def seed_oss_config(hf: Mapping[str, Any]) -> ModelConfig:
    return from_hf(
        hf,
        qkv_bias=bool(hf.get("attention_bias", True)),
        out_bias=bool(hf.get("attention_out_bias", False)),
        mlp_bias=bool(hf.get("mlp_bias", False)),
    )


FAMILIES = (Family("Seed-OSS", ("SeedOssForCausalLM",), seed_oss_config, Decoder, gguf=("seed_oss",)),)
