"""Tiny random models of Gemma's that hear with a conformer, made by transformers: the checkpoint with its processor's files, and
what it should say. The same functions as in `tests.models.tiny_audio`. Each sound is heard on its own: what transformers pads
several to would be heard, too."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers

from tests.models.tiny_audio import PARTS, PLACE, STEPS
from tests.models.tiny_towers import START, TEXT, VOCAB

MELS = 16
SLIDING = {
    "head_dim": 16, "sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4,
    "hidden_size_per_layer_input": 16, "num_kv_shared_layers": 2, "tie_word_embeddings": True,
}  # fmt: skip
LOCAL = {"rope_type": "default", "rope_theta": 1e4}
ROPE3 = {"full_attention": {"rope_type": "default", "rope_theta": 1e6}, "sliding_attention": LOCAL}
ROPE4 = ROPE3 | {"full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6}}


@dataclasses.dataclass(frozen=True)
class TinyConformer:
    """transformers' classes of a family, and its encoder.

    Attributes:
        model: its name.
        audio, text, vision: fields of the parts' configurations.
        ids: of the whole's.
        tokens: of the tokenizer, from `START` + 2 on.
        around: what its processor writes around a sound's tokens, and the token itself.
        features: what its feature extractor is made with.
    """

    model: str
    audio: Mapping[str, Any]
    text: Mapping[str, Any]
    vision: Mapping[str, Any] | None
    ids: Mapping[str, Any]
    tokens: tuple[str, ...]
    around: tuple[str, str, str]
    features: Mapping[str, Any]

    @property
    def sound_token(self) -> int:
        return self.ids["audio_token_id"]


TINY = {
    "Gemma 3n": TinyConformer(
        "Gemma3nForConditionalGeneration",
        {"hidden_size": 32, "input_feat_size": MELS, "conf_attention_chunk_size": 4, "conf_attention_context_left": 6,
         "conf_attention_context_right": 2, "conf_num_attention_heads": 2, "conf_num_hidden_layers": 2,
         "sscp_conv_channel_size": [8, 4], "vocab_size": 8, "vocab_offset": 376},
        SLIDING | {"vocab_size_per_layer_input": 373, "laurel_rank": 8, "rope_parameters": ROPE3,
                   "activation_sparsity_pattern": [0.9, 0.0, 0.0, 0.0]},
        {"hidden_size": 24, "vocab_size": 3, "vocab_offset": 373, "label_names": ["a"]},
        {"audio_token_id": 377, "eoa_token_id": 376, "boa_token_id": 372, "image_token_id": 374, "boi_token_id": 371,
         "eoi_token_id": 373, "audio_soft_tokens_per_image": 42},
        ("<start_of_audio>", "<unused_1>", "<unused_2>", "<unused_3>", "<end_of_audio>", "<audio_soft_token>"),
        ("\n\n<start_of_audio>", "<audio_soft_token>", "<end_of_audio>\n\n"), {"feature_size": MELS},
    ),
}  # fmt: skip
TINY["Gemma 4, heard"] = TinyConformer(
    "Gemma4ForConditionalGeneration",
    {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "subsampling_conv_channels": [MELS, 4],
     "attention_chunk_size": 4, "attention_context_left": 5, "output_proj_dims": 24},
    SLIDING | {"vocab_size_per_layer_input": VOCAB, "global_head_dim": 16, "rope_parameters": ROPE4},
    {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
     "head_dim": 16, "patch_size": 4, "position_embedding_size": 256},
    {"audio_token_id": 375, "boa_token_id": 372, "eoa_token_index": 373, "image_token_id": 376, "video_token_id": 378,
     "boi_token_id": 374, "tie_word_embeddings": True},
    ("<|audio>", "<audio|>", "<|image>", "<|audio|>", "<|image|>", "<image|>"), ("<|audio>", "<|audio|>", "<audio|>"),
    {"feature_size": MELS},
)  # fmt: skip
PICTURE = 383
"""Stands in ids for an image, as `PLACE` does for a sound."""
EYES: dict[str, Any] = {"patch_size": 4, "max_soft_tokens": 70}
BUFFERS = {"input_min": (-1.5, 0.5), "input_max": (1.0, 0.5), "output_min": (-1.5, 0.5), "output_max": (1.0, 0.5)}
"""Of Gemma 4's products: from where on bounds are drawn, and within which width."""


def extractor(name: str) -> Any:
    """transformers' features."""
    import transformers

    kind = TINY[name].model.removesuffix("ForConditionalGeneration") + "AudioFeatureExtractor"
    return getattr(transformers, kind)(**TINY[name].features)


