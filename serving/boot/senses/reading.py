"""From settings to what reads images and sounds beside the text side."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serving.media import MediaPolicy, MediaReader, reader_of
from serving.service.speech.rules import SpeechTokens
from serving.service.speech.transcribe import Align, Speech
from serving.service.speech.words import token_ends

if TYPE_CHECKING:
    import numpy as np

    from models.loading.opening import Opened
    from serving.engine.api.config import EngineConfig
    from serving.text.tokenizer import Tokenizer


def media_policy(config: EngineConfig) -> MediaPolicy:
    """What is taken, and from where.

    Raises:
        ValueError: a limit that is none, or a folder that is not there, in a sentence.
    """
    limits = {} if config.limit_mm_per_prompt is None else json.loads(config.limit_mm_per_prompt)
    most = {"image": MediaPolicy.max_images, "video": MediaPolicy.max_videos, "audio": MediaPolicy.max_sounds}
    if unknown := sorted(limits.keys() - most.keys()):
        raise ValueError(f"limit_mm_per_prompt: {unknown[0]!r} is not read here; there are {', '.join(most)}.")
    most |= limits
    for name in most:
        if isinstance(most[name], bool) or not isinstance(most[name], int) or most[name] < 0:
            raise ValueError(f"limit_mm_per_prompt: {name} must be a whole number from 0, got {most[name]!r}.")
    folder = None if config.allowed_local_media_path is None else Path(config.allowed_local_media_path).expanduser()
    if folder is not None and not folder.is_dir():
        raise ValueError(f"allowed_local_media_path: {folder} is not a folder.")
    domains = (config.allowed_media_domains or "").replace(",", " ").split()
    return MediaPolicy(
        domains=tuple(name.lower() for name in domains),
        folder=folder,
        max_images=most["image"],
        max_videos=most["video"],
        max_sounds=most["audio"],
    )


def speech_of(opened: Opened, tokenizer: Tokenizer, engine: Any = None) -> Speech:
    """What transcribes with a Whisper checkpoint.

    Args:
        engine: that runs it; times of words are told where the checkpoint says which heads follow the sound.
    Raises:
        ValueError: its tokens are not known.
    """
    mels = int(opened.hf_config.get("num_mel_bins", 80))
    heads = opened.generation_config.get("alignment_heads")
    align = None if engine is None or not heads else _aligning(engine.runner.executor, heads)
    return Speech(SpeechTokens.of(opened.generation_config, tokenizer.added_tokens), mels, align)


def _aligning(executor: Any, heads: Sequence[tuple[int, int]]) -> Align:
    """See `Speech`."""
    from serving.engine.device.aligning import Aligner

    aligner = Aligner(executor.decoder, executor.tower, heads, executor.sizes.max_model_len)

    def ends(frames_PX: np.ndarray, prompt: Sequence[int], tokens: Sequence[int], sound: int) -> Sequence[float]:
        weights_AST = aligner.weights(frames_PX, prompt, tokens)[..., : max(1, sound // 2)]
        return token_ends(weights_AST)

    return ends


def media_reader(config: EngineConfig, hf: Mapping[str, Any], max_patches: int) -> MediaReader:
    """The reader of a checkpoint whose tower is served."""
    return reader_of(hf, hf["architectures"][0], media_policy(config), max_patches)
