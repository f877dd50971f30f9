"""Mistral 7B with its sliding window (Jiang et al. 2023, arXiv:2310.06825), Ministral, whose layers have windows in turn, and
Mistral Small 3 and Ministral 3 (Mistral AI 2025), with or without a tower for images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from models.api import Step
from models.config import ModelConfig, from_hf, windows_from_hf
from models.decoder import Decoder
from models.encoders.vision.pixtral import Pixtral, pixtral_vision
from models.families.gemma.gemma import VISION
from models.families.mistral.mistral4 import Mistral4Layer, mistral4_config
from models.family import Family, Tower
from models.layers import Attention, Build, Layer


class Ministral3Attention(Attention):
    """q grows with the logarithm of how many original contexts lie before it (Nakanishi 2025, arXiv:2501.19399)."""

    def __init__(self, config: ModelConfig, layer: int, build: Build):
        super().__init__(config, layer, build)
        self.beta, self.length = config.get("query_beta"), config.get("query_length")

    def attend(self, qkv_TKgh: jax.Array, step: Step, kv: Any) -> tuple[jax.Array, Any]:
        G = qkv_TKgh.shape[2] - 2
        passed_T = jnp.floor(step.positions_T.astype(jnp.float32) / self.length)
        growth_T = 1.0 + self.beta * jnp.log1p(passed_T)
        # Rotation is linear: q may as well grow before it, beside the k and v that do not.
        growth_Tg = jnp.where(jnp.arange(G + 2) < G, growth_T[:, None], 1.0)
        qkv_TKgh = (qkv_TKgh * growth_Tg[:, None, :, None]).astype(qkv_TKgh.dtype)
        return super().attend(qkv_TKgh, step, kv)


class MistralLayer(Layer):
    def make_attention(self, config: ModelConfig, index: int, build: Build) -> Attention:
        # Within the original context nothing grows.
        grows = config.get("query_beta") and build.max_model_len > config.get("query_length")
        return (Ministral3Attention if grows else Attention)(config, index, build)


def build(config: ModelConfig, build: Build) -> Decoder:
    return Decoder(config, build, MistralLayer)


def mistral_config(hf: Mapping[str, Any]) -> ModelConfig:
    """Llama with a window on every layer, or on those that `layer_types` names; what grows q stands beside the rotation."""
    scaling = {**(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}
    config = from_hf(hf, windows=windows_from_hf(hf, hf["num_hidden_layers"]))
    beta = scaling.get("llama_4_scaling_beta")
    if not beta or config.rope is None:
        return config
    extra = (("query_beta", float(beta)), ("query_length", config.rope.original_max_positions or config.max_positions))
    return from_hf(hf, windows=config.windows, extra=extra)


def _with_tower(hf: Mapping[str, Any]) -> ModelConfig:
    """One architecture for every text behind the tower."""
    return mistral4_config(hf) if hf.get("kv_lora_rank") else mistral_config(hf)


def _build_with_tower(config: ModelConfig, build: Build) -> Decoder:
    return Decoder(config, build, MistralLayer if config.mla is None else Mistral4Layer)


FAMILIES = (
    Family(
        "Mistral, Mistral Small, Ministral, Ministral 3 (text)",
        (
            "MistralForCausalLM",
            "MinistralForCausalLM",
            "Ministral3ForCausalLM",
            "MistralModel",
        ),
        mistral_config,
        build,
        gguf=("llama with windows", "mistral3"),
        ignore=VISION,
    ),
    Family(
        "Mistral Small 3.1, Ministral 3, Mistral 4",
        ("Mistral3ForConditionalGeneration",),
        _with_tower,
        _build_with_tower,
        ignore=VISION,
        tower=Tower(pixtral_vision, Pixtral, VISION[0]),
    ),
)
