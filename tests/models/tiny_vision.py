"""Tiny random models that read images, made by transformers: the checkpoint with its processor's files, and what it should say."""

from __future__ import annotations

import json
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from PIL import Image
from tokenizers import decoders, models, pre_tokenizers

from tests.models import tiny_llama4
from tests.models.tiny_towers import END, IMAGE, START, TEXT, TINY, VIDEO, VISION_END, VISION_START

__all__ = ["END", "IMAGE", "START", "TINY", "VIDEO", "VISION_END", "VISION_START"]

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
    "{% if c.type == 'image' %}MARK{% elif c.type == 'video' %}CLIP{% elif c.type == 'text' %}{{ c.text }}"
    "{% endif %}{% endfor %}{% endif %}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>w6{% endif %}"
)
STEPS = 32


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


def tokenizer_of(name: str) -> tokenizers.Tokenizer:
    """Words, and the tokens that stand around a family's images."""
    words = tokenizers.Tokenizer(models.WordLevel({f"w{i}": i for i in range(START)}, unk_token="w3"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.WhitespaceSplit(), decoders.ByteLevel()
    special = ("<|im_start|>", "<|im_end|>", *TINY[name].tokens)
    words.add_special_tokens([tokenizers.AddedToken(text, special=True) for text in special])
    return words


BUFFERS = {
    "input_min": (-1.5, 0.5), "input_max": (1.0, 0.5), "output_min": (-1.5, 0.5), "output_max": (1.0, 0.5),
    "std_bias": (-1.0, 2.0), "std_scale": (0.5, 0.5),
}  # fmt: skip
"""Of Gemma 4's tower: from where on they are drawn, and within which width."""


def save(name: str, folder: Path) -> Any:
    """Writes the checkpoint; returns transformers' model."""
    import torch
    import transformers

    tiny = TINY[name]
    config = getattr(transformers, tiny.config)(
        text_config={**TEXT, **tiny.text}, vision_config=dict(tiny.vision), **tiny.ids
    )
    torch.manual_seed(sum(name.encode()))
    model = getattr(transformers, tiny.model)(config).eval().float()
    if name.startswith("GLM"):
        model.model.get_placeholder_mask = _places_of_each
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 1.5 * parameter[0].numel() ** -0.5)
            elif "norm" in parameter_name or "ln_" in parameter_name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            else:
                parameter.normal_(0.0, 0.3)
        for buffer_name, buffer in model.named_buffers():
            if part := BUFFERS.get(buffer_name.rpartition(".")[2]):
                buffer.copy_(part[0] + part[1] * torch.rand_like(buffer))
    model.save_pretrained(folder)
    if tiny.image_processor:
        oracle_processor(name).save_pretrained(folder)
    else:
        (folder / "preprocessor_config.json").write_text(json.dumps(dict(tiny.processor)))
    tokenizer_of(name).save(str(folder / "tokenizer.json"))
    template = TEMPLATE.replace("MARK", tiny.mark).replace("CLIP", tiny.video_mark)
    if tiny.videos:
        (folder / "video_preprocessor_config.json").write_text(json.dumps(tiny.videos))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "w2", "chat_template": template}))
    return model


def read(name: str, images: Sequence[Image.Image]) -> dict[str, Any]:
    """What transformers' processor gives a model."""
    if not images:
        return {}
    if name == "Llama 4":
        tiny = TINY[name]
        return tiny_llama4.read(images, {"vision_config": tiny.vision, "preprocessor": tiny.processor})
    given: Any = [list(images)] if TINY[name].mark == "<image>" and "scale_factor" in TINY[name].ids else list(images)
    more = {"return_row_col_info": True} if given != list(images) else {}
    return dict(oracle_processor(name)(images=given, return_tensors="pt", **more))


ASIDE = ("rows", "cols", "num_patches", "num_crops", "num_soft_tokens_per_image", "aspect_ratios")
"""What processors say of images that models are not given."""


