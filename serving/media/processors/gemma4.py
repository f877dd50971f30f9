"""Gemma 4's (Google 2026): the image in its own shape, as large as a number of embeddings allows, in whole squares of patches."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from serving.media.frames.sampling import USUAL_FPS, Frames, Sampling
from serving.media.processors.base import Patched, Scaling, Whole, value_of
from serving.media.processors.conformers import GemmaSounds, gemma4_sounds

if TYPE_CHECKING:
    from PIL.Image import Image

BEGIN, END = "<|image>", "<image|>"
SOFT_TOKENS = (70, 140, 280, 560, 1120)
"""Embeddings that an image may have at most, of which one is chosen."""
FRAMES = 32
"""Of a video that are read."""


@dataclasses.dataclass(frozen=True)
class Gemma4Processor(Whole):
    """Attributes as in `Processor`, and:

    Attributes:
        patch, merge: side of a patch in pixels, and of the square of patches that is one embedding.
        most: embeddings of an image.
        bound: embeddings that the checkpoint's own setting allows; a request may ask for fewer.
    """

    placeholder: int
    patch: int
    merge: int
    most: int
    bound: int
    scaling: Scaling
    mark: str = "<|image|>"
    three_numbers: bool = False
    together: bool = False
    sound: GemmaSounds | None = None
    video: Gemma4Video | None = None

    @classmethod
    def of(cls, hf: Mapping[str, Any]) -> Gemma4Processor:
        said = hf.get("preprocessor") or {}
        most = int(value_of(said, "max_soft_tokens", 280))
        if most not in SOFT_TOKENS:
            raise ValueError(f"preprocessor_config.json: max_soft_tokens is {most}; it is one of {SOFT_TOKENS}.")
        return cls(
            placeholder=int(hf.get("image_token_id") or 258880),
            patch=int(value_of(said, "patch_size", 16)),
            merge=int(value_of(said, "pooling_kernel_size", 3)),
            most=most,
            bound=most,
            scaling=Scaling.of(said, 3, (0.0,) * 3, (1.0,) * 3, normalize=False),
            together=hf.get("use_bidirectional_attention") == "vision",
            sound=gemma4_sounds(hf),
            video=Gemma4Video.of(hf),
        )

    def identity(self) -> str:
        return repr(self)

    def asked(self, said: Mapping[str, Any]) -> Gemma4Processor:
        """As `Processor.asked`: `max_soft_tokens`, up to the checkpoint's own."""
        if unknown := sorted(map(str, said.keys() - {"max_soft_tokens"})):
            raise ValueError(f"{unknown[0][:40]!r} cannot be changed for this model's images; max_soft_tokens can.")
        most, allowed = said.get("max_soft_tokens", self.most), [n for n in SOFT_TOKENS if n <= self.bound]
        if isinstance(most, bool) or most not in allowed:
            raise ValueError(f"max_soft_tokens must be one of {', '.join(map(str, allowed))}.")
        return dataclasses.replace(self, most=most)

    def patched(self, image: Image) -> Patched:
        if self.scaling.resize:
            width, height = self.size(image.width, image.height)
            image = image if image.size == (width, height) else self.scaling.resized(image, width, height)
        step = self.patch * self.merge
        rows, columns = image.height // step, image.width // step
        if (columns * step, rows * step) != image.size or not 0 < rows * columns <= self.most:
            raise ValueError(
                f"this model takes images in whole squares of {step} pixels, {self.most} at most; of this one nothing else is made."
            )
        patches, place = squares_of(self.scaling.normalized(np.asarray(image)), self.patch, self.merge)
        return Patched(patches, place, rows, columns, (rows * columns,), f"{BEGIN}{self.mark}{END}")

    def size(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) that an image is brought to."""
        return fitting(width, height, self.patch * self.merge, self.most)


def squares_of(pixels_3HW: np.ndarray, patch: int, merge: int) -> tuple[np.ndarray, np.ndarray]:
    """(patches_PX, place_P2), square by square, so that those of a square come together; inside a patch: row, column, channel."""
    _, height, width = pixels_3HW.shape
    p, m = patch, merge
    rows, columns = height // (p * m), width // (p * m)
    cut = pixels_3HW.reshape(3, rows, m, p, columns, m, p).transpose(1, 4, 2, 5, 3, 6, 0)
    row, column = np.indices((rows * m, columns * m), np.int32)
    place = np.stack([row, column], -1).reshape(rows, m, columns, m, 2).transpose(0, 2, 1, 3, 4)
    return np.ascontiguousarray(cut).reshape(rows * columns * m * m, -1), place.reshape(-1, 2).copy()


def fitting(width: int, height: int, step: int, most: int) -> tuple[int, int]:
    """(width, height) as large as so many squares allow, rounded down to whole ones. A picture of which a side would be nothing
    becomes a line of squares."""
    factor = math.sqrt(most * step**2 / (width * height))
    columns, rows = (math.floor(factor * side / step) for side in (width, height))
    if not rows:
        rows, columns = 1, min(width // height, most)
    elif not columns:
        rows, columns = min(height // width, most), 1
    return columns * step, rows * step


@dataclasses.dataclass(frozen=True)
class Gemma4Video:
    """Attributes as in `Video`, and `Gemma4Processor`'s: `most` embeddings of a frame. Each frame is read like an image, and when
    it is stands before it."""

    placeholder: int
    patch: int
    merge: int
    most: int
    scaling: Scaling
    sampling: Sampling
    mark: str = "<|video|>"

    @classmethod
    def of(cls, hf: Mapping[str, Any]) -> Gemma4Video:
        said = hf.get("video_preprocessor") or {}
        most = int(value_of(said, "max_soft_tokens", 70))
        if most not in SOFT_TOKENS:
            raise ValueError(f"video_preprocessor_config.json: max_soft_tokens is {most}; it is one of {SOFT_TOKENS}.")
        how = {"num_frames": FRAMES, **said} if said.get("fps") is None else said
        return cls(
            placeholder=int(hf.get("video_token_id") or 258884),
            patch=int(value_of(said, "patch_size", 16)),
            merge=int(value_of(said, "pooling_kernel_size", 3)),
            most=most,
            scaling=Scaling.of(said, 3, (0.0,) * 3, (1.0,) * 3),
            sampling=Sampling.of(how, "there", True),
        )

    def size(self, frames: int, height: int, width: int) -> tuple[int, int]:
        """See `Video`."""
        step = self.patch * self.merge
        if self.scaling.resize:
            wide, high = fitting(width, height, step, self.most)
            return high, wide
        if height % step or width % step or not 0 < height * width <= self.most * step**2:
            raise ValueError(
                f"this model takes videos as they are (do_resize is false), in {self.most} squares of {step} pixels at most; "
                f"this one has {width} x {height}."
            )
        return height, width

    def count(self, frames: int, height: int, width: int) -> int:
        """See `Video`."""
        return frames * (height * width // (self.patch * self.merge) ** 2)

    def patched(self, frames: Sequence[np.ndarray], times: Frames) -> list[Patched]:
        """See `Video`."""
        step, fps = self.patch * self.merge, times.fps or USUAL_FPS
        rows, columns = frames[0].shape[0] // step, frames[0].shape[1] // step
        seconds = [index / fps for index in times.indices]
        said = " ".join(f"{int(at // 60):02d}:{int(at % 60):02d} {BEGIN}{self.mark}{END}" for at in seconds)
        found = []
        for frame in frames:
            patches, place = squares_of(self.scaling.normalized(frame), self.patch, self.merge)
            found.append(Patched(patches, place, rows, columns, (rows * columns,), None if found else said))
        return found
