"""EXAONE 4 (LG AI Research 2025, arXiv:2507.11407): norms behind the blocks, norms of each head's q and k; where some layers have a
window, those without do not rotate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.config import ModelConfig, from_hf, windows_from_hf
from models.families.olmo.olmo2 import build
from models.family import Family


def exaone4_config(hf: Mapping[str, Any]) -> ModelConfig:
    layers, window = hf["num_hidden_layers"], hf.get("sliding_window")
    kinds = hf.get("layer_types") or _kinds(hf.get("sliding_window_pattern") if window else None, layers)
    windows = windows_from_hf({"sliding_window": window, "layer_types": kinds}, layers)
    rotates = tuple(size is not None for size in windows) if window else None
    return from_hf(hf, qk_norm="head", windows=windows, rope_layers=rotates)


def _kinds(pattern: int | str | None, layers: int) -> list[str]:
    """Every n-th layer is global, or those that a text like "LLLG" says; the last one is in any case in such a text."""
    if isinstance(pattern, str):
        local = [pattern[layer % len(pattern)] == "L" and layer < layers - 1 for layer in range(layers)]
    else:
        local = [(layer + 1) % pattern != 0 if pattern else False for layer in range(layers)]
    return ["sliding_attention" if slides else "full_attention" for slides in local]


FAMILIES = (Family("EXAONE 4", ("Exaone4ForCausalLM",), exaone4_config, build, gguf=("exaone4",)),)
