"""What transformers says of videos: its own video processors, with Pillow where they want torchvision, which is not here."""

from __future__ import annotations

import builtins
import functools
import importlib
import sys
import types
from collections.abc import Sequence
from typing import Any
from unittest import mock

import numpy as np
from PIL import Image

from tests.models.tiny_towers import TINY
from tests.models.tiny_vision import picture

KINDS = {
    "Qwen2-VL": ("qwen2_vl", "Qwen2VLVideoProcessor"),
    "Qwen2.5-VL": ("qwen2_vl", "Qwen2VLVideoProcessor"),
    "Qwen3-VL": ("qwen3_vl", "Qwen3VLVideoProcessor"),
    "Qwen3-VL MoE": ("qwen3_vl", "Qwen3VLVideoProcessor"),
    "Qwen3.5": ("qwen3_vl", "Qwen3VLVideoProcessor"),
    "Qwen3.5 MoE": ("qwen3_vl", "Qwen3VLVideoProcessor"),
    "LLaVA-OneVision": ("llava_onevision", "LlavaOnevisionVideoProcessor"),
    "GLM-4.1V": ("glm4v", "Glm4vVideoProcessor"),
    "GLM-4.5V": ("glm4v", "Glm4vVideoProcessor"),
    "GLM-4.6V": ("glm46v", "Glm46VVideoProcessor"),
    "Gemma 4": ("gemma4", "Gemma4VideoProcessor"),
}
"""Families that read videos: where transformers has their processor."""


def clip(frames: int, width: int, height: int, seed: int = 0) -> np.ndarray:
    """uint8 [T, H, W, 3]: pictures that change."""
    return np.stack([np.asarray(picture(width, height, seed * 1000 + i)) for i in range(frames)])


@functools.cache
def _class(name: str) -> Any:
    module, kind = KINDS[name]
    whole = ["torchvision", "transforms", "v2", "functional"]
    stand_ins = {part: types.ModuleType(part) for part in (".".join(whole[: i + 1]) for i in range(len(whole)))}
    here = {part: sys.modules.get(part) for part in stand_ins}
    path = f"transformers.models.{module}.video_processing_{module}"
    try:
        sys.modules.update(stand_ins)
        with mock.patch.object(builtins, "tvF", types.SimpleNamespace(InterpolationMode=int), create=True):
            base = getattr(importlib.import_module(path), kind)
    finally:
        for part, was in here.items():
            sys.modules.pop(part)
            if was is not None:
                sys.modules[part] = was
    own = {"rescale_and_normalize": _normalized, "do_convert_rgb": False, "aspect_ratio_preserving_resize": _fitted}
    return type(kind, (base,), own)


def _fitted(self: Any, video: Any, patch_size: int, max_patches: int, pooling_kernel_size: int, resample: Any) -> Any:
    from transformers.models.gemma4.image_processing_pil_gemma4 import get_aspect_ratio_preserving_size

    height, width = get_aspect_ratio_preserving_size(*video.shape[-2:], patch_size, max_patches, pooling_kernel_size)
    return _resized(self, video, types.SimpleNamespace(height=height, width=width), resample)


def _resized(self: Any, image: Any, size: Any, resample: Any = None, **_: Any) -> Any:
    import torch

    flat = image.reshape(-1, *image.shape[-3:]).permute(0, 2, 3, 1).numpy()
    made = [Image.fromarray(one).resize((size.width, size.height), resample=int(resample)) for one in flat]
    found = torch.from_numpy(np.stack([np.asarray(one) for one in made])).permute(0, 3, 1, 2)
    return found.reshape(*image.shape[:-2], size.height, size.width).contiguous()


def _normalized(self: Any, images: Any, rescale: bool, factor: float, normalize: bool, mean: Any, std: Any) -> Any:
    import torch
    from transformers import image_transforms as own

    found = images.numpy()
    found = own.rescale(found, factor) if rescale else found
    last = np.moveaxis(found, -3, -1)
    last = (
        own.normalize(last.reshape(-1, *last.shape[-2:]), mean, std, input_data_format="channels_last").reshape(
            last.shape
        )
        if normalize
        else last
    )
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(last, -1, -3)).astype(np.float32))


def processor(name: str, **said: Any) -> Any:
    """transformers' video processor of a family, as its file would say."""
    from transformers.video_processing_utils import BaseVideoProcessor

    BaseVideoProcessor.resize = _resized  # type: ignore[method-assign]
    return _class(name)(**{**TINY[name].videos, **said})


def read(name: str, videos: Sequence[tuple[np.ndarray, float | None]], **said: Any) -> tuple[dict[str, Any], list[str]]:
    """(what transformers gives a model of videos with their frames a second, what its processor writes for each)."""
    import torch
    import transformers

    given: dict[str, list[Any]] = {}
    texts = []
    for frames, fps in videos:
        about = {"total_num_frames": len(frames), "fps": fps, "frames_indices": list(range(len(frames)))}
        found = dict(processor(name, **said)(frames, video_metadata=[about], return_metadata=True, return_tensors="pt"))
        (times,) = found.pop("video_metadata")
        mark = TINY[name].tokens[3]
        if name == "Gemma 4":
            own = types.SimpleNamespace(boi_token="<|image>", eoi_token="<image|>", video_token=mark)
            texts.append(transformers.Gemma4Processor.replace_video_token(own, {**found, "video_metadata": [times]}, 0))
            found.pop("num_soft_tokens_per_video")
        elif name.startswith("GLM"):
            kind = transformers.Glm46VProcessor if name == "GLM-4.6V" else transformers.Glm4vProcessor
            own = types.SimpleNamespace(
                image_token=TINY[name].tokens[2], video_processor=types.SimpleNamespace(merge_size=2)
            )
            own.replace_frame_token_id = functools.partial(kind.replace_frame_token_id, own)
            texts.append(kind.replace_video_token(own, {**found, "video_metadata": [times]}, 0))
        elif name == "LLaVA-OneVision":
            side = found["pixel_values_videos"].shape[-1] // TINY[name].vision["patch_size"]
            own = types.SimpleNamespace(num_image_tokens=side**2, video_token=mark)
            texts.append(transformers.LlavaOnevisionProcessor.replace_video_token(own, found, 0))
        else:
            own = types.SimpleNamespace(
                video_token=mark, vision_start_token="<|vision_start|>", vision_end_token="<|vision_end|>",
                video_processor=types.SimpleNamespace(merge_size=2, temporal_patch_size=2),
            )  # fmt: skip
            own._calculate_timestamps = functools.partial(transformers.Qwen3VLProcessor._calculate_timestamps, own)
            third = name.startswith("Qwen3")
            kind = transformers.Qwen3VLProcessor if third else transformers.Qwen2VLProcessor
            texts.append(kind.replace_video_token(own, {**found, "video_metadata": [times]}, 0))
            if name == "Qwen2.5-VL":
                given.setdefault("second_per_grid_ts", []).append(2 / times.sampled_fps)
        for key, value in found.items():
            given.setdefault(key, []).append(value)
    made = {k: torch.cat(v) if isinstance(v[0], torch.Tensor) else torch.tensor(v) for k, v in given.items()}
    return made, texts
