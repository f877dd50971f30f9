"""Gemma 3's (arXiv:2503.19786): any image in one square of one size. Its tokens attend to each other, whichever comes first."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from serving.media.processors.base import HALF, Fixed, Patched, Scaling, side_of, tiles_of

if TYPE_CHECKING:
    from PIL.Image import Image

SOFT, END = "<image_soft_token>", "<end_of_image>"


@dataclasses.dataclass(frozen=True)
class Gemma3Processor(Fixed):
    """Attributes as in `Processor`, and:

    Attributes:
        patch: side in pixels.
        height, width: that every image is scaled to.
        tokens: that it becomes.
    """

    placeholder: int
    patch: int
    height: int
    width: int
    tokens: int
    scaling: Scaling
    mark: str = "<start_of_image>"
    three_numbers: bool = False
    together: bool = True

    @classmethod
    def of(cls, hf: Mapping[str, Any]) -> Gemma3Processor:
        said = hf.get("preprocessor") or {}
        height, width = side_of(said.get("size") or 224)
        return cls(
            placeholder=int(hf.get("image_token_index") or hf.get("image_token_id") or 262144),
            patch=int(hf["vision_config"].get("patch_size", 14)),
            height=height,
            width=width,
            tokens=int(hf.get("mm_tokens_per_image", 256)),
            scaling=Scaling.of(said, 2, HALF, HALF),
        )

    def identity(self) -> str:
        return repr(self)

    def patched(self, image: Image) -> Patched:
        patches, place = tiles_of([self.scaling.resized(image, self.width, self.height)], self.scaling, self.patch)
        side = round(self.tokens**0.5)
        return Patched(patches, place, side, side, (self.tokens,), f"\n\n{self.mark}{SOFT}{END}\n\n")
