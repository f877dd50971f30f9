"""Images in a prompt: what is written where one is; and of token ids, each placeholder becomes as many as its image has there."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from serving.engine.api.media import Media, MediaItem
from serving.errors import RequestError, invalid
from serving.media.processors.base import Patched, Processor


def written(text: str, images: Sequence[Patched], processor: Processor) -> str:
    """The prompt's text with what is written for each image in its mark's place.

    Args:
        text: of the chat template; marks that users have typed are no marks there.
    Raises:
        RequestError: INVALID_ARGUMENT: the chat template has left an image out.
    """
    if not processor.mark:
        return text
    parts = text.split(processor.mark)
    if len(parts) - 1 != len(images):
        raise _places(len(images), len(parts) - 1)
    marks = (image.written if image.written is not None else processor.mark for image in images)
    return parts[0] + "".join(mark + part for mark, part in zip(marks, parts[1:], strict=True))


def with_images(
    ids: Sequence[int], images: Sequence[Patched], digests: Sequence[bytes], processor: Processor
) -> tuple[list[int], Media]:
    """The prompt with its images' tokens, and where their embeddings go.

    Args:
        ids: of the text that `written` gave.
    Raises:
        RequestError: INVALID_ARGUMENT: the chat template has left an image out or has put it at the prompt's end.
    """
    places = [i for i, token in enumerate(ids) if token == processor.placeholder]
    if len(places) != sum(len(image.runs) for image in images):
        raise _places(len(images), len(places))
    if places and places[-1] == len(ids) - 1:
        raise invalid("The prompt ends with an image: put text behind it.", "messages")
    whole: list[int] = []
    items: list[MediaItem] = []
    begins: list[tuple[int, Patched]] = []
    done, next_place = 0, iter(places)
    for image, digest in zip(images, digests, strict=True):
        taken: list[np.ndarray] = []
        for count in image.runs:
            place = next(next_place)
            whole += ids[done:place]
            if not taken:
                begins.append((len(whole), image))
            taken.append(np.arange(len(whole), len(whole) + count, dtype=np.int32))
            whole += [processor.placeholder] * count
            done = place + 1
        items.append(
            MediaItem(
                digest, np.concatenate(taken), image.patches_PX, image.place_P2, together=processor.together,
                pick_NK=image.pick_NK, share_NK=image.share_NK,
            )
        )  # fmt: skip
    whole += ids[done:]
    positions = grid_positions(len(whole), begins) if processor.three_numbers else None
    return whole, Media(tuple(items), len(whole), positions)


def _places(images: int, places: int) -> RequestError:
    return invalid(
        f"The request has {images} images, and the model's chat template has made {places} places for them.", "messages"
    )


def grid_positions(length: int, runs: Sequence[tuple[int, Patched]]) -> np.ndarray:
    """int32 [3, length]: time, row and column of each token (arXiv:2409.12191). Text counts all three on together; an image's
    embeddings have the time at which it stands and their own row and column from there; text behind it goes on behind the longer
    side.

    Args:
        runs: where each image begins, and it.
    """
    positions = np.empty((3, length), np.int32)
    at = now = 0
    for begin, image in runs:
        positions[:, at:begin] = np.arange(now, now + begin - at)
        now += begin - at
        row, column = np.indices((image.rows, image.columns)).reshape(2, -1)
        end = begin + row.size
        positions[0, begin:end], positions[1, begin:end], positions[2, begin:end] = now, now + row, now + column
        now += max(image.rows, image.columns)
        at = end
    positions[:, at:] = np.arange(now, now + length - at)
    return positions
