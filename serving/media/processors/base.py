"""What a family's processor does, and what several share."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np

from serving.media.frames.sampling import Frames, Sampling

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
        time: by how much later than the prompt's place before it the grid is, where positions are three numbers.
        stays: what comes next in the prompt stands where this does, by those numbers: it is not a video's last piece.
        joins: it stands behind the one before, in the same placeholder's place: it is not a video's first piece.
    """

    patches_PX: np.ndarray
    place_P2: np.ndarray
    rows: int
    columns: int
    runs: tuple[int, ...]
    written: str | None = None
    pick_NK: np.ndarray | None = None
    share_NK: np.ndarray | None = None
    time: int = 0
    stays: bool = False
    joins: bool = False

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
        video: what reads videos; None where none are.
        sound: what reads sounds; None where none are.
        images: whether it reads images.
    """

    @property
    def placeholder(self) -> int: ...

    @property
    def mark(self) -> str: ...

    @property
    def three_numbers(self) -> bool: ...

    @property
    def together(self) -> bool: ...

    @property
    def video(self) -> Video | None: ...

    @property
    def sound(self) -> Sound | None: ...

    @property
    def images(self) -> bool: ...

    def identity(self) -> str:
        """Everything that decides what it makes of an image, as text."""
        ...

    def asked(self, said: Mapping[str, Any]) -> Processor:
        """The same one as a request wants it (`mm_processor_kwargs`). ValueError, in a sentence, for what cannot be changed."""
        ...

    def pieces(self, image: Image) -> list[Patched]:
        """An RGB image, scaled and cut: mostly one piece; what is `written` stands with the first. ValueError, in a sentence, for
        one that cannot be."""
        ...


class Video(Protocol):
    """How one checkpoint's videos are cut.

    Attributes:
        placeholder: the token in whose places embeddings are put.
        mark: what stands where the chat template wants a video; "" where that is the placeholder and stays.
        sampling: which frames are read.
        scaling: how pixels become numbers.
    """

    @property
    def placeholder(self) -> int: ...

    @property
    def mark(self) -> str: ...

    @property
    def sampling(self) -> Sampling: ...

    @property
    def scaling(self) -> Scaling: ...

    def size(self, frames: int, height: int, width: int) -> tuple[int, int]:
        """(height, width) that each of so many frames is brought to. ValueError, in a sentence, where there is none."""
        ...

    def count(self, frames: int, height: int, width: int) -> int:
        """Embeddings of so many frames of such a size, once they are brought to it."""
        ...

    def patched(self, frames: Sequence[np.ndarray], times: Frames) -> list[Patched]:
        """The pieces of a video, in the order of their places; what is `written` stands with the first.

        Args:
            frames: uint8 [H, W, 3], in the size that `size` says.
            times: when each of them is.
        """
        ...


class Sound(Protocol):
    """How one checkpoint's sounds become what an encoder reads.

    Attributes:
        placeholder: what stands in token ids for a sound.
        token: what stands in the prompt's places for it.
        mark: what chat templates write for a sound and is rewritten; "" where that is the placeholder and stays.
        wordless: they know nothing of sounds, and no token stands for one: the mark is put into the messages' texts.
        enough_s: seconds of a sound that are heard; what is behind them need not be read.
    """

    @property
    def enough_s(self) -> float: ...

    @property
    def placeholder(self) -> int: ...

    @property
    def token(self) -> int: ...

    @property
    def mark(self) -> str: ...

    @property
    def wordless(self) -> bool: ...

    def most_seconds(self, tokens: int) -> float:
        """Of a sound that has no more embeddings than that; infinity where what is longer is cut."""
        ...

    def pieces(self, samples: np.ndarray) -> list[Patched]:
        """Of samples, float32 at `serving.media.sound.RATE`, at least one."""
        ...


class Whole:
    """A processor that makes one piece of an image."""

    def patched(self, image: Image) -> Patched:
        """The piece."""
        raise NotImplementedError

    @property
    def sound(self) -> Sound | None:
        """See `Processor`."""
        return None

    @property
    def images(self) -> bool:
        """See `Processor`."""
        return True

    def pieces(self, image: Image) -> list[Patched]:
        """See `Processor`."""
        return [self.patched(image)]


class Fixed(Whole):
    """A processor of which requests can change nothing, and that reads no videos."""

    @property
    def video(self) -> Video | None:
        """See `Processor`."""
        return None

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
        scale, mean, std: of levels; scale is None where they stay what they are, and mean and std where nothing is taken off.
        resize: whether images are brought to a size at all.
    """

    resample: int
    scale: float | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    resize: bool = True

    @classmethod
    def of(
        cls,
        said: Mapping[str, Any],
        resample: int = 3,
        mean: tuple[float, ...] = CLIP_MEAN,
        std: tuple[float, ...] = CLIP_STD,
        normalize: bool = True,
    ) -> Scaling:
        """As preprocessor_config.json says; the others are its class's defaults.

        Raises:
            ValueError: numbers of other than three channels, or a filter that there is none of, in a sentence.
        """
        normal = value_of(said, "do_normalize", normalize)
        filter_ = int(value_of(said, "resample", resample))
        if not 0 <= filter_ <= 5:
            raise ValueError(f"preprocessor_config.json: resample is {filter_}; Pillow's filters are 0 to 5.")
        return cls(
            filter_,
            float(value_of(said, "rescale_factor", 1 / 255)) if value_of(said, "do_rescale", True) else None,
            _channels(value_of(said, "image_mean", mean), "image_mean") if normal else None,
            _channels(value_of(said, "image_std", std), "image_std") if normal else None,
            bool(value_of(said, "do_resize", True)),
        )

    def resized(self, image: Image, width: int, height: int) -> Image:
        """The image in another size, or as it is where sizes are left alone."""
        return self.always(image, width, height) if self.resize else image

    def always(self, image: Image, width: int, height: int) -> Image:
        """The image in another size: what is cut into tiles is scaled for that, whatever `resize` says."""
        return image.resize((width, height), resample=self.resample)  # type: ignore[arg-type]

    def exactly(self, image: Image, width: int, height: int) -> Image:
        """The image in the size that a tower takes.

        Raises:
            ValueError: it has another one, and sizes are left alone.
        """
        image = self.resized(image, width, height)
        if image.size != (width, height):
            raise ValueError(
                f"this model takes images of {width} x {height} pixels as they are (do_resize is false); this one has "
                f"{image.width} x {image.height}."
            )
        return image

    def normalized(self, pixels_HWC: np.ndarray) -> np.ndarray:
        """float32 [3, H, W] of uint8 [H, W, 3]."""
        table = levels(self.scale, self.mean, self.std)
        return np.stack([table[channel][pixels_HWC[:, :, channel]] for channel in range(3)])


def value_of(said: Mapping[str, Any], name: str, default: Any) -> Any:
    """What a processor's file says; null is nothing said."""
    found = said.get(name)
    return default if found is None else found


def _channels(said: Any, name: str) -> tuple[float, ...]:
    found = (float(said),) * 3 if isinstance(said, int | float) else tuple(float(one) for one in said)
    if len(found) != 3:
        raise ValueError(
            f"preprocessor_config.json: {name} has {len(found)} numbers; one each of three channels is read."
        )
    return found


@functools.lru_cache(maxsize=8)
def levels(scale: float | None, mean: tuple[float, ...] | None, std: tuple[float, ...] | None) -> np.ndarray:
    """float32 [3, 256]: what each channel's 256 levels become. Rescaled in float64 and rounded, then normalized in float32, as
    transformers does."""
    scaled = (np.arange(256, dtype=np.float64) * (1.0 if scale is None else scale)).astype(np.float32)[:, None]
    if mean is not None and std is not None:
        scaled = (scaled - np.array(mean, np.float32)) / np.array(std, np.float32)
    return np.broadcast_to(scaled, (256, 3)).T.copy()


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
