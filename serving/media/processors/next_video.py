"""LLaVA-OneVision's videos (Li et al. 2024, arXiv:2408.03326): a tile a frame, whose embeddings are scaled down to half as many
rows and columns, bilinearly. The last frame's end with the one that ends an image's rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from serving.media.frames.sampling import Frames, Sampling
from serving.media.processors.base import CLIP_MEAN, CLIP_STD, Patched, Scaling, row_by_row, side_of


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
