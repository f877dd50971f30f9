"""Gemma 4's (Google 2026): the image in its own shape, as large as a number of embeddings allows, in whole squares of patches."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from serving.media.processors.base import Patched, Scaling, Whole, value_of

if TYPE_CHECKING:
    from PIL.Image import Image

    from serving.media.processors.base import Video

BEGIN, END = "<|image>", "<image|>"
SOFT_TOKENS = (70, 140, 280, 560, 1120)
"""Embeddings that an image may have at most, of which one is chosen."""


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
        )

    @property
    def video(self) -> Video | None:
        """See `Processor`."""
        return None

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
        p, m, step = self.patch, self.merge, self.patch * self.merge
        rows, columns = image.height // step, image.width // step
        if (columns * step, rows * step) != image.size or not 0 < rows * columns <= self.most:
            raise ValueError(
                f"this model takes images in whole squares of {step} pixels, {self.most} at most; of this one nothing else is made."
            )
        pixels = self.scaling.normalized(np.asarray(image))
        # Square by square, so that those of a square come together; inside a patch: row, column, channel.
        cut = pixels.reshape(3, rows, m, p, columns, m, p).transpose(1, 4, 2, 5, 3, 6, 0)
        row, column = np.indices((rows * m, columns * m), np.int32)
        place = np.stack([row, column], -1).reshape(rows, m, columns, m, 2).transpose(0, 2, 1, 3, 4)
        count = rows * columns
        patches = np.ascontiguousarray(cut).reshape(count * m * m, -1)
        return Patched(patches, place.reshape(-1, 2).copy(), rows, columns, (count,), f"{BEGIN}{self.mark}{END}")

    def size(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) that an image is brought to: as large as `most` allows, rounded down to whole squares. An image of which
        a side would be nothing becomes a line of squares."""
        step = self.patch * self.merge
        factor = math.sqrt(self.most * self.merge**2 * self.patch**2 / (width * height))
        columns, rows = (math.floor(factor * side / step) for side in (width, height))
        if not rows:
            rows, columns = 1, min(width // height, self.most)
        elif not columns:
            rows, columns = min(height // width, self.most), 1
        return columns * step, rows * step
