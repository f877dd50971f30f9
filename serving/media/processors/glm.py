"""GLM-4.1V's, 4.5V's and 4.6V's: as Qwen2-VL's, with bounds for the area of all frames of a patch together. Of videos each grid is
for the decoder an image, and when it is stands behind it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from serving.media.frames.sampling import USUAL_FPS, Frames, Sampling
from serving.media.processors.base import Scaling, value_of
from serving.media.processors.qwen import QwenVLProcessor
from serving.media.processors.qwen_video import QwenVideo, rounded, unscaled

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
            video=GlmVideo.of(hf),
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


@dataclasses.dataclass(frozen=True)
class GlmVideo(QwenVideo):
    """Attributes as in `QwenVideo`, and:

    Attributes:
        exact: tenths of seconds are written, as in GLM-4.6V.
    """

    exact: bool = False

    @classmethod
    def of(cls, hf: Mapping[str, Any]) -> GlmVideo:
        """As video_preprocessor_config.json says, or, as in transformers, the images' file where there is none; the others are its
        class's defaults. Frames have the images' token."""
        said, name = hf.get("video_preprocessor") or hf.get("preprocessor") or {}, hf.get("architectures", ("",))[0]
        size = {"shortest_edge": 112 * 112, "longest_edge": 28 * 28 * 2 * 30000} | dict(said.get("size") or {})
        together, exact = int(value_of(said, "temporal_patch_size", 2)), name.startswith("Glm46V")
        how = {key: value for key, value in said.items() if key != "num_frames"}  # which transformers does not look at
        if exact:
            how.pop("fps", None)
        sampling = Sampling.of(how, "glm46" if exact else "glm", True, together=together)
        return cls(
            placeholder=int(hf.get("image_token_id", PLACEHOLDERS.get(name, PLACEHOLDER))),
            patch=int(value_of(said, "patch_size", 14)),
            merge=int(value_of(said, "merge_size", 2)),
            together=together,
            least=int(size["shortest_edge"]),
            most=int(size["longest_edge"]),
            scaling=Scaling.of(said),
            sampling=dataclasses.replace(sampling, longest=float(value_of(said, "max_duration", 300))),
            mark="<|video|>",
            written=True,
            exact=exact,
        )

    def _times(self, times: Frames, grids: int) -> list[str]:
        fps, token = times.fps or USUAL_FPS, "<|image|>"
        firsts = [times.indices[grid * self.together] / fps for grid in range(grids)]
        said = [f"{at:.1f} seconds" if self.exact else str(int(at)) for at in firsts]
        return [f"<|begin_of_image|>{token}<|end_of_image|>{at}" for at in said]
