"""Images of Qwen2-VL and all of Qwen's since: any size, rounded to whole squares of patches, within bounds of the area."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from serving.media.processors.base import Patched, Scaling, Whole, value_of
from serving.media.processors.qwen_video import QwenVideo, rounded, squares_of, unscaled

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclasses.dataclass(frozen=True)
class QwenVLProcessor(Whole):
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
    video: QwenVideo | None = None

    @classmethod
    def of(cls, hf: Mapping[str, Any]) -> QwenVLProcessor:
        said = hf.get("preprocessor") or {}
        default = 248056 if hf.get("architectures", ("",))[0].startswith("Qwen3_5") else 151655
        size = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280} | dict(said.get("size") or {})
        return cls(
            placeholder=int(hf.get("image_token_id", default)),
            patch=int(value_of(said, "patch_size", 14)),
            merge=int(value_of(said, "merge_size", 2)),
            frames=int(value_of(said, "temporal_patch_size", 2)),
            min_pixels=int(said.get("min_pixels") or size["shortest_edge"]),
            max_pixels=int(said.get("max_pixels") or size["longest_edge"]),
            scaling=Scaling.of(said),
            video=QwenVideo.of(hf),
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
        scaled = np.asarray(self.scaling.resized(image, width, height))
        patches, place = squares_of(self.scaling.normalized(scaled)[None], self.patch, self.merge, self.frames)
        rows, columns = height // self.patch // self.merge, width // self.patch // self.merge
        return Patched(patches, place, rows, columns, (rows * columns,))

    def size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) that an image is scaled to. ValueError for one that is too long, or that cannot be left as it is."""
        step = self.patch * self.merge
        if (own := unscaled(self.scaling, "image", height, width, step)) is not None:
            return own
        return rounded(height, width, step, self.min_pixels, self.max_pixels)
