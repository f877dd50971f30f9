"""Decoders that hear: a plain one beside Whisper's encoder and a projector. Qwen2-Audio (Chu et al. 2024, arXiv:2407.10759),
Qwen2.5-Omni (Xu et al. 2025, arXiv:2503.20215) without its eyes and its voice, Audio Flamingo 3 (Goel et al. 2025,
arXiv:2507.08128), Voxtral (Mistral 2025, arXiv:2507.13264), Ultravox (Fixie 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.config import ModelConfig
from models.decoder import Decoder
from models.encoders.audio.chats import (
    AudioTower,
    flamingo3_audio,
    omni_audio,
    qwen2_audio,
    ultravox_audio,
    voxtral_audio,
)
from models.families.llama.llama import llama_config
from models.families.mistral.mistral import mistral_config
from models.families.qwen.qwen2 import qwen2_config
from models.families.qwen.qwen3 import qwen3_config
from models.family import Family, Tower

BESIDE = r"^(model\.)?(audio_tower\.|multi_modal_projector\.)"
TEXT = {"llama": llama_config, "mistral": mistral_config, "qwen2": qwen2_config, "qwen3": qwen3_config}
"""How the decoders that these are published with read their configuration, by model_type."""


def audio_decoder(hf: Mapping[str, Any]) -> ModelConfig:
    kind = (hf.get("text_config") or {}).get("model_type", "llama")
    if kind not in TEXT:
        raise ValueError(f"config.json: the decoder {kind!r} is not served with an encoder; {', '.join(TEXT)} are.")
    return TEXT[kind](hf)


def _family(name: str, architecture: str, config: Any, tower: Any) -> Family:
    return Family(
        name, (architecture,), config, Decoder, ignore=(BESIDE,), tower=Tower(tower, AudioTower, BESIDE, "audio")
    )  # fmt: skip


FAMILIES = (
    _family("Qwen2-Audio", "Qwen2AudioForConditionalGeneration", qwen2_config, qwen2_audio),
    Family(
        "Qwen2.5-Omni",
        ("Qwen2_5OmniThinkerForConditionalGeneration", "Qwen2_5OmniForConditionalGeneration", "Qwen2_5OmniModel"),
        qwen2_config,
        Decoder,
        ignore=(rf"{BESIDE}|^(model\.)?visual\.|^(talker|token2wav)\.",),
        tower=Tower(omni_audio, AudioTower, BESIDE, "audio"),
    ),
    _family("Audio Flamingo 3", "AudioFlamingo3ForConditionalGeneration", qwen2_config, flamingo3_audio),
    _family("Voxtral", "VoxtralForConditionalGeneration", audio_decoder, voxtral_audio),
    _family("Ultravox", "UltravoxModel", audio_decoder, ultravox_audio),
)
