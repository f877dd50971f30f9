"""Idefics3's and SmolVLM's (Laurençon et al. 2024, arXiv:2408.12637): the image cut into square tiles, each announced by its row
and column, and the whole image in one more."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from serving.media.processors.base import HALF, Fixed, Patched, Scaling, side_of, tiles_of

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_SIDE = 4096
AROUND, GLOBAL = "<fake_token_around_image>", "<global-img>"


@dataclasses.dataclass(frozen=True)
class IdeficsProcessor(Fixed):
    """Attributes as in `Processor`, and:

    Attributes:
        patch, tile: sides in pixels.
        merge: side of the square of patches that become one embedding.
        longest: what an image's longer side is scaled to.
        split: whether there are tiles beside the whole.
    """

    placeholder: int
    patch: int
    tile: int
    merge: int
    longest: int
    split: bool
    scaling: Scaling
    mark: str = "<image>"
    three_numbers: bool = False
    together: bool = False

    @classmethod
    def of(cls, hf: Mapping[str, Any]) -> IdeficsProcessor:
        said = hf.get("preprocessor") or {}
        return cls(
            placeholder=int(hf.get("image_token_id", 128257)),
            patch=int(hf["vision_config"].get("patch_size", 32)),
            tile=side_of(said.get("max_image_size") or 364, "longest_edge")[0],
            merge=int(hf.get("scale_factor", 2)),
            longest=side_of(said.get("size") or 4 * 364, "longest_edge")[0],
            split=bool(said.get("do_image_splitting", True)),
            scaling=Scaling.of(said, 1, HALF, HALF),
        )

    def identity(self) -> str:
        return repr(self)

    def patched(self, image: Image) -> Patched:
        image = self.scaling.resized(image, *_longest(image.width, image.height, self.longest))
        t, rows, columns, tiles = self.tile, 0, 0, []
        if self.split:
            image = self.scaling.always(image, *_whole_tiles(image.width, image.height, t))
            if max(image.size) > t:
                columns, rows = image.width // t, image.height // t
                tiles = [
                    image.crop((x * t, y * t, (x + 1) * t, (y + 1) * t)) for y in range(rows) for x in range(columns)
                ]
        tiles.append(self.scaling.always(image, t, t))
        patches, place = tiles_of(tiles, self.scaling, self.patch)
        side = t // self.patch // self.merge
        return Patched(patches, place, side, side, (side**2,) * len(tiles), self._written(rows, columns))

    def _written(self, rows: int, columns: int) -> str:
        lines = [
            "".join(f"{AROUND}<row_{row + 1}_col_{column + 1}>{self.mark}" for column in range(columns)) + "\n"
            for row in range(rows)
        ]
        return "".join(lines) + ("\n" if lines else "") + f"{AROUND}{GLOBAL}{self.mark}{AROUND}"


def _longest(width: int, height: int, longest: int) -> tuple[int, int]:
    """(width, height) with the longer side so long, and the other one even."""
    aspect = width / height
    if width >= height:
        width, height = longest, int(longest / aspect)
        height += height % 2
    else:
        width, height = int(longest * aspect), longest
        width += width % 2
    width, height = max(width, 1), max(height, 1)
    aspect = width / height
    if width >= height and width > MAX_SIDE:
        width, height = MAX_SIDE, int(MAX_SIDE / aspect)
    elif height > width and height > MAX_SIDE:
        width, height = int(MAX_SIDE * aspect), MAX_SIDE
    return max(width, 1), max(height, 1)


def _whole_tiles(width: int, height: int, tile: int) -> tuple[int, int]:
    """(width, height) in whole tiles, about as long for its width as before."""
    aspect = width / height
    if width >= height:
        width = math.ceil(width / tile) * tile
        height = math.ceil(int(width / aspect) / tile) * tile
    else:
        height = math.ceil(height / tile) * tile
        width = math.ceil(int(height * aspect) / tile) * tile
    return width, height
