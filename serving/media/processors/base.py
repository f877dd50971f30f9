"""What a family's processor does, and what several share."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


HALF = (0.5, 0.5, 0.5)


@dataclasses.dataclass(frozen=True, eq=False)
class Patched:
    """An image as a tower reads it.

    Attributes:
        patches_PX: float32, the patches in the tower's order.
        place_P2: int32, row and column of each in the image's grid (of a tile, in the tile's).
        rows, columns: of the grid of embeddings, where there is one.
        runs: of each placeholder that stands in the prompt for it, how many tokens that becomes; each is an embedding's place.
        written: what is written in the prompt where the chat template has put its mark; None: that stays.
        pick_NK, share_NK: int32 and float32: each embedding is the sum of so many rows of what the tower says, each times its
            share; row -1 is the last. None: they are the rows, one after the other.
    """

    patches_PX: np.ndarray
    place_P2: np.ndarray
    rows: int
    columns: int
    runs: tuple[int, ...]
    written: str | None = None
    pick_NK: np.ndarray | None = None
    share_NK: np.ndarray | None = None

    @property
    def size(self) -> int:
        """Embeddings."""
        return sum(self.runs)


class Processor(Protocol):
    """One checkpoint's processor.

    Attributes:
        placeholder: the token in whose places embeddings are put.
        mark: what chat templates write where an image is; "" where that is the placeholder and stays.
        three_numbers: whether positions are three numbers, by which the grid's embeddings are told apart.
        together: whether an image's tokens attend to each other, also to those behind them.
    """

    @property
    def placeholder(self) -> int: ...

    @property
    def mark(self) -> str: ...

    @property
    def three_numbers(self) -> bool: ...

    @property
    def together(self) -> bool: ...

    def identity(self) -> str:
        """Everything that decides what it makes of an image, as text."""
        ...

    def asked(self, said: Mapping[str, Any]) -> Processor:
        """The same one as a request wants it (`mm_processor_kwargs`). ValueError, in a sentence, for what cannot be changed."""
        ...

    def patched(self, image: Image) -> Patched:
        """An RGB image, scaled and cut. ValueError, in a sentence, for one that cannot be."""
        ...


class Fixed:
    """A processor of which requests can change nothing."""

    def asked(self, said: Mapping[str, Any]) -> Self:
        """See `Processor`."""
        if said:
            raise ValueError(f"{min(map(str, said))[:40]!r} cannot be changed for this model's images.")
        return self


@dataclasses.dataclass(frozen=True)
class Scaling:
    """How pixels are scaled, and their levels made numbers.

    Attributes:
        resample: Pillow's number of the filter.
        scale, mean, std: of levels.
    """

    resample: int
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(
        cls,
        said: Mapping[str, Any],
        resample: int = 3,
        mean: tuple[float, ...] = CLIP_MEAN,
        std: tuple[float, ...] = CLIP_STD,
    ) -> Scaling:
        """As preprocessor_config.json says; the others are its class's defaults."""
        return cls(
            int(said.get("resample", resample)),
            float(said.get("rescale_factor", 1 / 255)),
            tuple(said.get("image_mean") or mean),
            tuple(said.get("image_std") or std),
        )

    def resized(self, image: Image, width: int, height: int) -> Image:
        """The image in another size."""
        return image.resize((width, height), resample=self.resample)  # type: ignore[arg-type]

    def normalized(self, pixels_HWC: np.ndarray) -> np.ndarray:
        """float32 [3, H, W] of uint8 [H, W, 3]."""
        table = levels(self.scale, self.mean, self.std)
        return np.stack([table[channel][pixels_HWC[:, :, channel]] for channel in range(3)])


@functools.lru_cache(maxsize=8)
def levels(scale: float, mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """float32 [3, 256]: what each channel's 256 levels become. Rescaled in float64 and rounded, then normalized in float32, as
    transformers does."""
    scaled = (np.arange(256, dtype=np.float64) * scale).astype(np.float32)
    return ((scaled[:, None] - np.array(mean, np.float32)) / np.array(std, np.float32)).T.copy()


def row_by_row(pixels_3HW: np.ndarray, patch: int) -> tuple[np.ndarray, np.ndarray]:
    """(patches_PX, place_P2) of an image cut row by row; inside a patch: channel, row, column."""
    rows, columns = pixels_3HW.shape[1] // patch, pixels_3HW.shape[2] // patch
    cut = pixels_3HW[:, : rows * patch, : columns * patch].reshape(3, rows, patch, columns, patch)
    place = np.moveaxis(np.indices((rows, columns), np.int32), 0, -1).reshape(-1, 2)
    return np.ascontiguousarray(cut.transpose(1, 3, 0, 2, 4)).reshape(rows * columns, -1), place


def tiles_of(images: Sequence[Image], scaling: Scaling, patch: int) -> tuple[np.ndarray, np.ndarray]:
    """(patches_PX, place_P2) of tiles, one behind the other."""
    cut = [row_by_row(scaling.normalized(np.asarray(image)), patch) for image in images]
    return np.concatenate([patches for patches, _ in cut]), np.concatenate([place for _, place in cut])


def side_of(size: Any, *names: str) -> tuple[int, int]:
    """(height, width) that a size in preprocessor_config.json means: a number, or an object. ValueError for none."""
    if isinstance(size, int):
        return size, size
    if isinstance(size, Mapping):
        if size.get("height") and size.get("width"):
            return int(size["height"]), int(size["width"])
        for name in names:
            if size.get(name):
                return int(size[name]), int(size[name])
    raise ValueError(f"preprocessor_config.json has a size that is not read here: {size!r}.")
