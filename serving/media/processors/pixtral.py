"""Pixtral's (Agrawal et al. 2024, arXiv:2410.07073) and Mistral 3's: any size up to a bound, in whole patches, each row
of which ends with a token of its own."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from serving.media.processors.base import Fixed, Patched, Scaling, row_by_row, side_of

if TYPE_CHECKING:
    from PIL.Image import Image

BREAK, END = "[IMG_BREAK]", "[IMG_END]"


@dataclasses.dataclass(frozen=True)
class PixtralProcessor(Fixed):
    """Attributes as in `Processor`, and:

    Attributes:
        patch: side in pixels.
        merge: side of the square of patches that become one embedding.
        height, width: that an image may have at most.
    """

    placeholder: int
    patch: int
    merge: int
    height: int
    width: int
    scaling: Scaling
    mark: str = "[IMG]"
    three_numbers: bool = False
    together: bool = False

    @classmethod
    def of(cls, hf: Mapping[str, Any]) -> PixtralProcessor:
        said = hf.get("preprocessor") or {}
        height, width = side_of(said.get("size") or 1024, "longest_edge")
        return cls(
            placeholder=int(hf.get("image_token_index") or hf.get("image_token_id") or 10),
            patch=int(hf["vision_config"].get("patch_size", 16)),
            merge=merge_of(hf),
            height=height,
            width=width,
            scaling=Scaling.of(said),
        )

    def identity(self) -> str:
        return repr(self)

    def patched(self, image: Image) -> Patched:
        step = self.patch * self.merge
        if self.scaling.resize:
            width, height = self._size(image.width, image.height)
            image = self.scaling.resized(image, width, height)
        columns, rows = image.width // step, image.height // step
        if not columns or not rows or columns * step != image.width or rows * step != image.height:
            raise ValueError(
                f"this model takes images in whole squares of {step} pixels; of this one nothing else is made."
            )
        patches, place = row_by_row(self.scaling.normalized(np.asarray(image)), self.patch)
        m = self.merge
        if m > 1:  # square by square, so that those of a square come together
            order = np.arange(len(patches)).reshape(rows, m, columns, m).transpose(0, 2, 1, 3).reshape(-1)
            patches, place = patches[order], place[order]
        lines = (f"{self.mark}{BREAK}" * (rows - 1)) + f"{self.mark}{END}"
        return Patched(patches, place, rows, columns, (columns,) * rows, lines)

    def _size(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) within the bounds, in whole squares of patches, whatever patch the images' file names: transformers'
        processor overrules that too."""
        shrink = max(height / self.height, width / self.width)
        if shrink > 1:
            width, height = math.floor(width / shrink), math.floor(height / shrink)
        step = self.patch * self.merge
        columns, rows = (width - 1) // step + 1, (height - 1) // step + 1
        if not columns or not rows:
            raise ValueError("the image is too long for its width: nothing would be left of it.")
        return columns * step, rows * step


def merge_of(hf: Mapping[str, Any]) -> int:
    """Side of the square of patches that become one embedding."""
    return int(hf.get("spatial_merge_size", 2)) if hf["architectures"][0].startswith("Mistral3") else 1
