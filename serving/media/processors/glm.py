"""GLM-4.1V's, 4.5V's and 4.6V's: as Qwen2-VL's, with bounds for the area of all frames of a patch together."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from serving.media.processors.base import Scaling, value_of
from serving.media.processors.qwen import QwenVLProcessor
from serving.media.processors.qwen_video import rounded, unscaled

PLACEHOLDERS = {"Glm4vMoeForConditionalGeneration": 151363}
PLACEHOLDER = 151343


@dataclasses.dataclass(frozen=True)
class GlmProcessor(QwenVLProcessor):
    """Attributes as in `QwenVLProcessor`; `min_pixels` and `max_pixels` are of all frames of a patch."""

    @classmethod
    def of(cls, hf: Mapping[str, Any]) -> GlmProcessor:
        said = hf.get("preprocessor") or {}
        size = {"shortest_edge": 112 * 112, "longest_edge": 28 * 28 * 15000} | dict(said.get("size") or {})
        default = PLACEHOLDERS.get(hf.get("architectures", ("",))[0], PLACEHOLDER)
        return cls(
            placeholder=int(hf.get("image_token_id", default)),
            patch=int(value_of(said, "patch_size", 14)),
            merge=int(value_of(said, "merge_size", 2)),
            frames=int(value_of(said, "temporal_patch_size", 2)),
            min_pixels=int(size["shortest_edge"]),
            max_pixels=int(size["longest_edge"]),
            scaling=Scaling.of(said),
        )

    def size(self, height: int, width: int) -> tuple[int, int]:
        """As `QwenVLProcessor.size`."""
        step = self.patch * self.merge
        if (own := unscaled(self.scaling, "image", height, width, step)) is not None:
            return own
        if min(height, width) < step:
            grown = max(step / height, step / width)
            height, width = int(height * grown), int(width * grown)
        return rounded(height, width, step, self.min_pixels, self.max_pixels, self.frames)