def tokenizer_of(name: str) -> tokenizers.Tokenizer:
    words = tokenizers.Tokenizer(models.WordLevel({f"w{i}": i for i in range(START)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = ("<|im_start|>", "<|im_end|>", *TINY[name].tokens)
    words.add_special_tokens([tokenizers.AddedToken(text, special=True) for text in special])
    return words


@contextlib.contextmanager
def _without_timm() -> Iterator[None]:
    """Gemma 3n's eyes are timm's, which is not here: nothing stands in their place."""
    import torch
    import transformers

    real = transformers.AutoModel.from_config

    def from_config(config: Any, **how: Any) -> Any:
        return torch.nn.Identity() if config.model_type == "gemma3n_vision" else real(config, **how)

    with mock.patch.object(transformers.AutoModel, "from_config", from_config):
        yield


def save(name: str, folder: Path) -> Any:
    """Writes the checkpoint; returns transformers' model."""
    import torch
    import transformers

    tiny = TINY[name]
    config = getattr(transformers, tiny.model.removesuffix("ForConditionalGeneration") + "Config")(
        text_config={**TEXT, **tiny.text},
        audio_config=dict(tiny.audio),
        vision_config=dict(tiny.vision or {}),
        **tiny.ids,
    )
    torch.manual_seed(sum(name.encode()))
    with _without_timm():
        model = getattr(transformers, tiny.model)(config).eval().float()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 1.5 * parameter[0].numel() ** -0.5)
            elif "norm" in parameter_name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            else:
                parameter.normal_(0.0, 0.3)
        for buffer_name, buffer in model.named_buffers():
            if part := BUFFERS.get(buffer_name.rpartition(".")[2]):
                buffer.copy_(part[0] + part[1] * torch.rand_like(buffer))
    model.save_pretrained(folder)
    said = {"feature_extractor": json.loads(extractor(name).to_json_string()), "image_processor": EYES}
    (folder / "processor_config.json").write_text(json.dumps(said))
    tokenizer_of(name).save(str(folder / "tokenizer.json"))
    template = PARTS.replace("{% elif", "{% elif c.type == 'image' %}<|image|>{% elif", 1).replace(
        "MARK", tiny.around[1]
    )
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "w2", "chat_template": template}))
    return model


def read(name: str, sounds: Sequence[np.ndarray]) -> tuple[list[dict[str, Any]], list[int]]:
    """(what transformers gives its model of each sound, how many tokens stand for each)."""
    import transformers

    tiny, given, counts = TINY[name], [], []
    own: Any = types.SimpleNamespace(boa_token="", audio_token="a", eoa_token="")
    for sound in sounds:
        found = dict(extractor(name)([sound], return_tensors="pt"))
        given.append(found)
        if name == "Gemma 3n":
            counts.append(tiny.ids["audio_soft_tokens_per_image"])
        else:
            counts.append(len(transformers.Gemma4Processor.replace_audio_token(own, found, 0)))
    return given, counts


def heard(name: str, model: Any, sound: np.ndarray) -> Any:
    """What transformers' encoder makes of a sound alone."""
    import torch

    (given,), _ = read(name, [sound])
    mask = given["input_features_mask"]
    with torch.no_grad():
        return type(model.model).get_audio_features(
            model.model, given["input_features"], ~mask if name == "Gemma 3n" else mask, return_dict=True
        )


def features(name: str, model: Any, sound: np.ndarray) -> np.ndarray:
    """float32 [N, D]: the embeddings that stand in a sound's places."""
    import torch

    found = heard(name, model, sound)
    if name != "Gemma 3n":
        return found.pooler_output[found.attention_mask].numpy()
    tiny = TINY[name]
    with torch.no_grad():
        silence = model.model.embed_audio(input_ids=torch.tensor([[VOCAB - 1]]))[0]
    real = found.pooler_output[0][~found.audio_mel_mask[0]]
    return torch.cat([real, silence.expand(tiny.ids["audio_soft_tokens_per_image"] - len(real), -1)]).numpy()


def expected(
    name: str, model: Any, ids: Sequence[int], sounds: Sequence[np.ndarray], images: Sequence[Any] = ()
) -> tuple[list[int], list[int]]:
    """(prompt ids, greedy tokens) as transformers has them, of a prompt with one `PLACE` a sound and one `PICTURE` an image."""
    import torch
    import transformers

    tiny, words = TINY[name], tokenizer_of(name)
    counts = iter(read(name, sounds)[1])
    seen = (
        dict(transformers.Gemma4ImageProcessorPil(**EYES)(images=list(images), return_tensors="pt")) if images else {}
    )
    sizes = iter(seen.pop("num_soft_tokens_per_image", ()))
    before, mark, behind = tiny.around
    whole: list[int] = []
    for one in ids:
        if one == PLACE:
            whole += words.encode(before + mark * next(counts) + behind).ids
        elif one == PICTURE:
            whole += words.encode(f"<|image>{'<|image|>' * int(next(sizes))}<image|>").ids
        else:
            whole.append(one)
    tokens = torch.tensor([whole])
    given: dict[str, Any] = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), **seen}
    if sounds:
        given |= {"input_features": torch.zeros(1, 1, MELS), "input_features_mask": torch.ones(1, 1, dtype=torch.bool)}
    together = _together(name, [heard(name, model, sound) for sound in sounds])
    with torch.no_grad(), mock.patch.object(model.model, "get_audio_features", lambda *_, **__: together):
        out = model.generate(**given, do_sample=False, max_new_tokens=STEPS, min_new_tokens=STEPS)
    return whole, out[0, len(whole) :].tolist()


def _together(name: str, found: Sequence[Any]) -> Any:
    """Sounds that were heard one by one, as transformers has them of a batch."""
    import torch

    if not found:
        return None
    most = max(one.pooler_output.shape[1] for one in found)

    def filled(rows: Any, value: Any) -> Any:
        missing = most - rows.shape[1]
        return torch.nn.functional.pad(rows, (0, 0) * (rows.dim() - 2) + (0, missing), value=value)

    rows = torch.cat([filled(one.pooler_output, 0.0) for one in found])
    if name == "Gemma 3n":
        return types.SimpleNamespace(
            pooler_output=rows, audio_mel_mask=torch.cat([filled(one.audio_mel_mask, True) for one in found])
        )
    return types.SimpleNamespace(
        pooler_output=rows, attention_mask=torch.cat([filled(one.attention_mask, False) for one in found])
    )
