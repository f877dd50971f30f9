"""From what a request calls a sound to samples: of a file, whatever its header says, or given as an array with its rate."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from serving.errors import invalid
from serving.media.fetching import MediaPolicy, fetch
from serving.media.sound import MAX_CHANNELS, RATE, RATES, read_sound, resampled


class GivenSound:
    """A sound of a request, fetched and not looked into.

    Attributes:
        data: the file; None where samples are given.
    """

    def __init__(self, content: Any, policy: MediaPolicy, place: str) -> None:
        self._policy, self._place = policy, place
        self.data: bytes | None = None
        self._samples, self._rate = np.zeros(0, np.float32), RATE
        if isinstance(content, os.PathLike):  # which no request over a wire can be
            content = _of_path(Path(content), policy, place)
        if isinstance(content, str | bytes):
            self.data = fetch(content, policy, place) if isinstance(content, str) else content
            if len(self.data) > policy.max_bytes:
                raise invalid(f"{place} is too large: at most {policy.max_bytes} bytes are taken.", place)
        elif isinstance(content, tuple):
            self._samples, self._rate = _samples(content[0], place), _rate(content[1], place)
        else:
            self._samples = _samples(content, place)

    def parts(self) -> Iterator[bytes]:
        """Everything that decides what is heard, for a digest."""
        if self.data is not None:
            yield self.data
        else:
            yield repr((self._samples.shape, self._samples.dtype.str, self._rate)).encode()
            yield np.ascontiguousarray(self._samples).tobytes()

    def heard(self, most_s: float, enough_s: float = math.inf) -> np.ndarray:
        """float32 at `RATE`, channels averaged. Blocks.

        Args:
            most_s: seconds that are taken, beyond the policy's.
            enough_s: seconds behind which a file is not read on.
        Raises:
            RequestError: INVALID_ARGUMENT: it cannot be read, or is longer, or there is none.
        """
        most_s, place = min(most_s, self._policy.max_sound_s), self._place
        if self.data is not None:
            found = read_sound(self.data, most_s, place, self._policy.sound_s, enough_s)
        else:
            if len(self._samples) > most_s * self._rate:
                raise invalid(f"{place} is longer than {most_s:g} seconds.", place)
            found = resampled(_mono(self._samples), self._rate)
        if not len(found):
            raise invalid(f"{place} has no sound in it.", place)
        if not np.isfinite(found).all():
            raise invalid(f"{place} has samples that are no numbers.", place)
        return found


def _of_path(path: Path, policy: MediaPolicy, place: str) -> bytes:
    try:
        with path.expanduser().open("rb") as file:
            return file.read(policy.max_bytes + 1)
    except OSError as error:
        raise invalid(f"{place}: {path} cannot be read: {error.strerror}.", place) from None


def _samples(content: Any, place: str) -> np.ndarray:
    refused = invalid(
        f"{place}: a sound is a URL, a file's bytes, or samples: float32 or int16 [n] or [n, channels], 16,000 a second or in a "
        "pair with their rate.", place,
    )  # fmt: skip
    if not hasattr(content, "__array_interface__") and not hasattr(content, "__array__"):
        raise refused
    samples = np.asarray(content)
    if samples.ndim == 2 and samples.shape[0] <= MAX_CHANNELS < samples.shape[1]:
        samples = samples.T  # as some libraries have it
    wrong = samples.ndim not in (1, 2) or (samples.ndim == 2 and not 1 <= samples.shape[1] <= MAX_CHANNELS)
    if wrong or not (samples.dtype == np.int16 or np.issubdtype(samples.dtype, np.floating)):
        raise refused
    return samples


def _mono(samples: np.ndarray) -> np.ndarray:
    scale = 1 / 32768 if samples.dtype == np.int16 else 1.0
    return (samples if samples.ndim == 1 else samples.mean(axis=1)).astype(np.float32) * np.float32(scale)


def _rate(said: Any, place: str) -> int:
    whole = (
        isinstance(said, int | float | np.integer | np.floating) and not isinstance(said, bool) and said == said // 1
    )
    if not whole or not RATES[0] <= said <= RATES[1]:
        raise invalid(f"{place}: a sound's rate must be a whole number from {RATES[0]} to {RATES[1]}.", place)
    return int(said)
