"""From a file's bytes to pixels, within bounds that are looked at before anything is unpacked."""

from __future__ import annotations

import io
import warnings
from typing import TYPE_CHECKING

from serving.errors import RequestError, invalid
from serving.media.fetching import MediaPolicy

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
"""What is read, of several images in a file the first. Others have had holes in their decoders, or are programs."""


class Room:
    """How many pixels may still be unpacked for a request."""

    def __init__(self, policy: MediaPolicy) -> None:
        self._left = self._most = policy.max_request_pixels

    def take(self, size: tuple[int, int]) -> None:
        """Raises RequestError where it is too small."""
        self._left -= size[0] * size[1]
        if self._left < 0:
            raise invalid(
                f"The request's images have more than {self._most} pixels together. Send fewer, or smaller ones.",
                "messages",
            )


def decode(data: bytes, policy: MediaPolicy, place: str, room: Room | None = None) -> Image:
    """An image in RGB, upright, as transformers' `load_image` gives it. Blocks; Pillow lets other threads run meanwhile.

    Args:
        place: of the part in the request, for errors.
        room: that the image's pixels are taken from.
    Raises:
        RequestError: INVALID_ARGUMENT, in the same words whatever is wrong inside.
    """
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            check_size(image.size, policy, place)
            if room is not None:
                room.take(image.size)
            image.load()
            ImageOps.exif_transpose(image, in_place=True)  # a copy of the largest image is 256 MB
            return image if image.mode == "RGB" else image.convert("RGB")
    except RequestError:
        raise
    except MemoryError:
        raise invalid(f"{place}: the image cannot be read.", place) from None
    except Exception:  # whatever a damaged file makes a decoder raise: its words may tell of this process's memory
        raise invalid(f"{place}: the image cannot be read. PNG, JPEG, WebP and GIF are.", place) from None


def check_size(size: tuple[int, int], policy: MediaPolicy, place: str) -> None:
    """Whether an image of so many columns and rows is taken.

    Raises:
        RequestError: INVALID_ARGUMENT.
    """
    width, height = size
    if min(size) < 1:
        raise invalid(f"{place}: the image is empty.", place)
    if width * height > policy.max_pixels:
        raise invalid(
            f"{place}: the image has {width} x {height} pixels; at most {policy.max_pixels} are taken. Send a smaller one.",
            place,
        )
    if max(size) > policy.max_aspect * min(size):
        raise invalid(
            f"{place}: the image has {width} x {height} pixels; one side may be {policy.max_aspect} times the other at most.",
            place,
        )
