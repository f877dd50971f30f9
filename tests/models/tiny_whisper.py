"""A tiny random Whisper made by transformers, and sounds for it."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import tokenizers
from tokenizers import models, pre_tokenizers

WORDS = 60
SPECIAL = (
    "<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|de|>", "<|translate|>", "<|transcribe|>", "<|startoflm|>",
    "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>",
)  # fmt: skip
END, START, EN, DE, TRANSLATE, TRANSCRIBE, _, PREVIOUS, _, NO_TIMES = range(WORDS, WORDS + len(SPECIAL))
TIMES = NO_TIMES + 1
VOCAB = TIMES + 1501
LENGTH = 40
"""Tokens of a window, its prompt included."""

GENERATION = {
    "bos_token_id": END, "eos_token_id": END, "pad_token_id": END, "decoder_start_token_id": START, "max_length": LENGTH,
    "no_timestamps_token_id": NO_TIMES, "max_initial_timestamp_index": 50, "suppress_tokens": [1, 2, PREVIOUS, NO_TIMES - 1],
    "begin_suppress_tokens": [3, END], "is_multilingual": True, "prev_sot_token_id": PREVIOUS,
    "alignment_heads": [[0, 1], [1, 0], [1, 1]],
    "lang_to_id": {"<|en|>": EN, "<|de|>": DE}, "task_to_id": {"translate": TRANSLATE, "transcribe": TRANSCRIBE},
}  # fmt: skip


def save(folder: Path, seed: int = 5) -> Any:
    """Writes the checkpoint; returns transformers' model."""
    import torch
    import transformers

    config = transformers.WhisperConfig(
        vocab_size=VOCAB, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=80, max_source_positions=1500, max_target_positions=LENGTH,
        bos_token_id=END, eos_token_id=END, pad_token_id=END, decoder_start_token_id=START, suppress_tokens=None,
        begin_suppress_tokens=None,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = transformers.WhisperForConditionalGeneration(config).eval().float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            elif parameter.dim() > 1:
                parameter.normal_(0.0, 1.5 * parameter[0].numel() ** -0.5)
            else:
                parameter.normal_(0.0, 0.3)
    model.generation_config = transformers.GenerationConfig(**GENERATION)
    model.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    extractor().save_pretrained(folder)
    words = tokenizers.Tokenizer(models.WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = [*SPECIAL, *(f"<|{i * 0.02:.2f}|>" for i in range(1501))]
    words.add_special_tokens([tokenizers.AddedToken(name, special=True) for name in names])
    words.save(str(folder / "tokenizer.json"))
    return model


def extractor() -> Any:
    """transformers' features."""
    import transformers

    return transformers.WhisperFeatureExtractor()


def sound(seconds: float, seed: int = 0) -> np.ndarray:
    """float32 samples at 16 kHz that hum and hiss."""
    random, t = np.random.default_rng(seed), np.arange(int(16_000 * seconds)) / 16_000
    tones = [(180, 2.0), (360, 2.2), (720, 3.0), (1500, 4.1), (2800, 5.0)]
    hum = sum(
        np.sin(2 * np.pi * f * t + random.uniform(0, 6)) * np.clip(np.sin(2 * np.pi * g * t), 0, 1) for f, g in tones
    )
    return (0.15 * hum + 0.01 * random.standard_normal(len(t))).astype(np.float32)


def wav(samples: np.ndarray, rate: int = 16_000, kind: str = "WAV", subtype: str | None = "FLOAT") -> bytes:
    """The samples as a file."""
    out = io.BytesIO()
    soundfile.write(out, samples, rate, format=kind, subtype=subtype)
    return out.getvalue()


def expected(model: Any, samples: np.ndarray, timed: bool, **how: Any) -> list[int]:
    """The tokens that transformers says, without those of the prompt and the end."""
    import torch

    long = len(samples) > 480_000
    asked = {"truncation": False, "padding": "longest", "return_attention_mask": True} if long else {}
    read = extractor()(samples, sampling_rate=16_000, return_tensors="pt", **asked)
    more = {"attention_mask": read["attention_mask"]} if long else {}
    with torch.no_grad():
        out = model.generate(
            read["input_features"], return_timestamps=timed, return_segments=long, task="transcribe", **more, **how
        )
    found = [t for s in out["segments"][0] for t in s["tokens"]] if long else out[0]
    return [int(t) for t in found if int(t) < END or int(t) >= TIMES]
