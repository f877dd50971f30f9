"""CLIP's, for LLaVA 1.5: the shorter side scaled, the middle cut out. SigLIP's, which scales to one size and cuts nothing out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from serving.media.processors.base import HALF, Fixed, Patched, Scaling, row_by_row, side_of, value_of

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclasses.dataclass(frozen=True)
class ClipProcessor(Fixed):
    """Attributes as in `Processor`, and:

    Attributes:
        patch: side of a patch in pixels.
        short: pixels that the shorter side is scaled to; None where images are scaled to `whole`.
        whole: (height, width), whatever the image's.
        crop: (height, width) of what is cut out of the middle; None where all is read.
        tower: (height, width) that the tower reads.
        more: embeddings besides those of patches.
    """

    placeholder: int
    patch: int
    short: int | None
    whole: tuple[int, int] | None
    crop: tuple[int, int] | None
    tower: tuple[int, int]
    scaling: Scaling
    more: int = 0
    mark: str = ""
    three_numbers: bool = False
    together: bool = False

    @classmethod
    def of(cls, hf: Mapping[str, Any]) -> ClipProcessor:
        said, vision = hf.get("preprocessor") or {}, hf["vision_config"]
        # SigLIP's processor, by name or because it says nothing of a middle, cuts nothing out.
        plain = vision.get("model_type") == "siglip_vision_model" and not said.get("crop_size")
        size = said.get("size") or ({"height": 224, "width": 224} if plain else {"shortest_edge": 224})
        crop = value_of(said, "crop_size", {"height": 224, "width": 224})
        size = {"shortest_edge": size} if isinstance(size, int) else size
        side = int(vision.get("image_size") or (384 if plain else 336))
        short = size.get("shortest_edge")
        return cls(
            placeholder=int(hf.get("image_token_index") or hf.get("image_token_id") or 32000),
            patch=int(vision.get("patch_size") or 14),
            short=None if short is None else int(short),
            whole=None if short is not None else side_of(size),
            crop=side_of(crop) if value_of(said, "do_center_crop", not plain) else None,
            tower=(side, side),
            scaling=Scaling.of(said, 3, HALF, HALF) if plain else Scaling.of(said),
            more=int(
                hf.get("vision_feature_select_strategy") == "full" and vision.get("model_type") != "siglip_vision_model"
            ),
        )

    def identity(self) -> str:
        return repr(self)

    def patched(self, image: Image) -> Patched:
        width, height = image.size
        if self.short is not None:
            longer = int(self.short * max(image.size) / min(image.size))
            wide, high = (self.short, longer) if width <= height else (longer, self.short)
        else:
            assert self.whole is not None
            high, wide = self.whole
        pixels = np.asarray(self.scaling.resized(image, wide, high))
        pixels = pixels if self.crop is None else middle(pixels, *self.crop)
        if pixels.shape[:2] != self.tower:
            raise ValueError(
                f"preprocessor_config.json makes {pixels.shape[1]} x {pixels.shape[0]} pixels of it; the tower reads "
                f"{self.tower[1]} x {self.tower[0]}."
            )
        patches, place = row_by_row(self.scaling.normalized(pixels), self.patch)
        rows, columns = self.tower[0] // self.patch, self.tower[1] // self.patch
        return Patched(patches, place, rows, columns, (rows * columns + self.more,))


def middle(pixels_HWC: np.ndarray, height: int, width: int) -> np.ndarray:
    """The middle of an image, with black around it where it is smaller, as transformers' `center_crop` places it."""
    high, wide = pixels_HWC.shape[:2]
    top, left = (high - height) // 2, (wide - width) // 2
    if top >= 0 and left >= 0:
        return pixels_HWC[top : top + height, left : left + width]
    new = max(height, high), max(width, wide)
    above, before = math.ceil((new[0] - high) / 2), math.ceil((new[1] - wide) / 2)
    found = np.zeros((*new, pixels_HWC.shape[2]), pixels_HWC.dtype)
    found[above : above + high, before : before + wide] = pixels_HWC
    top, left = max(0, top + above), max(0, left + before)
    return found[top : min(new[0], top + height), left : min(new[1], left + width)]
