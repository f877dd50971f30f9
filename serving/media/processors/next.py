"""LLaVA-NeXT's (Liu et al. 2024): the whole image in one tile, and the image again, larger, in as many as fit it best. The margins
that filled those up are left out of the embeddings, and each row of them ends with one that is the same everywhere.

LLaVA-OneVision's (Li et al. 2024, arXiv:2408.03326): the same, and where the rows and columns are more than a bound they are
scaled down to it, bilinearly. Of its videos each frame is a tile, whose embeddings are scaled down to half as many rows and
columns, bilinearly; the last frame's end with the one that ends an image's rows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from serving.media.frames.sampling import Frames, Sampling
from serving.media.processors.base import CLIP_MEAN, CLIP_STD, Fixed, Patched, Scaling, row_by_row, side_of, tiles_of

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_SHRINK = 1.1
"""How much longer than its bound a side may be before it is scaled down."""


@dataclasses.dataclass(frozen=True)
class NextVideo:
    """Attributes as in `Video`, and:

    Attributes:
        patch, tile: sides in pixels.
    """

    placeholder: int
    patch: int
    tile: int
    scaling: Scaling
    sampling: Sampling
    mark: str = ""

    @classmethod
    def of(cls, hf: Mapping[str, Any]) -> NextVideo:
        """As video_preprocessor_config.json says, or, as in transformers, the images' file where there is none."""
        said = hf.get("video_preprocessor") or hf.get("preprocessor") or {}
        height, width = side_of(said.get("size") or 384, "shortest_edge")
        if height != width:
            raise ValueError(f"video_preprocessor_config.json: frames of {width} x {height} pixels are not read.")
        return cls(
            placeholder=int(hf.get("video_token_index") or hf.get("video_token_id") or 151647),
            patch=int(hf["vision_config"].get("patch_size", 14)),
            tile=height,
            scaling=Scaling.of(said, 3, CLIP_MEAN, CLIP_STD),
            sampling=Sampling.of(said, "even", False),
        )

    @property
    def _side(self) -> int:
        return self.tile // self.patch

    def size(self, frames: int, height: int, width: int) -> tuple[int, int]:
        if not self.scaling.resize and (height, width) != (self.tile, self.tile):
            raise ValueError(f"this model takes videos of {self.tile} x {self.tile} pixels as they are.")
        return self.tile, self.tile

    def count(self, frames: int, height: int, width: int) -> int:
        return frames * (-(-self._side // 2)) ** 2 + 1

    def patched(self, frames: Sequence[np.ndarray], times: Frames) -> list[Patched]:
        side = self._side
        half = -(-side // 2)
        (top, bottom, down), (left, right, across) = between(side, half), between(side, half)
        pick = np.stack([y[:, None] * side + x for y in (top, bottom) for x in (left, right)], axis=-1).reshape(-1, 4)
        share = np.stack([np.outer(y, x) for y in (1 - down, down) for x in (1 - across, across)], axis=-1)
        pick, share = pick.astype(np.int32), share.reshape(-1, 4).astype(np.float32)
        end = np.array([[-1] * 4], np.int32), np.array([[1, 0, 0, 0]], np.float32)
        found = []
        for at, frame in enumerate(frames):
            patches, place = row_by_row(self.scaling.normalized(frame), self.patch)
            last = at == len(frames) - 1
            own = (np.concatenate([pick, end[0]]), np.concatenate([share, end[1]])) if last else (pick, share)
            found.append(Patched(patches, place, half, half, (len(own[0]),), None, *own, joins=at > 0))
        return found


def between(old: int, new: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each of `new` places along `old`: the one before it, the one behind, and how much of that. Middles meet middles, as in
    torch's bilinear interpolation without aligned corners."""
    at = np.maximum((np.arange(new, dtype=np.float32) + np.float32(0.5)) * np.float32(old / new) - np.float32(0.5), 0)
    low = at.astype(np.int64)
    return low, np.minimum(low + 1, old - 1), (at - low).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class NextProcessor(Fixed):
    """Attributes as in `Processor`, and:

    Attributes:
        patch, tile: sides in pixels.
        sizes: (height, width) that the larger image may have.
        bound: tiles' worth of embeddings that it may have; None for any number.
    """

    placeholder: int
    patch: int
    tile: int
    sizes: tuple[tuple[int, int], ...]
    scaling: Scaling
    bound: int | None = None
    mark: str = ""
    three_numbers: bool = False
    together: bool = False
    video: NextVideo | None = None

    @classmethod
    def of(cls, hf: Mapping[str, Any]) -> NextProcessor:
        said = hf.get("preprocessor") or {}
        one = hf["architectures"][0] == "LlavaOnevisionForConditionalGeneration"
        size = said.get("size") or ({"height": 384, "width": 384} if one else {"shortest_edge": 224})
        (height, width), crop = side_of(size, "shortest_edge"), said.get("crop_size")
        if height != width or (not one and crop is not None and side_of(crop) != (height, width)):
            raise ValueError(
                f"preprocessor_config.json: tiles of {size!r}, of which {crop!r} is cut out, are not read."
            )
        aspect = str(hf.get("vision_aspect_ratio") or "anyres_max_9")
        return cls(
            placeholder=int(hf.get("image_token_index") or hf.get("image_token_id") or 32000),
            patch=int(hf["vision_config"].get("patch_size", 14)),
            tile=height,
            sizes=pinpoints(hf),
            scaling=Scaling.of(said),
            bound=int(aspect.removeprefix("anyres_max_")) if one else None,
            video=NextVideo.of(hf) if one else None,
        )

    def identity(self) -> str:
        return repr(self)

    def patched(self, image: Image) -> Patched:
        height, width = best_size(image.height, image.width, self.sizes)
        tiles = [self.scaling.always(image, self.tile, self.tile), *self._filled(image, height, width)]
        patches, place = tiles_of(tiles, self.scaling, self.patch)
        side = self.tile // self.patch
        grid = _grid(side, height // self.tile, width // self.tile)
        grid = _without_margins(grid, image.height, image.width)
        pick, share = grid[..., None], np.ones((*grid.shape, 1), np.float32)
        if self.bound is not None:
            pick, share = _bounded(grid, self.bound * side**2)
        rows, columns, taps = pick.shape
        # Each row ends with what the tower says last.
        pick = np.concatenate([pick, np.full((rows, 1, taps), -1)], axis=1).reshape(-1, taps)
        end = np.zeros((rows, 1, taps), np.float32)
        end[..., 0] = 1
        share = np.concatenate([share, end], axis=1).reshape(-1, taps)
        base = np.zeros((side**2, taps), np.float32)
        base[:, 0] = 1
        first = np.tile(np.arange(side**2)[:, None], (1, taps))
        pick, share = np.concatenate([first, pick]).astype(np.int32), np.concatenate([base, share])
        return Patched(patches, place, rows, columns, (len(pick),), None, pick, share)

    def _filled(self, image: Image, height: int, width: int) -> list[Image]:
        """Tiles of the image, as large as fits, in the middle of a black one."""
        from PIL import Image as Pillow

        by_width, by_height = width / image.width, height / image.height
        if by_width < by_height:
            size = width, min(math.ceil(image.height * by_width), height)
        else:
            size = min(math.ceil(image.width * by_height), width), height
        whole = Pillow.new("RGB", (width, height))
        whole.paste(self.scaling.always(image, *size), ((width - size[0]) // 2, (height - size[1]) // 2))
        t = self.tile
        return [whole.crop((x, y, x + t, y + t)) for y in range(0, height, t) for x in range(0, width, t)]


def pinpoints(hf: Mapping[str, Any]) -> tuple[tuple[int, int], ...]:
    """(height, width) that images may be scaled to, by config.json, which the processor's file repeats."""
    found = (hf.get("preprocessor") or {}).get("image_grid_pinpoints") or hf.get("image_grid_pinpoints")
    found = found or [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    return tuple((int(height), int(width)) for height, width in found)


def best_size(height: int, width: int, sizes: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """The size that keeps most of an image's pixels, and of several such the one with the least margin."""
    best, most, least = sizes[0], 0, math.inf
    for high, wide in sizes:
        scale = min(wide / width, high / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        wasted = wide * high - kept
        if kept > most or (kept == most and wasted < least):
            best, most, least = (high, wide), kept, wasted
    return best


def _grid(side: int, high: int, wide: int) -> np.ndarray:
    """int [high * side, wide * side]: which of the tower's rows is each place of the larger image's; the first tile is the base."""
    rows = np.arange(side**2, (1 + high * wide) * side**2).reshape(high, wide, side, side)
    return rows.transpose(0, 2, 1, 3).reshape(high * side, wide * side)


def _without_margins(grid: np.ndarray, height: int, width: int) -> np.ndarray:
    """The places that have something of the image in them."""
    high, wide = grid.shape
    if width / height > wide / high:
        margin = (high - int(round(height * (wide / width), 7))) // 2
        return grid[margin : high - margin]
    margin = (wide - int(round(width * (high / height), 7))) // 2
    return grid[:, margin : wide - margin]


def _bounded(grid: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """(pick, share) [rows, columns, 4] of a grid that is scaled down where it has many more places than `most`: each place is a
    mean of the four around it."""
    high, wide = grid.shape
    ratio = math.sqrt(high * wide / most)
    if ratio <= MAX_SHRINK:
        share = np.zeros((high, wide, 4), np.float32)
        share[..., 0] = 1
        return np.repeat(grid[..., None], 4, axis=2), share
    rows, columns = int(high // ratio), int(wide // ratio)
    (top, bottom, down), (left, right, across) = between(high, rows), between(wide, columns)
    pick = np.stack([grid[np.ix_(y, x)] for y in (top, bottom) for x in (left, right)], axis=-1)
    share = np.stack([np.outer(y, x) for y in (1 - down, down) for x in (1 - across, across)], axis=-1)
    return pick, share.astype(np.float32)
