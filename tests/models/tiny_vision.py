"""Tiny random models that read images, made by transformers: the checkpoint with its processor's files, and what it should say."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from PIL import Image
from tokenizers import models, pre_tokenizers

VOCAB = 384
START, END, VISION_START, VISION_END, IMAGE, VIDEO = range(370, 376)
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
    "{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% elif c.type == 'text' %}{{ c.text }}"
    "{% endif %}{% endfor %}{% endif %}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>w6{% endif %}"
)
TEXT = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
}  # fmt: skip
IDS = {
    "image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END, "tie_word_embeddings": False,
}  # fmt: skip
STEPS = 32


@dataclasses.dataclass(frozen=True)
class TinyVision:
    """transformers' classes of a family, and its tower.

    Attributes:
        processor: what its image processor is made with.
    """

    config: str
    model: str
    image_processor: str
    vision: Mapping[str, Any]
    processor: Mapping[str, Any]
    text: Mapping[str, Any] = dataclasses.field(default_factory=dict)


SMALL = {"min_pixels": 28 * 28 * 4, "max_pixels": 28 * 28 * 64}
TINY: dict[str, TinyVision] = {
    "Qwen2-VL": TinyVision(
        "Qwen2VLConfig", "Qwen2VLForConditionalGeneration", "Qwen2VLImageProcessorPil",
        {"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 64, "mlp_ratio": 2}, SMALL,
    ),
    "Qwen2.5-VL": TinyVision(
        "Qwen2_5_VLConfig", "Qwen2_5_VLForConditionalGeneration", "Qwen2VLImageProcessorPil",
        {"depth": 3, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "out_hidden_size": 64,
         "fullatt_block_indexes": [1]}, SMALL,
    ),
}  # fmt: skip


QWEN3 = {
    "depth": 3, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "out_hidden_size": 64, "num_position_embeddings": 64,
    "patch_size": 16,
}  # fmt: skip
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "patch_size": 16}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
QWEN3_TEXT = {"head_dim": 16, "rope_parameters": MROPE}
HYBRID = QWEN3_TEXT | {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_key_head_dim": 16,
    "linear_num_value_heads": 4, "linear_value_head_dim": 16, "rope_parameters": MROPE | {"partial_rotary_factor": 1.0},
}  # fmt: skip
SMALL3 = HALF | {"size": {"shortest_edge": 32 * 32 * 4, "longest_edge": 32 * 32 * 64}}
TINY |= {
    "Qwen3-VL": TinyVision(
        "Qwen3VLConfig", "Qwen3VLForConditionalGeneration", "Qwen2VLImageProcessorPil",
        QWEN3 | {"deepstack_visual_indexes": [0, 2]}, SMALL3, QWEN3_TEXT | {"num_hidden_layers": 3},
    ),
    "Qwen3-VL MoE": TinyVision(
        "Qwen3VLMoeConfig", "Qwen3VLMoeForConditionalGeneration", "Qwen2VLImageProcessorPil",
        QWEN3 | {"deepstack_visual_indexes": [1]}, SMALL3,
        QWEN3_TEXT | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    ),
    "Qwen3.5": TinyVision(
        "Qwen3_5Config", "Qwen3_5ForConditionalGeneration", "Qwen2VLImageProcessorPil", QWEN3, SMALL3, HYBRID,
    ),
}  # fmt: skip
PLAIN = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
TINY["LLaVA 1.5"] = TinyVision(
    "LlavaConfig", "LlavaForConditionalGeneration", "CLIPImageProcessorPil",
    {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
     "num_attention_heads": 2, "patch_size": 14, "image_size": 84, "projection_dim": 32},
    {"size": {"shortest_edge": 84}, "crop_size": {"height": 84, "width": 84}}, PLAIN | {"model_type": "llama"},
)  # fmt: skip


def picture(width: int, height: int, seed: int = 0, mode: str = "RGB") -> Image.Image:
    """An image of smooth colours and some noise."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = [127 + 90 * np.sin(x / (7 + 3 * c) + seed) * np.cos(y / (5 + 2 * c)) for c in range(3)]
    noisy = np.stack(waves, -1) + random.integers(-30, 30, (height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).convert(mode)


SIZES = ((1, 1), (5, 300), (140, 84), (333, 217), (640, 480), (999, 5))
"""Width and height of images that are tried: the smallest, long ones, one that is scaled up and two that are scaled down."""


def oracle_processor(name: str) -> Any:
    """transformers' image processor, Pillow's."""
    import transformers

    tiny = TINY[name]
    return getattr(transformers, tiny.image_processor)(**tiny.processor)


def save(name: str, folder: Path) -> Any:
    """Writes the checkpoint; returns transformers' model."""
    import torch
    import transformers

    tiny = TINY[name]
    ids = {"image_token_index": IMAGE, "tie_word_embeddings": False} if tiny.config == "LlavaConfig" else IDS
    config = getattr(transformers, tiny.config)(
        text_config={**TEXT, **tiny.text}, vision_config=dict(tiny.vision), **ids
    )
    torch.manual_seed(sum(name.encode()))
    model = getattr(transformers, tiny.model)(config).eval().float()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 1.5 * parameter[0].numel() ** -0.5)
            elif "norm" in parameter_name or "ln_" in parameter_name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            else:
                parameter.normal_(0.0, 0.3)
    model.save_pretrained(folder)
    oracle_processor(name).save_pretrained(folder)
    words = tokenizers.Tokenizer(models.WordLevel({f"w{i}": i for i in range(START)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens([tokenizers.AddedToken(text, special=True) for text in SPECIAL])
    words.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "w2", "chat_template": TEMPLATE}))
    return model


