"""A tiny random Granite Speech made by transformers: the checkpoint with its processor's files, and what it should say. The same
functions as in `tests.models.tiny_audio`. torchaudio's spectrograms, which are not here, are torch's own, in float64."""

from __future__ import annotations

import json
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import tokenizers

from tests.models.tiny_audio import PLACE, STEPS, TEXTS, TinyAudio, tokenizer_of
from tests.models.tiny_towers import TEXT

MELS, TOKEN = 8, 375
ENCODER = {
    "input_dim": 2 * MELS, "num_layers": 4, "hidden_dim": 32, "feedforward_mult": 2, "num_heads": 2, "output_dim": 11,
    "context_size": 40, "max_pos_emb": 64, "conv_kernel_size": 7,
}  # fmt: skip
PROJECTOR = {
    "model_type": "blip_2_qformer", "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "num_hidden_layers": 2,
    "cross_attention_frequency": 2, "encoder_hidden_size": 32, "hidden_act": "gelu",
}  # fmt: skip
SCALES = {"embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.6, "logits_scaling": 2.0}
TINY = {
    "Granite Speech": TinyAudio(
        "GraniteSpeechForConditionalGeneration", ENCODER, {"model_type": "granite", **SCALES},
        {"audio_token_index": TOKEN, "has_lora_adapter": False, "window_size": 15, "downsample_rate": 5}, "",
    ),
}  # fmt: skip


def words(name: str) -> tokenizers.Tokenizer:
    made = tokenizer_of("Ultravox")
    made.add_special_tokens([tokenizers.AddedToken("<|audio|>", special=True)])
    assert made.token_to_id("<|audio|>") == TOKEN
    return made


def save(name: str, folder: Path) -> Any:
    """Writes the checkpoint; returns transformers' model."""
    import torch
    import transformers

    tiny = TINY[name]
    config = transformers.GraniteSpeechConfig(
        text_config={**TEXT, **tiny.text, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        encoder_config=dict(tiny.audio), projector_config=dict(PROJECTOR), tie_word_embeddings=False, **tiny.ids,
    )  # fmt: skip
    torch.manual_seed(7)
    model = transformers.GraniteSpeechForConditionalGeneration(config).eval().float()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 1.5 * parameter[0].numel() ** -0.5)
            elif "norm" in parameter_name.lower():
                parameter.add_(torch.randn_like(parameter) * 0.2)
            else:
                parameter.normal_(0.0, 0.3)
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("running_mean"):
                buffer.normal_(0.0, 0.3)
            if buffer_name.endswith("running_var"):
                buffer.copy_(0.5 + torch.rand_like(buffer))
    model.save_pretrained(folder)
    said = {"n_mels": MELS, "projector_window_size": 15, "projector_downsample_rate": 5}
    (folder / "processor_config.json").write_text(json.dumps({"audio_processor": said}))
    words(name).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "w2", "chat_template": TEXTS}))
    return model


class Spectrograms:
    """What torchaudio's MelSpectrogram makes of sounds: power of a short Fourier transform, in HTK's bands."""

    def __init__(self, said: Mapping[str, int]) -> None:
        from transformers.audio_utils import mel_filter_bank

        self.said = said
        self.bands = mel_filter_bank(said["n_fft"] // 2 + 1, said["n_mels"], 0.0, 8000.0, 16_000)

    def to(self, device: str) -> Spectrograms:
        return self

    def __call__(self, sounds: Any) -> Any:
        import torch

        window = torch.hann_window(self.said["win_length"], dtype=torch.float64)
        found = torch.stft(
            sounds.double(), self.said["n_fft"], self.said["hop_length"], self.said["win_length"], window,
            center=True, pad_mode="reflect", return_complex=True,
        )  # fmt: skip
        return (torch.from_numpy(self.bands).T @ found.abs() ** 2).float()


def extractor(mels: int = MELS) -> Any:
    """transformers' feature extractor, with these spectrograms."""
    from transformers.models.granite_speech import feature_extraction_granite_speech as own

    kind = own.GraniteSpeechFeatureExtractor
    made = kind.__new__(kind)
    made.melspec_kwargs = {"n_fft": 512, "win_length": 400, "hop_length": 160, "n_mels": mels}
    made.projector_window_size, made.projector_downsample_rate = 15, 5
    made.mel_filters = Spectrograms(made.melspec_kwargs)
    return made


def read(name: str, sounds: Sequence[np.ndarray], mels: int = MELS) -> tuple[list[Any], list[int]]:
    """(frames of each sound as transformers' encoder reads them, how many tokens stand for each)."""
    from transformers.models.granite_speech import feature_extraction_granite_speech as own

    given, counts = [], []
    with mock.patch.object(own, "requires_backends", lambda *_: None):
        for sound in sounds:
            found = extractor(mels)([sound])
            given.append(found["input_features"])
            counts += found["audio_embed_sizes"]
    return given, counts


def features(name: str, model: Any, sound: np.ndarray) -> np.ndarray:
    """float32 [N, D]: the embeddings that stand in a sound's places, as large as the decoder takes them."""
    import torch

    (frames,), _ = read(name, [sound])
    with torch.no_grad():
        found = model.model.get_audio_features(frames, return_dict=True).pooler_output[0]
    return (found * SCALES["embedding_multiplier"]).numpy()


def expected(name: str, model: Any, ids: Sequence[int], sounds: Sequence[np.ndarray]) -> tuple[list[int], list[int]]:
    """(prompt ids, greedy tokens) as transformers has them, of a prompt with one `PLACE` a sound."""
    import torch

    given, counts = read(name, sounds)
    left, whole = iter(counts), []
    for one in ids:
        whole += [TOKEN] * next(left) if one == PLACE else [one]
    tokens = torch.tensor([whole])
    asked: dict[str, Any] = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    with torch.no_grad():
        rows = [model.model.get_audio_features(one, return_dict=True).pooler_output[0] for one in given]
        if rows:
            asked["input_features"] = torch.zeros(1)
        together = types.SimpleNamespace(pooler_output=torch.cat(rows) if rows else None)
        with mock.patch.object(model.model, "get_audio_features", lambda *_, **__: together):
            out = model.generate(**asked, do_sample=False, max_new_tokens=STEPS, min_new_tokens=STEPS)
    return whole, out[0, len(whole) :].tolist()


def adapt(model: Any, folder: Path) -> None:
    """Gives transformers' model an adapter, which it has on where there are sounds, and writes it beside the checkpoint."""
    import peft
    import torch
    import transformers

    model.add_adapter(peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "lora_" in parameter_name:
                parameter.normal_(0.0, 0.5)
    transformers.PreTrainedModel.save_pretrained(model, folder)
