"""CLIP's, for LLaVA 1.5: the shorter side scaled, the middle cut out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from serving.media.processors.base import CLIP_MEAN, CLIP_STD, Patched, levels, normalized

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclasses.dataclass(frozen=True)
class ClipProcessor:
    """Attributes as in `Processor`, and:

    Attributes:
        patch: side of a patch in pixels.
        short: pixels that the shorter side is scaled to.
        height, width: of what is cut out.
        resample, scale, mean, std: as in `QwenVLProcessor`.
    """

    placeholder: int
    patch: int
    short: int
    height: int
    width: int
    resample: int
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    three_numbers: bool = False

    @classmethod
    def of(cls, hf: Mapping[str, Any]) -> ClipProcessor:
        said = hf.get("preprocessor") or {}
        size, crop = said.get("size") or {"shortest_edge": 224}, said.get("crop_size") or {"height": 224, "width": 224}
        size = {"shortest_edge": size} if isinstance(size, int) else size
        crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
        made = cls(
            placeholder=int(hf.get("image_token_index") or hf.get("image_token_id") or 32000),
            patch=int(hf["vision_config"].get("patch_size", 14)),
            short=int(size.get("shortest_edge") or 0),
            height=int(crop["height"]),
            width=int(crop["width"]),
            resample=int(said.get("resample", 3)),
            scale=float(said.get("rescale_factor", 1 / 255)),
            mean=tuple(said.get("image_mean") or CLIP_MEAN),
            std=tuple(said.get("image_std") or CLIP_STD),
        )
        if made.short < max(made.height, made.width):
            raise ValueError(
                f"preprocessor_config.json scales the shorter side to {made.short} pixels and cuts out {made.width} x "
                f"{made.height}; it must be at least as long."
            )
        return made

    def identity(self) -> str:
        return repr(self)

    def patched(self, image: Image) -> Patched:
        width, height = image.size
        longer = int(self.short * max(image.size) / min(image.size))
        size = (self.short, longer) if width <= height else (longer, self.short)
        scaled = np.asarray(image.resize(size, resample=self.resample))  # type: ignore[arg-type]
        top, left = (size[1] - self.height) // 2, (size[0] - self.width) // 2
        middle = scaled[top : top + self.height, left : left + self.width]
        pixels = normalized(middle, levels(self.scale, self.mean, self.std))
        rows, columns, p = self.height // self.patch, self.width // self.patch, self.patch
        cut = pixels[:, : rows * p, : columns * p].reshape(3, rows, p, columns, p).transpose(1, 3, 0, 2, 4)
        place = np.moveaxis(np.indices((rows, columns), np.int32), 0, -1).reshape(-1, 2)
        return Patched(np.ascontiguousarray(cut).reshape(rows * columns, -1), place, rows, columns)

    def tokens(self, image: Patched) -> tuple[Sequence[int], np.ndarray]:
        count = image.rows * image.columns
        return [self.placeholder] * count, np.arange(count)
