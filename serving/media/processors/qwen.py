"""Qwen2-VL and all of Qwen's since: any size, rounded to whole squares of patches, within bounds of the area."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from serving.media.processors.base import Patched, Scaling

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_ASPECT = 200


@dataclasses.dataclass(frozen=True)
class QwenVLProcessor:
    """Attributes as in `Processor`, and:

    Attributes:
        patch, merge, frames: sides of a patch in pixels and of an embedding's square in patches; frames of a patch, all of which
            hold the same image.
        min_pixels, max_pixels: what an image is scaled to at least and at most.
    """

    placeholder: int
    patch: int
    merge: int
    frames: int
    min_pixels: int
    max_pixels: int
    scaling: Scaling
    mark: str = ""
    three_numbers: bool = True
    together: bool = False

    @classmethod
    def of(cls, hf: Mapping[str, Any]) -> QwenVLProcessor:
        said = hf.get("preprocessor") or {}
        default = 248056 if hf.get("architectures", ("",))[0].startswith("Qwen3_5") else 151655
        size = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280} | dict(said.get("size") or {})
        return cls(
            placeholder=int(hf.get("image_token_id", default)),
            patch=int(said.get("patch_size", 14)),
            merge=int(said.get("merge_size", 2)),
            frames=int(said.get("temporal_patch_size", 2)),
            min_pixels=int(said.get("min_pixels") or size["shortest_edge"]),
            max_pixels=int(said.get("max_pixels") or size["longest_edge"]),
            scaling=Scaling.of(said),
        )

    def identity(self) -> str:
        return repr(self)

    def asked(self, said: Mapping[str, Any]) -> QwenVLProcessor:
        """As `Processor.asked`: `min_pixels` and `max_pixels`, or `size` with `shortest_edge` and `longest_edge`, within the
        checkpoint's own bounds."""
        wanted: dict[str, Any] = dict(said)
        size = wanted.pop("size", None)
        if isinstance(size, Mapping):
            names = {"shortest_edge": "min_pixels", "longest_edge": "max_pixels"}
            wanted |= {names.get(name, f"size.{name}"): value for name, value in size.items()}
        elif size is not None:
            raise ValueError("size must be an object with shortest_edge and longest_edge.")
        for name, value in wanted.items():
            if name not in ("min_pixels", "max_pixels"):
                raise ValueError(
                    f"{name[:40]!r} cannot be changed for this model's images; min_pixels and max_pixels can."
                )
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= self.max_pixels:
                raise ValueError(f"{name} must be a whole number from 1 to {self.max_pixels}.")
        made = dataclasses.replace(self, **wanted)
        if made.min_pixels > made.max_pixels:
            raise ValueError(f"min_pixels is {made.min_pixels}, more than max_pixels, which is {made.max_pixels}.")
        return made

    def patched(self, image: Image) -> Patched:
        height, width = self.size(image.height, image.width)
        pixels = self.scaling.normalized(np.asarray(self.scaling.resized(image, width, height)))
        rows, columns, m, p = height // self.patch, width // self.patch, self.merge, self.patch
        # Square by square, and inside a patch: channel, frame, row, column.
        cut = pixels.reshape(3, rows // m, m, p, columns // m, m, p).transpose(1, 4, 2, 5, 0, 3, 6)
        cut = np.broadcast_to(cut[:, :, :, :, :, None], (*cut.shape[:5], self.frames, p, p))
        row, column = np.indices((rows, columns), np.int32)
        place = np.stack([row, column], -1).reshape(rows // m, m, columns // m, m, 2).transpose(0, 2, 1, 3, 4)
        patches = np.ascontiguousarray(cut).reshape(rows * columns, -1)
        rows, columns = rows // m, columns // m
        return Patched(patches, place.reshape(-1, 2).copy(), rows, columns, (rows * columns,))

    def size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) that an image is scaled to. ValueError for one that is too long."""
        if max(height, width) > MAX_ASPECT * min(height, width):
            raise ValueError(f"one side of the image is more than {MAX_ASPECT} times the other.")
        step = self.patch * self.merge
        h, w = round(height / step) * step, round(width / step) * step
        if h * w > self.max_pixels:
            shrink = math.sqrt(height * width / self.max_pixels)
            h = max(step, math.floor(height / shrink / step) * step)
            w = max(step, math.floor(width / shrink / step) * step)
        elif h * w < self.min_pixels:
            grow = math.sqrt(self.min_pixels / (height * width))
            h, w = math.ceil(height * grow / step) * step, math.ceil(width * grow / step) * step
        return h, w
