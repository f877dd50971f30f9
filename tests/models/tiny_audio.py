"""Tiny random models that hear, made by transformers (Ultravox, which it has not, of its parts): the checkpoint with its
processor's files, and what it should say."""

from __future__ import annotations

import dataclasses
import json
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers

from tests.models.tiny_towers import END, START, TEXT

STEPS = 32
PLACE = 374
SECONDS, MELS = 4, 16
"""Of a window, which the published ones have 30 of; and numbers of a frame."""
ENCODER = {
    "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 48, "num_mel_bins": MELS,
    "max_source_positions": SECONDS * 50, "activation_function": "gelu",
}  # fmt: skip
OLDER = {
    "encoder_layers": 2, "encoder_attention_heads": 2, "d_model": 32, "encoder_ffn_dim": 48, "num_mel_bins": MELS,
    "max_source_positions": SECONDS * 50, "activation_function": "gelu",
}  # fmt: skip
LLAMA = {"model_type": "llama", "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
EYES = {
    "depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "out_hidden_size": 64, "fullatt_block_indexes": [0],
}  # fmt: skip
QWEN2 = LLAMA | {"model_type": "qwen2"}


@dataclasses.dataclass(frozen=True)
class TinyAudio:
    """transformers' classes of a family, and its encoder.

    Attributes:
        model: its name.
        audio, text: fields of the encoder's and the decoder's configuration.
        ids: of the whole's.
        mark: what the chat template writes where a sound is; "" where it knows nothing of sounds.
        seconds: that its spectrograms are of.
    """

    model: str
    audio: Mapping[str, Any]
    text: Mapping[str, Any]
    ids: Mapping[str, Any]
    mark: str = "<|AUDIO|>"
    seconds: int = SECONDS


TINY = {
    "Audio Flamingo 3": TinyAudio(
        "AudioFlamingo3ForConditionalGeneration", ENCODER, QWEN2, {"audio_token_id": PLACE}, "<sound>"
    ),
    "Qwen2-Audio": TinyAudio("Qwen2AudioForConditionalGeneration", OLDER, QWEN2, {"audio_token_index": PLACE}),
    "Qwen2.5-Omni": TinyAudio(
        "Qwen2_5OmniThinkerForConditionalGeneration", OLDER | {"n_window": 20, "output_dim": 64, "max_source_positions": 1500},
        {"model_type": "qwen2_5_omni_text"},
        {"audio_token_index": PLACE, "vision_start_token_id": 372, "vision_config": EYES}, seconds=40,
    ),
    "Ultravox": TinyAudio(
        "UltravoxModel", OLDER | {"model_type": "whisper"}, LLAMA,
        {"stack_factor": 8, "hidden_size": 96, "projector_act": "swiglu", "projector_ln_mid": True}, "",
    ),
    "Ultravox 0.4": TinyAudio(
        "UltravoxModel", OLDER | {"model_type": "whisper"}, LLAMA, {"stack_factor": 8, "hidden_size": 96}, ""
    ),
    "Voxtral": TinyAudio(
        "VoxtralForConditionalGeneration", ENCODER | {"intermediate_size": 128}, LLAMA | {"head_dim": 16},
        {"audio_token_id": PLACE}, "[AUDIO]",
    ),
}  # fmt: skip
PARTS = (
    "{% for m in messages %}<|im_start|>{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
    "{% if c.type == 'audio' %}MARK{% elif c.type == 'text' %}{{ c.text }}"
    "{% endif %}{% endfor %}{% endif %}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>w6{% endif %}"
)
TEXTS = (
    "{% for m in messages %}<|im_start|>{{ m['content'] | trim }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>w6{% endif %}"
)


def extractor(seconds: int = SECONDS, mels: int = MELS) -> Any:
    """transformers' features, by numpy: those by torch are further from the exact ones."""
    import transformers

    kind = transformers.WhisperFeatureExtractor
    exact = type(kind.__name__, (kind,), {"_torch_extract_fbank_features": kind._np_extract_fbank_features})
    return exact(feature_size=mels, chunk_length=seconds)


def tokenizer_of(name: str) -> tokenizers.Tokenizer:
    words = tokenizers.Tokenizer(models.WordLevel({f"w{i}": i for i in range(START)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = ("<|im_start|>", "<|im_end|>", "<unused_1>", "<unused_2>", TINY[name].mark or "<unused_3>")
    words.add_special_tokens([tokenizers.AddedToken(text, special=True) for text in special])
    return words


def save(name: str, folder: Path) -> Any:
    """Writes the checkpoint; returns transformers' model."""
    import torch
    import transformers

    tiny, text = TINY[name], {**TEXT, **TINY[name].text}
    torch.manual_seed(sum(name.encode()))
    if tiny.model == "UltravoxModel":
        model = Ultravox(tiny, text)
    else:
        config = getattr(transformers, tiny.model.removesuffix("ForConditionalGeneration") + "Config")(
            text_config=text, audio_config=dict(tiny.audio), tie_word_embeddings=False, **tiny.ids
        )
        model = getattr(transformers, tiny.model)(config).eval().float()
    module = model.module if isinstance(model, Ultravox) else model
    with torch.no_grad():
        for parameter_name, parameter in module.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 1.5 * parameter[0].numel() ** -0.5)
            elif "norm" in parameter_name or "ln_" in parameter_name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            else:
                parameter.normal_(0.0, 0.3)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    said = json.loads(extractor(tiny.seconds).to_json_string())
    (folder / "preprocessor_config.json").write_text(json.dumps(said))
    template = PARTS.replace("MARK", tiny.mark) if tiny.mark else TEXTS
    tokenizer_of(name).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return model


class Ultravox:
    """Fixie's model, of transformers' encoder and decoder: the encoder reads what sound there is and attends to no silence behind
    it, and a projector stands behind it (RMS norm of stacked rows, SwiGLU whose second half is the gate, RMS norm)."""

    def __init__(self, tiny: TinyAudio, text: Mapping[str, Any]) -> None:
        import torch
        import transformers
        from torch import nn

        said = {name: value for name, value in tiny.audio.items() if name != "model_type"}
        self.audio = transformers.WhisperConfig(**said, decoder_layers=1, attn_implementation="eager")
        self.text = transformers.AutoConfig.for_model(**{**text, "tie_word_embeddings": False})
        self.tiny, stack, width = tiny, tiny.ids["stack_factor"], tiny.ids["hidden_size"]
        middle, end = width // 2 if tiny.ids.get("projector_ln_mid") else 0, self.text.hidden_size
        self.module = nn.Module()
        self.module.audio_tower = transformers.models.whisper.modeling_whisper.WhisperEncoder(self.audio)
        self.module.language_model = transformers.AutoModelForCausalLM.from_config(self.text)
        projector = self.module.multi_modal_projector = nn.Module()
        projector.ln_pre = nn.RMSNorm(self.audio.d_model * stack, 1e-6)
        projector.linear_1 = nn.Linear(self.audio.d_model * stack, width, bias=False)
        projector.linear_2 = nn.Linear(width // 2, end, bias=False)
        projector.add_module("ln_mid" if middle else "ln_post", nn.RMSNorm(middle or end, 1e-6))
        self.module.eval().float()
        self.config = types.SimpleNamespace(get_text_config=lambda: self.text)
        self.torch = torch

    def save_pretrained(self, folder: Path) -> None:
        from safetensors.torch import save_file

        tensors = {name: tensor.contiguous() for name, tensor in self.module.state_dict().items()}
        save_file(tensors, folder / "model.safetensors")
        said = {
            "architectures": ["UltravoxModel"], "model_type": "ultravox", "audio_config": dict(self.tiny.audio),
            "text_config": self.text.to_dict(), **self.tiny.ids,
        }  # fmt: skip
        (folder / "config.json").write_text(json.dumps(said))

    def embeddings(self, frames: Any, behind: int) -> Any:
        """Of frames [mels, T], of which the last `behind` are silence that is not attended to."""
        torch, tower, projector = self.torch, self.module.audio_tower, self.module.multi_modal_projector
        x = torch.nn.functional.gelu(tower.conv1(frames[None]))
        x = torch.nn.functional.gelu(tower.conv2(x))[0].T
        x = (x + tower.embed_positions.weight[: len(x)])[None]
        real = (frames.shape[1] - behind - 1) // 2 + 1
        mask = torch.zeros(1, 1, x.shape[1], x.shape[1])
        mask[..., real:] = torch.finfo(torch.float32).min
        for layer in tower.layers:
            out = layer(x, mask)
            x = out[0] if isinstance(out, tuple) else out
        x, stack = tower.layer_norm(x)[0], self.tiny.ids["stack_factor"]
        count = -(-(frames.shape[1] - behind) // (2 * stack))
        x = torch.nn.functional.pad(x, (0, 0, 0, max(0, count * stack - len(x))))[: count * stack].reshape(count, -1)
        x = projector.linear_1(projector.ln_pre(x))
        x, gate = x.chunk(2, dim=-1)
        x = torch.nn.functional.silu(gate) * x
        if self.tiny.ids.get("projector_ln_mid"):
            return projector.linear_2(projector.ln_mid(x))
        return projector.ln_post(projector.linear_2(x))

    def read(self, sound: np.ndarray) -> Any:
        """[N, D] of a sound, as its processor cuts it: one spectrogram, in windows, the last of several filled up with zeros."""
        torch = self.torch
        sound = np.pad(sound, (0, max(0, 320 - len(sound))))
        found = extractor()(
            sound, sampling_rate=16_000, padding="longest", pad_to_multiple_of=160, truncation=False, return_attention_mask=True
        )  # fmt: skip
        frames, length, window = found["input_features"][0], int(found["attention_mask"][0].sum()), SECONDS * 100
        parts = []
        for at in range(0, length, window):
            part = torch.from_numpy(np.ascontiguousarray(frames[:, at : at + window], np.float32))
            behind = window - part.shape[1] if at else 0
            parts.append(self.embeddings(torch.nn.functional.pad(part, (0, behind)), behind))
        return torch.cat(parts)


def read(name: str, sounds: Sequence[np.ndarray]) -> tuple[dict[str, Any], list[int]]:
    """(what transformers gives its model of the sounds, how many tokens stand for each)."""
    import torch
    import transformers

    made, sounds = extractor(TINY[name].seconds), list(sounds)
    if name == "Voxtral":
        own = types.SimpleNamespace(feature_extractor=made)
        how = transformers.VoxtralProcessor.audio_kwargs | {"pad_to_multiple_of": SECONDS * 16_000}
        found = transformers.VoxtralProcessor._retrieve_input_features(
            own, sounds, **how | {"max_source_positions": SECONDS * 100}
        )
        windows = [-(-len(one) // (SECONDS * 16_000)) for one in sounds]
        return {"input_features": found.float()}, [count * SECONDS * 100 // 8 for count in windows]
    # Qwen2.5-Omni's wants torchvision; it pads and counts as Qwen2-Audio's does.
    kind = transformers.AudioFlamingo3Processor if name == "Audio Flamingo 3" else transformers.Qwen2AudioProcessor
    own = types.SimpleNamespace(feature_extractor=made, audio_token="a", max_audio_len=600)
    own.replace_audio_token = types.MethodType(kind.replace_audio_token, own)
    if hasattr(kind, "_get_audio_token_length"):
        own._get_audio_token_length = types.MethodType(kind._get_audio_token_length, own)
    found, texts = kind._process_audio(
        own, sounds, sampling_rate=16_000, return_attention_mask=True, return_tensors="pt"
    )
    names = ("input_features", "feature_attention_mask", "input_features_mask")
    given = {key: torch.as_tensor(found[key]) for key in names if key in found}
    return given | {"input_features": given["input_features"].float()}, [len(text) for text in texts]


def features(name: str, model: Any, sound: np.ndarray) -> np.ndarray:
    """float32 [N, D]: the embeddings that stand in a sound's places."""
    import torch

    with torch.no_grad():
        if isinstance(model, Ultravox):
            return model.read(sound).numpy()
        given, (count,) = read(name, [sound])
        if name == "Qwen2.5-Omni":
            return model.get_audio_features(**given).pooler_output.numpy()
        if name != "Qwen2-Audio":
            return model.model.get_audio_features(**given).pooler_output.numpy()
        tower, projector = model.model.audio_tower, model.model.multi_modal_projector
        real = (int(given["feature_attention_mask"].sum()) - 1) // 2 + 1
        mask = torch.zeros(1, 1, SECONDS * 50, SECONDS * 50)
        mask[..., real:] = torch.finfo(torch.float32).min
        return projector(tower(given["input_features"], mask).last_hidden_state)[0, :count].numpy()


def expected(name: str, model: Any, ids: Sequence[int], sounds: Sequence[np.ndarray]) -> tuple[list[int], list[int]]:
    """(prompt ids, greedy tokens) as transformers has them, of a prompt with one `PLACE` a sound."""
    import torch

    how: dict[str, Any] = {"do_sample": False, "max_new_tokens": STEPS, "min_new_tokens": STEPS}
    with torch.no_grad():
        if isinstance(model, Ultravox):
            parts = [model.read(sound) for sound in sounds]
            counts, token = [len(part) for part in parts], TEXT["eos_token_id"]
        else:
            given, counts = read(name, sounds) if len(sounds) else ({}, [])
            parts, token = [], PLACE
        whole, left = [], iter(counts)
        for one in ids:
            whole += [token] * next(left) if one == PLACE else [one]
        tokens = torch.tensor([whole])
        if not isinstance(model, Ultravox) and (not name.startswith("Qwen") or min(counts, default=2) > 1):
            out = model.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), **given, **how)
            return whole, out[0, len(whole) :].tolist()
        # transformers cannot be given Ultravox, and takes single tokens of Qwen's for places that are not filled in yet.
        parts = parts or [torch.from_numpy(features(name, model, sound)) for sound in sounds]
        decoder = model.module.language_model if isinstance(model, Ultravox) else model
        embeds, at = decoder.get_input_embeddings()(tokens), 0
        left = iter(parts)
        for one in ids:
            if one == PLACE:
                part = next(left)
                embeds[0, at : at + len(part)] = part
                at += len(part)
            else:
                at += 1
        out = decoder.generate(inputs_embeds=embeds, attention_mask=torch.ones_like(tokens), **how)
        return whole, out[0].tolist()


TAIL = [END, START, 6]