def written(name: str, model: Any, images: Sequence[Image.Image]) -> list[str]:
    """Of each image, what transformers' processors write in its place."""
    import transformers

    if not images:
        return []
    tiny, found = TINY[name], read(name, images)
    mark = tiny.tokens[2]
    own = types.SimpleNamespace(
        image_token=mark, fake_image_token=tiny.tokens[0],
        global_image_tag=tiny.tokens[1], start_image_token=tiny.tokens[0], end_image_token=tiny.tokens[1], image_seq_length=4,
        image_seq_len=(4 // int(tiny.ids.get("scale_factor", 2))) ** 2,
    )  # fmt: skip
    if mark == "[IMG]":
        side = tiny.vision["patch_size"] * (2 if name.startswith("Mistral") else 1)  # their processor needs torchvision
        sizes = [(height // side, width // side) for height, width in found["image_sizes"].tolist()]
        return ["[IMG_BREAK]".join([mark * columns] * rows) + "[IMG_END]" for rows, columns in sizes]
    if "scale_factor" in tiny.ids:
        return [transformers.Idefics3Processor.replace_image_token(own, found, i) for i in range(len(images))]
    if name == "InternVL":
        return [transformers.InternVLProcessor.replace_image_token(own, found, i) for i in range(len(images))]
    if name == "Llama 4":
        grids, write = found["aspect_ratios"].tolist(), transformers.Llama4Processor._prompt_split_image
        return [write(own, grid, 4) for grid in grids]
    counts = [len(features(name, model, image)) for image in images]
    around = ("", "") if tiny.tokens[0].startswith("<unused") else tiny.tokens[:2]
    return [around[0] + mark * count + around[1] for count in counts]


def expected(
    name: str,
    model: Any,
    ids: Sequence[int],
    images: Sequence[Image.Image],
    videos: Sequence[tuple[np.ndarray, Any]] = (),
) -> tuple[list[int], list[int]]:
    """(prompt ids, greedy tokens) as transformers has them, of a prompt with one placeholder an image and a video.

    Args:
        videos: frames, uint8 [T, H, W, 3], and how many there are a second, or None.
    """
    import torch

    whole, given = asked(name, model, ids, images, videos)
    with torch.no_grad():
        out = model.generate(**given, do_sample=False, max_new_tokens=STEPS, min_new_tokens=STEPS)
    return whole, out[0, len(whole) :].tolist()


def scores(name: str, model: Any, ids: Sequence[int], images: Sequence[Image.Image]) -> tuple[list[int], np.ndarray]:
    """(prompt ids, float32 [L, V] log probabilities of the token behind each)."""
    import torch

    whole, given = asked(name, model, ids, images)
    with torch.no_grad():
        return whole, torch.log_softmax(model(**given).logits[0].float(), -1).numpy()


def embedding(name: str, model: Any, ids: Sequence[int], images: Sequence[Image.Image]) -> np.ndarray:
    """float32 [D]: the last token's hidden state behind the last norm, at length 1."""
    import torch

    given = asked(name, model, ids, images)[1]
    with torch.no_grad():
        if name == "Llama 4":
            hidden = model(**given, output_hidden_states=True).hidden_states[-1]
        else:
            hidden = model.model(**given).last_hidden_state
    found = hidden[0, -1].float().numpy()
    return found / np.linalg.norm(found)


def asked(
    name: str,
    model: Any,
    ids: Sequence[int],
    images: Sequence[Image.Image],
    videos: Sequence[tuple[np.ndarray, Any]] = (),
) -> tuple[list[int], dict[str, Any]]:
    """(prompt ids, what a model of transformers is given), see `expected`."""
    import torch

    from tests.models import tiny_video

    words = tokenizer_of(name)
    clips, said = tiny_video.read(name, videos) if videos else ({}, [])
    said = [TINY[name].video_mark.replace(TINY[name].tokens[3], text) for text in said]  # as the chat template has it
    texts = {IMAGE: iter(written(name, model, images)), VIDEO: iter(said)}
    whole: list[int] = []
    for token in ids:
        whole += words.encode(next(texts[token])).ids if token in texts else [token]
    tokens = torch.tensor([whole])
    given = {key: value for key, value in read(name, images).items() if key not in ASIDE} | clips
    given |= {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if name.startswith(("Qwen", "GLM", "Gemma 4")):
        given["mm_token_type_ids"] = kinds_of(name, tokens)
    if name == "Gemma 3":
        given["token_type_ids"] = (tokens == IMAGE).int()
    return whole, given


def kinds_of(name: str, tokens: Any) -> Any:
    """Of tokens, 1 for images' and 2 for videos'."""
    if not name.startswith("GLM"):
        return (tokens == IMAGE).int() + 2 * (tokens == VIDEO).int()
    inside = (tokens == VIDEO + 1).cumsum(-1) > (tokens == VIDEO + 2).cumsum(-1)
    return (tokens == IMAGE).int() * (1 + inside.int())


def _places_of_each(input_ids: Any, inputs_embeds: Any, image_features: Any = None, video_features: Any = None) -> Any:
    """In place of GLM's own in transformers, which takes all places of images and videos, whose token is one, for each of both, and
    so refuses prompts with both."""
    kinds = kinds_of("GLM", input_ids)[..., None]
    return kinds == 1, kinds == 2


def features(name: str, model: Any, image: Image.Image) -> np.ndarray:
    """float32 [N, D]: the embeddings that transformers puts in an image's places."""
    import torch

    given = {key: value for key, value in read(name, [image]).items() if key not in ASIDE}
    with torch.no_grad():
        if name == "Llama 4":
            hidden = model.get_image_features(**given).last_hidden_state
            return model.multi_modal_projector(hidden.reshape(-1, hidden.shape[-1])).float().numpy()
        found = model.model.get_image_features(**given)
    parts = [found.pooler_output, *(getattr(found, "deepstack_features", None) or ())]
    return torch.cat([torch.cat(list(part)) for part in parts], -1).float().numpy()


def positions(
    name: str, model: Any, ids: Sequence[int], images: Sequence[Image.Image], clips: dict[str, Any] | None = None
) -> tuple[np.ndarray, int]:
    """(int [3, L], what later positions are more than their places) as transformers has them.

    Args:
        clips: what `tiny_video.read` says of videos.
    """
    import torch

    tokens = torch.tensor([list(ids)])
    kinds = kinds_of(name, tokens)
    own = {key: value for key, value in (clips or {}).items() if key != "pixel_values_videos"}
    found, delta = model.model.get_rope_index(tokens, kinds, image_grid_thw=read(name, images)["image_grid_thw"], **own)
    return found[:, 0].numpy(), int(delta)
