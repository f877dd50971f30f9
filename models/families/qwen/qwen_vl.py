"""Qwen2-VL (Wang et al. 2024, arXiv:2409.12191) and Qwen2.5-VL (Bai et al. 2025, arXiv:2502.13923): Qwen 2 whose positions are
three numbers, time, row and column, beside a tower that reads images of any size. Qwen3-VL (Qwen Team 2025, arXiv:2511.21631):
Qwen 3, dense or with experts, the same way."""

from __future__ import annotations

from models.decoder import Decoder
from models.encoders.vision.qwen import QwenVision, qwen2_5_vision, qwen2_vision
from models.encoders.vision.qwen3 import Qwen3Vision, qwen3_vision
from models.families.qwen.qwen2 import qwen2_config
from models.families.qwen.qwen3 import qwen3_config
from models.families.qwen.qwen_moe import build as build_moe
from models.families.qwen.qwen_moe import qwen3_moe_config
from models.family import Family, Tower

VISUAL = r"^(model\.)?visual\."

FAMILIES = (
    Family(
        "Qwen2-VL",
        ("Qwen2VLForConditionalGeneration",),
        qwen2_config,
        Decoder,
        gguf=("qwen2vl",),
        ignore=(VISUAL,),
        tower=Tower(qwen2_vision, QwenVision, VISUAL, videos=True),
    ),
    Family(
        "Qwen2.5-VL",
        ("Qwen2_5_VLForConditionalGeneration",),
        qwen2_config,
        Decoder,
        ignore=(VISUAL,),
        tower=Tower(qwen2_5_vision, QwenVision, VISUAL, videos=True),
    ),
    Family(
        "Qwen3-VL",
        ("Qwen3VLForConditionalGeneration",),
        qwen3_config,
        Decoder,
        gguf=("qwen3vl",),
        ignore=(VISUAL,),
        tower=Tower(qwen3_vision, Qwen3Vision, VISUAL, videos=True),
    ),
    Family(
        "Qwen3-VL MoE",
        ("Qwen3VLMoeForConditionalGeneration",),
        qwen3_moe_config,
        build_moe,
        gguf=("qwen3vlmoe",),
        ignore=(VISUAL,),
        tower=Tower(qwen3_vision, Qwen3Vision, VISUAL, videos=True),
    ),
)
