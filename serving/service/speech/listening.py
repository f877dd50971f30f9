"""From a sound file to its spectrogram, in threads of its own and within a bound of memory that all requests share. Of a long one
nothing stays but the file: it is read twice, once to find out how loud it is, and again as its windows are asked for."""

from __future__ import annotations

import asyncio
import math
import threading
import weakref
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from serving.errors import ErrorKind, RequestError, invalid
from serving.media.sound import RATE, said_seconds, sound_pieces
from serving.media.sound.spectrum import HOP, Spectrogram, settled

MAX_SECONDS = 4 * 3600.0
HELD_BYTES = 2**30
"""Of all spectrograms that requests have at a time: nine hours of sound for 80 bins."""
KEPT_BYTES = 2**24
"""Of one sound's: nearly nine minutes for 80 bins. Longer ones are read again."""


SHORT_S = 60.0
"""Of a sound that is read at once."""


class Frames:
    """The spectrogram of a file, made again window by window.

    Args:
        count: frames that there are.
        loudest: as `Spectrogram` has it of the whole.
    """

    def __init__(self, data: bytes, mels: int, count: int, loudest: float) -> None:
        self.shape = (count, mels)
        self._loudest = loudest
        self._pieces = sound_pieces(data, MAX_SECONDS, "file", math.inf)
        self._spectrogram: Spectrogram | None = Spectrogram(mels)
        self._there, self._first = np.zeros((0, mels), np.float32), 0

    def __len__(self) -> int:
        return self.shape[0]

    def rows(self, first: int, count: int) -> np.ndarray:
        """float32 [up to `count`, mels] from `first` on, which never comes before the last one asked for. Blocks."""
        while self._first + len(self._there) < min(first + count, len(self)) and self._spectrogram is not None:
            piece = next(self._pieces, None)
            if piece is None:
                more, self._spectrogram = self._spectrogram.end(), None
            else:
                self._spectrogram.push(piece)
                more = self._spectrogram.take()
            kept = self._there[max(0, first - self._first) :]
            self._first += len(self._there) - len(kept)
            self._there = np.concatenate([kept, settled(more, self._loudest)])
        at = first - self._first
        return self._there[at : at + count]


class Listener:
    """Reads sound files. Behind its first minute a file is read in a thread that long ones share, a piece of each in turn: hours
    of sound keep neither a short sound waiting nor the windows of other requests.

    Args:
        mels: bins of its spectrograms.
        window: samples that a shorter sound is filled up to with silence.
    """

    def __init__(self, mels: int, window: int) -> None:
        self._mels, self._window = mels, window
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="jaxserve-sound")
        self._turns = ThreadPoolExecutor(1, thread_name_prefix="jaxserve-long-sound")
        self._held, self._lock = 0, threading.RLock()  # a spectrogram may go while it is held

    async def spectrogram(self, data: bytes) -> tuple[np.ndarray | Frames, int]:
        """(float32 [T, mels], whole or in windows, samples of sound at `RATE`, without what it was filled up with) of a file.

        Raises:
            RequestError: INVALID_ARGUMENT for what is no sound, has none, or too much; RESOURCE_EXHAUSTED.
        """
        reading = self._read(data)
        step = self._threads.submit(next, reading)
        try:
            while (found := await asyncio.wrap_future(step)) is None:
                step = self._turns.submit(next, reading)
            return found
        finally:
            step.add_done_callback(lambda _: reading.close())  # nobody may close it while a thread is at it

    async def rows(self, frames: np.ndarray | Frames, first: int, count: int) -> np.ndarray:
        """Some of a spectrogram's frames, see `Frames.rows`."""
        if isinstance(frames, np.ndarray):
            return frames[first : first + count]
        return await self.run(frames.rows, first, count)

    async def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """A function's result, from one of the threads."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *args)

    def _read(self, data: bytes) -> Generator[tuple[np.ndarray | Frames, int] | None, None, None]:
        """Gives None after each piece of the file that is not short, and what `spectrogram` does at its end."""
        spectrogram, taken, dropped = Spectrogram(self._mels), 0, False
        long = self._bytes(said_seconds(data) * RATE) > KEPT_BYTES
        most = (
            self._bytes(self._window) if long else KEPT_BYTES
        )  # where the header lies, more is read twice or kept a while
        try:
            for piece in sound_pieces(data, MAX_SECONDS, "file"):
                spectrogram.push(piece)
                dropped = dropped or spectrogram.nbytes > most
                if dropped:
                    spectrogram.take()
                self._take(spectrogram.nbytes - taken)
                taken = spectrogram.nbytes
                if spectrogram.samples > SHORT_S * RATE:
                    yield None
            heard = spectrogram.samples
            if heard < HOP:
                raise invalid("file has no sound in it.", "file")
            if heard < self._window:
                spectrogram.push(np.zeros(self._window - heard, np.float32))
            frames = spectrogram.finish()
            self._take((0 if dropped else frames.nbytes) - taken)
            taken = frames.nbytes
        except BaseException:
            self._give_back(taken)
            raise
        if dropped:
            yield Frames(data, self._mels, heard // HOP, spectrogram.loudest), heard
            return
        weakref.finalize(frames, self._give_back, taken)  # whoever still waits for it or not
        yield frames, heard

    def _bytes(self, samples: float) -> float:
        """Of a spectrogram."""
        return 4 * self._mels * samples / HOP

    def _take(self, size: int) -> None:
        with self._lock:
            if self._held + size > HELD_BYTES:
                hours = HELD_BYTES / self._bytes(RATE * 3600)
                raise RequestError(
                    ErrorKind.RESOURCE_EXHAUSTED, f"The sound that requests have sent is more than {hours:.0f} hours together. "
                    "Try again later.", param="file", code="queue_full", retry_after_s=1.0,
                )  # fmt: skip
            self._held += size

    def _give_back(self, size: int) -> None:
        with self._lock:
            self._held -= size
