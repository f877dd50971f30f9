"""InternVL's (Chen et al. 2024, arXiv:2404.16821): the image cut into square tiles, of the grid whose shape is most like its own,
and the whole image in one more."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from serving.media.processors.base import CLIP_MEAN, CLIP_STD, Fixed, Patched, Scaling, side_of, tiles_of

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclasses.dataclass(frozen=True)
class InternVLProcessor(Fixed):
    """Attributes as in `Processor`, and:

    Attributes:
        patch: side in pixels.
        height, width: of a tile.
        merge: side of the square of patches that become one embedding.
        least, most: tiles, without the whole image's.
    """

    placeholder: int
    patch: int
    height: int
    width: int
    merge: int
    least: int
    most: int
    scaling: Scaling
    mark: str = "<IMG_CONTEXT>"
    three_numbers: bool = False
    together: bool = False

    @classmethod
    def of(cls, hf: Mapping[str, Any]) -> InternVLProcessor:
        said, patch = hf.get("preprocessor") or {}, hf["vision_config"].get("patch_size", 14)
        height, width = side_of(said.get("size") or {"height": 384, "width": 384})
        return cls(
            placeholder=int(hf.get("image_token_id", 151667)),
            patch=int(patch[0] if isinstance(patch, list | tuple) else patch),
            height=height,
            width=width,
            merge=round(1 / float(hf.get("downsample_ratio", 0.5))),
            least=int(said.get("min_patches") or 1),
            most=int(said.get("max_patches") or 12),
            scaling=Scaling.of(said, 3, CLIP_MEAN, CLIP_STD),
        )

    def identity(self) -> str:
        return repr(self)

    def patched(self, image: Image) -> Patched:
        h, w, tiles = self.height, self.width, []
        columns, rows = self.grid(image.width, image.height) if self.most > 1 else (1, 1)
        if rows * columns > 1:
            large = self.scaling.always(image, columns * w, rows * h)
            tiles = [large.crop((x * w, y * h, (x + 1) * w, (y + 1) * h)) for y in range(rows) for x in range(columns)]
        tiles.append(self.scaling.always(image, w, h))
        patches, place = tiles_of(tiles, self.scaling, self.patch)
        step = self.patch * self.merge
        high, wide = h // step, w // step
        return Patched(patches, place, high, wide, (high * wide * len(tiles),), f"<img>{self.mark}</img>")

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """(columns, rows) of tiles."""
        grids = [
            (columns, rows)
            for columns in range(1, self.most + 1)
            for rows in range(1, self.most + 1)
            if self.least <= columns * rows <= self.most
        ]
        best, least = (1, 1), float("inf")
        for columns, rows in sorted(grids, key=lambda grid: grid[0] * grid[1]):
            off = abs(width / height - columns / rows)
            # Of grids of one shape a larger one is taken where the image fills half of it.
            large = width * height > 0.5 * self.height * self.width * columns * rows
            if off < least or (off == least and large):
                best, least = (columns, rows), off
        return best
