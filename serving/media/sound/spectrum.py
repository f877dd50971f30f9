"""Sound to the log-mel spectrograms that Whisper's encoder reads (arXiv:2212.04356): numpy alone, equal to transformers' features.
Piece by piece: an hour's samples are never in memory at once."""

from __future__ import annotations

import functools

import numpy as np

from serving.media.sound.files import RATE

HOP, FFT = 160, 400
BLOCK = 1024
"""Frames that are transformed at once: 3 MB in float64."""
SILENCE = -10.0
"""The logarithm of no power at all."""


@functools.lru_cache(maxsize=4)
def mel_filters(mels: int) -> np.ndarray:
    """float64 [201, mels]: triangles, evenly spaced on Slaney's scale from 0 to 8000 Hz, each of the same area."""

    def to_hertz(mel: np.ndarray) -> np.ndarray:
        linear = mel * 200.0 / 3
        return np.where(mel >= 15, 1000.0 * np.exp(np.log(6.4) / 27.0 * (mel - 15.0)), linear)

    top = 15.0 + np.log(8000.0 / 1000.0) * 27.0 / np.log(6.4)
    edges = to_hertz(np.linspace(0.0, top, mels + 2))
    bins = np.linspace(0, RATE // 2, FFT // 2 + 1)
    rising = (bins[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins[:, None]) / (edges[2:] - edges[1:-1])
    return np.maximum(0, np.minimum(rising, falling)) * (2.0 / (edges[2:] - edges[:-2]))


class Spectrogram:
    """Of a sound that comes in pieces.

    Attributes:
        samples: that came so far.
        loudest: the greatest number of the frames that were taken.
    """

    def __init__(self, mels: int = 80) -> None:
        self.samples, self.loudest = 0, SILENCE
        self._mels = mels
        self._rest = np.zeros(0)  # from the first sample on that the next frame needs
        self._begun = False
        self._done: list[np.ndarray] = []
        self._taken = 0

    @property
    def nbytes(self) -> int:
        """What is kept of it."""
        return sum(block.nbytes for block in self._done)

    def push(self, samples: np.ndarray) -> None:
        """The next samples."""
        self.samples += len(samples)
        self._rest = np.concatenate([self._rest, samples.astype(np.float64)])
        if not self._begun and len(self._rest) > FFT // 2:
            self._rest = np.concatenate(
                [self._rest[FFT // 2 : 0 : -1], self._rest]
            )  # frames are centred: mirrored edges
            self._begun = True
        if self._begun:
            self._take()

    def finish(self) -> np.ndarray:
        """float32 [samples / HOP, mels], a frame each 10 ms; of those alone that were not taken before."""
        logs = self.end()
        return settled(logs, self.loudest)

    def end(self) -> np.ndarray:
        """The last frames as `take` gives them: no more samples come."""
        if not self._begun:  # too short to be mirrored
            self._rest = np.pad(self._rest, FFT // 2)
        else:
            self._rest = np.concatenate([self._rest, self._rest[-2 : -FFT // 2 - 2 : -1]])
        self._take()
        return self.take(self.samples // HOP)

    def take(self, most: int | None = None) -> np.ndarray:
        """float32 [n, mels], logarithms of the powers of the frames that are whole by now and were not taken before.

        Args:
            most: frames that all who take get together.
        """
        logs = np.concatenate([np.zeros((0, self._mels), np.float32), *self._done])
        logs, self._done = logs if most is None else logs[: max(0, most - self._taken)], []
        self._taken += len(logs)
        self.loudest = float(logs.max(initial=self.loudest))
        return logs

    def _take(self) -> None:
        """All frames that are whole."""
        while (frames := (len(self._rest) - FFT) // HOP + 1) > 0:
            count = min(frames, BLOCK)
            self._done.append(self._logs(count))
            self._rest = self._rest[count * HOP :]

    def _logs(self, count: int) -> np.ndarray:
        """float32 [count, mels], the powers' logarithms. Frames of zeros, as behind short sounds, need no transform."""
        logs = np.full((count, self._mels), SILENCE, np.float32)
        heard = np.flatnonzero(self._rest[: (count - 1) * HOP + FFT])
        if len(heard):
            first, last = max(0, (heard[0] - FFT) // HOP + 1), min(count, heard[-1] // HOP + 1)
            windows = np.lib.stride_tricks.sliding_window_view(self._rest, FFT)[first * HOP :: HOP][: last - first]
            power = np.abs(np.fft.rfft(windows * _hann(), axis=1)) ** 2
            logs[first:last] = np.log10(np.maximum(power @ mel_filters(self._mels), 10.0**SILENCE))
        return logs


def settled(logs: np.ndarray, loudest: float) -> np.ndarray:
    """What `Spectrogram.take` gave as encoders read it, in its place.

    Args:
        loudest: of the whole sound; what is 80 dB below is silence.
    """
    np.maximum(logs, np.float32(loudest) - np.float32(8.0), out=logs)
    logs += 4.0
    logs *= 0.25
    return logs


@functools.lru_cache(maxsize=1)
def _hann() -> np.ndarray:
    return 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(FFT) / FFT)


def log_mel(samples: np.ndarray, mels: int = 80) -> np.ndarray:
    """float32 [len(samples) / HOP, mels] of a whole sound."""
    spectrogram = Spectrogram(mels)
    spectrogram.push(samples)
    return spectrogram.finish()
