"""What a family's processor does, and what several share."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True, eq=False)
class Patched:
    """An image as a tower reads it.

    Attributes:
        patches_PX: float32, the patches in the tower's order.
        place_P2: int32, row and column of each in the image's grid.
        rows, columns: of the grid of embeddings.
    """

    patches_PX: np.ndarray
    place_P2: np.ndarray
    rows: int
    columns: int


class Processor(Protocol):
    """One checkpoint's processor.

    Attributes:
        placeholder: the token that chat templates write where an image is.
        three_numbers: whether positions are three numbers, by which the grid's embeddings are told apart.
    """

    @property
    def placeholder(self) -> int: ...

    @property
    def three_numbers(self) -> bool: ...

    def identity(self) -> str:
        """Everything that decides what it makes of an image, as text."""
        ...

    def patched(self, image: Image) -> Patched:
        """An RGB image, scaled and cut. ValueError, in a sentence, for one that cannot be."""
        ...

    def tokens(self, image: Patched) -> tuple[Sequence[int], np.ndarray]:
        """What stands in the prompt in the placeholder's place: token ids, and which of them (int, ascending) are the
        embeddings' places."""
        ...


@functools.lru_cache(maxsize=8)
def levels(scale: float, mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """float32 [3, 256]: what each channel's 256 levels become. Rescaled in float64 and rounded, then normalized in float32, as
    transformers does."""
    scaled = (np.arange(256, dtype=np.float64) * scale).astype(np.float32)
    return ((scaled[:, None] - np.array(mean, np.float32)) / np.array(std, np.float32)).T.copy()


def normalized(pixels_HWC: np.ndarray, table: np.ndarray) -> np.ndarray:
    """float32 [3, H, W] of uint8 [H, W, 3]; see `levels`."""
    return np.stack([table[channel][pixels_HWC[:, :, channel]] for channel in range(3)])
