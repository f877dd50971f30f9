"""From a sound file to its spectrogram, in threads of its own and within a bound of memory that all requests share. Of a long one
nothing stays but the file: it is read twice, once to find out how loud it is, and again as its windows are asked for."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
import threading
import weakref
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
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


class _Turns:
    """A thread whose next task is the one with the least key. Of files those are the shortest, which wait for no more than a piece
    of a longer one; of equal ones the first, which is read to its end: the engine has something to do while the others are read."""

    def __init__(self) -> None:
        self._waiting: list[tuple[tuple[float, int], Future[Any], Callable[..., Any], tuple[Any, ...]]] = []
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="jaxserve-long-sound")

    def submit(self, key: tuple[float, int], function: Callable[..., Any], *args: Any) -> Future[Any]:
        """What becomes of it. No two that wait have the same key."""
        future: Future[Any] = Future()
        with self._lock:
            heapq.heappush(self._waiting, (key, future, function, args))
        self._thread.submit(self._next)
        return future

    def _next(self) -> None:
        with self._lock:
            _, future, function, args = heapq.heappop(self._waiting)
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(function(*args))
        except BaseException as error:  # whoever waits for it is told
            future.set_exception(error)


class Listener:
    """Reads sound files. Behind its first minute a file is read in a thread that long ones share: hours of sound keep neither a
    short sound waiting nor the windows of other requests.

    Args:
        mels: bins of its spectrograms.
        window: samples that a shorter sound is filled up to with silence.
    """

    def __init__(self, mels: int, window: int) -> None:
        self._mels, self._window = mels, window
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="jaxserve-sound")
        self._turns, self._numbers = _Turns(), itertools.count()
        self._held, self._lock = 0, threading.RLock()  # a spectrogram may go while it is held

    async def spectrogram(self, data: bytes) -> tuple[np.ndarray | Frames, int]:
        """(float32 [T, mels], whole or in windows, samples of sound at `RATE`, without what it was filled up with) of a file.

        Raises:
            RequestError: INVALID_ARGUMENT for what is no sound, has none, or too much; RESOURCE_EXHAUSTED.
        """
        reading, number = self._read(data), next(self._numbers)
        step: Future[Any] = self._threads.submit(next, reading)
        try:
            while True:
                found: Any = await asyncio.wrap_future(step)
                if not isinstance(found, float):
                    return found
                step = self._turns.submit((found, number), next, reading)
        finally:
            # Nobody may close it while a thread is at it. And a cancelled task keeps this frame and all that it names while
            # somebody has the task: not what is read meanwhile.
            step.add_done_callback(lambda _, reading=reading: reading.close())
            del step, reading

    async def rows(self, frames: np.ndarray | Frames, first: int, count: int) -> np.ndarray:
        """Some of a spectrogram's frames, see `Frames.rows`."""
        if isinstance(frames, np.ndarray):
            return frames[first : first + count]
        return await self.run(frames.rows, first, count)

    async def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """A function's result, from one of the threads."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *args)

    async def run_in_turn(self, function: Callable[..., Any], *args: Any) -> Any:
        """The same from the thread that long files share, of what takes long; before any of theirs."""
        return await asyncio.wrap_future(self._turns.submit((0.0, next(self._numbers)), function, *args))

    def _read(self, data: bytes) -> Generator[tuple[np.ndarray | Frames, int] | float, None, None]:
        """Gives how many seconds it has, as far as one knows, after each piece of a file that is not short, and what `spectrogram`
        does at its end."""
        spectrogram, taken, dropped, said = Spectrogram(self._mels), 0, False, said_seconds(data)
        long = self._bytes(said * RATE) > KEPT_BYTES
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
                    yield max(said, spectrogram.samples / RATE)
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
