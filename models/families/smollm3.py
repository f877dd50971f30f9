"""SmolLM 3 (Hugging Face 2025): Llama in which some layers do not rotate q and k; those have the window, where there is one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.config import ModelConfig, from_hf, windows_from_hf
from models.decoder import Decoder
from models.family import Family


def smollm3_config(hf: Mapping[str, Any]) -> ModelConfig:
    layers, interval = hf["num_hidden_layers"], hf.get("no_rope_layer_interval", 4)
    rotates = hf.get("no_rope_layers") or [(index + 1) % interval != 0 for index in range(layers)]
    kinds = hf.get("layer_types") or ["full_attention" if rotated else "sliding_attention" for rotated in rotates]
    window = hf.get("sliding_window") if hf.get("use_sliding_window") else None
    bias = bool(hf.get("attention_bias", False))
    return from_hf(
        hf,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bool(hf.get("mlp_bias", False)),
        rope_layers=tuple(bool(rotated) for rotated in rotates),
        windows=windows_from_hf({"sliding_window": window, "layer_types": kinds}, layers),
    )


FAMILIES = (Family("SmolLM 3", ("SmolLM3ForCausalLM",), smollm3_config, Decoder, gguf=("smollm3",)),)
