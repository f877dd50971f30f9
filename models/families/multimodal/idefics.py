"""Idefics3 and SmolVLM (Laurençon et al. 2024, arXiv:2408.12637; Marafioti et al. 2025, arXiv:2504.05299): Llama beside a tower
that reads an image in tiles."""

from __future__ import annotations

from models.decoder import Decoder
from models.encoders.vision.idefics import Idefics, idefics_vision
from models.families.llama.llama import llama_config
from models.family import Family, Tower

BESIDE = r"^(model\.)?(vision_model|connector)\."

FAMILIES = tuple(
    Family(name, (architecture,), llama_config, Decoder, ignore=(BESIDE,), tower=Tower(idefics_vision, Idefics, BESIDE))
    for name, architecture in (
        ("Idefics3", "Idefics3ForConditionalGeneration"),
        ("SmolVLM, SmolVLM2", "SmolVLMForConditionalGeneration"),
    )
)
