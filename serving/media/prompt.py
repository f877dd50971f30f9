"""Images and videos in a prompt: what is written where one is; and of token ids, each placeholder becomes as many as it has
embeddings there."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence

import numpy as np

from serving.engine.api.media import Media, MediaItem
from serving.errors import RequestError, invalid
from serving.media.processors.base import Patched, Processor, Sound, Video


@dataclasses.dataclass(frozen=True)
class Seen:
    """One image, video or sound of a request, read.

    Attributes:
        pieces: an image, or a video's frames or a sound's windows as they are read one after the other.
        digests: one a piece.
        raw: what came: a file's bytes, or a URI of frames; empty where nobody sends it on.
    """

    pieces: tuple[Patched, ...]
    digests: tuple[bytes, ...]
    video: bool = False
    sound: bool = False
    raw: bytes | str = b""

    @property
    def size(self) -> int:
        """Embeddings."""
        return sum(piece.size for piece in self.pieces)

    @property
    def nbytes(self) -> int:
        """Of its pixels, and of what came."""
        return sum(piece.patches_PX.nbytes for piece in self.pieces) + len(self.raw)


def mark_of(one: Seen, processor: Processor) -> str:
    """What stands in the chat template's text for it and is rewritten; "" where nothing is."""
    part = _part(one, processor)
    return "" if part is None else part.mark


def _part(one: Seen, processor: Processor) -> Processor | Video | Sound | None:
    """What of a processor reads such a thing."""
    return processor.video if one.video else processor.sound if one.sound else processor


def written(text: str, seen: Sequence[Seen], processor: Processor) -> str | list[str]:
    """The prompt's text with what is written for each image and video in its mark's place; where no token stands for a sound, the
    texts around the sounds.

    Args:
        text: of the chat template; marks that users have typed are no marks there.
    Raises:
        RequestError: INVALID_ARGUMENT: the chat template has left one out.
    """
    marks = [mark for one in seen if (mark := mark_of(one, processor))]
    if not marks:
        return text
    parts = re.split("(" + "|".join(map(re.escape, set(marks))) + ")", text)
    found, texts = parts[1::2], parts[::2]
    if found != marks:
        raise _places(seen, len(marks), len(found))
    if processor.sound is not None and processor.sound.wordless:
        return texts
    own = [one.pieces[0].written for one in seen if mark_of(one, processor)]
    replaced = (mark if said is None else said for said, mark in zip(own, found, strict=True))
    return texts[0] + "".join(said + behind for said, behind in zip(replaced, texts[1:], strict=True))


def with_media(ids: Sequence[int], seen: Sequence[Seen], processor: Processor) -> tuple[list[int], Media]:
    """The prompt with its images' and videos' tokens, and where their embeddings go.

    Args:
        ids: of the text that `written` gave.
    Raises:
        RequestError: INVALID_ARGUMENT: the chat template has left one out or has put it at the prompt's end.
    """
    video, sound = processor.video, processor.sound
    tokens = {processor.placeholder} | {part.placeholder for part in (video, sound) if part is not None}
    places = [i for i, token in enumerate(ids) if token in tokens]
    wanted = [_placeholder(one, processor) for one in seen for _ in range(_placeholders(one))]
    if [ids[place] for place in places] != wanted:
        raise _places(seen, len(wanted), len(places))
    if places and places[-1] == len(ids) - 1:
        what = "a sound" if seen[-1].sound else "an image"
        raise invalid(f"The prompt ends with {what}: put text behind it.", "messages")
    whole: list[int] = []
    items: list[MediaItem] = []
    begins: list[tuple[int, Patched]] = []
    done, next_place = 0, iter(places)
    for piece, digest, token, sounds in _pieces(seen, processor):
        taken: list[np.ndarray] = []
        for at, count in enumerate(piece.runs):
            if at or not piece.joins:
                place = next(next_place)
                whole += ids[done:place]
                done = place + 1
            if not taken:
                begins.append((len(whole), piece))
            taken.append(np.arange(len(whole), len(whole) + count, dtype=np.int32))
            whole += [token] * count
        if not piece.size:
            continue  # a sound too short to be heard
        items.append(
            MediaItem(
                digest, np.concatenate(taken), piece.patches_PX, piece.place_P2,
                together=processor.together and not sounds, pick_NK=piece.pick_NK, share_NK=piece.share_NK, sound=sounds,
            )
        )  # fmt: skip
    whole += ids[done:]
    positions = grid_positions(len(whole), begins) if processor.three_numbers else None
    return whole, Media(tuple(items), len(whole), positions)


def _placeholder(one: Seen, processor: Processor) -> int:
    """What stands for it in the text's tokens."""
    part = _part(one, processor)
    assert part is not None  # whoever reads videos and sounds has checked
    return part.placeholder


def _pieces(seen: Sequence[Seen], processor: Processor) -> Iterator[tuple[Patched, bytes, int, bool]]:
    for one in seen:
        token = processor.sound.token if one.sound and processor.sound else _placeholder(one, processor)
        for piece, digest in zip(one.pieces, one.digests, strict=True):
            yield piece, digest, token, one.sound


def _placeholders(one: Seen) -> int:
    """How many stand in the text for it."""
    return sum(len(piece.runs) - piece.joins for piece in one.pieces)


def _places(seen: Sequence[Seen], wanted: int, places: int) -> RequestError:
    what = "sounds" if seen and all(one.sound for one in seen) else "images"
    return invalid(
        f"The request has {wanted} {what}, and the model's chat template has made {places} places for them.", "messages"
    )


def grid_positions(length: int, runs: Sequence[tuple[int, Patched]]) -> np.ndarray:
    """int32 [3, length]: time, row and column of each token (arXiv:2409.12191). Text counts all three on together; an image's
    embeddings have the time at which it stands and their own row and column from there; text behind it goes on behind the longer
    side. All grids of a video have their rows and columns from the same place on, and text goes on behind those, as in
    transformers.

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
        positions[0, begin:end], positions[1, begin:end], positions[2, begin:end] = (
            now + image.time,
            now + row,
            now + column,
        )
        now += 0 if image.stays else max(image.rows, image.columns)
        at = end
    positions[:, at:] = np.arange(now, now + length - at)
    return positions