def expected(name: str, model: Any, ids: Sequence[int], images: Sequence[Image.Image]) -> tuple[list[int], list[int]]:
    """(prompt ids, greedy tokens) as transformers has them, of a prompt with one placeholder an image."""
    import torch

    whole: list[int] = []
    given: dict[str, Any] = {}
    if images:
        given = dict(oracle_processor(name)(images=list(images), return_tensors="pt"))
    counts = iter(_counts(name, given))
    for token in ids:
        whole += [token] * (next(counts) if token == IMAGE else 1)
    tokens = torch.tensor([whole])
    if TINY[name].config != "LlavaConfig":
        given["mm_token_type_ids"] = (tokens == IMAGE).int()
    with torch.no_grad():
        out = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=STEPS, min_new_tokens=STEPS, **given
        )  # fmt: skip
    return whole, out[0, len(whole) :].tolist()


def _counts(name: str, read: Mapping[str, Any]) -> list[int]:
    """How many embeddings each image has."""
    if not read:
        return []
    if "image_grid_thw" in read:
        return [int(np.prod(grid)) // 4 for grid in read["image_grid_thw"].tolist()]
    vision = TINY[name].vision
    return [(vision["image_size"] // vision["patch_size"]) ** 2] * len(read.get("pixel_values", ()))


def features(name: str, model: Any, image: Image.Image) -> np.ndarray:
    """float32 [N, D]: the embeddings that transformers puts in an image's places."""
    import torch

    read = oracle_processor(name)(images=[image], return_tensors="pt")
    with torch.no_grad():
        found = model.model.get_image_features(**read)
    parts = [found.pooler_output, *(getattr(found, "deepstack_features", None) or ())]
    return torch.cat([torch.cat(list(part)) for part in parts], -1).float().numpy()


def positions(name: str, model: Any, ids: Sequence[int], images: Sequence[Image.Image]) -> tuple[np.ndarray, int]:
    """(int [3, L], what later positions are more than their places) as transformers has them."""
    import torch

    read = oracle_processor(name)(images=list(images), return_tensors="pt")
    tokens = torch.tensor([list(ids)])
    found, delta = model.model.get_rope_index(tokens, (tokens == IMAGE).int(), image_grid_thw=read["image_grid_thw"])
    return found[:, 0].numpy(), int(delta)
