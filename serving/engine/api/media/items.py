"""Images of a prompt, as an engine takes them: patches of pixels, and which of the prompt's positions their embeddings stand in."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class MediaItem:
    """One image, or one window of sound.

    Attributes:
        digest: of everything that decides its embeddings, and of who may share them; 32 bytes.
        places_N: int32, the prompt positions that its N embeddings take, ascending.
        patches_PX: float32, as the model's processor lays them out.
        place_P2: int32, row and column of each patch.
        lasting: it is no embedding of places but what every token of the sequence attends to: needed as long as the request runs.
            Its one place is the first.
        together: its tokens attend to each other, whichever comes first: no piece of the prompt ends inside it.
        pick_NK, share_NK: int32 and float32: each embedding is the sum of so many rows of what the tower says, each times its
            share; row -1 is the last. None: they are the rows, one after the other.
        sound: it is of a sound.
    """

    digest: bytes
    places_N: np.ndarray
    patches_PX: np.ndarray
    place_P2: np.ndarray
    lasting: bool = False
    together: bool = False
    pick_NK: np.ndarray | None = None
    share_NK: np.ndarray | None = None
    sound: bool = False

    @property
    def size(self) -> int:
        """Embeddings."""
        return len(self.places_N)

    @property
    def first(self) -> int:
        """Where its places begin."""
        return int(self.places_N[0])

    @property
    def end(self) -> int:
        """The position behind the last that needs it."""
        return sys.maxsize if self.lasting else int(self.places_N[-1]) + 1


@dataclasses.dataclass(frozen=True, eq=False)
class MediaOrigin:
    """What a prompt and its media were made of, for whoever makes them again: an engine behind a gateway.

    Attributes:
        token_ids: of the prompt, with one placeholder where each image is to become as many as it has embeddings.
        sources: of each what came, a file's bytes or a `data:` URI, and whether it is an "image", a "video" or a "sound".
        said: how the request wants them cut (`mm_processor_kwargs`).
    """

    token_ids: tuple[int, ...]
    sources: tuple[tuple[bytes | str, str], ...]
    said: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Media:
    """All images of one prompt.

    Attributes:
        items: in the order of their places.
        length: tokens of the prompt.
        positions_3L: int32, time, row and column of each of the prompt's tokens, for models whose positions are three numbers.
        origin: what it was made of; None where nobody will ask.
    """

    items: tuple[MediaItem, ...]
    length: int
    positions_3L: np.ndarray | None = None
    origin: MediaOrigin | None = None

    def outline(self) -> Media:
        """Its digests and places alone: what decides which pages hold it."""
        return outline_of([(item.digest, item.places_N) for item in self.items], self.length)

    @property
    def senses(self) -> frozenset[str]:
        """What a model must read to take it, in the words of `EngineInfo.modalities`; none where its origin is not known."""
        sources = () if self.origin is None else self.origin.sources
        return frozenset("audio" if kind == "sound" else kind for _, kind in sources)

    @property
    def lasting(self) -> bool:
        """Whether some of it is needed by every token."""
        return any(item.lasting for item in self.items)

    @property
    def together(self) -> bool:
        """Whether some of its tokens attend to later ones."""
        return any(item.together for item in self.items)

    def reaches(self, first: int, end: int) -> np.ndarray:
        """int32 [end - first]: the last position that each token in [first, end) attends to: itself, or the end of the run of an
        image's tokens that it is one of."""
        found = np.arange(first, end, dtype=np.int32)
        for _, item in self.overlapping(first, end):
            if item.together:
                places = item.places_N
                ends = np.flatnonzero(np.diff(places, append=places[-1] + 2) != 1)
                last = places[ends[np.searchsorted(ends, np.arange(len(places)))]]
                here = (places >= first) & (places < end)
                found[places[here] - first] = last[here]
        return found

    @functools.cached_property
    def delta(self) -> int:
        """What a later token's position, which is one number three times, is more than its place in the sequence."""
        return 0 if self.positions_3L is None else int(self.positions_3L.max()) + 1 - self.length

    def positions(self, first: int, end: int) -> np.ndarray:
        """int32 [3, end - first]: the positions of the sequence's tokens from `first` on, completion included."""
        behind = np.arange(max(first, self.length), max(end, self.length), dtype=np.int32) + np.int32(self.delta)
        if self.positions_3L is None:
            return np.tile(np.arange(first, end, dtype=np.int32), (3, 1))
        return np.concatenate([self.positions_3L[:, first:end], np.tile(behind, (3, 1))], axis=1)

    def overlapping(self, first: int, end: int) -> Iterator[tuple[int, MediaItem]]:
        """(index, item) of those with places in [first, end)."""
        for index, item in enumerate(self.items):
            if item.first < end and item.end > first:
                yield index, item

    @functools.cached_property
    def marks(self) -> np.ndarray:
        """int32: of each place of the prompt, what stands there when prefixes are compared: a negative number of the item's content
        and of how far inside it the place is; 0 where a token stands for itself."""
        marks = np.zeros(self.length, np.int32)
        for item in self.items:
            stream = hashlib.shake_128(item.digest).digest(4 * item.size)
            marks[item.places_N] = np.frombuffer(stream, np.int32) | np.int32(-(2**31))
        return marks

    def standing(self, tokens: Sequence[int], first: int = 0) -> np.ndarray:
        """int32: what stands at a sequence's positions from `first` on, for comparing prefixes: tokens, and in an image's places
        the image's content.

        Args:
            tokens: of the sequence, from `first` on.
        """
        found = np.array(tokens, np.int32)
        marks = self.marks[first : first + len(found)]
        found[: len(marks)] = np.where(marks, marks, found[: len(marks)])
        return found

    @functools.cached_property
    def identity(self) -> bytes:
        """What tells it from other media in the same tokens."""
        return hashlib.blake2b(self.marks.tobytes(), digest_size=16).digest()

    def digests(self, first: int, end: int) -> bytes:
        """Of the items with places in [first, end), one behind the other."""
        return b"".join(item.digest for _, item in self.overlapping(first, end))


def outline_of(items: Sequence[tuple[bytes, np.ndarray]], length: int) -> Media:
    """Media without pixels.

    Args:
        items: (digest, places) of each.
        length: tokens of the prompt.
    """
    nothing = np.zeros((0, 0), np.float32), np.zeros((0, 2), np.int32)
    return Media(tuple(MediaItem(digest, places, *nothing) for digest, places in items), length)
