"""From settings to what reads images beside the text side."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serving.media import MediaPolicy, MediaReader, reader_of
from serving.service.speech.rules import SpeechTokens
from serving.service.speech.transcribe import Speech

if TYPE_CHECKING:
    from models.loading.opening import Opened
    from serving.engine.api.config import EngineConfig
    from serving.text.tokenizer import Tokenizer


def media_policy(config: EngineConfig) -> MediaPolicy:
    """What is taken, and from where.

    Raises:
        ValueError: a limit that is none, or a folder that is not there, in a sentence.
    """
    limits = {} if config.limit_mm_per_prompt is None else json.loads(config.limit_mm_per_prompt)
    if unknown := sorted(limits.keys() - {"image"}):
        raise ValueError(f"limit_mm_per_prompt: {unknown[0]!r} is not read here; there is image.")
    images = limits.get("image", MediaPolicy.max_images)
    if isinstance(images, bool) or not isinstance(images, int) or images < 0:
        raise ValueError(f"limit_mm_per_prompt: image must be a whole number from 0, got {images!r}.")
    folder = None if config.allowed_local_media_path is None else Path(config.allowed_local_media_path).expanduser()
    if folder is not None and not folder.is_dir():
        raise ValueError(f"allowed_local_media_path: {folder} is not a folder.")
    domains = (config.allowed_media_domains or "").replace(",", " ").split()
    return MediaPolicy(domains=tuple(name.lower() for name in domains), folder=folder, max_images=images)


def speech_of(opened: Opened, tokenizer: Tokenizer) -> Speech:
    """What transcribes with a Whisper checkpoint.

    Raises:
        ValueError: its tokens are not known.
    """
    mels = int(opened.hf_config.get("num_mel_bins", 80))
    return Speech(SpeechTokens.of(opened.generation_config, tokenizer.added_tokens), mels)


def media_reader(config: EngineConfig, hf: Mapping[str, Any], max_patches: int) -> MediaReader:
    """The reader of a checkpoint whose tower is served."""
    return reader_of(hf, hf["architectures"][0], media_policy(config), max_patches)
