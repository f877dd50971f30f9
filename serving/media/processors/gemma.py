"""Gemma 3's (arXiv:2503.19786): any image in one square of one size. Its tokens attend to each other, whichever comes first. Where
a request asks for it, a long one is cut into several besides (pan and scan)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from serving.media.processors.base import HALF, Fixed, Patched, Scaling, side_of, tiles_of

if TYPE_CHECKING:
    from PIL.Image import Image

SOFT, END = "<image_soft_token>", "<end_of_image>"
ORIGINAL, CROPS = "Here is the original image ", " and here are some crops to help you see better "
SCAN = {
    "pan_and_scan_min_crop_size": "least", "pan_and_scan_max_num_crops": "most", "pan_and_scan_min_ratio_to_activate": "ratio",
}  # fmt: skip
"""What requests may say of it, besides `do_pan_and_scan`; a checkpoint's file does not decide that, as in transformers."""
MAX_CROPS = 16


@dataclasses.dataclass(frozen=True)
class Gemma3Processor(Fixed):
    """Attributes as in `Processor`, and:

    Attributes:
        patch: side in pixels.
        height, width: that every image is scaled to.
        tokens: that it becomes.
        scan: whether long images are cut besides.
        least, most, ratio: pixels of a crop's side at least, crops at most, and how many times longer than wide images are cut.
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
    scan: bool = False
    least: int = 256
    most: int = 4
    ratio: float = 1.2

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

    def asked(self, said: Mapping[str, Any]) -> Gemma3Processor:
        """As `Processor.asked`: `do_pan_and_scan` and its bounds."""
        if unknown := sorted(set(said) - {"do_pan_and_scan", *SCAN}):
            raise ValueError(f"{unknown[0][:40]!r} cannot be changed for this model's images; do_pan_and_scan can.")
        if not isinstance(said.get("do_pan_and_scan", False), bool):
            raise ValueError("do_pan_and_scan must be true or false.")
        own: dict[str, Any] = {}
        for name, field in SCAN.items():
            value = said.get(name, getattr(self, field))
            top = MAX_CROPS if field == "most" else 100_000
            if (
                isinstance(value, bool)
                or not isinstance(value, int | float if field == "ratio" else int)
                or not 1 <= value <= top
            ):
                raise ValueError(f"{name} must be a {'' if field == 'ratio' else 'whole '}number from 1 to {top}.")
            own[field] = value
        return dataclasses.replace(self, scan=said.get("do_pan_and_scan", False), **own)

    def patched(self, image: Image) -> Patched:
        patches, place = tiles_of([self.scaling.exactly(image, self.width, self.height)], self.scaling, self.patch)
        side = round(self.tokens**0.5)
        return Patched(patches, place, side, side, (self.tokens,), self._whole)

    def pieces(self, image: Image) -> list[Patched]:
        """The image, and behind it its crops, each for itself."""
        found = [self.patched(one) for one in (image, *self._crops(image))]
        if len(found) > 1:
            text = f"{ORIGINAL}{self._whole}{CROPS}{' '.join([self._whole] * (len(found) - 1))}"
            found[0] = dataclasses.replace(found[0], written=text)
        return found

    @property
    def _whole(self) -> str:
        return f"\n\n{self.mark}{SOFT}{END}\n\n"

    def _crops(self, image: Image) -> list[Image]:
        longer, shorter = max(image.size), min(image.size)
        if not self.scan or longer / shorter < self.ratio:
            return []
        count = min(longer // self.least, math.floor(longer / shorter + 0.5))
        count = min(self.most, max(2, count))
        length = math.ceil(longer / count)
        if min(length, shorter) < self.least:
            return []
        wide = image.width >= image.height
        ends = [(at * length, min((at + 1) * length, longer)) for at in range(count)]
        return [
            image.crop((first, 0, end, image.height) if wide else (0, first, image.width, end))
            for first, end in ends
            if first < end
        ]
