"""Videos of Qwen2-VL and all of Qwen's since: two frames are cut into one grid of patches, and those grids are read one after the
other. In Qwen2.5-VL their distance in time is in the positions, from Qwen3-VL on it is written before each of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from serving.media.frames.sampling import USUAL_FPS, Frames, Sampling
from serving.media.processors.base import HALF, Patched, Scaling, value_of

MAX_ASPECT = 200
MARK, START, END = "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"


def unscaled(scaling: Scaling, what: str, height: int, width: int, step: int) -> tuple[int, int] | None:
    """(height, width) of an image or a video that is taken as it is; None for one that is scaled. `step`: pixels of a square.

    Raises:
        ValueError: one that is no whole squares and must not be scaled, or too long to be.
    """
    if not scaling.resize:
        if height % step or width % step:
            raise ValueError(
                f"this model takes {what}s as they are (do_resize is false), in whole squares of {step} pixels; this one has "
                f"{width} x {height}."
            )
        return height, width
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise ValueError(f"one side of the {what} is more than {MAX_ASPECT} times the other.")
    return None


@dataclasses.dataclass(frozen=True)
class QwenVideo:
    """Attributes as in `Video`, and:

    Attributes:
        patch, merge, together: sides of a patch in pixels and of an embedding's square in patches; frames of a patch.
        least, most: pixels of a frame (before Qwen3-VL), or of all frames.
        written: whether times are written, as from Qwen3-VL on.
        tokens_per_second: by which positions go on with time in Qwen2.5-VL; None where each grid is one later.
        capped: tokens' worth of pixels that are shared out among a video's frames (before Qwen3-VL), or that one frame may have;
            None for any.
    """

    placeholder: int
    patch: int
    merge: int
    together: int
    least: int
    most: int
    scaling: Scaling
    sampling: Sampling
    mark: str = ""
    written: bool = False
    tokens_per_second: float | None = None
    capped: int | None = None

    @classmethod
    def of(cls, hf: Mapping[str, Any]) -> QwenVideo:
        """As video_preprocessor_config.json says, or, as in transformers, the images' file where there is none."""
        said = hf.get("video_preprocessor") or hf.get("preprocessor") or {}
        name = hf.get("architectures", ("",))[0]
        third = name.startswith("Qwen3")
        vision = hf.get("vision_config") or {}
        patch = int(value_of(said, "patch_size", 16 if third else 14))
        side = 32 if third else 28
        size = {"shortest_edge": 128 * side**2, "longest_edge": 768 * side**2} | dict(said.get("size") or {})
        together = int(value_of(said, "temporal_patch_size", 2))
        return cls(
            placeholder=int(hf.get("video_token_id", 248057 if name.startswith("Qwen3_5") else 151656)),
            patch=patch,
            merge=int(value_of(said, "merge_size", 2)),
            together=together,
            least=int(said.get("min_pixels") or size["shortest_edge"]),
            most=int(said.get("max_pixels") or size["longest_edge"]),
            scaling=Scaling.of(said, 3, HALF, HALF) if third else Scaling.of(said),
            sampling=Sampling.of(said, "qwen3" if third else "qwen2", third, 2.0 if third else None, together),
            mark=MARK if third else "",
            written=third,
            tokens_per_second=float(vision.get("tokens_per_second") or 4) if name.startswith("Qwen2_5") else None,
            capped=int(value_of(said, "max_video_tokens", 768 if third else 128000))
            if said.get("cap_pixels_per_frame")
            else None,
        )

    def size(self, frames: int, height: int, width: int) -> tuple[int, int]:
        step = self.patch * self.merge
        if (own := unscaled(self.scaling, "video", height, width, step)) is not None:
            return own
        return (self._all if self.written else self._each)(frames, height, width, step)

    def _each(self, frames: int, height: int, width: int, step: int) -> tuple[int, int]:
        most = self.most
        if self.capped is not None:
            share = int(self.capped * step * step * 0.9) * self.together // frames
            most = max(min(most, share), int(self.least * 1.05))
        return rounded(height, width, step, self.least, most)

    def _all(self, frames: int, height: int, width: int, step: int) -> tuple[int, int]:
        """Of all frames together: the bounds are for the pixels of the whole video."""
        if frames < self.together:
            raise ValueError(f"it has {frames} frame; this model reads {self.together} at least.")
        most = self.most
        if self.capped is not None:
            most = frames * max(min(self.capped * step * step, most // frames), int(self.least * 1.05))
        if height < step or width < step:
            grow = max(step / height, step / width)
            height, width = int(height * grow), int(width * grow)
        whole = round(frames / self.together) * self.together
        h, w = round(height / step) * step, round(width / step) * step
        if whole * h * w > most:
            shrink = math.sqrt(frames * height * width / most)
            return tuple(max(step, math.floor(side / shrink / step) * step) for side in (height, width))  # type: ignore[return-value]
        if whole * h * w < self.least:
            grow = math.sqrt(self.least / (frames * height * width))
            return tuple(math.ceil(side * grow / step) * step for side in (height, width))  # type: ignore[return-value]
        return h, w

    def count(self, frames: int, height: int, width: int) -> int:
        return -(-frames // self.together) * (height * width // (self.patch * self.merge) ** 2)

    def patched(self, frames: Sequence[np.ndarray], times: Frames) -> list[Patched]:
        step, n = self.patch * self.merge, self.together
        rows, columns = frames[0].shape[0] // step, frames[0].shape[1] // step
        grids = -(-len(frames) // n)
        found: list[Patched] = []
        for grid in range(grids):
            # What lacks at the end is the last frame again.
            pixels = [self.scaling.normalized(frames[min(grid * n + i, len(frames) - 1)]) for i in range(n)]
            patches, place = squares_of(np.stack(pixels), self.patch, self.merge, n)
            found.append(Patched(patches, place, rows, columns, (rows * columns,), **self._where(grid, grids, times)))
        return found

    def _where(self, grid: int, grids: int, times: Frames) -> dict[str, Any]:
        if self.written:
            return {"written": "".join(self._times(times, grids)) if not grid else None}
        interval = 1.0
        if self.tokens_per_second is not None:
            # In float32, in which transformers' arrays of times are.
            interval = float(np.float32(self.tokens_per_second) * np.float32(self.together / times.sampled_fps))
        return {"time": int(np.float32(grid) * np.float32(interval)), "stays": grid < grids - 1, "joins": grid > 0}

    def _times(self, times: Frames, grids: int) -> list[str]:
        n, fps = self.together, times.fps or USUAL_FPS
        at = [index / fps for index in (*times.indices, *[times.indices[-1]] * n)]
        middles = [(at[grid * n] + at[grid * n + n - 1]) / 2 for grid in range(grids)]
        return [f"<{middle:.1f} seconds>{START}{self.mark}{END}" for middle in middles]


def rounded(height: int, width: int, step: int, least: int, most: int, frames: int = 1) -> tuple[int, int]:
    """(height, width) in whole steps, with an area, of so many frames together, between two bounds."""
    h, w = round(height / step) * step, round(width / step) * step
    if frames * h * w > most:
        shrink = math.sqrt(frames * height * width / most)
        h = max(step, math.floor(height / shrink / step) * step)
        w = max(step, math.floor(width / shrink / step) * step)
    elif frames * h * w < least:
        grow = math.sqrt(least / (frames * height * width))
        h, w = math.ceil(height * grow / step) * step, math.ceil(width * grow / step) * step
    return h, w


def squares_of(pixels_F3HW: np.ndarray, patch: int, merge: int, frames: int) -> tuple[np.ndarray, np.ndarray]:
    """(patches_PX, place_P2) of one image, or of the frames that are cut together: square by square, and inside a patch: channel,
    frame, row, column.

    Args:
        frames: of a patch; one image fills them all.
    """
    F, _, height, width = pixels_F3HW.shape
    rows, columns, m, p = height // patch, width // patch, merge, patch
    cut = pixels_F3HW.reshape(F, 3, rows // m, m, p, columns // m, m, p).transpose(2, 5, 3, 6, 1, 0, 4, 7)
    cut = np.broadcast_to(cut, (*cut.shape[:5], frames, p, p))
    row, column = np.indices((rows, columns), np.int32)
    place = np.stack([row, column], -1).reshape(rows // m, m, columns // m, m, 2).transpose(0, 2, 1, 3, 4)
    return np.ascontiguousarray(cut).reshape(rows * columns, -1), place.reshape(-1, 2).copy()
