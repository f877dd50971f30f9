"""LLaVA 1.5 (Liu et al. 2023, arXiv:2310.03744): a plain decoder beside CLIP's tower and a projector of two layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.config import ModelConfig
from models.decoder import Decoder
from models.encoders.clip import Clip, clip_vision
from models.families.llama import llama_config
from models.families.mistral import mistral_config
from models.families.qwen2 import qwen2_config
from models.family import Family, Tower

BESIDE = r"^(model\.)?(vision_tower|multi_modal_projector)\."
TEXT = {"llama": llama_config, "mistral": mistral_config, "qwen2": qwen2_config}
"""How the decoders that it is published with read their configuration, by model_type."""


def llava_config(hf: Mapping[str, Any]) -> ModelConfig:
    kind = (hf.get("text_config") or {}).get("model_type", "llama")
    if kind not in TEXT:
        raise ValueError(f"config.json: LLaVA with the decoder {kind!r} is not served; {', '.join(TEXT)} are.")
    if (hf.get("vision_feature_select_strategy") or "default") != "default":
        raise ValueError("config.json: vision_feature_select_strategy is 'full'; 'default' is served.")
    return TEXT[kind](hf)


FAMILIES = (
    Family(
        "LLaVA 1.5",
        ("LlavaForConditionalGeneration",),
        llava_config,
        Decoder,
        ignore=(BESIDE,),
        tower=Tower(clip_vision, Clip, BESIDE),
    ),
)
