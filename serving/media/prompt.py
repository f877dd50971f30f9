"""Images in a prompt of token ids: each placeholder becomes as many tokens as its image has embeddings."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from serving.engine.api.media import Media, MediaItem
from serving.errors import invalid
from serving.media.processors.base import Patched, Processor


def with_images(
    ids: Sequence[int], images: Sequence[Patched], digests: Sequence[bytes], processor: Processor
) -> tuple[list[int], Media]:
    """The prompt with its images' tokens, and where their embeddings go.

    Raises:
        RequestError: INVALID_ARGUMENT: the chat template has left an image out or has put it at the prompt's end.
    """
    places = [i for i, token in enumerate(ids) if token == processor.placeholder]
    if len(places) != len(images):
        raise invalid(
            f"The request has {len(images)} images, and the model's chat template has made {len(places)} places for them.",
            "messages",
        )
    if places and places[-1] == len(ids) - 1:
        raise invalid("The prompt ends with an image: put text behind it.", "messages")
    whole: list[int] = []
    items: list[MediaItem] = []
    runs: list[tuple[int, Patched]] = []
    done = 0
    for place, image, digest in zip(places, images, digests, strict=True):
        whole += ids[done:place]
        tokens, embeddings = processor.tokens(image)
        taken = (len(whole) + np.asarray(embeddings)).astype(np.int32)
        items.append(MediaItem(digest, taken, image.patches_PX, image.place_P2))
        runs.append((len(whole), image))
        whole += tokens
        done = place + 1
    whole += ids[done:]
    positions = grid_positions(len(whole), runs) if processor.three_numbers else None
    return whole, Media(tuple(items), len(whole), positions)


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
