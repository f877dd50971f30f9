"""CLIP's, for LLaVA 1.5: the shorter side scaled, the middle cut out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from serving.media.processors.base import Fixed, Patched, Scaling, row_by_row

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclasses.dataclass(frozen=True)
class ClipProcessor(Fixed):
    """Attributes as in `Processor`, and:

    Attributes:
        patch: side of a patch in pixels.
        short: pixels that the shorter side is scaled to.
        height, width: of what is cut out.
    """

    placeholder: int
    patch: int
    short: int
    height: int
    width: int
    scaling: Scaling
    mark: str = ""
    three_numbers: bool = False
    together: bool = False

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
            scaling=Scaling.of(said),
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
        scaled = np.asarray(self.scaling.resized(image, *size))
        top, left = (size[1] - self.height) // 2, (size[0] - self.width) // 2
        middle = scaled[top : top + self.height, left : left + self.width]
        patches, place = row_by_row(self.scaling.normalized(middle), self.patch)
        rows, columns = self.height // self.patch, self.width // self.patch
        return Patched(patches, place, rows, columns, (rows * columns,))
