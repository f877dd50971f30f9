"""Qwen 2 and 2.5 (Qwen Team 2024, arXiv:2407.10671, arXiv:2412.15115): Llama with biases on q, k and v."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.config import ModelConfig, from_hf, windows_from_hf
from models.decoder import Decoder
from models.family import Family


def qwen_windows(hf: Mapping[str, Any]) -> tuple[int | None, ...]:
    """Windows where `use_sliding_window` says so: on the layers from `max_window_layers` on, or by `layer_types`."""
    layers = hf["num_hidden_layers"]
    window = hf.get("sliding_window") if hf.get("use_sliding_window") else None
    if not window:
        return (None,) * layers
    if hf.get("layer_types"):
        return windows_from_hf(hf, layers)
    full = hf.get("max_window_layers", layers)
    return tuple(window if index >= full else None for index in range(layers))


def qwen2_config(hf: Mapping[str, Any]) -> ModelConfig:
    return from_hf(hf, qkv_bias=True, windows=qwen_windows(hf))


FAMILIES = (Family("Qwen 2, 2.5", ("Qwen2ForCausalLM", "Qwen2Model"), qwen2_config, Decoder, gguf=("qwen2",)),)
