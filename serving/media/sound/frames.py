"""Sound to the logarithms of mel bands that Gemma 3n's and 4's encoders read: numpy alone, in the types and the order of
transformers' feature extractors, whose numbers these are."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from serving.media.sound.files import RATE

BLOCK = 1024
"""Frames that are transformed at once."""


@dataclasses.dataclass(frozen=True)
class LogMel:
    """How frames become numbers.

    Attributes:
        mels: bands.
        length, hop: of a frame, and from one to the next, in samples.
        fft: of its transform.
        low, high: of the bands, in Hz.
        emphasis: of high frequencies: how much of the sample before is taken off.
        plain: it is taken off the first sample of a frame too, as if that came twice; else of the one before the frame.
        floor: of a band's magnitude: it is never below, or, where `added`, that much more.
        factor: of samples.
        mean, deviation: of each band, taken off and divided by; None where nothing is.
    """

    mels: int
    length: int
    hop: int
    fft: int
    low: float
    high: float
    emphasis: float
    plain: bool
    floor: float
    added: bool
    factor: float = 1.0
    mean: tuple[float, ...] | None = None
    deviation: tuple[float, ...] | None = None

    @classmethod
    def of(cls, said: Mapping[str, Any], defaults: Mapping[str, Any], added: bool) -> LogMel:
        """As a feature extractor's file says; the others are its class's defaults.

        Raises:
            ValueError: numbers with which nothing can be made, in a sentence.
        """
        own = {**defaults, **{name: said[name] for name in defaults if said.get(name) is not None}}
        rate = said.get("sampling_rate") or RATE
        if rate != RATE or own["dither"]:
            raise ValueError(
                f"preprocessor_config.json: sounds are read at {RATE} samples a second and without dither; it says "
                f"{rate} and {own['dither']}."
            )
        length, hop = (round(RATE * float(own[f"{name}_length_ms"]) / 1000) for name in ("frame", "hop"))
        mels = int(own["feature_size"])
        if not (1 <= hop <= length <= RATE and 1 <= mels <= 1024 and 0 <= own["min_frequency"] < own["max_frequency"]):
            raise ValueError(
                f"preprocessor_config.json: frames of {length} samples every {hop} with {mels} bands from "
                f"{own['min_frequency']} to {own['max_frequency']} Hz are not read."
            )
        bands = [said.get(name) for name in ("per_bin_mean", "per_bin_stddev")]
        for found in bands:
            if found is not None and len(found) != mels:
                raise ValueError(f"preprocessor_config.json: {len(found)} bands have a mean or deviation; {mels} are.")
        return cls(
            mels, length, hop, 2 ** math.ceil(math.log2(length)) * (2 if own["fft_overdrive"] else 1),
            float(own["min_frequency"]), float(own["max_frequency"]), float(own["preemphasis"]),
            bool(own["preemphasis_htk_flavor"]), float(own["mel_floor"]), added, float(own["input_scale_factor"]),
            *(None if found is None else tuple(map(float, found)) for found in bands),
        )  # fmt: skip

    def frames(self, samples: np.ndarray) -> np.ndarray:
        """float32 [n, mels] of samples, float32: of all frames that lie inside with one sample behind them."""
        if self.factor != 1.0:
            samples = samples * self.factor
        if len(samples) <= self.length:
            return np.zeros((0, self.mels), np.float32)
        windows = np.lib.stride_tricks.sliding_window_view(samples, self.length + 1)[:: self.hop]
        found = [self._logs(windows[at : at + BLOCK]) for at in range(0, len(windows), BLOCK)]
        return np.concatenate(found)

    def _logs(self, windows: np.ndarray) -> np.ndarray:
        if self.emphasis <= 0:
            frames = windows[:, :-1]
        elif self.plain:
            behind = windows[:, 1:-1] - self.emphasis * windows[:, :-2]
            frames = np.concatenate([windows[:, :1] * (1.0 - self.emphasis), behind], axis=1)
        else:
            frames = windows[:, 1:] - self.emphasis * windows[:, :-1]
        # Gemma 3n's, whose floor is not added, computes the window in float32: quiet bands show the difference.
        magnitude = np.abs(np.fft.rfft(frames * _hann(self.length, not self.added), n=self.fft, axis=1))
        bands = np.matmul(magnitude, mel_bands(self.mels, self.fft, self.low, self.high))
        logs = np.log(bands + self.floor) if self.added else np.log(np.maximum(bands, self.floor))
        logs = logs if self.mean is None else logs - np.array(self.mean)
        logs = logs if self.deviation is None else logs / np.array(self.deviation)
        return logs.astype(np.float32)


@functools.lru_cache(maxsize=4)
def _hann(length: int, single: bool) -> np.ndarray:
    at = np.arange(length, dtype=np.float32 if single else np.float64)
    return (0.5 * (1 - np.cos(2 * np.pi * at / length))).astype(np.float32)


@functools.lru_cache(maxsize=4)
def mel_bands(mels: int, fft: int, low: float, high: float) -> np.ndarray:
    """float64 [fft / 2 + 1, mels]: triangles, evenly spaced on HTK's scale, each as high as the others."""
    first, last = (2595.0 * math.log10(1.0 + hertz / 700.0) for hertz in (low, high))
    edges = 700.0 * (10 ** (np.linspace(first, last, mels + 2) / 2595.0) - 1.0)
    bins = np.arange(fft // 2 + 1) * (RATE / fft)
    rising = (bins[:, None] - edges[:-2]) / np.diff(edges)[:-1]
    falling = (edges[2:] - bins[:, None]) / np.diff(edges)[1:]
    return np.maximum(0.0, np.minimum(rising, falling))
