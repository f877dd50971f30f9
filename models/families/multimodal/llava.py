"""LLaVA 1.5 (Liu et al. 2023, arXiv:2310.03744), LLaVA-NeXT (2024) and LLaVA-OneVision (Li et al. 2024, arXiv:2408.03326): a plain
decoder beside CLIP's or SigLIP's tower and a projector of two layers. Pixtral (Agrawal et al. 2024, arXiv:2410.07073) is saved
under LLaVA 1.5's name, with a tower of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.config import ModelConfig
from models.decoder import Decoder
from models.encoders.vision.llava import Llava, llava_vision, next_vision, onevision_vision
from models.encoders.vision.pixtral import Pixtral, pixtral_vision
from models.encoders.vit import VitConfig
from models.families.llama.llama import llama_config
from models.families.mistral.mistral import mistral_config
from models.families.qwen.qwen2 import qwen2_config
from models.families.qwen.qwen3 import qwen3_config
from models.family import Family, Tower
from models.layers import Build

BESIDE = r"^(model\.)?(vision_tower\.|multi_modal_projector\.|image_newline$)"
TEXT = {"llama": llama_config, "mistral": mistral_config, "qwen2": qwen2_config, "qwen3": qwen3_config}
"""How the decoders that these are published with read their configuration, by model_type."""


def llava_config(hf: Mapping[str, Any]) -> ModelConfig:
    kind = (hf.get("text_config") or {}).get("model_type", "llama")
    if kind not in TEXT:
        raise ValueError(f"config.json: the decoder {kind!r} is not served with a tower; {', '.join(TEXT)} are.")
    return TEXT[kind](hf)


def _vision(hf: Mapping[str, Any]) -> VitConfig:
    return (pixtral_vision if hf["vision_config"].get("model_type") == "pixtral" else llava_vision)(hf)


def _build_vision(config: VitConfig, build: Build) -> Llava | Pixtral:
    return (Llava if config.tile else Pixtral)(config, build)


FAMILIES = (
    Family(
        "LLaVA 1.5, Pixtral",
        ("LlavaForConditionalGeneration",),
        llava_config,
        Decoder,
        ignore=(BESIDE,),
        tower=Tower(_vision, _build_vision, BESIDE),
    ),
    Family(
        "LLaVA-NeXT",
        ("LlavaNextForConditionalGeneration",),
        llava_config,
        Decoder,
        ignore=(BESIDE,),
        tower=Tower(next_vision, Llava, BESIDE),
    ),
    Family(
        "LLaVA-OneVision",
        ("LlavaOnevisionForConditionalGeneration",),
        llava_config,
        Decoder,
        ignore=(BESIDE,),
        tower=Tower(onevision_vision, Llava, BESIDE, videos=True),
    ),
)
