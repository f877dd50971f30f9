"""Llama 4's (Meta 2025): the image on the canvas of whole tiles that suits it best, cut into those, and the whole image in one
more. Levels become numbers in bfloat16, as where the model was trained.

transformers scales with torch's code alone, whose levels are at most one off Pillow's."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from serving.media.processors.base import HALF, Fixed, Patched, Scaling, row_by_row, side_of, value_of

if TYPE_CHECKING:
    from PIL.Image import Image

BEGIN, END, WHOLE, PATCH = "<|image_start|>", "<|image_end|>", "<|image|>", "<|patch|>"
BESIDE, BELOW = "<|tile_x_separator|>", "<|tile_y_separator|>"


@dataclasses.dataclass(frozen=True)
class Llama4Processor(Fixed):
    """Attributes as in `Processor`, and:

    Attributes:
        patch, merge: side of a patch in pixels, and of the square of patches that is one embedding.
        side: of a tile.
        most: tiles, without the whole image's.
        enlarge: images are brought to the largest canvas, not to the one that they need.
    """

    placeholder: int
    patch: int
    merge: int
    side: int
    most: int
    enlarge: bool
    scaling: Scaling
    mark: str = WHOLE
    three_numbers: bool = False
    together: bool = False

    @classmethod
    def of(cls, hf: Mapping[str, Any]) -> Llama4Processor:
        said, vision = hf.get("preprocessor") or {}, hf["vision_config"]
        height, width = side_of(said.get("size") or 336)
        if height != width or height != vision.get("image_size", 448):
            raise ValueError(f"preprocessor_config.json: tiles of {height} x {width} are not the tower's.")
        return cls(
            placeholder=int(hf.get("image_token_index") or hf.get("image_token_id") or 200092),
            patch=int(vision.get("patch_size", 14)),
            merge=round(1 / float(vision.get("pixel_shuffle_ratio", 0.5))),
            side=height,
            most=int(value_of(said, "max_patches", 16)),
            enlarge=bool(said.get("resize_to_max_canvas", False)),
            scaling=Scaling.of(said, 2, HALF, HALF),
        )

    def identity(self) -> str:
        return repr(self)

    def patched(self, image: Image) -> Patched:
        side, (rows, columns) = self.side, self.grid(image.height, image.width)
        high, wide = self.scaled(image.height, image.width, rows * side, columns * side)
        canvas = np.zeros((rows * side, columns * side, 3), np.uint8)
        canvas[:high, :wide] = np.asarray(self.scaling.always(image, wide, high))
        tiles = [
            canvas[y * side : (y + 1) * side, x * side : (x + 1) * side] for y in range(rows) for x in range(columns)
        ]
        if rows * columns > 1:
            tiles.append(np.asarray(self.scaling.always(image, side, side)))
        cut = [row_by_row(self._numbers(tile), self.patch) for tile in tiles]
        patches, place = (np.concatenate(parts) for parts in zip(*cut, strict=True))
        across = side // self.patch // self.merge
        return Patched(
            patches, place, across, across, (across * across,) * len(tiles), self._written(rows, columns)
        )  # fmt: skip

    def _numbers(self, pixels_HWC: np.ndarray) -> np.ndarray:
        table = _levels(self.scaling)
        return np.stack([table[channel][pixels_HWC[:, :, channel]] for channel in range(3)])

    @staticmethod
    def _written(rows: int, columns: int) -> str:
        line = BESIDE.join([PATCH] * columns) + BELOW
        return f"{BEGIN}{line * rows if rows * columns > 1 else ''}{WHOLE}{PATCH}{END}"

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of the canvas: where an image fits into some without being made smaller, the one that makes it least
        larger; else the one that makes it least smaller. Of several the smallest. In float32, as transformers finds them."""
        grids = np.array(_grids(self.most), np.int64)
        sides = (grids * self.side).astype(np.float32)
        scales = np.minimum(sides[:, 0] / np.float32(height), sides[:, 1] / np.float32(width))
        fits = scales[scales >= 1]
        best = (fits.max() if self.enlarge else fits.min()) if len(fits) else scales.max()
        chosen = grids[scales == best]
        rows, columns = chosen[np.argmin(chosen[:, 0] * chosen[:, 1])]
        return int(rows), int(columns)

    def scaled(self, height: int, width: int, high: int, wide: int) -> tuple[int, int]:
        """(height, width) of the image on its canvas: not made larger than a tile where it is not to be."""
        # What is read off the canvas is divided in float32 by transformers, what is the image's own in float64.
        target: list[Any] = [np.float32(high), np.float32(wide)]
        if not self.enlarge:
            for axis, own in enumerate((max(height, self.side), max(width, self.side))):
                target[axis] = target[axis] if target[axis] < own else float(own)
        by_width, by_height = _share(target[1], width), _share(target[0], height)
        if np.float32(by_width) < np.float32(by_height):
            return max(1, min(_times(height, by_width), int(target[0]))), int(target[1])
        return int(target[0]), max(1, min(_times(width, by_height), int(target[1])))


def _share(target: Any, own: int) -> Any:
    return target / np.float32(own) if isinstance(target, np.floating) else target / own


def _times(own: int, share: Any) -> int:
    return math.floor(np.float32(own) * share if isinstance(share, np.floating) else own * share)


@functools.lru_cache(maxsize=4)
def _grids(most: int) -> tuple[tuple[int, int], ...]:
    """(rows, columns) of all canvases of so many tiles, in the order in which transformers has them: by shape, each first met from
    the most tiles down."""
    shapes: dict[float, list[tuple[int, int]]] = {}
    for tiles in range(most, 0, -1):
        for rows in range(1, tiles + 1):
            if tiles % rows == 0:
                shapes.setdefault(rows / (tiles // rows), []).append((rows, tiles // rows))
    return tuple(grid for grids in shapes.values() for grid in grids)


@functools.lru_cache(maxsize=4)
def _levels(scaling: Scaling) -> np.ndarray:
    """float32 [3, 256]: what each channel's levels become, each operation rounded to bfloat16."""
    if scaling.scale is None or scaling.mean is None or scaling.std is None:
        raise ValueError("preprocessor_config.json: do_rescale and do_normalize must be true with this model.")
    bfloat16 = ml_dtypes.bfloat16
    scaled = (np.arange(256, dtype=np.float32) * np.float32(scaling.scale)).astype(bfloat16).astype(np.float32)
    mean, std = (np.array(one, bfloat16).astype(np.float32)[:, None] for one in (scaling.mean, scaling.std))
    moved = (scaled - mean).astype(bfloat16).astype(np.float32)
    return (moved / std).astype(bfloat16).astype(np.float32)
